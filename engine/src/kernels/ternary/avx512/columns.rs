//! One token times the columns whose activations are not zero.
//!
//! Four columns are interleaved byte by byte, so that a lane of a register has the codes of four columns and one row: what one
//! instruction adds up. Codes are not shifted into place, as in the parent module.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::columns::{LINE_BYTES, LINE_ROWS};
use super::super::quantized_rows::{GROUP_COLS, QuantizedRows};
use super::super::sparse::{CHUNK, ColumnsJob, NonZero, column_at};
use super::masks;

/// Registers of sums of a line: 16 rows each.
const LINE_SUMS: usize = LINE_ROWS / 16;

/// Fours of columns that a line is multiplied with before the next line comes: their bytes stay in the L1 cache, and while
/// they are multiplied as many are fetched. Measured: with 8 a thread reads three quarters as fast, with 32 no faster.
const BATCH: usize = 16;

/// Lines that are multiplied side by side: a column is read in pieces of as many.
pub(in super::super) const LINES_MAX: usize = 5;

/// Multiplies some lines of rows. Only this thread may have them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(in super::super) fn matmul(job: &ColumnsJob<'_>, nonzero: &NonZero, lines: Range<usize>) {
    let (columns, values) = nonzero.fours();
    for first in lines.clone().step_by(LINES_MAX) {
        let lines = first..lines.end.min(first + LINES_MAX);
        let mut sums = [[_mm512_setzero_si512(); LINE_SUMS]; LINES_MAX];
        for batch in (0..columns.len()).step_by(BATCH) {
            for (line, sums) in lines.clone().zip(&mut sums) {
                add_batch(job, line, (&columns[batch..], &values[batch..]), sums);
            }
        }
        for (line, sums) in lines.zip(&sums) {
            let dots = finished(sums);
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { job.finish_line(line, &dots) };
        }
    }
}

/// Finds the columns of the only row of `acts` that are not zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(in super::super) fn find(acts: &QuantizedRows, nonzero: &mut NonZero) {
    nonzero.clear(acts);
    let count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (line, bytes) in acts.lines(0).iter().enumerate() {
        for (i, bytes) in bytes.0.as_chunks::<CHUNK>().0.iter().enumerate() {
            const { assert!(GROUP_COLS.is_multiple_of(CHUNK), "columns of a chunk follow each other") };
            // SAFETY: reads the 16 bytes of `bytes`.
            let values = _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
            let first = _mm512_set1_epi32(column_at(line, CHUNK * i).cast_signed());
            let mask = _mm512_test_epi32_mask(values, values);
            let columns = _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(first, count));
            let values = _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(mask, values));
            nonzero.push(mask.count_ones() as usize, |column_places, value_places| {
                // SAFETY: 16 places of 4 bytes.
                unsafe { _mm512_storeu_si512(column_places.as_mut_ptr().cast(), columns) };
                // SAFETY: 16 bytes.
                unsafe { _mm_storeu_si128(value_places.as_mut_ptr().cast(), values) };
            });
        }
    }
    nonzero.finish();
}

/// Adds the products of a line with some columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_batch(
    job: &ColumnsJob<'_>,
    line: usize,
    (columns, values): (&[[u32; 4]], &[[u8; 4]]),
    sums: &mut [__m512i; LINE_SUMS],
) {
    let masks = masks();
    let mut own = *sums;
    let column_bytes = job.matrix.column_bytes();
    let upcoming = columns.get(BATCH..).unwrap_or_default();
    let bytes = job.matrix.bytes();
    let offset = |column: u32| column as usize * column_bytes + line * LINE_BYTES;
    let fours = columns.iter().zip(values).take(BATCH);
    for (i, (columns, values)) in fours.enumerate() {
        if let Some(upcoming) = upcoming.get(i) {
            for column in upcoming {
                _mm_prefetch::<_MM_HINT_T1>(bytes.as_ptr().wrapping_add(offset(*column)).cast());
            }
        }
        let [a, b, c, d] = *columns;
        let (a, b) = (load(bytes, offset(a)), load(bytes, offset(b)));
        let (c, d) = (load(bytes, offset(c)), load(bytes, offset(d)));
        let (ab_low, ab_high) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d));
        let packed = [
            _mm512_unpacklo_epi16(ab_low, cd_low),
            _mm512_unpackhi_epi16(ab_low, cd_low),
            _mm512_unpacklo_epi16(ab_high, cd_high),
            _mm512_unpackhi_epi16(ab_high, cd_high),
        ];
        let values = _mm512_set1_epi32(i32::from_le_bytes(*values));
        for q in 0..4 {
            for d in 0..4 {
                let codes = _mm512_and_si512(packed[q], masks[d]);
                own[4 * d + q] = _mm512_dpbusd_epi32(own[4 * d + q], codes, values);
            }
        }
    }
    *sums = own;
}

/// Divides the powers of 4 out of the sums of unshifted codes (each is a multiple).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn finished(sums: &[__m512i; LINE_SUMS]) -> [i32; LINE_ROWS] {
    let mut dots = [0; LINE_ROWS];
    for (i, (sum, dots)) in sums.iter().zip(dots.as_chunks_mut::<16>().0).enumerate() {
        let shift = _mm_cvtsi32_si128([0, 2, 4, 6][i / 4]);
        let shifted = _mm512_sra_epi32(*sum, shift);
        // SAFETY: 16 elements of 4 bytes.
        unsafe { _mm512_storeu_si512(dots.as_mut_ptr().cast(), shifted) };
    }
    dots
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8], offset: usize) -> __m512i {
    let line: &[u8; LINE_BYTES] = bytes[offset..].first_chunk().unwrap_or(const { &[0; LINE_BYTES] });
    // SAFETY: reads the 64 bytes of `line`.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}
