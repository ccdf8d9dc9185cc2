//! Attention.

use half::f16;
use proptest::prelude::*;

use super::super::lanes::exp;
use super::super::{AttentionRow, AttentionScratch, AttentionShape, KV_PAGE_TOKENS, KvLayer};
use super::{assert_same, noise, plain_dot, plain_tree, pools};
use crate::kernels::KernelSet;

/// One query over plain keys and values (t, `head_dim`).
fn plain_attention(q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f32> {
    let scale = 1.0 / f32::from(u16::try_from(q.len()).unwrap()).sqrt();
    let scores: Vec<f32> = keys.iter().map(|k| plain_dot(q, k) * scale).collect();
    let max = scores.iter().fold(f32::NEG_INFINITY, |m, s| if *s > m { *s } else { m });
    let e: Vec<f32> = scores.iter().map(|s| exp(s - max)).collect();
    let mut lanes = [0.0; 16];
    for (t, e) in e.iter().enumerate() {
        lanes[t % 16] += e;
    }
    let inverse = 1.0 / plain_tree(lanes);
    let mix = |d: usize| e.iter().zip(values).fold(0.0f32, |acc, (e, v)| e.mul_add(v[d], acc));
    (0..q.len()).map(|d| mix(d) * inverse).collect()
}

struct Case {
    shape: AttentionShape,
    q: Vec<f32>,
    keys: Vec<f16>,
    values: Vec<f16>,
    pages: Vec<Vec<u32>>,      // Of each sequence.
    rows: Vec<(usize, usize)>, // Sequence, visible.
}

impl Case {
    /// `chunks` of (visible to the first row, rows), each a sequence of its own.
    fn new(shape: AttentionShape, chunks: &[(usize, usize)], seed: u64) -> Self {
        let mut next_page = 0u32;
        let mut pages = Vec::new();
        let mut rows = Vec::new();
        for (sequence, (first, n)) in chunks.iter().enumerate() {
            let n_pages = u32::try_from((first + n).div_ceil(KV_PAGE_TOKENS)).unwrap();
            // Backwards, so that order in the slab is not order in the sequence.
            pages.push((next_page..next_page + n_pages).rev().collect());
            next_page += n_pages;
            rows.extend((0..*n).map(|i| (sequence, first + i)));
        }
        let slab = next_page as usize * shape.n_kv_heads * KV_PAGE_TOKENS * shape.head_dim;
        let to_f16 = |v: Vec<f32>| v.into_iter().map(f16::from_f32_const).collect::<Vec<f16>>();
        let q = noise(seed, rows.len() * shape.n_heads * shape.head_dim);
        Self {
            shape,
            q,
            keys: to_f16(noise(seed ^ 5, slab)),
            values: to_f16(noise(seed ^ 9, slab)),
            pages,
            rows,
        }
    }

    fn expected(&self) -> Vec<f32> {
        let AttentionShape { n_heads, n_kv_heads, head_dim } = self.shape;
        let mut out = Vec::new();
        for (i, q) in self.q.chunks(head_dim).enumerate() {
            let (sequence, n_visible) = self.rows[i / n_heads];
            let kv_head = i % n_heads / (n_heads / n_kv_heads);
            let page = |t: usize| {
                let page = self.pages[sequence][t / KV_PAGE_TOKENS] as usize;
                (page * n_kv_heads + kv_head) * KV_PAGE_TOKENS * head_dim
            };
            let key = |t: usize| {
                let element = |d: usize| self.keys[page(t) + d * KV_PAGE_TOKENS + t % KV_PAGE_TOKENS];
                (0..head_dim).map(|d| element(d).to_f32_const()).collect()
            };
            let value = |t: usize| {
                let at = page(t) + t % KV_PAGE_TOKENS * head_dim;
                self.values[at..at + head_dim].iter().map(|v| v.to_f32_const()).collect()
            };
            let keys: Vec<Vec<f32>> = (0..n_visible).map(key).collect();
            let values: Vec<Vec<f32>> = (0..n_visible).map(value).collect();
            out.extend(plain_attention(q, &keys, &values));
        }
        out
    }

    fn check(&self) {
        let expected = self.expected();
        let rows: Vec<AttentionRow<'_>> = self
            .rows
            .iter()
            .map(|(sequence, n_visible)| AttentionRow {
                pages: &self.pages[*sequence],
                n_visible: *n_visible,
            })
            .collect();
        let kv = KvLayer { keys: &self.keys, values: &self.values };
        for pool in &pools() {
            let mut scratch =
                AttentionScratch::new(pool.n_threads(), self.shape.n_heads / self.shape.n_kv_heads, 200);
            for set in KernelSet::all_present() {
                let mut out = vec![f32::NAN; self.q.len()];
                set.attention(pool, self.shape, &self.q, kv, &rows, &mut scratch, &mut out);
                assert_same(&out, &expected, &(set, self.shape, &self.rows));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attention_agrees_with_its_definition(
        n_kv_heads in 1usize..3, group in 1usize..6, head_dim in 1usize..140,
        chunks in proptest::collection::vec((1usize..80, 1usize..8), 1..5), seed: u64,
    ) {
        let shape = AttentionShape { n_heads: n_kv_heads * group, n_kv_heads, head_dim };
        Case::new(shape, &chunks, seed).check();
    }
}

#[test]
fn a_long_prefill_chunk_in_the_shape_of_a_real_model() {
    let shape = AttentionShape { n_heads: 20, n_kv_heads: 5, head_dim: 128 };
    Case::new(shape, &[(1, 40)], 1).check();
    Case::new(shape, &[(170, 1)], 2).check();
    Case::new(shape, &[(33, 1), (64, 1), (65, 1)], 3).check();
}

#[test]
fn what_a_row_does_not_see_cannot_touch_it() {
    let shape = AttentionShape { n_heads: 4, n_kv_heads: 1, head_dim: 64 };
    let mut case = Case::new(shape, &[(30, 13)], 4);
    // The last position is seen by the last row alone.
    let page = case.pages[0][1] as usize;
    let (page, t) = (page * KV_PAGE_TOKENS * 64, 41 - KV_PAGE_TOKENS);
    case.keys[page + t] = f16::NAN;
    case.values[page + t * 64] = f16::INFINITY;
    case.check();
    assert!(case.expected()[..12 * 4 * 64].iter().all(|v| v.is_finite()));
}
