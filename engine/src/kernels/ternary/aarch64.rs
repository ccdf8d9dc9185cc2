//! Advanced SIMD, with `sdot` where the CPU has it and with 16-bit sums where not.
//!
//! Four rows at a time. One token is multiplied with codes straight out of memory; for more, 16 rows are unpacked
//! once, and two tokens share every load of codes.

#![expect(unsafe_code, reason = "pointer loads, and rows of an output that threads share")]

use std::arch::aarch64::*;
use std::ops::Range;

use half::f16;

use super::packed::{PackedRows, RowsJob};
use super::quantized_rows::{BLOCK_COLS, BLOCK_LINES, Line};
use super::{QuantizedRows, TILE_ROWS, TokenScale, exact_f32};
use crate::kernels::aarch64::{DotProduct, MultiplyAdd, Products};

/// Tokens that share a load of codes.
const TOKENS_MAX: usize = 2;

/// Rows that share a load of values.
const QUAD: usize = 4;

/// Bytes of values that four rows are multiplied with before the next four come: the rows stay in the L1 cache
/// meanwhile, the values in the L2 cache.
const GROUP_BYTES: usize = 256 << 10;

/// Registers in a line.
const LINE_PARTS: usize = 4;

/// Blocks that are added up before sums are widened: products are at most `3 * 128`.
#[inline(always)]
fn narrow_blocks<P: Products>() -> usize {
    P::narrow_products(3 * 128) / BLOCK_COLS
}

/// Where the codes of a tile of rows come from.
#[derive(Clone, Copy)]
enum Codes<'a> {
    /// The packed rows.
    Packed(PackedRows<'a>),
    /// Unpacked from this row on: `(16, n_blocks, 4)` lines.
    Unpacked(&'a [Line], usize),
}

/// Multiplies the rows of a job. Only this thread may have them.
#[target_feature(enable = "neon")]
pub(super) fn matmul_neon<const REVERSED: bool>(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    unpacked: &mut Vec<Line>,
) {
    // SAFETY: this function is compiled for Advanced SIMD, and its caller vouched for the CPU.
    let products = unsafe { MultiplyAdd::new() };
    matmul::<_, REVERSED>(products, job, acts, unpacked);
}

/// The same with `sdot`.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn matmul_dotprod<const REVERSED: bool>(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    unpacked: &mut Vec<Line>,
) {
    // SAFETY: this function is compiled for Advanced SIMD and `sdot`, and its caller vouched for the CPU.
    let products = unsafe { DotProduct::new() };
    matmul::<_, REVERSED>(products, job, acts, unpacked);
}

#[inline(always)]
fn matmul<P: Products, const REVERSED: bool>(
    products: P,
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    unpacked: &mut Vec<Line>,
) {
    let tile_lines = TILE_ROWS * job.rows.n_blocks() * BLOCK_LINES;
    if unpacked.len() < tile_lines {
        unpacked.resize(tile_lines, Line([0; 64]));
    }
    let unpacked = &mut unpacked[..tile_lines];
    let group_tokens = (GROUP_BYTES / (job.rows.n_blocks() * BLOCK_COLS) / TOKENS_MAX).max(1) * TOKENS_MAX;
    for tile in (0..job.rows.n_rows()).step_by(TILE_ROWS) {
        let quads = (tile..job.rows.n_rows().min(tile + TILE_ROWS)).step_by(QUAD);
        if acts.n_rows() == 1 {
            for first in quads {
                tokens::<P, REVERSED, 1>(products, job, acts, (0, first), Codes::Packed(job.rows));
            }
            continue;
        }
        unpack::<P, REVERSED>(products, job.rows, tile, unpacked);
        let codes = Codes::Unpacked(unpacked, tile);
        for group in (0..acts.n_rows()).step_by(group_tokens) {
            let group_end = acts.n_rows().min(group + group_tokens);
            for first in quads.clone() {
                let mut token = group;
                while token + TOKENS_MAX <= group_end {
                    tokens::<P, REVERSED, TOKENS_MAX>(products, job, acts, (token, first), codes);
                    token += TOKENS_MAX;
                }
                for token in token..group_end {
                    tokens::<P, REVERSED, 1>(products, job, acts, (token, first), codes);
                }
            }
        }
    }
}

/// Multiplies four rows from `first` with `N` tokens.
#[inline(always)]
fn tokens<P: Products, const REVERSED: bool, const N: usize>(
    products: P,
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    (first_token, first): (usize, usize),
    codes: Codes<'_>,
) {
    let values: [&[Line]; N] = std::array::from_fn(|token| acts.lines(first_token + token));
    let n_blocks = job.rows.n_blocks();
    if !job.has_block_scales() {
        let quad = quad::<P, REVERSED, N>(products, codes, first, &values, 0..n_blocks);
        for (token, dots) in quad.iter().enumerate() {
            let scale = TokenScale::of(acts, first_token + token);
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { job.finish_dots(first, dots, scale) };
        }
        return;
    }
    assert!(!job.rows.has_half(), "scales in whole blocks");
    let starts = job.rows.starts::<QUAD>(first);
    let mut sums = [[0.0_f32; QUAD]; N];
    for block in 0..n_blocks {
        let quad = quad::<P, REVERSED, N>(products, codes, first, &values, block..block + 1);
        // SAFETY: the rows have this block with a scale, as `has_block_scales` says.
        let scales = unsafe { job.block_scales(&starts, block) };
        let scales = scales.map(|bits| f16::from_bits(bits).to_f32_const());
        for (token, (sums, dots)) in sums.iter_mut().zip(quad).enumerate() {
            let block_sum = acts.block_sums(first_token + token)[block];
            for ((sum, dot), scale) in sums.iter_mut().zip(dots).zip(scales) {
                *sum = exact_f32(dot - block_sum).mul_add(scale, *sum);
            }
        }
    }
    for (token, sums) in sums.iter().enumerate() {
        let scale = TokenScale::of(acts, first_token + token);
        // SAFETY: the caller promises that this thread alone has these rows.
        unsafe { job.finish_sums(first, sums, scale) };
    }
}

/// Sums of four rows from `first` times `N` tokens over some blocks.
#[inline(always)]
fn quad<P: Products, const REVERSED: bool, const N: usize>(
    products: P,
    codes: Codes<'_>,
    first: usize,
    values: &[&[Line]; N],
    blocks: Range<usize>,
) -> [[i32; QUAD]; N] {
    let sums = match codes {
        Codes::Packed(rows) => [packed_sums::<P, REVERSED>(products, rows, first, values[0], blocks); N],
        Codes::Unpacked(lines, tile) => unpacked_sums::<P, N>(products, lines, first - tile, values, blocks),
    };
    let mut out = [[0; QUAD]; N];
    for token in 0..N {
        for row in 0..QUAD {
            out[token][row] = products.horizontal_sum(sums[token][row]);
        }
    }
    out
}

/// One token, straight from the packed rows.
#[inline(always)]
fn packed_sums<P: Products, const REVERSED: bool>(
    products: P,
    rows: PackedRows<'_>,
    first: usize,
    values: &[Line],
    blocks: Range<usize>,
) -> [int32x4_t; QUAD] {
    assert!(blocks.end <= rows.n_blocks(), "{blocks:?}");
    let starts = rows.starts::<QUAD>(first);
    let mut wide = [products.wide_zero(); QUAD];
    for narrow_start in blocks.clone().step_by(narrow_blocks::<P>()) {
        let mut narrow = [products.zero(); QUAD];
        for block in narrow_start..blocks.end.min(narrow_start.saturating_add(narrow_blocks::<P>())) {
            let values = &values[block * BLOCK_LINES..][..BLOCK_LINES];
            let n_parts = if block < rows.n_full() { LINE_PARTS } else { LINE_PARTS / 2 };
            for part in 0..n_parts {
                let offset = block * rows.block_bytes() + 16 * part;
                for row in 0..QUAD {
                    // SAFETY: a whole block has 64 bytes, half a one 32 (`PackedRows`).
                    let packed = unsafe { products.load(starts[row].wrapping_add(offset)) };
                    for place in 0..BLOCK_LINES {
                        let values = load_part(products, &values[group_at::<REVERSED>(place)], part);
                        narrow[row] = products.add(narrow[row], codes_at(products, packed, place), values);
                    }
                }
            }
        }
        for row in 0..QUAD {
            wide[row] = products.widen(wide[row], narrow[row]);
        }
    }
    wide
}

/// `N` tokens, from unpacked rows.
#[inline(always)]
fn unpacked_sums<P: Products, const N: usize>(
    products: P,
    lines: &[Line],
    first: usize,
    values: &[&[Line]; N],
    blocks: Range<usize>,
) -> [[int32x4_t; QUAD]; N] {
    let row_lines = lines.len() / TILE_ROWS;
    let mut wide = [[products.wide_zero(); QUAD]; N];
    for narrow_start in blocks.clone().step_by(narrow_blocks::<P>()) {
        let narrow_end = blocks.end.min(narrow_start.saturating_add(narrow_blocks::<P>()));
        let mut narrow = [[products.zero(); QUAD]; N];
        for line in narrow_start * BLOCK_LINES..narrow_end * BLOCK_LINES {
            for part in 0..LINE_PARTS {
                let mut token_values = [load_part(products, &values[0][line], part); N];
                for token in 1..N {
                    token_values[token] = load_part(products, &values[token][line], part);
                }
                for row in 0..QUAD {
                    let codes = load_part(products, &lines[(first + row) * row_lines + line], part);
                    for token in 0..N {
                        narrow[token][row] = products.add(narrow[token][row], codes, token_values[token]);
                    }
                }
            }
        }
        for token in 0..N {
            for row in 0..QUAD {
                wide[token][row] = products.widen(wide[token][row], narrow[token][row]);
            }
        }
    }
    wide
}

/// Unpacks 16 rows from `first`, in the order of the values. Past the last row it repeats that.
#[inline(always)]
fn unpack<P: Products, const REVERSED: bool>(
    products: P,
    rows: PackedRows<'_>,
    first: usize,
    unpacked: &mut [Line],
) {
    let starts = rows.starts::<TILE_ROWS>(first);
    let lines = unpacked.chunks_exact_mut(rows.n_blocks() * BLOCK_LINES);
    for (start, lines) in starts.into_iter().zip(lines) {
        for (block, lines) in lines.chunks_exact_mut(BLOCK_LINES).enumerate() {
            let n_parts = if block < rows.n_full() { LINE_PARTS } else { LINE_PARTS / 2 };
            for part in 0..LINE_PARTS {
                let codes = 16 * part..16 * (part + 1);
                if part >= n_parts {
                    lines.iter_mut().for_each(|line| line.0[codes.clone()].fill(0));
                    continue;
                }
                // SAFETY: a whole block has 64 bytes, half a one 32 (`PackedRows`).
                let packed =
                    unsafe { products.load(start.wrapping_add(block * rows.block_bytes() + 16 * part)) };
                for place in 0..BLOCK_LINES {
                    let codes = &mut lines[group_at::<REVERSED>(place)].0[codes.clone()];
                    let unpacked = codes_at(products, packed, place);
                    // SAFETY: 16 elements, and `products` proves Advanced SIMD.
                    unsafe { vst1q_u8(codes.as_mut_ptr().cast(), unpacked) };
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
#[inline(always)]
fn codes_at<P: Products>(products: P, packed: uint8x16_t, place: usize) -> uint8x16_t {
    let shifted = match place {
        0 => packed,
        1 => products.shift_right::<2>(packed),
        2 => products.shift_right::<4>(packed),
        _ => products.shift_right::<6>(packed),
    };
    products.and(shifted, 3)
}

/// A quarter of a line.
#[inline(always)]
fn load_part<P: Products>(products: P, line: &Line, part: usize) -> uint8x16_t {
    let part = &line.0.as_chunks::<16>().0[part];
    // SAFETY: `part` is 16 bytes.
    unsafe { products.load(part.as_ptr().cast()) }
}
