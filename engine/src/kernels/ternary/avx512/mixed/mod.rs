//! Many tokens: most rows by products, the others by tables, in one stream of instructions.
//!
//! Products ([`dots`]) keep the pipes busy that multiply, and no others. Additions of sums from tables ([`adds`]; the method
//! of four Russians, as [`super::super::tables`] does it) need the pipes that are left, and the L1 cache. So every step of
//! products of some rows goes with the additions for one of the other rows ([`step`]), and those are almost free.
//! The weights of the other rows are read as indices of tables ([`super::super::lookup`]).

use std::ops::Range;

use super::super::lookup::GROUP_ROWS;
use super::super::quantized_rows::Line;
use super::super::{BLOCK_TOKENS, MatmulJob, QuantizedRows};
use super::panel::PANEL_ROWS;
use crate::pool::ThreadPool;

mod adds; // Rows by tables.
mod dots; // Rows by products.
mod step; // Both at once.
mod values; // Activations in the order in which products want them.

use adds::{Adds, SET_STEPS};
use values::Values;

/// A block of tokens is a register of 16-bit sums.
const _: () = assert!(BLOCK_TOKENS * size_of::<i16>() == size_of::<Line>());

/// What a thread needs beside the registers.
#[derive(Default)]
pub(in super::super) struct Scratch {
    values: Values,
    adds: adds::Scratch,
}

/// Whether these jobs are done so.
pub(in super::super) fn suits(acts: &QuantizedRows, jobs: &[MatmulJob<'_>]) -> bool {
    acts.n_rows() >= BLOCK_TOKENS && jobs.iter().all(|job| job.lookup.is_some())
}

/// Multiplies the matrices of `jobs`, which [`suits`], with `acts`.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL and VNNI.
pub(in super::super) unsafe fn matmul(pool: &ThreadPool, acts: &QuantizedRows, jobs: &[MatmulJob<'_>]) {
    let n_groups = jobs.iter().filter_map(|job| job.lookup).map(|matrix| matrix.n_groups()).sum();
    let n_blocks = acts.n_rows().div_ceil(BLOCK_TOKENS);
    let split = Split::best(n_groups, n_blocks, pool.n_threads());
    pool.for_each_chunk(split.n_row_parts * split.n_token_parts, 1, &|_, units| {
        for unit in units {
            let (tokens, rows) = (unit % split.n_token_parts, unit / split.n_token_parts);
            let part = |n: usize, i: usize, n_parts: usize| i * n / n_parts..(i + 1) * n / n_parts;
            let groups = part(n_groups, rows, split.n_row_parts);
            let blocks = part(n_blocks, tokens, split.n_token_parts);
            let tokens = blocks.start * BLOCK_TOKENS..acts.n_rows().min(blocks.end * BLOCK_TOKENS);
            let unit = Unit { jobs, acts, tokens, groups };
            super::super::SCRATCH.with_borrow_mut(|scratch| {
                // SAFETY: the caller's promise.
                unsafe { unit.multiply(&mut scratch.mixed, &mut scratch.panel) };
            });
        }
    });
}

/// Some tokens times some groups of rows, which are counted through all jobs.
struct Unit<'a, 'b> {
    jobs: &'a [MatmulJob<'b>],
    acts: &'a QuantizedRows,
    tokens: Range<usize>,
    groups: Range<usize>,
}

impl Unit<'_, '_> {
    /// Multiplies them. Only this thread may have these tokens of these rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn multiply(&self, scratch: &mut Scratch, panels: &mut Vec<Line>) {
        let Scratch { values, adds } = scratch;
        values.pack(self.acts, self.tokens.clone());
        let rows = self.groups.start * GROUP_ROWS..self.groups.end * GROUP_ROWS;
        let first_added = rows.end - n_added(rows.len(), values);
        let mut adds = Adds::new(self, first_added..rows.end, values, adds);
        dots::multiply(self, rows.start..first_added, values, panels, &mut adds);
        adds.complete();
    }

    /// The matrices that rows belong to, with their rows. Rows are counted in whole groups.
    fn pieces(&self, rows: Range<usize>) -> impl Iterator<Item = (&MatmulJob<'_>, Range<usize>)> {
        let mut start = 0;
        self.jobs.iter().filter_map(move |job| {
            let first = rows.start.max(start) - start;
            let end = job.matrix.n_rows().min(rows.end.saturating_sub(start));
            start += job.lookup?.n_groups() * GROUP_ROWS;
            (first < end).then_some((job, first..end))
        })
    }
}

/// How many of `n_rows` are done by tables: so many that both are done at about the same time.
fn n_added(n_rows: usize, values: &Values) -> usize {
    // A step of four columns is one for a panel and a group of tokens. An addition is for a row, a set of tables and a block.
    let products_per_row = values.n_groups() * SET_STEPS;
    let additions_per_row = values.n_blocks() * PANEL_ROWS;
    (n_rows * products_per_row / (products_per_row + additions_per_row))
        .next_multiple_of(PANEL_ROWS)
        .min(n_rows)
}

/// How groups of rows and blocks of tokens are shared out among the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Split {
    n_row_parts: usize,
    n_token_parts: usize,
}

impl Split {
    /// The one that is done first, about.
    fn best(n_groups: usize, n_blocks: usize, n_threads: usize) -> Self {
        /// What unpacking a group, and making tables for a block, takes of the time of multiplying a group with a block.
        const UNPACKING: f64 = 0.35;
        const TABLES: f64 = 0.4;
        let mut best = (f64::INFINITY, Self { n_row_parts: 1, n_token_parts: 1 });
        for n_token_parts in 1..=n_blocks.min(n_threads) {
            for n_row_parts in 1..=n_groups.min(2 * n_threads) {
                let rows = n_groups.div_ceil(n_row_parts) as f64;
                let tokens = n_blocks.div_ceil(n_token_parts) as f64;
                let turns = (n_row_parts * n_token_parts).div_ceil(n_threads) as f64;
                let time = turns * (rows * tokens + UNPACKING * rows + TABLES * tokens);
                if time < best.0 {
                    best = (time, Self { n_row_parts, n_token_parts });
                }
            }
        }
        best.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_shared_before_tokens_and_no_thread_is_left_without_work() {
        let parts = |split: Split| (split.n_row_parts, split.n_token_parts);
        assert_eq!(parts(Split::best(20, 8, 1)), (1, 1));
        assert_eq!(parts(Split::best(20, 8, 2)), (2, 1));
        assert_eq!(parts(Split::best(108, 3, 12)), (12, 1));
        for (n_groups, n_blocks, n_threads) in [(1, 8, 4), (3, 1, 2), (20, 8, 12), (20, 8, 192), (108, 1, 64)]
        {
            let (n_row_parts, n_token_parts) = parts(Split::best(n_groups, n_blocks, n_threads));
            assert!(n_row_parts <= n_groups && n_token_parts <= n_blocks);
            assert!(2 * n_row_parts * n_token_parts >= n_threads.min(n_groups * n_blocks));
        }
    }
}
