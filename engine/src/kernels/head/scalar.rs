//! Sums of codes times int8, by definition.

/// For each of `R` rows of codes and `T` inputs: low nibbles of each 64 bytes times 64 inputs, high nibbles times
/// the next 64.
pub(super) fn sums<const R: usize, const T: usize>(rows: [&[u8]; R], x: [&[i8]; T]) -> [[i32; T]; R] {
    rows.map(|row| x.map(|x| sum(row, x)))
}

fn sum(row: &[u8], x: &[i8]) -> i32 {
    let mut sum = 0;
    for (codes, x) in row.as_chunks::<64>().0.iter().zip(x.as_chunks::<128>().0) {
        for (code, (low, high)) in codes.iter().zip(x[..64].iter().zip(&x[64..])) {
            sum += i32::from(code & 15) * i32::from(*low) + i32::from(code >> 4) * i32::from(*high);
        }
    }
    sum
}
