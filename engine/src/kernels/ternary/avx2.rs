//! 256-bit registers: AVX2, and `vpdpbusd` where the CPU has it.
//!
//! Four rows at a time. One token is multiplied with codes straight out of memory ([`one`]), and so are up to eight ([`few`]); for more, and for
//! scales in every block, 16 rows are unpacked once, and some tokens share every load of codes. Only the instruction that adds up products differs
//! ([`Products`]); everything around it is inlined into a function compiled for each.

#![expect(unsafe_code, reason = "vector instructions, and rows of an output that threads share")]

use std::arch::x86_64::*;
use std::ops::Range;

mod few; // Up to eight tokens.
mod one; // A single one.

use super::packed::{PackedRows, RowsJob};
use super::quantized_rows::{BLOCK_COLS, BLOCK_LINES, Line};
use super::{QuantizedRows, TILE_ROWS, TokenScale};

/// Rows that share a load of values.
const QUAD: usize = 4;

/// Bytes of values that four rows are multiplied with before the next four come: the rows stay in the L1 cache
/// meanwhile, the values in the L2 cache.
const GROUP_BYTES: usize = 256 << 10;

/// How far ahead weights are fetched into the L2 cache: see the AVX-512 path.
const PREFETCH_BYTES: usize = 10 << 10;

/// How to add up products. A value of such a type is proof that the code that holds it is compiled for AVX2 and for
/// what it needs beside, and the CPU has both: only the `matmul` functions for one instruction set make one, and
/// everything that takes one is inlined into them.
trait Products: Copy {
    /// Blocks of 256 columns that [`Products::add`] can add up.
    const NARROW_BLOCKS: usize;

    /// Adds 32 products of codes and values to sums that may be narrow.
    fn add(self, sums: __m256i, codes: __m256i, values: __m256i) -> __m256i;
    /// Adds such sums to sums of 32 bits.
    fn widen(self, wide: __m256i, sums: __m256i) -> __m256i;
}

/// `vpmaddubsw`: pairs of products in 16 bits.
#[derive(Clone, Copy)]
struct Pairs(());

/// Each block adds 8 pairs of at most `2 * 3 * 128`.
const _: () = assert!(Pairs::NARROW_BLOCKS * 8 * 2 * 3 * 128 <= i16::MAX as usize);

impl Products for Pairs {
    const NARROW_BLOCKS: usize = 4;

    #[inline(always)]
    fn add(self, sums: __m256i, codes: __m256i, values: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { add_pairs(sums, codes, values) }
    }

    #[inline(always)]
    fn widen(self, wide: __m256i, sums: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { widen_pairs(wide, sums) }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_pairs(sums: __m256i, codes: __m256i, values: __m256i) -> __m256i {
    _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, values))
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen_pairs(wide: __m256i, sums: __m256i) -> __m256i {
    _mm256_add_epi32(wide, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)))
}

/// `vpdpbusd` in the VEX encoding (AVX-VNNI): four products in 32 bits.
#[derive(Clone, Copy)]
struct Vex(());

impl Products for Vex {
    /// More than a row has.
    const NARROW_BLOCKS: usize = usize::MAX;

    #[inline(always)]
    fn add(self, sums: __m256i, codes: __m256i, values: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(sums, codes, values) }
    }

    #[inline(always)]
    fn widen(self, wide: __m256i, sums: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi32(wide, sums) }
    }
}

/// The same in the EVEX encoding (AVX-512 VNNI and VL).
#[derive(Clone, Copy)]
struct Evex(());

impl Products for Evex {
    /// More than a row has.
    const NARROW_BLOCKS: usize = usize::MAX;

    #[inline(always)]
    fn add(self, sums: __m256i, codes: __m256i, values: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX-512 VNNI and VL.
        unsafe { _mm256_dpbusd_epi32(sums, codes, values) }
    }

    #[inline(always)]
    fn widen(self, wide: __m256i, sums: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi32(wide, sums) }
    }
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
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul<const REVERSED: bool>(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    unpacked: &mut Vec<Line>,
) {
    matmul_by::<_, REVERSED, 2>(Pairs(()), job, acts, unpacked);
}

/// The same with AVX-VNNI. (No narrow sums, so that registers are left for a third token.)
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) fn matmul_vex<const REVERSED: bool>(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    unpacked: &mut Vec<Line>,
) {
    matmul_by::<_, REVERSED, 3>(Vex(()), job, acts, unpacked);
}

/// The same with AVX-512 VNNI and VL.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni")]
pub(super) fn matmul_evex<const REVERSED: bool>(
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    unpacked: &mut Vec<Line>,
) {
    matmul_by::<_, REVERSED, 3>(Evex(()), job, acts, unpacked);
}

/// Up to `N_MAX` tokens share a load of codes.
#[inline(always)]
fn matmul_by<P: Products, const REVERSED: bool, const N_MAX: usize>(
    products: P,
    job: &RowsJob<'_>,
    acts: &QuantizedRows,
    unpacked: &mut Vec<Line>,
) {
    if !job.has_block_scales() {
        match acts.n_rows() {
            1 => return one::matmul(products, job, acts),
            2 => return few::matmul::<P, 4, 2>(products, job, acts),
            3 => return few::matmul::<P, 2, 3>(products, job, acts),
            4 => return few::matmul::<P, 2, 4>(products, job, acts),
            5 => return few::matmul::<P, 1, 5>(products, job, acts),
            6 => return few::matmul::<P, 1, 6>(products, job, acts),
            7 => return few::matmul::<P, 1, 7>(products, job, acts),
            few::FEW_MAX => return few::matmul::<P, 1, { few::FEW_MAX }>(products, job, acts),
            _ => {}
        }
    }
    let tile_lines = TILE_ROWS * job.rows.n_blocks() * BLOCK_LINES;
    if unpacked.len() < tile_lines {
        unpacked.resize(tile_lines, Line([0; 64]));
    }
    let unpacked = &mut unpacked[..tile_lines];
    let group_tokens = (GROUP_BYTES / (job.rows.n_blocks() * BLOCK_COLS) / N_MAX).max(1) * N_MAX;
    for tile in (0..job.rows.n_rows()).step_by(TILE_ROWS) {
        let quads = (tile..job.rows.n_rows().min(tile + TILE_ROWS)).step_by(QUAD);
        if acts.n_rows() == 1 {
            for first in quads {
                tokens::<P, REVERSED, 1>(products, job, acts, (0, first), Codes::Packed(job.rows));
            }
            continue;
        }
        // SAFETY: `products` proves AVX2.
        unsafe { unpack::<REVERSED>(job.rows, tile, unpacked) };
        let codes = Codes::Unpacked(unpacked, tile);
        for group in (0..acts.n_rows()).step_by(group_tokens) {
            let group_end = acts.n_rows().min(group + group_tokens);
            for first in quads.clone() {
                let mut token = group;
                while token + N_MAX <= group_end {
                    tokens::<P, REVERSED, N_MAX>(products, job, acts, (token, first), codes);
                    token += N_MAX;
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
        for (token, quad) in quad.into_iter().enumerate() {
            let mut dots = [0; QUAD];
            // SAFETY: 4 elements.
            unsafe { _mm_storeu_si128(dots.as_mut_ptr().cast(), quad) };
            let scale = TokenScale::of(acts, first_token + token);
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { job.finish_dots(first, &dots, scale) };
        }
        return;
    }
    assert!(!job.rows.has_half(), "scales in whole blocks");
    let starts = job.rows.starts::<QUAD>(first);
    let mut sums = [[0.0; QUAD]; N];
    for block in 0..n_blocks {
        let quad = quad::<P, REVERSED, N>(products, codes, first, &values, block..block + 1);
        // SAFETY: the rows have this block with a scale, as `has_block_scales` says.
        let scales = unsafe { job.block_scales(&starts, block) };
        for (token, (sums, dots)) in sums.iter_mut().zip(quad).enumerate() {
            let block_sum = acts.block_sums(first_token + token)[block];
            // SAFETY: `products` proves AVX2, and with it FMA and F16C.
            unsafe { add_block(sums, dots, block_sum, scales) };
        }
    }
    for (token, sums) in sums.iter().enumerate() {
        let scale = TokenScale::of(acts, first_token + token);
        // SAFETY: the caller promises that this thread alone has these rows.
        unsafe { job.finish_sums(first, sums, scale) };
    }
}

/// One step of the sum over blocks: `fma(f32(dot - block_sum), scale, acc)` for four rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_block(acc: &mut [f32; QUAD], dots: __m128i, block_sum: i32, scales: [u16; QUAD]) {
    // SAFETY: 4 elements of 2 bytes.
    let scales = _mm_cvtph_ps(unsafe { _mm_loadl_epi64(scales.as_ptr().cast()) });
    let centred = _mm_cvtepi32_ps(_mm_sub_epi32(dots, _mm_set1_epi32(block_sum)));
    // SAFETY: 4 elements.
    let before = unsafe { _mm_loadu_ps(acc.as_ptr()) };
    let after = _mm_fmadd_ps(centred, scales, before);
    // SAFETY: 4 elements.
    unsafe { _mm_storeu_ps(acc.as_mut_ptr(), after) };
}

/// Sums of four rows from `first` times `N` tokens over some blocks.
#[inline(always)]
fn quad<P: Products, const REVERSED: bool, const N: usize>(
    products: P,
    codes: Codes<'_>,
    first: usize,
    values: &[&[Line]; N],
    blocks: Range<usize>,
) -> [__m128i; N] {
    let sums = match codes {
        Codes::Packed(rows) => [packed_sums::<P, REVERSED>(products, rows, first, values[0], blocks); N],
        Codes::Unpacked(lines, tile) => unpacked_sums::<P, N>(products, lines, first - tile, values, blocks),
    };
    // SAFETY: `products` proves AVX2.
    sums.map(|[a, b, c, d]| unsafe { horizontal_sums(a, b, c, d) })
}

/// One token, straight from the packed rows.
#[inline(always)]
fn packed_sums<P: Products, const REVERSED: bool>(
    products: P,
    rows: PackedRows<'_>,
    first: usize,
    values: &[Line],
    blocks: Range<usize>,
) -> [__m256i; QUAD] {
    assert!(blocks.end <= rows.n_blocks() && values.len() >= blocks.end * BLOCK_LINES, "{blocks:?}");
    let starts = rows.starts::<QUAD>(first);
    let mut upcoming = starts[0].wrapping_add(PREFETCH_BYTES + QUAD * blocks.start * rows.block_bytes());
    let mut wide = [zero(products); QUAD];
    for narrow_start in blocks.clone().step_by(P::NARROW_BLOCKS) {
        let mut narrow = [zero(products); QUAD];
        for block in narrow_start..blocks.end.min(narrow_start.saturating_add(P::NARROW_BLOCKS)) {
            for _ in 0..QUAD {
                // SAFETY: a prefetch has no effect but on caches, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(upcoming.cast()) };
                upcoming = upcoming.wrapping_add(64);
            }
            let halves = if block < rows.n_full() { 2 } else { 1 };
            for half in 0..halves {
                let offset = block * rows.block_bytes() + 32 * half;
                for row in 0..QUAD {
                    // SAFETY: a whole block has 64 bytes, half a one 32 (`PackedRows`).
                    let packed = unsafe { load_packed(starts[row], offset) };
                    for place in 0..BLOCK_LINES {
                        let line = block * BLOCK_LINES + group_at::<REVERSED>(place);
                        // SAFETY: there are four lines for each block (asserted above).
                        let values = unsafe { load_half_line(values, line, half) };
                        // SAFETY: `products` proves AVX2.
                        let codes = unsafe { codes_at(packed, place) };
                        narrow[row] = products.add(narrow[row], codes, values);
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

/// `N` tokens, from unpacked rows.
#[inline(always)]
fn unpacked_sums<P: Products, const N: usize>(
    products: P,
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
    let mut wide = [[zero(products); QUAD]; N];
    for narrow_start in blocks.clone().step_by(P::NARROW_BLOCKS) {
        let narrow_end = blocks.end.min(narrow_start.saturating_add(P::NARROW_BLOCKS));
        let mut narrow = [[zero(products); QUAD]; N];
        for half_line in narrow_start * BLOCK_LINES * 2..narrow_end * BLOCK_LINES * 2 {
            let (line, half) = (half_line / 2, half_line % 2);
            let mut token_values = [zero(products); N];
            for (loaded, values) in token_values.iter_mut().zip(values) {
                // SAFETY: there are four lines for each block (asserted above).
                *loaded = unsafe { load_half_line(values, line, half) };
            }
            for row in 0..QUAD {
                // SAFETY: `first + row` is below 16 and `line` below `row_lines` (asserted above).
                let codes = unsafe { load_half_line(lines, (first + row) * row_lines + line, half) };
                for (narrow, values) in narrow.iter_mut().zip(token_values) {
                    narrow[row] = products.add(narrow[row], codes, values);
                }
            }
        }
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            for (wide, narrow) in wide.iter_mut().zip(narrow) {
                *wide = products.widen(*wide, narrow);
            }
        }
    }
    wide
}

/// Sums, all 0.
#[inline(always)]
fn zero<P: Products>(_proof: P) -> __m256i {
    // SAFETY: the argument proves AVX2.
    unsafe { _mm256_setzero_si256() }
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
