//! AVX-512 with VNNI: 64 products of a code and a value in one instruction.
//!
//! Three kernels, by the number of tokens:
//! * one: every byte of weights is used once, so that reading it is all that counts. The codes are not even
//!   shifted into place: each group has its own accumulator, and its power of 4 is divided out at the end.
//! * up to [`DIRECT_TOKENS_MAX`]: unpacked in registers and multiplied with all tokens at once.
//! * more: [`panel`].
//!
//! With a scale in every block only the first (then block by block) and the last are used.

#![expect(unsafe_code, reason = "pointer loads, and rows of an output that threads share")]

use std::arch::x86_64::*;
use std::ops::Range;

use super::packed::{PackedRows, RowsJob};
use super::quantized_rows::{BLOCK_COLS, BLOCK_LINES, Line};
use super::{QuantizedRows, Store, TILE_ROWS, TokenScale};
use crate::kernels::x86_avx512::horizontal_sums;

pub(super) mod columns; // One token, the columns that are not zero.
pub(super) mod lookup; // Up to eight tokens, by tables.
pub(super) mod mixed; // Many tokens, by both at once.
mod panel; // Many tokens: 32 rows unpacked and transposed.

/// Up to so many tokens no panel is made.
const DIRECT_TOKENS_MAX: usize = super::FEW_TOKENS;

/// Bytes of values that a tile of rows is multiplied with before the columns beyond: they stay in the L1 cache.
const SLICE_BYTES: usize = 24 << 10;

/// Multiplies the rows of a job. Only this thread may have them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn matmul<const REVERSED: bool>(job: &RowsJob<'_>, acts: &QuantizedRows, panel: &mut Vec<Line>) {
    match (acts.n_rows(), job.has_block_scales()) {
        (1, false) => gemv::<REVERSED>(job, acts),
        (1, true) => gemv_blocks::<REVERSED>(job, acts),
        (2..=DIRECT_TOKENS_MAX, false) => direct_any::<REVERSED>(job, acts),
        _ => panel::matmul::<REVERSED>(job, acts, panel),
    }
}

/// One token, one scale.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn gemv<const REVERSED: bool>(job: &RowsJob<'_>, acts: &QuantizedRows) {
    let values = acts.lines(0);
    let token = TokenScale::of(acts, 0);
    for tile in (0..job.rows.n_rows()).step_by(TILE_ROWS) {
        let mut dots = [0; TILE_ROWS];
        for (quad, dots) in dots.chunks_exact_mut(4).enumerate() {
            dots.copy_from_slice(&gemv_quad::<REVERSED>(job.rows, tile + 4 * quad, values));
        }
        // SAFETY: the caller promises that this thread alone has these rows.
        unsafe { job.finish_dots(tile, &dots, token) };
    }
}

/// Sums of four rows, from `first`, times one token.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn gemv_quad<const REVERSED: bool>(rows: PackedRows<'_>, first: usize, values: &[Line]) -> [i32; 4] {
    assert!(values.len() >= rows.n_blocks() * BLOCK_LINES, "{} lines", values.len());
    let starts = rows.starts::<4>(first);
    let masks = masks();
    let mut sums = [[_mm512_setzero_si512(); BLOCK_LINES]; 4];
    let mut upcoming = Upcoming::after(starts[0]);
    for block in 0..rows.n_full() {
        let offset = block * rows.block_bytes();
        // SAFETY: there are four lines for each block (asserted above).
        let values = unsafe { lines_of_block(values, block) };
        upcoming.prefetch(4);
        for (start, sums) in starts.iter().zip(&mut sums) {
            // SAFETY: `block < n_full`, so that 64 bytes lie there (`PackedRows`).
            let packed = unsafe { load_packed(*start, offset) };
            for (place, sum) in sums.iter_mut().enumerate() {
                let codes = _mm512_and_si512(packed, masks[place]);
                *sum = _mm512_dpbusd_epi32(*sum, codes, values[group_at::<REVERSED>(place)]);
            }
        }
    }
    if rows.has_half() {
        let offset = rows.n_full() * rows.block_bytes();
        // SAFETY: there are four lines for each block, also for the half one (asserted above).
        let values = unsafe { lines_of_block(values, rows.n_full()) };
        for (start, sums) in starts.iter().zip(&mut sums) {
            // SAFETY: 32 bytes lie behind the last whole block (`PackedRows`).
            let packed = unsafe { load_half(*start, offset) };
            for (place, sum) in sums.iter_mut().enumerate() {
                let codes = _mm512_and_si512(packed, masks[place]);
                *sum = _mm512_dpbusd_epi32(*sum, codes, values[group_at::<REVERSED>(place)]);
            }
        }
    }
    let [a, b, c, d] = sums;
    horizontal_sums(combined(a), combined(b), combined(c), combined(d))
}

/// One token, a scale in every block of 256 columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn gemv_blocks<const REVERSED: bool>(job: &RowsJob<'_>, acts: &QuantizedRows) {
    let rows = job.rows;
    let values = acts.lines(0);
    let block_sums = acts.block_sums(0);
    assert!(job.has_block_scales() && !rows.has_half(), "scales in whole blocks");
    assert!(values.len() >= rows.n_full() * BLOCK_LINES, "{} lines", values.len());
    let token = TokenScale::of(acts, 0);
    for tile in (0..rows.n_rows()).step_by(TILE_ROWS) {
        let starts = rows.starts::<TILE_ROWS>(tile);
        // The whole tile is needed from the start on: run ahead of it.
        let mut upcoming = Upcoming::after(starts[0].wrapping_add(TILE_ROWS * rows.row_bytes()));
        let mut acc = _mm512_setzero_ps();
        for (block, &block_sum) in block_sums[..rows.n_full()].iter().enumerate() {
            let offset = block * rows.block_bytes();
            // SAFETY: there are four lines for each block (asserted above).
            let values = unsafe { lines_of_block(values, block) };
            // Rows are 66 bytes apart for each block: the last lines of a tile are left to the CPU.
            upcoming.prefetch(TILE_ROWS);
            let mut quads = [[0; 4]; TILE_ROWS / 4];
            for (starts, quad) in starts.chunks_exact(4).zip(&mut quads) {
                let mut rows_sums = [_mm512_setzero_si512(); 4];
                for (start, row_sum) in starts.iter().zip(&mut rows_sums) {
                    // SAFETY: `block < n_full`, so that 64 bytes lie there (`PackedRows`).
                    let packed = unsafe { load_packed(*start, offset) };
                    for place in 0..BLOCK_LINES {
                        let codes = codes_at(packed, place);
                        *row_sum = _mm512_dpbusd_epi32(*row_sum, codes, values[group_at::<REVERSED>(place)]);
                    }
                }
                let [a, b, c, d] = rows_sums;
                *quad = horizontal_sums(a, b, c, d);
            }
            // SAFETY: 16 elements of 4 bytes.
            let dots = unsafe { _mm512_loadu_si512(quads.as_ptr().cast()) };
            // SAFETY: the rows have `n_full` blocks, each with a scale, as `has_block_scales` says.
            let scales = unsafe { job.block_scales(&starts, block) };
            acc = add_block(acc, dots, _mm512_set1_epi32(block_sum), f32_of(&scales));
        }
        let mut sums = [0.0; TILE_ROWS];
        // SAFETY: `sums` has 16 elements.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
        // SAFETY: the caller promises that this thread alone has these rows.
        unsafe { job.finish_sums(tile, &sums, token) };
    }
}

/// A few tokens, one scale: the number of tokens becomes a constant, so that the sums stay in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn direct_any<const REVERSED: bool>(job: &RowsJob<'_>, acts: &QuantizedRows) {
    match acts.n_rows() {
        2 => direct::<REVERSED, 2, 4>(job, acts),
        3 => direct::<REVERSED, 3, 4>(job, acts),
        4 => direct::<REVERSED, 4, 4>(job, acts),
        5 => direct::<REVERSED, 5, 4>(job, acts),
        6 => direct::<REVERSED, 6, 4>(job, acts),
        7 => direct::<REVERSED, 7, 2>(job, acts),
        _ => direct::<REVERSED, 8, 2>(job, acts),
    }
}

/// `N` tokens and `R` rows at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn direct<const REVERSED: bool, const N: usize, const R: usize>(job: &RowsJob<'_>, acts: &QuantizedRows) {
    let rows = job.rows;
    let values: [&[Line]; N] = std::array::from_fn(|token| acts.lines(token));
    let n_slices = (rows.n_blocks() * N * BLOCK_COLS).div_ceil(SLICE_BYTES);
    for tile in (0..rows.n_rows()).step_by(TILE_ROWS) {
        let mut dots = [[0; TILE_ROWS]; N];
        for slice in 0..n_slices {
            let blocks = slice * rows.n_blocks() / n_slices..(slice + 1) * rows.n_blocks() / n_slices;
            for first in (0..TILE_ROWS).step_by(R) {
                let sums = direct_sums::<REVERSED, N, R>(rows, tile + first, &values, blocks.clone());
                add_horizontal_sums(&sums, &mut dots, first);
            }
        }
        for (token, dots) in dots.iter().enumerate() {
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { job.finish_dots(tile, dots, TokenScale::of(acts, token)) };
        }
    }
}

/// Adds the sum of the lanes of each register to its place, that of a token and of a row from `first`: four registers at a time,
/// of one token or of two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_horizontal_sums<const R: usize, const N: usize>(
    sums: &[[__m512i; R]; N],
    dots: &mut [[i32; TILE_ROWS]; N],
    first: usize,
) {
    for (four, tokens) in sums.as_flattened().chunks(4).zip(dots.chunks_mut(4 / R)) {
        let mut registers = [_mm512_setzero_si512(); 4];
        registers[..four.len()].copy_from_slice(four);
        let [a, b, c, d] = registers;
        let four = horizontal_sums(a, b, c, d);
        for (dots, sums) in tokens.iter_mut().zip(four.chunks_exact(R)) {
            dots[first..first + R].iter_mut().zip(sums).for_each(|(dot, sum)| *dot += sum);
        }
    }
}

/// Sums, not yet horizontal, of `R` rows from `first` times `N` tokens over some blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn direct_sums<const REVERSED: bool, const N: usize, const R: usize>(
    rows: PackedRows<'_>,
    first: usize,
    values: &[&[Line]; N],
    blocks: Range<usize>,
) -> [[__m512i; R]; N] {
    assert!(blocks.end <= rows.n_blocks(), "blocks {blocks:?} of {}", rows.n_blocks());
    for values in values {
        assert!(values.len() >= rows.n_blocks() * BLOCK_LINES, "{} lines", values.len());
    }
    let starts = rows.starts::<R>(first);
    let mut sums = [[_mm512_setzero_si512(); R]; N];
    for block in blocks {
        let offset = block * rows.block_bytes();
        for start in starts {
            // The same rows of the next tile.
            _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(offset + TILE_ROWS * rows.row_bytes()).cast());
        }
        // Plain loops and no closures: those are not inlined in every build, and each call would spill.
        let mut packed = [_mm512_setzero_si512(); R];
        for (packed, start) in packed.iter_mut().zip(starts) {
            *packed = if block < rows.n_full() {
                // SAFETY: `block < n_full`, so that 64 bytes lie there (`PackedRows`).
                unsafe { load_packed(start, offset) }
            } else {
                // SAFETY: 32 bytes lie behind the last whole block (`PackedRows`).
                unsafe { load_half(start, offset) }
            };
        }
        for place in 0..BLOCK_LINES {
            let mut codes = packed;
            for codes in &mut codes {
                *codes = codes_at(*codes, place);
            }
            let line = block * BLOCK_LINES + group_at::<REVERSED>(place);
            for (values, sums) in values.iter().zip(&mut sums) {
                // SAFETY: there are four lines for each block (asserted above).
                let values = unsafe { load_line(values, line) };
                for (sum, codes) in sums.iter_mut().zip(codes) {
                    *sum = _mm512_dpbusd_epi32(*sum, codes, values);
                }
            }
        }
    }
    sums
}

/// How far ahead weights are fetched into the L2 cache. Measured: with less, or into L1, the rows of a tile,
/// which are read side by side, reach half of the bandwidth that one sequence reaches.
const PREFETCH_BYTES: usize = 10 << 10;

/// The weights to come, which lie in one sequence however the rows at hand are read.
struct Upcoming(*const u8);

impl Upcoming {
    fn after(start: *const u8) -> Self {
        Self(start.wrapping_add(PREFETCH_BYTES))
    }

    /// Starts fetching the next `n_lines` lines. Past the end of the matrix this does nothing.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn prefetch(&mut self, n_lines: usize) {
        for _ in 0..n_lines {
            _mm_prefetch::<_MM_HINT_T1>(self.0.cast());
            self.0 = self.0.wrapping_add(64);
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn codes_at(packed: __m512i, place: usize) -> __m512i {
    let shifted = match place {
        0 => packed,
        1 => _mm512_srli_epi16::<2>(packed),
        2 => _mm512_srli_epi16::<4>(packed),
        _ => _mm512_srli_epi16::<6>(packed),
    };
    _mm512_and_si512(shifted, _mm512_set1_epi8(3))
}

/// For each place, the bits of its codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn masks() -> [__m512i; BLOCK_LINES] {
    // Written out: a closure that is not inlined costs more than all it does, here and in the loops that use it.
    [_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30), _mm512_set1_epi8(-0x40)]
}

/// Divides the powers of 4 out of the sums of unshifted codes (each is a multiple) and adds them up.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn combined(sums: [__m512i; BLOCK_LINES]) -> __m512i {
    let low = _mm512_add_epi32(sums[0], _mm512_srai_epi32::<2>(sums[1]));
    let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(sums[2]), _mm512_srai_epi32::<6>(sums[3]));
    _mm512_add_epi32(low, high)
}

/// [`RowsJob::finish_dots`] for dots that are in a register: the same operations on sixteen rows at once.
///
/// # Safety
/// No other thread uses these rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn finish_dots(job: &RowsJob<'_>, first: usize, dots: __m512i, token: TokenScale) {
    // SAFETY: the caller's promise; the tile is dropped before this function returns.
    let out = unsafe { job.tile(first, token) };
    let exists = u16::MAX >> (TILE_ROWS - out.len().min(TILE_ROWS));
    let centred = _mm512_sub_ps(_mm512_cvtepi32_ps(dots), _mm512_set1_ps(token.sum));
    let quotient = _mm512_div_ps(centred, _mm512_set1_ps(token.scale));
    let mut value = _mm512_mul_ps(quotient, _mm512_set1_ps(job.matrix.scale()));
    if job.out.store() == Store::Add {
        // SAFETY: the mask has a bit for each element of the tile.
        value = _mm512_add_ps(unsafe { _mm512_maskz_loadu_ps(exists, out.as_ptr()) }, value);
    }
    // SAFETY: as above.
    unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), exists, value) };
}

/// One step of the sum over blocks: `fma(f32(dot - block_sum), scale, acc)` for 16 rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_block(acc: __m512, dots: __m512i, block_sum: __m512i, scales: __m512) -> __m512 {
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(dots, block_sum)), scales, acc)
}

/// The four lines of a block.
///
/// # Safety
/// `values` has them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn lines_of_block(values: &[Line], block: usize) -> [__m512i; BLOCK_LINES] {
    let mut loaded = [_mm512_setzero_si512(); BLOCK_LINES];
    for (line, loaded) in loaded.iter_mut().enumerate() {
        // SAFETY: the caller promises that all four lines exist.
        *loaded = unsafe { load_line(values, block * BLOCK_LINES + line) };
    }
    loaded
}

/// A line of values.
///
/// # Safety
/// `values` has it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn load_line(values: &[Line], line: usize) -> __m512i {
    // SAFETY: the caller promises `line < values.len()`.
    let line = unsafe { values.get_unchecked(line) };
    // SAFETY: a `Line` is 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512(std::ptr::from_ref(line).cast()) }
}

/// 64 bytes of codes.
///
/// # Safety
/// They lie `offset` bytes behind `start`, in the same allocation.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn load_packed(start: *const u8, offset: usize) -> __m512i {
    // SAFETY: the caller promises that 64 bytes lie there.
    unsafe { _mm512_loadu_si512(start.wrapping_add(offset).cast()) }
}

/// 32 bytes of codes, then zeros.
///
/// # Safety
/// They lie `offset` bytes behind `start`, in the same allocation.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn load_half(start: *const u8, offset: usize) -> __m512i {
    // SAFETY: the caller promises that 32 bytes lie there.
    _mm512_zextsi256_si512(unsafe { _mm256_loadu_si256(start.wrapping_add(offset).cast()) })
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn load_f32(values: &[f32; 16]) -> __m512 {
    // SAFETY: 16 elements.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// Floats from the bits of f16; exact.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn f32_of(bits: &[u16; 16]) -> __m512 {
    // SAFETY: 16 elements of 2 bytes.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) })
}
