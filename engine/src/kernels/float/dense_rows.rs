//! Rows of the dense formats as vectors, thirty-two columns at a time: the arithmetic of `dense::blocks`.

use super::lanes::Lanes;
use crate::dense::{Q4_0_BLOCK_BYTES, Q6_K_BLOCK_BYTES, Q8_0_BLOCK_BYTES};

/// How to read a row of one format.
pub(super) trait RowReader {
    /// What is worked out once for several pairs of vectors.
    type Block: Copy;

    /// Pairs in a block.
    const BLOCK_PAIRS: usize = 1;

    /// Pairs in a cache line, about.
    const LINE_PAIRS: usize = 1;

    /// Rows that are worked on together when there is only one input: memory reads one sequence of lines faster than
    /// several, but one row's unpacking hides another's chain of additions. 1, 4, or 8 where registers allow.
    const ROWS_ALONE: usize = 1;

    fn block<L: Lanes>(lanes: L, row: &[u8], block: usize) -> Self::Block;

    /// Columns `32 * pair..32 * pair + 32` of the row; `block` is the one that they are in.
    fn pair<L: Lanes>(lanes: L, row: &[u8], block: &Self::Block, pair: usize) -> [L::V; 2];
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
    type Block = ();

    #[inline(always)]
    fn block<L: Lanes>(_lanes: L, _row: &[u8], _block: usize) {}

    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], (): &(), pair: usize) -> [L::V; 2] {
        let values = bytes::<128>(row, pair * 128).as_chunks::<4>().0;
        let mut v = [[0.0; 16]; 2];
        for (v, b) in v.as_flattened_mut().iter_mut().zip(values) {
            *v = f32::from_le_bytes(*b);
        }
        [lanes.load(&v[0]), lanes.load(&v[1])]
    }
}

impl RowReader for F16 {
    type Block = ();

    #[inline(always)]
    fn block<L: Lanes>(_lanes: L, _row: &[u8], _block: usize) {}

    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], (): &(), pair: usize) -> [L::V; 2] {
        let [a, b] = halves(bytes(row, pair * 64));
        [lanes.load_f16_bytes(a), lanes.load_f16_bytes(b)]
    }
}

impl RowReader for Bf16 {
    type Block = ();

    #[inline(always)]
    fn block<L: Lanes>(_lanes: L, _row: &[u8], _block: usize) {}

    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], (): &(), pair: usize) -> [L::V; 2] {
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
    type Block = ();

    const ROWS_ALONE: usize = 8;

    #[inline(always)]
    fn block<L: Lanes>(_lanes: L, _row: &[u8], _block: usize) {}

    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], (): &(), pair: usize) -> [L::V; 2] {
        let block = bytes::<Q8_0_BLOCK_BYTES>(row, pair * Q8_0_BLOCK_BYTES);
        let d = lanes.splat(lanes.f16_value([block[0], block[1]]));
        let [a, b] = lanes.load_i8(bytes(block, 2));
        [lanes.mul(a, d), lanes.mul(b, d)]
    }
}

impl RowReader for Q4_0 {
    type Block = ();

    const ROWS_ALONE: usize = 8;

    const LINE_PAIRS: usize = 3;

    #[inline(always)]
    fn block<L: Lanes>(_lanes: L, _row: &[u8], _block: usize) {}

    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, row: &[u8], (): &(), pair: usize) -> [L::V; 2] {
        let block = bytes::<Q4_0_BLOCK_BYTES>(row, pair * Q4_0_BLOCK_BYTES);
        let d = lanes.f16_value([block[0], block[1]]);
        lanes.scaled_nibbles(bytes(block, 2), d)
    }
}

/// A block of 256 columns, unpacked to where vectors can be loaded from.
#[derive(Clone, Copy)]
pub(super) struct Q6KBlock {
    codes: [u8; 256], // Minus 32; signed.
    scales: [f32; 16],
}

impl RowReader for Q6K {
    type Block = Q6KBlock;

    const ROWS_ALONE: usize = 4;

    const BLOCK_PAIRS: usize = 8;

    const LINE_PAIRS: usize = 2;

    #[inline(always)]
    fn block<L: Lanes>(lanes: L, row: &[u8], block: usize) -> Q6KBlock {
        let block = bytes::<Q6_K_BLOCK_BYTES>(row, block * Q6_K_BLOCK_BYTES);
        let mut codes = [0; 256];
        for (half, codes) in codes.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            let low = bytes::<64>(block, half * 64);
            let high = bytes::<32>(block, 128 + half * 32);
            for m in 0..32 {
                let (low, more, high) = (low[m], low[m + 32], high[m]);
                codes[m] = (low & 15 | (high & 3) << 4).wrapping_sub(32);
                codes[m + 32] = (more & 15 | (high >> 2 & 3) << 4).wrapping_sub(32);
                codes[m + 64] = (low >> 4 | (high >> 4 & 3) << 4).wrapping_sub(32);
                codes[m + 96] = (more >> 4 | high >> 6 << 4).wrapping_sub(32);
            }
        }
        let d = lanes.f16_value([block[208], block[209]]);
        let scales = bytes::<16>(block, 192).map(|scale| d * f32::from(scale.cast_signed()));
        Q6KBlock { codes, scales }
    }

    #[inline(always)]
    fn pair<L: Lanes>(lanes: L, _row: &[u8], block: &Q6KBlock, pair: usize) -> [L::V; 2] {
        let pair = pair % Self::BLOCK_PAIRS;
        let [a, b] = lanes.load_i8(&block.codes.as_chunks().0[pair]);
        let scales = block.scales.as_chunks::<2>().0[pair];
        [lanes.mul(a, lanes.splat(scales[0])), lanes.mul(b, lanes.splat(scales[1]))]
    }
}
