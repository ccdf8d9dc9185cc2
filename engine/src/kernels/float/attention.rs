//! One layer's attention over the paged KV cache.
//!
//! The definition, for a query q with positions 0..n visible: `score_t = dot(q, k_t) * (1 / sqrt(head_dim))`,
//! `e_t = exp(score_t - max)`, `sum` of e in the one order of float reductions, and
//! `out[d] = (fma over increasing t of e_t, v_t[d]) * (1 / sum)`.
//!
//! Queries that share keys (the heads of a group, and rows of one prefill chunk) go through each page of keys and
//! of values together. That does not change what any of them computes.
//!
//! Keys lie transposed within a page, so that a vector holds one element of sixteen positions: lane sums of sixteen
//! scores are then sixteen vectors, folded without a shuffle.
#![expect(clippy::cast_precision_loss, reason = "head dimensions are far below 2^24")]

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::lanes::{Lanes, LanesTask, padded};
use super::shared_out::SharedOut;
use super::stored::{KeyReader, KvLayer, Stored, ValueReader, ValueRow};
use crate::kernels::KernelSet;
use crate::pool::ThreadPool;

/// Positions in one page of the KV cache.
pub const KV_PAGE_TOKENS: usize = 32;

/// Rows of one prefill chunk that are done together.
const TILE_ROWS: usize = 4;

/// Pieces of work for each thread, at least, where heads can be cut up that far.
const ITEMS_PER_THREAD: usize = 4;

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
        // The heads of a group share what they read; but one that waits for work reads nothing.
        let group = n_heads / n_kv_heads;
        let wanted = if pool.n_threads() == 1 { 1 } else { ITEMS_PER_THREAD * pool.n_threads() };
        let n_parts = wanted.div_ceil((n_tiles * n_kv_heads).max(1)).min(group);
        let n_items_per_tile = n_kv_heads * n_parts;
        let scratch = &*scratch;
        // Long rows last would leave threads idle at the end: the last tiles first.
        pool.for_each_chunk(n_tiles * n_items_per_tile, 1, &|thread, items| {
            let mut scores = scratch.threads[thread].lock().unwrap_or_else(PoisonError::into_inner);
            for item in items {
                let (tile, item) = (n_tiles - 1 - item / n_items_per_tile, item % n_items_per_tile);
                let (kv_head, part) = (item / n_parts, item % n_parts);
                let first_head = kv_head * group + part * group / n_parts;
                let end_head = kv_head * group + (part + 1) * group / n_parts;
                let mut row = tile * tile_rows;
                let end = rows.len().min(row + tile_rows);
                while row < end {
                    let n =
                        rows[row..end].iter().take_while(|r| std::ptr::eq(r.pages, rows[row].pages)).count();
                    let tile = Tile {
                        shape,
                        q,
                        kv: (),
                        rows: &rows[row..row + n],
                        first_row: row,
                        kv_head,
                        heads: first_head..end_head,
                        scores: &mut scores[..],
                        out: &out,
                    };
                    match kv {
                        KvLayer::F16(kv) => self.on_lanes(tile.over(kv)),
                        KvLayer::Q8_0(kv) => self.on_lanes(tile.over(kv)),
                    }
                    row += n;
                }
            }
        });
    }
}

/// Rows of one sequence and some query heads of one KV head. A "query" is one of both; they are numbered row by row.
struct Tile<'a, S> {
    shape: AttentionShape,
    q: &'a [f32], // (n, n_heads, head_dim), all rows
    kv: S,
    rows: &'a [AttentionRow<'a>],
    first_row: usize,
    kv_head: usize,
    heads: Range<usize>,
    scores: &'a mut [f32],       // (queries, stride)
    out: &'a SharedOut<'a, f32>, // As q.
}

impl<'a> Tile<'a, ()> {
    fn over<S: Stored>(self, kv: S) -> Tile<'a, S> {
        let Self { shape, q, kv: (), rows, first_row, kv_head, heads, scores, out } = self;
        Tile { shape, q, kv, rows, first_row, kv_head, heads, scores, out }
    }
}

impl<S: Stored> LanesTask for Tile<'_, S> {
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

impl<S: Stored> Tile<'_, S> {
    fn n_queries(&self) -> usize {
        self.rows.len() * self.heads.len()
    }

    fn n_visible(&self, query: usize) -> usize {
        self.rows[query / self.heads.len()].n_visible
    }

    /// Of the scores of a query: as long as the longest needs.
    fn stride(&self) -> usize {
        self.rows.iter().map(|row| score_stride(row.n_visible)).max().unwrap_or(0)
    }

    /// Where a query lies in `q` and `out`.
    fn start(&self, query: usize) -> usize {
        let (row, head) = (self.first_row + query / self.heads.len(), query % self.heads.len());
        (row * self.shape.n_heads + self.heads.start + head) * self.shape.head_dim
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

    /// Where the keys and values of a page of the sequence are.
    #[inline(always)]
    fn place(&self, page_idx: usize) -> usize {
        self.rows[0].pages[page_idx] as usize * self.shape.n_kv_heads + self.kv_head
    }

    fn n_pages(&self) -> usize {
        self.rows.iter().map(|row| row.n_visible.div_ceil(KV_PAGE_TOKENS)).max().unwrap_or(0)
    }

    /// Fills `scores`, up to the next whole vector after the last position that the longest row sees.
    #[inline(always)]
    fn score<L: Lanes>(&mut self, lanes: L) {
        let n_positions = self.stride();
        for page in 0..self.n_pages() {
            let keys = self.kv.keys(self.place(page), self.shape.head_dim);
            let first = page * KV_PAGE_TOKENS;
            for begin in (0..KV_PAGE_TOKENS.min(n_positions - first)).step_by(16) {
                let mut query = 0;
                while L::IS_WIDE && query + 8 <= self.n_queries() {
                    self.score_some::<L, 8, 1>(lanes, query, (keys, begin), first);
                    query += 8;
                }
                while L::IS_WIDE && query + 4 <= self.n_queries() {
                    self.score_some::<L, 4, 2>(lanes, query, (keys, begin), first);
                    query += 4;
                }
                while query + 2 <= self.n_queries() {
                    self.score_some::<L, 2, 1>(lanes, query, (keys, begin), first);
                    query += 2;
                }
                if query < self.n_queries() {
                    self.score_some::<L, 1, 2>(lanes, query, (keys, begin), first);
                }
            }
        }
    }

    /// Scores of `Q` queries at the sixteen positions from `begin` of a page whose first position is `first`.
    #[inline(always)]
    fn score_some<L: Lanes, const Q: usize, const P: usize>(
        &mut self,
        lanes: L,
        query: usize,
        (keys, begin): (S::Keys, usize),
        first: usize,
    ) {
        let scale = lanes.splat(1.0 / (self.shape.head_dim as f32).sqrt());
        let stride = self.stride();
        let mut queries = [&[0.0_f32][..]; Q];
        for (i, q) in queries.iter_mut().enumerate() {
            *q = self.query(query + i);
        }
        let sums = dots::<L, S::Keys, Q, P>(lanes, queries, keys, begin);
        for (i, sums) in sums.iter().enumerate() {
            let scores = &mut self.scores[(query + i) * stride + first + begin..];
            lanes.store(lanes.mul(*sums, scale), &mut scores.as_chunks_mut().0[0]);
        }
    }

    /// Adds the values, weighted by what `softmax` left in `scores`, to the output.
    #[inline(always)]
    fn mix<L: Lanes>(&self, lanes: L) {
        let stride = self.stride();
        for page in 0..self.n_pages() {
            let values = self.kv.values(self.place(page), self.shape.head_dim);
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
                    mix_page(lanes, e, (values, 0), out);
                }
                for query in query..query + n_together {
                    let end = self.n_visible(query).saturating_sub(first).min(KV_PAGE_TOKENS);
                    if common < end {
                        let e = weights(query, common, end);
                        mix_page(lanes, [e], (values, common), [self.part(query)]);
                    }
                }
                query += n_together;
            }
        }
    }
}

/// Dot products of `Q` queries with sixteen keys, which lie (`head_dim`, [`KV_PAGE_TOKENS`]) from position `begin`:
/// a lane for each key. `P` pairs of the lanes that the fixed order speaks of are summed up at a time; here each is a
/// vector.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "iterators that yield vectors are not always inlined")]
fn dots<L: Lanes, K: KeyReader, const Q: usize, const P: usize>(
    lanes: L,
    queries: [&[f32]; Q],
    keys: K,
    begin: usize,
) -> [L::V; Q] {
    let head_dim = keys.head_dim();
    let queries = queries.map(|q| &q[..head_dim]);
    let mut folded = [[lanes.splat(0.0); 8]; Q];
    for first in (0..8).step_by(P) {
        let mut acc = [[[lanes.splat(0.0); 2]; P]; Q];
        for d in (first..head_dim).step_by(16) {
            // Blocks are as long as sixteen, or twice.
            let scale = keys.scale(lanes, d, begin);
            for p in 0..P {
                for upper in 0..2 {
                    let d = d + p + 8 * upper;
                    if d >= head_dim {
                        continue;
                    }
                    let key = keys.at(lanes, d, begin, scale);
                    for i in 0..Q {
                        acc[i][p][upper] = lanes.fma(lanes.splat(queries[i][d]), key, acc[i][p][upper]);
                    }
                }
            }
        }
        for i in 0..Q {
            for p in 0..P {
                folded[i][first + p] = lanes.add(acc[i][p][0], acc[i][p][1]);
            }
        }
    }
    let mut sums = [lanes.splat(0.0); Q];
    for i in 0..Q {
        let mut v = folded[i];
        for half in [4, 2, 1] {
            for j in 0..half {
                v[j] = lanes.add(v[j], v[j + half]);
            }
        }
        sums[i] = v[0];
    }
    sums
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

/// `out[q] += e[q][t] * values[first + t]` in increasing t.
#[inline(always)]
fn mix_page<L: Lanes, V: ValueReader, const Q: usize>(
    lanes: L,
    e: [&[f32]; Q],
    (values, first): (V, usize),
    mut out: [&mut [f32]; Q],
) {
    let head_dim = out[0].len();
    let n_vectors = head_dim / 16;
    let mut j = 0;
    while L::IS_WIDE && j + 4 <= n_vectors {
        mix_vectors::<L, V, Q, 4>(lanes, e, (values, first), &mut out, j);
        j += 4;
    }
    while !L::IS_WIDE && j + 2 <= n_vectors && Q == 1 {
        mix_vectors::<L, V, Q, 2>(lanes, e, (values, first), &mut out, j);
        j += 2;
    }
    while j < n_vectors {
        mix_vectors::<L, V, Q, 1>(lanes, e, (values, first), &mut out, j);
        j += 1;
    }
    let rest = n_vectors * 16;
    if rest < head_dim {
        for (out, e) in out.into_iter().zip(e) {
            let mut acc = lanes.load(&padded(&out[rest..], 0.0));
            for (e, row) in e.iter().zip(values.rows(first..first + e.len())) {
                acc = lanes.fma(lanes.splat(*e), row.rest(lanes, n_vectors), acc);
            }
            let mut last = [0.0; 16];
            lanes.store(acc, &mut last);
            out[rest..].copy_from_slice(&last[..head_dim - rest]);
        }
    }
}

/// The same for `B` vectors of the head from vector `j`.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "iterators that yield vectors are not always inlined")]
fn mix_vectors<L: Lanes, V: ValueReader, const Q: usize, const B: usize>(
    lanes: L,
    e: [&[f32]; Q],
    (values, first): (V, usize),
    out: &mut [&mut [f32]; Q],
    j: usize,
) {
    let mut acc = [[lanes.splat(0.0); B]; Q];
    for i in 0..Q {
        for (b, acc) in acc[i].iter_mut().enumerate() {
            *acc = lanes.load(&out[i].as_chunks().0[j + b]);
        }
    }
    for (t, row) in values.rows(first..first + e[0].len()).enumerate() {
        let mut weights = [lanes.splat(0.0); Q];
        for i in 0..Q {
            weights[i] = lanes.splat(e[i][t]);
        }
        let row = row.part(j, B);
        for b in 0..B {
            let v = row.vector(lanes, b);
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
