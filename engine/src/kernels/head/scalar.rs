//! Sums of two-bit codes times int8, by definition.

/// For each of `R` rows of codes and `T` inputs: bits `2 k` and `2 k + 1` of each 64 bytes times the k-th 64 of 256 inputs.
pub(super) fn sums<const R: usize, const T: usize>(rows: [&[u8]; R], x: [&[i8]; T]) -> [[i32; T]; R] {
    rows.map(|row| x.map(|x| sum(row, x)))
}

fn sum(row: &[u8], x: &[i8]) -> i32 {
    let mut sum = 0;
    for (codes, x) in row.as_chunks::<64>().0.iter().zip(x.as_chunks::<256>().0) {
        for (place, x) in x.as_chunks::<64>().0.iter().enumerate() {
            for (code, x) in codes.iter().zip(x) {
                sum += i32::from(code >> (2 * place) & 3) * i32::from(*x);
            }
        }
    }
    sum
}
