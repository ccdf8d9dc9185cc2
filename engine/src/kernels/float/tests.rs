//! Every kernel against its definition written out plainly, on every instruction set, bit for bit.

mod attention_tests;
mod dense_tests;
mod lanes_tests;

use proptest::prelude::*;

use super::{Activation, RopeStyle, RopeTable};
use crate::kernels::KernelSet;
use crate::pool::{PoolOptions, ThreadPool};

/// The dot product in the order of the `float` module.
fn plain_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for i in 0..a.len().next_multiple_of(16) {
        let (a, b) = (a.get(i).unwrap_or(&0.0), b.get(i).unwrap_or(&0.0));
        lanes[i % 16] = a.mul_add(*b, lanes[i % 16]);
    }
    plain_tree(lanes)
}

fn plain_tree(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for j in 0..half {
            lanes[j] += lanes[j + half];
        }
    }
    lanes[0]
}

#[track_caller]
fn assert_same(found: &[f32], expected: &[f32], what: &dyn std::fmt::Debug) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan()), "{what:?}: {i}: {f:e} for {e:e}");
    }
}

/// Pseudo-random values about -1 to 1, now and then tiny or large.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u16::try_from(state >> 48).unwrap()
    };
    (0..n)
        .map(|_| {
            let v = f32::from(next()) / 32768.0 - 1.0;
            match next() % 64 {
                0 => v * 1e-20,
                1 => v * 100.0,
                _ => v,
            }
        })
        .collect()
}

fn pools() -> [ThreadPool; 2] {
    [1, 3].map(|n| ThreadPool::new(PoolOptions::unpinned(n)).unwrap())
}

fn any_float() -> impl Strategy<Value = f32> {
    prop_oneof![8 => -4.0f32..4.0, 1 => -120.0f32..120.0, 1 => any::<u32>().prop_map(f32::from_bits)]
}

fn rows(n: usize) -> impl Strategy<Value = Vec<(f32, f32)>> {
    proptest::collection::vec((any_float(), any_float()), 1..n)
}

proptest! {
    #[test]
    fn elementwise_kernels_agree_with_their_definition(values in rows(70)) {
        let (x, y): (Vec<f32>, Vec<f32>) = values.into_iter().unzip();
        let n = u16::try_from(x.len()).unwrap();
        let r = 1.0 / (plain_dot(&x, &x) / f32::from(n) + 1e-5).sqrt();
        let normed: Vec<f32> = x.iter().zip(&y).map(|(x, w)| (x * r) * w).collect();
        let relu: Vec<f32> = x.iter().zip(&y).map(|(g, u)| {
            let g = if *g <= 0.0 { 0.0 } else { *g };
            (g * g) * u
        }).collect();
        let silu: Vec<f32> =
            x.iter().zip(&y).map(|(g, u)| (g / (1.0 + super::lanes::exp(-g))) * u).collect();
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        let halves: Vec<f32> = x.iter().map(|x| half::f16::from_f32_const(*x).to_f32_const()).collect();
        for set in KernelSet::all_present() {
            let mut out = vec![0.0; x.len()];
            set.rms_norm_row(&x, &y, 1e-5, &mut out);
            assert_same(&out, &normed, &(set, "rms_norm"));
            set.glu_row(Activation::ReluSquared, &x, &y, &mut out);
            assert_same(&out, &relu, &(set, "relu^2"));
            set.glu_row(Activation::Silu, &x, &y, &mut out);
            assert_same(&out, &silu, &(set, "silu"));
            out.copy_from_slice(&x);
            set.add_row(&mut out, &y);
            assert_same(&out, &sum, &(set, "add"));
            let mut stored = vec![half::f16::ZERO; x.len()];
            set.store_f16_row(&x, &mut stored);
            let stored: Vec<f32> = stored.iter().map(|v| v.to_f32_const()).collect();
            assert_same(&stored, &halves, &(set, "f16"));
        }
    }

    #[test]
    fn rope_agrees_with_its_definition(
        n_half in 1usize..40, extra in 0usize..5, heads in 1usize..4, n in 0usize..10, seed: u64, is_neox: bool,
    ) {
        let (n_rot, head_dim) = (2 * n_half, 2 * n_half + extra);
        let factors: Vec<f32> = noise(seed, n_half).iter().map(|f| f.abs() + 0.5).collect();
        let mut table = RopeTable::new(64, n_rot, 10000.0, (seed % 2 == 0).then_some(&factors));
        prop_assert_eq!((table.n_ctx(), table.n_rot()), (64, n_rot));
        // In two steps, and nothing for what is there.
        [5, 63, 7].into_iter().for_each(|position| table.reach(position));
        let positions: Vec<u32> = (0..u32::try_from(n).unwrap()).map(|i| (i * 7 + 3) % 64).collect();
        let x = noise(seed ^ 1, n * heads * head_dim);
        let mut expected = x.clone();
        for (head, out) in expected.chunks_mut(head_dim).enumerate() {
            let position = f64::from(positions[head / heads]);
            for (i, factor) in factors.iter().enumerate() {
                let frequency = libm::pow(10000.0, -2.0 * f64::from(u32::try_from(i).unwrap()) / f64::from(u32::try_from(n_rot).unwrap()));
                let frequency = if seed % 2 == 0 { frequency / f64::from(*factor) } else { frequency };
                #[expect(clippy::cast_possible_truncation, reason = "as the table does")]
                let (sin, cos) = (libm::sin(position * frequency) as f32, libm::cos(position * frequency) as f32);
                let (i, j) = if is_neox { (i, i + n_half) } else { (2 * i, 2 * i + 1) };
                let (a, b) = (out[i], out[j]);
                out[i] = (-b).mul_add(sin, a * cos);
                out[j] = a.mul_add(sin, b * cos);
            }
        }
        let style = if is_neox { RopeStyle::Neox } else { RopeStyle::Norm };
        for pool in &pools() {
            for set in KernelSet::all_present() {
                let mut out = x.clone();
                set.rope_rows(pool, &mut out, heads, &table, &positions, style);
                assert_same(&out, &expected, &(set, style));
            }
        }
    }
}

#[test]
fn norms_of_several_rows_are_those_of_each() {
    let (x, weight) = (noise(1, 7 * 48), noise(2, 48));
    for pool in &pools() {
        for set in KernelSet::all_present() {
            let (mut rows, mut row) = (vec![0.0; x.len()], vec![0.0; 48]);
            set.rms_norm_rows(pool, &x, &weight, 1e-6, &mut rows);
            for (x, out) in x.chunks(48).zip(rows.chunks(48)) {
                set.rms_norm_row(x, &weight, 1e-6, &mut row);
                assert_same(out, &row, &set);
            }
        }
    }
}
