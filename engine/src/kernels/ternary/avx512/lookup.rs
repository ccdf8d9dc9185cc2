//! Up to eight tokens times indices of tables: `vpermw` looks up the sums of three products for 32 rows.
//!
//! Rows are the lanes of registers, so that no sum crosses lanes. A lookup minds the low five bits of a lane only: the second
//! and third index of a word are the word shifted, without a mask.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::MatmulJob;
use super::super::lookup::{
    CHUNK_STRIPS, GROUP_ROWS, INDEX_COLS, LookupMatrix, Register, STRIP_BYTES, STRIP_COLS, STRIP_INDICES,
    STRIP_WORDS, WORD_REGISTERS,
};
use super::super::quantized_rows::Line;
use super::{QuantizedRows, Store, TILE_ROWS, TokenScale};

const LINE_BYTES: usize = size_of::<Line>();

/// Columns of a chunk.
const CHUNK_COLS: usize = CHUNK_STRIPS * STRIP_COLS;

/// Tokens that are looked up side by side: with more, sums would not stay in registers.
const SIDE_BY_SIDE: usize = 4;

/// Groups of rows that a thread takes at a time, at most: their sums stay in a cache.
const PIECE_GROUPS_MAX: usize = 32;

/// Shares of twice as many are cut up.
const PIECE_GROUPS_MIN: usize = 16;

/// The tables of a chunk.
type ChunkTables = [[Line; STRIP_INDICES]; CHUNK_STRIPS];

/// Sums of 16 bits of a group of rows.
type GroupSums = [__m512i; WORD_REGISTERS];

/// The weights of three columns for each entry of a table: entries `8 lane + 0..4` and `8 lane + 4..8`, as the instruction that narrows
/// sums to 16 bits wants them; then a zero.
const PATTERNS: [[i8; 64]; 2] = {
    let mut patterns = [[0; 64]; 2];
    let mut entry: usize = 0;
    while entry < 27 {
        let place = 4 * (entry / 8 * 4 + entry % 4);
        let digits = [entry % 3, entry / 3 % 3, entry / 9];
        let mut i = 0;
        while i < INDEX_COLS {
            patterns[entry / 4 % 2][place + i] = [-1, 0, 1][digits[i]];
            i += 1;
        }
        entry += 1;
    }
    patterns
};

/// What a thread needs beside the registers.
pub(in super::super) struct Scratch {
    tables: Box<[ChunkTables; SIDE_BY_SIDE]>,
    sums: Vec<[i32; GROUP_ROWS]>, // (n_tokens, groups)
}

impl Default for Scratch {
    fn default() -> Self {
        let tables = [[[Line([0; LINE_BYTES]); STRIP_INDICES]; CHUNK_STRIPS]; SIDE_BY_SIDE];
        Self { tables: Box::new(tables), sums: Vec::new() }
    }
}

/// Groups of rows that a thread takes at a time. Making tables takes about as long as looking up one group: a thread has its share in
/// one piece, unless pieces are long even so; then it leaves work to others if it was held up, and such that all have the same to do.
pub(in super::super) fn piece(n_threads: usize, n_groups: usize) -> usize {
    let share = n_groups.div_ceil(n_threads).max(1);
    if n_threads == 1 || share < 2 * PIECE_GROUPS_MIN {
        return share.min(PIECE_GROUPS_MAX);
    }
    let longest = |piece: &usize| n_groups.div_ceil(*piece).div_ceil(n_threads) * piece;
    let pieces = PIECE_GROUPS_MIN..=PIECE_GROUPS_MAX.min(share.div_ceil(2));
    pieces.rev().min_by_key(longest).unwrap_or(share)
}

/// Multiplies some groups of rows, which are counted through all `jobs`. Only this thread may have them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(in super::super) fn matmul(
    jobs: &[MatmulJob<'_>],
    acts: &QuantizedRows,
    groups: Range<usize>,
    scratch: &mut Scratch,
) {
    let Scratch { tables, sums } = scratch;
    let n_tokens = acts.n_rows();
    sums.clear();
    // Sums over codes, as they are defined, are those over weights and the sum of the activations.
    for token in 0..n_tokens {
        sums.extend(groups.clone().map(|_| [acts.sum(token); GROUP_ROWS]));
    }
    let n_chunks = jobs.iter().find_map(|job| job.lookup).map_or(0, |matrix| matrix.n_chunks());
    for chunk in 0..n_chunks {
        for first in (0..n_tokens).step_by(SIDE_BY_SIDE) {
            let tokens = first..n_tokens.min(first + SIDE_BY_SIDE);
            for (tables, token) in tables.iter_mut().zip(tokens.clone()) {
                make_tables(acts.lines(token), chunk, tables);
            }
            let sums = &mut sums[first * groups.len()..];
            let place = (chunk, groups.clone());
            match tokens.len() {
                1 => add_chunk::<1>(jobs, place, tables, sums),
                2 => add_chunk::<2>(jobs, place, tables, sums),
                3 => add_chunk::<3>(jobs, place, tables, sums),
                _ => add_chunk::<SIDE_BY_SIDE>(jobs, place, tables, sums),
            }
        }
    }
    for (token, sums) in sums.chunks_exact(groups.len()).enumerate() {
        let token = TokenScale::of(acts, token);
        for (group, dots) in groups.clone().zip(sums) {
            // SAFETY: the caller promises that this thread alone has these rows.
            unsafe { finish(jobs, group, dots, token) };
        }
    }
}

/// Stores what the sums of a group come to: the steps of [`super::super::output::finished`] on sixteen rows at once.
///
/// # Safety
/// No other thread uses these rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn finish(jobs: &[MatmulJob<'_>], group: usize, dots: &[i32; GROUP_ROWS], token: TokenScale) {
    let Some((job, matrix, group)) = locate(jobs, group) else { return };
    let rows = group * GROUP_ROWS..matrix.n_rows().min((group + 1) * GROUP_ROWS);
    let (sum, scale) = (_mm512_set1_ps(token.sum), _mm512_set1_ps(token.scale));
    let weight_scale = _mm512_set1_ps(job.matrix.scale());
    // SAFETY: the caller's promise; the reference is gone before this function returns.
    let out = unsafe { job.out.tile(token.token, rows) };
    for (out, dots) in out.chunks_mut(TILE_ROWS).zip(dots.as_chunks::<TILE_ROWS>().0) {
        let exists = u16::MAX >> (TILE_ROWS - out.len());
        // SAFETY: 16 elements of 4 bytes.
        let dots = unsafe { _mm512_loadu_si512(dots.as_ptr().cast()) };
        let quotient = _mm512_div_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(dots), sum), scale);
        let mut value = _mm512_mul_ps(quotient, weight_scale);
        if job.out.store() == Store::Add {
            // SAFETY: the mask has a bit for each element that there is.
            value = _mm512_add_ps(unsafe { _mm512_maskz_loadu_ps(exists, out.as_ptr()) }, value);
        }
        // SAFETY: as above.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), exists, value) };
    }
}

/// The job that a group belongs to, and which of its groups it is.
pub(super) fn locate<'j, 'a>(
    jobs: &'j [MatmulJob<'a>],
    mut group: usize,
) -> Option<(&'j MatmulJob<'a>, LookupMatrix<'a>, usize)> {
    for job in jobs {
        let matrix = job.lookup?;
        if group < matrix.n_groups() {
            return Some((job, matrix, group));
        }
        group -= matrix.n_groups();
    }
    None
}

/// Adds the products of a chunk of columns for some groups and `N` tokens; `sums` are those of the tokens, group by group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_chunk<const N: usize>(
    jobs: &[MatmulJob<'_>],
    (chunk, groups): (usize, Range<usize>),
    tables: &[ChunkTables; SIDE_BY_SIDE],
    sums: &mut [[i32; GROUP_ROWS]],
) {
    let run = |chunk, group| locate(jobs, group).map(|(_, matrix, group)| matrix.run(chunk, group));
    let is_last = jobs.iter().find_map(|job| job.lookup).is_some_and(|matrix| chunk + 1 == matrix.n_chunks());
    let Some(mut strips) = run(chunk, groups.start) else { return };
    for (i, group) in groups.clone().enumerate() {
        // What this thread reads next is fetched meanwhile.
        let next = match (group + 1 < groups.end, is_last) {
            (true, _) => run(chunk, group + 1),
            (false, false) => run(chunk + 1, groups.start),
            (false, true) => run(0, groups.end),
        };
        let upcoming = next.map_or(strips.as_ptr_range().end, <[_]>::as_ptr).cast();
        let added = chunk_sums::<N>(strips, tables, upcoming);
        for (token, added) in added.iter().enumerate() {
            add_to(&mut sums[token * groups.len() + i], added);
        }
        strips = next.unwrap_or_default();
    }
}

/// Sums of 16 bits of a group of rows over the columns of a chunk. What lies at `upcoming` is fetched meanwhile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn chunk_sums<const N: usize>(
    strips: &[[u8; STRIP_BYTES]],
    tables: &[ChunkTables; SIDE_BY_SIDE],
    upcoming: *const u8,
) -> [GroupSums; N] {
    // Plain loops and no closures: those are not inlined in every build, and each call would spill.
    let mut sums = [[_mm512_setzero_si512(); WORD_REGISTERS]; N];
    let mut upcoming = upcoming;
    for (strip, bytes) in strips.iter().take(CHUNK_STRIPS).enumerate() {
        // The highest bits of the words become the last index.
        let mut last = [_mm512_setzero_si512(); WORD_REGISTERS];
        let registers: &[Register] = bytes.as_chunks().0;
        for word in 0..STRIP_WORDS {
            let mut words = [_mm512_setzero_si512(); WORD_REGISTERS];
            for r in 0..WORD_REGISTERS {
                words[r] = load(&registers[WORD_REGISTERS * word + r]);
                last[r] = with_top_bit(last[r], words[r], word);
                _mm_prefetch::<_MM_HINT_T1>(upcoming.cast());
                upcoming = upcoming.wrapping_add(size_of::<Register>());
            }
            for place in 0..3 {
                let mut indices = words;
                for indices in &mut indices {
                    *indices = match place {
                        0 => *indices,
                        1 => _mm512_srli_epi16::<5>(*indices),
                        _ => _mm512_srli_epi16::<10>(*indices),
                    };
                }
                for n in 0..N {
                    add_looked_up(&mut sums[n], &indices, &tables[n][strip][3 * word + place]);
                }
            }
        }
        for n in 0..N {
            add_looked_up(&mut sums[n], &last, &tables[n][strip][STRIP_INDICES - 1]);
        }
    }
    sums
}

/// The highest bits of a word as bit `word` of an index, of which the lower ones are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn with_top_bit(index: __m512i, words: __m512i, word: usize) -> __m512i {
    // index | (shifted & mask)
    const MERGE: i32 = 0xf8;
    match word {
        0 => _mm512_srli_epi16::<15>(words),
        1 => _mm512_ternarylogic_epi32::<MERGE>(index, _mm512_srli_epi16::<14>(words), _mm512_set1_epi16(2)),
        2 => _mm512_ternarylogic_epi32::<MERGE>(index, _mm512_srli_epi16::<13>(words), _mm512_set1_epi16(4)),
        3 => _mm512_ternarylogic_epi32::<MERGE>(index, _mm512_srli_epi16::<12>(words), _mm512_set1_epi16(8)),
        _ => _mm512_ternarylogic_epi32::<MERGE>(index, _mm512_srli_epi16::<11>(words), _mm512_set1_epi16(16)),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_looked_up(sums: &mut GroupSums, indices: &GroupSums, table: &Line) {
    // SAFETY: a `Line` is 64 bytes, aligned to 64.
    let table = unsafe { _mm512_load_si512(table.0.as_ptr().cast()) };
    for r in 0..WORD_REGISTERS {
        sums[r] = _mm512_add_epi16(sums[r], _mm512_permutexvar_epi16(indices[r], table));
    }
}

/// Adds sums of 16 bits to those of 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_to(sums: &mut [i32; GROUP_ROWS], added: &GroupSums) {
    for (sums, added) in sums.as_chunks_mut::<32>().0.iter_mut().zip(added) {
        let halves = [_mm512_castsi512_si256(*added), _mm512_extracti64x4_epi64::<1>(*added)];
        for (sums, half) in sums.as_chunks_mut::<16>().0.iter_mut().zip(halves) {
            // SAFETY: 16 elements of 4 bytes.
            let before = unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) };
            let after = _mm512_add_epi32(before, _mm512_cvtepi16_epi32(half));
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), after) };
        }
    }
}

/// The tables of a chunk of columns for one token: all sums of three activations, each taken -1, 0 or 1 times.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn make_tables(lines: &[Line], chunk: usize, tables: &mut ChunkTables) {
    // Activations with 128 added, past the last one 0 with it; and a byte that is read but counts for nothing.
    let mut values = [128; CHUNK_COLS + 1];
    let places = chunk * CHUNK_COLS..(lines.len() * LINE_BYTES).min((chunk + 1) * CHUNK_COLS);
    let first_line = places.start / LINE_BYTES;
    for (line, values_of_line) in (first_line..).zip(&lines[first_line..places.end.div_ceil(LINE_BYTES)]) {
        let own = places.start.max(line * LINE_BYTES)..places.end.min((line + 1) * LINE_BYTES);
        let bytes = &values_of_line.0[own.start - line * LINE_BYTES..own.end - line * LINE_BYTES];
        for (value, byte) in values[own.start - places.start..].iter_mut().zip(bytes) {
            *value = byte.cast_unsigned() ^ 128;
        }
    }
    let patterns = [load_signed(&PATTERNS[0]), load_signed(&PATTERNS[1])];
    // What 128 added to each comes to.
    let zero = _mm512_setzero_si512();
    let excess = _mm512_set1_epi8(-128);
    let start = [
        _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, excess, patterns[0])),
        _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, excess, patterns[1])),
    ];
    for (i, table) in tables.as_flattened_mut().iter_mut().enumerate() {
        let three = values[INDEX_COLS * i..].first_chunk().unwrap_or(const { &[0; 4] });
        let three = _mm512_set1_epi32(i32::from_le_bytes(*three));
        let low = _mm512_dpbusd_epi32(start[0], three, patterns[0]);
        let high = _mm512_dpbusd_epi32(start[1], three, patterns[1]);
        let entries = _mm512_packs_epi32(low, high);
        // SAFETY: a `Line` is 64 bytes, aligned to 64.
        unsafe { _mm512_store_si512(table.0.as_mut_ptr().cast(), entries) };
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &Register) -> __m512i {
    // SAFETY: reads the 64 bytes of `bytes`.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_signed(bytes: &[i8; 64]) -> __m512i {
    // SAFETY: reads the 64 bytes of `bytes`.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}
