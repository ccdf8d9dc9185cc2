//! `TQ2_0` (GGUF type 35): 256 weights in 64 bytes, then their scale as f16.
//!
//! Bits `2l+1 : 2l` of byte `32*j + m` hold the code of column `128*j + 32*l + m` (`j < 2`, `l < 4`, `m < 32`).

use half::f16;

pub(super) const BLOCK_COLS: usize = 256;
pub(super) const BLOCK_BYTES: usize = QS_BYTES + 2;

const QS_BYTES: usize = 64;

pub(super) fn pack(weights: &[i8], scale: f16, block: &mut [u8]) {
    for (i, byte) in block[..QS_BYTES].iter_mut().enumerate() {
        let code = |l: usize| (weights[128 * (i / 32) + 32 * l + i % 32] + 1).cast_unsigned();
        *byte = code(3) << 6 | code(2) << 4 | code(1) << 2 | code(0);
    }
    block[QS_BYTES..].copy_from_slice(&scale.to_le_bytes());
}

pub(super) fn unpack(block: &[u8], weights: &mut [i8]) {
    for (col, weight) in weights.iter_mut().enumerate() {
        *weight = code(block, col).cast_signed() - 1;
    }
}

pub(super) fn first_invalid_col(block: &[u8]) -> Option<usize> {
    let is_valid = block[..QS_BYTES].iter().fold(0, |found, byte| found | (byte & (byte >> 1))) & 0x55 == 0;
    if is_valid { None } else { (0..BLOCK_COLS).find(|&col| code(block, col) == 3) }
}

fn code(block: &[u8], col: usize) -> u8 {
    block[32 * (col / 128) + col % 32] >> (2 * (col % 128 / 32)) & 3
}
