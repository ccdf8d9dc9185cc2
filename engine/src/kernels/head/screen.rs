//! Inputs rotated and rounded to int8, times the first half of the codes of every row: bounds of all logits.
#![expect(unsafe_code, reason = "enters code compiled for an instruction set; threads write disjoint parts")]
#![expect(
    clippy::inline_always,
    reason = "tasks must be compiled into the function of their instruction set"
)]
#![expect(clippy::cast_precision_loss, reason = "sums are rounded to f32 on purpose")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "rounded and within -127..=127; rows fit 32 bits (`FastHead`)"
)]

use std::ops::Range;

#[cfg(target_arch = "aarch64")]
use super::aarch64;
use super::round::rotate;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{x86_avx2, x86_avx512};
use crate::head::{FastHead, Wanted, padded_len};
use crate::kernels::float::lanes::{Lanes, LanesTask, dot};
use crate::kernels::float::shared_out::SharedOut;
use crate::kernels::{Isa, KernelSet};
use crate::noise::NOISE_LANES;
use crate::pool::ThreadPool;

/// A logit is taken to be within so many standard deviations of its approximation. The chosen token is another one than
/// the whole exact head would give only if the error of *its* logit is larger: for normal errors once in 10^12 tokens.
pub(super) const N_DEVIATIONS: f32 = 7.0;

/// Rows whose largest approximate score is kept.
pub(super) const BLOCK_ROWS: usize = NOISE_LANES;

/// The square of a smaller norm has lost digits.
const NORM_MIN: f32 = 1e-15;

/// Bytes of a cache line. A load across two lines takes the time of two: codes start with a line.
const LINE: usize = 64;

/// Blocks in a chunk of work.
const CHUNK_BLOCKS: usize = 2;

/// Inputs as the screen sees them, and what it found.
#[derive(Debug)]
pub(super) struct Screen {
    inputs: Vec<Input>,
    codes: Vec<i8>,    // (n, padded_len), after what comes before a line
    rotated: Vec<f32>, // (padded_len)
    sums: Vec<i32>,    // (n, n_vocab): of the first half
    maxima: Vec<f32>,  // (n, n_blocks): of approximate scores
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
    /// Of the codes.
    sum: i32,
}

/// The screen of one input row.
#[derive(Clone, Copy)]
pub(super) struct Screened<'a> {
    pub(super) input: Input,
    pub(super) codes: &'a [i8],
    pub(super) sums: &'a [i32],
    pub(super) maxima: &'a [f32],
}

impl Input {
    /// The approximate logit and its standard deviation: with the first half (whose sum it is), or with both.
    #[inline(always)]
    pub(super) fn approximate(
        &self,
        fast: &FastHead<'_>,
        row: usize,
        sum: i32,
        second: Option<i32>,
    ) -> [f32; 2] {
        let steps = match second {
            None => 2 * sum - 3 * self.sum,
            Some(second) => 8 * sum + 2 * second - 15 * self.sum,
        };
        let factors = fast.factors_of(second.is_some(), row..row + 1);
        self.of_steps(steps, factors.map(|factors| f32::from_le_bytes(factors[0])))
    }

    #[inline(always)]
    fn of_steps(&self, steps: i32, [scale, error]: [f32; 2]) -> [f32; 2] {
        [(steps as f32 * scale) * self.scale, error * self.norm]
    }
}

impl Screen {
    pub(super) fn new(n_rows_max: usize, n_vocab: usize, n_cols: usize) -> Self {
        Self {
            inputs: Vec::with_capacity(n_rows_max),
            codes: vec![0; n_rows_max * padded_len(n_cols) + LINE],
            rotated: vec![0.0; padded_len(n_cols)],
            sums: vec![0; n_rows_max * n_vocab],
            maxima: vec![0.0; n_rows_max * n_vocab.div_ceil(BLOCK_ROWS)],
        }
    }

    /// What was found for input `i` of the last call.
    pub(super) fn of(&self, i: usize, n_vocab: usize) -> Screened<'_> {
        let (padded_len, n_blocks) = (self.rotated.len(), n_vocab.div_ceil(BLOCK_ROWS));
        Screened {
            input: self.inputs[i],
            codes: &self.codes[line_start(&self.codes) + i * padded_len..][..padded_len],
            sums: &self.sums[i * n_vocab..][..n_vocab],
            maxima: &self.maxima[i * n_blocks..][..n_blocks],
        }
    }
}

impl KernelSet {
    /// Writes the least upper bound of the score of every row for every input to `bounds` (n, vocabulary); of an input
    /// that is not finite, infinity.
    pub(super) fn screen(
        self,
        pool: &ThreadPool,
        fast: &FastHead<'_>,
        (x, wanted): (&[f32], &[Wanted<'_>]),
        screen: &mut Screen,
        bounds: &mut [f32],
    ) {
        let (n_vocab, n_cols) = (fast.n_rows(), fast.n_cols());
        let (n, n_blocks, padded_len) = (wanted.len(), n_vocab.div_ceil(BLOCK_ROWS), padded_len(n_cols));
        let Screen { inputs, codes, rotated, sums, maxima } = screen;
        let start = line_start(codes);
        let codes = &mut codes[start..][..n * padded_len];
        inputs.clear();
        for (x, codes) in x.chunks_exact(n_cols).zip(codes.chunks_exact_mut(padded_len)) {
            rotated[..n_cols].copy_from_slice(x);
            rotated[n_cols..].fill(0.0);
            inputs.push(self.on_lanes(RoundInput { rotated, codes }));
        }
        let job = ScreenRows {
            fast,
            inputs,
            wanted,
            codes,
            sums: &SharedOut::new(&mut sums[..n * n_vocab]),
            maxima: &SharedOut::new(&mut maxima[..n * n_blocks]),
            bounds: &SharedOut::new(bounds),
            row_bytes: padded_len / 4,
        };
        pool.for_each_chunk(n_blocks, CHUNK_BLOCKS, &|_, blocks| {
            blocks.for_each(|block| job.run(self, block))
        });
    }

    /// Sums of two-bit codes of `R` rows times int8 codes of `T` inputs.
    #[inline]
    pub(super) fn head_sums<const R: usize, const T: usize>(
        self,
        rows: [&[u8]; R],
        x: [&[i8]; T],
    ) -> [[i32; T]; R] {
        match self.isa() {
            // SAFETY: `for_isa` saw AVX2 on this CPU.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { x86_avx2::sums(rows, x) },
            // SAFETY: `for_isa` saw AVX-512 F, BW, VL and VNNI on this CPU.
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

/// Where the first line of some bytes starts. They have room for one more.
fn line_start(bytes: &[i8]) -> usize {
    bytes.as_ptr().align_offset(LINE)
}

struct RoundInput<'a> {
    rotated: &'a mut [f32], // Not yet rotated.
    codes: &'a mut [i8],
}

impl LanesTask for RoundInput<'_> {
    type Output = Input;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Input {
        let is_zero = self.rotated.iter().all(|v| *v == 0.0);
        rotate(self.rotated);
        let rotated = &*self.rotated;
        let norm = dot(lanes, rotated, rotated).sqrt();
        let absmax = rotated.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let inverse = 127.0 / absmax;
        // Too large or small for this arithmetic counts as not finite: every row is computed exactly.
        let is_finite = is_zero || (norm.is_finite() && norm > NORM_MIN && inverse.is_normal());
        if !is_finite || is_zero {
            self.codes.fill(0);
            return Input { is_finite, norm: 0.0, scale: 0.0, sum: 0 };
        }
        let mut sum = 0;
        for (code, v) in self.codes.iter_mut().zip(rotated) {
            *code = (v * inverse).round_ties_even() as i8;
            sum += i32::from(*code);
        }
        Input { is_finite, norm, scale: absmax / 127.0, sum }
    }
}

struct ScreenRows<'a> {
    fast: &'a FastHead<'a>,
    inputs: &'a [Input],
    wanted: &'a [Wanted<'a>],
    codes: &'a [i8], // (n, padded_len)
    sums: &'a SharedOut<'a, i32>,
    maxima: &'a SharedOut<'a, f32>,
    bounds: &'a SharedOut<'a, f32>,
    row_bytes: usize,
}

impl ScreenRows<'_> {
    fn run(&self, kernels: KernelSet, block: usize) {
        let n_vocab = self.fast.n_rows();
        let rows = block * BLOCK_ROWS..n_vocab.min((block + 1) * BLOCK_ROWS);
        let mut token = 0;
        // As many sums as fit in 32 registers beside the codes.
        while token < self.inputs.len() {
            token += match self.inputs.len() - token {
                8.. => self.strip::<2, 8>(kernels, rows.clone(), token),
                4.. => self.strip::<4, 4>(kernels, rows.clone(), token),
                2.. => self.strip::<4, 2>(kernels, rows.clone(), token),
                _ => self.strip::<4, 1>(kernels, rows.clone(), token),
            };
        }
        for (i, (input, wanted)) in self.inputs.iter().zip(self.wanted).enumerate() {
            let at = i * n_vocab + rows.start;
            // SAFETY: the rows of a block belong to one task; the tiles above have given theirs back.
            let sums = unsafe { self.sums.part(at, rows.len()) };
            // SAFETY: as above.
            let bounds = unsafe { self.bounds.part(at, rows.len()) };
            if !input.is_finite {
                bounds.fill(f32::INFINITY);
            }
            let task = Bound { fast: self.fast, input, wanted, rows: rows.clone(), sums, bounds };
            let maximum = kernels.on_lanes(task);
            // SAFETY: as above: there is one place for each block.
            let place = unsafe { self.maxima.part(i * n_vocab.div_ceil(BLOCK_ROWS) + block, 1) };
            place[0] = maximum;
        }
    }

    /// All rows of a block times `T` inputs, `R` rows at a time. Returns `T`.
    fn strip<const R: usize, const T: usize>(
        &self,
        kernels: KernelSet,
        rows: Range<usize>,
        token: usize,
    ) -> usize {
        let mut row = rows.start;
        while row + R <= rows.end {
            self.tile::<R, T>(kernels, row, token);
            row += R;
        }
        for row in row..rows.end {
            self.tile::<1, T>(kernels, row, token);
        }
        T
    }

    fn tile<const R: usize, const T: usize>(&self, kernels: KernelSet, row: usize, token: usize) {
        let codes = self.fast.half(0);
        let rows: [&[u8]; R] =
            std::array::from_fn(|r| &codes[(row + r) * self.row_bytes..][..self.row_bytes]);
        let x: [&[i8]; T] =
            std::array::from_fn(|t| &self.codes[(token + t) * self.row_bytes * 4..][..self.row_bytes * 4]);
        self.put(row, token, &kernels.head_sums(rows, x));
    }

    fn put<const R: usize, const T: usize>(&self, row: usize, token: usize, sums: &[[i32; T]; R]) {
        for t in 0..T {
            // SAFETY: the rows of a block belong to one task, and this is its only use of them now.
            let out = unsafe { self.sums.part((token + t) * self.fast.n_rows() + row, R) };
            out.iter_mut().zip(sums).for_each(|(out, sums)| *out = sums[t]);
        }
    }
}

/// Bounds of a block of rows for one input; returns the largest approximate score.
struct Bound<'a> {
    fast: &'a FastHead<'a>,
    input: &'a Input,
    wanted: &'a Wanted<'a>,
    rows: Range<usize>,
    sums: &'a [i32],
    bounds: &'a mut [f32],
}

impl LanesTask for Bound<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) -> f32 {
        let Self { fast, input, wanted, rows, sums, bounds } = self;
        let noise = wanted.noise_of_block(rows.start as u32);
        let n = rows.len();
        let factors = fast.factors_of(false, rows);
        let (scales, errors, sums) = (&factors[0][..n], &factors[1][..n], &sums[..n]);
        let mut scores = [f32::NEG_INFINITY; BLOCK_ROWS];
        let mut uppers = [f32::INFINITY; BLOCK_ROWS];
        for i in 0..n {
            let factors = [scales[i], errors[i]].map(f32::from_le_bytes);
            let [logit, deviation] = input.of_steps(2 * sums[i] - 3 * input.sum, factors);
            scores[i] = logit;
            uppers[i] = logit + N_DEVIATIONS * deviation;
        }
        if let Some((noise, temperature)) = noise {
            for i in 0..BLOCK_ROWS {
                scores[i] = scores[i] / temperature + noise[i];
                uppers[i] = uppers[i] / temperature + noise[i];
            }
        }
        if input.is_finite {
            bounds.copy_from_slice(&uppers[..n]);
        }
        let mut maximum = scores[0];
        for score in scores {
            maximum = if score > maximum { score } else { maximum };
        }
        maximum
    }
}
