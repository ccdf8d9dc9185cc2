//! The graph of a model: rows of tokens in, logits out.
//!
//! A row is one token of one sequence at one position. Rows of any sequences, prompt or answer, go through
//! together; by promise P4 what comes out for a row does not depend on the rows beside it.

use std::sync::Arc;

use crate::fast_image::{FastImage, ImageLayer};
use crate::head::Wanted;
use crate::kernels::KernelSet;
use crate::kernels::float::{Activation, AttentionRow, AttentionScratch, AttentionShape, KvSlots, RopeTable};
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
    /// Which of them: all, or those that can decide. Others are minus infinity then.
    pub wanted: Option<Wanted<'a>>,
}

/// Everything a forward pass needs besides the rows; allocated once.
#[derive(Debug)]
pub struct Forward {
    model: Arc<Model>,
    kernels: KernelSet,
    pool: ThreadPool,
    rope: RopeTable,
    fast: Option<Fast>,
    n_logits_max: usize,
    state: RunState,
    read_bytes: u64, // Of weights, by the last pass.
}

/// What is read instead of the file where it gives the same.
#[derive(Debug)]
struct Fast {
    image: FastImage,
    head_scratch: Option<FastHeadScratch>, // If the image has the screen of the head.
    wanted: Vec<Wanted<'static>>,          // Empty between passes.
}

/// Buffers of one pass, for up to `n_rows_max` rows.
#[derive(Debug)]
struct RunState {
    x: Vec<f32>,                         // (rows, n_embd): the residual stream
    block: Vec<f32>,                     // (rows, half a layer): q, k, v and attn; then gate and up
    acts: QuantizedRows,                 // (rows, the widest of the above)
    last: Vec<f32>,                      // (rows with logits, n_embd): picked rows of x
    normed: Vec<f32>,                    // (rows with logits, n_embd): those after the last norm
    logits: Vec<f32>,                    // (rows with logits, n_vocab)
    positions: Vec<u32>,                 // (rows)
    visible: Vec<AttentionRow<'static>>, // (rows), while a pass runs
    slots: KvSlots,                      // (rows): where keys and values go
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
    #[must_use]
    pub fn new(model: Arc<Model>, kernels: KernelSet, pool: ThreadPool, limits: ForwardLimits) -> Self {
        let hparams = model.hparams();
        let rope = RopeTable::new(limits.n_ctx, hparams.head_dim, hparams.rope_base, model.rope_freqs());
        let state = RunState::new(hparams, &limits, pool.n_threads());
        Self {
            model,
            kernels,
            pool,
            rope,
            fast: None,
            n_logits_max: limits.n_logits_max,
            state,
            read_bytes: 0,
        }
    }

    /// From now on reads `image`, which is one of this model, where it gives the same as the file.
    pub fn adopt(&mut self, image: FastImage) {
        let (hparams, n_threads) = (self.model.hparams(), self.pool.n_threads());
        let scratch = FastHeadScratch::new;
        let head_scratch =
            image.head().map(|_| scratch(self.n_logits_max, hparams.n_vocab, hparams.n_embd, n_threads));
        let wanted = Vec::with_capacity(self.n_logits_max);
        self.fast = Some(Fast { image, head_scratch, wanted });
    }

    /// What is read instead of the file.
    #[must_use]
    pub fn fast_image(&self) -> Option<&FastImage> {
        self.fast.as_ref().map(|fast| &fast.image)
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
        let mut row_macs = 0;
        for matrix in self.model.ternary_matrices() {
            row_macs += matrix.n_rows() as u64 * matrix.n_cols() as u64;
        }
        let head = self.model.output();
        PassCost {
            bytes: self.ternary_bytes(1) + self.head_bytes(true),
            row_macs,
            logits_macs: head.n_rows() as u64 * head.n_cols() as u64,
        }
    }

    /// Bytes of weights that the last pass read: not those that it could leave out because they are multiplied with zero.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// Bytes of all ternary matrices, in the form in which a pass of so many rows reads them.
    fn ternary_bytes(&self, n_rows: usize) -> u64 {
        let image = self.fast_image().filter(|_| self.kernels.reads_image_for(n_rows));
        let bytes = image.and_then(|image| image.ternary_bytes(n_rows)).unwrap_or_else(|| {
            self.model.ternary_matrices().map(|matrix| matrix.n_rows() * matrix.row_bytes()).sum()
        });
        bytes as u64
    }

    /// Bytes of the head. Rows that are looked at more closely behind a screen come on top.
    fn head_bytes(&self, is_screened: bool) -> u64 {
        let head = self.model.output();
        let screen = self.fast_image().and_then(FastImage::head).filter(|_| is_screened);
        screen.map_or(head.n_rows() * head.row_bytes(), |screen| screen.half(0).len()) as u64
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
        if let Some(last) = rows.iter().map(|row| row.position).max() {
            self.rope.reach(last as usize);
        }
        let mut visible = emptied(std::mem::take(&mut self.state.visible));
        visible.extend(
            rows.iter().map(|row| AttentionRow { pages: row.pages, n_visible: row.position as usize + 1 }),
        );
        self.state.slots.set(&visible);
        self.read_bytes = self.ternary_bytes(rows.len());
        for (index, layer) in model.layers().iter().enumerate() {
            self.attend(&model, (index, layer), &visible, kv);
            self.read_bytes -= self.feed_forward(&model, layer, index, rows.len());
        }
        self.state.visible = emptied(visible);
        if rows.iter().any(|row| row.wants_logits) {
            self.read_bytes += self.head_bytes(rows.iter().any(|row| row.wanted.is_some()));
        }
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
        visible: &[AttentionRow<'_>],
        kv: &mut KvCache,
    ) {
        let hparams = model.hparams();
        let image = self.fast.as_ref().and_then(|fast| fast.image.layer(model, index));
        let image = image.as_ref();
        let HyperParams { n_embd, n_heads, n_kv_heads, head_dim, rms_eps, .. } = *hparams;
        let style = hparams.architecture.rope_style();
        let (kernels, pool, n, s) = (self.kernels, &self.pool, visible.len(), &mut self.state);
        let (q_len, kv_len) = (n * hparams.q_width(), n * hparams.kv_width());
        let x = &mut s.x[..n * n_embd];
        let (q, block) = s.block.split_at_mut(q_len); // (n, n_heads, head_dim)
        let (k, block) = block.split_at_mut(kv_len); // (n, n_kv_heads, head_dim)
        let (v, block) = block.split_at_mut(kv_len); // As k.
        let attn = &mut block[..q_len]; // As q.

        s.acts.reset(n, n_embd);
        kernels.norm_quantize(pool, x, Some((&layer.attn_norm, rms_eps)), &mut s.acts);
        kernels.ternary_matmul(
            pool,
            &s.acts,
            &mut [
                MatmulJob::new(model.ternary(&layer.attn_q), q, Store::Set)
                    .with_lookup(image.map(|image| image.attn_q)),
                MatmulJob::new(model.ternary(&layer.attn_k), k, Store::Set)
                    .with_lookup(image.map(|image| image.attn_k)),
                MatmulJob::new(model.ternary(&layer.attn_v), v, Store::Set)
                    .with_lookup(image.map(|image| image.attn_v)),
            ],
        );
        kernels.rope_rows(pool, q, n_heads, &self.rope, &s.positions, style);
        kernels.rope_rows(pool, k, n_kv_heads, &self.rope, &s.positions, style);
        kv.store((kernels, pool), index, &s.slots, [k, v]);
        let shape = AttentionShape { n_heads, n_kv_heads, head_dim };
        kernels.attention(pool, shape, q, kv.layer(index), visible, &mut s.scratch, attn);
        let sub_norm = layer.attn_sub_norm.as_deref().map(|weight| (weight, rms_eps));
        s.acts.reset(n, hparams.q_width());
        kernels.norm_quantize(pool, attn, sub_norm, &mut s.acts);
        let job = MatmulJob::new(model.ternary(&layer.attn_output), x, Store::Add);
        kernels.ternary_matmul(pool, &s.acts, &mut [job.with_lookup(image.map(|image| image.attn_output))]);
    }

    /// x += ffn_down · sub_norm(act(gate) · up). Returns how many bytes of weights were left out.
    fn feed_forward(&mut self, model: &Model, layer: &LayerWeights, index: usize, n: usize) -> u64 {
        let image = self.fast.as_ref().and_then(|fast| fast.image.layer(model, index));
        let image: Option<&ImageLayer<'_>> = image.as_ref();
        let HyperParams { n_embd, n_ff, rms_eps, architecture, .. } = *model.hparams();
        let activation: Activation = architecture.activation();
        let (kernels, pool, s) = (self.kernels, &self.pool, &mut self.state);
        let x = &mut s.x[..n * n_embd];
        let (gate, up) = s.block[..2 * n * n_ff].split_at_mut(n * n_ff); // (n, n_ff) both

        s.acts.reset(n, n_embd);
        kernels.norm_quantize(pool, x, Some((&layer.ffn_norm, rms_eps)), &mut s.acts);
        let gate_job = MatmulJob::new(model.ternary(&layer.ffn_gate), gate, Store::Set)
            .with_lookup(image.map(|image| image.ffn_gate));
        let up_job = MatmulJob::new(model.ternary(&layer.ffn_up), up, Store::Set)
            .with_lookup(image.map(|image| image.ffn_up));
        kernels.ternary_matmul(pool, &s.acts, &mut [gate_job, up_job]);
        let sub_norm = layer.ffn_sub_norm.as_deref().map(|weight| (weight, rms_eps));
        s.acts.reset(n, n_ff);
        kernels.glu_norm_quantize(pool, activation, [&*gate, &*up], sub_norm, &mut s.acts);
        let job = MatmulJob::new(model.ternary(&layer.ffn_down), x, Store::Add)
            .with_lookup(image.map(|image| image.ffn_down));
        kernels.ternary_sparse(pool, &s.acts, job, image.and_then(|image| image.down_columns)) as u64
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
            let fast = self
                .fast
                .as_mut()
                .and_then(|fast| Some((fast.image.head()?, fast.head_scratch.as_mut()?, &mut fast.wanted)));
            let Some((head, scratch, memory)) = fast else {
                self.kernels.dense_matmul(&self.pool, &exact, normed, logits);
                return logits;
            };
            let mut all = rows.iter().filter(|row| row.wants_logits).map(|row| row.wanted).peekable();
            let mut same = emptied(std::mem::take(memory));
            let mut done = 0;
            // Neighbours that want the same kind go together.
            while let Some(first) = all.next() {
                let is_like_first = |other: &Option<Wanted<'_>>| other.is_some() == first.is_some();
                let others = std::iter::from_fn(|| all.next_if(is_like_first));
                let mut n_same = 0;
                same.clear();
                same.extend(std::iter::once(first).chain(others).inspect(|_| n_same += 1).flatten());
                let normed = &normed[done * n_embd..][..n_same * n_embd];
                let logits = &mut logits[done * n_vocab..][..n_same * n_vocab];
                if same.is_empty() {
                    self.kernels.dense_matmul(&self.pool, &exact, normed, logits);
                } else {
                    self.kernels.fast_head(&self.pool, (&head, &exact), (normed, &same), scratch, logits);
                }
                done += n_same;
            }
            *memory = emptied(same);
        }
        logits
    }
}

/// Nothing, in the memory of those: for items that only differ in how long they borrow.
pub(crate) fn emptied<T, U>(mut items: Vec<T>) -> Vec<U> {
    items.clear();
    // An iterator over a vector is collected in its place.
    items.into_iter().map(|_| unreachable!("there are none")).collect()
}

impl ForwardLimits {
    /// Bytes of the buffers of one pass: those that grow with rows and logits.
    #[must_use]
    pub fn buffer_bytes(&self, hparams: &HyperParams) -> u64 {
        let floats = hparams.n_embd + RunState::block_len(hparams);
        let row_bytes = 4 * floats + RunState::widest(hparams) + ROW_BYTES;
        let logit_bytes = 4 * (2 * hparams.n_embd + hparams.n_vocab);
        (self.n_rows_max as u64 * row_bytes as u64) + (self.n_logits_max as u64 * logit_bytes as u64)
    }
}

/// Position, place in the cache, what attention sees of it, sums of its rounded activations: some numbers for each row.
const ROW_BYTES: usize = 512;

impl RunState {
    /// Floats of a row in the widest half of a layer.
    fn block_len(hparams: &HyperParams) -> usize {
        2 * hparams.n_ff.max(hparams.q_width() + hparams.kv_width())
    }

    /// Bytes of a row of rounded activations.
    fn widest(hparams: &HyperParams) -> usize {
        hparams.n_embd.max(hparams.n_ff).max(hparams.q_width())
    }

    fn new(hparams: &HyperParams, limits: &ForwardLimits, n_threads: usize) -> Self {
        let (rows, n_logits) = (limits.n_rows_max, limits.n_logits_max);
        let group = hparams.n_heads / hparams.n_kv_heads;
        Self {
            x: vec![0.0; rows * hparams.n_embd],
            block: vec![0.0; rows * Self::block_len(hparams)],
            acts: QuantizedRows::new(rows, Self::widest(hparams)),
            last: vec![0.0; n_logits * hparams.n_embd],
            normed: vec![0.0; n_logits * hparams.n_embd],
            logits: vec![0.0; n_logits * hparams.n_vocab],
            positions: Vec::with_capacity(rows),
            visible: Vec::with_capacity(rows),
            slots: KvSlots::with_capacity(rows),
            scratch: AttentionScratch::new(n_threads, group, limits.n_ctx),
        }
    }
}
