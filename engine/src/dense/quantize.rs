//! Quantisers of the dense formats: the best block found by a small search, for conversion (not for speed).
//!
//! Deterministic: the same floats give the same bytes everywhere.
#![expect(clippy::cast_possible_truncation, reason = "codes are rounded and clamped to their range first")]
#![expect(clippy::cast_sign_loss, reason = "codes are offset to be non-negative first")]

use half::{bf16, f16};

use super::{DenseError, DenseFormat, Q4_0_BLOCK_BYTES, Q6_K_BLOCK_BYTES, Q8_0_BLOCK_BYTES};

/// Appends the bytes of one row.
///
/// # Errors
/// If the row is not a whole number of blocks or has a value that the format cannot hold (not finite, or
/// beyond the f16 range where the scale is an f16). `F32`, `F16` and `BF16` keep infinities out too.
pub fn quantize_row(format: DenseFormat, row: &[f32], out: &mut Vec<u8>) -> Result<(), DenseError> {
    out.reserve(format.row_bytes(row.len())?);
    // An f16 holds up to 65504; the block formats are kept to the same range so that no scale can overflow.
    let limit = if matches!(format, DenseFormat::F32 | DenseFormat::Bf16) { f32::MAX } else { 65504.0 };
    if let Some(column) = row.iter().position(|v| !v.is_finite() || v.abs() > limit) {
        return Err(DenseError::Value { column, format: format.name() });
    }
    match format {
        DenseFormat::F32 => row.iter().for_each(|v| out.extend(v.to_le_bytes())),
        DenseFormat::F16 => row.iter().for_each(|v| out.extend(f16::from_f32_const(*v).to_le_bytes())),
        DenseFormat::Bf16 => {
            for v in row {
                out.extend(bf16::from_f32_const(*v).to_le_bytes());
            }
        }
        DenseFormat::Q8_0 => row.as_chunks().0.iter().for_each(|b| out.extend(q8_0_block(b))),
        DenseFormat::Q4_0 => row.as_chunks().0.iter().for_each(|b| out.extend(q4_0_block(b))),
        DenseFormat::Q6K => row.as_chunks().0.iter().for_each(|b| out.extend(q6_k_block(b))),
    }
    Ok(())
}

fn q8_0_block(x: &[f32; 32]) -> [u8; Q8_0_BLOCK_BYTES] {
    let absmax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let d = absmax / 127.0;
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    let mut block = [0; Q8_0_BLOCK_BYTES];
    block[..2].copy_from_slice(&f16::from_f32_const(d).to_le_bytes());
    for (q, v) in block[2..].iter_mut().zip(x) {
        *q = ((v * inverse).round().clamp(-127.0, 127.0) as i8).cast_unsigned();
    }
    block
}

fn q4_0_block(x: &[f32; 32]) -> [u8; Q4_0_BLOCK_BYTES] {
    let d = f16::from_f32_const(best_scale(x, 8.0));
    let codes = codes(x, d.to_f32_const(), 8.0);
    let mut block = [0; Q4_0_BLOCK_BYTES];
    block[..2].copy_from_slice(&d.to_le_bytes());
    for (m, q) in block[2..].iter_mut().enumerate() {
        *q = ((codes[m] + 8.0) as u8) | ((codes[m + 16] + 8.0) as u8) << 4;
    }
    block
}

fn q6_k_block(x: &[f32; 256]) -> [u8; Q6_K_BLOCK_BYTES] {
    let groups = x.as_chunks::<16>().0;
    let mut scales = [0.0f32; 16];
    for (s, group) in scales.iter_mut().zip(groups) {
        *s = best_scale(group, 32.0);
    }
    // The group scale of the largest magnitude becomes -128, so that its whole range is used.
    let largest = scales.iter().fold(0.0f32, |m, s| if s.abs() > m.abs() { *s } else { m });
    let d = f16::from_f32_const(largest / -128.0);
    let d_value = d.to_f32_const();
    let inverse = if d_value == 0.0 { 0.0 } else { 1.0 / d_value };
    let mut block = [0; Q6_K_BLOCK_BYTES];
    block[208..].copy_from_slice(&d.to_le_bytes());
    for (g, group) in groups.iter().enumerate() {
        let scale = (scales[g] * inverse).round().clamp(-128.0, 127.0);
        block[192 + g] = (scale as i8).cast_unsigned();
        for (m, code) in codes(group, d_value * scale, 32.0).into_iter().enumerate() {
            let (i, code) = (g * 16 + m, (code + 32.0) as u8);
            let (half, quarter, m) = (i / 128, i / 32 % 4, i % 32);
            block[half * 64 + quarter % 2 * 32 + m] |= (code & 15) << (quarter / 2 * 4);
            block[128 + half * 32 + m] |= (code >> 4) << (quarter * 2);
        }
    }
    block
}

/// The nearest codes in -half..half for a scale.
fn codes<const N: usize>(x: &[f32; N], scale: f32, half: f32) -> [f32; N] {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    x.map(|v| (v * inverse).round_ties_even().clamp(-half, half - 1.0))
}

/// The scale (of either sign) that leaves the least squared error with codes in -half..half.
///
/// Tries scales around the one that puts the largest value on -half; for each, the codes are fixed and the
/// scale refitted to them by least squares.
fn best_scale<const N: usize>(x: &[f32; N], half: f32) -> f32 {
    let largest = x.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    if largest == 0.0 {
        return 0.0;
    }
    let mut best = (f32::INFINITY, 0.0);
    for step in -10i8..=10 {
        for sign in [-1.0, 1.0] {
            let scale = sign * largest / (half + 0.1 * f32::from(step) * (half / 16.0).max(1.0));
            let codes = codes(x, scale, half);
            let xq: f32 = x.iter().zip(&codes).map(|(v, q)| v * q).sum();
            let qq: f32 = codes.iter().map(|q| q * q).sum();
            let refit = if qq > 0.0 { xq / qq } else { 0.0 };
            let error: f32 = x.iter().zip(&codes).map(|(v, q)| (v - refit * q) * (v - refit * q)).sum();
            if error < best.0 {
                best = (error, refit);
            }
        }
    }
    best.1
}
