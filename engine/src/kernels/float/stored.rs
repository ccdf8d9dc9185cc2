//! Keys and values of one layer as the KV cache stores them: f16, or signed bytes with a scale for each block.
//!
//! Readers give the exact values, sixteen at a time; what attention does with them is the same for every type. The
//! product of a signed byte and an f16 is exact in f32, so there is nothing that paths could round differently.

use std::ops::Range;

use half::f16;

use super::attention::KV_PAGE_TOKENS;
use super::lanes::{Lanes, LanesTask, padded};
use crate::kernels::KernelSet;

/// Elements of a head that share one scale in Q8_0. The last block of a head may be shorter.
pub const KV_BLOCK_LEN: usize = 32;

/// Keys and values of one layer.
#[derive(Clone, Copy, Debug)]
pub enum KvLayer<'a> {
    /// As f16.
    F16(F16Layer<'a>),
    /// As signed bytes with scales.
    Q8_0(Q8Layer<'a>),
}

/// Keys and values as f16.
#[derive(Clone, Copy, Debug)]
pub struct F16Layer<'a> {
    /// (`n_pages`, `n_kv_heads`, `head_dim`, [`KV_PAGE_TOKENS`]).
    pub keys: &'a [f16],
    /// (`n_pages`, `n_kv_heads`, [`KV_PAGE_TOKENS`], `head_dim`).
    pub values: &'a [f16],
}

/// Keys and values as signed bytes, each times the scale of its block of [`KV_BLOCK_LEN`] elements.
#[derive(Clone, Copy, Debug)]
pub struct Q8Layer<'a> {
    /// (`n_pages`, `n_kv_heads`, `head_dim`, [`KV_PAGE_TOKENS`]).
    pub key_codes: &'a [i8],
    /// (`n_pages`, `n_kv_heads`, blocks, [`KV_PAGE_TOKENS`]).
    pub key_scales: &'a [f16],
    /// (`n_pages`, `n_kv_heads`, [`KV_PAGE_TOKENS`], `head_dim`).
    pub value_codes: &'a [i8],
    /// (`n_pages`, `n_kv_heads`, [`KV_PAGE_TOKENS`], blocks).
    pub value_scales: &'a [f16],
}

/// A layer of one type.
pub(super) trait Stored: Copy + Sync {
    type Keys: KeyReader;
    type Values: ValueReader;

    /// The keys of one head in one page; `place` is page * `n_kv_heads` + head.
    fn keys(self, place: usize, head_dim: usize) -> Self::Keys;
    /// As [`Self::keys`].
    fn values(self, place: usize, head_dim: usize) -> Self::Values;
}

/// Keys of one head in one page.
pub(super) trait KeyReader: Copy {
    /// What belongs to sixteen positions and several elements.
    type Scale<L: Lanes>: Copy;

    fn head_dim(self) -> usize;
    /// For positions `begin..begin + 16` and the block that element `d` is in.
    fn scale<L: Lanes>(self, lanes: L, d: usize, begin: usize) -> Self::Scale<L>;
    /// Element `d` of positions `begin..begin + 16`.
    fn at<L: Lanes>(self, lanes: L, d: usize, begin: usize, scale: Self::Scale<L>) -> L::V;
}

/// Values of one head in one page.
pub(super) trait ValueReader: Copy {
    type Row: ValueRow;

    /// Of some positions of the page, in order.
    fn rows(self, positions: Range<usize>) -> impl Iterator<Item = Self::Row>;
}

/// The value of one position.
pub(super) trait ValueRow: Copy {
    /// `n` vectors from the `j`-th, where `j` is even or `n` is 1.
    fn part(self, j: usize, n: usize) -> Self;
    /// Elements 16 `j`..16 `j` + 16.
    fn vector<L: Lanes>(self, lanes: L, j: usize) -> L::V;
    /// Those from 16 `j`, which are fewer, and zeros.
    fn rest<L: Lanes>(self, lanes: L, j: usize) -> L::V;
}

impl<'a> Stored for F16Layer<'a> {
    type Keys = F16Keys<'a>;
    type Values = F16Values<'a>;

    #[inline(always)]
    fn keys(self, place: usize, head_dim: usize) -> F16Keys<'a> {
        let len = head_dim * KV_PAGE_TOKENS;
        F16Keys(self.keys[place * len..][..len].as_chunks().0)
    }

    #[inline(always)]
    fn values(self, place: usize, head_dim: usize) -> F16Values<'a> {
        let len = head_dim * KV_PAGE_TOKENS;
        F16Values { values: &self.values[place * len..][..len], head_dim }
    }
}

/// (`head_dim`)
#[derive(Clone, Copy)]
pub(super) struct F16Keys<'a>(&'a [[f16; KV_PAGE_TOKENS]]);

impl KeyReader for F16Keys<'_> {
    type Scale<L: Lanes> = ();

    #[inline(always)]
    fn head_dim(self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    fn scale<L: Lanes>(self, _lanes: L, _d: usize, _begin: usize) {}

    #[inline(always)]
    fn at<L: Lanes>(self, lanes: L, d: usize, begin: usize, (): ()) -> L::V {
        lanes.load_f16(&self.0[d][begin..].as_chunks().0[0])
    }
}

#[derive(Clone, Copy)]
pub(super) struct F16Values<'a> {
    values: &'a [f16], // (KV_PAGE_TOKENS, head_dim)
    head_dim: usize,
}

impl<'a> ValueReader for F16Values<'a> {
    type Row = &'a [f16];

    #[inline(always)]
    fn rows(self, Range { start, end }: Range<usize>) -> impl Iterator<Item = &'a [f16]> {
        self.values[start * self.head_dim..end * self.head_dim].chunks_exact(self.head_dim)
    }
}

impl ValueRow for &[f16] {
    #[inline(always)]
    fn part(self, j: usize, n: usize) -> Self {
        &self[16 * j..][..16 * n]
    }

    #[inline(always)]
    fn vector<L: Lanes>(self, lanes: L, j: usize) -> L::V {
        lanes.load_f16(&self.as_chunks().0[j])
    }

    #[inline(always)]
    fn rest<L: Lanes>(self, lanes: L, j: usize) -> L::V {
        lanes.load_f16(&padded(&self[16 * j..], f16::ZERO))
    }
}

impl<'a> Stored for Q8Layer<'a> {
    type Keys = Q8Keys<'a>;
    type Values = Q8Values<'a>;

    #[inline(always)]
    fn keys(self, place: usize, head_dim: usize) -> Q8Keys<'a> {
        let (len, n_scales) = (head_dim * KV_PAGE_TOKENS, head_dim.div_ceil(KV_BLOCK_LEN) * KV_PAGE_TOKENS);
        Q8Keys {
            codes: self.key_codes[place * len..][..len].as_chunks().0,
            scales: self.key_scales[place * n_scales..][..n_scales].as_chunks().0,
        }
    }

    #[inline(always)]
    fn values(self, place: usize, head_dim: usize) -> Q8Values<'a> {
        let n_blocks = head_dim.div_ceil(KV_BLOCK_LEN);
        let (len, n_scales) = (head_dim * KV_PAGE_TOKENS, n_blocks * KV_PAGE_TOKENS);
        Q8Values {
            codes: &self.value_codes[place * len..][..len],
            scales: &self.value_scales[place * n_scales..][..n_scales],
            head_dim,
            n_blocks,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Q8Keys<'a> {
    codes: &'a [[i8; KV_PAGE_TOKENS]],   // (head_dim)
    scales: &'a [[f16; KV_PAGE_TOKENS]], // (blocks)
}

impl KeyReader for Q8Keys<'_> {
    type Scale<L: Lanes> = L::V;

    #[inline(always)]
    fn head_dim(self) -> usize {
        self.codes.len()
    }

    #[inline(always)]
    fn scale<L: Lanes>(self, lanes: L, d: usize, begin: usize) -> L::V {
        lanes.load_f16(&self.scales[d / KV_BLOCK_LEN][begin..].as_chunks().0[0])
    }

    #[inline(always)]
    fn at<L: Lanes>(self, lanes: L, d: usize, begin: usize, scale: L::V) -> L::V {
        lanes.mul(lanes.load_i8_half(&self.codes[d][begin..].as_chunks().0[0]), scale)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Q8Values<'a> {
    codes: &'a [i8],   // (KV_PAGE_TOKENS, head_dim)
    scales: &'a [f16], // (KV_PAGE_TOKENS, n_blocks)
    head_dim: usize,
    n_blocks: usize,
}

#[derive(Clone, Copy)]
pub(super) struct Q8Row<'a> {
    codes: &'a [i8],
    scales: &'a [f16],
}

impl<'a> ValueReader for Q8Values<'a> {
    type Row = Q8Row<'a>;

    #[inline(always)]
    fn rows(self, Range { start, end }: Range<usize>) -> impl Iterator<Item = Q8Row<'a>> {
        let codes = self.codes[start * self.head_dim..end * self.head_dim].chunks_exact(self.head_dim);
        let scales = self.scales[start * self.n_blocks..end * self.n_blocks].chunks_exact(self.n_blocks);
        codes.zip(scales).map(|(codes, scales)| Q8Row { codes, scales })
    }
}

impl Q8Row<'_> {
    #[inline(always)]
    fn scale<L: Lanes>(self, lanes: L, j: usize) -> L::V {
        lanes.splat(lanes.f16_value(self.scales[16 * j / KV_BLOCK_LEN].to_le_bytes()))
    }
}

impl ValueRow for Q8Row<'_> {
    #[inline(always)]
    fn part(self, j: usize, n: usize) -> Self {
        Self { codes: &self.codes[16 * j..][..16 * n], scales: &self.scales[16 * j / KV_BLOCK_LEN..] }
    }

    #[inline(always)]
    fn vector<L: Lanes>(self, lanes: L, j: usize) -> L::V {
        lanes.mul(lanes.load_i8_half(&self.codes.as_chunks().0[j]), self.scale(lanes, j))
    }

    #[inline(always)]
    fn rest<L: Lanes>(self, lanes: L, j: usize) -> L::V {
        lanes.mul(lanes.load_i8_half(&padded(&self.codes[16 * j..], 0)), self.scale(lanes, j))
    }
}

impl KernelSet {
    /// One block of up to [`KV_BLOCK_LEN`] elements as codes and their scale, as ggml makes Q8_0: the largest magnitude
    /// becomes 127, halves round to even. A block that is not finite gets a scale that is not.
    pub(crate) fn quantize_kv_block(self, x: &[f32], codes: &mut [i8; KV_BLOCK_LEN]) -> f16 {
        self.on_lanes(QuantizeBlock { x, codes })
    }
}

struct QuantizeBlock<'a> {
    x: &'a [f32],
    codes: &'a mut [i8; KV_BLOCK_LEN],
}

impl LanesTask for QuantizeBlock<'_> {
    type Output = f16;

    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "rounded, and no number of a larger magnitude than 127"
    )]
    fn run<L: Lanes>(self, _lanes: L) -> f16 {
        let mut x = [0.0; KV_BLOCK_LEN];
        x[..self.x.len()].copy_from_slice(self.x);
        let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
        let d = x.iter().fold(0.0, |absmax, v| larger(absmax, v.abs())) / 127.0;
        let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
        for (code, v) in self.codes.iter_mut().zip(&x) {
            *code = (v * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
        }
        f16::from_f32_const(d)
    }
}
