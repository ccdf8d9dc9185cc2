//! One sequence on its way from prompt to answer: its tokens, its pages, and the text made so far.

use std::time::{Duration, Instant};

use crate::head::Wanted;
use crate::sampler::{SampledLogprobs, Sampler, SamplerScratch, SamplingError, SamplingParams};
use crate::speculation::Guesser;
use crate::tokenizer::{Detokenizer, StopMatcher, Tokenizer};

/// Names a sequence; chosen by the caller.
pub type SequenceId = u64;

/// What to generate.
#[derive(Clone, Debug)]
pub struct SequenceRequest {
    /// Prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Tokens of the answer that exist already: they are not reported again, and what follows is what would have
    /// followed without the interruption.
    pub resume: Vec<u32>,
    /// Most tokens of the answer, those of `resume` included.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Report log-probabilities, and of this many most likely tokens.
    pub n_logprobs: Option<u8>,
    /// Go on after an end-of-generation token.
    pub ignore_eos: bool,
}

/// Something that happened to a sequence in a step.
#[derive(Clone, Debug, PartialEq)]
pub enum EngineEvent {
    /// One more token. The text that became certain with it is beside it in [`StepEvents`].
    Token {
        /// Which sequence.
        id: SequenceId,
        /// Position in the answer.
        index: usize,
        /// Token id.
        token: u32,
        /// If asked for.
        logprobs: Option<SampledLogprobs>,
    },
    /// It is over, and its memory is free.
    Finished {
        /// Which sequence.
        id: SequenceId,
        /// How it ended.
        summary: Summary,
    },
}

/// What happened in a step, in order. Its memory is used again and again.
#[derive(Debug, Default)]
pub struct StepEvents {
    events: Vec<(EngineEvent, usize)>, // And where its text ends.
    text: String,                      // Of all events, one after the other.
}

impl StepEvents {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes them out, each with the text that became certain with it.
    pub fn drain(&mut self) -> impl Iterator<Item = (EngineEvent, &str)> {
        let text = &self.text;
        let mut begin = 0;
        self.events.drain(..).map(move |(event, end)| {
            let piece = &text[begin..end];
            begin = end;
            (event, piece)
        })
    }

    /// Room for a step of so many tokens.
    pub(crate) fn begin(&mut self, n_tokens: usize) {
        self.text.clear();
        self.events.clear();
        self.events.reserve(n_tokens);
        self.text.reserve(n_tokens * TEXT_BYTES);
    }

    /// Where the text of the next event goes.
    pub(crate) fn text(&mut self) -> &mut String {
        &mut self.text
    }

    /// Adds an event, whose text is what was added to the text since the last one.
    pub(crate) fn push(&mut self, event: EngineEvent) {
        self.events.push((event, self.text.len()));
    }
}

/// Bytes of text that room is made for with each token; few tokens have more.
const TEXT_BYTES: usize = 64;

/// How a sequence ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Why.
    pub reason: FinishReason,
    /// Text held back until now.
    pub tail: String,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Of those, how many were in the KV cache already.
    pub n_cached: usize,
    /// Tokens of the answer.
    pub n_generated: usize,
    /// From admission to the logits of the last prompt token.
    pub prefill: Duration,
    /// From there to the end.
    pub decode: Duration,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-generation token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context window.
    Length,
}

/// A sequence on board.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) history: Vec<u32>, // Prompt, then answer.
    pub(crate) n_prompt: usize,
    pub(crate) n_stored: usize, // Tokens of the history that are in the KV cache.
    n_cached: usize,            // Tokens of the prompt that were in the KV cache before it started.
    pub(crate) n_history_max: usize,
    pub(crate) pages: Vec<u32>,
    sampler: Sampler,
    n_logprobs: Option<u8>,
    ignore_eos: bool,
    pub(crate) guesser: Guesser,
    text: TextStream,
    started: Instant,
    prefilled: Option<Instant>,
}

impl Sequence {
    /// A sequence that has not been processed; `n_ctx` bounds its history.
    pub(crate) fn new(
        id: SequenceId,
        request: SequenceRequest,
        tokenizer: &Tokenizer,
        n_ctx: usize,
        n_vocab: usize,
    ) -> Result<Self, SamplingError> {
        let sampler = Sampler::new(request.sampling, n_vocab)?;
        let n_prompt = request.prompt.len();
        let detokenizer = request.prompt.last().map(|last| Detokenizer::after(tokenizer, *last));
        let n_history_max = n_prompt.saturating_add(request.max_tokens).min(n_ctx);
        let mut history = request.prompt;
        history.reserve_exact(n_history_max.saturating_sub(n_prompt));
        history.extend_from_slice(&request.resume);
        Ok(Self {
            id,
            history,
            n_prompt,
            n_stored: 0,
            n_cached: 0,
            n_history_max,
            pages: Vec::new(),
            sampler,
            n_logprobs: request.n_logprobs,
            ignore_eos: request.ignore_eos,
            guesser: Guesser::new(),
            text: TextStream {
                detokenizer: detokenizer.unwrap_or_default(),
                stop: StopMatcher::new(&request.stop),
                whole: String::with_capacity(TEXT_BYTES),
            },
            started: Instant::now(),
            prefilled: None,
        })
    }

    /// Runs the text of the tokens that exist already through the stop strings. Some if that already ends it.
    pub(crate) fn replay(&mut self, tokenizer: &Tokenizer) -> Option<FinishReason> {
        let mut text = String::new();
        for index in self.n_prompt..self.history.len() {
            if self.text.push(tokenizer, self.history[index], &mut text) {
                return Some(FinishReason::Stop);
            }
        }
        (self.history.len() >= self.n_history_max).then_some(FinishReason::Length)
    }

    /// Leaves out the first `n_cached` tokens: their keys and values are there already.
    pub(crate) fn start_at(&mut self, n_cached: usize) {
        self.n_stored = n_cached;
        self.n_cached = n_cached.min(self.n_prompt);
    }

    /// Whether tokens that exist already (of the prompt, or of an answer that goes on) are still to be processed.
    pub(crate) fn is_prefilling(&self) -> bool {
        self.n_stored < self.n_prompt || self.n_waiting() > 1
    }

    /// Tokens that are not in the KV cache yet; one while decoding.
    pub(crate) fn n_waiting(&self) -> usize {
        self.history.len() - self.n_stored
    }

    /// Which logits can decide about the token at `position`; none if all are needed.
    pub(crate) fn wanted(&self, position: usize) -> Option<Wanted<'_>> {
        let n_history = self.history.len();
        // After a guess, penalties would look at it as well.
        let is_known =
            position == n_history || (position > n_history && !self.sampler.penalises(&self.history));
        if !is_known || self.n_logprobs.is_some() {
            return None;
        }
        self.sampler.wanted(&self.history, position as u64)
    }

    /// Looks for what may come next, as far as there is room for it.
    pub(crate) fn guess(&mut self) {
        // After the guesses there is room for one more token.
        let n_max = self.n_history_max.saturating_sub(self.history.len() + 1);
        self.guesser.guess(&self.history, n_max);
    }

    /// Takes the logits after the last token of the history and after each guess that is checked, as far as the guesses
    /// are right: adds tokens, or ends.
    pub(crate) fn advance<'a>(
        &mut self,
        logits: impl Iterator<Item = &'a [f32]>,
        tokenizer: &Tokenizer,
        scratch: &mut SamplerScratch,
        events: &mut StepEvents,
    ) -> Advance {
        self.prefilled.get_or_insert_with(Instant::now);
        let mut advance = Advance { n_taken: 0, n_tokens: 0, end: None };
        for logits in logits {
            let n_history = self.history.len();
            let index = advance.n_taken;
            advance.n_taken += 1;
            advance.end = self.add_token(logits, tokenizer, scratch, events);
            let Some(token) = self.history.get(n_history) else { break };
            advance.n_tokens += 1;
            if !self.guesser.learn(index, *token) || advance.end.is_some() {
                break;
            }
        }
        advance
    }

    /// Chooses the next token and adds it, or ends.
    fn add_token(
        &mut self,
        logits: &[f32],
        tokenizer: &Tokenizer,
        scratch: &mut SamplerScratch,
        events: &mut StepEvents,
    ) -> Option<FinishReason> {
        let position = self.history.len() as u64;
        let sampled = self.sampler.sample(logits, &self.history, position, self.n_logprobs, scratch);
        if tokenizer.is_end_of_generation(sampled.id) && !self.ignore_eos {
            return Some(FinishReason::Stop);
        }
        let index = self.history.len() - self.n_prompt;
        self.history.push(sampled.id);
        let is_stopped = self.text.push(tokenizer, sampled.id, events.text());
        events.push(EngineEvent::Token { id: self.id, index, token: sampled.id, logprobs: sampled.logprobs });
        if is_stopped {
            return Some(FinishReason::Stop);
        }
        (self.history.len() >= self.n_history_max).then_some(FinishReason::Length)
    }

    /// What to report when it ends now.
    pub(crate) fn summary(&mut self, reason: FinishReason) -> Summary {
        let now = Instant::now();
        let prefilled = self.prefilled.unwrap_or(now);
        Summary {
            reason,
            tail: self.text.finish(),
            n_prompt: self.n_prompt,
            n_cached: self.n_cached,
            n_generated: self.history.len() - self.n_prompt,
            prefill: prefilled - self.started,
            decode: now - prefilled,
        }
    }
}

/// How far a step brought a sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Advance {
    /// Logits that counted: rows whose tokens are now in the history, and so in the KV cache.
    pub(crate) n_taken: usize,
    /// Tokens added.
    pub(crate) n_tokens: usize,
    /// If it ended.
    pub(crate) end: Option<FinishReason>,
}

/// Tokens to text, with whole characters only and nothing that may be the start of a stop string.
#[derive(Debug)]
struct TextStream {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    whole: String, // Scratch: what the detokenizer gives.
}

impl TextStream {
    /// Adds a token; appends what is certain to `out`. True if a stop string is complete.
    fn push(&mut self, tokenizer: &Tokenizer, token: u32, out: &mut String) -> bool {
        self.whole.clear();
        self.detokenizer.push(tokenizer, token, &mut self.whole);
        self.stop.push(&self.whole, out)
    }

    /// What was held back.
    fn finish(&mut self) -> String {
        let mut rest = String::new();
        self.detokenizer.flush(&mut rest);
        let mut out = String::new();
        if !self.stop.push(&rest, &mut out) {
            self.stop.flush(&mut out);
        }
        out
    }
}
