//! Up to eight tokens: codes are unpacked in registers, and the values of the tokens stay in the L1 cache.
//!
//! Unpacking 16 rows first, as for more tokens, writes four times what is read and reads it from the L2 cache again. Here a
//! register of packed codes is unpacked once for all tokens, and multiplied with values from memory. Rows with
//! scales in every block are not here.

use std::ops::Range;

use super::*;

/// The most tokens.
pub(super) const FEW_MAX: usize = 8;

/// Bytes of values that a tile of rows is multiplied with before the next come: they and the codes fit the L1 cache.
const VALUE_BYTES: usize = 20 << 10;

/// Multiplies the rows of a job with the tokens of `acts`, which are `N`, `ROWS` rows at a time.
#[inline(always)]
pub(super) fn matmul<P: Products, const ROWS: usize, const N: usize>(
    products: P,
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
) {
    const { assert!(TILE_ROWS.is_multiple_of(ROWS) && QUAD <= TILE_ROWS && N <= FEW_MAX) };
    let values: [&[Line]; N] = std::array::from_fn(|token| acts.lines(token));
    let n_blocks = job.rows.n_blocks();
    let chunk = (VALUE_BYTES / (N * BLOCK_COLS)).next_multiple_of(2);
    for tile in (0..job.rows.n_rows()).step_by(TILE_ROWS) {
        let starts = job.rows.starts::<TILE_ROWS>(tile);
        let mut sums = [[zero(products); N]; TILE_ROWS];
        for first_block in (0..n_blocks).step_by(chunk) {
            let blocks = first_block..n_blocks.min(first_block + chunk);
            let rows = starts.as_chunks::<ROWS>().0.iter().zip(sums.as_chunks_mut::<ROWS>().0);
            for (starts, sums) in rows {
                add_rows(products, job.rows, starts, &values, blocks.clone(), sums);
            }
        }
        for (quad, sums) in sums.as_chunks::<QUAD>().0.iter().enumerate() {
            let first = tile + quad * QUAD;
            if first >= job.rows.n_rows() {
                break;
            }
            let [a, b, c, d] = sums;
            for token in 0..N {
                // SAFETY: `products` proves AVX2.
                let quad = unsafe { horizontal_sums(a[token], b[token], c[token], d[token]) };
                let mut dots = [0; QUAD];
                // SAFETY: 4 elements.
                unsafe { _mm_storeu_si128(dots.as_mut_ptr().cast(), quad) };
                // SAFETY: the caller promises that this thread alone has these rows.
                unsafe { job.finish_dots(first, &dots, TokenScale::of(acts, token)) };
            }
        }
    }
}

/// Adds the products of some blocks of `ROWS` rows, which start there, to their sums of 32 bits.
#[inline(always)]
fn add_rows<P: Products, const ROWS: usize, const N: usize>(
    products: P,
    rows: PackedRows<'_>,
    starts: &[*const u8; ROWS],
    values: &[&[Line]; N],
    blocks: Range<usize>,
    sums: &mut [[__m256i; N]; ROWS],
) {
    assert!(blocks.end <= rows.n_blocks(), "{blocks:?}");
    for values in values {
        assert!(values.len() >= blocks.end * BLOCK_LINES, "{} lines of values", values.len());
    }
    // The same blocks of the next tile.
    let ahead = TILE_ROWS * rows.row_bytes();
    for narrow_start in blocks.clone().step_by(P::NARROW_BLOCKS) {
        let narrow_end = blocks.end.min(narrow_start.saturating_add(P::NARROW_BLOCKS));
        let mut narrow = [[zero(products); N]; ROWS];
        for block in narrow_start..narrow_end {
            for start in starts {
                let upcoming = start.wrapping_add(ahead + block * rows.block_bytes());
                // SAFETY: a prefetch has no effect but on caches, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(upcoming.cast()) };
            }
            for half in 0..if block < rows.n_full() { 2 } else { 1 } {
                let offset = block * rows.block_bytes() + 32 * half;
                // SAFETY: a whole block has 64 bytes, half a one 32 (`PackedRows`).
                let packed = starts.map(|start| unsafe { load_packed(start, offset) });
                for place in 0..BLOCK_LINES {
                    let line = block * BLOCK_LINES + group_at::<false>(place);
                    for row in 0..ROWS {
                        // SAFETY: `products` proves AVX2.
                        let codes = unsafe { codes_at(packed[row], place) };
                        for token in 0..N {
                            // SAFETY: there are four lines for each block (asserted above).
                            let values = unsafe { load_half_line(values[token], line, half) };
                            narrow[row][token] = products.add(narrow[row][token], codes, values);
                        }
                    }
                }
            }
        }
        for (sums, narrow) in sums.iter_mut().zip(narrow) {
            for (sum, narrow) in sums.iter_mut().zip(narrow) {
                *sum = products.widen(*sum, narrow);
            }
        }
    }
}
