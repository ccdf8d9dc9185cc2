//! Sixteen-lane arithmetic.

use half::f16;
use proptest::prelude::*;

use super::super::lanes::{Lanes, LanesTask, exp};
use super::{any_float, assert_same, noise, plain_tree};
use crate::kernels::KernelSet;

/// Every operation on three vectors.
struct Everything<'a>(&'a [f32; 48], &'a [u8; 64]);

impl LanesTask for Everything<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Vec<f32> {
        let [a, b, c] = [0, 1, 2].map(|i| lanes.load(&self.0.as_chunks().0[i]));
        let bytes = self.1.as_chunks::<32>().0;
        let nibbles = self.1.as_chunks::<16>().0;
        let mut halves = [f16::ZERO; 16];
        lanes.store_f16(a, &mut halves);
        let mut vectors = vec![
            lanes.add(a, b),
            lanes.mul(a, b),
            lanes.fma(a, b, c),
            lanes.max(a, b),
            lanes.exp(a),
            lanes.load_f16(&halves),
            lanes.load_f16_bytes(&bytes[0]),
            lanes.load_bf16_bytes(&bytes[1]),
            lanes.splat(lanes.f16_value([self.1[5], self.1[6]])),
            lanes.splat(lanes.sum(a)),
        ];
        vectors.extend(lanes.load_i8(&bytes[0]));
        vectors.push(lanes.load_i8_half(&nibbles[1].map(u8::cast_signed)));
        vectors.extend(lanes.scaled_nibbles(&nibbles[3], self.0[0]));
        let mut out = vec![[0.0; 16]; vectors.len()];
        for (v, out) in vectors.into_iter().zip(&mut out) {
            lanes.store(v, out);
        }
        out.as_flattened().to_vec()
    }
}

proptest! {
    #[test]
    fn every_set_computes_the_same_lanes(
        floats in proptest::collection::vec(any_float(), 48),
        bytes in proptest::collection::vec(any::<u8>(), 64),
    ) {
        let (floats, bytes) = (floats.try_into().unwrap(), bytes.try_into().unwrap());
        let mut sets = KernelSet::all_present();
        let expected = sets.next().unwrap().on_lanes(Everything(&floats, &bytes));
        for set in sets {
            assert_same(&set.on_lanes(Everything(&floats, &bytes)), &expected, &set);
        }
    }

    #[test]
    fn exp_is_close(x in -87.0f32..88.5) {
        let exact = libm::exp(f64::from(x));
        prop_assert!((f64::from(exp(x)) - exact).abs() <= exact * 1.5e-7, "{x}");
    }
}

#[test]
fn exp_at_its_edges() {
    let values = [0.0, -0.0, -87.31, -1e30, f32::NEG_INFINITY, 88.71, f32::INFINITY].map(exp);
    assert_eq!(values, [1.0, 1.0, 0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY]);
    assert!(exp(f32::NAN).is_nan());
}

#[test]
fn a_sum_is_the_tree() {
    struct Sum<'a>(&'a [f32; 16]);
    impl LanesTask for Sum<'_> {
        type Output = f32;

        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) -> f32 {
            lanes.sum(lanes.load(self.0))
        }
    }
    let v: [f32; 48] = noise(3, 48).try_into().unwrap();
    for set in KernelSet::all_present() {
        for v in v.as_chunks().0 {
            assert_same(&[set.on_lanes(Sum(v))], &[plain_tree(*v)], &set);
        }
    }
}
