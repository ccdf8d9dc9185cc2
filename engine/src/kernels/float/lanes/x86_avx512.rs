//! Lanes as one zmm register.
#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::x86_64::*;

use half::f16;

use super::{Lanes, LanesTask, exp_constants};

/// Proof that the code that holds it is compiled for AVX-512 F, BW and VL, and the CPU has them: only [`run`]
/// makes one, and its caller vouches for the CPU.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// Runs `task` with AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) fn run<T: LanesTask>(task: T) -> T::Output {
    task.run(Avx512(()))
}

impl Lanes for Avx512 {
    type V = __m512;

    const IS_WIDE: bool = true;

    #[inline(always)]
    fn splat(self, v: f32) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { splat(v) }
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { load(v) }
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; 16]) {
        // SAFETY: `self` proves the features.
        unsafe { store(v, out) }
    }

    #[inline(always)]
    fn load_f16(self, v: &[f16; 16]) -> __m512 {
        // SAFETY: `f16` is transparent over u16, which is two bytes without padding or alignment needs beyond
        // those of bytes.
        let bytes = unsafe { &*v.as_ptr().cast::<[u8; 32]>() };
        self.load_f16_bytes(bytes)
    }

    #[inline(always)]
    fn store_f16(self, v: __m512, out: &mut [f16; 16]) {
        // SAFETY: `self` proves the features.
        unsafe { store_f16(v, out) }
    }

    #[inline(always)]
    fn f16_value(self, v: [u8; 2]) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { f16_value(v) }
    }

    #[inline(always)]
    fn load_f16_bytes(self, v: &[u8; 32]) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { load_f16_bytes(v) }
    }

    #[inline(always)]
    fn load_bf16_bytes(self, v: &[u8; 32]) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { load_bf16_bytes(v) }
    }

    #[inline(always)]
    fn load_i8(self, v: &[u8; 32]) -> [__m512; 2] {
        // SAFETY: `self` proves the features.
        unsafe { load_i8(v) }
    }

    #[inline(always)]
    fn load_i8_half(self, v: &[i8; 16]) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { load_i8_half(v) }
    }

    #[inline(always)]
    fn scaled_nibbles(self, v: &[u8; 16], scale: f32) -> [__m512; 2] {
        // SAFETY: `self` proves the features.
        unsafe { scaled_nibbles(v, scale) }
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8], at: usize) {
        // SAFETY: a prefetch has no effect but on caches, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast()) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { add(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { mul(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { fma(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { max(a, b) }
    }

    #[inline(always)]
    fn exp(self, v: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { exp(v) }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { sum(v) }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn splat(v: f32) -> __m512 {
    _mm512_set1_ps(v)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn load(v: &[f32; 16]) -> __m512 {
    // SAFETY: reads the 16 floats of `v`.
    unsafe { _mm512_loadu_ps(v.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn store(v: __m512, out: &mut [f32; 16]) {
    // SAFETY: writes the 16 floats of `out`.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn store_f16(v: __m512, out: &mut [f16; 16]) {
    let v = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
    // SAFETY: writes the 16 elements of `out`; `f16` is transparent over u16.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), v) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn f16_value(v: [u8; 2]) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(u16::from_le_bytes(v).into())))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn load_128(v: &[u8; 16]) -> __m128i {
    // SAFETY: reads the 16 bytes of `v`.
    unsafe { _mm_loadu_si128(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn load_256(v: &[u8; 32]) -> __m256i {
    // SAFETY: reads the 32 bytes of `v`.
    unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn load_f16_bytes(v: &[u8; 32]) -> __m512 {
    _mm512_cvtph_ps(load_256(v))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn load_bf16_bytes(v: &[u8; 32]) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_256(v))))
}

/// 16 signed bytes to floats.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn widen_i8(v: __m128i) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn load_i8(v: &[u8; 32]) -> [__m512; 2] {
    let v = load_256(v);
    [widen_i8(_mm256_castsi256_si128(v)), widen_i8(_mm256_extracti128_si256::<1>(v))]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn load_i8_half(v: &[i8; 16]) -> __m512 {
    // SAFETY: reads the 16 bytes of `v`.
    widen_i8(unsafe { _mm_loadu_si128(v.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn scaled_nibbles(v: &[u8; 16], scale: f32) -> [__m512; 2] {
    let values =
        _mm512_set_ps(7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0);
    // All sixteen products there can be; looking up takes the low four bits of an index.
    let table = _mm512_mul_ps(values, _mm512_set1_ps(scale));
    let codes = _mm512_cvtepu8_epi32(load_128(v));
    [_mm512_permutexvar_ps(codes, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table)]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn add(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn mul(a: __m512, b: __m512) -> __m512 {
    _mm512_mul_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
    _mm512_fmadd_ps(a, b, c)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn max(a: __m512, b: __m512) -> __m512 {
    // `vmaxps` gives the second operand unless the first is greater.
    _mm512_max_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn exp(x: __m512) -> __m512 {
    use exp_constants::{LOG2_E, MAX, MIN, MINUS_LN2_HIGH, MINUS_LN2_LOW, POLYNOMIAL};
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(
        x,
        _mm512_set1_ps(LOG2_E),
    ));
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(MINUS_LN2_HIGH), x);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(MINUS_LN2_LOW), r);
    let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    let y = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0));
    let n = _mm512_cvtps_epi32(n);
    let half = _mm512_srai_epi32::<1>(n);
    let bias = _mm512_set1_epi32(127);
    let power_1 = _mm512_slli_epi32::<23>(_mm512_add_epi32(half, bias));
    let power_2 = _mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_sub_epi32(n, half), bias));
    let y = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_castsi512_ps(power_1)), _mm512_castsi512_ps(power_2));
    let is_small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(MIN));
    let is_large = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(MAX));
    let y = _mm512_mask_blend_ps(is_large, y, _mm512_set1_ps(f32::INFINITY));
    _mm512_mask_blend_ps(is_small, y, _mm512_setzero_ps())
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn sum(v: __m512) -> f32 {
    let v = _mm512_add_ps(v, _mm512_shuffle_f32x4::<0xee>(v, v));
    let v = _mm512_castps512_ps256(v);
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}
