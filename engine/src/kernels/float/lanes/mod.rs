//! Sixteen f32 lanes on one instruction set.
//!
//! A value of a type that implements [`Lanes`] is proof that the running code was compiled for that set and that
//! the CPU has it: only [`KernelSet::on_lanes`] makes one. Kernels that take it are safe code.
#![expect(unsafe_code, reason = "enters code compiled for an instruction set")]

#[cfg(target_arch = "aarch64")]
mod aarch64_neon; // Four registers of Advanced SIMD.
mod scalar; // The definition: arrays.
#[cfg(target_arch = "x86_64")]
mod x86_avx2; // Two ymm registers.
#[cfg(target_arch = "x86_64")]
mod x86_avx512; // One zmm register.

use half::f16;

use crate::kernels::{Isa, KernelSet};

/// Sixteen-lane arithmetic. Every operation is IEEE (round to nearest even) in each lane.
pub(crate) trait Lanes: Copy {
    /// Sixteen f32.
    type V: Copy;

    /// Whether 32 vectors fit the registers (else 8).
    const IS_WIDE: bool;

    fn splat(self, v: f32) -> Self::V;
    fn load(self, v: &[f32; 16]) -> Self::V;
    fn store(self, v: Self::V, out: &mut [f32; 16]);
    fn load_f16(self, v: &[f16; 16]) -> Self::V;
    fn store_f16(self, v: Self::V, out: &mut [f16; 16]);
    /// One little-endian f16.
    fn f16_value(self, v: [u8; 2]) -> f32;
    /// Little-endian f16.
    fn load_f16_bytes(self, v: &[u8; 32]) -> Self::V;
    /// Little-endian bf16.
    fn load_bf16_bytes(self, v: &[u8; 32]) -> Self::V;
    /// Signed bytes, exactly.
    fn load_i8(self, v: &[u8; 32]) -> [Self::V; 2];
    /// The same of sixteen.
    fn load_i8_half(self, v: &[i8; 16]) -> Self::V;
    /// The 16 low nibbles, then the 16 high ones, each minus 8 (exactly) and times `scale`.
    fn scaled_nibbles(self, v: &[u8; 16], scale: f32) -> [Self::V; 2];
    /// A hint that `bytes[at]` will be read soon. Nothing happens if it does not exist.
    fn prefetch(self, bytes: &[u8], at: usize);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The [`exp`] of each lane.
    fn exp(self, v: Self::V) -> Self::V;
    /// The lanes added in the order of the module above.
    fn sum(self, v: Self::V) -> f32;
}

/// A piece of work that is compiled for each instruction set. `run` must be `#[inline(always)]`, and so must
/// what it calls with lanes, or it is compiled for the wrong one (correct, but slow).
pub(crate) trait LanesTask {
    type Output;
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

impl KernelSet {
    /// Runs `task` on this instruction set.
    pub(crate) fn on_lanes<T: LanesTask>(self, task: T) -> T::Output {
        match self.isa {
            // SAFETY: `for_isa` saw AVX2, FMA and F16C on this CPU.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { x86_avx2::run(task) },
            // SAFETY: `for_isa` saw AVX-512 F, BW and VL, FMA and F16C on this CPU.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => unsafe { x86_avx512::run(task) },
            // SAFETY: `for_isa` saw Advanced SIMD on this CPU.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon | Isa::NeonDotprod => unsafe { aarch64_neon::run(task) },
            _ => task.run(scalar::Scalar),
        }
    }
}

/// Limits and polynomial of [`exp`], shared by every instruction set.
mod exp_constants {
    /// Below this the result is 0 (no subnormals).
    pub(super) const MIN: f32 = -87.3;
    /// Above this the result is infinite.
    pub(super) const MAX: f32 = 88.7;
    pub(super) const LOG2_E: f32 = std::f32::consts::LOG2_E;
    /// -ln 2 in two parts, the first with few bits.
    pub(super) const MINUS_LN2_HIGH: f32 = -355.0 / 512.0;
    pub(super) const MINUS_LN2_LOW: f32 = 2.121_944_4e-4;
    /// Of (e^r - 1 - r) / r^2, highest power first.
    pub(super) const POLYNOMIAL: [f32; 6] =
        [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
}

/// e^x to about 1 unit in the last place, the same everywhere: the scalar definition.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "rounded, and small unless the result is replaced")]
pub(crate) fn exp(x: f32) -> f32 {
    use exp_constants::{LOG2_E, MAX, MIN, MINUS_LN2_HIGH, MINUS_LN2_LOW, POLYNOMIAL};
    let n = (x * LOG2_E).round_ties_even();
    let r = n.mul_add(MINUS_LN2_LOW, n.mul_add(MINUS_LN2_HIGH, x));
    let p = POLYNOMIAL[1..].iter().fold(POLYNOMIAL[0], |p, c| p.mul_add(r, *c));
    let y = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors, as n may be one beyond the exponent range.
    let n = n as i32;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) << 23).cast_unsigned());
    let y = y * power(n >> 1) * power(n.wrapping_sub(n >> 1));
    if x < MIN {
        0.0
    } else if x > MAX {
        f32::INFINITY
    } else {
        y
    }
}

/// The first up to 16 values of `v`, then `fill`.
#[inline(always)]
pub(crate) fn padded<T: Copy>(v: &[T], fill: T) -> [T; 16] {
    let mut out = [fill; 16];
    let n = v.len().min(16);
    out[..n].copy_from_slice(&v[..n]);
    out
}

/// The dot product in the fixed order. The shorter slice counts.
#[inline(always)]
pub(crate) fn dot<L: Lanes>(lanes: L, a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, a_rest) = a[..n].as_chunks::<16>();
    let (b, b_rest) = b[..n].as_chunks::<16>();
    let mut acc = lanes.splat(0.0);
    for (a, b) in a.iter().zip(b) {
        acc = lanes.fma(lanes.load(a), lanes.load(b), acc);
    }
    if !a_rest.is_empty() {
        acc = lanes.fma(lanes.load(&padded(a_rest, 0.0)), lanes.load(&padded(b_rest, 0.0)), acc);
    }
    lanes.sum(acc)
}
