//! Five ternary codes to a byte (1.6 bits a weight), in the order in which activations lie in memory.
//!
//! Decoding one token is bound by reading the weights, and the two bits a weight of a file are a fifth more than
//! they need. Not a format of files: rows are packed from `I2_S` once, into memory that workers share.
//!
//! A row is a sequence of groups of 64 bytes, one for each five lines of activations
//! ([`super::quantized_rows`]). Byte `p` of a group is `c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4` with the codes (weight + 1)
//! that belong to place `p` of those lines. Lines past the last column have codes 0 and no activations.

use std::ops::Range;

use super::quantized_rows::{BLOCK_COLS, BLOCK_LINES};
use crate::ternary::{TernaryFormat, TernaryMatrix};

/// Lines of activations that a group belongs to.
pub(super) const GROUP_LINES: usize = 5;

/// Bytes of a group.
pub(super) const GROUP_BYTES: usize = 64;

/// A matrix with five codes to a byte.
#[derive(Clone, Copy)]
pub struct FiveMatrix<'a> {
    bytes: &'a [u8], // (n_rows, row_bytes)
    n_rows: usize,
    n_cols: usize,
    row_bytes: usize,
}

impl std::fmt::Debug for FiveMatrix<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FiveMatrix({} x {})", self.n_rows, self.n_cols)
    }
}

impl<'a> FiveMatrix<'a> {
    /// Bytes of a row of `n_cols` columns.
    #[must_use]
    pub fn row_bytes_of(n_cols: usize) -> usize {
        (n_cols.div_ceil(BLOCK_COLS) * BLOCK_LINES).div_ceil(GROUP_LINES) * GROUP_BYTES
    }

    /// The matrix in `bytes`, if they are as many as it takes.
    #[must_use]
    pub fn new(bytes: &'a [u8], n_rows: usize, n_cols: usize) -> Option<Self> {
        let row_bytes = Self::row_bytes_of(n_cols);
        (row_bytes.checked_mul(n_rows) == Some(bytes.len())).then_some(Self {
            bytes,
            n_rows,
            n_cols,
            row_bytes,
        })
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

    /// The groups of a row.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "no other instruction set has this product")
    )]
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &'a [[u8; GROUP_BYTES]] {
        self.bytes[row * self.row_bytes..][..self.row_bytes].as_chunks().0
    }

    /// Packs rows of an `I2_S` matrix. False if a code is 3, which has no place here.
    ///
    /// # Panics
    /// If the matrix is not `I2_S`, has no such rows, or `packed` is not of their length.
    #[must_use]
    pub fn pack_rows(matrix: &TernaryMatrix<'_>, rows: Range<usize>, packed: &mut [u8]) -> bool {
        assert_eq!(matrix.format(), TernaryFormat::I2S, "format of what is packed");
        let row_bytes = Self::row_bytes_of(matrix.n_cols());
        assert_eq!(packed.len(), rows.len() * row_bytes, "bytes of {rows:?}");
        let blocks = &matrix.blocks()[rows.start * matrix.row_bytes()..rows.end * matrix.row_bytes()];
        // Both bits of a code set.
        let invalid = blocks.iter().fold(0, |found, byte| found | (byte & (byte >> 1)));
        let blocks = blocks.chunks_exact(matrix.row_bytes());
        for (blocks, packed) in blocks.zip(packed.chunks_exact_mut(row_bytes)) {
            pack_row(blocks, packed);
        }
        invalid & 0b0101_0101 == 0
    }
}

fn pack_row(blocks: &[u8], packed: &mut [u8]) {
    for (group, packed) in packed.as_chunks_mut::<GROUP_BYTES>().0.iter_mut().enumerate() {
        let mut digits = [0; GROUP_BYTES];
        for line in (group * GROUP_LINES..(group + 1) * GROUP_LINES).rev() {
            let bytes = &blocks[blocks.len().min(line / BLOCK_LINES * GROUP_BYTES)..];
            // The last block may be a half, and there may be none.
            let mut whole = [0; GROUP_BYTES];
            let bytes = bytes.first_chunk().unwrap_or_else(|| {
                whole[..bytes.len()].copy_from_slice(bytes);
                &whole
            });
            // Shifts by constants are vector instructions.
            match line % BLOCK_LINES {
                0 => push_digits::<6>(&mut digits, bytes),
                1 => push_digits::<4>(&mut digits, bytes),
                2 => push_digits::<2>(&mut digits, bytes),
                _ => push_digits::<0>(&mut digits, bytes),
            }
        }
        *packed = digits;
    }
}

/// Times three, plus a code.
#[inline(always)]
fn push_digits<const SHIFT: u32>(digits: &mut [u8; GROUP_BYTES], bytes: &[u8; GROUP_BYTES]) {
    for (digit, byte) in digits.iter_mut().zip(bytes) {
        let code = byte >> SHIFT & 3;
        // A code 3, which is reported, wraps around.
        *digit = digit.wrapping_add(*digit).wrapping_add(*digit).wrapping_add(code);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ternary::i2_s_trailer;

    #[test]
    fn a_code_three_is_found_and_others_come_back() {
        let mut data: Vec<u8> = (0..2 * 96_u32).map(|i| [0x00, 0x24, 0x9a, 0x51][i as usize % 4]).collect();
        data.extend(i2_s_trailer(1.0));
        let matrix = TernaryMatrix::new(TernaryFormat::I2S, &data, 2, 384).unwrap();
        let row_bytes = FiveMatrix::row_bytes_of(384);
        assert_eq!(row_bytes, 2 * 64, "eight lines make two groups");
        let mut packed = vec![0xff; 2 * row_bytes];
        assert!(FiveMatrix::pack_rows(&matrix, 0..2, &mut packed));
        // Byte 2 of the first block is 0x9a: codes 2 1 2 2; the fifth code is that of column 256 + 2: 2.
        assert_eq!(packed[2], 2 + 3 + 2 * 9 + 2 * 27 + 2 * 81);
        let mut bad = data.clone();
        bad[100] = 0x30;
        let matrix = TernaryMatrix::new(TernaryFormat::I2S, &bad, 2, 384).unwrap();
        assert!(!FiveMatrix::pack_rows(&matrix, 0..2, &mut packed));
        assert!(FiveMatrix::pack_rows(&matrix, 0..1, &mut packed[..row_bytes]));
        assert!(FiveMatrix::new(&packed, 2, 384).is_some() && FiveMatrix::new(&packed, 3, 384).is_none());
    }
}
