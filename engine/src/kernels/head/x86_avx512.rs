//! Sums of two-bit codes times int8 with `vpdpbusd` on zmm.
#![expect(unsafe_code, reason = "vector loads")]

use std::arch::x86_64::*;

use crate::kernels::x86_avx512::horizontal_sums;

/// How far ahead codes are fetched into the L2 cache: rows follow each other without a gap.
const PREFETCH_BYTES: usize = 10 << 10;

/// As [`super::scalar::sums`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn sums<const R: usize, const T: usize>(rows: [&[u8]; R], x: [&[i8]; T]) -> [[i32; T]; R] {
    const { assert!(R <= 4 && T <= 4, "sums across four registers at a time") };
    let rows = rows.map(|row| row.as_chunks::<64>().0);
    let n = rows.iter().map(|row| row.len()).min().unwrap_or(0);
    let rows = rows.map(|row| &row[..n]);
    let x = x.map(|x| &x.as_chunks::<256>().0[..n]);
    if let [x] = x[..] {
        // One after the other: a single stream of memory.
        let mut products = [_mm512_setzero_si512(); 4];
        for r in 0..R {
            // Four rows are some of a sequence, fewer were picked out.
            products[r] =
                if R == 4 { row_products::<true>(rows[r], x) } else { row_products::<false>(rows[r], x) };
        }
        let four = across::<R>(products);
        let mut sums = [[0; T]; R];
        for r in 0..R {
            sums[r].fill(four[r]);
        }
        return sums;
    }
    let mask = _mm512_set1_epi8(3);
    let mut acc = [[_mm512_setzero_si512(); T]; R];
    for i in 0..n {
        let mut places = [[_mm512_setzero_si512(); 4]; R];
        for r in 0..R {
            // The tiles of a thread follow each other, each too short for the hardware to find out.
            let line = &rows[r][i];
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().wrapping_add(PREFETCH_BYTES).cast());
            let codes = load_codes(line);
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
    let mut sums = [[0; T]; R];
    for r in 0..R {
        let mut four = [_mm512_setzero_si512(); 4];
        #[expect(clippy::manual_memcpy, reason = "a copy of slices would keep the sums in memory")]
        for t in 0..T {
            four[t] = acc[r][t];
        }
        sums[r].copy_from_slice(&across::<T>(four)[..T]);
    }
    sums
}

/// The sums of the lanes of the first `N` registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn across<const N: usize>([a, b, c, d]: [__m512i; 4]) -> [i32; 4] {
    if N == 1 { [_mm512_reduce_add_epi32(a), 0, 0, 0] } else { horizontal_sums(a, b, c, d) }
}

/// Products of a row, to be summed across. Codes are not shifted into place: each place has its own sum, and its power of four is divided out at the end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn row_products<const FETCHES: bool>(row: &[[u8; 64]], x: &[[i8; 256]]) -> __m512i {
    let masks =
        [_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30), _mm512_set1_epi8(-0x40)];
    let mut acc = [_mm512_setzero_si512(); 4];
    for (codes, x) in row.iter().zip(x) {
        if FETCHES {
            _mm_prefetch::<_MM_HINT_T1>(codes.as_ptr().wrapping_add(PREFETCH_BYTES).cast());
        }
        let codes = load_codes(codes);
        let inputs = x.as_chunks::<64>().0;
        for place in 0..4 {
            let place_codes = _mm512_and_si512(codes, masks[place]);
            acc[place] = _mm512_dpbusd_epi32(acc[place], place_codes, load_inputs(&inputs[place]));
        }
    }
    let low = _mm512_add_epi32(acc[0], _mm512_srai_epi32::<2>(acc[1]));
    let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(acc[2]), _mm512_srai_epi32::<6>(acc[3]));
    _mm512_add_epi32(low, high)
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
