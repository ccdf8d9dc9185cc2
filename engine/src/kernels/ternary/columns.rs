//! A ternary matrix by columns: what one token reads of it if many of its activations are zero.
//!
//! Behind relu(gate)^2 more than half of the activations are zero, and once rounded to int8 more still: the
//! columns that belong to them add nothing to any sum, and need not be read. Not a format of files: columns
//! are packed from `I2_S` once, into memory that workers share.
//!
//! A column is a sequence of lines of 64 bytes, one for each 256 rows. Byte `16 k + 4 q + i` of a line (k, q, i < 4)
//! has, in bits `2 d` and `2 d + 1`, the code (weight + 1) of row `64 d + 16 q + 4 k + i` of those rows. When the bytes of
//! four columns are interleaved within 128-bit lanes, as vector instructions do it, 16 rows come to lie side by side.
//! Rows past the last have codes 0.

use super::quantized_rows::GROUP_COLS;
use crate::ternary::{TernaryFormat, TernaryMatrix};

/// Rows of a line.
pub(super) const LINE_ROWS: usize = 256;

/// Bytes of a line.
pub(super) const LINE_BYTES: usize = 64;

/// Columns that are packed together: 32 bytes of a row of `I2_S`.
pub(crate) const UNIT_COLS: usize = 128;

/// More columns could overflow the sums: an unshifted code is at most `2 << 6`, a value at least -128.
const COLS_MAX: usize = 1 << 17;

/// A matrix by columns.
#[derive(Clone, Copy)]
pub struct ColumnMatrix<'a> {
    bytes: &'a [u8], // (n_cols, column_bytes)
    n_rows: usize,
    n_cols: usize,
}

impl std::fmt::Debug for ColumnMatrix<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ColumnMatrix({} x {})", self.n_rows, self.n_cols)
    }
}

impl<'a> ColumnMatrix<'a> {
    /// Bytes of a column of `n_rows` rows.
    #[must_use]
    pub fn column_bytes_of(n_rows: usize) -> usize {
        n_rows.div_ceil(LINE_ROWS) * LINE_BYTES
    }

    /// The matrix in `bytes`, if they are as many as it takes, and its sums cannot overflow.
    #[must_use]
    pub fn new(bytes: &'a [u8], n_rows: usize, n_cols: usize) -> Option<Self> {
        let is_whole = Self::column_bytes_of(n_rows).checked_mul(n_cols) == Some(bytes.len());
        (is_whole && n_cols <= COLS_MAX).then_some(Self { bytes, n_rows, n_cols })
    }

    /// Number of outputs.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Number of inputs.
    #[must_use]
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Bytes from one column to the next.
    #[must_use]
    pub fn column_bytes(&self) -> usize {
        Self::column_bytes_of(self.n_rows)
    }

    /// The bytes of all columns.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "no other instruction set has this product")
    )]
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Packs the 128 columns of unit `unit` of an `I2_S` matrix. False if a code is 3, which is no weight.
    ///
    /// # Panics
    /// If the matrix is not `I2_S`, has no such columns, or `packed` is not of their length.
    #[must_use]
    pub fn pack_unit(matrix: &TernaryMatrix<'_>, unit: usize, packed: &mut [u8]) -> bool {
        assert_eq!(matrix.format(), TernaryFormat::I2S, "format of what is packed");
        let column_bytes = Self::column_bytes_of(matrix.n_rows());
        assert_eq!(packed.len(), UNIT_COLS * column_bytes, "bytes of unit {unit}");
        let mut both_bits = 0;
        for line in 0..column_bytes / LINE_BYTES {
            // By place in the unit, the bytes of the rows in the order of the line.
            let mut places = [[0; LINE_ROWS]; GROUP_COLS];
            for row in 0..LINE_ROWS.min(matrix.n_rows() - line * LINE_ROWS) {
                let start = (line * LINE_ROWS + row) * matrix.row_bytes() + unit * GROUP_COLS;
                let bytes = &matrix.blocks()[start..start + GROUP_COLS];
                let at = place_of(row);
                for (place, byte) in places.iter_mut().zip(bytes) {
                    place[at] = *byte;
                    // A code 3 has both bits set.
                    both_bits |= byte & (byte >> 1);
                }
            }
            for (place, rows) in places.iter().enumerate() {
                let mut write = |group: usize, line_bytes: [u8; LINE_BYTES]| {
                    let column = group * GROUP_COLS + place;
                    packed[column * column_bytes + line * LINE_BYTES..][..LINE_BYTES]
                        .copy_from_slice(&line_bytes);
                };
                // Shifts by constants are vector instructions.
                write(0, line_of::<6>(rows));
                write(1, line_of::<4>(rows));
                write(2, line_of::<2>(rows));
                write(3, line_of::<0>(rows));
            }
        }
        both_bits & 0b0101_0101 == 0
    }
}

/// Where a row of a line lies: byte of the line, and 64 for each pair of bits below its own.
fn place_of(row: usize) -> usize {
    let (d, q, k, i) = (row / 64, row / 16 % 4, row / 4 % 4, row % 4);
    64 * d + 16 * k + 4 * q + i
}

/// A line of the column whose codes are at `SHIFT` in the bytes of the rows.
#[inline(always)]
fn line_of<const SHIFT: u32>(rows: &[u8; LINE_ROWS]) -> [u8; LINE_BYTES] {
    let code = |i: usize| rows[i] >> SHIFT & 3;
    std::array::from_fn(|p| code(p) | code(64 + p) << 2 | code(128 + p) << 4 | code(192 + p) << 6)
}
