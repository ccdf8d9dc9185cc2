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
    /// Rotates a row (padded) in place and rounds it to the two halves of `codes`. Returns scale and error factor with
    /// the first half, then with both, or `None` if the row is not finite.
    pub(crate) fn quantize_head_row(self, values: &mut [f32], codes: [&mut [u8]; 2]) -> Option<[f32; 4]> {
        for codes in &codes {
            assert_eq!(values.len(), codes.len() * 4, "four codes to a byte");
        }
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
    codes: [&'a mut [u8]; 2],
}

/// Half a step, of 16, for a normal distribution of deviation 1. The first half alone is best with 0.126 and both with 0.168; with
/// this, few rows more than at best stay open after the first, and after both.
const HALF_STEP: f32 = 0.138;

impl LanesTask for Round<'_> {
    type Output = Option<[f32; 4]>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Option<[f32; 4]> {
        let Self { values, codes: [first, second] } = self;
        let mut is_finite = true;
        for v in values.iter() {
            is_finite &= v.is_finite();
        }
        if !is_finite {
            return None;
        }
        rotate(values);
        let rotated = &*values;
        let n = rotated.len() as f32;
        let norm_squared = dot(lanes, rotated, rotated);
        let half_step = HALF_STEP * (norm_squared / n).sqrt();
        let inverse = 0.5 / half_step;
        // Zeros, and rows too small or large for the arithmetic here, which no head has.
        if !(norm_squared.is_normal() && inverse.is_normal()) {
            first.fill(0);
            second.fill(0);
            let error = norm_squared.sqrt();
            return (norm_squared < 1e-30).then_some([0.0, error, 0.0, error]);
        }
        let mut sums = [[0.0f32; 16]; 4];
        let groups = rotated.as_chunks::<256>().0.iter();
        let first = first.as_chunks_mut::<64>().0.iter_mut();
        for ((group, first), second) in groups.zip(first).zip(second.as_chunks_mut::<64>().0) {
            round_group(group, inverse, [first, second], &mut sums);
        }
        let [first_product, first_squares, product, squares] =
            sums.map(|lanes| lanes.iter().sum::<f32>() * half_step);
        let of = |product: f32, squares: f32| {
            // Stretched so that the row times itself is right: likely tokens are those that point where `x` points.
            let stretch = norm_squared / product;
            let error_squared = (stretch * stretch * (squares * half_step) - norm_squared).max(0.0);
            let activation_error = ACTIVATION_ERROR * ACTIVATION_ERROR * norm_squared;
            [half_step * stretch, ((error_squared + activation_error) / n).sqrt()]
        };
        let [first_scale, first_error] = of(first_product, first_squares);
        let [scale, error] = of(product, squares);
        // A step of the first half is four of both.
        let factors = [4.0 * first_scale, first_error, scale, error];
        factors.iter().all(|factor| factor.is_finite()).then_some(factors)
    }
}

/// Rounds 256 columns, and adds to the sums of products and squares (in steps) with the first half and with both.
#[inline(always)]
fn round_group(
    group: &[f32; 256],
    inverse: f32,
    [first, second]: [&mut [u8; 64]; 2],
    sums: &mut [[f32; 16]; 4],
) {
    let mut codes = [0u8; 256];
    for (values, codes) in group.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut::<16>().0) {
        for lane in 0..16 {
            let v = values[lane];
            let code = code(v, inverse);
            codes[lane] = code as u8;
            let coarse = (code * 0.25).floor();
            let (coarse_steps, steps) = (8.0 * coarse - 12.0, 2.0 * code - 15.0);
            sums[0][lane] = v.mul_add(coarse_steps, sums[0][lane]);
            sums[1][lane] = coarse_steps.mul_add(coarse_steps, sums[1][lane]);
            sums[2][lane] = v.mul_add(steps, sums[2][lane]);
            sums[3][lane] = steps.mul_add(steps, sums[3][lane]);
        }
    }
    let [a, b, c, d] = [0, 1, 2, 3].map(|place| &codes[64 * place..][..64]);
    for p in 0..64 {
        first[p] = a[p] >> 2 | (b[p] >> 2) << 2 | (c[p] >> 2) << 4 | (d[p] >> 2) << 6;
        second[p] = a[p] & 3 | (b[p] & 3) << 2 | (c[p] & 3) << 4 | (d[p] & 3) << 6;
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
