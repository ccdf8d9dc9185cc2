//! A block of tokens times a part of the rows.

#![expect(
    unsafe_code,
    reason = "calls the instruction set that `KernelSet` has seen; indices that are known to be small"
)]

use std::ops::Range;

use super::codes::{Codes, LINE_BYTES, LINE_COLS, LINE_WORDS};
use super::{
    BATCH_COLS, BATCH_GROUPS, BLOCK_TOKENS, Blocks, GROUP_COLS, Isa, Rows, SMALL_BLOCKS, TABLE_SUMS,
    transposed,
};
use crate::kernels::ternary::output::{TokenScale, exact_f32};
use crate::kernels::ternary::quantized_rows::{BLOCK_LINES, Line, QuantizedRows};
use crate::kernels::ternary::{MatmulJob, TILE_ROWS};

/// The sums that four columns can come to, for each token.
type Table<const T: usize> = [[i16; T]; TABLE_SUMS];

/// Tokens that are brought to the outputs together.
const TILE_TOKENS: usize = 16;

const SMALL: usize = SMALL_BLOCKS[0];
const HALF: usize = SMALL_BLOCKS[1];

/// Room for what a thread computes.
#[derive(Default)]
pub(in super::super) struct Scratch {
    codes: Codes,
    tables: Vec<Line>, // (groups, 81, tokens) of i16
    sums: Vec<Line>,   // (blocks, rows, tokens) of i16
    totals: Vec<Line>, // (blocks, rows, tokens) of i32
    largest: Vec<u16>, // (blocks): what a sum can be by now
}

/// Some tokens times some rows.
pub(super) struct Unit<'a, 'b> {
    pub(super) acts: &'a QuantizedRows,
    pub(super) blocks: Blocks,
    /// Which blocks.
    pub(super) group: Range<usize>,
    pub(super) rows: Rows<'a, 'b>,
    /// Which rows.
    pub(super) part: Range<usize>,
}

impl Unit<'_, '_> {
    /// Multiplies them. Only this thread may have these tokens of these rows.
    pub(super) fn multiply(&self, isa: Isa, scratch: &mut Scratch) {
        match isa {
            // SAFETY: `isa` comes from a `KernelSet`, so that `for_isa` saw AVX2 on this CPU.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { multiply_avx2(self, scratch) },
            _ => multiply(self, scratch),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_avx2(unit: &Unit<'_, '_>, scratch: &mut Scratch) {
    multiply(unit, scratch);
}

/// Compiled once for each instruction set, which makes vectors of it. (Advanced SIMD is always there on ARM.)
#[inline(always)]
fn multiply(unit: &Unit<'_, '_>, scratch: &mut Scratch) {
    let n_rows = unit.part.len();
    scratch.reset(n_rows, unit.group.len());
    for line in 0..unit.acts.n_cols().div_ceil(LINE_COLS) {
        unit.fill_codes(line, scratch);
        for block in 0..unit.group.len() {
            match unit.tokens(block).len() {
                n if n <= SMALL => add_line::<SMALL>(unit, block, line, scratch),
                n if n <= HALF => add_line::<HALF>(unit, block, line, scratch),
                _ => add_line::<BLOCK_TOKENS>(unit, block, line, scratch),
            }
        }
    }
    for block in 0..unit.group.len() {
        match unit.tokens(block).len() {
            n if n <= SMALL => finish_block::<SMALL>(unit, block, scratch),
            n if n <= HALF => finish_block::<HALF>(unit, block, scratch),
            _ => finish_block::<BLOCK_TOKENS>(unit, block, scratch),
        }
    }
}

impl Scratch {
    /// No sums yet.
    fn reset(&mut self, n_rows: usize, n_blocks: usize) {
        const ZEROS: Line = Line([0; 64]);
        let (sum_lines, total_lines) = (n_blocks * n_rows, 2 * n_blocks * n_rows);
        for (lines, n) in [(&mut self.sums, sum_lines), (&mut self.totals, total_lines)] {
            lines.resize(n.max(lines.len()), ZEROS);
            lines[..n].fill(ZEROS);
        }
        self.tables.resize(BATCH_GROUPS * TABLE_SUMS, ZEROS);
        self.largest.clear();
        self.largest.resize(n_blocks, 0);
        self.codes.reset(n_rows);
    }
}

impl Unit<'_, '_> {
    /// The tokens of a block of the group: at most [`BLOCK_TOKENS`].
    #[inline(always)]
    fn tokens(&self, block: usize) -> Range<usize> {
        self.blocks.get(self.group.start + block)
    }

    /// Brings a line of every row into codes.
    #[inline(always)]
    fn fill_codes(&self, line: usize, Scratch { codes, totals, .. }: &mut Scratch) {
        for (job, place, rows) in self.rows.pieces(self.part.clone()) {
            codes.fill(bytes_of(job, rows), line * LINE_BYTES, place, |row, col| {
                self.add_once_more(row, col, totals);
            });
        }
    }

    /// Adds the activations of a column to the totals of a row.
    #[cold]
    fn add_once_more(&self, row: usize, col: usize, totals: &mut [Line]) {
        for block in 0..self.group.len() {
            let (tokens, start) = (self.tokens(block), block * self.part.len());
            let values = tokens.clone().map(|token| i32::from(self.acts.value(token, col)));
            match tokens.len() {
                n if n <= SMALL => {
                    add_values(&mut room::<[i32; SMALL]>(&mut totals[2 * start..], row + 1)[row], values)
                }
                n if n <= HALF => {
                    add_values(&mut room::<[i32; HALF]>(&mut totals[2 * start..], row + 1)[row], values)
                }
                _ => add_values(
                    &mut room::<[i32; BLOCK_TOKENS]>(&mut totals[2 * start..], row + 1)[row],
                    values,
                ),
            }
        }
    }
}

/// Some rows of a matrix, and bytes of one.
fn bytes_of<'a>(job: &MatmulJob<'a>, rows: Range<usize>) -> (&'a [u8], usize) {
    let row_bytes = job.matrix.row_bytes();
    (&job.matrix.blocks()[rows.start * row_bytes..rows.end * row_bytes], row_bytes)
}

fn add_values(totals: &mut [i32], values: impl Iterator<Item = i32>) {
    totals.iter_mut().zip(values).for_each(|(total, value)| *total += value);
}

/// Adds what a line of weights comes to.
#[inline(always)]
fn add_line<const T: usize>(unit: &Unit<'_, '_>, block: usize, line: usize, scratch: &mut Scratch) {
    let n_rows = unit.part.len();
    let tables: &mut [Table<T>] = room(&mut scratch.tables, BATCH_GROUPS);
    let sums: &mut [[i16; T]] = room(&mut scratch.sums[block * n_rows..], n_rows);
    let totals: &mut [[i32; T]] = room(&mut scratch.totals[2 * block * n_rows..], n_rows);
    let largest = &mut scratch.largest[block];
    let lines = lines_of::<T>(unit.acts, &unit.tokens(block), line);
    let n_words = (unit.acts.n_cols() / BATCH_COLS - line * LINE_WORDS).min(LINE_WORDS);
    for word in 0..n_words {
        let values = values::<T>(&lines, word);
        let more = magnitude(&values);
        if *largest + more > i16::MAX.cast_unsigned() {
            add_up(totals, sums);
            *largest = 0;
        }
        *largest += more;
        for (table, values) in tables.iter_mut().zip(&values) {
            fill(table, values);
        }
        // SAFETY: `codes` has indices of tables.
        unsafe { look_up(tables, scratch.codes.batch(word, n_rows), sums) };
    }
}

/// Brings the sums of a block to the outputs.
#[inline(always)]
fn finish_block<const T: usize>(unit: &Unit<'_, '_>, block: usize, scratch: &mut Scratch) {
    let n_rows = unit.part.len();
    let sums: &mut [[i16; T]] = room(&mut scratch.sums[block * n_rows..], n_rows);
    let totals: &mut [[i32; T]] = room(&mut scratch.totals[2 * block * n_rows..], n_rows);
    add_up(totals, sums);
    for (job, place, rows) in unit.rows.pieces(unit.part.clone()) {
        finish::<T>(unit, &unit.tokens(block), job, &totals[place..place + rows.len()], rows.start);
    }
}

/// The activations of a block of tokens at the columns of a line of weights. Past the last token it repeats that.
#[inline(always)]
fn lines_of<'a, const T: usize>(
    acts: &'a QuantizedRows,
    tokens: &Range<usize>,
    line: usize,
) -> [&'a [Line; BLOCK_LINES]; T] {
    let mut lines = [&[Line([0; 64]); BLOCK_LINES]; T];
    for (token, lines) in (tokens.start..).zip(&mut lines) {
        if let Some(block) = acts.lines(token.min(tokens.end - 1)).as_chunks().0.get(line) {
            *lines = block;
        }
    }
    lines
}

/// Those of a batch: for each group those of its columns for each token.
#[inline(always)]
fn values<const T: usize>(
    lines: &[&[Line; BLOCK_LINES]; T],
    word: usize,
) -> [[[i16; T]; GROUP_COLS]; BATCH_GROUPS] {
    // The columns of a group are 32 apart: at the same place of all four lines.
    let mut words = [[0; T]; GROUP_COLS];
    for (token, lines) in lines.iter().enumerate() {
        for (words, line) in words.iter_mut().zip(*lines) {
            let bytes = line.0.as_chunks::<BATCH_GROUPS>().0[word % LINE_WORDS];
            words[token] = u64::from_le_bytes(bytes.map(i8::cast_unsigned));
        }
    }
    let mut values = [[[0; T]; GROUP_COLS]; BATCH_GROUPS];
    for (group, values) in values.iter_mut().enumerate() {
        for (values, words) in values.iter_mut().zip(&words) {
            for (value, word) in values.iter_mut().zip(words) {
                *value = i16::from((word >> (8 * group)).to_le_bytes()[0].cast_signed());
            }
        }
    }
    values
}

/// How large a sum over the batch can be, for any weights and token.
#[inline(always)]
fn magnitude<const T: usize>(values: &[[[i16; T]; GROUP_COLS]; BATCH_GROUPS]) -> u16 {
    let mut magnitudes = [0_u16; T];
    for values in values.as_flattened() {
        for (magnitude, value) in magnitudes.iter_mut().zip(values) {
            *magnitude += value.unsigned_abs();
        }
    }
    magnitudes.into_iter().max().unwrap_or(0)
}

/// Computes a table. The column that comes last in `values` has the lowest digit.
#[inline(always)]
fn fill<const T: usize>(table: &mut Table<T>, [a, b, c, d]: &[[i16; T]; GROUP_COLS]) {
    let (high, low) = (pair(a, b), pair(c, d));
    for (table, high) in table.as_chunks_mut::<PAIR_SUMS>().0.iter_mut().zip(&high) {
        for (sum, low) in table.iter_mut().zip(&low) {
            *sum = plus(high, low);
        }
    }
}

/// Sums of two weights that are -1, 0 or 1.
const PAIR_SUMS: usize = 9;

/// The sums of two columns, by 3 * (weight of `a` + 1) + (weight of `b` + 1).
#[inline(always)]
fn pair<const T: usize>(a: &[i16; T], b: &[i16; T]) -> [[i16; T]; PAIR_SUMS] {
    let none = [0; T];
    let (less_a, less_b) = (minus(&none, a), minus(&none, b));
    [minus(&less_a, b), less_a, minus(b, a), less_b, none, *b, minus(a, b), *a, plus(a, b)]
}

#[inline(always)]
fn plus<const T: usize>(a: &[i16; T], b: &[i16; T]) -> [i16; T] {
    let mut sums = [0; T];
    for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
        *sum = a.wrapping_add(*b);
    }
    sums
}

#[inline(always)]
fn minus<const T: usize>(a: &[i16; T], b: &[i16; T]) -> [i16; T] {
    let mut differences = [0; T];
    for (difference, (a, b)) in differences.iter_mut().zip(a.iter().zip(b)) {
        *difference = a.wrapping_sub(*b);
    }
    differences
}

/// Adds what eight tables have for the codes of each row.
///
/// # Safety
/// Every byte of `codes` is below [`TABLE_SUMS`].
#[inline(always)]
unsafe fn look_up<const T: usize>(tables: &[Table<T>], codes: &[u64], sums: &mut [[i16; T]]) {
    assert_eq!(tables.len(), BATCH_GROUPS, "a table for each byte");
    for (codes, sums) in codes.iter().zip(sums) {
        let mut sum = *sums;
        for (group, table) in tables.iter().enumerate() {
            let index = usize::from((codes >> (8 * group)).to_le_bytes()[0]);
            // SAFETY: the caller's promise.
            let entry = unsafe { table.get_unchecked(index) };
            for (sum, entry) in sum.iter_mut().zip(entry) {
                *sum = sum.wrapping_add(*entry);
            }
        }
        *sums = sum;
    }
}

/// Moves sums to where there is more room.
#[inline(always)]
fn add_up<const T: usize>(totals: &mut [[i32; T]], sums: &mut [[i16; T]]) {
    for (totals, sums) in totals.iter_mut().zip(sums) {
        for (total, sum) in totals.iter_mut().zip(&*sums) {
            *total += i32::from(*sum);
        }
        *sums = [0; T];
    }
}

/// Brings sums of rows from `first_row` of a matrix to its output.
#[inline(always)]
fn finish<const T: usize>(
    unit: &Unit<'_, '_>,
    block: &Range<usize>,
    job: &MatmulJob<'_>,
    totals: &[[i32; T]],
    first_row: usize,
) {
    for first in (0..block.len()).step_by(TILE_TOKENS) {
        let tokens = block.start + first..block.end.min(block.start + first + TILE_TOKENS);
        let (mut code_sums, mut sums, mut scales) =
            ([0; TILE_TOKENS], [0.0; TILE_TOKENS], [1.0; TILE_TOKENS]);
        for (place, token) in tokens.clone().enumerate() {
            let TokenScale { sum, scale, .. } = TokenScale::of(unit.acts, token);
            (code_sums[place], sums[place], scales[place]) = (unit.acts.sum(token), sum, scale);
        }
        let scale = job.matrix.scale();
        for (tile, totals) in totals.chunks(TILE_ROWS).enumerate() {
            let mut values = [[0.0; TILE_TOKENS]; TILE_ROWS];
            for (values, totals) in values.iter_mut().zip(totals) {
                let n = TILE_TOKENS.min(T);
                for token in 0..n {
                    // A code is the weight and 1.
                    let dot = exact_f32(totals[first + token] + code_sums[token]);
                    values[token] = (dot - sums[token]) / scales[token] * scale;
                }
            }
            let rows = first_row + tile * TILE_ROWS..first_row + tile * TILE_ROWS + totals.len();
            for (values, token) in transposed(&values).iter().zip(tokens.clone()) {
                // SAFETY: the caller promises that this thread alone has these rows of this token.
                unsafe { job.out.store_tile(token, rows.clone(), values) };
            }
        }
    }
}

/// The first `n` elements of a buffer.
#[inline(always)]
fn room<E: Number>(lines: &mut [Line], n: usize) -> &mut [E] {
    // SAFETY: a `Number` may be any bytes, and is aligned to less than a line.
    let (before, elements, _) = unsafe { lines.align_to_mut() };
    assert!(before.is_empty(), "lines are aligned");
    &mut elements[..n]
}

/// Arrays of integers.
///
/// # Safety
/// Every pattern of bytes is one.
unsafe trait Number {}
// SAFETY: they are.
unsafe impl<const T: usize> Number for [i16; T] {}
// SAFETY: they are.
unsafe impl<const T: usize> Number for [i32; T] {}
// SAFETY: they are.
unsafe impl<const T: usize> Number for Table<T> {}
