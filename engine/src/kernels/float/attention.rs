//! One layer's attention over the paged f16 KV cache.
//!
//! The definition, for a query q with positions 0..n visible: `score_t = dot(q, k_t) * (1 / sqrt(head_dim))`,
//! `e_t = exp(score_t - max)`, `sum` of e in the one order of float reductions, and
//! `out[d] = (fma over increasing t of e_t, v_t[d]) * (1 / sum)`.
//!
//! Queries that share keys (the heads of a group, and rows of one prefill chunk) go through each page of keys and
//! of values together. That does not change what any of them computes.
#![expect(clippy::cast_precision_loss, reason = "head dimensions are far below 2^24")]

use std::sync::{Mutex, PoisonError};

use half::f16;

use super::lanes::{Lanes, LanesTask, padded};
use super::shared_out::SharedOut;
use crate::kernels::KernelSet;
use crate::pool::ThreadPool;

/// Positions in one page of the KV cache.
pub const KV_PAGE_TOKENS: usize = 32;

/// Rows of one prefill chunk that are done together.
const TILE_ROWS: usize = 4;

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; query head h uses h / (`n_heads` / `n_kv_heads`).
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// Keys and values of one layer.
#[derive(Clone, Copy, Debug)]
pub struct KvLayer<'a> {
    /// Keys: (`n_pages`, `n_kv_heads`, [`KV_PAGE_TOKENS`], `head_dim`).
    pub keys: &'a [f16],
    /// Values: the same shape.
    pub values: &'a [f16],
}

/// What one query row sees.
#[derive(Clone, Copy, Debug)]
pub struct AttentionRow<'a> {
    /// The page of each [`KV_PAGE_TOKENS`] positions of its sequence. Consecutive rows with the very same slice
    /// are done together.
    pub pages: &'a [u32],
    /// It sees positions `0..n_visible`.
    pub n_visible: usize,
}

/// Room for scores, allocated once.
#[derive(Debug)]
pub struct AttentionScratch {
    // One for each thread of the pool, which alone locks it: (TILE_ROWS * group, stride).
    threads: Vec<Mutex<Vec<f32>>>,
    group: usize,
    n_ctx: usize,
}

impl AttentionScratch {
    /// For `n_threads` threads, `group` query heads to a KV head, and contexts of up to `n_ctx` positions.
    #[must_use]
    pub fn new(n_threads: usize, group: usize, n_ctx: usize) -> Self {
        let len = TILE_ROWS * group * score_stride(n_ctx);
        Self { threads: (0..n_threads).map(|_| Mutex::new(vec![0.0; len])).collect(), group, n_ctx }
    }
}

/// Scores of one query, padded to whole vectors.
fn score_stride(n_visible_max: usize) -> usize {
    n_visible_max.next_multiple_of(16)
}

impl KernelSet {
    /// Attention of query rows `q` (n, `n_heads`, `head_dim`) into `out` (the same shape). The keys and values
    /// of the rows' own positions must have been stored.
    ///
    /// # Panics
    /// If shapes do not fit each other, `scratch` is for fewer threads, heads or positions, a row sees no
    /// position, or a page does not exist.
    #[expect(
        clippy::too_many_arguments,
        reason = "the operands of one operation; a struct would only rename them"
    )]
    pub fn attention(
        self,
        pool: &ThreadPool,
        shape: AttentionShape,
        q: &[f32],
        kv: KvLayer<'_>,
        rows: &[AttentionRow<'_>],
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) {
        let AttentionShape { n_heads, n_kv_heads, head_dim } = shape;
        assert!(n_kv_heads > 0 && head_dim > 0 && n_heads.is_multiple_of(n_kv_heads), "shape {shape:?}");
        assert!(q.len() == rows.len() * n_heads * head_dim && out.len() == q.len(), "rows of {shape:?}");
        assert!(n_heads / n_kv_heads <= scratch.group, "scratch for groups of {}", scratch.group);
        assert!(pool.n_threads() <= scratch.threads.len(), "scratch for {} threads", scratch.threads.len());
        for row in rows {
            let n_max = scratch.n_ctx.min(row.pages.len() * KV_PAGE_TOKENS);
            assert!(row.n_visible > 0 && row.n_visible <= n_max, "{} of {n_max} positions", row.n_visible);
        }
        let out = SharedOut::new(out);
        // With few rows it matters more that every thread has work.
        let tile_rows = if rows.len() >= TILE_ROWS * pool.n_threads() { TILE_ROWS } else { 1 };
        let n_tiles = rows.len().div_ceil(tile_rows);
        let scratch = &*scratch;
        // Long rows last would leave threads idle at the end: the last tiles first.
        pool.for_each_chunk(n_tiles * n_kv_heads, 1, &|thread, items| {
            let mut scores = scratch.threads[thread].lock().unwrap_or_else(PoisonError::into_inner);
            for item in items {
                let (tile, kv_head) = (n_tiles - 1 - item / n_kv_heads, item % n_kv_heads);
                let mut row = tile * tile_rows;
                let end = rows.len().min(row + tile_rows);
                while row < end {
                    let n =
                        rows[row..end].iter().take_while(|r| std::ptr::eq(r.pages, rows[row].pages)).count();
                    let (tile, scores) = (&rows[row..row + n], &mut scores[..]);
                    self.on_lanes(Tile {
                        shape,
                        q,
                        kv,
                        rows: tile,
                        first_row: row,
                        kv_head,
                        scores,
                        out: &out,
                    });
                    row += n;
                }
            }
        });
    }
}

/// Rows of one sequence and the query heads of one KV head. A "query" is one of both; they are numbered row by row.
struct Tile<'a> {
    shape: AttentionShape,
    q: &'a [f32], // (n, n_heads, head_dim), all rows
    kv: KvLayer<'a>,
    rows: &'a [AttentionRow<'a>],
    first_row: usize,
    kv_head: usize,
    scores: &'a mut [f32],       // (queries, stride)
    out: &'a SharedOut<'a, f32>, // As q.
}

impl LanesTask for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        self.score(lanes);
        for query in 0..self.n_queries() {
            let (n_visible, stride) = (self.n_visible(query), self.stride());
            self.part(query).fill(0.0);
            let scores = &mut self.scores[query * stride..][..score_stride(n_visible)];
            softmax(lanes, scores, n_visible);
        }
        self.mix(lanes);
        for query in 0..self.n_queries() {
            let (n_visible, stride) = (self.n_visible(query), self.stride());
            let sum = sum_of(lanes, &self.scores[query * stride..][..score_stride(n_visible)]);
            let inverse = 1.0 / sum;
            self.part(query).iter_mut().for_each(|v| *v *= inverse);
        }
    }
}

impl Tile<'_> {
    fn group(&self) -> usize {
        self.shape.n_heads / self.shape.n_kv_heads
    }

    fn n_queries(&self) -> usize {
        self.rows.len() * self.group()
    }

    fn n_visible(&self, query: usize) -> usize {
        self.rows[query / self.group()].n_visible
    }

    /// Of the scores of a query: as long as the longest needs.
    fn stride(&self) -> usize {
        self.rows.iter().map(|row| score_stride(row.n_visible)).max().unwrap_or(0)
    }

    /// Where a query lies in `q` and `out`.
    fn start(&self, query: usize) -> usize {
        let (row, head) = (self.first_row + query / self.group(), query % self.group());
        (row * self.shape.n_heads + self.kv_head * self.group() + head) * self.shape.head_dim
    }

    #[inline(always)]
    fn query(&self, query: usize) -> &[f32] {
        &self.q[self.start(query)..][..self.shape.head_dim]
    }

    #[expect(unsafe_code, clippy::mut_from_ref, reason = "tiles write disjoint parts of the output")]
    #[inline(always)]
    fn part(&self, query: usize) -> &mut [f32] {
        // SAFETY: a row and KV head belong to one tile, and within it callers hold parts of different queries.
        unsafe { self.out.part(self.start(query), self.shape.head_dim) }
    }

    /// Calls for each page: its first position, and where its keys and values lie.
    #[inline(always)]
    fn page_start(&self, page_idx: usize) -> usize {
        let page = self.rows[0].pages[page_idx] as usize;
        (page * self.shape.n_kv_heads + self.kv_head) * KV_PAGE_TOKENS * self.shape.head_dim
    }

    fn n_pages(&self) -> usize {
        self.rows.iter().map(|row| row.n_visible.div_ceil(KV_PAGE_TOKENS)).max().unwrap_or(0)
    }

    #[inline(always)]
    fn score<L: Lanes>(&mut self, lanes: L) {
        let head_dim = self.shape.head_dim;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let stride = self.stride();
        for page in 0..self.n_pages() {
            let keys = &self.kv.keys[self.page_start(page)..][..KV_PAGE_TOKENS * head_dim];
            let first = page * KV_PAGE_TOKENS;
            let mut query = 0;
            while query < self.n_queries() {
                // Four together as far as all of them see, then each alone.
                let n_together = if query + 4 <= self.n_queries() { 4 } else { 1 };
                let mut common = 0;
                if n_together == 4 {
                    common = (query..query + 4).map(|i| self.n_visible(i)).min().unwrap_or(0);
                    let count = common.saturating_sub(first).min(KV_PAGE_TOKENS);
                    let q = [query, query + 1, query + 2, query + 3];
                    for (t, key) in keys.chunks_exact(head_dim).take(count).enumerate() {
                        let scores = dots(
                            lanes,
                            [self.query(q[0]), self.query(q[1]), self.query(q[2]), self.query(q[3])],
                            key,
                        );
                        for (q, score) in q.iter().zip(lanes.sum4(scores)) {
                            self.scores[q * stride + first + t] = score * scale;
                        }
                    }
                }
                for query in query..query + n_together {
                    let begin = common.saturating_sub(first).min(KV_PAGE_TOKENS);
                    let end = self.n_visible(query).saturating_sub(first).min(KV_PAGE_TOKENS);
                    for t in begin..end {
                        let [score] = dots(lanes, [self.query(query)], &keys[t * head_dim..][..head_dim]);
                        self.scores[query * stride + first + t] = lanes.sum(score) * scale;
                    }
                }
                query += n_together;
            }
        }
    }

    /// Adds the values, weighted by what `softmax` left in `scores`, to the output.
    #[inline(always)]
    fn mix<L: Lanes>(&self, lanes: L) {
        let head_dim = self.shape.head_dim;
        let stride = self.stride();
        for page in 0..self.n_pages() {
            let values = &self.kv.values[self.page_start(page)..][..KV_PAGE_TOKENS * head_dim];
            let first = page * KV_PAGE_TOKENS;
            let weights =
                |query: usize, from: usize, to: usize| &self.scores[query * stride + first..][from..to];
            let mut query = 0;
            while query < self.n_queries() {
                let n_together = if query + 4 <= self.n_queries() { 4 } else { 1 };
                let mut common = 0;
                if n_together == 4 {
                    common = (query..query + 4).map(|i| self.n_visible(i)).min().unwrap_or(0);
                    common = common.saturating_sub(first).min(KV_PAGE_TOKENS);
                    let e = [query, query + 1, query + 2, query + 3].map(|query| weights(query, 0, common));
                    let out = [query, query + 1, query + 2, query + 3].map(|query| self.part(query));
                    mix_page(lanes, e, &values[..common * head_dim], out);
                }
                for query in query..query + n_together {
                    let end = self.n_visible(query).saturating_sub(first).min(KV_PAGE_TOKENS);
                    if common < end {
                        let e = weights(query, common, end);
                        mix_page(lanes, [e], &values[common * head_dim..end * head_dim], [self.part(query)]);
                    }
                }
                query += n_together;
            }
        }
    }
}

/// Lane sums of `Q` queries times one key. (Loops over vectors go by index: iterators that yield them are not
/// always inlined, and then pass them through memory.)
#[inline(always)]
fn dots<L: Lanes, const Q: usize>(lanes: L, q: [&[f32]; Q], key: &[f16]) -> [L::V; Q] {
    let mut acc = [lanes.splat(0.0); Q];
    let (whole, rest) = key.as_chunks::<16>();
    for (j, k) in whole.iter().enumerate() {
        let k = lanes.load_f16(k);
        for i in 0..Q {
            acc[i] = lanes.fma(lanes.load(&q[i].as_chunks().0[j]), k, acc[i]);
        }
    }
    if !rest.is_empty() {
        let k = lanes.load_f16(&padded(rest, f16::ZERO));
        for i in 0..Q {
            acc[i] = lanes.fma(lanes.load(&padded(q[i].as_chunks::<16>().1, 0.0)), k, acc[i]);
        }
    }
    acc
}

/// Scores to `exp(score - max)`; those past `n_visible` to 0.
#[inline(always)]
fn softmax<L: Lanes>(lanes: L, scores: &mut [f32], n_visible: usize) {
    scores[n_visible..].fill(f32::NEG_INFINITY);
    let scores = scores.as_chunks_mut::<16>().0;
    let mut max = lanes.splat(f32::NEG_INFINITY);
    for scores in scores.iter() {
        max = lanes.max(lanes.load(scores), max);
    }
    let mut lane_max = [0.0; 16];
    lanes.store(max, &mut lane_max);
    let max = lane_max.iter().fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m });
    let minus_max = lanes.splat(-max);
    for scores in scores {
        lanes.store(lanes.exp(lanes.add(lanes.load(scores), minus_max)), scores);
    }
}

#[inline(always)]
fn sum_of<L: Lanes>(lanes: L, v: &[f32]) -> f32 {
    let mut sum = lanes.splat(0.0);
    for v in v.as_chunks::<16>().0 {
        sum = lanes.add(sum, lanes.load(v));
    }
    lanes.sum(sum)
}

/// `out[q] += e[q][t] * values[t]` in increasing t, for values (t, `head_dim`).
#[inline(always)]
fn mix_page<L: Lanes, const Q: usize>(lanes: L, e: [&[f32]; Q], values: &[f16], mut out: [&mut [f32]; Q]) {
    let head_dim = out[0].len();
    let n_vectors = head_dim / 16;
    let mut j = 0;
    while L::IS_WIDE && j + 4 <= n_vectors {
        mix_vectors::<L, Q, 4>(lanes, e, values, &mut out, j);
        j += 4;
    }
    while !L::IS_WIDE && j + 2 <= n_vectors && Q == 1 {
        mix_vectors::<L, Q, 2>(lanes, e, values, &mut out, j);
        j += 2;
    }
    while j < n_vectors {
        mix_vectors::<L, Q, 1>(lanes, e, values, &mut out, j);
        j += 1;
    }
    let rest = n_vectors * 16;
    if rest < head_dim {
        for (out, e) in out.into_iter().zip(e) {
            let mut acc = lanes.load(&padded(&out[rest..], 0.0));
            for (e, v) in e.iter().zip(values.chunks_exact(head_dim)) {
                acc = lanes.fma(lanes.splat(*e), lanes.load_f16(&padded(&v[rest..], f16::ZERO)), acc);
            }
            let mut last = [0.0; 16];
            lanes.store(acc, &mut last);
            out[rest..].copy_from_slice(&last[..head_dim - rest]);
        }
    }
}

/// The same for `B` vectors of the head from vector `j`.
#[inline(always)]
fn mix_vectors<L: Lanes, const Q: usize, const B: usize>(
    lanes: L,
    e: [&[f32]; Q],
    values: &[f16],
    out: &mut [&mut [f32]; Q],
    j: usize,
) {
    let head_dim = out[0].len();
    let mut acc = [[lanes.splat(0.0); B]; Q];
    for i in 0..Q {
        for (b, acc) in acc[i].iter_mut().enumerate() {
            *acc = lanes.load(&out[i].as_chunks().0[j + b]);
        }
    }
    for (t, v) in values.chunks_exact(head_dim).enumerate() {
        let mut weights = [lanes.splat(0.0); Q];
        for i in 0..Q {
            weights[i] = lanes.splat(e[i][t]);
        }
        let v = &v.as_chunks::<16>().0[j..][..B];
        for b in 0..B {
            let v = lanes.load_f16(&v[b]);
            for i in 0..Q {
                acc[i][b] = lanes.fma(weights[i], v, acc[i][b]);
            }
        }
    }
    for i in 0..Q {
        for (b, acc) in acc[i].iter().enumerate() {
            lanes.store(*acc, &mut out[i].as_chunks_mut().0[j + b]);
        }
    }
}
