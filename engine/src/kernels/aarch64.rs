//! Sums of products of small unsigned codes and signed bytes on ARM: what the ternary kernels and the fast head share.

#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::aarch64::*;
use std::arch::asm;

/// How to add up products. A value of such a type is proof that the code that holds it is compiled for what it needs,
/// and the CPU has it; whatever takes one must be inlined into such code.
pub(super) trait Products: Copy {
    /// Sums of one row times one token, perhaps narrow.
    type Sums: Copy;

    /// How many products of such a magnitude `Sums` holds without overflow.
    fn narrow_products(magnitude: usize) -> usize;

    fn zero(self) -> Self::Sums;
    /// Adds the products of 16 codes (below 128) and 16 signed values.
    fn add(self, sums: Self::Sums, codes: uint8x16_t, values: uint8x16_t) -> Self::Sums;
    /// Adds `sums` to sums of 32 bits.
    fn widen(self, wide: int32x4_t, sums: Self::Sums) -> int32x4_t;

    /// Sums of 32 bits, all 0.
    #[inline(always)]
    fn wide_zero(self) -> int32x4_t {
        // SAFETY: `self` proves Advanced SIMD.
        unsafe { vdupq_n_s32(0) }
    }

    /// The sum of the lanes.
    #[inline(always)]
    fn horizontal_sum(self, sums: int32x4_t) -> i32 {
        // SAFETY: `self` proves Advanced SIMD.
        unsafe { vaddvq_s32(sums) }
    }

    /// Each byte shifted.
    #[inline(always)]
    fn shift_right<const N: i32>(self, v: uint8x16_t) -> uint8x16_t {
        // SAFETY: `self` proves Advanced SIMD.
        unsafe { vshrq_n_u8::<N>(v) }
    }

    /// Each byte and `mask`.
    #[inline(always)]
    fn and(self, v: uint8x16_t, mask: u8) -> uint8x16_t {
        // SAFETY: `self` proves Advanced SIMD.
        let mask = unsafe { vdupq_n_u8(mask) };
        // SAFETY: as above.
        unsafe { vandq_u8(v, mask) }
    }

    /// 16 bytes.
    ///
    /// # Safety
    /// They can be read.
    #[inline(always)]
    unsafe fn load(self, from: *const u8) -> uint8x16_t {
        // SAFETY: the caller's promise, and `self` proves Advanced SIMD.
        unsafe { vld1q_u8(from) }
    }
}

/// `smlal`: eight sums of 16 bits.
#[derive(Clone, Copy)]
pub(super) struct MultiplyAdd(());

impl MultiplyAdd {
    /// # Safety
    /// The calling code is compiled for Advanced SIMD, and the CPU has it.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Products for MultiplyAdd {
    type Sums = int16x8_t;

    #[inline(always)]
    fn narrow_products(magnitude: usize) -> usize {
        i16::MAX as usize / magnitude * 8
    }

    #[inline(always)]
    fn zero(self) -> int16x8_t {
        // SAFETY: `self` proves Advanced SIMD.
        unsafe { vdupq_n_s16(0) }
    }

    #[inline(always)]
    fn add(self, sums: int16x8_t, codes: uint8x16_t, values: uint8x16_t) -> int16x8_t {
        // SAFETY: `self` proves Advanced SIMD.
        unsafe { multiply_add(sums, codes, values) }
    }

    #[inline(always)]
    fn widen(self, wide: int32x4_t, sums: int16x8_t) -> int32x4_t {
        // SAFETY: `self` proves Advanced SIMD.
        unsafe { vpadalq_s16(wide, sums) }
    }
}

/// `sdot`: four sums of 32 bits.
#[derive(Clone, Copy)]
pub(super) struct DotProduct(());

impl DotProduct {
    /// # Safety
    /// The calling code is compiled for Advanced SIMD and its dot product, and the CPU has both.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Products for DotProduct {
    type Sums = int32x4_t;

    /// As many as a row may have, and more.
    #[inline(always)]
    fn narrow_products(magnitude: usize) -> usize {
        i32::MAX as usize / magnitude * 4
    }

    #[inline(always)]
    fn zero(self) -> int32x4_t {
        self.wide_zero()
    }

    #[inline(always)]
    fn add(self, sums: int32x4_t, codes: uint8x16_t, values: uint8x16_t) -> int32x4_t {
        // SAFETY: `self` proves Advanced SIMD and the dot product.
        unsafe { dot_product(sums, codes, values) }
    }

    #[inline(always)]
    fn widen(self, wide: int32x4_t, sums: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves Advanced SIMD.
        unsafe { vaddq_s32(wide, sums) }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn multiply_add(sums: int16x8_t, codes: uint8x16_t, values: uint8x16_t) -> int16x8_t {
    let (codes, values) = (vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(values));
    vmlal_high_s8(vmlal_s8(sums, vget_low_s8(codes), vget_low_s8(values)), codes, values)
}

/// Each lane adds four products. (Rust 1.95 has no stable intrinsic for it.)
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot_product(mut sums: int32x4_t, codes: uint8x16_t, values: uint8x16_t) -> int32x4_t {
    // SAFETY: one instruction on registers, which this function is compiled for.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {codes:v}.16b, {values:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            values = in(vreg) values,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
