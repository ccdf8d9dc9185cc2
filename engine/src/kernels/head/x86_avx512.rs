//! Sums of two-bit codes times int8 with `vpdpbusd` on zmm.
#![expect(unsafe_code, reason = "vector loads")]

use std::arch::x86_64::*;

use crate::kernels::x86_avx512::horizontal_sums;

/// How far ahead codes are fetched into the L2 cache: rows follow each other without a gap.
const PREFETCH_BYTES: usize = 10 << 10;

/// As [`super::scalar::sums`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn sums<const R: usize, const T: usize>(rows: [&[u8]; R], x: [&[i8]; T]) -> [[i32; T]; R] {
    let rows = rows.map(|row| row.as_chunks::<64>().0);
    let n = rows.iter().map(|row| row.len()).min().unwrap_or(0);
    let rows = rows.map(|row| &row[..n]);
    let x = x.map(|x| &x.as_chunks::<256>().0[..n]);
    let acc = if T == 1 { products_of_one(rows, x) } else { products(rows, x) };
    let mut sums = [[0; T]; R];
    for (sums, acc) in sums.as_flattened_mut().chunks_mut(4).zip(acc.as_flattened().chunks(4)) {
        let mut four = [_mm512_setzero_si512(); 4];
        four[..acc.len()].copy_from_slice(acc);
        sums.copy_from_slice(&across(four, acc.len())[..acc.len()]);
    }
    sums
}

/// Products of rows with some inputs, to be summed across.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn products<const R: usize, const T: usize>(
    rows: [&[[u8; 64]]; R],
    x: [&[[i8; 256]]; T],
) -> [[__m512i; T]; R] {
    let mask = _mm512_set1_epi8(3);
    let mut acc = [[_mm512_setzero_si512(); T]; R];
    for i in 0..rows[0].len() {
        let mut places = [[_mm512_setzero_si512(); 4]; R];
        for r in 0..R {
            let codes = fetched(&rows[r][i], R > 1);
            places[r] = [
                _mm512_and_si512(codes, mask),
                _mm512_and_si512(_mm512_srli_epi16::<2>(codes), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask),
                _mm512_and_si512(_mm512_srli_epi16::<6>(codes), mask),
            ];
        }
        for t in 0..T {
            let inputs = x[t][i].as_chunks::<64>().0;
            for place in 0..4 {
                let inputs = load_inputs(&inputs[place]);
                for r in 0..R {
                    acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], places[r][place], inputs);
                }
            }
        }
    }
    acc
}

/// As [`products`] of one input, which leaves registers for a sum of each place: codes are not shifted, and the power of four is
/// divided out at the end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn products_of_one<const R: usize, const T: usize>(
    rows: [&[[u8; 64]]; R],
    x: [&[[i8; 256]]; T],
) -> [[__m512i; T]; R] {
    let masks =
        [_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30), _mm512_set1_epi8(-0x40)];
    let mut acc = [[_mm512_setzero_si512(); 4]; R];
    for i in 0..rows[0].len() {
        let mut codes = [_mm512_setzero_si512(); R];
        for r in 0..R {
            codes[r] = fetched(&rows[r][i], R > 1);
        }
        let inputs = x[0][i].as_chunks::<64>().0;
        for place in 0..4 {
            let inputs = load_inputs(&inputs[place]);
            for r in 0..R {
                let place_codes = _mm512_and_si512(codes[r], masks[place]);
                acc[r][place] = _mm512_dpbusd_epi32(acc[r][place], place_codes, inputs);
            }
        }
    }
    let mut sums = [[_mm512_setzero_si512(); T]; R];
    for r in 0..R {
        let low = _mm512_add_epi32(acc[r][0], _mm512_srai_epi32::<2>(acc[r][1]));
        let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(acc[r][2]), _mm512_srai_epi32::<6>(acc[r][3]));
        sums[r][0] = _mm512_add_epi32(low, high);
    }
    sums
}

/// A line of codes. What lies some rows behind it is fetched meanwhile: a tile is too short for the hardware to find out that tiles
/// follow each other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn fetched(line: &[u8; 64], fetches: bool) -> __m512i {
    if fetches {
        _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().wrapping_add(PREFETCH_BYTES).cast());
    }
    load_codes(line)
}

/// The sums of the lanes of the first `n` registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn across([a, b, c, d]: [__m512i; 4], n: usize) -> [i32; 4] {
    if n == 1 { [_mm512_reduce_add_epi32(a), 0, 0, 0] } else { horizontal_sums(a, b, c, d) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn load_codes(v: &[u8; 64]) -> __m512i {
    // SAFETY: reads the 64 bytes of `v`.
    unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn load_inputs(v: &[i8; 64]) -> __m512i {
    // SAFETY: reads the 64 bytes of `v`.
    unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
}
