//! What the machine can do at best: how fast it reads memory and how fast it multiplies small integers.
//!
//! Kernel timings are given as a share of these. They are measured, not looked up, because both depend on who
//! else uses the machine.

#![expect(unsafe_code, reason = "calls the instruction set that `KernelSet` has seen; pointer loads")]

use std::hint::black_box;
use std::io;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use super::{Isa, KernelSet};
use crate::pool::ThreadPool;

/// Bytes that a thread claims at once.
const CHUNK_BYTES: usize = 256 << 10;

/// Multiply-accumulates in one call of a thread, about: long against a fork and join.
const PEAK_STEPS: usize = 1 << 20;

/// How often a measurement is taken; the best counts, since everything that disturbs it makes it slower.
const N_RUNS: usize = 5;

/// Memory to measure reading on: written once, so that it is there, and in huge pages where the system gives them.
#[derive(Debug)]
pub struct ProbeMemory(MmapMut);

impl ProbeMemory {
    /// # Errors
    /// The system gives no such amount.
    pub fn new(n_bytes: usize) -> io::Result<Self> {
        let mut memory = MmapMut::map_anon(n_bytes)?;
        #[cfg(target_os = "linux")]
        memory.advise(memmap2::Advice::HugePage).ok(); // A kernel without them reads small ones.
        memory.fill(1);
        Ok(Self(memory))
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Bytes per second at which the threads of `pool` read `bytes` together. Give more than the caches hold.
#[must_use]
pub fn read_bandwidth(kernels: KernelSet, pool: &ThreadPool, bytes: &[u8]) -> f64 {
    let seconds = best_of(|| {
        pool.for_each_chunk(bytes.len(), CHUNK_BYTES, &|_, chunk| read(kernels, &bytes[chunk]));
    });
    ratio(bytes.len(), seconds)
}

/// Multiply-accumulates per second of unsigned with signed bytes, all threads of `pool` together.
#[must_use]
pub fn integer_peak(kernels: KernelSet, pool: &ThreadPool) -> f64 {
    let macs_per_step = multiply(kernels, 0);
    let seconds = best_of(|| {
        pool.run(&|_| {
            black_box(multiply(kernels, black_box(PEAK_STEPS)));
        });
    });
    ratio(pool.n_threads() * PEAK_STEPS * macs_per_step, seconds)
}

fn best_of(mut run: impl FnMut()) -> Duration {
    let timed = |_| {
        let start = Instant::now();
        run();
        start.elapsed()
    };
    (0..N_RUNS).map(timed).min().unwrap_or(Duration::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "a rate, good to a few digits")]
fn ratio(amount: usize, duration: Duration) -> f64 {
    amount as f64 / duration.as_secs_f64()
}

/// Reads every cache line.
fn read(kernels: KernelSet, bytes: &[u8]) {
    match kernels.isa {
        // SAFETY: `isa` is one of these only if `for_isa` saw AVX2 on this CPU.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => unsafe { x86::read_256(bytes) },
        // SAFETY: `isa` is `Avx512Vnni` only if `for_isa` saw AVX-512 on this CPU.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { x86::read_512(bytes) },
        // SAFETY: `isa` is one of these only if `for_isa` saw Advanced SIMD on this CPU.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDotprod => unsafe { arm::read(bytes) },
        _ => {
            black_box(bytes.iter().fold(0, |acc, byte| acc ^ byte));
        }
    }
}

/// Does `n_steps` steps that depend on nothing but registers; returns how many products a step has.
fn multiply(kernels: KernelSet, n_steps: usize) -> usize {
    match kernels.isa {
        // SAFETY: `isa` is `Avx2` only if `for_isa` saw AVX2 on this CPU.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::multiply_avx2(n_steps) },
        // SAFETY: `isa` is `AvxVnni` only if `for_isa` saw AVX2, and AVX-VNNI as asked.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni if kernels.has_vex_vnni => unsafe { x86::multiply_vex(n_steps) },
        // SAFETY: without AVX-VNNI, `isa` is `AvxVnni` only if `for_isa` saw AVX-512 VL and VNNI as well.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => unsafe { x86::multiply_evex(n_steps) },
        // SAFETY: `isa` is `Avx512Vnni` only if `for_isa` saw AVX-512 F and VNNI on this CPU.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { x86::multiply_avx512(n_steps) },
        // SAFETY: `isa` is `Neon` only if `for_isa` saw Advanced SIMD on this CPU.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { arm::multiply_neon(n_steps) },
        // SAFETY: `isa` is `NeonDotprod` only if `for_isa` saw Advanced SIMD and `sdot` on this CPU.
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDotprod => unsafe { arm::multiply_dotprod(n_steps) },
        _ => multiply_scalar(n_steps),
    }
}

/// What portable code reaches.
fn multiply_scalar(n_steps: usize) -> usize {
    const LANES: usize = 64;
    let (codes, values) = (black_box([1_u8; LANES]), black_box([3_i8; LANES]));
    let mut sums = [0_i32; LANES];
    for _ in 0..n_steps {
        for ((sum, code), value) in sums.iter_mut().zip(&codes).zip(&values) {
            *sum = sum.wrapping_add(i32::from(*code) * i32::from(*value));
        }
        sums = black_box(sums);
    }
    LANES
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The probes in the vector registers of x86-64.

    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Independent sums: more than the latency of a multiplication times those that start in a cycle.
    const N_SUMS: usize = 12;

    #[target_feature(enable = "avx2")]
    pub(super) fn read_256(bytes: &[u8]) {
        let mut all = [_mm256_setzero_si256(); 4];
        for chunk in bytes.chunks_exact(128) {
            for (i, all) in all.iter_mut().enumerate() {
                // SAFETY: a chunk is 4 times 32 bytes.
                let next = unsafe { _mm256_loadu_si256(chunk.as_ptr().wrapping_add(32 * i).cast()) };
                *all = _mm256_xor_si256(*all, next);
            }
        }
        black_box(all);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn read_512(bytes: &[u8]) {
        let mut all = [_mm512_setzero_si512(); 4];
        for chunk in bytes.chunks_exact(256) {
            for (i, all) in all.iter_mut().enumerate() {
                // SAFETY: a chunk is 4 times 64 bytes.
                let next = unsafe { _mm512_loadu_si512(chunk.as_ptr().wrapping_add(64 * i).cast()) };
                *all = _mm512_xor_si512(*all, next);
            }
        }
        black_box(all);
    }

    /// Pairs added in 16 bits; what widening them now and then costs is the kernels' affair.
    #[target_feature(enable = "avx2")]
    pub(super) fn multiply_avx2(n_steps: usize) -> usize {
        let mut codes = black_box(_mm256_set1_epi8(1));
        let values = black_box(_mm256_set1_epi8(3));
        let mut sums = [_mm256_setzero_si256(); N_SUMS];
        for _ in 0..n_steps {
            for sum in &mut sums {
                // SAFETY: no instruction at all; it keeps the compiler from using the last product again.
                unsafe { asm!("/* {0} */", inout(ymm_reg) codes, options(nomem, nostack, preserves_flags)) };
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, values));
            }
        }
        black_box(sums);
        N_SUMS * 32
    }

    #[target_feature(enable = "avx2,avxvnni")]
    pub(super) fn multiply_vex(n_steps: usize) -> usize {
        let codes = black_box(_mm256_set1_epi8(1));
        let values = black_box(_mm256_set1_epi8(3));
        let mut sums = [_mm256_setzero_si256(); N_SUMS];
        for _ in 0..n_steps {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, codes, values);
            }
        }
        black_box(sums);
        N_SUMS * 32
    }

    #[target_feature(enable = "avx2,avx512f,avx512vl,avx512vnni")]
    pub(super) fn multiply_evex(n_steps: usize) -> usize {
        let codes = black_box(_mm256_set1_epi8(1));
        let values = black_box(_mm256_set1_epi8(3));
        let mut sums = [_mm256_setzero_si256(); N_SUMS];
        for _ in 0..n_steps {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_epi32(*sum, codes, values);
            }
        }
        black_box(sums);
        N_SUMS * 32
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn multiply_avx512(n_steps: usize) -> usize {
        let codes = black_box(_mm512_set1_epi8(1));
        let values = black_box(_mm512_set1_epi8(3));
        let mut sums = [_mm512_setzero_si512(); N_SUMS];
        for _ in 0..n_steps {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, codes, values);
            }
        }
        black_box(sums);
        N_SUMS * 64
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    //! The probes in the vector registers of ARM.

    use std::arch::aarch64::*;
    use std::hint::black_box;

    use crate::kernels::aarch64::{DotProduct, MultiplyAdd, Products};

    /// Independent sums: more than the latency of a multiplication times those that start in a cycle.
    const N_SUMS: usize = 12;

    #[target_feature(enable = "neon")]
    pub(super) fn read(bytes: &[u8]) {
        let mut all = [vdupq_n_u8(0); 4];
        for chunk in bytes.chunks_exact(64) {
            for (i, all) in all.iter_mut().enumerate() {
                // SAFETY: a chunk is 4 times 16 bytes.
                let next = unsafe { vld1q_u8(chunk.as_ptr().wrapping_add(16 * i)) };
                *all = veorq_u8(*all, next);
            }
        }
        black_box(all);
    }

    #[target_feature(enable = "neon")]
    pub(super) fn multiply_neon(n_steps: usize) -> usize {
        // SAFETY: this function is compiled for Advanced SIMD, and its caller vouched for the CPU.
        multiply(unsafe { MultiplyAdd::new() }, vdupq_n_u8(1), n_steps)
    }

    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn multiply_dotprod(n_steps: usize) -> usize {
        // SAFETY: this function is compiled for Advanced SIMD and `sdot`, and its caller vouched for the CPU.
        multiply(unsafe { DotProduct::new() }, vdupq_n_u8(1), n_steps)
    }

    #[inline(always)]
    fn multiply<P: Products>(products: P, codes: uint8x16_t, n_steps: usize) -> usize {
        let (codes, values) = (black_box(codes), black_box(codes));
        let mut sums = [products.zero(); N_SUMS];
        for _ in 0..n_steps {
            for sum in &mut sums {
                *sum = products.add(*sum, codes, values);
            }
        }
        black_box(sums);
        N_SUMS * 16
    }
}
