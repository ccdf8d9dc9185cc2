//! Dense matrices as GGUF stores them: embedding, output head, and the projections of models that are not ternary.
//!
//! Block layouts are those of ggml, to the byte. A row is a whole number of blocks; values of a row are in
//! increasing column order. Dequantisation is exact up to the one rounding written at each format, so that
//! every kernel can repeat it bit for bit.

mod blocks; // Layouts: bytes of a block <-> codes and scales.
mod quantize; // Floats -> blocks, for the converter.

pub use blocks::{Q4_0_BLOCK_BYTES, Q6_K_BLOCK_BYTES, Q8_0_BLOCK_BYTES, dequantize_row};
pub use quantize::quantize_row;

/// The element types of a dense matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenseFormat {
    /// `F32`.
    F32,
    /// `F16`, IEEE binary16.
    F16,
    /// `BF16`, the upper half of a binary32.
    Bf16,
    /// `Q8_0`: 32 signed bytes and an f16 scale.
    Q8_0,
    /// `Q6_K`: 256 six-bit codes, 16 signed-byte scales and an f16 scale of scales.
    Q6K,
    /// `Q4_0`: 32 four-bit codes and an f16 scale.
    Q4_0,
}

impl DenseFormat {
    /// Every format.
    pub const ALL: [DenseFormat; 6] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q6K, Self::Q4_0];

    /// The name in GGUF tools.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q6K => "Q6_K",
            Self::Q4_0 => "Q4_0",
        }
    }

    /// How many columns one block covers.
    #[must_use]
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 => 32,
            Self::Q6K => 256,
        }
    }

    /// How many bytes one block takes.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => Q8_0_BLOCK_BYTES,
            Self::Q6K => Q6_K_BLOCK_BYTES,
            Self::Q4_0 => Q4_0_BLOCK_BYTES,
        }
    }

    /// How many bytes a row of `n_cols` takes.
    ///
    /// # Errors
    /// If `n_cols` is zero, not a whole number of blocks, or absurdly large.
    pub fn row_bytes(self, n_cols: usize) -> Result<usize, DenseError> {
        let block_len = self.block_len();
        if n_cols == 0 || !n_cols.is_multiple_of(block_len) {
            return Err(DenseError::Columns { format: self.name(), n_cols, block_len });
        }
        (n_cols / block_len).checked_mul(self.block_bytes()).ok_or(DenseError::TooLarge { n_rows: 1, n_cols })
    }
}

/// Why bytes are no dense matrix, or floats cannot become one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DenseError {
    /// The row is not a whole number of blocks.
    #[error("{format} needs a positive multiple of {block_len} columns, not {n_cols}")]
    Columns {
        /// Format name.
        format: &'static str,
        /// Columns asked for.
        n_cols: usize,
        /// Columns in a block.
        block_len: usize,
    },
    /// The size does not fit the address space.
    #[error("a matrix of {n_rows} x {n_cols} is too large")]
    TooLarge {
        /// Rows asked for.
        n_rows: usize,
        /// Columns asked for.
        n_cols: usize,
    },
    /// The data is shorter or longer than the shape says.
    #[error("{format} matrix of {n_rows} x {n_cols} takes {expected} bytes, found {found}")]
    Length {
        /// Format name.
        format: &'static str,
        /// Rows.
        n_rows: usize,
        /// Columns.
        n_cols: usize,
        /// Bytes that the shape takes.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A value cannot be quantised.
    #[error("value at column {column} is not finite or too large for {format}")]
    Value {
        /// Column in the row.
        column: usize,
        /// Format name.
        format: &'static str,
    },
}

/// A borrowed matrix in one of the [`DenseFormat`]s, row-major.
#[derive(Clone, Copy)]
pub struct DenseMatrix<'a> {
    format: DenseFormat,
    data: &'a [u8], // (n_rows, row_bytes)
    n_rows: usize,
    n_cols: usize,
    // Invariant: data.len() == n_rows * row_bytes and row_bytes == format.row_bytes(n_cols).
    row_bytes: usize,
}

impl std::fmt::Debug for DenseMatrix<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DenseMatrix({} {} x {})", self.format.name(), self.n_rows, self.n_cols)
    }
}

impl<'a> DenseMatrix<'a> {
    /// A view of `data` as `n_rows` x `n_cols`.
    ///
    /// # Errors
    /// If the shape is impossible for the format or `data` has not exactly its size.
    pub fn new(
        format: DenseFormat,
        data: &'a [u8],
        n_rows: usize,
        n_cols: usize,
    ) -> Result<Self, DenseError> {
        let row_bytes = format.row_bytes(n_cols)?;
        let expected = row_bytes.checked_mul(n_rows).ok_or(DenseError::TooLarge { n_rows, n_cols })?;
        if data.len() != expected {
            let (format, found) = (format.name(), data.len());
            return Err(DenseError::Length { format, n_rows, n_cols, expected, found });
        }
        Ok(Self { format, data, n_rows, n_cols, row_bytes })
    }

    /// The element type.
    #[must_use]
    pub fn format(&self) -> DenseFormat {
        self.format
    }

    /// Outputs.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Inputs: the contiguous dimension.
    #[must_use]
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// All bytes.
    #[must_use]
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Bytes of one row.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The bytes of row `row`.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.n_rows, "row {row} of a matrix of {} rows", self.n_rows);
        &self.data[row * self.row_bytes..][..self.row_bytes]
    }

    /// Writes the values of row `row` (an embedding look-up).
    ///
    /// # Panics
    /// If there is no such row, or `out` is not `n_cols` long.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.n_cols, "output length of a row of {self:?}");
        dequantize_row(self.format, self.row(row), out);
    }
}

#[cfg(test)]
mod tests;
