//! Attention.

use half::f16;
use proptest::prelude::*;

use super::super::lanes::exp;
use super::super::{
    AttentionRow, AttentionScratch, AttentionShape, F16Layer, KV_BLOCK_LEN, KV_PAGE_TOKENS, KvLayer, Q8Layer,
};
use super::{any_float, assert_same, noise, plain_dot, plain_tree, pools};
use crate::kernels::KernelSet;
use crate::kv::KvType;

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

/// Keys or values of all pages.
enum Stored {
    F16(Vec<f16>),
    /// Codes; scales, one for each block of a head and position.
    Q8_0(Vec<i8>, Vec<f16>),
}

impl Stored {
    fn random(kv_type: KvType, n_head_tokens: usize, head_dim: usize, seed: u64) -> Self {
        let n_scales = n_head_tokens * head_dim.div_ceil(KV_BLOCK_LEN);
        let to_f16 = |v: f32| f16::from_f32_const(v);
        let numbers = noise(seed, n_head_tokens * head_dim).into_iter();
        match kv_type {
            KvType::F16 => Self::F16(numbers.map(to_f16).collect()),
            KvType::Q8_0 => {
                #[expect(clippy::cast_possible_truncation, reason = "it saturates")]
                let codes = numbers.map(|v| (v * 60.0) as i8).collect();
                Self::Q8_0(codes, noise(seed ^ 77, n_scales).into_iter().map(|v| to_f16(v / 60.0)).collect())
            }
        }
    }

    /// The element `at`, whose scale is `scale_at`.
    fn get(&self, at: usize, scale_at: usize) -> f32 {
        match self {
            Self::F16(values) => values[at].to_f32_const(),
            Self::Q8_0(codes, scales) => f32::from(codes[at]) * scales[scale_at].to_f32_const(),
        }
    }
}

struct Case {
    shape: AttentionShape,
    q: Vec<f32>,
    keys: Stored,
    values: Stored,
    pages: Vec<Vec<u32>>,      // Of each sequence.
    rows: Vec<(usize, usize)>, // Sequence, visible.
}

impl Case {
    /// `chunks` of (visible to the first row, rows), each a sequence of its own.
    fn new(shape: AttentionShape, kv_type: KvType, chunks: &[(usize, usize)], seed: u64) -> Self {
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
        let n_head_tokens = next_page as usize * shape.n_kv_heads * KV_PAGE_TOKENS;
        let q = noise(seed, rows.len() * shape.n_heads * shape.head_dim);
        Self {
            shape,
            q,
            keys: Stored::random(kv_type, n_head_tokens, shape.head_dim, seed ^ 5),
            values: Stored::random(kv_type, n_head_tokens, shape.head_dim, seed ^ 9),
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
            let n_blocks = head_dim.div_ceil(KV_BLOCK_LEN);
            let place = |t: usize| self.pages[sequence][t / KV_PAGE_TOKENS] as usize * n_kv_heads + kv_head;
            let key = |t: usize| {
                let at = |n: usize, i: usize| (place(t) * n + i) * KV_PAGE_TOKENS + t % KV_PAGE_TOKENS;
                (0..head_dim)
                    .map(|d| self.keys.get(at(head_dim, d), at(n_blocks, d / KV_BLOCK_LEN)))
                    .collect()
            };
            let value = |t: usize| {
                let at = |n: usize, i: usize| (place(t) * KV_PAGE_TOKENS + t % KV_PAGE_TOKENS) * n + i;
                (0..head_dim)
                    .map(|d| self.values.get(at(head_dim, d), at(n_blocks, d / KV_BLOCK_LEN)))
                    .collect()
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
        let kv = match (&self.keys, &self.values) {
            (Stored::F16(keys), Stored::F16(values)) => KvLayer::F16(F16Layer { keys, values }),
            (Stored::Q8_0(key_codes, key_scales), Stored::Q8_0(value_codes, value_scales)) => {
                KvLayer::Q8_0(Q8Layer { key_codes, key_scales, value_codes, value_scales })
            }
            _ => panic!("two types"),
        };
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
        chunks in proptest::collection::vec((1usize..80, 1usize..8), 1..5), seed: u64, is_q8: bool,
    ) {
        let shape = AttentionShape { n_heads: n_kv_heads * group, n_kv_heads, head_dim };
        Case::new(shape, if is_q8 { KvType::Q8_0 } else { KvType::F16 }, &chunks, seed).check();
    }
}

#[test]
fn a_long_prefill_chunk_in_the_shape_of_a_real_model() {
    let shape = AttentionShape { n_heads: 20, n_kv_heads: 5, head_dim: 128 };
    for kv_type in KvType::ALL {
        Case::new(shape, kv_type, &[(1, 40)], 1).check();
        Case::new(shape, kv_type, &[(170, 1)], 2).check();
        Case::new(shape, kv_type, &[(33, 1), (64, 1), (65, 1)], 3).check();
    }
}

#[test]
fn what_a_row_does_not_see_cannot_touch_it() {
    let shape = AttentionShape { n_heads: 4, n_kv_heads: 1, head_dim: 64 };
    for kv_type in KvType::ALL {
        let mut case = Case::new(shape, kv_type, &[(30, 13)], 4);
        // The last position is seen by the last row alone.
        let (page, t) = (case.pages[0][1] as usize, 41 - KV_PAGE_TOKENS);
        match (&mut case.keys, &mut case.values) {
            (Stored::F16(keys), Stored::F16(values)) => {
                keys[page * 64 * KV_PAGE_TOKENS + t] = f16::NAN;
                values[(page * KV_PAGE_TOKENS + t) * 64] = f16::INFINITY;
            }
            (Stored::Q8_0(_, keys), Stored::Q8_0(_, values)) => {
                keys[page * 2 * KV_PAGE_TOKENS + t] = f16::NAN;
                values[(page * KV_PAGE_TOKENS + t) * 2] = f16::INFINITY;
            }
            _ => panic!("two types"),
        }
        case.check();
        assert!(case.expected()[..12 * 4 * 64].iter().all(|v| v.is_finite()));
    }
}

proptest! {
    /// Every set makes the same codes, and they are within half a step of what was stored.
    #[test]
    fn a_block_is_rounded_to_the_nearest_codes(
        x in proptest::collection::vec(prop_oneof![4 => -300.0f32..300.0, 1 => any_float()], 1..=KV_BLOCK_LEN),
    ) {
        let mut sets = KernelSet::all_present();
        let block = |set: KernelSet| {
            let mut codes = [99; KV_BLOCK_LEN];
            (set.quantize_kv_block(&x, &mut codes).to_f32_const(), codes)
        };
        let (scale, codes) = block(sets.next().unwrap());
        for set in sets {
            let again = block(set);
            assert_same(&[again.0], &[scale], &set);
            prop_assert_eq!(again.1, codes, "{:?}", set);
        }
        let absmax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        prop_assert_eq!(scale.is_finite(), x.iter().all(|v| v.is_finite()) && absmax < 127.0 * 65500.0);
        prop_assert!(codes[x.len()..].iter().all(|code| *code == 0));
        // Below that the scale has lost digits.
        if scale.is_finite() && scale > 1e-4 {
            for (x, code) in x.iter().zip(codes) {
                let error = (x - scale * f32::from(code)).abs();
                prop_assert!(error <= 0.57 * scale, "{x} became {code} x {scale}");
            }
        }
    }
}
