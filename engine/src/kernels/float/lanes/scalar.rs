//! Lanes as arrays: the definition of correct.

use half::{bf16, f16};

use super::Lanes;

/// Portable Rust.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Lanes for Scalar {
    type V = [f32; 16];

    const IS_WIDE: bool = false;

    #[inline(always)]
    fn splat(self, v: f32) -> [f32; 16] {
        [v; 16]
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> [f32; 16] {
        *v
    }

    #[inline(always)]
    fn store(self, v: [f32; 16], out: &mut [f32; 16]) {
        *out = v;
    }

    #[inline(always)]
    fn load_f16(self, v: &[f16; 16]) -> [f32; 16] {
        v.map(f16::to_f32_const)
    }

    #[inline(always)]
    fn store_f16(self, v: [f32; 16], out: &mut [f16; 16]) {
        *out = v.map(f16::from_f32_const);
    }

    #[inline(always)]
    fn f16_value(self, v: [u8; 2]) -> f32 {
        f16::from_le_bytes(v).to_f32_const()
    }

    #[inline(always)]
    fn load_f16_bytes(self, v: &[u8; 32]) -> [f32; 16] {
        std::array::from_fn(|i| f16::from_le_bytes([v[2 * i], v[2 * i + 1]]).to_f32_const())
    }

    #[inline(always)]
    fn load_bf16_bytes(self, v: &[u8; 32]) -> [f32; 16] {
        std::array::from_fn(|i| bf16::from_le_bytes([v[2 * i], v[2 * i + 1]]).to_f32_const())
    }

    #[inline(always)]
    fn load_i8(self, v: &[u8; 32]) -> [[f32; 16]; 2] {
        [0, 16].map(|at| std::array::from_fn(|i| f32::from(v[at + i].cast_signed())))
    }

    #[inline(always)]
    fn load_i8_half(self, v: &[i8; 16]) -> [f32; 16] {
        v.map(f32::from)
    }

    #[inline(always)]
    fn scaled_nibbles(self, v: &[u8; 16], scale: f32) -> [[f32; 16]; 2] {
        let scaled = |nibble: u8| (f32::from(nibble) - 8.0) * scale;
        [v.map(|b| scaled(b & 15)), v.map(|b| scaled(b >> 4))]
    }

    #[inline(always)]
    fn prefetch(self, _bytes: &[u8], _at: usize) {}

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn exp(self, v: [f32; 16]) -> [f32; 16] {
        v.map(super::exp)
    }

    #[inline(always)]
    fn sum(self, mut v: [f32; 16]) -> f32 {
        for half in [8, 4, 2, 1] {
            for j in 0..half {
                v[j] += v[j + half];
            }
        }
        v[0]
    }
}
