//! Lanes as two ymm registers: lanes 0 to 7 and 8 to 15.
#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::x86_64::*;

use half::f16;

use super::{Lanes, LanesTask, exp_constants};

/// Proof that the code that holds it is compiled for AVX2, FMA and F16C, and the CPU has them: only [`run`]
/// makes one, and its caller vouches for the CPU.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Runs `task` with AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run<T: LanesTask>(task: T) -> T::Output {
    task.run(Avx2(()))
}

/// Lanes 0 to 7, lanes 8 to 15.
type Pair = [__m256; 2];

impl Lanes for Avx2 {
    type V = Pair;

    const IS_WIDE: bool = false;

    #[inline(always)]
    fn splat(self, v: f32) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { splat(v) }
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { load(v) }
    }

    #[inline(always)]
    fn store(self, v: Pair, out: &mut [f32; 16]) {
        // SAFETY: `self` proves the features.
        unsafe { store(v, out) }
    }

    #[inline(always)]
    fn load_f16(self, v: &[f16; 16]) -> Pair {
        // SAFETY: `f16` is transparent over u16, which is two bytes without padding or alignment needs beyond
        // those of bytes.
        let bytes = unsafe { &*v.as_ptr().cast::<[u8; 32]>() };
        self.load_f16_bytes(bytes)
    }

    #[inline(always)]
    fn store_f16(self, v: Pair, out: &mut [f16; 16]) {
        // SAFETY: `self` proves the features.
        unsafe { store_f16(v, out) }
    }

    #[inline(always)]
    fn f16_value(self, v: [u8; 2]) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { f16_value(v) }
    }

    #[inline(always)]
    fn load_f16_bytes(self, v: &[u8; 32]) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { load_f16_bytes(v) }
    }

    #[inline(always)]
    fn load_bf16_bytes(self, v: &[u8; 32]) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { load_bf16_bytes(v) }
    }

    #[inline(always)]
    fn load_i8(self, v: &[u8; 32]) -> [Pair; 2] {
        // SAFETY: `self` proves the features.
        unsafe { load_i8(v) }
    }

    #[inline(always)]
    fn load_i8_half(self, v: &[i8; 16]) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { load_i8_half(v) }
    }

    #[inline(always)]
    fn scaled_nibbles(self, v: &[u8; 16], scale: f32) -> [Pair; 2] {
        // SAFETY: `self` proves the features.
        unsafe { scaled_nibbles(v, scale) }
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8], at: usize) {
        // SAFETY: a prefetch has no effect but on caches, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast()) }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { add(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { mul(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { fma(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { max(a, b) }
    }

    #[inline(always)]
    fn exp(self, v: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { exp_pair(v) }
    }

    #[inline(always)]
    fn sum(self, v: Pair) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { sum(v) }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn splat(v: f32) -> Pair {
    [_mm256_set1_ps(v); 2]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(v: &[f32; 16]) -> Pair {
    let p = v.as_ptr();
    // SAFETY: reads lanes 0..8 of 16.
    let low = unsafe { _mm256_loadu_ps(p) };
    // SAFETY: reads lanes 8..16 of 16.
    let high = unsafe { _mm256_loadu_ps(p.wrapping_add(8)) };
    [low, high]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(v: Pair, out: &mut [f32; 16]) {
    let p = out.as_mut_ptr();
    // SAFETY: writes lanes 0..8 of 16.
    unsafe { _mm256_storeu_ps(p, v[0]) };
    // SAFETY: writes lanes 8..16 of 16.
    unsafe { _mm256_storeu_ps(p.wrapping_add(8), v[1]) };
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_f16(v: Pair, out: &mut [f16; 16]) {
    let p = out.as_mut_ptr().cast::<__m128i>();
    let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]);
    let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]);
    // SAFETY: writes elements 0..8 of 16; `f16` is transparent over u16.
    unsafe { _mm_storeu_si128(p, low) };
    // SAFETY: writes elements 8..16 of 16.
    unsafe { _mm_storeu_si128(p.wrapping_add(1), high) };
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn f16_value(v: [u8; 2]) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(u16::from_le_bytes(v).into())))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_128(v: &[u8; 16]) -> __m128i {
    // SAFETY: reads the 16 bytes of `v`.
    unsafe { _mm_loadu_si128(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_256(v: &[u8; 32]) -> __m256i {
    // SAFETY: reads the 32 bytes of `v`.
    unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_f16_bytes(v: &[u8; 32]) -> Pair {
    let v = load_256(v);
    [_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(v))]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_bf16_bytes(v: &[u8; 32]) -> Pair {
    let v = load_256(v);
    let widen = [_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v)];
    let [low, high] = widen;
    [
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(low))),
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high))),
    ]
}

/// 16 signed bytes to floats.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_i8(v: __m128i) -> Pair {
    let high = _mm_unpackhi_epi64(v, v);
    [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_i8(v: &[u8; 32]) -> [Pair; 2] {
    let v = load_256(v);
    [widen_i8(_mm256_castsi256_si128(v)), widen_i8(_mm256_extracti128_si256::<1>(v))]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_i8_half(v: &[i8; 16]) -> Pair {
    // SAFETY: reads the 16 bytes of `v`.
    widen_i8(unsafe { _mm_loadu_si128(v.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scaled_nibbles(v: &[u8; 16], scale: f32) -> [Pair; 2] {
    let scale = splat(scale);
    let v = load_128(v);
    let mask = _mm_set1_epi8(15);
    let eight = _mm_set1_epi8(8);
    let low = _mm_sub_epi8(_mm_and_si128(v, mask), eight);
    let high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16::<4>(v), mask), eight);
    [mul(widen_i8(low), scale), mul(widen_i8(high), scale)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add(a: Pair, b: Pair) -> Pair {
    [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mul(a: Pair, b: Pair) -> Pair {
    [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fma(a: Pair, b: Pair, c: Pair) -> Pair {
    [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn max(a: Pair, b: Pair) -> Pair {
    // `vmaxps` gives the second operand unless the first is greater.
    [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn exp_pair(v: Pair) -> Pair {
    [exp(v[0]), exp(v[1])]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn exp(x: __m256) -> __m256 {
    use exp_constants::{LOG2_E, MAX, MIN, MINUS_LN2_HIGH, MINUS_LN2_LOW, POLYNOMIAL};
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        _mm256_set1_ps(LOG2_E),
    ));
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(MINUS_LN2_HIGH), x);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(MINUS_LN2_LOW), r);
    let mut p = _mm256_set1_ps(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
    }
    let y = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0));
    let n = _mm256_cvtps_epi32(n);
    let half = _mm256_srai_epi32::<1>(n);
    let bias = _mm256_set1_epi32(127);
    let power_1 = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
    let power_2 = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
    let y = _mm256_mul_ps(_mm256_mul_ps(y, _mm256_castsi256_ps(power_1)), _mm256_castsi256_ps(power_2));
    let is_small = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(MIN));
    let is_large = _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_set1_ps(MAX));
    let y = _mm256_blendv_ps(y, _mm256_set1_ps(f32::INFINITY), is_large);
    _mm256_andnot_ps(is_small, y)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum(v: Pair) -> f32 {
    let v = _mm256_add_ps(v[0], v[1]);
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}
