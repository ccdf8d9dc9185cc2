//! Activations as int8, in the order in which the packed weights come out of memory.
//!
//! 64 bytes of `I2_S` hold two blocks of 128 columns; one shift of all of them gives 32 columns of the first
//! block and 32 of the second. Activations are laid out likewise once, so that no kernel shuffles anything:
//! within each 256 columns, column `128*half + 32*group + p` lies at `64*group + 32*half + p`. `TQ2_0` has the
//! same shape with the groups in reverse.

use crate::pool::ThreadPool;

/// Columns that are reordered together; also the block of `TQ2_0` and `TQ1_0`.
pub(super) const BLOCK_COLS: usize = 256;

/// Lines of activations in a block, one for each group of the weights.
pub(super) const BLOCK_LINES: usize = BLOCK_COLS / size_of::<Line>();

/// Columns whose order is kept.
pub(super) const GROUP_COLS: usize = 32;

/// More columns could overflow the kernels' sums: an unshifted code is at most `3 << 6`, a value at least -128.
const COLS_MAX: usize = 1 << 20;

/// A cache line, which is also the widest register.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [i8; 64]);

/// Up to `n_rows_max` rows of int8 activations with a scale each.
pub struct QuantizedRows {
    rows: Vec<Row>, // (n_rows_max)
    n_rows: usize,
    n_cols: usize,
    n_cols_max: usize,
}

/// The activations of one token.
#[derive(Clone)]
pub(super) struct Row {
    /// In kernel order; from `n_cols` to a multiple of 256 zeros.
    lines: Vec<Line>, // (n_blocks, 4)
    block_sums: Vec<i32>, // (n_blocks)
    sum: i32,
    scale: f32,
}

impl std::fmt::Debug for QuantizedRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantizedRows({} x {})", self.n_rows, self.n_cols)
    }
}

impl QuantizedRows {
    /// Room for `n_rows_max` rows of up to `n_cols_max` columns; no row yet.
    #[must_use]
    pub fn new(n_rows_max: usize, n_cols_max: usize) -> Self {
        let n_blocks = n_cols_max.div_ceil(BLOCK_COLS);
        let lines = vec![Line([0; 64]); n_blocks * BLOCK_LINES];
        let row = Row { lines, block_sums: vec![0; n_blocks], sum: 0, scale: 1.0 };
        Self { rows: vec![row; n_rows_max], n_rows: 0, n_cols: 0, n_cols_max }
    }

    /// Makes it `n_rows` rows of `n_cols` columns with arbitrary content.
    ///
    /// # Panics
    /// If there is no room for them, or `n_cols` is not a multiple of 128.
    pub fn reset(&mut self, n_rows: usize, n_cols: usize) {
        assert!(n_rows <= self.rows.len(), "{n_rows} rows, room for {}", self.rows.len());
        assert!(n_cols <= self.n_cols_max, "{n_cols} columns, room for {}", self.n_cols_max);
        assert!(n_cols.is_multiple_of(128) && n_cols <= COLS_MAX, "{n_cols} columns");
        (self.n_rows, self.n_cols) = (n_rows, n_cols);
    }

    /// Number of rows (tokens).
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Number of columns (inputs of the matrices).
    #[must_use]
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Sets one row to given values (in the order of the columns) and scale.
    ///
    /// # Panics
    /// If there is no such row, or the length is not `n_cols`.
    pub fn set_row(&mut self, row: usize, values: &[i8], scale: f32) {
        assert_eq!(values.len(), self.n_cols, "values of a row");
        let row = &mut self.rows[..self.n_rows][row];
        row.fill(self.n_cols, scale, |cols, out| out.copy_from_slice(&values[cols]));
    }

    /// Scale of a row: value = activation * scale.
    #[must_use]
    pub fn scale(&self, row: usize) -> f32 {
        self.row(row).scale
    }

    /// Columns that there is room for.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "no other instruction set has the product that asks")
    )]
    pub(super) fn n_cols_max(&self) -> usize {
        self.n_cols_max
    }

    /// The value at a column.
    ///
    /// # Panics
    /// If there is no such row or column.
    #[must_use]
    pub fn value(&self, row: usize, col: usize) -> i8 {
        assert!(col < self.n_cols, "column {col} of {}", self.n_cols);
        let (line, place) = position(col);
        self.row(row).lines[line].0[place]
    }

    /// Sum of the values of a row.
    #[must_use]
    pub fn sum(&self, row: usize) -> i32 {
        self.row(row).sum
    }

    /// Sums over every 256 columns of a row.
    pub(super) fn block_sums(&self, row: usize) -> &[i32] {
        &self.row(row).block_sums[..self.n_blocks()]
    }

    /// The values of a row in kernel order; from `n_cols` to a multiple of 256 zeros.
    pub(super) fn lines(&self, row: usize) -> &[Line] {
        &self.row(row).lines[..self.n_blocks() * BLOCK_LINES]
    }

    /// Blocks of 256 columns; the last may be a half.
    pub(super) fn n_blocks(&self) -> usize {
        self.n_cols.div_ceil(BLOCK_COLS)
    }

    /// Lets the threads of `pool` write the rows: `f(row index, row)`.
    pub(super) fn fill_rows(&mut self, pool: &ThreadPool, f: &(dyn Fn(usize, &mut Row) + Sync)) {
        let rows = &mut self.rows[..self.n_rows];
        pool.for_each_row_mut(rows, 1, 1, &|_, row_idx, row| f(row_idx, &mut row[0]));
    }

    fn row(&self, row: usize) -> &Row {
        &self.rows[..self.n_rows][row]
    }
}

impl Row {
    /// Writes the values of `n_cols` columns: `group(columns, values)` is called for 32 columns at a time.
    #[inline(always)]
    pub(super) fn fill(
        &mut self,
        n_cols: usize,
        scale: f32,
        mut group: impl FnMut(std::ops::Range<usize>, &mut [i8]),
    ) {
        let n_blocks = n_cols.div_ceil(BLOCK_COLS);
        let lines = self.lines[..n_blocks * BLOCK_LINES].chunks_exact_mut(BLOCK_LINES);
        self.sum = 0;
        self.scale = scale;
        for (block, (lines, block_sum)) in lines.zip(&mut self.block_sums).enumerate() {
            *block_sum = 0;
            for first_col in (0..BLOCK_COLS).step_by(GROUP_COLS) {
                let (line, place) = position(first_col);
                let values = &mut lines[line].0[place..place + GROUP_COLS];
                let first_col = block * BLOCK_COLS + first_col;
                if first_col < n_cols {
                    group(first_col..first_col + GROUP_COLS, values);
                } else {
                    values.fill(0);
                }
                *block_sum += values.iter().map(|&value| i32::from(value)).sum::<i32>();
            }
            self.sum += *block_sum;
        }
    }
}

/// Line, and place in it, of a column.
#[inline(always)]
pub(super) fn position(col: usize) -> (usize, usize) {
    let (block, half, group, p) = (col / 256, col % 256 / 128, col % 128 / 32, col % 32);
    (block * BLOCK_LINES + group, half * GROUP_COLS + p)
}
