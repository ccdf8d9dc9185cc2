//! Layouts against values written by hand, quantisers against their error bounds.

use proptest::prelude::*;

use super::*;

fn roundtrip(format: DenseFormat, x: &[f32]) -> Vec<f32> {
    let mut bytes = Vec::new();
    quantize_row(format, x, &mut bytes).unwrap();
    let matrix = DenseMatrix::new(format, &bytes, 1, x.len()).unwrap();
    let mut out = vec![0.0; x.len()];
    matrix.dequantize_row(0, &mut out);
    out
}

fn noise(n: usize) -> Vec<f32> {
    let mut state = 7u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u16::try_from(state >> 16).unwrap()) / 65536.0 - 0.5
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

fn relative_error(x: &[f32], y: &[f32]) -> f32 {
    let error: f32 = x.iter().zip(y).map(|(a, b)| (a - b) * (a - b)).sum();
    (error / x.iter().map(|a| a * a).sum::<f32>()).sqrt()
}

#[test]
fn a_shape_that_the_bytes_do_not_have_is_refused() {
    let bytes = [0; 68];
    assert!(DenseMatrix::new(DenseFormat::Q8_0, &bytes, 2, 32).is_ok());
    for (rows, cols) in [(2, 31), (1, 32), (3, 32), (2, 64), (2, 0), (usize::MAX, 32), (2, usize::MAX - 31)] {
        assert!(DenseMatrix::new(DenseFormat::Q8_0, &bytes, rows, cols).is_err(), "{rows} x {cols}");
    }
    let error = DenseMatrix::new(DenseFormat::Q6K, &bytes, 1, 128).unwrap_err();
    assert_eq!(error.to_string(), "Q6_K needs a positive multiple of 256 columns, not 128");
    let error = DenseMatrix::new(DenseFormat::F16, &bytes, 2, 32).unwrap_err();
    assert_eq!(error.to_string(), "F16 matrix of 2 x 32 takes 128 bytes, found 68");
}

#[test]
fn blocks_are_laid_out_as_in_ggml() {
    let mut q8 = vec![0x00, 0x38]; // 0.5
    q8.extend((0..32).map(|i| (i - 16i8).cast_unsigned()));
    let mut out = [0.0; 32];
    dequantize_row(DenseFormat::Q8_0, &q8, &mut out);
    assert_eq!((out[0], out[17], out[31]), (-8.0, 0.5, 7.5));

    let mut q4 = vec![0x00, 0x40]; // 2.0
    q4.extend((0..16).map(|i| i | (15 - i) << 4));
    dequantize_row(DenseFormat::Q4_0, &q4, &mut out);
    assert_eq!((out[0], out[9], out[16], out[31]), (-16.0, 2.0, 14.0, -16.0));

    let mut q6 = vec![0u8; Q6_K_BLOCK_BYTES];
    q6[209] = 0x3c; // d = 1.0
    q6[192..208].fill(1);
    q6[192 + 13] = 0xfe; // Scale of elements 208..224: -2.
    q6[64 + 32 + 16] = 0x50; // Low nibble of element 128 + 96 + 16 - 32 * 0: high half of byte 32 + 16.
    q6[128 + 32 + 16] = 0b10_01_00_11; // Upper bits of elements 144, 176, 208, 240.
    let mut out = [0.0; 256];
    dequantize_row(DenseFormat::Q6K, &q6, &mut out);
    assert_eq!((out[144], out[176], out[208], out[240]), (16.0, -32.0, 32.0, 5.0));
    assert_eq!((out[0], out[223]), (-32.0, 64.0));
}

#[test]
fn quantisers_lose_little() {
    let x = noise(2560);
    for (format, limit) in [
        (DenseFormat::F32, 0.0),
        (DenseFormat::F16, 0.000_3),
        (DenseFormat::Bf16, 0.002),
        (DenseFormat::Q8_0, 0.005),
        (DenseFormat::Q6K, 0.018),
        (DenseFormat::Q4_0, 0.08),
    ] {
        let error = relative_error(&x, &roundtrip(format, &x));
        assert!(error <= limit, "{}: {error}", format.name());
    }
}

#[test]
fn values_that_no_block_can_hold_are_refused() {
    for format in DenseFormat::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = noise(256);
            x[200] = bad;
            let error = quantize_row(format, &x, &mut Vec::new()).unwrap_err();
            assert_eq!(error, DenseError::Value { column: 200, format: format.name() });
        }
    }
    assert!(quantize_row(DenseFormat::F16, &[65505.0], &mut Vec::new()).is_err());
}

proptest! {
    #[test]
    fn any_finite_row_survives(seed in proptest::collection::vec(-60000.0f32..60000.0, 256), tiny in any::<bool>()) {
        let x: Vec<f32> = seed.iter().map(|v| if tiny { v * 1e-8 } else { *v }).collect();
        let absmax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for format in DenseFormat::ALL {
            for (a, b) in x.iter().zip(roundtrip(format, &x)) {
                prop_assert!((a - b).abs() <= absmax * 0.26 + 1e-4, "{} {a} {b}", format.name());
            }
        }
    }
}
