//! The graph of a model: rows of tokens in, logits out.
//!
//! A row is one token of one sequence at one position. Rows of any sequences, prompt or answer, go through
//! together; by promise P4 what comes out for a row does not depend on the rows beside it.

use std::sync::Arc;

use crate::head::HeadImage;
use crate::kernels::KernelSet;
use crate::kernels::float::{Activation, AttentionRow, AttentionScratch, AttentionShape, RopeTable};
use crate::kernels::head::FastHeadScratch;
use crate::kernels::ternary::{MatmulJob, QuantizedRows, Store};
use crate::kv::KvCache;
use crate::model::{HyperParams, LayerWeights, Model};
use crate::pool::ThreadPool;

/// One token to process.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Token id, below `n_vocab`.
    pub token: u32,
    /// Its position in the sequence, from 0.
    pub position: u32,
    /// Pages of the sequence it belongs to.
    pub pages: &'a [u32],
    /// Whether the logits after this token are wanted.
    pub wants_logits: bool,
}

/// Everything a forward pass needs besides the rows; allocated once.
#[derive(Debug)]
pub struct Forward {
    model: Arc<Model>,
    kernels: KernelSet,
    pool: ThreadPool,
    rope: RopeTable,
    fast_head: Option<(HeadImage, FastHeadScratch)>,
    state: RunState,
}

/// Buffers of one pass, for up to `n_rows_max` rows.
#[derive(Debug)]
struct RunState {
    x: Vec<f32>,                         // (rows, n_embd): the residual stream
    q: Vec<f32>,                         // (rows, n_heads, head_dim)
    k: Vec<f32>,                         // (rows, n_kv_heads, head_dim)
    v: Vec<f32>,                         // (rows, n_kv_heads, head_dim)
    attn: Vec<f32>,                      // (rows, n_heads, head_dim)
    gate: Vec<f32>,                      // (rows, n_ff)
    up: Vec<f32>,                        // (rows, n_ff)
    acts: QuantizedRows,                 // (rows, the widest of the above)
    last: Vec<f32>,                      // (rows with logits, n_embd): picked rows of x
    normed: Vec<f32>,                    // (rows with logits, n_embd): those after the last norm
    logits: Vec<f32>,                    // (rows with logits, n_vocab)
    positions: Vec<u32>,                 // (rows)
    visible: Vec<AttentionRow<'static>>, // (rows), while a pass runs
    scratch: AttentionScratch,
}

/// Sizes that a [`Forward`] is allocated for.
#[derive(Clone, Copy, Debug)]
pub struct ForwardLimits {
    /// Rows in one pass.
    pub n_rows_max: usize,
    /// Rows with logits in one pass.
    pub n_logits_max: usize,
    /// Context window in tokens.
    pub n_ctx: usize,
}

/// What a pass costs at least, whatever computes it: what a measured rate is compared with.
///
/// Keys and values are left out; they depend on how long the sequences are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassCost {
    /// Bytes of weights that every pass reads, those of the head among them.
    pub bytes: u64,
    /// Multiplications of each row in the layers.
    pub row_macs: u64,
    /// Multiplications of each row that wants logits in the head.
    pub logits_macs: u64,
}

impl Forward {
    /// Allocates for `limits`. The pool's thread 0 is the one that will call [`Forward::run`].
    ///
    /// With a `fast_head`, which must be one for this model, logits come from it; else from the head in the file.
    #[must_use]
    pub fn new(
        model: Arc<Model>,
        kernels: KernelSet,
        pool: ThreadPool,
        fast_head: Option<HeadImage>,
        limits: ForwardLimits,
    ) -> Self {
        let hparams = model.hparams();
        let rope = RopeTable::new(limits.n_ctx, hparams.head_dim, hparams.rope_base, model.rope_freqs());
        let state = RunState::new(hparams, &limits, pool.n_threads());
        let scratch = || FastHeadScratch::new(limits.n_logits_max, hparams.n_vocab, hparams.n_embd);
        let fast_head = fast_head.map(|image| (image, scratch()));
        Self { model, kernels, pool, rope, fast_head, state }
    }

    /// The model that is run.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The threads that compute.
    #[must_use]
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// The kernels in use.
    #[must_use]
    pub fn kernels(&self) -> KernelSet {
        self.kernels
    }

    /// What a pass costs at least.
    #[must_use]
    pub fn cost(&self) -> PassCost {
        let matrices = self.model.layers().iter().flat_map(|layer| {
            let LayerWeights { attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down, .. } = layer;
            [attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down]
        });
        let matrices = matrices.map(|weight| self.model.ternary(weight));
        let (mut bytes, mut row_macs) = (0, 0);
        for matrix in matrices {
            bytes += (matrix.n_rows() * matrix.row_bytes()) as u64;
            row_macs += matrix.n_rows() as u64 * matrix.n_cols() as u64;
        }
        let head = self.model.output();
        let whole_head = head.n_rows() * head.row_bytes();
        let head_bytes = match &self.fast_head {
            None => whole_head,
            // The rows that are computed exactly are at least these.
            Some((image, _)) => image.view().codes().len() + whole_head / 64,
        };
        PassCost {
            bytes: bytes + head_bytes as u64,
            row_macs,
            logits_macs: head.n_rows() as u64 * head.n_cols() as u64,
        }
    }

    /// Processes `rows` and stores their keys and values in `kv`.
    ///
    /// Rows of one sequence stand in order of position. Returns the logits, (rows that want them, n_vocab).
    ///
    /// # Panics
    /// If there are more rows than allocated for, or a row is out of the vocabulary or of its pages.
    pub fn run(&mut self, rows: &[Row<'_>], kv: &mut KvCache) -> &[f32] {
        let model = Arc::clone(&self.model);
        self.embed(&model, rows);
        self.state.positions.clear();
        self.state.positions.extend(rows.iter().map(|row| row.position));
        let mut visible = emptied(std::mem::take(&mut self.state.visible));
        visible.extend(
            rows.iter().map(|row| AttentionRow { pages: row.pages, n_visible: row.position as usize + 1 }),
        );
        for (index, layer) in model.layers().iter().enumerate() {
            self.attend(&model, (index, layer), rows, &visible, kv);
            self.feed_forward(&model, layer, rows.len());
        }
        self.state.visible = emptied(visible);
        self.head(&model, rows)
    }

    /// x = token_embd\[token\]
    fn embed(&mut self, model: &Model, rows: &[Row<'_>]) {
        let n_embd = model.hparams().n_embd;
        let table = model.token_embd();
        let x = &mut self.state.x[..rows.len() * n_embd];
        for (row, x) in rows.iter().zip(x.chunks_exact_mut(n_embd)) {
            table.dequantize_row(row.token as usize, x);
        }
    }

    /// x += attn_output · sub_norm(softmax(q kᵀ / √d) v)
    fn attend(
        &mut self,
        model: &Model,
        (index, layer): (usize, &LayerWeights),
        rows: &[Row<'_>],
        visible: &[AttentionRow<'_>],
        kv: &mut KvCache,
    ) {
        let hparams = model.hparams();
        let HyperParams { n_embd, n_heads, n_kv_heads, head_dim, rms_eps, .. } = *hparams;
        let style = hparams.architecture.rope_style();
        let (kernels, pool, n, s) = (self.kernels, &self.pool, rows.len(), &mut self.state);
        let (x, q) = (&mut s.x[..n * n_embd], &mut s.q[..n * hparams.q_width()]);
        let (k, v) = (&mut s.k[..n * hparams.kv_width()], &mut s.v[..n * hparams.kv_width()]);
        let attn = &mut s.attn[..n * hparams.q_width()];

        s.acts.reset(n, n_embd);
        kernels.norm_quantize(pool, x, Some((&layer.attn_norm, rms_eps)), &mut s.acts);
        kernels.ternary_matmul(
            pool,
            &s.acts,
            &mut [
                MatmulJob::new(model.ternary(&layer.attn_q), q, Store::Set),
                MatmulJob::new(model.ternary(&layer.attn_k), k, Store::Set),
                MatmulJob::new(model.ternary(&layer.attn_v), v, Store::Set),
            ],
        );
        kernels.rope_rows(pool, q, n_heads, &self.rope, &s.positions, style);
        kernels.rope_rows(pool, k, n_kv_heads, &self.rope, &s.positions, style);
        let each_kv = k.chunks_exact(hparams.kv_width()).zip(v.chunks_exact(hparams.kv_width()));
        for (row, (key, value)) in rows.iter().zip(each_kv) {
            kv.store(index, row.pages, row.position as usize, key, value);
        }
        let shape = AttentionShape { n_heads, n_kv_heads, head_dim };
        kernels.attention(pool, shape, q, kv.layer(index), visible, &mut s.scratch, attn);
        let sub_norm = layer.attn_sub_norm.as_deref().map(|weight| (weight, rms_eps));
        s.acts.reset(n, hparams.q_width());
        kernels.norm_quantize(pool, attn, sub_norm, &mut s.acts);
        let weights = model.ternary(&layer.attn_output);
        kernels.ternary_matmul(pool, &s.acts, &mut [MatmulJob::new(weights, x, Store::Add)]);
    }

    /// x += ffn_down · sub_norm(act(gate) · up)
    fn feed_forward(&mut self, model: &Model, layer: &LayerWeights, n: usize) {
        let HyperParams { n_embd, n_ff, rms_eps, architecture, .. } = *model.hparams();
        let activation: Activation = architecture.activation();
        let (kernels, pool, s) = (self.kernels, &self.pool, &mut self.state);
        let (x, gate, up) = (&mut s.x[..n * n_embd], &mut s.gate[..n * n_ff], &mut s.up[..n * n_ff]);

        s.acts.reset(n, n_embd);
        kernels.norm_quantize(pool, x, Some((&layer.ffn_norm, rms_eps)), &mut s.acts);
        kernels.ternary_matmul(
            pool,
            &s.acts,
            &mut [
                MatmulJob::new(model.ternary(&layer.ffn_gate), gate, Store::Set),
                MatmulJob::new(model.ternary(&layer.ffn_up), up, Store::Set),
            ],
        );
        let sub_norm = layer.ffn_sub_norm.as_deref().map(|weight| (weight, rms_eps));
        s.acts.reset(n, n_ff);
        kernels.glu_norm_quantize(pool, activation, [&*gate, &*up], sub_norm, &mut s.acts);
        let weights = model.ternary(&layer.ffn_down);
        kernels.ternary_matmul(pool, &s.acts, &mut [MatmulJob::new(weights, x, Store::Add)]);
    }

    /// logits = output · rmsnorm(x), for the rows that want them
    fn head(&mut self, model: &Model, rows: &[Row<'_>]) -> &[f32] {
        let HyperParams { n_embd, n_vocab, rms_eps, .. } = *model.hparams();
        let s = &mut self.state;
        let mut n = 0;
        for (row, x) in rows.iter().zip(s.x.chunks_exact(n_embd)) {
            if row.wants_logits {
                s.last[n * n_embd..][..n_embd].copy_from_slice(x);
                n += 1;
            }
        }
        let logits = &mut s.logits[..n * n_vocab];
        if n > 0 {
            let (last, normed) = (&s.last[..n * n_embd], &mut s.normed[..n * n_embd]);
            self.kernels.rms_norm_rows(&self.pool, last, model.output_norm(), rms_eps, normed);
            let exact = model.output();
            match &mut self.fast_head {
                None => self.kernels.dense_matmul(&self.pool, &exact, normed, logits),
                Some((image, scratch)) => {
                    self.kernels.fast_head(&self.pool, (&image.view(), &exact), normed, scratch, logits);
                }
            }
        }
        logits
    }
}

impl RunState {
    fn new(hparams: &HyperParams, limits: &ForwardLimits, n_threads: usize) -> Self {
        let (rows, n_logits) = (limits.n_rows_max, limits.n_logits_max);
        let widest = hparams.n_embd.max(hparams.n_ff).max(hparams.q_width());
        let group = hparams.n_heads / hparams.n_kv_heads;
        Self {
            x: vec![0.0; rows * hparams.n_embd],
            q: vec![0.0; rows * hparams.q_width()],
            k: vec![0.0; rows * hparams.kv_width()],
            v: vec![0.0; rows * hparams.kv_width()],
            attn: vec![0.0; rows * hparams.q_width()],
            gate: vec![0.0; rows * hparams.n_ff],
            up: vec![0.0; rows * hparams.n_ff],
            acts: QuantizedRows::new(rows, widest),
            last: vec![0.0; n_logits * hparams.n_embd],
            normed: vec![0.0; n_logits * hparams.n_embd],
            logits: vec![0.0; n_logits * hparams.n_vocab],
            positions: Vec::with_capacity(rows),
            visible: Vec::with_capacity(rows),
            scratch: AttentionScratch::new(n_threads, group, limits.n_ctx),
        }
    }
}

/// No rows, in the memory of those.
fn emptied<'a>(mut rows: Vec<AttentionRow<'_>>) -> Vec<AttentionRow<'a>> {
    rows.clear();
    // An iterator over a vector is collected in its place.
    rows.into_iter().map(|_| unreachable!("there are none")).collect()
}
