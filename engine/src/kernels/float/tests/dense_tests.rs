//! Dense products.
#![expect(unsafe_code, reason = "calls an unsafe kernel")]

use proptest::prelude::*;

use super::super::shared_out::SharedOut;
use super::{assert_same, noise, plain_dot, pools};
use crate::dense::{DenseFormat, DenseMatrix, quantize_row};
use crate::kernels::KernelSet;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn products_agree_with_their_definition(
        n_rows in 1usize..40, blocks in 1usize..4, odd in 1usize..100, n in 0usize..7, seed: u64,
    ) {
        let pools = pools();
        for format in DenseFormat::ALL {
            let n_cols = if format.block_len() == 1 { odd } else { blocks * format.block_len() };
            let (values, x) = (noise(seed, n_rows * n_cols), noise(!seed, n * n_cols));
            let mut bytes = Vec::new();
            values.chunks(n_cols).for_each(|row| quantize_row(format, row, &mut bytes).unwrap());
            let w = DenseMatrix::new(format, &bytes, n_rows, n_cols).unwrap();
            let mut expected = Vec::new();
            let mut row = vec![0.0; n_cols];
            for x in x.chunks(n_cols) {
                for r in 0..n_rows {
                    w.dequantize_row(r, &mut row);
                    expected.push(plain_dot(&row, x));
                }
            }
            for set in KernelSet::all_present() {
                for pool in &pools {
                    let mut out = vec![f32::NAN; n * n_rows];
                    set.dense_matmul(pool, &w, &x, &mut out);
                    assert_same(&out, &expected, &(set, &w, n));
                }
                let mut gathered = vec![0.0; n * n_rows];
                let odd_rows: Vec<u32> = (0..u32::try_from(n_rows).unwrap()).filter(|r| r % 3 != 1).collect();
                let out = SharedOut::new(&mut gathered);
                for (i, x) in x.chunks(n_cols).enumerate() {
                    // SAFETY: this is the only user of `out`.
                    unsafe { set.dense_gather(&w, &odd_rows, x, (&out, i * n_rows)) };
                }
                let expected: Vec<f32> =
                    expected.iter().enumerate().map(|(i, v)| if i % n_rows % 3 == 1 { 0.0 } else { *v }).collect();
                assert_same(&gathered, &expected, &(set, &w));
            }
        }
    }
}

#[test]
fn not_a_number_reaches_only_the_outputs_that_depend_on_it() {
    let mut bytes = Vec::new();
    noise(1, 5 * 40).chunks(40).for_each(|row| quantize_row(DenseFormat::F16, row, &mut bytes).unwrap());
    bytes[2 * (3 * 40 + 39) + 1] = 0x7e; // Row 3, last column.
    let w = DenseMatrix::new(DenseFormat::F16, &bytes, 5, 40).unwrap();
    let mut x = noise(2, 5 * 40);
    x[2 * 40] = f32::INFINITY;
    for set in KernelSet::all_present() {
        let mut out = vec![0.0; 25];
        set.dense_matmul(&pools()[0], &w, &x, &mut out);
        for (i, v) in out.iter().enumerate() {
            assert_eq!(v.is_finite(), i % 5 != 3 && i / 5 != 2, "{set:?} {i} {v}");
        }
    }
}
