//! Layouts: known bytes, packing and unpacking, refused shapes and codes.

use half::f16;
use proptest::prelude::*;

use super::*;

/// A whole tensor of `format`: the rows one after the other, for `I2_S` with the trailer.
pub(crate) fn pack_tensor(
    format: TernaryFormat,
    weights: &[i8],
    n_cols: usize,
    scale_of: &dyn Fn(usize) -> f32,
) -> Vec<u8> {
    let mut data = Vec::new();
    let n_blocks = n_cols / format.block_cols();
    for (row, weights) in weights.chunks_exact(n_cols).enumerate() {
        let scales: Vec<f16> = (0..n_blocks).map(|b| f16::from_f32(scale_of(row * n_blocks + b))).collect();
        let mut bytes = vec![0; format.row_bytes(n_cols).unwrap()];
        format.pack_row(weights, &scales, &mut bytes);
        data.extend(bytes);
    }
    if format == TernaryFormat::I2S {
        data.extend(i2_s_trailer(scale_of(0)));
    }
    data
}

#[test]
fn i2_s_bytes_are_as_published() {
    let mut weights = [0_i8; 128];
    (weights[5], weights[37], weights[69], weights[101]) = (1, -1, 0, 1);
    let data = pack_tensor(TernaryFormat::I2S, &weights, 128, &|_| 1.5);
    assert_eq!(data.len(), 64);
    assert_eq!(data[5], 0b10_00_01_10);
    assert_eq!(data[6], 0b01_01_01_01);
    assert_eq!(data[32..36], 1.5_f32.to_le_bytes());
}

#[test]
fn tq2_0_bytes_are_as_published() {
    let mut weights = [0_i8; 256];
    (weights[128 + 5], weights[128 + 37], weights[128 + 69], weights[128 + 101]) = (1, -1, 0, 1);
    let data = pack_tensor(TernaryFormat::Tq2_0, &weights, 256, &|_| 1.5);
    assert_eq!(data.len(), 66);
    assert_eq!(data[32 + 5], 0b10_01_00_10);
    assert_eq!(data[64..], f16::from_f32(1.5).to_le_bytes());
}

#[test]
fn tq1_0_bytes_are_as_published() {
    let mut weights = [-1_i8; 256];
    // Digits 2 1 0 0 1 of byte 3: ceil((2*81 + 27 + 1) * 256 / 243).
    (weights[3], weights[35], weights[131]) = (1, 0, 0);
    // Digits 0 0 0 1 of byte 50, shifted up by one place: ceil(3 * 256 / 243).
    weights[240 + 12 + 2] = 0;
    let data = pack_tensor(TernaryFormat::Tq1_0, &weights, 256, &|_| 1.0);
    assert_eq!(data.len(), 54);
    assert_eq!((data[3], data[4], data[50], data[51]), (201, 0, 4, 0));
}

#[test]
fn wrong_shapes_and_lengths_are_refused() {
    for format in TernaryFormat::ALL {
        let odd = TernaryMatrix::new(format, &[], 1, format.block_cols() - 1);
        assert!(matches!(odd, Err(TernaryError::Shape { .. })), "{odd:?}");
        let huge = TernaryMatrix::new(format, &[], usize::MAX, 1 << 40);
        assert!(matches!(huge, Err(TernaryError::Shape { .. })), "{huge:?}");
        let data = vec![0; format.n_bytes(3, 256).unwrap() + 1];
        let long = TernaryMatrix::new(format, &data, 3, 256);
        assert!(matches!(long, Err(TernaryError::Length { .. })), "{long:?}");
    }
    let data = pack_tensor(TernaryFormat::I2S, &[0; 128], 128, &|_| f32::NAN);
    let scale = TernaryMatrix::new(TernaryFormat::I2S, &data, 1, 128);
    assert!(matches!(scale, Err(TernaryError::Scale { .. })), "{scale:?}");
}

#[test]
fn a_code_3_and_an_infinite_scale_are_found() {
    for format in [TernaryFormat::I2S, TernaryFormat::Tq2_0] {
        for col in [0, 31, 32, 127, 128, 255] {
            let mut data = pack_tensor(format, &[1; 4 * 256], 256, &|_| 1.0);
            let matrix = TernaryMatrix::new(format, &data, 4, 256).unwrap();
            assert_eq!(matrix.first_invalid_weight(), None);
            // Every code is 2: setting the low bit makes it 3.
            let (byte, group) = (32 * (col / 128) + col % 32, col % 128 / 32);
            let shift = if format == TernaryFormat::I2S { 6 - 2 * group } else { 2 * group };
            data[2 * format.row_bytes(256).unwrap() + byte] |= 1 << shift;
            let matrix = TernaryMatrix::new(format, &data, 4, 256).unwrap();
            assert_eq!(matrix.first_invalid_weight(), Some(InvalidWeight::Code { row: 2, col }));
        }
    }
    for format in [TernaryFormat::Tq2_0, TernaryFormat::Tq1_0] {
        let data = pack_tensor(format, &[0; 4 * 512], 512, &|b| if b == 3 { f32::INFINITY } else { 1.0 });
        let matrix = TernaryMatrix::new(format, &data, 4, 512).unwrap();
        let expected = InvalidWeight::Scale { row: 1, col: 256, scale: f32::INFINITY };
        assert_eq!(matrix.first_invalid_weight(), Some(expected));
    }
}

proptest! {
    #[test]
    fn unpacking_undoes_packing(
        weights in prop::collection::vec(-1_i8..=1, 3 * 512),
        scales in prop::collection::vec(0.0_f32..4.0, 12),
    ) {
        for format in TernaryFormat::ALL {
            let data = pack_tensor(format, &weights, 512, &|b| scales[b]);
            let matrix = TernaryMatrix::new(format, &data, 3, 512).unwrap();
            prop_assert_eq!(matrix.first_invalid_weight(), None);
            for (row, expected) in weights.chunks_exact(512).enumerate() {
                let n_blocks = 512 / format.block_cols();
                let (mut unpacked, mut unpacked_scales) = (vec![0; 512], vec![0.0; n_blocks]);
                matrix.unpack_row(row, &mut unpacked, &mut unpacked_scales);
                prop_assert_eq!(&unpacked, expected);
                for (b, scale) in unpacked_scales.into_iter().enumerate() {
                    let stored = match format {
                        TernaryFormat::I2S => scales[0],
                        _ => f16::from_f32(scales[row * n_blocks + b]).to_f32(),
                    };
                    prop_assert_eq!(scale.to_bits(), stored.to_bits());
                }
            }
        }
    }
}
