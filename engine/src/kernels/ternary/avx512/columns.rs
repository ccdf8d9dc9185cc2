//! One token times the columns whose activations are not zero.
//!
//! Four columns are interleaved byte by byte, so that a lane of a register has the codes of four columns and one row: what one
//! instruction adds up. Codes are not shifted into place, as in the parent module.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::columns::{LINE_BYTES, LINE_ROWS};
use super::super::sparse::ColumnsJob;
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
pub(in super::super) fn matmul(job: &ColumnsJob<'_>, lines: Range<usize>) {
    for first in lines.clone().step_by(LINES_MAX) {
        let lines = first..lines.end.min(first + LINES_MAX);
        let mut sums = [[_mm512_setzero_si512(); LINE_SUMS]; LINES_MAX];
        for batch in (0..job.nonzero.columns.len()).step_by(BATCH) {
            for (line, sums) in lines.clone().zip(&mut sums) {
                add_batch(job, line, batch, sums);
            }
        }
        for (line, sums) in lines.zip(&sums) {
            let dots = finished(sums);
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { job.finish_line(line, &dots) };
        }
    }
}

/// Adds the products of a line with some columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_batch(job: &ColumnsJob<'_>, line: usize, first: usize, sums: &mut [__m512i; LINE_SUMS]) {
    let masks = masks();
    let mut own = *sums;
    let column_bytes = job.matrix.column_bytes();
    let columns = &job.nonzero.columns[first..];
    let upcoming = columns.get(BATCH..).unwrap_or_default();
    let bytes = job.matrix.bytes();
    let offset = |column: u32| column as usize * column_bytes + line * LINE_BYTES;
    let fours = columns.iter().zip(&job.nonzero.values[first..]).take(BATCH);
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
