//! What a product by columns is made of: the activations of one token that are not zero, and where its sums go.

#![expect(unsafe_code, reason = "writes its own rows of an output that threads share")]

use std::cell::RefCell;
use std::ops::Range;

use super::columns::{ColumnMatrix, LINE_ROWS, UNIT_COLS};
use super::quantized_rows::{BLOCK_COLS, BLOCK_LINES, GROUP_COLS, Line};
use super::{Output, QuantizedRows, TILE_ROWS, TokenScale};

/// The columns of a token that are not zero, four at a time.
#[derive(Default)]
pub(super) struct NonZero {
    pub(super) columns: Vec<[u32; 4]>,
    /// Their values, which are signed; zeros where the last four are fewer.
    pub(super) values: Vec<[u8; 4]>,
}

impl NonZero {
    /// Those of the only row of `acts`.
    pub(super) fn of(&mut self, acts: &QuantizedRows) {
        let n_cols_max = acts.n_cols_max();
        self.columns.clear();
        self.values.clear();
        // Once, for every token to come.
        self.columns.reserve(n_cols_max.div_ceil(4));
        self.values.reserve(n_cols_max.div_ceil(4));
        let mut n = 0;
        let (mut columns, mut values) = ([0; 4], [0; 4]);
        for (line, bytes) in acts.lines(0).iter().enumerate() {
            let mut mask = nonzero_bytes(bytes);
            while mask != 0 {
                let place = mask.trailing_zeros() as usize;
                mask &= mask - 1;
                (columns[n % 4], values[n % 4]) = (column_at(line, place), bytes.0[place].cast_unsigned());
                n += 1;
                if n % 4 == 0 {
                    self.columns.push(columns);
                    self.values.push(values);
                }
            }
        }
        if n % 4 > 0 {
            let first = columns[0];
            values[n % 4..].fill(0);
            columns[n % 4..].fill(first);
            self.columns.push(columns);
            self.values.push(values);
        }
    }
}

/// A bit for each byte that is not 0.
#[inline(always)]
fn nonzero_bytes(line: &Line) -> u64 {
    line.0.iter().enumerate().fold(0, |mask, (i, byte)| mask | u64::from(*byte != 0) << i)
}

/// The column whose value lies there; the inverse of [`super::quantized_rows::position`].
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "there are at most 2^20 columns")]
fn column_at(line: usize, place: usize) -> u32 {
    let (block, group) = (line / BLOCK_LINES, line % BLOCK_LINES);
    let (half, p) = (place / GROUP_COLS, place % GROUP_COLS);
    (block * BLOCK_COLS + half * UNIT_COLS + group * GROUP_COLS + p) as u32
}

thread_local! {
    /// Of the thread that hands out the work; it allocates once.
    pub(super) static NON_ZERO: RefCell<NonZero> = RefCell::new(NonZero::default());
}

/// A product by columns, as the instruction sets are given it.
pub(super) struct ColumnsJob<'a> {
    pub(super) matrix: ColumnMatrix<'a>,
    pub(super) nonzero: &'a NonZero,
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
