//! Which token comes next: a pure function of the logits, the tokens so far, the parameters and the position.
//!
//! Order of the steps: logit bias, penalties; then greedy, or top-k, top-p, min-p, temperature and a draw. Top-p
//! and min-p look at the probabilities before temperature, as in llama.cpp; top-p at those of the tokens that
//! top-k left. The order of equal logits is that of their numbers. NaN counts as minus infinity.
//!
//! No operation here depends on the instruction set or on a library's last bit (promise P4).

mod select;

use crate::head::Wanted;
use crate::noise::{NOISE_MAX, Noise};
use select::{Candidate, argmax, clean, exp_nonpositive, maximum, select_best, sum_exp};

/// Most alternatives that log-probabilities are reported for.
pub const TOP_LOGPROBS_MAX: u8 = 20;
/// Least log-probability that is reported: a token that is impossible.
pub const LOGPROB_MIN: f32 = -9999.0;

/// Colder than this the noise is lost in rounding, and a quotient could become infinite.
const TEMPERATURE_MIN: f32 = 1e-4;

/// With more tokens that decide it is as well to know all logits.
const N_WANTED_MAX: usize = 1024;

/// How a token is chosen. The defaults are greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of the most likely tokens with at least this probability in all; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies other logits of recent tokens; 1 is off.
    pub repetition_penalty: f32,
    /// How many last tokens (prompt included) the penalties look at; 0 means none.
    pub penalty_last_n: u32,
    /// Subtracted once from the logit of each recent token; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted for each occurrence of a recent token; 0 is off.
    pub frequency_penalty: f32,
    /// Added to single logits: (token id, bias). Minus infinity forbids a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Keys the random numbers.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            penalty_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A parameter that means nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// Out of its range, or not a number.
    #[error("`{name}` is {value}, but must be {range}")]
    OutOfRange {
        /// The parameter.
        name: &'static str,
        /// What it is.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// A bias for a token that does not exist.
    #[error("`logit_bias` names token {id}, but there are {n_vocab} tokens")]
    NoSuchToken {
        /// The token.
        id: u32,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
}

/// The choice at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Present if asked for.
    pub logprobs: Option<SampledLogprobs>,
}

/// Natural logarithms of probabilities under the unmodified logits, at least [`LOGPROB_MIN`].
#[derive(Clone, Debug, PartialEq)]
pub struct SampledLogprobs {
    /// Of the chosen token.
    pub logprob: f32,
    /// Of the most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Memory that is reused from call to call; one for each thread that samples.
#[derive(Debug, Default)]
pub struct SamplerScratch {
    logits: Vec<f32>,           // (n_vocab), with bias and penalties.
    recent: Vec<u32>,           // (penalty_last_n), sorted.
    candidates: Vec<Candidate>, // Best first, where only some are kept.
    maxima: Vec<Candidate>,     // For the selection.
}

impl SamplerScratch {
    /// Memory that is enough for any parameters but longer penalties than the context window.
    #[must_use]
    pub fn new(n_vocab: usize, n_ctx: usize) -> Self {
        Self {
            logits: Vec::with_capacity(n_vocab),
            recent: Vec::with_capacity(n_ctx),
            candidates: Vec::with_capacity(n_vocab),
            maxima: Vec::with_capacity(n_vocab.div_ceil(select::CHUNK)),
        }
    }
}

/// Chooses tokens with fixed parameters.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    min_p_distance: f32, // ln(min_p): how far below the best logit a token may be.
    biased: Vec<u32>,    // Tokens of the bias.
}

impl Sampler {
    /// Checks the parameters for a vocabulary.
    ///
    /// # Errors
    /// One of them is out of its range.
    pub fn new(params: SamplingParams, n_vocab: usize) -> Result<Self, SamplingError> {
        let check = |name, value: f32, is_in_range: bool, range| {
            if is_in_range { Ok(()) } else { Err(SamplingError::OutOfRange { name, value, range }) }
        };
        let p = &params;
        let is_nonnegative = |x: f32| x.is_finite() && x >= 0.0;
        check("temperature", p.temperature, is_nonnegative(p.temperature), "at least 0")?;
        check("top_p", p.top_p, (0.0..=1.0).contains(&p.top_p), "0 to 1")?;
        check("min_p", p.min_p, (0.0..=1.0).contains(&p.min_p), "0 to 1")?;
        let is_positive = p.repetition_penalty.is_finite() && p.repetition_penalty > 0.0;
        check("repetition_penalty", p.repetition_penalty, is_positive, "above 0")?;
        check("presence_penalty", p.presence_penalty, p.presence_penalty.is_finite(), "a number")?;
        check("frequency_penalty", p.frequency_penalty, p.frequency_penalty.is_finite(), "a number")?;
        for (id, bias) in &p.logit_bias {
            check("logit_bias", *bias, bias.is_finite() || *bias == f32::NEG_INFINITY, "a number")?;
            if *id as usize >= n_vocab {
                return Err(SamplingError::NoSuchToken { id: *id, n_vocab });
            }
        }
        #[expect(clippy::cast_possible_truncation, reason = "rounds to f32")]
        let min_p_distance = libm::log(f64::from(params.min_p)) as f32;
        let biased = params.logit_bias.iter().map(|(id, _)| *id).collect();
        Ok(Self { params, min_p_distance, biased })
    }

    /// The parameters.
    #[must_use]
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Chooses the token at `position` (the number of tokens before it) after the tokens of `history` (prompt and
    /// generated). Allocates nothing once `scratch` has grown, but for log-probabilities.
    pub fn sample(
        &self,
        logits: &[f32],
        history: &[u32],
        position: u64,
        n_top_logprobs: Option<u8>,
        scratch: &mut SamplerScratch,
    ) -> Sampled {
        let mut adjusted = std::mem::take(&mut scratch.logits);
        let seen = if self.adjusts(history) {
            self.adjust(logits, history, &mut adjusted, &mut scratch.recent);
            &adjusted
        } else {
            logits
        };
        let id =
            if self.params.temperature > 0.0 { self.draw(seen, position, scratch) } else { argmax(seen) };
        scratch.logits = adjusted;
        let logprobs = n_top_logprobs.map(|n_top| logprobs_of(logits, id, n_top, scratch));
        Sampled { id, logprobs }
    }

    /// Which logits decide about the token at `position`, after `history`; none if all of them do.
    ///
    /// The choice from logits in which all others are minus infinity is the same.
    #[must_use]
    pub fn wanted<'a>(&'a self, history: &'a [u32], position: u64) -> Option<Wanted<'a>> {
        let p = &self.params;
        let recent: &[u32] = if self.penalises(history) { self.recent(history) } else { &[] };
        let rows = [recent, &self.biased];
        // These may fall or rise: as many others could come up in their place.
        let n_changed = recent.len() + self.biased.len();
        let best = |n_best: usize, slack, noise| {
            Some(Wanted { n_best: n_best + n_changed, slack, noise, rows })
                .filter(|w| w.n_best <= N_WANTED_MAX)
        };
        if p.temperature == 0.0 {
            return best(1, 0.0, None);
        }
        if p.top_k > 0 {
            return best(p.top_k as usize, 0.0, None);
        }
        if p.top_p < 1.0 {
            // The share of a token depends on all of them.
            return None;
        }
        if self.min_p_distance.is_finite() {
            // A changed logit could fall and bring the limit down with it.
            return if n_changed == 0 { best(1, -self.min_p_distance, None) } else { None };
        }
        best(1, 0.0, Some((Noise::new(p.seed, position), self.temperature())))
    }

    /// Whether bias or penalties can change a logit.
    fn adjusts(&self, history: &[u32]) -> bool {
        !self.params.logit_bias.is_empty() || self.penalises(history)
    }

    #[expect(clippy::float_cmp, reason = "1 and 0 mean off")]
    pub(crate) fn penalises(&self, history: &[u32]) -> bool {
        let p = &self.params;
        let penalises =
            p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0;
        penalises && p.penalty_last_n > 0 && !history.is_empty()
    }

    /// The tokens that penalties look at.
    fn recent<'a>(&self, history: &'a [u32]) -> &'a [u32] {
        &history[history.len().saturating_sub(self.params.penalty_last_n as usize)..]
    }

    fn adjust(&self, logits: &[f32], history: &[u32], adjusted: &mut Vec<f32>, recent: &mut Vec<u32>) {
        let p = &self.params;
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        for (id, bias) in &p.logit_bias {
            if let Some(logit) = adjusted.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        recent.clear();
        recent.extend_from_slice(self.recent(history));
        recent.sort_unstable();
        for same in recent.chunk_by(|a, b| a == b) {
            let Some(logit) = adjusted.get_mut(same[0] as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
            #[expect(clippy::cast_precision_loss, reason = "counts are small")]
            let count = same.len() as f32;
            *logit -= p.presence_penalty + count * p.frequency_penalty;
        }
    }

    /// Takes the largest sum of logit (divided by the temperature) and noise among what top-k, top-p and min-p leave.
    fn draw(&self, logits: &[f32], position: u64, scratch: &mut SamplerScratch) -> u32 {
        let max = maximum(logits);
        if max == f32::NEG_INFINITY {
            return 0;
        }
        let noise = (Noise::new(self.params.seed, position), self.temperature());
        let least = max + self.min_p_distance;
        let candidates = &mut scratch.candidates;
        let best = if self.params.top_k == 0 && self.params.top_p >= 1.0 {
            noisiest((0..).zip(logits.iter().map(|logit| clean(*logit))), least, noise)
        } else {
            self.keep_best(logits, max, candidates, &mut scratch.maxima);
            // In the order of their numbers, as where all are looked at.
            candidates.sort_unstable_by_key(|candidate| candidate.id());
            noisiest(candidates.iter().map(|candidate| (candidate.id(), candidate.logit())), least, noise)
        };
        best.unwrap_or_else(|| argmax(logits))
    }

    /// What logits are divided by.
    fn temperature(&self) -> f32 {
        self.params.temperature.max(TEMPERATURE_MIN)
    }

    /// Fills `candidates` with what top-k and top-p keep, best first.
    fn keep_best(
        &self,
        logits: &[f32],
        max: f32,
        candidates: &mut Vec<Candidate>,
        maxima: &mut Vec<Candidate>,
    ) {
        let top_p = f64::from(self.params.top_p);
        if self.params.top_k > 0 {
            select_best(logits, self.params.top_k as usize, candidates, maxima);
            if top_p < 1.0 {
                let total: f64 = candidates.iter().map(|c| f64::from(exp_nonpositive(c.logit() - max))).sum();
                let n_kept = nucleus_len(candidates, max, top_p * total).unwrap_or(candidates.len());
                candidates.truncate(n_kept);
            }
            return;
        }
        // Most often a few tokens are enough; all are sorted only if they must be.
        let wanted = top_p * sum_exp(logits, max);
        let mut k = 64;
        loop {
            select_best(logits, k, candidates, maxima);
            if let Some(n_kept) = nucleus_len(candidates, max, wanted) {
                candidates.truncate(n_kept);
                return;
            }
            if k >= logits.len() {
                return;
            }
            k *= 16;
        }
    }
}

/// How many of the best candidates reach `wanted` together.
fn nucleus_len(candidates: &[Candidate], max: f32, wanted: f64) -> Option<usize> {
    let mut sum = 0.0;
    let enough = candidates.iter().position(|candidate| {
        sum += f64::from(exp_nonpositive(candidate.logit() - max));
        sum >= wanted
    });
    enough.map(|idx| idx + 1)
}

/// The token with the largest sum of logit (divided by the temperature) and noise, of equal ones the first; of those
/// whose logit is at least `least`.
fn noisiest(
    tokens: impl Iterator<Item = (u32, f32)>,
    least: f32,
    (noise, temperature): (Noise, f32),
) -> Option<u32> {
    let mut best = (f32::NEG_INFINITY, None);
    for (id, logit) in tokens {
        let cold = logit / temperature;
        // Most can be told to lose without a look at their noise.
        if logit >= least && cold + NOISE_MAX > best.0 {
            let score = cold + noise.of(id);
            if score > best.0 {
                best = (score, Some(id));
            }
        }
    }
    best.1
}

fn logprobs_of(logits: &[f32], id: u32, n_top: u8, scratch: &mut SamplerScratch) -> SampledLogprobs {
    let max = maximum(logits);
    let log_sum = libm::log(sum_exp(logits, max));
    let logprob = |logit: f32| {
        #[expect(clippy::cast_possible_truncation, reason = "rounds to f32")]
        let value = (f64::from(logit) - f64::from(max) - log_sum) as f32;
        value.max(LOGPROB_MIN) // Also where nothing is possible and the difference is NaN.
    };
    let n_top = usize::from(n_top.min(TOP_LOGPROBS_MAX));
    select_best(logits, n_top, &mut scratch.candidates, &mut scratch.maxima);
    let top = scratch.candidates.iter().map(|c| (c.id(), logprob(c.logit()))).collect();
    SampledLogprobs {
        logprob: logits.get(id as usize).map_or(LOGPROB_MIN, |logit| logprob(clean(*logit))),
        top,
    }
}

#[cfg(test)]
mod tests;
