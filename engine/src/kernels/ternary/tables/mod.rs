//! Many tokens: the sums that four columns can come to are computed once and looked up for every row.
//!
//! Four weights of -1, 0 and 1 have 81 values, and so have their products with the activations of four columns, for
//! each token. A table holds them side by side for a block of tokens; a row then costs one load and one addition for
//! four columns of all tokens of the block, where a dot product takes four multiplications for each token. (Known as
//! the method of four Russians: Arlazarov, Dinic, Kronrod, Faradžev, 1970.) What bounds it is reading the L1 cache,
//! with any vector instructions.
//!
//! The rows of all matrices that are multiplied with the same activations stand one after the other. A thread takes a
//! part of them and some blocks of tokens; what it works on fits the L2 cache.

use std::ops::Range;

use super::{Isa, MatmulJob, QuantizedRows};
use crate::pool::ThreadPool;
use crate::ternary::TernaryFormat;

mod codes; // Weights as indices of tables.
mod sums; // Tables, and a block of tokens times a part of the rows.

pub(super) use sums::Scratch;
use sums::Unit;

/// Columns of a table.
const GROUP_COLS: usize = 4;

/// Tables that are used together, by the eight bytes of a word.
const BATCH_GROUPS: usize = size_of::<u64>();

/// Columns of those.
const BATCH_COLS: usize = GROUP_COLS * BATCH_GROUPS;

/// Sums of four weights that are -1, 0 or 1.
const TABLE_SUMS: usize = 81;

/// Tokens of a block: more of them are multiplied in multiples of it.
pub const BLOCK_TOKENS: usize = 32;

/// Tokens of the blocks for what is left in the end.
const SMALL_BLOCKS: [usize; 2] = [8, 16];

/// Cache lines of a unit, at most: a megabyte, about the L2 cache. Each row has one for its sums of each block, one for
/// its codes and one that the CPU fetches. (Measured on 1 MiB of L2: smaller units make their tables too often.)
const UNIT_LINES: usize = 18 << 10;

/// Making tables takes as long as looking up so many rows.
const TABLE_ROWS: usize = 120;

/// Bringing weights into codes takes as long as looking up this fraction of them for a block.
const CODES_PER_LOOK_UP: f64 = 0.2;

/// Whether these jobs are done so. AVX-512 VNNI multiplies panels as fast, and ARM was not measured.
pub(super) fn suits(isa: Isa, acts: &QuantizedRows, jobs: &[MatmulJob<'_>]) -> bool {
    matches!(isa, Isa::Avx2 | Isa::AvxVnni)
        && acts.n_rows() > super::FEW_TOKENS
        && jobs.iter().all(|job| job.matrix.format() == TernaryFormat::I2S)
}

/// Rows and columns of a square exchanged: what neighbours have at a place becomes neighbours.
#[inline(always)]
fn transposed<E: Copy + Default, const N: usize>(rows: &[[E; N]; N]) -> [[E; N]; N] {
    let mut columns = [[E::default(); N]; N];
    for (column, columns) in columns.iter_mut().enumerate() {
        for (element, row) in columns.iter_mut().zip(rows) {
            *element = row[column];
        }
    }
    columns
}

/// Multiplies the matrices of `jobs`, which [`suits`], with `acts`.
pub(super) fn matmul(isa: Isa, pool: &ThreadPool, acts: &QuantizedRows, jobs: &[MatmulJob<'_>]) {
    let rows = Rows(jobs);
    let blocks = Blocks(acts.n_rows());
    let split = Split::best(rows.len(), blocks.len(), pool.n_threads());
    pool.for_each_chunk(split.n_parts * split.n_groups, 1, &|_, units| {
        for unit in units {
            let (group, part) = (unit % split.n_groups, unit / split.n_groups);
            let of = |n: usize, i: usize, n_pieces: usize| i * n / n_pieces..(i + 1) * n / n_pieces;
            let group = of(blocks.len(), group, split.n_groups);
            let unit = Unit { acts, blocks, group, rows, part: of(rows.len(), part, split.n_parts) };
            super::SCRATCH.with_borrow_mut(|scratch| unit.multiply(isa, &mut scratch.tables));
        }
    });
}

/// So many tokens in blocks: whole ones, and for the rest one or, where they cost less, two smaller ones.
#[derive(Clone, Copy)]
struct Blocks(usize);

impl Blocks {
    fn len(self) -> usize {
        let [small, half] = SMALL_BLOCKS;
        let rest = self.0 % BLOCK_TOKENS;
        let n_more = if rest == 0 { 0 } else { 1 + usize::from(rest > half && rest <= half + small) };
        self.0 / BLOCK_TOKENS + n_more
    }

    /// The tokens of a block.
    fn get(self, block: usize) -> Range<usize> {
        let [small, half] = SMALL_BLOCKS;
        let (n_whole, rest) = (self.0 / BLOCK_TOKENS, self.0 % BLOCK_TOKENS);
        let start = block.min(n_whole) * BLOCK_TOKENS + block.saturating_sub(n_whole) * half;
        // Three quarters of a block cost less as one of a half and one of a quarter.
        let is_first_of_two = block == n_whole && rest > half && rest <= half + small;
        let n = if is_first_of_two { half } else { BLOCK_TOKENS };
        start..self.0.min(start + n)
    }
}

/// How rows and blocks are shared out among the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Split {
    n_parts: usize,  // Of the rows.
    n_groups: usize, // Of the blocks.
}

impl Split {
    /// The one that is done first, about.
    fn best(n_rows: usize, n_blocks: usize, n_threads: usize) -> Self {
        let mut best = (f64::INFINITY, Self { n_parts: 1, n_groups: n_blocks });
        for n_groups in 1..=n_blocks {
            let blocks = n_blocks.div_ceil(n_groups);
            let least = (n_rows * (blocks + 2)).div_ceil(UNIT_LINES);
            for n_parts in least..least.max(n_rows / TABLE_ROWS) + 1 {
                let rows = n_rows.div_ceil(n_parts);
                let turns = (n_parts * n_groups).div_ceil(n_threads);
                let time = turns as f64
                    * (blocks as f64 * (rows + TABLE_ROWS) as f64 + rows as f64 * CODES_PER_LOOK_UP);
                if time < best.0 {
                    best = (time, Self { n_parts, n_groups });
                }
            }
        }
        best.1
    }
}

/// The rows of several matrices, one after the other.
#[derive(Clone, Copy)]
struct Rows<'a, 'b>(&'a [MatmulJob<'b>]);

impl<'a, 'b> Rows<'a, 'b> {
    fn len(self) -> usize {
        self.0.iter().map(|job| job.matrix.n_rows()).sum()
    }

    /// Which rows of which matrices `rows` are: job, place in `rows`, rows of its matrix.
    fn pieces(self, rows: Range<usize>) -> impl Iterator<Item = (&'a MatmulJob<'b>, usize, Range<usize>)> {
        let starts = self.0.iter().scan(0, |end, job| {
            let start = *end;
            *end += job.matrix.n_rows();
            Some((job, start))
        });
        starts.filter_map(move |(job, start)| {
            let first = rows.start.max(start);
            let end = rows.end.min(start + job.matrix.n_rows());
            (first < end).then(|| (job, first - rows.start, first - start..end - start))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_tokens() {
        for n_tokens in 1..200 {
            let blocks = Blocks(n_tokens);
            let mut end = 0;
            for block in (0..blocks.len()).map(|block| blocks.get(block)) {
                assert_eq!(block.start, end);
                assert!(!block.is_empty() && block.len() <= BLOCK_TOKENS);
                end = block.end;
            }
            assert_eq!(end, n_tokens);
        }
    }

    #[test]
    fn every_thread_has_work_and_no_unit_is_larger_than_the_cache() {
        for (n_rows, n_blocks, n_threads) in [(2560, 3, 2), (3840, 8, 12), (13824, 8, 1), (2560, 1, 24)] {
            let split = Split::best(n_rows, n_blocks, n_threads);
            assert!(split.n_parts * split.n_groups >= n_threads.min(n_blocks * 8), "{split:?}");
            assert!(
                n_rows.div_ceil(split.n_parts) * (2 + n_blocks.div_ceil(split.n_groups))
                    <= UNIT_LINES + n_blocks + 2,
                "{split:?}"
            );
        }
    }
}
