//! AVX2: products of codes and values are added in pairs to 16 bits, and widened before they could overflow.
//!
//! Four rows at a time. One token is multiplied with codes straight out of memory; for more, 16 rows are
//! unpacked once, and two tokens share every load of codes.

#![expect(unsafe_code, reason = "pointer loads, and rows of an output that threads share")]

use std::arch::x86_64::*;
use std::ops::Range;

use super::packed::{PackedRows, RowsJob};
use super::quantized_rows::{BLOCK_LINES, Line};
use super::{QuantizedRows, TILE_ROWS, TokenScale};

/// Tokens that share a load of codes.
const TOKENS_MAX: usize = 2;

/// Rows that share a load of values.
const QUAD: usize = 4;

/// Blocks of 256 columns that are added up in 16 bits: each adds 8 pairs of at most `2 * 3 * 128`.
const NARROW_BLOCKS: usize = 4;

const _: () = assert!(NARROW_BLOCKS * 8 * 2 * 3 * 128 <= i16::MAX as usize);

/// How far ahead weights are fetched into the L2 cache: see the AVX-512 path.
const PREFETCH_BYTES: usize = 10 << 10;

/// Where the codes of a tile of rows come from.
#[derive(Clone, Copy)]
enum Codes<'a> {
    /// The packed rows from this one.
    Packed(PackedRows<'a>, usize),
    /// Unpacked: `(16, n_blocks, 4)` lines.
    Unpacked(&'a [Line]),
}

/// Multiplies the rows of a job. Only this thread may have them.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul<const REVERSED: bool>(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    unpacked: &mut Vec<Line>,
) {
    let tile_lines = TILE_ROWS * job.rows.n_blocks() * BLOCK_LINES;
    if unpacked.len() < tile_lines {
        unpacked.resize(tile_lines, Line([0; 64]));
    }
    let unpacked = &mut unpacked[..tile_lines];
    for tile in (0..job.rows.n_rows()).step_by(TILE_ROWS) {
        if acts.n_rows() == 1 {
            tokens::<REVERSED, 1>(job, acts, 0, tile, Codes::Packed(job.rows, tile));
            continue;
        }
        unpack::<REVERSED>(job.rows, tile, unpacked);
        for token in (0..acts.n_rows()).step_by(TOKENS_MAX) {
            if token + TOKENS_MAX <= acts.n_rows() {
                tokens::<REVERSED, TOKENS_MAX>(job, acts, token, tile, Codes::Unpacked(unpacked));
            } else {
                tokens::<REVERSED, 1>(job, acts, token, tile, Codes::Unpacked(unpacked));
            }
        }
    }
}

/// Multiplies a tile of rows with `N` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
fn tokens<const REVERSED: bool, const N: usize>(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    first_token: usize,
    tile: usize,
    codes: Codes<'_>,
) {
    let values: [&[Line]; N] = std::array::from_fn(|token| acts.lines(first_token + token));
    let n_blocks = job.rows.n_blocks();
    let mut dots = [[0; TILE_ROWS]; N];
    let mut sums = [[0.0; TILE_ROWS]; N];
    for first in (0..TILE_ROWS).step_by(QUAD) {
        if !job.has_block_scales() {
            let quad = quad::<REVERSED, N>(codes, first, &values, 0..n_blocks);
            for (quad, dots) in quad.into_iter().zip(&mut dots) {
                // SAFETY: 4 elements from `first`.
                unsafe { _mm_storeu_si128(dots[first..first + QUAD].as_mut_ptr().cast(), quad) };
            }
            continue;
        }
        let mut acc = [_mm_setzero_ps(); N];
        for block in 0..n_blocks {
            let quad = quad::<REVERSED, N>(codes, first, &values, block..block + 1);
            let scales = job.block_scales::<QUAD>(tile + first, block);
            // SAFETY: 4 elements of 2 bytes.
            let scales = _mm_cvtph_ps(unsafe { _mm_loadl_epi64(scales.as_ptr().cast()) });
            for (token, (acc, dots)) in acc.iter_mut().zip(quad).enumerate() {
                let block_sum = _mm_set1_epi32(acts.block_sums(first_token + token)[block]);
                *acc = _mm_fmadd_ps(_mm_cvtepi32_ps(_mm_sub_epi32(dots, block_sum)), scales, *acc);
            }
        }
        for (acc, sums) in acc.into_iter().zip(&mut sums) {
            // SAFETY: 4 elements from `first`.
            unsafe { _mm_storeu_ps(sums[first..first + QUAD].as_mut_ptr(), acc) };
        }
    }
    for (token, (dots, sums)) in dots.iter().zip(&sums).enumerate() {
        let scale = TokenScale::of(acts, first_token + token);
        if job.has_block_scales() {
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { job.finish_sums(tile, sums, scale) };
        } else {
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { job.finish_dots(tile, dots, scale) };
        }
    }
}

/// Sums of four rows from row `first` of the tile times `N` tokens over some blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad<const REVERSED: bool, const N: usize>(
    codes: Codes<'_>,
    first: usize,
    values: &[&[Line]; N],
    blocks: Range<usize>,
) -> [__m128i; N] {
    let sums = match codes {
        Codes::Packed(rows, tile) => [packed_sums::<REVERSED>(rows, tile + first, values[0], blocks); N],
        Codes::Unpacked(lines) => unpacked_sums::<N>(lines, first, values, blocks),
    };
    sums.map(|[a, b, c, d]| horizontal_sums(a, b, c, d))
}

/// One token, straight from the packed rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn packed_sums<const REVERSED: bool>(
    rows: PackedRows<'_>,
    first: usize,
    values: &[Line],
    blocks: Range<usize>,
) -> [__m256i; QUAD] {
    assert!(blocks.end <= rows.n_blocks() && values.len() >= blocks.end * BLOCK_LINES, "{blocks:?}");
    let starts = rows.starts::<QUAD>(first);
    let mut upcoming = starts[0].wrapping_add(PREFETCH_BYTES + QUAD * blocks.start * rows.block_bytes());
    let mut wide = [_mm256_setzero_si256(); QUAD];
    for narrow_start in blocks.clone().step_by(NARROW_BLOCKS) {
        let mut narrow = [_mm256_setzero_si256(); QUAD];
        for block in narrow_start..blocks.end.min(narrow_start + NARROW_BLOCKS) {
            for _ in 0..QUAD {
                _mm_prefetch::<_MM_HINT_T1>(upcoming.cast());
                upcoming = upcoming.wrapping_add(64);
            }
            let halves = if block < rows.n_full() { 2 } else { 1 };
            for half in 0..halves {
                let offset = block * rows.block_bytes() + 32 * half;
                for (start, narrow) in starts.iter().zip(&mut narrow) {
                    // SAFETY: a whole block has 64 bytes, half a one 32 (`PackedRows`).
                    let packed = unsafe { load_packed(*start, offset) };
                    for place in 0..BLOCK_LINES {
                        let line = block * BLOCK_LINES + group_at::<REVERSED>(place);
                        // SAFETY: there are four lines for each block (asserted above).
                        let values = unsafe { load_half_line(values, line, half) };
                        let pairs = _mm256_maddubs_epi16(codes_at(packed, place), values);
                        *narrow = _mm256_add_epi16(*narrow, pairs);
                    }
                }
            }
        }
        widen(&mut wide, narrow);
    }
    wide
}

/// `N` tokens, from unpacked rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn unpacked_sums<const N: usize>(
    lines: &[Line],
    first: usize,
    values: &[&[Line]; N],
    blocks: Range<usize>,
) -> [[__m256i; QUAD]; N] {
    let row_lines = lines.len() / TILE_ROWS;
    assert!(first + QUAD <= TILE_ROWS && blocks.end * BLOCK_LINES <= row_lines, "{blocks:?}");
    for values in values {
        assert!(values.len() >= blocks.end * BLOCK_LINES, "{} lines of values", values.len());
    }
    let mut wide = [[_mm256_setzero_si256(); QUAD]; N];
    for narrow_start in blocks.clone().step_by(NARROW_BLOCKS) {
        let narrow_end = blocks.end.min(narrow_start + NARROW_BLOCKS);
        let mut narrow = [[_mm256_setzero_si256(); QUAD]; N];
        for half_line in narrow_start * BLOCK_LINES * 2..narrow_end * BLOCK_LINES * 2 {
            let (line, half) = (half_line / 2, half_line % 2);
            let mut token_values = [_mm256_setzero_si256(); N];
            for (loaded, values) in token_values.iter_mut().zip(values) {
                // SAFETY: there are four lines for each block (asserted above).
                *loaded = unsafe { load_half_line(values, line, half) };
            }
            for row in 0..QUAD {
                // SAFETY: `first + row` is below 16 and `line` below `row_lines` (asserted above).
                let codes = unsafe { load_half_line(lines, (first + row) * row_lines + line, half) };
                for (narrow, values) in narrow.iter_mut().zip(token_values) {
                    narrow[row] = _mm256_add_epi16(narrow[row], _mm256_maddubs_epi16(codes, values));
                }
            }
        }
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            widen(wide, narrow);
        }
    }
    wide
}

/// Unpacks 16 rows from `first`, in the order of the values. Past the last row it repeats that.
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<const REVERSED: bool>(rows: PackedRows<'_>, first: usize, unpacked: &mut [Line]) {
    let starts = rows.starts::<TILE_ROWS>(first);
    let lines = unpacked.chunks_exact_mut(rows.n_blocks() * BLOCK_LINES);
    for (start, lines) in starts.into_iter().zip(lines) {
        for (block, lines) in lines.chunks_exact_mut(BLOCK_LINES).enumerate() {
            for half in 0..2 {
                let offset = block * rows.block_bytes() + 32 * half;
                let packed = if block < rows.n_full() || half == 0 {
                    // SAFETY: a whole block has 64 bytes, half a one 32 (`PackedRows`).
                    unsafe { load_packed(start, offset) }
                } else {
                    _mm256_setzero_si256()
                };
                for place in 0..BLOCK_LINES {
                    let codes = &mut lines[group_at::<REVERSED>(place)].0[32 * half..32 * half + 32];
                    let unpacked = codes_at(packed, place);
                    // SAFETY: 32 elements.
                    unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), unpacked) };
                }
            }
        }
    }
}

/// Which group of columns lies in bits `2*place` and `2*place + 1`.
#[inline(always)]
fn group_at<const REVERSED: bool>(place: usize) -> usize {
    if REVERSED { place } else { 3 - place }
}

/// The codes in bits `2*place` and `2*place + 1`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn codes_at(packed: __m256i, place: usize) -> __m256i {
    let shifted = match place {
        0 => packed,
        1 => _mm256_srli_epi16::<2>(packed),
        2 => _mm256_srli_epi16::<4>(packed),
        _ => _mm256_srli_epi16::<6>(packed),
    };
    _mm256_and_si256(shifted, _mm256_set1_epi8(3))
}

/// Adds sums of 16 bits to those of 32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen(wide: &mut [__m256i; QUAD], narrow: [__m256i; QUAD]) {
    for (wide, narrow) in wide.iter_mut().zip(narrow) {
        *wide = _mm256_add_epi32(*wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    }
}

/// The sum of the 8 lanes of each register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn horizontal_sums(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> __m128i {
    let sums = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums))
}

/// Half a line: 32 values, or 32 codes.
///
/// # Safety
/// `lines` has the line, and `half` is 0 or 1.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_half_line(lines: &[Line], line: usize, half: usize) -> __m256i {
    // SAFETY: the caller promises `line < lines.len()`.
    let line = unsafe { lines.get_unchecked(line) };
    // SAFETY: a `Line` is two aligned halves of 32 bytes.
    unsafe { _mm256_load_si256(line.0.as_ptr().wrapping_add(32 * half).cast()) }
}

/// 32 bytes of codes.
///
/// # Safety
/// They lie `offset` bytes behind `start`, in the same allocation.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_packed(start: *const u8, offset: usize) -> __m256i {
    // SAFETY: the caller promises that 32 bytes lie there.
    unsafe { _mm256_loadu_si256(start.wrapping_add(offset).cast()) }
}
