//! One token times five codes to a byte: the last digit by comparison, the other four by a table lookup.
//!
//! The table gives the four codes at two bits each, which are multiplied unshifted as in the parent module.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::MatmulJob;
use super::super::five::{FiveMatrix, GROUP_BYTES, GROUP_LINES};
use super::super::output::finished;
use super::super::quantized_rows::Line;
use super::{PREFETCH_BYTES, QuantizedRows, TILE_ROWS, TokenScale, combined};
use crate::kernels::x86_avx512::horizontal_sums;

/// Two bits for each of the four digits of 0..81.
const CODES: [u8; 128] = {
    let mut codes = [0; 128];
    let mut i: u8 = 0;
    while i < 81 {
        codes[i as usize] = (i % 3) | ((i / 3 % 3) << 2) | ((i / 9 % 3) << 4) | ((i / 27) << 6);
        i += 1;
    }
    codes
};

/// Activations of a token, five lines at a time.
struct Values<'a> {
    full: &'a [[Line; GROUP_LINES]],
    /// The lines after the last five, with zeros.
    last: Option<[Line; GROUP_LINES]>,
}

impl<'a> Values<'a> {
    fn of(lines: &'a [Line]) -> Self {
        let (full, rest) = lines.as_chunks();
        let last = (!rest.is_empty()).then(|| {
            let mut last = [Line([0; 64]); GROUP_LINES];
            last[..rest.len()].copy_from_slice(rest);
            last
        });
        Self { full, last }
    }
}

/// Multiplies some rows of a job with one token. Only this thread may have them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub(in super::super) fn gemv(
    job: &MatmulJob<'_>,
    five: FiveMatrix<'_>,
    acts: &QuantizedRows,
    rows: Range<usize>,
) {
    let values = Values::of(acts.lines(0));
    let token = TokenScale::of(acts, 0);
    for tile in rows.clone().step_by(TILE_ROWS) {
        let tile = tile..rows.end.min(tile + TILE_ROWS);
        let dots = tile_dots(five, tile.clone(), &values);
        // SAFETY: the caller promises that this thread alone has these rows.
        unsafe { job.out.finish_dots(tile.clone(), &dots, token, job.matrix.scale()) };
    }
}

/// The same for a gate and what it gates: rows whose gate is not above zero become 0 and are not read.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub(in super::super) fn gemv_gated(
    [gate, up]: [(&MatmulJob<'_>, FiveMatrix<'_>); 2],
    acts: &QuantizedRows,
    rows: Range<usize>,
) {
    let values = Values::of(acts.lines(0));
    let token = TokenScale::of(acts, 0);
    let mut open = OpenRows::default();
    for tile in rows.clone().step_by(TILE_ROWS) {
        let tile = tile..rows.end.min(tile + TILE_ROWS);
        let dots = tile_dots(gate.1, tile.clone(), &values);
        // SAFETY: the caller promises that this thread alone has these rows.
        unsafe { gate.0.out.finish_dots(tile.clone(), &dots, token, gate.0.matrix.scale()) };
        // SAFETY: as above; the reference is gone before anything else touches these rows.
        let gates = unsafe { gate.0.out.tile(0, tile.clone()) };
        let mut next = OpenRows::default();
        for (row, gate) in tile.clone().zip(gates) {
            if *gate <= 0.0 {
                continue;
            }
            next.push(row);
            for line in up.1.row(row) {
                _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
            }
        }
        // SAFETY: as above.
        unsafe { up.0.out.tile(0, tile) }.fill(0.0);
        // Of the tile before: what was fetched then is here now.
        multiply_open(up, &open, &values, token);
        open = next;
    }
    multiply_open(up, &open, &values, token);
}

/// Rows of a tile that are wanted.
#[derive(Default)]
struct OpenRows {
    rows: [usize; TILE_ROWS],
    n: usize,
}

impl OpenRows {
    fn push(&mut self, row: usize) {
        self.rows[self.n] = row;
        self.n += 1;
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn multiply_open(
    (job, five): (&MatmulJob<'_>, FiveMatrix<'_>),
    open: &OpenRows,
    values: &Values<'_>,
    token: TokenScale,
) {
    for rows in open.rows[..open.n].chunks(4) {
        let mut sums = [[_mm512_setzero_si512(); 2]; 4];
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum = row_sums(five.row(*row), values, std::ptr::null());
        }
        let values = finished(four_dots(sums), token, job.matrix.scale());
        for (row, value) in rows.iter().zip(values) {
            // SAFETY: the caller of the caller promises that this thread alone has these rows.
            let out = unsafe { job.out.tile(0, *row..row + 1) };
            out[0] = value;
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn tile_dots(five: FiveMatrix<'_>, tile: Range<usize>, values: &Values<'_>) -> [i32; TILE_ROWS] {
    let mut dots = [0; TILE_ROWS];
    for (quad, dots) in dots.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut sums = [[_mm512_setzero_si512(); 2]; 4];
        for (row, sum) in (tile.start + 4 * quad..tile.end).zip(&mut sums) {
            let row = five.row(row);
            *sum = row_sums(row, values, row.as_ptr().cast::<u8>().wrapping_add(PREFETCH_BYTES));
        }
        *dots = four_dots(sums);
    }
    dots
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn four_dots([a, b, c, d]: [[__m512i; 2]; 4]) -> [i32; 4] {
    let mut dots = horizontal_sums(a[0], b[0], c[0], d[0]);
    let last_dots = horizontal_sums(a[1], b[1], c[1], d[1]);
    for (dot, last) in dots.iter_mut().zip(last_dots) {
        *dot += last / 81;
    }
    dots
}

/// Sums, not yet horizontal, of a row: of the first four digits, and 81 times those of the last. What lies at
/// `upcoming` is fetched meanwhile, as much as the row has.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn row_sums(row: &[[u8; GROUP_BYTES]], values: &Values<'_>, upcoming: *const u8) -> [__m512i; 2] {
    let mut sums = [_mm512_setzero_si512(); GROUP_LINES];
    let mut upcoming = upcoming;
    for (group, values) in row.iter().zip(values.full) {
        if !upcoming.is_null() {
            _mm_prefetch::<_MM_HINT_T1>(upcoming.cast());
            upcoming = upcoming.wrapping_add(GROUP_BYTES);
        }
        add_group(&mut sums, group, values);
    }
    if let (Some(last), Some(group)) = (&values.last, row.get(values.full.len())) {
        _mm_prefetch::<_MM_HINT_T1>(upcoming.cast());
        add_group(&mut sums, group, last);
    }
    let [a, b, c, d, fifth] = sums;
    [combined([a, b, c, d]), fifth]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn add_group(sums: &mut [__m512i; GROUP_LINES], group: &[u8; GROUP_BYTES], values: &[Line; GROUP_LINES]) {
    let table = [load(CODES.first_chunk().unwrap_or(group)), load(CODES.last_chunk().unwrap_or(group))];
    let digits = load(group);
    // Subtracting wraps around where there is too little to subtract from, so that the smaller one is right.
    let rest = _mm512_min_epu8(digits, _mm512_sub_epi8(digits, _mm512_set1_epi8(162_u8.cast_signed())));
    let rest = _mm512_min_epu8(rest, _mm512_sub_epi8(rest, _mm512_set1_epi8(81)));
    let packed = _mm512_permutex2var_epi8(table[0], rest, table[1]);
    let masks = super::masks();
    for place in 0..4 {
        let codes = _mm512_and_si512(packed, masks[place]);
        sums[place] = _mm512_dpbusd_epi32(sums[place], codes, load_values(&values[place]));
    }
    // 81 times the last digit.
    sums[4] = _mm512_dpbusd_epi32(sums[4], _mm512_sub_epi8(digits, rest), load_values(&values[4]));
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; GROUP_BYTES]) -> __m512i {
    // SAFETY: reads the 64 bytes of `bytes`.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_values(line: &Line) -> __m512i {
    // SAFETY: a `Line` is 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}
