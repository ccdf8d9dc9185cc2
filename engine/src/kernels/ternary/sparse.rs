//! What a product by columns is made of: the activations of one token that are not zero, and where its sums go.

#![expect(unsafe_code, reason = "writes its own rows of an output that threads share")]

use std::cell::RefCell;
use std::ops::Range;

use super::columns::{ColumnMatrix, LINE_ROWS, UNIT_COLS};
use super::quantized_rows::{BLOCK_COLS, BLOCK_LINES, GROUP_COLS};
use super::{Output, QuantizedRows, TILE_ROWS, TokenScale};

/// The columns of a token that are not zero.
#[derive(Default)]
pub(super) struct NonZero {
    n: usize,
    columns: Vec<u32>, // Room for all columns, and for what a register writes past them.
    values: Vec<u8>,   // As many.
}

/// What is written at a time, of which the first some count.
pub(super) const CHUNK: usize = 16;

impl NonZero {
    /// Forgets all, and makes room for those of a row of `acts`: it allocates for its first row only, unless a longer one comes.
    pub(super) fn clear(&mut self, acts: &QuantizedRows) {
        let n_places = acts.n_cols_max().next_multiple_of(BLOCK_COLS) + CHUNK;
        self.n = 0;
        self.columns.resize(n_places, 0);
        self.values.resize(n_places, 0);
    }

    /// Adds the first `n` of these.
    #[inline(always)]
    pub(super) fn push(&mut self, n: usize, put: impl FnOnce(&mut [u32; CHUNK], &mut [u8; CHUNK])) {
        let places = self.columns[self.n..].first_chunk_mut().zip(self.values[self.n..].first_chunk_mut());
        if let Some((columns, values)) = places {
            put(columns, values);
            self.n += n;
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.n
    }

    /// Fills up the last four with a column that is there, times zero.
    pub(super) fn finish(&mut self) {
        let end = self.n.next_multiple_of(4);
        self.columns[self.n..end].fill(0);
        self.values[self.n..end].fill(0);
    }

    /// Four at a time: columns, and their values, which are signed.
    pub(super) fn fours(&self) -> (&[[u32; 4]], &[[u8; 4]]) {
        let end = self.n.next_multiple_of(4);
        (self.columns[..end].as_chunks().0, self.values[..end].as_chunks().0)
    }
}

/// The column whose value lies there; the inverse of [`super::quantized_rows::position`].
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "there are at most 2^20 columns")]
pub(super) fn column_at(line: usize, place: usize) -> u32 {
    let (block, group) = (line / BLOCK_LINES, line % BLOCK_LINES);
    let (half, p) = (place / GROUP_COLS, place % GROUP_COLS);
    (block * BLOCK_COLS + half * UNIT_COLS + group * GROUP_COLS + p) as u32
}

thread_local! {
    /// Each thread finds them by itself: the numbers are few, but a list would have to come from the cache of another core.
    pub(super) static NON_ZERO: RefCell<NonZero> = RefCell::new(NonZero::default());
}

/// A product by columns, as the instruction sets are given it.
pub(super) struct ColumnsJob<'a> {
    pub(super) matrix: ColumnMatrix<'a>,
    pub(super) token: TokenScale,
    pub(super) scale: f32,
    pub(super) out: &'a Output<'a>,
}

impl ColumnsJob<'_> {
    /// Finishes the sums of the rows of a line, as many as there are.
    ///
    /// # Safety
    /// No other thread uses these rows.
    pub(super) unsafe fn finish_line(&self, line: usize, dots: &[i32; LINE_ROWS]) {
        let first = line * LINE_ROWS;
        let rows = |i: usize| -> Range<usize> {
            let start = first + i * TILE_ROWS;
            start..self.matrix.n_rows().min(start + TILE_ROWS)
        };
        for (i, dots) in dots.as_chunks::<TILE_ROWS>().0.iter().enumerate() {
            if rows(i).start < self.matrix.n_rows() {
                // SAFETY: the caller's promise.
                unsafe { self.out.finish_dots(rows(i), dots, self.token, self.scale) };
            }
        }
    }
}
