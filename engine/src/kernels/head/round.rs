//! Rotation, and the rounding of rotated rows to codes.
#![expect(
    clippy::inline_always,
    reason = "tasks must be compiled into the function of their instruction set"
)]
#![expect(clippy::cast_precision_loss, reason = "row lengths are far below 2^24")]
#![expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "codes are clamped to 0..=15")]

use crate::head::rotation_len;
use crate::kernels::KernelSet;
use crate::kernels::float::lanes::{Lanes, LanesTask, dot};

/// Error of an activation's rounding to int8, relative to its norm, that error factors allow for.
const ACTIVATION_ERROR: f32 = 0.025;

impl KernelSet {
    /// Rotates a row (padded) in place and rounds it to `codes`. Returns its scale and error factor, or `None` if
    /// it is not finite.
    pub(crate) fn quantize_head_row(self, values: &mut [f32], codes: &mut [u8]) -> Option<[f32; 2]> {
        assert_eq!(values.len(), codes.len() * 2, "two codes to a byte");
        self.on_lanes(Round { values, codes })
    }
}

/// Multiplies with fixed signs, then with Hadamard matrices (orthonormal) of [`rotation_len`].
#[inline(always)]
pub(super) fn rotate(values: &mut [f32]) {
    for (i, group) in values.chunks_mut(64).enumerate() {
        let signs = sign_bits(i as u64);
        for (bit, v) in group.iter_mut().enumerate() {
            *v = f32::from_bits(v.to_bits() ^ ((signs >> bit) as u32 & 1) << 31);
        }
    }
    let len = rotation_len(values.len());
    let scale = 1.0 / (len as f32).sqrt();
    for block in values.chunks_exact_mut(len) {
        let mut half = 1;
        while half < len {
            for pair in block.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        block.iter_mut().for_each(|v| *v *= scale);
    }
}

/// 64 fixed random bits (the splitmix64 sequence).
fn sign_bits(i: u64) -> u64 {
    let mut z = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct Round<'a> {
    values: &'a mut [f32],
    codes: &'a mut [u8],
}

impl LanesTask for Round<'_> {
    type Output = Option<[f32; 2]>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Option<[f32; 2]> {
        if self.values.iter().any(|v| !v.is_finite()) {
            return None;
        }
        rotate(self.values);
        let rotated = &*self.values;
        let n = rotated.len() as f32;
        let norm_squared = dot(lanes, rotated, rotated);
        let absmax = rotated.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        // Half steps about the best for a normal distribution, and the one without clipping.
        let deviation = (norm_squared / n).sqrt();
        let half_steps = [0.150, 0.160, 0.168, 0.176, 0.188].map(|c| c * deviation);
        let mut best = (f32::INFINITY, 0.0);
        for half_step in half_steps.into_iter().chain([absmax / 15.0]) {
            let error = rounding_error(rotated, half_step);
            if error < best.0 {
                best = (error, half_step);
            }
        }
        let (error_squared, half_step) = best;
        let inverse = 0.5 / half_step;
        // Zeros, and rows too small or large for the arithmetic here, which no head has.
        if !(norm_squared.is_normal() && inverse.is_normal() && error_squared.is_finite()) {
            self.codes.fill(0x88);
            return (norm_squared < 1e-30).then_some([0.0, norm_squared.sqrt()]);
        }
        for (group, codes) in rotated.chunks_exact(128).zip(self.codes.chunks_exact_mut(64)) {
            let (low, high) = group.split_at(64);
            for ((low, high), out) in low.iter().zip(high).zip(codes) {
                *out = code(*low, inverse) as u8 | (code(*high, inverse) as u8) << 4;
            }
        }
        // Stretched so that the row times itself is right: likely tokens are those that point where `x` points.
        let stretch = norm_squared / rounded_product(rotated, half_step);
        let activation_error = ACTIVATION_ERROR * ACTIVATION_ERROR * norm_squared;
        Some([half_step * stretch, ((error_squared + activation_error) / n).sqrt()])
    }
}

/// The code 0..=15 of a value; `inverse` is one over twice the half step.
#[inline(always)]
fn code(v: f32, inverse: f32) -> f32 {
    let code = v.mul_add(inverse, 7.5).round_ties_even();
    // Not `clamp`, which keeps the sign of zero and NaN and so takes more instructions.
    let code = if code > 0.0 { code } else { 0.0 };
    if code < 15.0 { code } else { 15.0 }
}

/// Squared error of the rounded row.
#[inline(always)]
fn rounding_error(rotated: &[f32], half_step: f32) -> f32 {
    let inverse = 0.5 / half_step;
    let mut sums = [0.0f32; 16];
    for group in rotated.as_chunks::<16>().0 {
        for (sum, v) in sums.iter_mut().zip(group) {
            let error = (15.0 - 2.0 * code(*v, inverse)).mul_add(half_step, *v);
            *sum = error.mul_add(error, *sum);
        }
    }
    sums.iter().sum()
}

/// The row times the rounded row.
#[inline(always)]
fn rounded_product(rotated: &[f32], half_step: f32) -> f32 {
    let inverse = 0.5 / half_step;
    let mut sums = [0.0f32; 16];
    for group in rotated.as_chunks::<16>().0 {
        for (sum, v) in sums.iter_mut().zip(group) {
            *sum = v.mul_add((2.0 * code(*v, inverse) - 15.0) * half_step, *sum);
        }
    }
    sums.iter().sum()
}
