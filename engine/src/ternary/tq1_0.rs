//! `TQ1_0` (GGUF type 34): 256 weights in 52 bytes, five codes to a byte, then their scale as f16.
//!
//! A byte holds the fraction `0.c0 c1 c2 c3 c4` in base 3, times 256 and rounded up: multiplying it by 3 pushes
//! out the next code. The bytes cover the columns in three groups: 32 bytes with five codes each (columns
//! `32*n + m`), 16 bytes with five (columns `160 + 16*n + m`), 4 bytes with four (columns `240 + 4*n + m`).

use half::f16;

pub(super) const BLOCK_COLS: usize = 256;
pub(super) const BLOCK_BYTES: usize = QS_BYTES + QH_BYTES + 2;

/// Bytes with five codes.
const QS_BYTES: usize = 48;
/// Bytes with four codes.
const QH_BYTES: usize = 4;

const _: () = assert!(QS_BYTES * 5 + QH_BYTES * 4 == BLOCK_COLS);

/// First byte, number of bytes, codes in a byte, first column of a group.
const GROUPS: [(usize, usize, usize, usize); 3] = [(0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240)];

pub(super) fn pack(weights: &[i8], scale: f16, block: &mut [u8]) {
    for (first_byte, n_bytes, n_codes, first_col) in GROUPS {
        for m in 0..n_bytes {
            let code = |n: usize| {
                if n < n_codes { (weights[first_col + n * n_bytes + m] + 1).cast_unsigned() } else { 0 }
            };
            let digits = (0..5).fold(0, |digits: u16, n| digits * 3 + u16::from(code(n)));
            // At most 255: the digits are less than 3^5 = 243.
            let [byte, _] = (digits * 256).div_ceil(243).to_le_bytes();
            block[first_byte + m] = byte;
        }
    }
    block[QS_BYTES + QH_BYTES..].copy_from_slice(&scale.to_le_bytes());
}

pub(super) fn unpack(block: &[u8], weights: &mut [i8]) {
    for (first_byte, n_bytes, n_codes, first_col) in GROUPS {
        for m in 0..n_bytes {
            let mut fraction = block[first_byte + m];
            for n in 0..n_codes {
                let [rest, code] = (u16::from(fraction) * 3).to_le_bytes();
                weights[first_col + n * n_bytes + m] = code.cast_signed() - 1;
                fraction = rest;
            }
        }
    }
}
