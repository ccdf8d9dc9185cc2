//! Lanes as four registers of Advanced SIMD: lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15.
#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use super::{Lanes, LanesTask, exp_constants};

/// Proof that the code that holds it is compiled for Advanced SIMD, and the CPU has it: only [`run`] makes one,
/// and its caller vouches for the CPU.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

/// Runs `task` with Advanced SIMD.
#[target_feature(enable = "neon")]
pub(super) fn run<T: LanesTask>(task: T) -> T::Output {
    task.run(Neon(()))
}

/// Four lanes each.
type Quad = [float32x4_t; 4];

impl Lanes for Neon {
    type V = Quad;

    const IS_WIDE: bool = false;

    #[inline(always)]
    fn splat(self, v: f32) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { splat(v) }
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { load(v) }
    }

    #[inline(always)]
    fn store(self, v: Quad, out: &mut [f32; 16]) {
        // SAFETY: `self` proves the feature.
        unsafe { store(v, out) }
    }

    #[inline(always)]
    fn load_f16(self, v: &[f16; 16]) -> Quad {
        // SAFETY: `f16` is transparent over u16, which is two bytes without padding or alignment needs beyond
        // those of bytes.
        let bytes = unsafe { &*v.as_ptr().cast::<[u8; 32]>() };
        self.load_f16_bytes(bytes)
    }

    #[inline(always)]
    fn store_f16(self, v: Quad, out: &mut [f16; 16]) {
        // SAFETY: `self` proves the feature.
        unsafe { store_f16(v, out) }
    }

    #[inline(always)]
    fn f16_value(self, v: [u8; 2]) -> f32 {
        // SAFETY: `self` proves the feature.
        unsafe { f16_value(v) }
    }

    #[inline(always)]
    fn load_f16_bytes(self, v: &[u8; 32]) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { load_f16_bytes(v) }
    }

    #[inline(always)]
    fn load_bf16_bytes(self, v: &[u8; 32]) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { load_bf16_bytes(v) }
    }

    #[inline(always)]
    fn load_i8(self, v: &[u8; 32]) -> [Quad; 2] {
        // SAFETY: `self` proves the feature.
        unsafe { load_i8(v) }
    }

    #[inline(always)]
    fn load_i8_half(self, v: &[i8; 16]) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { load_i8_half(v) }
    }

    #[inline(always)]
    fn scaled_nibbles(self, v: &[u8; 16], scale: f32) -> [Quad; 2] {
        // SAFETY: `self` proves the feature.
        unsafe { scaled_nibbles(v, scale) }
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8], at: usize) {
        let address = bytes.as_ptr().wrapping_add(at);
        // SAFETY: a prefetch has no effect but on caches, whatever the address.
        unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) address, options(nostack, preserves_flags)) }
    }

    #[inline(always)]
    fn add(self, a: Quad, b: Quad) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { add(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Quad, b: Quad) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { mul(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Quad, b: Quad, c: Quad) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { fma(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: Quad, b: Quad) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { max(a, b) }
    }

    #[inline(always)]
    fn exp(self, v: Quad) -> Quad {
        // SAFETY: `self` proves the feature.
        unsafe { exp_quad(v) }
    }

    #[inline(always)]
    fn sum(self, v: Quad) -> f32 {
        // SAFETY: `self` proves the feature.
        unsafe { sum(v) }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn splat(v: f32) -> Quad {
    [vdupq_n_f32(v); 4]
}

#[inline]
#[target_feature(enable = "neon")]
fn load(v: &[f32; 16]) -> Quad {
    // SAFETY: reads the 16 floats of `v`.
    let v = unsafe { vld1q_f32_x4(v.as_ptr()) };
    [v.0, v.1, v.2, v.3]
}

#[inline]
#[target_feature(enable = "neon")]
fn store(v: Quad, out: &mut [f32; 16]) {
    // SAFETY: writes the 16 floats of `out`.
    unsafe { vst1q_f32_x4(out.as_mut_ptr(), float32x4x4_t(v[0], v[1], v[2], v[3])) };
}

#[inline]
#[target_feature(enable = "neon")]
fn store_f16(v: Quad, out: &mut [f16; 16]) {
    let half = |v: float32x4_t| vreinterpret_u16_f16(vcvt_f16_f32(v));
    let halves = uint16x4x4_t(half(v[0]), half(v[1]), half(v[2]), half(v[3]));
    // SAFETY: writes the 16 elements of `out`; `f16` is transparent over u16.
    unsafe { vst1_u16_x4(out.as_mut_ptr().cast(), halves) };
}

#[inline]
#[target_feature(enable = "neon")]
fn f16_value(v: [u8; 2]) -> f32 {
    vgetq_lane_f32::<0>(widen_f16(vdup_n_u16(u16::from_le_bytes(v))))
}

#[inline]
#[target_feature(enable = "neon")]
fn widen_f16(v: uint16x4_t) -> float32x4_t {
    vcvt_f32_f16(vreinterpret_f16_u16(v))
}

/// 16 numbers of two bytes, four in each register.
#[inline]
#[target_feature(enable = "neon")]
fn load_u16(v: &[u8; 32]) -> [uint16x4_t; 4] {
    let [low, high] = load_256(v).map(|v| vreinterpretq_u16_u8(v));
    [vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)]
}

#[inline]
#[target_feature(enable = "neon")]
fn load_128(v: &[u8; 16]) -> uint8x16_t {
    // SAFETY: reads the 16 bytes of `v`.
    unsafe { vld1q_u8(v.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_256(v: &[u8; 32]) -> [uint8x16_t; 2] {
    let halves = v.as_chunks::<16>().0;
    [load_128(&halves[0]), load_128(&halves[1])]
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f16_bytes(v: &[u8; 32]) -> Quad {
    load_u16(v).map(|v| widen_f16(v))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_bf16_bytes(v: &[u8; 32]) -> Quad {
    load_u16(v).map(|v| vreinterpretq_f32_u32(vshll_n_u16::<16>(v)))
}

/// 16 signed bytes to floats.
#[inline]
#[target_feature(enable = "neon")]
fn widen_i8(v: int8x16_t) -> Quad {
    let (low, high) = (vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v));
    [
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
        vcvtq_f32_s32(vmovl_high_s16(low)),
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
        vcvtq_f32_s32(vmovl_high_s16(high)),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn load_i8(v: &[u8; 32]) -> [Quad; 2] {
    load_256(v).map(|v| widen_i8(vreinterpretq_s8_u8(v)))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_i8_half(v: &[i8; 16]) -> Quad {
    // SAFETY: reads the 16 bytes of `v`.
    widen_i8(unsafe { vld1q_s8(v.as_ptr()) })
}

#[inline]
#[target_feature(enable = "neon")]
fn scaled_nibbles(v: &[u8; 16], scale: f32) -> [Quad; 2] {
    let scale = splat(scale);
    let v = load_128(v);
    let centred = |v: uint8x16_t| vsubq_s8(vreinterpretq_s8_u8(v), vdupq_n_s8(8));
    [
        mul(widen_i8(centred(vandq_u8(v, vdupq_n_u8(15)))), scale),
        mul(widen_i8(centred(vshrq_n_u8::<4>(v))), scale),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn add(a: Quad, b: Quad) -> Quad {
    [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1]), vaddq_f32(a[2], b[2]), vaddq_f32(a[3], b[3])]
}

#[inline]
#[target_feature(enable = "neon")]
fn mul(a: Quad, b: Quad) -> Quad {
    [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1]), vmulq_f32(a[2], b[2]), vmulq_f32(a[3], b[3])]
}

#[inline]
#[target_feature(enable = "neon")]
fn fma(a: Quad, b: Quad, c: Quad) -> Quad {
    [
        vfmaq_f32(c[0], a[0], b[0]),
        vfmaq_f32(c[1], a[1], b[1]),
        vfmaq_f32(c[2], a[2], b[2]),
        vfmaq_f32(c[3], a[3], b[3]),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn max(a: Quad, b: Quad) -> Quad {
    // Not `fmax`, which differs for NaN and for zeros of two signs.
    let greater = |a: float32x4_t, b: float32x4_t| vbslq_f32(vcgtq_f32(a, b), a, b);
    [greater(a[0], b[0]), greater(a[1], b[1]), greater(a[2], b[2]), greater(a[3], b[3])]
}

#[inline]
#[target_feature(enable = "neon")]
fn exp_quad(v: Quad) -> Quad {
    [exp(v[0]), exp(v[1]), exp(v[2]), exp(v[3])]
}

#[inline]
#[target_feature(enable = "neon")]
fn exp(x: float32x4_t) -> float32x4_t {
    use exp_constants::{LOG2_E, MAX, MIN, MINUS_LN2_HIGH, MINUS_LN2_LOW, POLYNOMIAL};
    let n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(LOG2_E)));
    let r = vfmaq_f32(x, n, vdupq_n_f32(MINUS_LN2_HIGH));
    let r = vfmaq_f32(r, n, vdupq_n_f32(MINUS_LN2_LOW));
    let mut p = vdupq_n_f32(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = vfmaq_f32(vdupq_n_f32(*c), p, r);
    }
    let y = vaddq_f32(vfmaq_f32(r, p, vmulq_f32(r, r)), vdupq_n_f32(1.0));
    let n = vcvtq_s32_f32(n);
    let half = vshrq_n_s32::<1>(n);
    let bias = vdupq_n_s32(127);
    let power = |n: int32x4_t| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, bias)));
    let y = vmulq_f32(vmulq_f32(y, power(half)), power(vsubq_s32(n, half)));
    let is_small = vcltq_f32(x, vdupq_n_f32(MIN));
    let is_large = vcgtq_f32(x, vdupq_n_f32(MAX));
    let y = vbslq_f32(is_large, vdupq_n_f32(f32::INFINITY), y);
    vbslq_f32(is_small, vdupq_n_f32(0.0), y)
}

#[inline]
#[target_feature(enable = "neon")]
fn sum(v: Quad) -> f32 {
    let v = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
}
