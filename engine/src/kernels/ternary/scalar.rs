//! The definition: one row and one token after the other.

#![expect(unsafe_code, reason = "writes its own rows of an output that threads share")]

use std::ops::Range;

use super::quantized_rows::position;
use super::{BLOCK_LINES, Line, MatmulJob, QuantizedRows, Scratch, TokenScale, exact_f32};

/// Multiplies rows that no other thread has.
pub(super) fn matmul_rows(
    job: &MatmulJob<'_>,
    acts: &QuantizedRows,
    rows: Range<usize>,
    scratch: &mut Scratch,
) {
    let MatmulJob { matrix, out, .. } = job;
    let Scratch { weights, scales, codes, .. } = scratch;
    weights.resize(acts.n_cols(), 0);
    scales.resize(acts.n_cols() / matrix.format().block_cols(), 0.0);
    // Zeros where the last block is a half.
    codes.clear();
    codes.resize(acts.n_blocks() * BLOCK_LINES, Line([0; 64]));
    for row in rows {
        matrix.unpack_row(row, weights, scales);
        for (col, weight) in weights.iter().enumerate() {
            let (line, place) = position(col);
            codes[line].0[place] = weight + 1;
        }
        for token in 0..acts.n_rows() {
            let token_scale = TokenScale::of(acts, token);
            let blocks = codes.chunks_exact(BLOCK_LINES).zip(acts.lines(token).chunks_exact(BLOCK_LINES));
            if matrix.format().has_block_scales() {
                let blocks = blocks.zip(acts.block_sums(token)).zip(&*scales);
                let sum = blocks.fold(0.0, |acc, (((codes, values), block_sum), &scale)| {
                    exact_f32(dot(codes, values) - block_sum).mul_add(scale, acc)
                });
                // SAFETY: the caller promises that this thread alone has `rows`.
                unsafe { out.finish_sums(row..row + 1, &[sum], token_scale) };
            } else {
                let dot = blocks.map(|(codes, values)| dot(codes, values)).sum::<i32>();
                // SAFETY: the caller promises that this thread alone has `rows`.
                unsafe { out.finish_dots(row..row + 1, &[dot], token_scale, matrix.scale()) };
            }
        }
    }
}

/// Exact sum of codes times values.
fn dot(codes: &[Line], values: &[Line]) -> i32 {
    let products = |(codes, values): (&Line, &Line)| {
        let products =
            codes.0.iter().zip(&values.0).map(|(&code, &value)| i32::from(code) * i32::from(value));
        products.sum::<i32>()
    };
    codes.iter().zip(values).map(products).sum()
}
