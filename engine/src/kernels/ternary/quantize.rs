//! Absmax int8 quantisation of activations, alone or behind an RMSNorm or a gated unit.
//!
//! With `m` the largest magnitude of a row and never less than 1e-5 (in f64), `scale = (f32)(127 / m)` and
//! value = `activation * scale`, clamped to -128..=127 and rounded half to even. NaN counts as 0.

#![expect(unsafe_code, reason = "calls the instruction set that `KernelSet` has seen")]

use std::cell::RefCell;

use super::quantized_rows::{QuantizedRows, Row};
use crate::kernels::float::Activation;
use crate::kernels::{Isa, KernelSet};
use crate::pool::ThreadPool;

/// Adding and subtracting it rounds an f32 of magnitude below 2^22 to an integer, half to even.
const ROUNDER: f32 = 12_582_912.0;

thread_local! {
    /// Two rows of floats between the steps; grows to the longest row once per thread.
    static ROWS: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Weight and epsilon of an RMSNorm.
pub type Norm<'a> = (&'a [f32], f32);

impl KernelSet {
    /// Quantises the rows of `x`, `(n, n_cols)`, after an RMSNorm if one is given.
    ///
    /// # Panics
    /// If `x` is not as large as `out`, or the weight of the norm not as long as a row.
    pub fn norm_quantize(
        self,
        pool: &ThreadPool,
        x: &[f32],
        norm: Option<Norm<'_>>,
        out: &mut QuantizedRows,
    ) {
        let n_cols = out.n_cols();
        assert_eq!(x.len(), out.n_rows() * n_cols, "activations of {out:?}");
        out.fill_rows(pool, &|row, target| {
            let x = &x[row * n_cols..(row + 1) * n_cols];
            ROWS.with_borrow_mut(|[normed, _]| self.norm_quantize_row(x, norm, normed, target));
        });
    }

    /// Quantises `act(gate) * up`, `(n, n_cols)`, after an RMSNorm if one is given.
    ///
    /// # Panics
    /// If `gate` or `up` is not as large as `out`, or the weight of the norm not as long as a row.
    pub fn glu_norm_quantize(
        self,
        pool: &ThreadPool,
        act: Activation,
        [gate, up]: [&[f32]; 2],
        norm: Option<Norm<'_>>,
        out: &mut QuantizedRows,
    ) {
        let n_cols = out.n_cols();
        assert_eq!(gate.len(), out.n_rows() * n_cols, "gates of {out:?}");
        assert_eq!(up.len(), gate.len(), "gated values");
        out.fill_rows(pool, &|row, target| {
            let cols = row * n_cols..(row + 1) * n_cols;
            ROWS.with_borrow_mut(|[normed, gated]| {
                gated.resize(n_cols, 0.0);
                self.glu_row(act, &gate[cols.clone()], &up[cols], gated);
                self.norm_quantize_row(gated, norm, normed, target);
            });
        });
    }

    fn norm_quantize_row(self, x: &[f32], norm: Option<Norm<'_>>, normed: &mut Vec<f32>, out: &mut Row) {
        let Some((weight, eps)) = norm else { return self.quantize_row(x, out) };
        normed.resize(x.len(), 0.0);
        self.rms_norm_row(x, weight, eps, normed);
        self.quantize_row(normed, out);
    }

    /// Quantises one row.
    fn quantize_row(self, x: &[f32], out: &mut Row) {
        match self.isa() {
            // SAFETY: `isa` is one of these only if `for_isa` saw AVX2 and FMA on this CPU.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { quantize_row_avx2(x, out) },
            // SAFETY: `isa` is `Avx512Vnni` only if `for_isa` saw AVX-512 F, BW and VL on this CPU.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => unsafe { quantize_row_avx512(x, out) },
            // SAFETY: `isa` is one of these only if `for_isa` saw Advanced SIMD on this CPU.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon | Isa::NeonDotprod => unsafe { quantize_row_neon(x, out) },
            _ => quantize_row_body(x, out),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_row_avx2(x: &[f32], out: &mut Row) {
    quantize_row_body(x, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn quantize_row_avx512(x: &[f32], out: &mut Row) {
    quantize_row_body(x, out);
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
fn quantize_row_neon(x: &[f32], out: &mut Row) {
    quantize_row_body(x, out);
}

/// The definition. It is compiled once for each instruction set: single IEEE operations and integers come out
/// the same on all of them.
#[inline(always)]
fn quantize_row_body(x: &[f32], out: &mut Row) {
    let absmax = absmax(x);
    #[expect(clippy::cast_possible_truncation, reason = "the scale is defined as an f32")]
    let scale = (127.0 / f64::from(absmax).max(1e-5)) as f32;
    out.fill(x.len(), scale, |cols, values| {
        for (value, x) in values.iter_mut().zip(&x[cols]) {
            *value = quantized(x * scale);
        }
    });
}

/// Largest magnitude; NaN counts as 0.
#[inline(always)]
fn absmax(x: &[f32]) -> f32 {
    // Magnitudes order like their bits, and integers let the compiler reorder.
    let magnitude = |x: &f32| {
        let bits = x.to_bits() & 0x7fff_ffff;
        if bits > f32::INFINITY.to_bits() { 0 } else { bits }
    };
    // Lanes by hand: of the iterator's maximum no vector loop is made.
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [0; 16];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = magnitude(x).max(*lane);
        }
    }
    f32::from_bits(rest.iter().map(magnitude).chain(lanes).fold(0, u32::max))
}

#[inline(always)]
fn quantized(x: f32) -> i8 {
    let x = if x.is_nan() { 0.0 } else { x };
    let bits = (x.clamp(-128.0, 127.0) + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits());
    bits.to_le_bytes()[0].cast_signed()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pool::PoolOptions;

    fn quantize(kernels: KernelSet, x: &[f32], n_rows: usize) -> (QuantizedRows, Vec<i8>) {
        let n_cols = x.len() / n_rows;
        let pool = ThreadPool::new(PoolOptions::unpinned(2)).unwrap();
        let mut rows = QuantizedRows::new(n_rows, n_cols);
        rows.reset(n_rows, n_cols);
        kernels.norm_quantize(&pool, x, None, &mut rows);
        let value = |i: usize| rows.value(i / n_cols, i % n_cols);
        let values = (0..x.len()).map(value).collect();
        (rows, values)
    }

    #[test]
    fn rounds_half_to_even() {
        let mut x = [0.0_f32; 128];
        x[..8].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 63.4]);
        for kernels in KernelSet::all_present() {
            let (rows, values) = quantize(kernels, &x, 1);
            assert_eq!(values[..8], [127, 0, 2, 2, 0, -2, -127, 63], "{}", kernels.isa());
            assert_eq!((rows.scale(0), rows.sum(0)), (1.0, 127 + 2 + 2 - 2 - 127 + 63));
        }
    }

    #[test]
    fn zeros_nan_and_infinity_have_defined_values() {
        for kernels in KernelSet::all_present() {
            let (rows, values) = quantize(kernels, &[0.0; 256], 2);
            assert_eq!((values, rows.scale(0)), (vec![0; 256], 12_700_000.0));
            let mut x = [1.0_f32; 128];
            x[1] = f32::NAN;
            let (_, values) = quantize(kernels, &x, 1);
            assert_eq!(values[..3], [127, 0, 127]);
            x[1] = f32::NEG_INFINITY;
            let (rows, values) = quantize(kernels, &x, 1);
            assert_eq!((values, rows.scale(0)), (vec![0; 128], 0.0));
        }
    }

    /// The definition at the top of this file, in other words: `(scale, values)` of a row.
    fn plainly(x: &[f32]) -> (f32, Vec<i8>) {
        let numbers = || x.iter().map(|x| if x.is_nan() { 0.0 } else { *x });
        let absmax = numbers().fold(0.0, |m: f32, x| m.max(x.abs()));
        #[expect(clippy::cast_possible_truncation, reason = "the scale is defined as an f32")]
        let scale = (127.0 / f64::from(absmax).max(1e-5)) as f32;
        let value = |x: f32| {
            let scaled = x * scale; // Not a number where zero meets infinity.
            let rounded = if scaled.is_nan() { 0.0 } else { scaled.clamp(-128.0, 127.0).round_ties_even() };
            #[expect(clippy::cast_possible_truncation, reason = "a whole number from -128 to 127")]
            let value = rounded as i8;
            value
        };
        (scale, numbers().map(value).collect())
    }

    fn some_rows() -> impl Strategy<Value = (usize, Vec<f32>)> {
        let x = |(n_rows, n_blocks)| {
            let value = prop_oneof![8 => -3.0_f32..3.0, 1 => any::<f32>()];
            (Just(n_rows), prop::collection::vec(value, n_rows * n_blocks * 128))
        };
        (1..8_usize, 1..12_usize).prop_flat_map(x)
    }

    proptest! {
        #[test]
        fn every_isa_agrees_with_the_definition((n_rows, x) in some_rows()) {
            let n_cols = x.len() / n_rows;
            for kernels in KernelSet::all_present() {
                let (rows, values) = quantize(kernels, &x, n_rows);
                for (row, x) in x.chunks(n_cols).enumerate() {
                    let (scale, expected) = plainly(x);
                    prop_assert_eq!(&values[row * n_cols..][..n_cols], &expected, "{}", kernels.isa());
                    prop_assert_eq!(rows.scale(row).to_bits(), scale.to_bits());
                    let sum: i32 = expected.iter().map(|&v| i32::from(v)).sum();
                    prop_assert_eq!(rows.sum(row), sum);
                    prop_assert_eq!(rows.block_sums(row).iter().sum::<i32>(), sum);
                }
            }
        }

        #[test]
        fn a_norm_and_a_gate_come_before((n_rows, gate) in some_rows(), is_relu in any::<bool>()) {
            let n_cols = gate.len() / n_rows;
            let pool = ThreadPool::new(PoolOptions::unpinned(2)).unwrap();
            let up: Vec<f32> = gate.iter().rev().map(|x| x.clamp(-9.0, 9.0)).collect();
            let weight: Vec<f32> = (0_u8..32).cycle().take(n_cols).map(|i| 1.0 + f32::from(i) * 0.01).collect();
            let act = if is_relu { Activation::ReluSquared } else { Activation::Silu };
            for kernels in KernelSet::all_present() {
                let mut h = vec![0.0; gate.len()];
                kernels.glu_row(act, &gate, &up, &mut h);
                let mut normed = vec![0.0; gate.len()];
                kernels.rms_norm_rows(&pool, &h, &weight, 1e-5, &mut normed);
                let (_, expected) = quantize(kernels, &normed, n_rows);
                let mut rows = QuantizedRows::new(n_rows, n_cols);
                let norm = Some((&weight[..], 1e-5));
                let all = |rows: &QuantizedRows| -> Vec<i8> {
                    (0..gate.len()).map(|i| rows.value(i / n_cols, i % n_cols)).collect()
                };
                rows.reset(n_rows, n_cols);
                kernels.norm_quantize(&pool, &h, norm, &mut rows);
                prop_assert_eq!(all(&rows), &expected[..], "{}", kernels.isa());
                rows.reset(n_rows, n_cols);
                kernels.glu_norm_quantize(&pool, act, [&gate, &up], norm, &mut rows);
                prop_assert_eq!(all(&rows), &expected[..], "{}", kernels.isa());
            }
        }
    }
}
