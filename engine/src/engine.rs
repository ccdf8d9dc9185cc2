//! Continuous batching: sequences come and go, one step moves all of them on.
//!
//! Single-threaded towards the caller: one thread calls [`Engine::step`] again and again and owns everything; the
//! pool's threads only compute inside a step. Decoding sequences give one row each to a step; prompts
//! fill it up in chunks, sized so that a step stays short and nobody who decodes waits long for somebody's prompt.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fast_image::FastImage;
use crate::forward::{Forward, ForwardLimits, PassCost, Row, emptied};
use crate::kernels::KernelSet;
use crate::kernels::ternary::BLOCK_TOKENS;
use crate::kv::{KvCache, KvShape, KvType, PagePool, pages_for};
use crate::model::{HyperParams, Model};
use crate::pool::{PoolError, PoolOptions, ThreadPool, Wait};
use crate::sampler::{SamplerScratch, SamplingError};
use crate::sequence::{EngineEvent, Sequence, SequenceId, SequenceRequest, StepEvents};
use crate::speculation::{Speculation, StepCosts, decode_rows_max};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// How long a step with prompt tokens may take while nobody waits for the next token: longer steps read the weights less often, and need more memory. A cancel and a
/// heartbeat have to fit between steps.
const STEP_TARGET_ALONE: Duration = Duration::from_secs(1);
/// Prompt tokens in a step before the speed of this machine is known.
const FIRST_CHUNK: usize = 16;

/// Sizes and placement of an engine.
#[derive(Debug)]
pub struct EngineOptions {
    /// One compute thread for each entry, pinned to the CPU if there is one. Thread 0 is the one that calls `step`.
    pub cpus: Vec<Option<u32>>,
    /// How threads wait for each other.
    pub wait: Wait,
    /// Start of the names of the threads.
    pub thread_name: String,
    /// Which kernels.
    pub kernels: KernelSet,
    /// Context window; `None` takes the model's.
    pub n_ctx: Option<usize>,
    /// Sequences worked on together.
    pub max_batch: usize,
    /// Prompt tokens in one step, at most.
    pub prefill_chunk: usize,
    /// How long a step with prompt tokens should take while others wait for their next token.
    pub prefill_time: Duration,
    /// What keys and values are stored as.
    pub kv_type: KvType,
    /// Guess tokens from the text so far where it pays. Changes no answer.
    pub speculation: Speculation,
}

/// Why an engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The context window asked for is longer than the model's.
    #[error("a context of {asked} tokens was asked for, the model has {model}")]
    ContextTooLong {
        /// Asked for.
        asked: usize,
        /// Of the model.
        model: usize,
    },
    /// A size is zero.
    #[error("`{0}` must be at least 1")]
    Zero(&'static str),
    /// The vocabulary cannot be used.
    #[error("cannot read the tokenizer")]
    Tokenizer(#[source] TokenizerError),
    /// The vocabulary has more tokens than the embedding has rows.
    #[error("the tokenizer has {tokens} tokens, the embedding only {rows} rows")]
    VocabularySize {
        /// Tokens.
        tokens: usize,
        /// Rows.
        rows: usize,
    },
    /// The threads cannot be started or pinned.
    #[error("cannot start the compute threads")]
    Pool(#[source] PoolError),
}

/// Why a sequence is not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// There is nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {prompt} tokens, the context window {n_ctx}")]
    ContextExceeded {
        /// Tokens of the prompt.
        prompt: usize,
        /// Context window.
        n_ctx: usize,
    },
    /// A token id is out of the vocabulary.
    #[error("token id {token} is out of the vocabulary of {n_vocab}")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
    /// A sampling parameter means nothing.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// A sequence of this name is on board.
    #[error("sequence {0} is already there")]
    DuplicateId(SequenceId),
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Steps taken.
    pub steps: u64,
    /// Prompt tokens processed.
    pub prefill_tokens: u64,
    /// Tokens generated.
    pub decode_tokens: u64,
    /// Time in steps that processed prompts.
    pub prefill: Duration,
    /// Time in steps that only decoded.
    pub decode: Duration,
    /// Prompt tokens that were in the KV cache already.
    pub cached_tokens: u64,
    /// Guesses that were checked in a step.
    pub guessed_tokens: u64,
    /// Of those, the right ones.
    pub right_guesses: u64,
    /// Bytes of weights that the last step read that only decoded.
    pub step_bytes: u64,
}

/// A model, its threads and the sequences on board.
#[derive(Debug)]
pub struct Engine {
    forward: Forward,
    tokenizer: Arc<Tokenizer>,
    kv: KvCache,
    pages: PagePool,
    waiting: VecDeque<Sequence>, // Taken, not yet started: no slot or no pages are free.
    running: Vec<Sequence>,      // In order of admission.
    n_ctx: usize,
    max_batch: usize,
    chunk: ChunkSize,
    prefill_time: Duration,
    costs: StepCosts,
    speculation: Speculation,
    sampling: SamplerScratch,
    stats: EngineStats,
    // Of the step that is being taken; kept for their memory.
    rows: Vec<Row<'static>>,
    taken: Vec<Taken>,
    order: Vec<usize>,
}

impl Engine {
    /// Starts the threads and allocates everything that steps will need. Call it on the thread that will step.
    ///
    /// # Errors
    /// [`EngineError`] says which option, or which part of the model, does not fit.
    pub fn new(model: Arc<Model>, options: EngineOptions) -> Result<Self, EngineError> {
        let hparams = model.hparams();
        let n_ctx = options.n_ctx.unwrap_or(hparams.n_ctx);
        if n_ctx > hparams.n_ctx {
            return Err(EngineError::ContextTooLong { asked: n_ctx, model: hparams.n_ctx });
        }
        for (name, size) in
            [("ctx", n_ctx), ("max_batch", options.max_batch), ("prefill_chunk", options.prefill_chunk)]
        {
            if size == 0 {
                return Err(EngineError::Zero(name));
            }
        }
        let tokenizer = Tokenizer::from_gguf(model.gguf()).map_err(EngineError::Tokenizer)?;
        if tokenizer.n_vocab() > hparams.n_vocab {
            return Err(EngineError::VocabularySize { tokens: tokenizer.n_vocab(), rows: hparams.n_vocab });
        }
        let pool = PoolOptions { cpus: options.cpus, wait: options.wait, name: options.thread_name };
        let pool = ThreadPool::new(pool).map_err(EngineError::Pool)?;
        let n_vocab = hparams.n_vocab;
        let n_pages = options.max_batch * pages_for(n_ctx);
        let kv = KvCache::new(KvShape {
            kv_type: options.kv_type,
            n_layers: hparams.n_layers,
            n_kv_heads: hparams.n_kv_heads,
            head_dim: hparams.head_dim,
            n_pages,
        });
        let limits = pass_limits(options.max_batch, options.prefill_chunk, options.speculation, n_ctx);
        Ok(Self {
            forward: Forward::new(model, options.kernels, pool, limits),
            tokenizer: Arc::new(tokenizer),
            kv,
            pages: PagePool::new(n_pages),
            waiting: VecDeque::new(),
            running: Vec::with_capacity(options.max_batch),
            n_ctx,
            max_batch: options.max_batch,
            chunk: ChunkSize::new(options.prefill_chunk),
            prefill_time: options.prefill_time,
            costs: StepCosts::new(options.max_batch),
            speculation: options.speculation,
            sampling: SamplerScratch::new(n_vocab, n_ctx),
            stats: EngineStats::default(),
            rows: Vec::with_capacity(limits.n_rows_max),
            taken: Vec::with_capacity(options.max_batch),
            order: Vec::with_capacity(options.max_batch),
        })
    }

    /// The model that is run.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        self.forward.model()
    }

    /// Its tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The kernels in use.
    #[must_use]
    pub fn kernels(&self) -> KernelSet {
        self.forward.kernels()
    }

    /// What a step costs at least.
    #[must_use]
    pub fn cost(&self) -> PassCost {
        self.forward.cost()
    }

    /// The threads that compute.
    #[must_use]
    pub fn pool(&self) -> &ThreadPool {
        self.forward.pool()
    }

    /// From now on reads `image`, which is one of this model, where it gives the same as the file. Nothing that is
    /// generated changes, also not in the middle of an answer.
    pub fn adopt(&mut self, image: FastImage) {
        self.forward.adopt(image);
    }

    /// What is read instead of the file.
    #[must_use]
    pub fn fast_image(&self) -> Option<&FastImage> {
        self.forward.fast_image()
    }

    /// Context window in tokens.
    #[must_use]
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Counters since the start.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.stats
    }

    /// Sequences on board.
    #[must_use]
    pub fn n_sequences(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    /// The KV cache.
    #[must_use]
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// Pages of the KV cache that a new sequence could get.
    #[must_use]
    pub fn n_pages_available(&self) -> usize {
        self.pages.n_available()
    }

    /// Tokens in the KV cache.
    #[must_use]
    pub fn n_kv_tokens(&self) -> usize {
        self.running.iter().map(|sequence| sequence.n_stored).sum()
    }

    /// True if a step would do nothing.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.n_sequences() == 0
    }

    /// Takes a sequence on board. Steps report its tokens under `id`.
    ///
    /// # Errors
    /// [`SubmitError`] if it can never run; nothing is taken then.
    pub fn submit(&mut self, id: SequenceId, request: SequenceRequest) -> Result<(), SubmitError> {
        let n_vocab = self.model().hparams().n_vocab;
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.prompt.len() >= self.n_ctx {
            return Err(SubmitError::ContextExceeded { prompt: request.prompt.len(), n_ctx: self.n_ctx });
        }
        if let Some(token) = request.prompt.iter().chain(&request.resume).find(|t| **t as usize >= n_vocab) {
            return Err(SubmitError::UnknownToken { token: *token, n_vocab });
        }
        if self.running.iter().chain(&self.waiting).any(|sequence| sequence.id == id) {
            return Err(SubmitError::DuplicateId(id));
        }
        self.waiting.push_back(Sequence::new(id, request, &self.tokenizer, self.n_ctx, n_vocab)?);
        Ok(())
    }

    /// Gives a sequence up and frees its memory. False if it is not on board.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        if let Some(index) = self.waiting.iter().position(|sequence| sequence.id == id) {
            self.waiting.remove(index);
            return true;
        }
        let Some(index) = self.running.iter().position(|sequence| sequence.id == id) else { return false };
        let mut sequence = self.running.remove(index);
        self.pages.release(&mut sequence.pages);
        true
    }

    /// Moves every sequence on by a token or more, or a prompt by a chunk. `events` then holds what happened.
    ///
    /// A step in which no sequence comes or goes allocates nothing, but for log-probabilities that are asked for.
    pub fn step(&mut self, events: &mut StepEvents) {
        events.begin(decode_rows_max(self.max_batch));
        self.admit(events);
        if self.running.is_empty() {
            return;
        }
        let begun = Instant::now();
        let n_vocab = self.model().hparams().n_vocab;
        let n_prefill = self.choose_rows();
        let rows = fill_rows(emptied(std::mem::take(&mut self.rows)), &self.running, &self.taken);
        let n_rows = rows.len();
        let mut logits = self.forward.run(&rows, &mut self.kv).chunks_exact(n_vocab);
        self.rows = emptied(rows);
        let mut n_decoded = 0;
        for taken in &mut self.taken {
            let sequence = &mut self.running[taken.sequence];
            if !taken.is_complete {
                sequence.n_stored += taken.n_rows;
                continue;
            }
            let n_checked = sequence.guesser.n_checked;
            let logits = logits.by_ref().take(1 + n_checked);
            let n_stored = sequence.n_stored + taken.n_rows - n_checked;
            let mut logits = logits;
            let advance = sequence.advance(&mut logits, &self.tokenizer, &mut self.sampling, events);
            logits.for_each(drop); // Those after a wrong guess.
            sequence.n_stored = n_stored + advance.n_taken - 1;
            n_decoded += advance.n_tokens;
            self.stats.guessed_tokens += n_checked as u64;
            self.stats.right_guesses += advance.n_taken as u64 - 1;
            if taken.is_prefill {
                self.pages.publish(&sequence.history, n_stored, &sequence.pages);
            }
            if let Some(reason) = advance.end {
                events.push(EngineEvent::Finished { id: sequence.id, summary: sequence.summary(reason) });
                taken.has_ended = true;
            }
        }
        self.account(n_rows, n_prefill, n_decoded, begun.elapsed());
        for index in (0..self.taken.len()).rev().filter(|index| self.taken[*index].has_ended) {
            let mut sequence = self.running.remove(self.taken[index].sequence);
            self.pages.publish(&sequence.history, sequence.n_stored, &sequence.pages);
            self.pages.release(&mut sequence.pages);
        }
    }

    /// Chooses the rows of a step: one for each decoding sequence and its guesses, and a chunk of the prompts. Gives
    /// the number of prompt tokens.
    ///
    /// Half of the chunk belongs to the prompt that came first, the rest to those with the least left: no long
    /// prompt holds up a short one, and none waits for ever.
    fn choose_rows(&mut self) -> usize {
        let Self { running, taken, order, .. } = self;
        taken.clear();
        order.clear();
        order.extend((0..running.len()).filter(|index| running[*index].is_prefilling()));
        let is_anyone_decoding = order.len() < running.len();
        let target = if is_anyone_decoding { self.prefill_time } else { STEP_TARGET_ALONE };
        let mut chunk = self.chunk.rows(target, running.len() - order.len());
        for (index, sequence) in running.iter_mut().enumerate() {
            sequence.guesser.clear();
            let is_prefill = sequence.is_prefilling();
            let n_rows = usize::from(!is_prefill);
            taken.push(Taken {
                sequence: index,
                n_rows,
                is_prefill,
                is_complete: !is_prefill,
                has_ended: false,
            });
            if self.speculation != Speculation::Off && !is_prefill {
                sequence.guess();
            }
        }
        if order.is_empty() {
            self.choose_guesses();
            return 0;
        }
        let n_before = chunk;
        let first = order[0];
        order[1..].sort_unstable_by_key(|index| (running[*index].n_waiting(), *index));
        let mut take = |index: usize, n_max: usize| {
            let n = (running[index].n_waiting() - taken[index].n_rows).min(n_max).min(chunk);
            taken[index].n_rows += n;
            chunk -= n;
        };
        take(first, n_before.div_ceil(2));
        for index in &order[1..] {
            take(*index, usize::MAX);
        }
        take(first, usize::MAX);
        for taken in taken.iter_mut().filter(|taken| taken.is_prefill) {
            taken.is_complete = taken.n_rows == running[taken.sequence].n_waiting();
        }
        n_before - chunk
    }

    /// Decides which guesses are checked in a step that only decodes.
    fn choose_guesses(&mut self) {
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let mut so_far = (self.running.len(), self.running.len() as f32);
        for (sequence, taken) in self.running.iter_mut().zip(&mut self.taken) {
            match self.speculation {
                Speculation::Off => return,
                Speculation::Auto => so_far = sequence.guesser.choose(&self.costs, so_far),
                Speculation::Always => so_far.0 = sequence.guesser.choose_all(&self.costs, so_far.0),
            }
            taken.n_rows += sequence.guesser.n_checked;
        }
    }

    /// Starts waiting sequences while there is room for them.
    fn admit(&mut self, events: &mut StepEvents) {
        while self.running.len() < self.max_batch {
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            if let Some(reason) = sequence.replay(&self.tokenizer) {
                events.push(EngineEvent::Finished { id: sequence.id, summary: sequence.summary(reason) });
                continue;
            }
            let n_tokens = sequence.n_history_max;
            let Some(n_cached) = self.pages.acquire(&sequence.history, n_tokens, &mut sequence.pages) else {
                self.waiting.push_front(sequence);
                return;
            };
            sequence.start_at(n_cached);
            self.stats.cached_tokens += n_cached as u64;
            self.running.push(sequence);
        }
    }

    fn account(&mut self, n_rows: usize, n_prefill: usize, n_decoded: usize, elapsed: Duration) {
        self.stats.steps += 1;
        self.stats.prefill_tokens += n_prefill as u64;
        self.stats.decode_tokens += n_decoded as u64;
        if n_prefill > 0 {
            self.stats.prefill += elapsed;
            self.chunk.observe(n_rows, elapsed);
        } else {
            self.stats.decode += elapsed;
            self.stats.step_bytes = self.forward.read_bytes();
            self.costs.observe(n_rows, elapsed.as_secs_f32());
        }
    }
}

/// What a step takes from one sequence.
#[derive(Debug)]
struct Taken {
    sequence: usize, // Index in `running`.
    n_rows: usize,   // Guesses among them.
    is_prefill: bool,
    is_complete: bool, // The last token of the history is among the rows, so there are logits.
    has_ended: bool,
}

/// The rows themselves.
fn fill_rows<'a>(mut rows: Vec<Row<'a>>, running: &'a [Sequence], all_taken: &[Taken]) -> Vec<Row<'a>> {
    for taken in all_taken {
        let sequence = &running[taken.sequence];
        let tokens = sequence.history[sequence.n_stored..].iter().chain(sequence.guesser.checked());
        for (token, position) in tokens.take(taken.n_rows).zip(sequence.n_stored..) {
            rows.push(Row {
                token: *token,
                position: u32::try_from(position).unwrap_or(u32::MAX),
                pages: &sequence.pages,
                wants_logits: taken.is_complete && position + 1 >= sequence.history.len(),
                wanted: sequence.wanted(position + 1),
            });
        }
    }
    rows
}

/// What a pass needs room for.
fn pass_limits(
    max_batch: usize,
    prefill_chunk: usize,
    speculation: Speculation,
    n_ctx: usize,
) -> ForwardLimits {
    let n_logits_max = match speculation {
        Speculation::Off => max_batch,
        Speculation::Auto | Speculation::Always => decode_rows_max(max_batch),
    };
    ForwardLimits { n_rows_max: n_logits_max.max(max_batch + prefill_chunk), n_logits_max, n_ctx }
}

/// Bytes of an engine's buffers that grow with its options: activations and logits.
#[must_use]
pub fn buffer_bytes(hparams: &HyperParams, max_batch: usize, prefill_chunk: usize) -> u64 {
    // Speculation takes no less than its absence, and the window does not count here.
    pass_limits(max_batch, prefill_chunk, Speculation::Auto, hparams.n_ctx).buffer_bytes(hparams)
}

/// How many prompt tokens fit in a step on this machine, learnt from the steps so far.
#[derive(Debug)]
struct ChunkSize {
    max: usize,
    row_seconds: Option<f64>,
}

impl ChunkSize {
    fn new(max: usize) -> Self {
        Self { max, row_seconds: None }
    }

    /// Rows for a step that has `n_decoding` others.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of rows, clamped right after"
    )]
    fn rows(&self, target: Duration, n_decoding: usize) -> usize {
        let rows = self.row_seconds.map_or(FIRST_CHUNK, |row| (target.as_secs_f64() / row) as usize);
        // Whole blocks of the products, about: a part of one costs more than its part.
        let all = (rows + n_decoding + BLOCK_TOKENS / 2) / BLOCK_TOKENS * BLOCK_TOKENS;
        let rows = if rows < BLOCK_TOKENS { rows } else { all - n_decoding.min(all) };
        rows.clamp(1, self.max)
    }

    fn observe(&mut self, n_rows: usize, elapsed: Duration) {
        let row = (elapsed.as_secs_f64() / n_rows.max(1) as f64).max(1e-9);
        self.row_seconds = Some(self.row_seconds.map_or(row, |old| 0.5 * (old + row)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP_TARGET: Duration = Duration::from_millis(300);

    #[test]
    fn chunks_grow_on_a_fast_machine_and_shrink_on_a_slow_one() {
        let mut chunk = ChunkSize::new(256);
        assert_eq!(chunk.rows(STEP_TARGET, 0), FIRST_CHUNK);
        chunk.observe(8, Duration::from_millis(1));
        assert_eq!(chunk.rows(STEP_TARGET, 0), 256);
        let mut chunk = ChunkSize::new(256);
        chunk.observe(1, Duration::from_millis(3));
        assert_eq!((chunk.rows(STEP_TARGET, 0), chunk.rows(STEP_TARGET, 5)), (96, 91));
        for _ in 0..20 {
            chunk.observe(1, Duration::from_secs(2));
        }
        assert_eq!(chunk.rows(STEP_TARGET, 0), 1);
    }
}
