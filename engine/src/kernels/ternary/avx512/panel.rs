//! Many tokens: 32 rows are unpacked and transposed once and multiplied with all of them.
//!
//! In a panel a register holds the same four columns of 16 rows. The four values of a token are broadcast to
//! every lane, so that a lane sums up one row and nothing is added horizontally. A panel stays in the L2 cache
//! while all tokens pass by.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{add_block, codes_at, f32_of, finish_dots, group_at, load_f32, load_half, load_packed};
use crate::kernels::ternary::packed::{PackedRows, RowsJob};
use crate::kernels::ternary::quantized_rows::{BLOCK_COLS, BLOCK_LINES, Line};
use crate::kernels::ternary::{QuantizedRows, TILE_ROWS, TokenScale};

/// Tokens that are multiplied with a panel at once: with two registers of rows each, 24 accumulators.
const TOKENS_MAX: usize = 12;

/// Registers of rows in a panel.
const TILES: usize = 2;

/// Rows of a panel.
pub(super) const PANEL_ROWS: usize = TILES * TILE_ROWS;

/// Bytes of panels that are multiplied with a group of tokens before the next group comes: together with the
/// group they stay in the L2 cache, and the group's outputs are written in longer pieces.
const PANELS_BYTES: usize = 384 << 10;

/// Columns whose products one lane of one instruction adds up.
const STEP_COLS: usize = 4;

/// Steps in a block of 256 columns.
const BLOCK_STEPS: usize = BLOCK_COLS / STEP_COLS;

/// Steps in a line of values.
const LINE_STEPS: usize = BLOCK_STEPS / BLOCK_LINES;

/// Multiplies the rows of a job. Only this thread may have them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn matmul<const REVERSED: bool>(job: &RowsJob<'_>, acts: &QuantizedRows, panels: &mut Vec<Line>) {
    let (n_panels, panel_lines) = reserve(job, panels);
    for first_row in (0..job.rows.n_rows()).step_by(n_panels * PANEL_ROWS) {
        let first_rows = (first_row..job.rows.n_rows()).step_by(PANEL_ROWS).take(n_panels);
        for (first_row, panel) in first_rows.clone().zip(panels.chunks_exact_mut(panel_lines)) {
            unpack::<REVERSED>(job.rows, first_row, panel);
        }
        // Groups of nearly equal size: a group of one would cost as much as one of six.
        let n_groups = acts.n_rows().div_ceil(TOKENS_MAX);
        for group in 0..n_groups {
            let tokens = group * acts.n_rows() / n_groups..(group + 1) * acts.n_rows() / n_groups;
            for (first_row, panel) in first_rows.clone().zip(panels.chunks_exact(panel_lines)) {
                multiply_any(job, acts, tokens.clone(), first_row, panel);
            }
        }
    }
}

/// Makes room for so many panels of a job as are used together: their number, and the lines of each.
pub(super) fn reserve(job: &RowsJob<'_>, panels: &mut Vec<Line>) -> (usize, usize) {
    let panel_lines = job.rows.n_blocks() * BLOCK_STEPS * TILES;
    let panel_bytes = panel_lines * size_of::<Line>();
    let n_panels = (PANELS_BYTES / panel_bytes).clamp(1, job.rows.n_rows().div_ceil(PANEL_ROWS));
    if panels.len() < n_panels * panel_lines {
        panels.resize(n_panels * panel_lines, Line([0; 64]));
    }
    (n_panels, panel_lines)
}

/// Multiplies a panel with up to [`TOKENS_MAX`] tokens: their number becomes a constant, so that the sums stay
/// in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply_any(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    all: Range<usize>,
    first_row: usize,
    panel: &[Line],
) {
    match all.len() {
        1 => tokens::<1>(job, acts, all.start, first_row, panel),
        2 => tokens::<2>(job, acts, all.start, first_row, panel),
        3 => tokens::<3>(job, acts, all.start, first_row, panel),
        4 => tokens::<4>(job, acts, all.start, first_row, panel),
        5 => tokens::<5>(job, acts, all.start, first_row, panel),
        6 => tokens::<6>(job, acts, all.start, first_row, panel),
        7 => tokens::<7>(job, acts, all.start, first_row, panel),
        8 => tokens::<8>(job, acts, all.start, first_row, panel),
        9 => tokens::<9>(job, acts, all.start, first_row, panel),
        10 => tokens::<10>(job, acts, all.start, first_row, panel),
        11 => tokens::<11>(job, acts, all.start, first_row, panel),
        _ => tokens::<TOKENS_MAX>(job, acts, all.start, first_row, panel),
    }
}

/// Multiplies a panel with `T` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn tokens<const T: usize>(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    first_token: usize,
    first_row: usize,
    panel: &[Line],
) {
    let values: [&[Line]; T] = std::array::from_fn(|token| acts.lines(first_token + token));
    let n_tiles = (job.rows.n_rows() - first_row).div_ceil(TILE_ROWS).min(TILES);
    if job.has_block_scales() {
        return tokens_blocks(job, acts, first_token, first_row, (panel, &values));
    }
    let dots = multiply::<T>(panel, &values, 0, job.rows.n_blocks());
    for (token, dots) in dots.iter().enumerate() {
        let scale = TokenScale::of(acts, first_token + token);
        for (tile, dots) in dots.iter().enumerate().take(n_tiles) {
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { finish_dots(job, first_row + tile * TILE_ROWS, *dots, scale) };
        }
    }
}

/// The same with a scale in every block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn tokens_blocks<const T: usize>(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    first_token: usize,
    first_row: usize,
    (panel, values): (&[Line], &[&[Line]; T]),
) {
    let mut sums = [[[0.0_f32; TILE_ROWS]; TILES]; T];
    let n_tiles = (job.rows.n_rows() - first_row).div_ceil(TILE_ROWS).min(TILES);
    assert!(job.has_block_scales() && !job.rows.has_half(), "scales in whole blocks");
    let starts: [_; TILES] = std::array::from_fn(|tile| job.rows.starts(first_row + tile * TILE_ROWS));
    let block_sums: [&[i32]; T] = std::array::from_fn(|token| acts.block_sums(first_token + token));
    #[expect(clippy::needless_range_loop, reason = "the block of several things")]
    for block in 0..job.rows.n_blocks() {
        let dots = multiply::<T>(panel, values, block, 1);
        for tile in 0..n_tiles {
            // SAFETY: the rows have this block with a scale (asserted above).
            let scales = f32_of(&unsafe { job.block_scales::<TILE_ROWS>(&starts[tile], block) });
            for token in 0..T {
                let block_sum = _mm512_set1_epi32(block_sums[token][block]);
                let sums = &mut sums[token][tile];
                let sum = add_block(load_f32(sums), dots[token][tile], block_sum, scales);
                // SAFETY: 16 elements.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), sum) };
            }
        }
    }
    for (token, sums) in sums.iter().enumerate() {
        let scale = TokenScale::of(acts, first_token + token);
        for (tile, sums) in sums.iter().enumerate().take(n_tiles) {
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { job.finish_sums(first_row + tile * TILE_ROWS, sums, scale) };
        }
    }
}

/// Sums of `n_blocks` blocks from `first_block`: a lane for each row of the panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply<const T: usize>(
    panel: &[Line],
    values: &[&[Line]; T],
    first_block: usize,
    n_blocks: usize,
) -> [[__m512i; TILES]; T] {
    let end_block = first_block + n_blocks;
    assert!(panel.len() >= end_block * BLOCK_STEPS * TILES, "a panel of {} lines", panel.len());
    for values in values {
        assert!(values.len() >= end_block * BLOCK_LINES, "{} lines of values", values.len());
    }
    let values: [*const u8; T] = values.map(|values| values.as_ptr().cast());
    let mut sums = [[_mm512_setzero_si512(); TILES]; T];
    for step in first_block * BLOCK_STEPS..end_block * BLOCK_STEPS {
        let mut codes = [_mm512_setzero_si512(); TILES];
        for (tile, codes) in codes.iter_mut().enumerate() {
            // SAFETY: `step < end_block * BLOCK_STEPS`, and the panel has two lines for each (asserted above).
            *codes = unsafe { super::load_line(panel, step * TILES + tile) };
        }
        for (values, sums) in values.iter().zip(&mut sums) {
            // SAFETY: the lines of values have four bytes for each step (asserted above).
            let four = unsafe { values.wrapping_add(step * STEP_COLS).cast::<i32>().read_unaligned() };
            let four = _mm512_set1_epi32(four);
            for (sum, codes) in sums.iter_mut().zip(codes) {
                *sum = _mm512_dpbusd_epi32(*sum, codes, four);
            }
        }
    }
    sums
}

/// Unpacks the rows from `first` into a panel. Past the last row it repeats that.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn unpack<const REVERSED: bool>(rows: PackedRows<'_>, first: usize, panel: &mut [Line]) {
    for tile in 0..TILES {
        unpack_tile::<REVERSED>(rows, first + tile * TILE_ROWS, tile, panel);
    }
}

/// Unpacks 16 rows from `first` into tile `tile` of a panel. Past the last row it repeats that.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn unpack_tile<const REVERSED: bool>(rows: PackedRows<'_>, first: usize, tile: usize, panel: &mut [Line]) {
    let starts = rows.starts::<TILE_ROWS>(first);
    let blocks = panel.chunks_exact_mut(BLOCK_STEPS * TILES);
    for (block, panel) in (0..rows.n_blocks()).zip(blocks) {
        let offset = block * rows.block_bytes();
        for start in starts {
            // The same rows of the next panel, while this one is multiplied.
            let next = start.wrapping_add(offset + PANEL_ROWS * rows.row_bytes());
            _mm_prefetch::<_MM_HINT_T1>(next.cast());
        }
        let mut packed = [_mm512_setzero_si512(); TILE_ROWS];
        for (packed, start) in packed.iter_mut().zip(starts) {
            *packed = if block < rows.n_full() {
                // SAFETY: `block < n_full`, so that 64 bytes lie there (`PackedRows`).
                unsafe { load_packed(start, offset) }
            } else {
                // SAFETY: 32 bytes lie behind the last whole block (`PackedRows`).
                unsafe { load_half(start, offset) }
            };
        }
        // Transposed while still packed: four codes a byte, a quarter of the work.
        for (step, packed) in transposed(packed).into_iter().enumerate() {
            for place in 0..BLOCK_LINES {
                let line = (group_at::<REVERSED>(place) * LINE_STEPS + step) * TILES + tile;
                let codes = codes_at(packed, place);
                // SAFETY: a `Line` is 64 bytes, aligned to 64.
                unsafe { _mm512_store_si512(panel[line].0.as_mut_ptr().cast(), codes) };
            }
        }
    }
}

/// Register `i` of the result has the 32-bit lanes `i` of all 16 registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    // Of four rows each: for each place in a 128-bit lane, the four rows' values.
    let mut quads = [[_mm512_setzero_si512(); 4]; 4];
    for (quad, out) in quads.iter_mut().enumerate() {
        let [a, b, c, d] = [rows[4 * quad], rows[4 * quad + 1], rows[4 * quad + 2], rows[4 * quad + 3]];
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        *out = [
            _mm512_unpacklo_epi64(ab_low, cd_low),
            _mm512_unpackhi_epi64(ab_low, cd_low),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ];
    }
    let mut out = rows;
    for place in 0..4 {
        let [a, b, c, d] = [quads[0][place], quads[1][place], quads[2][place], quads[3][place]];
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        out[place] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        out[4 + place] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        out[8 + place] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        out[12 + place] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
    out
}
