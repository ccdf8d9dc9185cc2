//! The innermost loops: a step of products, the additions for a row, and both at once.

use std::arch::x86_64::*;

use super::super::super::lookup::GROUP_ROWS;
use super::super::super::quantized_rows::Line;

/// Registers of rows in a panel.
pub(super) const TILES: usize = 2;

/// Tables that are used together.
pub(super) const TABLES: usize = 8;

/// Lines of a table: an index has five bits. Only 27 are used.
pub(super) const TABLE_LINES: usize = 32;

/// Sums of 16 bits, one for each token of a block.
pub(super) type Sums = Line;

/// The same in 32 bits.
pub(super) type Totals = [Line; 2];

/// Accumulators of `T` tokens.
pub(super) type Dots<const T: usize> = [[__m512i; TILES]; T];

/// What is added for the rows of a group: its indices, as places in tables in bytes, and the tables.
#[repr(C, align(64))]
pub(super) struct Lookups {
    pub(super) tables: [[Sums; TABLE_LINES]; TABLES],
    pub(super) places: [[u16; GROUP_ROWS]; TABLES],
}

/// Sums start from zero here.
pub(super) const FIRST: u8 = 0;
/// Sums go on.
pub(super) const MIDDLE: u8 = 1;
/// Sums go on, and then into the totals.
pub(super) const LAST: u8 = 2;

/// Some rows of a group.
pub(super) struct AddRows<'a> {
    pub(super) lookups: &'a Lookups,
    pub(super) first: usize,
    pub(super) sums: &'a mut [Sums],
    pub(super) totals: &'a mut [Totals],
}

/// Some steps of a panel and of the values of `T` tokens.
pub(super) struct DotSteps<'a, const T: usize> {
    pub(super) panel: &'a [[Line; TILES]],
    pub(super) values: &'a [[i32; T]],
}

impl<'a, const T: usize> DotSteps<'a, T> {
    /// The first `n`, and those that follow.
    pub(super) fn split_at(&self, n: usize) -> (Self, Self) {
        let (panel, later_panel) = self.panel.split_at(n);
        let (values, later_values) = self.values.split_at(n);
        (Self { panel, values }, Self { panel: later_panel, values: later_values })
    }
}

/// Products alone.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn dots<const T: usize>(dots: &mut Dots<T>, steps: &DotSteps<'_, T>) {
    let mut sums = *dots;
    for (codes, values) in steps.panel.iter().zip(steps.values) {
        multiply(&mut sums, codes, values);
    }
    *dots = sums;
}

/// Additions alone.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn adds<const PLACE: u8>(rows: &mut AddRows<'_>) {
    let n = rows.sums.len();
    assert!(rows.first + n <= GROUP_ROWS && rows.totals.len() == n, "{n} rows from {}", rows.first);
    for row in 0..n {
        // SAFETY: `row < n` (asserted above).
        unsafe { add::<PLACE>(rows, row) };
    }
}

/// A step of products with the additions for a row, as many times as there are of both.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn both<const T: usize, const PLACE: u8>(
    dots: &mut Dots<T>,
    steps: &DotSteps<'_, T>,
    rows: &mut AddRows<'_>,
) {
    let n = rows.sums.len();
    assert!(rows.first + n <= GROUP_ROWS && rows.totals.len() == n, "{n} rows from {}", rows.first);
    assert!(steps.panel.len() == n && steps.values.len() == n, "as many steps as rows");
    let mut sums = *dots;
    for row in 0..n {
        // SAFETY: `row < n` (asserted above).
        let codes = unsafe { steps.panel.get_unchecked(row) };
        // SAFETY: as above.
        let values = unsafe { steps.values.get_unchecked(row) };
        multiply(&mut sums, codes, values);
        // SAFETY: `row < n` (asserted above).
        unsafe { add::<PLACE>(rows, row) };
    }
    *dots = sums;
}

/// Adds the products of four columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply<const T: usize>(sums: &mut Dots<T>, codes: &[Line; TILES], values: &[i32; T]) {
    let codes = [load(&codes[0]), load(&codes[1])];
    for (sums, four) in sums.iter_mut().zip(values) {
        let four = _mm512_set1_epi32(*four);
        for (sum, codes) in sums.iter_mut().zip(codes) {
            *sum = _mm512_dpbusd_epi32(*sum, codes, four);
        }
    }
}

/// Adds what the tables have for row `row` of `rows`.
///
/// # Safety
/// There are sums and totals of such a row, and it is of the group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn add<const PLACE: u8>(rows: &mut AddRows<'_>, row: usize) {
    // SAFETY: the caller's promise.
    let sums = unsafe { rows.sums.get_unchecked_mut(row) };
    let mut sum = if PLACE == FIRST { _mm512_setzero_si512() } else { load(sums) };
    for (table, places) in rows.lookups.tables.iter().zip(&rows.lookups.places) {
        // SAFETY: the caller's promise.
        let place = usize::from(unsafe { *places.get_unchecked(rows.first + row) });
        debug_assert!(place.is_multiple_of(64) && place / 64 < TABLE_LINES, "place {place} in a table");
        let entry = table.as_ptr().cast::<u8>().wrapping_add(place);
        // SAFETY: an index has five bits, so that its line is one of the table.
        let entry = unsafe { _mm512_load_si512(entry.cast()) };
        sum = _mm512_add_epi16(sum, entry);
    }
    if PLACE == LAST {
        // SAFETY: the caller's promise.
        let totals = unsafe { rows.totals.get_unchecked_mut(row) };
        let halves = [_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64::<1>(sum)];
        for (total, half) in totals.iter_mut().zip(halves) {
            store(total, _mm512_add_epi32(load(total), _mm512_cvtepi16_epi32(half)));
        }
    } else {
        store(sums, sum);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(line: &Line) -> __m512i {
    // SAFETY: a `Line` is 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512(std::ptr::from_ref(line).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(line: &mut Line, register: __m512i) {
    // SAFETY: a `Line` is 64 bytes, aligned to 64.
    unsafe { _mm512_store_si512(std::ptr::from_mut(line).cast(), register) };
}
