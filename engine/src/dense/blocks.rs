//! Block layouts of the dense formats, and the scalar definition of dequantisation.

use half::{bf16, f16};

use super::DenseFormat;

/// f16 scale, 32 signed bytes.
pub const Q8_0_BLOCK_BYTES: usize = 2 + 32;
/// f16 scale, 16 bytes: low nibbles are elements 0..16, high nibbles 16..32, each + 8.
pub const Q4_0_BLOCK_BYTES: usize = 2 + 16;
/// 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 signed-byte scales, f16 scale.
pub const Q6_K_BLOCK_BYTES: usize = 128 + 64 + 16 + 2;

/// Writes the values of one row.
///
/// The arithmetic is: F16, BF16 exact; `Q8_0` `q * d` and `Q4_0` `(q - 8) * d`, both exact in f32;
/// `Q6_K` `(d * scale) * (q - 32)`, of which only the last product rounds.
///
/// # Panics
/// If `bytes` is not exactly the row of `out.len()` columns.
pub fn dequantize_row(format: DenseFormat, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Ok(bytes.len()), format.row_bytes(out.len()), "bytes of a {} row", format.name());
    match format {
        DenseFormat::F32 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *v = f32::from_le_bytes(*b);
            }
        }
        DenseFormat::F16 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *v = f16::from_le_bytes(*b).to_f32_const();
            }
        }
        DenseFormat::Bf16 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *v = bf16::from_le_bytes(*b).to_f32_const();
            }
        }
        DenseFormat::Q8_0 => each_block(bytes, out, q8_0_block),
        DenseFormat::Q4_0 => each_block(bytes, out, q4_0_block),
        DenseFormat::Q6K => each_block(bytes, out, q6_k_block),
    }
}

fn each_block<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (b, o) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<LEN>().0) {
        block(b, o);
    }
}

fn q8_0_block(block: &[u8; Q8_0_BLOCK_BYTES], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (v, q) in out.iter_mut().zip(&block[2..]) {
        *v = f32::from(q.cast_signed()) * d;
    }
}

fn q4_0_block(block: &[u8; Q4_0_BLOCK_BYTES], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (m, q) in block[2..].iter().enumerate() {
        out[m] = (f32::from(q & 15) - 8.0) * d;
        out[m + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

fn q6_k_block(block: &[u8; Q6_K_BLOCK_BYTES], out: &mut [f32; 256]) {
    let d = f16_at(block, 208);
    for (i, v) in out.iter_mut().enumerate() {
        let scale = block[192 + i / 16].cast_signed();
        *v = (d * f32::from(scale)) * (f32::from(q6_k_code(block, i)) - 32.0);
    }
}

/// The code of element `i`: in each half of 128, bytes m and m + 32 of the low nibbles hold elements m, m + 32
/// (low) and m + 64, m + 96 (high); byte m of the upper pairs holds bits 4 and 5 of all four.
fn q6_k_code(block: &[u8; Q6_K_BLOCK_BYTES], i: usize) -> u8 {
    let (half, quarter, m) = (i / 128, i / 32 % 4, i % 32);
    let low = block[half * 64 + quarter % 2 * 32 + m] >> (quarter / 2 * 4) & 15;
    let high = block[128 + half * 32 + m] >> (quarter * 2) & 3;
    low | high << 4
}

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32_const()
}
