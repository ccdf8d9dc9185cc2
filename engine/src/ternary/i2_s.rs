//! `I2_S` (GGUF type 36): 128 weights in 32 bytes, one scale for the whole tensor.
//!
//! Bits `7-2g : 6-2g` of byte `p` hold the code of column `32*g + p` (`g < 4`, `p < 32`), on every CPU.

pub(super) const BLOCK_COLS: usize = 128;
pub(super) const BLOCK_BYTES: usize = 32;

/// Bytes after the last row: the scale as f32 and 28 bytes without meaning.
pub const TRAILER_BYTES: usize = 32;

const _: () = assert!(BLOCK_BYTES * 4 == BLOCK_COLS);

/// The bytes after the last row of a tensor with this scale.
#[must_use]
pub fn trailer(scale: f32) -> [u8; TRAILER_BYTES] {
    let mut bytes = [0; TRAILER_BYTES];
    bytes[..4].copy_from_slice(&scale.to_le_bytes());
    bytes
}

/// The scale in a trailer.
pub(super) fn scale(trailer: &[u8]) -> f32 {
    f32::from_le_bytes([trailer[0], trailer[1], trailer[2], trailer[3]])
}

pub(super) fn pack(weights: &[i8], block: &mut [u8]) {
    for (p, byte) in block.iter_mut().enumerate() {
        let code = |g: usize| (weights[32 * g + p] + 1).cast_unsigned();
        *byte = code(0) << 6 | code(1) << 4 | code(2) << 2 | code(3);
    }
}

pub(super) fn unpack(block: &[u8], weights: &mut [i8]) {
    for (col, weight) in weights.iter_mut().enumerate() {
        *weight = code(block, col).cast_signed() - 1;
    }
}

/// Whether no code in `bytes` is 3.
pub(super) fn codes_are_valid(bytes: &[u8]) -> bool {
    // Both bits of a code set; without an early exit, so that the compiler makes it a vector loop.
    bytes.iter().fold(0, |found, byte| found | (byte & (byte >> 1))) & 0b0101_0101 == 0
}

pub(super) fn first_invalid_col(block: &[u8]) -> Option<usize> {
    (0..BLOCK_COLS).find(|&col| code(block, col) == 3)
}

fn code(block: &[u8], col: usize) -> u8 {
    block[col % 32] >> (6 - 2 * (col / 32)) & 3
}
