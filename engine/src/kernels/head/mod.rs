//! The fast head: bounds of all logits from few bits, then the exact ones where they matter.
//!
//! Sums of codes times int8 activations are integers, and everything after them is the same few operations per
//! logit, so that the result is a function of the weights and the input alone (promise P4).
#![expect(unsafe_code, reason = "threads write disjoint parts of the logits")]

#[cfg(target_arch = "aarch64")]
mod aarch64; // `sdot` or `smlal`.
mod build; // The image, some rows at a time.
mod round; // Rotation, and rows to codes.
mod scalar; // Sums by definition.
mod screen; // Bounds of all logits.
mod settle; // The rows to compute exactly.
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_avx2; // `vpmaddubsw`.
#[cfg(target_arch = "x86_64")]
mod x86_avx512; // `vpdpbusd`.

use std::ops::Range;
use std::sync::Mutex;

use super::KernelSet;
use super::float::shared_out::SharedOut;
use crate::dense::DenseMatrix;
use crate::head::{FastHead, Wanted};
use crate::pool::ThreadPool;
use screen::{BLOCK_ROWS, Screen};
use settle::{Settle, ones, second_half};

/// Input rows that are screened together; more go one group after the other.
const TOKENS_MAX: usize = 8;

/// Rows of the head in a chunk of work that computes what matters.
const SETTLE_ROWS: usize = 1024;

/// Room for one call, allocated once.
#[derive(Debug)]
pub struct FastHeadScratch {
    screen: Screen,
    seeds: Vec<Vec<u32>>,        // (n)
    floors: Vec<f32>,            // (n)
    order: Vec<u32>,             // Blocks, best first.
    scores: Vec<f32>,            // Of seeds.
    lists: Vec<Mutex<Vec<u32>>>, // One for each thread, which alone locks it.
}

impl FastHeadScratch {
    /// For a head of `n_vocab` x `n_cols`, up to `n_rows_max` input rows and `n_threads` threads.
    #[must_use]
    pub fn new(n_rows_max: usize, n_vocab: usize, n_cols: usize, n_threads: usize) -> Self {
        let n_rows_max = n_rows_max.min(TOKENS_MAX);
        Self {
            screen: Screen::new(n_rows_max, n_vocab, n_cols),
            seeds: vec![Vec::new(); n_rows_max],
            floors: vec![0.0; n_rows_max],
            order: Vec::new(),
            scores: Vec::new(),
            lists: (0..n_threads).map(|_| Mutex::new(Vec::with_capacity(SETTLE_ROWS))).collect(),
        }
    }
}

impl KernelSet {
    /// Logits of every row of `x` (n, cols) into `logits` (n, vocabulary), as far as they are `wanted`.
    ///
    /// Logits that [`Wanted`] asks for are to the bit what [`Self::dense_matmul`] gives; all others, which cannot be
    /// chosen, are minus infinity (or exact as well). "Cannot" rests on errors within 7 standard deviations (normal errors:
    /// always; with the rotation they are normal). An input that is not finite gets all rows exactly. The
    /// result does not depend on the batch, the threads or the instruction set.
    ///
    /// # Panics
    /// If `fast` is not of the shape of `exact`, `x`, `wanted` or `logits` do not fit it, or `scratch` is for
    /// another head or fewer rows or threads.
    pub fn fast_head(
        self,
        pool: &ThreadPool,
        (fast, exact): (&FastHead<'_>, &DenseMatrix<'_>),
        (x, wanted): (&[f32], &[Wanted<'_>]),
        scratch: &mut FastHeadScratch,
        logits: &mut [f32],
    ) {
        let (n_vocab, n_cols) = (fast.n_rows(), fast.n_cols());
        assert!(exact.n_rows() == n_vocab && exact.n_cols() == n_cols, "{fast:?} for {exact:?}");
        assert_eq!(x.len(), wanted.len() * n_cols, "inputs for {fast:?}");
        assert_eq!(logits.len(), wanted.len() * n_vocab, "logits of {} rows of {fast:?}", wanted.len());
        let group = scratch.seeds.len();
        let inputs = x.chunks(group * n_cols).zip(wanted.chunks(group));
        for ((x, wanted), logits) in inputs.zip(logits.chunks_mut(group * n_vocab)) {
            self.fast_head_group(pool, (fast, exact), (x, wanted), scratch, logits);
        }
    }

    /// Few enough rows.
    fn fast_head_group(
        self,
        pool: &ThreadPool,
        (fast, exact): (&FastHead<'_>, &DenseMatrix<'_>),
        (x, wanted): (&[f32], &[Wanted<'_>]),
        scratch: &mut FastHeadScratch,
        logits: &mut [f32],
    ) {
        let (n, n_vocab, n_cols) = (wanted.len(), fast.n_rows(), fast.n_cols());
        let FastHeadScratch { screen, seeds, floors, order, scores, lists } = scratch;
        assert!(lists.len() >= pool.n_threads(), "scratch for {} threads", lists.len());
        self.screen(pool, fast, (x, wanted), screen, logits);
        let logits = &SharedOut::new(logits);
        let of = |i: usize| Settle {
            fast,
            exact,
            x: &x[i * n_cols..][..n_cols],
            wanted: &wanted[i],
            screened: screen.of(i, n_vocab),
            logits,
            offset: i * n_vocab,
        };
        for (i, (seeds, floor)) in seeds.iter_mut().zip(&mut *floors).take(n).enumerate() {
            let settle = of(i);
            settle.choose_seeds(order, seeds);
            pool.for_each_chunk(seeds.len(), 8, &|_, items| {
                // SAFETY: each seed comes up once, and nobody else has the logits.
                unsafe { self.dense_gather(exact, &seeds[items], settle.x, (logits, settle.offset)) };
            });
            // SAFETY: the threads are done.
            *floor = unsafe { settle.floor(seeds, scores) };
        }
        pool.for_each_chunk(n_vocab.div_ceil(SETTLE_ROWS), 1, &|thread, items| {
            let mut list = lists[thread].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            for item in items {
                let rows = item * SETTLE_ROWS..n_vocab.min((item + 1) * SETTLE_ROWS);
                // SAFETY: each chunk of rows comes up once.
                unsafe { self.settle_rows(fast, &floors[..n], &of, rows, &mut list) };
            }
        });
    }

    /// Settles some rows for all inputs. Rows that may matter lie scattered: what any input wants of the next block is fetched
    /// while one is settled.
    ///
    /// # Safety
    /// Nobody else uses the logits of these rows meanwhile.
    unsafe fn settle_rows<'s>(
        self,
        fast: &FastHead<'_>,
        floors: &[f32],
        of: &dyn Fn(usize) -> Settle<'s>,
        rows: Range<usize>,
        list: &mut Vec<u32>,
    ) {
        let block = |first: usize| first..rows.end.min(first + BLOCK_ROWS);
        let fetch = |rows: Range<usize>| {
            let mut open = [0; TOKENS_MAX];
            for (i, (open, floor)) in open.iter_mut().zip(floors).enumerate() {
                // SAFETY: the caller's promise.
                *open = unsafe { of(i).open(*floor, rows.clone()) };
            }
            for i in ones(open.iter().fold(0, |any, open| any | open)) {
                self.prefetch(second_half(fast, rows.start + i));
            }
            open
        };
        let mut next = fetch(block(rows.start));
        for first in rows.clone().step_by(BLOCK_ROWS) {
            let open = next;
            if first + BLOCK_ROWS < rows.end {
                next = fetch(block(first + BLOCK_ROWS));
            }
            for (i, (open, floor)) in open.into_iter().zip(floors).enumerate() {
                // SAFETY: the caller's promise.
                unsafe { of(i).settle(self, *floor, (block(first), open), list) };
            }
        }
    }

    /// Starts to fetch bytes that are read soon.
    #[inline]
    fn prefetch(self, bytes: &[u8]) {
        #[cfg(target_arch = "x86_64")]
        for line in bytes.chunks(64) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: every x86-64 CPU has SSE; a prefetch touches nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = bytes;
    }
}
