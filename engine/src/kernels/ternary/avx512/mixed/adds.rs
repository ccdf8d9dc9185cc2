//! The rows whose sums are looked up.
//!
//! For 24 columns there are eight tables, which stay in the L1 cache; every row adds an entry of each to its sums. Then
//! come the next 24 columns. Sums have 16 bits, one for each token of a block, and move to totals of 32 before they could overflow.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::super::lookup::{
    CHUNK_STRIPS, GROUP_ROWS, INDEX_COLS, STRIP_BYTES, STRIP_COLS, STRIP_INDICES, STRIP_WORDS,
};
use super::super::super::quantized_rows::Line;
use super::super::super::{Store, TILE_ROWS, TokenScale};
use super::super::load_f32;
use super::super::lookup::locate;
use super::super::panel::transposed;
use super::step::{self, AddRows, DotSteps, Dots, FIRST, LAST, Lookups, MIDDLE, Sums, TABLES, Totals, load};
use super::values::Values;
use super::{BLOCK_TOKENS, Unit};

/// Sets of tables for a strip.
const STRIP_SETS: usize = STRIP_INDICES / TABLES;

/// Sets whose sums are sums of 16 bits.
const CHUNK_SETS: usize = CHUNK_STRIPS * STRIP_SETS;

/// Steps of four columns of a set.
pub(super) const SET_STEPS: usize = TABLES * INDEX_COLS / 4;

const ZEROS: Line = Line([0; 64]);

/// What stays from one call to the next.
pub(super) struct Scratch {
    lookups: Box<Lookups>,
    sums: Vec<Sums>,     // (groups, rows)
    totals: Vec<Totals>, // (groups, rows)
}

impl Default for Scratch {
    fn default() -> Self {
        let lookups = Lookups {
            tables: [[Line([0; 64]); step::TABLE_LINES]; TABLES],
            places: [[0; GROUP_ROWS]; TABLES],
        };
        Self { lookups: Box::new(lookups), sums: Vec::new(), totals: Vec::new() }
    }
}

/// Additions that are still to be done.
pub(super) struct Adds<'a> {
    unit: &'a Unit<'a, 'a>,
    values: &'a Values,
    groups: Range<usize>,
    skipped: usize, // Rows of the first group that are none of ours.
    scratch: &'a mut Scratch,
    n_sets: usize,
    at: Place,
    ready: Range<usize>, // Rows of the group at hand.
}

/// Which rows come next.
#[derive(Clone, Copy)]
struct Place {
    block: usize,
    set: usize, // Of tables.
    group: usize,
}

impl<'a> Adds<'a> {
    /// Those for some rows, which are counted in whole groups through all jobs and end with one.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn new(
        unit: &'a Unit<'_, '_>,
        rows: Range<usize>,
        values: &'a Values,
        scratch: &'a mut Scratch,
    ) -> Self {
        let groups = rows.start / GROUP_ROWS..rows.end / GROUP_ROWS;
        let skipped = rows.start % GROUP_ROWS;
        let n_rows = groups.len() * GROUP_ROWS;
        scratch.sums.resize(n_rows.max(scratch.sums.len()), ZEROS);
        scratch.totals.resize(n_rows.max(scratch.totals.len()), [ZEROS; 2]);
        let n_sets = (values.n_steps() * 4).div_ceil(STRIP_COLS) * STRIP_SETS;
        let at = Place { block: 0, set: 0, group: groups.start };
        let mut adds = Self { unit, values, groups, skipped, scratch, n_sets, at, ready: 0..0 };
        if !adds.groups.is_empty() {
            adds.begin_block();
            adds.begin_set();
            adds.begin_group();
        }
        adds
    }

    /// For how many rows it is known what to add; 0 when all is done.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn n_ready(&mut self) -> usize {
        while self.ready.is_empty() && self.at.block < self.values.n_blocks() && !self.groups.is_empty() {
            self.advance();
        }
        self.ready.len()
    }

    /// Does as many rows as there are `steps`, at most those that are ready, together with these.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn with_steps<const T: usize>(&mut self, dots: &mut Dots<T>, steps: &DotSteps<'_, T>) {
        let place = self.place_of_sums();
        let mut rows = self.take(steps.panel.len());
        match place {
            FIRST => step::both::<T, FIRST>(dots, steps, &mut rows),
            MIDDLE => step::both::<T, MIDDLE>(dots, steps, &mut rows),
            _ => step::both::<T, LAST>(dots, steps, &mut rows),
        }
    }

    /// Does all that is left.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn complete(&mut self) {
        loop {
            let n = self.n_ready();
            if n == 0 {
                return;
            }
            let place = self.place_of_sums();
            let mut rows = self.take(n);
            match place {
                FIRST => step::adds::<FIRST>(&mut rows),
                MIDDLE => step::adds::<MIDDLE>(&mut rows),
                _ => step::adds::<LAST>(&mut rows),
            }
        }
    }

    /// Whether sums begin or end with the set of tables at hand.
    fn place_of_sums(&self) -> u8 {
        match self.at.set % CHUNK_SETS {
            0 => FIRST,
            set if set + 1 == CHUNK_SETS || self.at.set + 1 == self.n_sets => LAST,
            _ => MIDDLE,
        }
    }

    /// The next `n` of the rows that are ready.
    fn take(&mut self, n: usize) -> AddRows<'_> {
        let first = self.ready.start;
        self.ready.start += n;
        let start = (self.at.group - self.groups.start) * GROUP_ROWS + first;
        let Scratch { lookups, sums, totals } = &mut *self.scratch;
        AddRows { lookups, first, sums: &mut sums[start..][..n], totals: &mut totals[start..][..n] }
    }

    /// To the next rows, if there are any.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn advance(&mut self) {
        self.at.group += 1;
        if self.at.group == self.groups.end {
            self.at.group = self.groups.start;
            self.at.set += 1;
            if self.at.set == self.n_sets {
                self.at.set = 0;
                self.finish_block();
                self.at.block += 1;
                if self.at.block == self.values.n_blocks() {
                    return;
                }
                self.begin_block();
            }
            self.begin_set();
        }
        self.begin_group();
    }

    /// No sums yet.
    fn begin_block(&mut self) {
        self.scratch.totals[..self.groups.len() * GROUP_ROWS].fill([ZEROS; 2]);
    }

    /// Makes the tables of the set at hand.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn begin_set(&mut self) {
        let mut columns = [[0; BLOCK_TOKENS]; SET_STEPS * 4];
        for (step, columns) in (self.at.set * SET_STEPS..).zip(columns.as_chunks_mut::<4>().0) {
            let fours = self.values.step(self.at.block, step);
            for (i, column) in columns.iter_mut().enumerate() {
                for (value, four) in column.iter_mut().zip(&fours) {
                    *value = i16::from(four.to_le_bytes()[i].cast_signed());
                }
            }
        }
        for (table, columns) in self.scratch.lookups.tables.iter_mut().zip(columns.as_chunks().0) {
            fill(table, columns);
        }
    }

    /// Makes the rows of the group at hand ready.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn begin_group(&mut self) {
        let Some((_, matrix, group)) = locate(self.unit.jobs, self.at.group) else { return };
        let (strip, half) = (self.at.set / STRIP_SETS, self.at.set % STRIP_SETS);
        let words = &matrix.run(strip / CHUNK_STRIPS, group)[strip % CHUNK_STRIPS];
        fill_places(words, half, &mut self.scratch.lookups.places);
        self.ready = 0..GROUP_ROWS.min(matrix.n_rows() - group * GROUP_ROWS);
        if self.at.group == self.groups.start {
            self.ready.start = self.skipped.min(self.ready.end);
        }
        self.prefetch_next();
    }

    /// Fetches the indices of the group that comes next.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn prefetch_next(&self) {
        let (mut set, mut group) = (self.at.set, self.at.group + 1);
        if group == self.groups.end {
            (set, group) = ((set + 1) % self.n_sets, self.groups.start);
        }
        let Some((_, matrix, group)) = locate(self.unit.jobs, group) else { return };
        let strip = set / STRIP_SETS;
        let words = &matrix.run(strip / CHUNK_STRIPS, group)[strip % CHUNK_STRIPS];
        for line in words.as_chunks::<64>().0 {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
    }

    /// Brings the totals of the block at hand to the outputs.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn finish_block(&self) {
        for (group, totals) in self.groups.clone().zip(self.scratch.totals.chunks_exact(GROUP_ROWS)) {
            for half in 0..2 {
                let first = self.unit.tokens.start + self.at.block * BLOCK_TOKENS + half * TILE_ROWS;
                let tokens = first..self.unit.tokens.end.min(first + TILE_ROWS);
                let skipped = if group == self.groups.start { self.skipped } else { 0 };
                finish(self.unit, (group, skipped), (totals, half), tokens);
            }
        }
    }
}

/// All sums of three columns, each taken -1, 0 or 1 times.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn fill(table: &mut [Sums; step::TABLE_LINES], columns: &[[i16; BLOCK_TOKENS]; INDEX_COLS]) {
    let [a, b, c] = [load_i16(&columns[0]), load_i16(&columns[1]), load_i16(&columns[2])];
    let zero = _mm512_setzero_si512();
    let a = [_mm512_sub_epi16(zero, a), zero, a];
    let b = [_mm512_sub_epi16(zero, b), zero, b];
    let c = [_mm512_sub_epi16(zero, c), zero, c];
    for (nine, c) in table.chunks_exact_mut(9).zip(c) {
        for (three, b) in nine.chunks_exact_mut(3).zip(b) {
            let rest = _mm512_add_epi16(b, c);
            for (sums, a) in three.iter_mut().zip(a) {
                step::store(sums, _mm512_add_epi16(a, rest));
            }
        }
    }
}

/// Half of the indices of a group in a strip, as places of lines in tables.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn fill_places(strip: &[u8; STRIP_BYTES], half: usize, places: &mut [[u16; GROUP_ROWS]; TABLES]) {
    // An index times the 64 bytes of a line.
    const MASK: u16 = 31 << 6;
    let words: &[[[u8; 2]; GROUP_ROWS]] = strip.as_chunks().0.as_chunks().0;
    for (index, places) in (half * TABLES..).zip(places) {
        let (word, place) = (index / 3, index % 3);
        if word == STRIP_WORDS {
            // Bit `i` is the highest of word `i`.
            *places = [0; GROUP_ROWS];
            for (i, words) in words.iter().enumerate() {
                for (place, word) in places.iter_mut().zip(words) {
                    *place |= u16::from_le_bytes(*word) >> 15 << (6 + i);
                }
            }
            continue;
        }
        for (out, word) in places.iter_mut().zip(&words[word]) {
            let word = u16::from_le_bytes(*word);
            *out = MASK
                & match place {
                    0 => word << 6,
                    1 => word << 1,
                    _ => word >> 4,
                };
        }
    }
}

/// Stores what half of the totals of a group come to: the steps of [`super::super::super::output::finished`] on sixteen tokens at once.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn finish(
    unit: &Unit<'_, '_>,
    (group, skipped): (usize, usize),
    (totals, half): (&[Totals], usize),
    tokens: Range<usize>,
) {
    let Some((job, matrix, group)) = locate(unit.jobs, group) else { return };
    let (mut more, mut sums, mut scales) = ([0; TILE_ROWS], [0.0; TILE_ROWS], [1.0; TILE_ROWS]);
    for (i, token) in tokens.clone().enumerate() {
        let TokenScale { sum, scale, .. } = TokenScale::of(unit.acts, token);
        // A code is the weight and 1.
        (more[i], sums[i], scales[i]) = (unit.acts.sum(token), sum, scale);
    }
    let (sums, scales) = (load_f32(&sums), load_f32(&scales));
    // SAFETY: 16 elements of 4 bytes.
    let more = unsafe { _mm512_loadu_si512(more.as_ptr().cast()) };
    let weight_scale = _mm512_set1_ps(job.matrix.scale());
    let first_row = group * GROUP_ROWS;
    let n_rows = matrix.n_rows() - first_row;
    for (tile, totals) in
        totals.chunks_exact(TILE_ROWS).enumerate().take(n_rows.div_ceil(TILE_ROWS)).skip(skipped / TILE_ROWS)
    {
        let mut values = [_mm512_setzero_si512(); TILE_ROWS];
        for (value, totals) in values.iter_mut().zip(totals) {
            let dots = _mm512_cvtepi32_ps(_mm512_add_epi32(load(&totals[half]), more));
            let quotient = _mm512_div_ps(_mm512_sub_ps(dots, sums), scales);
            *value = _mm512_castps_si512(_mm512_mul_ps(quotient, weight_scale));
        }
        let rows = first_row + tile * TILE_ROWS..matrix.n_rows().min(first_row + (tile + 1) * TILE_ROWS);
        let exists = u16::MAX >> (TILE_ROWS - rows.len());
        for (value, token) in transposed(values).into_iter().zip(tokens.clone()) {
            let mut value = _mm512_castsi512_ps(value);
            // SAFETY: only this thread has these tokens of these rows; the reference is gone before the next.
            let out = unsafe { job.out.tile(token, rows.clone()) };
            if job.out.store() == Store::Add {
                // SAFETY: the mask has a bit for each element that there is.
                value = _mm512_add_ps(unsafe { _mm512_maskz_loadu_ps(exists, out.as_ptr()) }, value);
            }
            // SAFETY: as above.
            unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), exists, value) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_i16(values: &[i16; BLOCK_TOKENS]) -> __m512i {
    // SAFETY: 32 elements of 2 bytes.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}
