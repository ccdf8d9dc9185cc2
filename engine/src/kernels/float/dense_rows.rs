//! Rows of the dense formats as vectors, thirty-two columns at a time: the arithmetic of `dense::blocks`.

use super::lanes::Lanes;
use crate::dense::{Q4_0_BLOCK_BYTES, Q6_K_BLOCK_BYTES, Q8_0_BLOCK_BYTES};

/// How to read a row of one format.
pub(super) trait RowReader {
    /// Columns `32 * pair..32 * pair + 32` of the row.
    fn pair<L: Lanes>(lanes: L, row: &[u8], pair: usize) -> [L::V; 2];
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Q6K;

/// `N` bytes of `row` at `at`.
#[inline(always)]
fn bytes<const N: usize>(row: &[u8], at: usize) -> &[u8; N] {
    &row[at..].as_chunks::<N>().0[0]
}

impl RowReader for F32 {
    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], pair: usize) -> [L::V; 2] {
        let values = bytes::<128>(row, pair * 128).as_chunks::<4>().0;
        let mut v = [[0.0; 16]; 2];
        for (v, b) in v.as_flattened_mut().iter_mut().zip(values) {
            *v = f32::from_le_bytes(*b);
        }
        [lanes.load(&v[0]), lanes.load(&v[1])]
    }
}

impl RowReader for F16 {
    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], pair: usize) -> [L::V; 2] {
        let [a, b] = halves(bytes(row, pair * 64));
        [lanes.load_f16_bytes(a), lanes.load_f16_bytes(b)]
    }
}

impl RowReader for Bf16 {
    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], pair: usize) -> [L::V; 2] {
        let [a, b] = halves(bytes(row, pair * 64));
        [lanes.load_bf16_bytes(a), lanes.load_bf16_bytes(b)]
    }
}

#[inline(always)]
fn halves(v: &[u8; 64]) -> [&[u8; 32]; 2] {
    let v = v.as_chunks::<32>().0;
    [&v[0], &v[1]]
}

impl RowReader for Q8_0 {
    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], pair: usize) -> [L::V; 2] {
        let block = bytes::<Q8_0_BLOCK_BYTES>(row, pair * Q8_0_BLOCK_BYTES);
        let d = lanes.splat(lanes.f16_value([block[0], block[1]]));
        let [a, b] = lanes.load_i8(bytes(block, 2));
        [lanes.mul(a, d), lanes.mul(b, d)]
    }
}

impl RowReader for Q4_0 {
    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], pair: usize) -> [L::V; 2] {
        let block = bytes::<Q4_0_BLOCK_BYTES>(row, pair * Q4_0_BLOCK_BYTES);
        let d = lanes.splat(lanes.f16_value([block[0], block[1]]));
        let [a, b] = lanes.load_nibbles(bytes(block, 2));
        [lanes.mul(a, d), lanes.mul(b, d)]
    }
}

impl RowReader for Q6K {
    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], pair: usize) -> [L::V; 2] {
        let block = bytes::<Q6_K_BLOCK_BYTES>(row, pair / 8 * Q6_K_BLOCK_BYTES);
        let (half, quarter) = (pair / 4 % 2, pair % 4);
        let low = bytes(block, half * 64 + quarter % 2 * 32);
        let high = bytes(block, 128 + half * 32);
        let (shift, pair_shift) = if quarter < 2 { (0, quarter * 2) } else { (4, quarter * 2) };
        #[expect(clippy::cast_possible_truncation, reason = "at most 6")]
        let [a, b] = lanes.load_six_bits(low, shift, high, pair_shift as u32);
        let d = lanes.f16_value([block[208], block[209]]);
        let scale =
            |i: usize| lanes.splat(d * f32::from(block[192 + half * 8 + quarter * 2 + i].cast_signed()));
        [lanes.mul(a, scale(0)), lanes.mul(b, scale(1))]
    }
}
