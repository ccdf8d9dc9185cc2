//! Which rows are computed exactly: all whose score could be among the best.
#![expect(unsafe_code, reason = "threads write disjoint parts of the logits")]
#![expect(clippy::inline_always, reason = "compiled into its loop")]
#![expect(clippy::cast_possible_truncation, reason = "a head has at most 2^32 rows (`FastHead`)")]

use std::ops::Range;

use super::screen::{BLOCK_ROWS, N_DEVIATIONS, Screened};
use crate::dense::DenseMatrix;
use crate::head::{FastHead, Wanted};
use crate::kernels::KernelSet;
use crate::kernels::float::shared_out::SharedOut;

/// Beside the best that are asked for, so many rows are computed first: the better they are, the fewer others can matter.
const N_SEEDS_MORE: usize = 32;

/// Everything about one input row.
#[derive(Clone, Copy)]
pub(super) struct Settle<'a> {
    pub(super) fast: &'a FastHead<'a>,
    pub(super) exact: &'a DenseMatrix<'a>,
    pub(super) x: &'a [f32],
    pub(super) wanted: &'a Wanted<'a>,
    pub(super) screened: Screened<'a>,
    /// Bounds of scores at first, then logits; those of this input start at `offset`.
    pub(super) logits: &'a SharedOut<'a, f32>,
    pub(super) offset: usize,
}

impl Settle<'_> {
    /// Rows that are likely the best: the best of each of the best blocks. None if every row is to be computed.
    pub(super) fn choose_seeds(&self, order: &mut Vec<u32>, seeds: &mut Vec<u32>) {
        seeds.clear();
        let maxima = self.screened.maxima;
        let n_seeds = self.wanted.n_best + N_SEEDS_MORE;
        if !self.screened.input.is_finite || self.wanted.n_best > maxima.len() {
            return;
        }
        order.clear();
        order.extend(0..maxima.len() as u32);
        if n_seeds < order.len() {
            order.select_nth_unstable_by(n_seeds, |a, b| {
                let [a_max, b_max] = [a, b].map(|block| maxima[*block as usize]);
                b_max.total_cmp(&a_max).then(a.cmp(b))
            });
            order.truncate(n_seeds);
        }
        for block in &*order {
            let first = *block as usize * BLOCK_ROWS;
            let rows = first..self.fast.n_rows().min(first + BLOCK_ROWS);
            let score = |row: usize| {
                let approximate =
                    self.screened.input.approximate(self.fast, row, self.screened.sums[row], None);
                self.wanted.score(row as u32, approximate[0])
            };
            // The first of equal ones.
            let best = rows.map(|row| (score(row), row)).reduce(|a, b| if b.0 > a.0 { b } else { a });
            seeds.extend(best.map(|(_, row)| row as u32));
        }
    }

    /// What the score of a row must reach to matter, when the logits of the seeds are there. Seeds, and rows that
    /// are wanted by name, are marked to be computed with the rest.
    ///
    /// # Safety
    /// Nobody else uses the logits of this input meanwhile.
    pub(super) unsafe fn floor(&self, seeds: &[u32], scores: &mut Vec<f32>) -> f32 {
        // SAFETY: the caller's promise.
        let logits = unsafe { self.logits.part(self.offset, self.fast.n_rows()) };
        scores.clear();
        scores.extend(seeds.iter().map(|row| self.wanted.score(*row, logits[*row as usize])));
        let [some, more] = self.wanted.rows;
        for row in seeds.iter().chain(some).chain(more) {
            if let Some(logit) = logits.get_mut(*row as usize) {
                *logit = f32::INFINITY;
            }
        }
        match self.wanted.n_best.checked_sub(1).filter(|nth| *nth < scores.len()) {
            Some(nth) => *scores.select_nth_unstable_by(nth, |a, b| b.total_cmp(a)).1 - self.wanted.slack,
            // Every row matters, also where its bound is no number.
            None => f32::NEG_INFINITY,
        }
    }

    /// Which of at most [`BLOCK_ROWS`] rows may matter by their bounds, the first in the lowest bit.
    ///
    /// # Safety
    /// Nobody else uses the logits of these rows meanwhile.
    pub(super) unsafe fn open(&self, floor: f32, rows: Range<usize>) -> u64 {
        // SAFETY: the caller's promise.
        let bounds = unsafe { self.logits.part(self.offset + rows.start, rows.len()) };
        let mut open = 0;
        for (i, bound) in bounds.iter().enumerate() {
            open |= u64::from(may_reach(*bound, floor)) << i;
        }
        open
    }

    /// Replaces the bounds of these rows, of which some are [`Self::open`], by exact logits, or by minus infinity where they
    /// cannot matter.
    ///
    /// # Safety
    /// Nobody else uses the logits of these rows meanwhile.
    pub(super) unsafe fn settle(
        &self,
        kernels: KernelSet,
        floor: f32,
        (rows, open): (Range<usize>, u64),
        list: &mut Vec<u32>,
    ) {
        // SAFETY: the caller's promise.
        let logits = unsafe { self.logits.part(self.offset + rows.start, rows.len()) };
        list.clear();
        for i in ones(open) {
            // Neither what is to be computed anyway, nor what has no bound, is looked at again.
            if !logits[i].is_finite() || self.reaches(kernels, rows.start + i, floor) {
                list.push((rows.start + i) as u32);
            }
        }
        logits.fill(f32::NEG_INFINITY);
        // SAFETY: the rows of the list are among these, and the slice above is used no more.
        unsafe { kernels.dense_gather(self.exact, list, self.x, (self.logits, self.offset)) };
    }

    /// Whether a row may matter by both halves of its codes.
    fn reaches(&self, kernels: KernelSet, row: usize, floor: f32) -> bool {
        let [[second]] = kernels.head_sums([second_half(self.fast, row)], [self.screened.codes]);
        let sum = self.screened.sums[row];
        let [logit, deviation] = self.screened.input.approximate(self.fast, row, sum, Some(second));
        may_reach(self.wanted.score(row as u32, logit + N_DEVIATIONS * deviation), floor)
    }
}

/// The second half of the codes of a row.
pub(super) fn second_half<'a>(fast: &FastHead<'a>, row: usize) -> &'a [u8] {
    let row_bytes = fast.half(1).len() / fast.n_rows();
    &fast.half(1)[row * row_bytes..][..row_bytes]
}

/// The places of the bits that are set.
pub(super) fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = (bits != 0).then_some(bits.trailing_zeros() as usize);
        bits &= bits.wrapping_sub(1);
        lowest
    })
}

/// What is no number may.
#[inline(always)]
fn may_reach(bound: f32, floor: f32) -> bool {
    bound >= floor || bound.is_nan()
}
