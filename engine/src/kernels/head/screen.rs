//! Approximate logits: inputs rotated and rounded to int8, times the codes of every row.
#![expect(unsafe_code, reason = "enters code compiled for an instruction set; threads write disjoint logits")]
#![expect(
    clippy::inline_always,
    reason = "tasks must be compiled into the function of their instruction set"
)]
#![expect(clippy::cast_precision_loss, reason = "sums are rounded to f32 on purpose")]
#![expect(clippy::cast_possible_truncation, reason = "rounded and within -127..=127")]

use std::ops::Range;

#[cfg(target_arch = "aarch64")]
use super::aarch64;
use super::round::rotate;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{x86_avx2, x86_avx512};
use crate::head::{FastHead, padded_len};
use crate::kernels::float::lanes::{Lanes, LanesTask, dot};
use crate::kernels::float::rows_per_chunk;
use crate::kernels::float::shared_out::SharedOut;
use crate::kernels::{Isa, KernelSet};
use crate::pool::ThreadPool;

/// Inputs as the screen sees them.
#[derive(Debug)]
pub(super) struct Screen {
    inputs: Vec<Input>,
    codes: Vec<i8>,    // (n, padded_len)
    rotated: Vec<f32>, // (padded_len)
}

/// What belongs to one input row beside its codes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Input {
    /// An input that is not has zeros for codes.
    pub(super) is_finite: bool,
    /// Euclidean.
    pub(super) norm: f32,
    /// Value of code 1.
    scale: f32,
    /// 15 times the sum of the codes, which belongs to the odd integers `2 c - 15`.
    offset: i32,
}

impl Screen {
    pub(super) fn new(n_rows_max: usize, n_cols: usize) -> Self {
        Self {
            inputs: Vec::with_capacity(n_rows_max),
            codes: Vec::with_capacity(n_rows_max * padded_len(n_cols)),
            rotated: Vec::with_capacity(padded_len(n_cols)),
        }
    }
}

impl KernelSet {
    /// Approximate logits of every row of `x`.
    pub(super) fn screen<'a>(
        self,
        pool: &ThreadPool,
        fast: &FastHead<'_>,
        x: &[f32],
        screen: &'a mut Screen,
        logits: &mut [f32],
    ) -> &'a [Input] {
        let (n_vocab, n_cols) = (fast.n_rows(), fast.n_cols());
        let padded_len = padded_len(n_cols);
        let Screen { inputs, codes, rotated } = screen;
        rotated.clear();
        rotated.resize(padded_len, 0.0);
        codes.clear();
        codes.resize(x.len() / n_cols * padded_len, 0);
        inputs.clear();
        for (x, codes) in x.chunks_exact(n_cols).zip(codes.chunks_exact_mut(padded_len)) {
            rotated[..n_cols].copy_from_slice(x);
            rotated[n_cols..].fill(0.0);
            inputs.push(self.on_lanes(RoundInput { rotated, codes }));
        }
        let out = SharedOut::new(logits);
        let (inputs, codes) = (&inputs[..], &codes[..]);
        pool.for_each_chunk(n_vocab, rows_per_chunk(n_vocab, pool.n_threads()), &|_, rows| {
            ScreenRows { fast, inputs, codes, out: &out, row_bytes: padded_len / 2 }.run(self, rows);
        });
        inputs
    }

    /// Sums of codes 0..=15 of `R` rows times int8 codes of `T` inputs.
    #[inline]
    fn head_sums<const R: usize, const T: usize>(self, rows: [&[u8]; R], x: [&[i8]; T]) -> [[i32; T]; R] {
        match self.isa() {
            // SAFETY: `for_isa` saw AVX2 on this CPU.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { x86_avx2::sums(rows, x) },
            // SAFETY: `for_isa` saw AVX-512 F, BW and VNNI on this CPU.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => unsafe { x86_avx512::sums(rows, x) },
            // SAFETY: `for_isa` saw Advanced SIMD on this CPU.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => unsafe { aarch64::sums_neon(rows, x) },
            // SAFETY: `for_isa` saw Advanced SIMD and `sdot` on this CPU.
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => unsafe { aarch64::sums_dotprod(rows, x) },
            _ => scalar::sums(rows, x),
        }
    }
}

struct RoundInput<'a> {
    rotated: &'a mut [f32], // Not yet rotated.
    codes: &'a mut [i8],
}

impl LanesTask for RoundInput<'_> {
    type Output = Input;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Input {
        rotate(self.rotated);
        let rotated = &*self.rotated;
        let norm = dot(lanes, rotated, rotated).sqrt();
        let absmax = rotated.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let inverse = 127.0 / absmax;
        // Too large or small for this arithmetic counts as not finite: every row is computed exactly.
        let is_finite = norm.is_finite() && (absmax == 0.0 || inverse.is_normal());
        if !is_finite || absmax == 0.0 {
            self.codes.fill(0);
            return Input { is_finite, norm: 0.0, scale: 0.0, offset: 0 };
        }
        let mut sum = 0;
        for (code, v) in self.codes.iter_mut().zip(rotated) {
            *code = (v * inverse).round_ties_even() as i8;
            sum += i32::from(*code);
        }
        Input { is_finite, norm, scale: absmax / 127.0, offset: 15 * sum }
    }
}

struct ScreenRows<'a> {
    fast: &'a FastHead<'a>,
    inputs: &'a [Input],
    codes: &'a [i8], // (n, padded_len)
    out: &'a SharedOut<'a, f32>,
    row_bytes: usize,
}

impl ScreenRows<'_> {
    fn run(&self, kernels: KernelSet, rows: Range<usize>) {
        let mut row = rows.start;
        while row + 4 <= rows.end {
            self.tiles::<4>(kernels, row);
            row += 4;
        }
        for row in row..rows.end {
            self.tiles::<1>(kernels, row);
        }
    }

    /// `R` rows times every input.
    fn tiles<const R: usize>(&self, kernels: KernelSet, row: usize) {
        let codes = self.fast.codes();
        let rows: [&[u8]; R] =
            std::array::from_fn(|r| &codes[(row + r) * self.row_bytes..][..self.row_bytes]);
        let x = |token: usize| &self.codes[token * self.row_bytes * 2..][..self.row_bytes * 2];
        let mut token = 0;
        while token + 4 <= self.inputs.len() {
            let x = std::array::from_fn::<_, 4, _>(|t| x(token + t));
            self.put(row, token, &kernels.head_sums(rows, x));
            token += 4;
        }
        for token in token..self.inputs.len() {
            self.put(row, token, &kernels.head_sums(rows, [x(token)]));
        }
    }

    fn put<const R: usize, const T: usize>(&self, row: usize, token: usize, sums: &[[i32; T]; R]) {
        for (t, input) in self.inputs[token..].iter().take(T).enumerate() {
            // SAFETY: the rows of a chunk belong to one task, and this is its only use of them.
            let logits = unsafe { self.out.part((token + t) * self.fast.n_rows() + row, R) };
            for (r, logit) in logits.iter_mut().enumerate() {
                let sum = (2 * sums[r][t] - input.offset) as f32;
                *logit = (sum * self.fast.scale(row + r)) * input.scale;
            }
        }
    }
}
