//! The fast head: approximate logits from four-bit codes, then the exact ones where they matter.
//!
//! Sums of codes times int8 activations are integers, and everything after them is the same few operations per
//! logit, so that the result is a function of the weights and the input alone (promise P4).
#![expect(unsafe_code, reason = "threads write disjoint parts of the logits")]

#[cfg(target_arch = "aarch64")]
mod aarch64; // `sdot` or `smlal`.
mod round; // Rotation, and rows to codes.
mod scalar; // Sums by definition.
mod screen; // All logits, approximately.
mod select; // The rows to compute exactly.
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_avx2; // `vpmaddubsw`.
#[cfg(target_arch = "x86_64")]
mod x86_avx512; // `vpdpbusd`.

use std::sync::Mutex;

use super::KernelSet;
use super::float::shared_out::SharedOut;
use crate::dense::DenseMatrix;
use crate::head::FastHead;
use crate::pool::ThreadPool;
use screen::Screen;

/// Room for one call, allocated once.
#[derive(Debug)]
pub struct FastHeadScratch {
    tokens: Vec<Mutex<Token>>, // A lock per input row: the thread that selects its candidates holds it.
    screen: Screen,
}

/// What is settled of one input row.
#[derive(Debug, Default)]
struct Token {
    candidates: Vec<u32>, // Ascending.
}

impl FastHeadScratch {
    /// For up to `n_rows_max` input rows of a head of `n_vocab` x `n_cols`.
    #[must_use]
    pub fn new(n_rows_max: usize, n_vocab: usize, n_cols: usize) -> Self {
        let token = || Mutex::new(Token { candidates: Vec::with_capacity(n_vocab) });
        Self { tokens: (0..n_rows_max).map(|_| token()).collect(), screen: Screen::new(n_rows_max, n_cols) }
    }
}

impl KernelSet {
    /// Logits of every row of `x` (n, cols) into `logits` (n, vocabulary).
    ///
    /// Computed exactly, to the bit as [`Self::dense_matmul`] gives them, are at least 256 rows and 1/64 of
    /// all rows, those with the largest approximate logits, and every row that could be the largest if errors stay within 8 standard
    /// deviations. So the largest logit is exact and is that of the whole exact head, unless a rounding error
    /// of more than 8 deviations happens (normal errors: never; with the rotation they are). Other rows have
    /// approximate logits. An input that is not finite gets all rows exactly. The result does not depend on
    /// the batch, the threads or the instruction set.
    ///
    /// # Panics
    /// If `fast` is not of the shape of `exact`, `x` or `logits` do not fit it, or `scratch` is for fewer rows.
    pub fn fast_head(
        self,
        pool: &ThreadPool,
        (fast, exact): (&FastHead<'_>, &DenseMatrix<'_>),
        x: &[f32],
        scratch: &mut FastHeadScratch,
        logits: &mut [f32],
    ) {
        let (n_vocab, n_cols) = (fast.n_rows(), fast.n_cols());
        assert!(exact.n_rows() == n_vocab && exact.n_cols() == n_cols, "{fast:?} for {exact:?}");
        assert!(x.len().is_multiple_of(n_cols), "{} inputs for {fast:?}", x.len());
        let n = x.len() / n_cols;
        assert_eq!(logits.len(), n * n_vocab, "logits of {n} rows of {fast:?}");
        assert!(n <= scratch.tokens.len(), "scratch for {} rows", scratch.tokens.len());
        let FastHeadScratch { tokens, screen } = scratch;
        let inputs = self.screen(pool, fast, x, screen, logits);
        pool.for_each_row_mut(logits, n_vocab, 1, &|_, i, logits| {
            let mut token = tokens[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            self.select_rows(fast, &inputs[i], logits, &mut token.candidates);
        });
        let out = SharedOut::new(logits);
        for (i, token) in tokens.iter_mut().take(n).enumerate() {
            let candidates = &token.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).candidates;
            let x = &x[i * n_cols..][..n_cols];
            pool.for_each_chunk(candidates.len(), 32, &|_, items| {
                // SAFETY: each candidate comes up once, and nobody else has the logits.
                unsafe { self.dense_gather(exact, &candidates[items], x, (&out, i * n_vocab)) };
            });
        }
    }
}
