//! Sums of codes times int8 with Advanced SIMD.
#![expect(unsafe_code, reason = "vector loads")]

use crate::kernels::aarch64::{DotProduct, MultiplyAdd, Products};

/// As [`super::scalar::sums`].
#[target_feature(enable = "neon")]
pub(super) fn sums_neon<const R: usize, const T: usize>(rows: [&[u8]; R], x: [&[i8]; T]) -> [[i32; T]; R] {
    // SAFETY: this function is compiled for Advanced SIMD, and its caller vouched for the CPU.
    let products = unsafe { MultiplyAdd::new() };
    sums(products, rows, x)
}

/// The same with `sdot`.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn sums_dotprod<const R: usize, const T: usize>(rows: [&[u8]; R], x: [&[i8]; T]) -> [[i32; T]; R] {
    // SAFETY: this function is compiled for Advanced SIMD and `sdot`, and its caller vouched for the CPU.
    let products = unsafe { DotProduct::new() };
    sums(products, rows, x)
}

#[inline(always)]
fn sums<P: Products, const R: usize, const T: usize>(
    products: P,
    rows: [&[u8]; R],
    x: [&[i8]; T],
) -> [[i32; T]; R] {
    // What one step below adds up in narrow sums: 256 products of at most `3 * 128`.
    assert!(P::narrow_products(3 * 128) >= 256, "narrow sums overflow");
    let rows = rows.map(|row| row.as_chunks::<64>().0);
    let mut sums = [[0; T]; R];
    for r in 0..R {
        let mut wide = [products.wide_zero(); T];
        for (i, codes) in rows[r].iter().enumerate() {
            let mut narrow = [products.zero(); T];
            for (part, codes) in codes.as_chunks::<16>().0.iter().enumerate() {
                // SAFETY: 16 bytes.
                let codes = unsafe { products.load(codes.as_ptr()) };
                let places = [
                    products.and(codes, 3),
                    products.and(products.shift_right::<2>(codes), 3),
                    products.and(products.shift_right::<4>(codes), 3),
                    products.shift_right::<6>(codes),
                ];
                for t in 0..T {
                    let values = x[t].as_chunks::<256>().0[i].as_chunks::<16>().0;
                    for (place, codes) in places.into_iter().enumerate() {
                        // SAFETY: 16 bytes.
                        let values = unsafe { products.load(values[4 * place + part].as_ptr().cast()) };
                        narrow[t] = products.add(narrow[t], codes, values);
                    }
                }
            }
            for t in 0..T {
                wide[t] = products.widen(wide[t], narrow[t]);
            }
        }
        for t in 0..T {
            sums[r][t] = products.horizontal_sum(wide[t]);
        }
    }
    sums
}
