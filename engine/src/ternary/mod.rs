//! How ternary weights are stored: the three block layouts, and a checked view of one matrix in a file.
//!
//! A weight is -1, 0 or +1 times a scale; the file holds it as a code (weight + 1). The layouts are those of the
//! GGUF types and the same on every CPU. This module is the plain definition; `kernels::ternary` is fast.

use half::f16;

mod i2_s; // 2 bits a weight, one scale a tensor.
mod tq1_0; // 1.69 bits a weight, one scale per 256 weights.
mod tq2_0; // 2.06 bits a weight, one scale per 256 weights.

#[cfg(test)]
pub(crate) mod tests;

pub use i2_s::{TRAILER_BYTES as I2_S_TRAILER_BYTES, trailer as i2_s_trailer};

/// A way to store ternary weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TernaryFormat {
    /// GGUF type 36: blocks of 128 weights in 32 bytes; after all rows one f32 scale and 28 unused bytes.
    I2S,
    /// GGUF type 35: blocks of 256 weights in 64 bytes and an f16 scale.
    Tq2_0,
    /// GGUF type 34: blocks of 256 weights in 52 bytes (five to a byte) and an f16 scale.
    Tq1_0,
}

impl TernaryFormat {
    /// Every format.
    pub const ALL: [TernaryFormat; 3] = [Self::I2S, Self::Tq2_0, Self::Tq1_0];

    /// The name as in the GGUF world.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::I2S => "I2_S",
            Self::Tq2_0 => "TQ2_0",
            Self::Tq1_0 => "TQ1_0",
        }
    }

    /// Columns in a block. The columns of a matrix are a multiple of it.
    #[must_use]
    pub fn block_cols(self) -> usize {
        match self {
            Self::I2S => i2_s::BLOCK_COLS,
            Self::Tq2_0 => tq2_0::BLOCK_COLS,
            Self::Tq1_0 => tq1_0::BLOCK_COLS,
        }
    }

    /// Bytes in a block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Self::I2S => i2_s::BLOCK_BYTES,
            Self::Tq2_0 => tq2_0::BLOCK_BYTES,
            Self::Tq1_0 => tq1_0::BLOCK_BYTES,
        }
    }

    /// Bytes of one row, if `n_cols` is a whole number of blocks.
    #[must_use]
    pub fn row_bytes(self, n_cols: usize) -> Option<usize> {
        if !n_cols.is_multiple_of(self.block_cols()) {
            return None;
        }
        (n_cols / self.block_cols()).checked_mul(self.block_bytes())
    }

    /// Bytes of a whole matrix as it lies in a file, if `n_cols` is a whole number of blocks.
    #[must_use]
    pub fn n_bytes(self, n_rows: usize, n_cols: usize) -> Option<usize> {
        let blocks = self.row_bytes(n_cols)?.checked_mul(n_rows)?;
        blocks.checked_add(self.trailer_bytes())
    }

    /// Whether each block has its own scale; if not, the matrix has one.
    #[must_use]
    pub fn has_block_scales(self) -> bool {
        !matches!(self, Self::I2S)
    }

    /// Packs one row of weights (-1, 0, 1) with one scale per block into `row`. `I2_S` ignores the scales: see
    /// [`i2_s_trailer`].
    ///
    /// # Panics
    /// If the lengths do not belong together, or a weight is none of -1, 0, 1.
    pub fn pack_row(self, weights: &[i8], scales: &[f16], row: &mut [u8]) {
        assert_eq!(self.row_bytes(weights.len()), Some(row.len()), "row of {} weights", weights.len());
        assert!(weights.iter().all(|weight| (-1..=1).contains(weight)), "a ternary weight is -1, 0 or 1");
        let blocks = weights.chunks_exact(self.block_cols()).zip(row.chunks_exact_mut(self.block_bytes()));
        if !self.has_block_scales() {
            return blocks.for_each(|(weights, block)| i2_s::pack(weights, block));
        }
        assert_eq!(scales.len(), blocks.len(), "one scale per block");
        for ((weights, block), &scale) in blocks.zip(scales) {
            match self {
                Self::I2S | Self::Tq2_0 => tq2_0::pack(weights, scale, block),
                Self::Tq1_0 => tq1_0::pack(weights, scale, block),
            }
        }
    }

    fn trailer_bytes(self) -> usize {
        if matches!(self, Self::I2S) { i2_s::TRAILER_BYTES } else { 0 }
    }
}

/// Why some bytes are no ternary matrix.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TernaryError {
    /// The columns do not fill whole blocks, or the matrix is larger than memory.
    #[error("{format} cannot hold {n_rows} x {n_cols} weights", format = .format.name())]
    Shape {
        /// The format asked for.
        format: TernaryFormat,
        /// Rows asked for.
        n_rows: usize,
        /// Columns asked for.
        n_cols: usize,
    },
    /// The shape needs another number of bytes.
    #[error("{format} needs {needed} bytes, not {available}", format = .format.name())]
    Length {
        /// The format asked for.
        format: TernaryFormat,
        /// Bytes of the shape.
        needed: usize,
        /// Bytes given.
        available: usize,
    },
    /// The scale of the tensor is infinite or not a number.
    #[error("scale `{scale}` is not finite")]
    Scale {
        /// The scale found.
        scale: f32,
    },
}

/// The first thing in a matrix that is no ternary weight.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InvalidWeight {
    /// A code 3.
    #[error("row {row}, column {col} has code 3")]
    Code {
        /// Its row.
        row: usize,
        /// Its column.
        col: usize,
    },
    /// A block's scale is infinite or not a number.
    #[error("row {row}, columns from {col} have scale `{scale}`")]
    Scale {
        /// Its row.
        row: usize,
        /// First column of the block.
        col: usize,
        /// The scale found.
        scale: f32,
    },
}

/// A ternary matrix in a file: `n_rows` outputs of `n_cols` inputs.
#[derive(Clone, Copy)]
pub struct TernaryMatrix<'a> {
    format: TernaryFormat,
    blocks: &'a [u8], // (n_rows, row_bytes)
    n_rows: usize,
    n_cols: usize,
    row_bytes: usize,
    scale: f32,
}

impl std::fmt::Debug for TernaryMatrix<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TernaryMatrix({} {} x {})", self.format.name(), self.n_rows, self.n_cols)
    }
}

impl<'a> TernaryMatrix<'a> {
    /// Looks at the bytes of one tensor: all of them, for `I2_S` with the trailer that holds the scale.
    ///
    /// The codes themselves are not read; [`Self::first_invalid_weight`] does that.
    ///
    /// # Errors
    /// The shape does not fit the format, the length does not fit the shape, or the scale is not finite.
    pub fn new(
        format: TernaryFormat,
        data: &'a [u8],
        n_rows: usize,
        n_cols: usize,
    ) -> Result<Self, TernaryError> {
        let shape = TernaryError::Shape { format, n_rows, n_cols };
        let (Some(needed), Some(row_bytes)) = (format.n_bytes(n_rows, n_cols), format.row_bytes(n_cols))
        else {
            return Err(shape);
        };
        if data.len() != needed {
            return Err(TernaryError::Length { format, needed, available: data.len() });
        }
        let (blocks, trailer) = data.split_at(needed - format.trailer_bytes());
        let scale = if format.has_block_scales() { 1.0 } else { i2_s::scale(trailer) };
        if !scale.is_finite() {
            return Err(TernaryError::Scale { scale });
        }
        Ok(Self { format, blocks, n_rows, n_cols, row_bytes, scale })
    }

    /// How it is stored.
    #[must_use]
    pub fn format(&self) -> TernaryFormat {
        self.format
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

    /// Bytes from one row to the next.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The scale of the tensor; 1 if the blocks have their own.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The blocks of all rows, without a trailer.
    #[must_use]
    pub fn blocks(&self) -> &'a [u8] {
        self.blocks
    }

    /// Scale of block `block` of row `row`: the tensor's, if blocks have none.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn block_scale(&self, row: usize, block: usize) -> f32 {
        let block_bytes = self.format.block_bytes();
        let bytes = &self.row(row)[block * block_bytes..(block + 1) * block_bytes];
        match self.format {
            TernaryFormat::I2S => self.scale,
            TernaryFormat::Tq2_0 | TernaryFormat::Tq1_0 => {
                f16::from_le_bytes([bytes[block_bytes - 2], bytes[block_bytes - 1]]).to_f32()
            }
        }
    }

    /// Unpacks a row: weights (-1, 0, 1; a code 3 gives 2) and the scale of every block.
    ///
    /// # Panics
    /// If there is no such row, or the lengths are not `n_cols` and the number of blocks.
    pub fn unpack_row(&self, row: usize, weights: &mut [i8], scales: &mut [f32]) {
        assert_eq!(weights.len(), self.n_cols, "weights of a row");
        assert_eq!(scales.len(), self.n_cols / self.format.block_cols(), "scales of a row");
        let blocks = self.row(row).chunks_exact(self.format.block_bytes());
        for (block, weights) in blocks.zip(weights.chunks_exact_mut(self.format.block_cols())) {
            match self.format {
                TernaryFormat::I2S => i2_s::unpack(block, weights),
                TernaryFormat::Tq2_0 => tq2_0::unpack(block, weights),
                TernaryFormat::Tq1_0 => tq1_0::unpack(block, weights),
            }
        }
        for (block, scale) in scales.iter_mut().enumerate() {
            *scale = self.block_scale(row, block);
        }
    }

    /// Unpacks a row to floats: weight times scale.
    ///
    /// # Panics
    /// If there is no such row, or the length is not `n_cols`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let block_cols = self.format.block_cols();
        let mut weights = vec![0; self.n_cols];
        let mut scales = vec![0.0; self.n_cols / block_cols];
        self.unpack_row(row, &mut weights, &mut scales);
        assert_eq!(out.len(), self.n_cols, "values of a row");
        for (i, (value, weight)) in out.iter_mut().zip(weights).enumerate() {
            *value = f32::from(weight) * scales[i / block_cols];
        }
    }

    /// Reads all codes and block scales and returns the first that no ternary matrix has.
    #[must_use]
    pub fn first_invalid_weight(&self) -> Option<InvalidWeight> {
        (0..self.n_rows).find_map(|row| self.first_invalid_in_row(row))
    }

    fn first_invalid_in_row(&self, row: usize) -> Option<InvalidWeight> {
        let is_valid = match self.format {
            TernaryFormat::I2S => i2_s::codes_are_valid(self.row(row)),
            // Scales must be looked at block by block; any byte of TQ1_0 is five valid codes.
            TernaryFormat::Tq2_0 | TernaryFormat::Tq1_0 => false,
        };
        if is_valid {
            return None;
        }
        let (block_cols, block_bytes) = (self.format.block_cols(), self.format.block_bytes());
        for (block, bytes) in self.row(row).chunks_exact(block_bytes).enumerate() {
            let scale = self.block_scale(row, block);
            if !scale.is_finite() {
                return Some(InvalidWeight::Scale { row, col: block * block_cols, scale });
            }
            let invalid_col = match self.format {
                TernaryFormat::I2S => i2_s::first_invalid_col(bytes),
                TernaryFormat::Tq2_0 => tq2_0::first_invalid_col(bytes),
                TernaryFormat::Tq1_0 => None,
            };
            if let Some(col) = invalid_col {
                return Some(InvalidWeight::Code { row, col: block * block_cols + col });
            }
        }
        None
    }

    fn row(&self, row: usize) -> &'a [u8] {
        &self.blocks[row * self.row_bytes..(row + 1) * self.row_bytes]
    }
}
