//! Sums of codes times int8 with `vpdpbusd` on zmm.
#![expect(unsafe_code, reason = "vector loads")]

use std::arch::x86_64::*;

/// As [`super::scalar::sums`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn sums<const R: usize, const T: usize>(rows: [&[u8]; R], x: [&[i8]; T]) -> [[i32; T]; R] {
    let rows = rows.map(|row| row.as_chunks::<64>().0);
    let n = rows.iter().map(|row| row.len()).min().unwrap_or(0);
    let rows = rows.map(|row| &row[..n]);
    let x = x.map(|x| &x.as_chunks::<128>().0[..n]);
    if let [x] = x[..] {
        // One after the other: a single stream of memory, which the hardware sees coming.
        return rows.map(|row| [row_sum(row, x); T]);
    }
    let mask = _mm512_set1_epi8(15);
    let mut acc = [[_mm512_setzero_si512(); T]; R];
    for i in 0..n {
        let mut inputs = [[_mm512_setzero_si512(); 2]; T];
        for t in 0..T {
            let halves = x[t][i].as_chunks::<64>().0;
            inputs[t] = [load_inputs(&halves[0]), load_inputs(&halves[1])];
        }
        for r in 0..R {
            // The tiles of a thread follow each other, each too short for the hardware to find out.
            _mm_prefetch::<_MM_HINT_T0>(rows[r].as_ptr().wrapping_add(R * n + i).cast());
            let codes = load_codes(&rows[r][i]);
            let low = _mm512_and_si512(codes, mask);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask);
            for t in 0..T {
                acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], low, inputs[t][0]);
                acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], high, inputs[t][1]);
            }
        }
    }
    let mut sums = [[0; T]; R];
    for r in 0..R {
        for t in 0..T {
            sums[r][t] = _mm512_reduce_add_epi32(acc[r][t]);
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn row_sum(row: &[[u8; 64]], x: &[[i8; 128]]) -> i32 {
    let mask = _mm512_set1_epi8(15);
    let mut acc = [_mm512_setzero_si512(); 2];
    for (codes, x) in row.iter().zip(x) {
        let codes = load_codes(codes);
        let halves = x.as_chunks::<64>().0;
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask);
        acc[0] = _mm512_dpbusd_epi32(acc[0], _mm512_and_si512(codes, mask), load_inputs(&halves[0]));
        acc[1] = _mm512_dpbusd_epi32(acc[1], high, load_inputs(&halves[1]));
    }
    _mm512_reduce_add_epi32(_mm512_add_epi32(acc[0], acc[1]))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn load_codes(v: &[u8; 64]) -> __m512i {
    // SAFETY: reads the 64 bytes of `v`.
    unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn load_inputs(v: &[i8; 64]) -> __m512i {
    // SAFETY: reads the 64 bytes of `v`.
    unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
}
