//! Sums of two-bit codes times int8 with `vpmaddubsw` on ymm.
#![expect(unsafe_code, reason = "vector loads")]

use std::arch::x86_64::*;

/// As [`super::scalar::sums`].
#[target_feature(enable = "avx2")]
pub(super) fn sums<const R: usize, const T: usize>(rows: [&[u8]; R], x: [&[i8]; T]) -> [[i32; T]; R] {
    let mut sums = [[0; T]; R];
    for r in 0..R {
        sums[r] = row_sums(rows[r], x);
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2")]
fn row_sums<const T: usize>(row: &[u8], x: [&[i8]; T]) -> [i32; T] {
    let row = row.as_chunks::<64>().0;
    let x = x.map(|x| &x.as_chunks::<256>().0[..row.len()]);
    let mask = _mm256_set1_epi8(3);
    let ones = _mm256_set1_epi16(1);
    let mut acc = [_mm256_setzero_si256(); T];
    for (i, codes) in row.iter().enumerate() {
        for (half, codes) in codes.as_chunks::<32>().0.iter().enumerate() {
            let codes = load_codes(codes);
            let places = [
                _mm256_and_si256(codes, mask),
                _mm256_and_si256(_mm256_srli_epi16::<2>(codes), mask),
                _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask),
                _mm256_and_si256(_mm256_srli_epi16::<6>(codes), mask),
            ];
            for t in 0..T {
                let x = x[t][i].as_chunks::<32>().0;
                // Four products of two terms, each at most 2 * 3 * 128 in magnitude: 3072 fits an i16.
                let mut sum = _mm256_setzero_si256();
                for place in 0..4 {
                    let products = _mm256_maddubs_epi16(places[place], load_inputs(&x[2 * place + half]));
                    sum = _mm256_add_epi16(sum, products);
                }
                acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(sum, ones));
            }
        }
    }
    let mut sums = [0; T];
    for t in 0..T {
        let v = _mm_add_epi32(_mm256_castsi256_si128(acc[t]), _mm256_extracti128_si256::<1>(acc[t]));
        let v = _mm_add_epi32(v, _mm_unpackhi_epi64(v, v));
        sums[t] = _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<1>(v)));
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_codes(v: &[u8; 32]) -> __m256i {
    // SAFETY: reads the 32 bytes of `v`.
    unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_inputs(v: &[i8; 32]) -> __m256i {
    // SAFETY: reads the 32 bytes of `v`.
    unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
}
