//! One token, one scale: rows from four places are read side by side.
//!
//! A core fetches more at a time from several sequences of lines than from one, and by itself: on Zen 3 a thread reads 14 to 17 GB/s
//! of one and 22 to 25 of four, in small pages as well. Rows with scales in every block are not here.

use super::*;

/// Rows whose sums are finished together; the four places are a quarter of them apart.
const SEGMENT_ROWS: usize = 128;

/// Multiplies the rows of a job with the only token of `acts`.
#[inline(always)]
pub(super) fn matmul<P: Products>(products: P, job: &RowsJob<'_>, acts: &QuantizedRows) {
    let (rows, values, token) = (job.rows, acts.lines(0), TokenScale::of(acts, 0));
    for segment in (0..rows.n_rows()).step_by(SEGMENT_ROWS) {
        let n = SEGMENT_ROWS.min(rows.n_rows() - segment);
        let apart = n.div_ceil(QUAD);
        let mut dots = [0; SEGMENT_ROWS];
        for row in 0..apart {
            let starts = std::array::from_fn(|place| rows.start(segment + place * apart + row));
            let [a, b, c, d] = sums(products, rows, &starts, values);
            // SAFETY: `products` proves AVX2.
            let sums = unsafe { horizontal_sums(a, b, c, d) };
            let mut quad = [0; QUAD];
            // SAFETY: 4 elements.
            unsafe { _mm_storeu_si128(quad.as_mut_ptr().cast(), sums) };
            // Past the last row there are sums of that again.
            for (dot, sum) in dots[row..].iter_mut().step_by(apart).zip(quad) {
                *dot = sum;
            }
        }
        for (tile, dots) in
            dots[..n.next_multiple_of(TILE_ROWS)].as_chunks::<TILE_ROWS>().0.iter().enumerate()
        {
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { job.finish_dots(segment + tile * TILE_ROWS, dots, token) };
        }
    }
}

/// Sums of the four rows that start there.
#[inline(always)]
fn sums<P: Products>(
    products: P,
    rows: PackedRows<'_>,
    starts: &[*const u8; QUAD],
    values: &[Line],
) -> [__m256i; QUAD] {
    assert!(values.len() >= rows.n_blocks() * BLOCK_LINES, "{} lines", values.len());
    let mut wide = [zero(products); QUAD];
    for narrow_start in (0..rows.n_blocks()).step_by(P::NARROW_BLOCKS) {
        let mut narrow = [zero(products); QUAD];
        for block in narrow_start..rows.n_blocks().min(narrow_start.saturating_add(P::NARROW_BLOCKS)) {
            for half in 0..if block < rows.n_full() { 2 } else { 1 } {
                let offset = block * rows.block_bytes() + 32 * half;
                for (start, narrow) in starts.iter().zip(&mut narrow) {
                    // SAFETY: a whole block has 64 bytes, half a one 32 (`PackedRows`).
                    let packed = unsafe { load_packed(*start, offset) };
                    for place in 0..BLOCK_LINES {
                        let line = block * BLOCK_LINES + group_at::<false>(place);
                        // SAFETY: there are four lines for each block (asserted above).
                        let values = unsafe { load_half_line(values, line, half) };
                        // SAFETY: `products` proves AVX2.
                        let codes = unsafe { codes_at(packed, place) };
                        *narrow = products.add(*narrow, codes, values);
                    }
                }
            }
        }
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            *wide = products.widen(*wide, narrow);
        }
    }
    wide
}
