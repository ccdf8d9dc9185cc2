//! What comes back for a job: tokens one by one, then how it ended.

use serde::{Deserialize, Serialize};

/// One generated token. The concatenation of all `text`s and of [`Done::tail`] is the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Position in the answer, from 0.
    pub index: u32,
    /// Token id.
    pub id: u32,
    /// Text that is now certain: whole UTF-8 characters that cannot be part of a stop string. May be empty.
    pub text: String,
    /// Present if the request asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<TokenLogprobs>,
}

/// Log-probabilities (natural logarithm, of the unmodified distribution) at one position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenLogprobs {
    /// Of the chosen token.
    #[serde(with = "crate::float::exact_f32")]
    pub logprob: f32,
    /// Of the most likely tokens, best first: (token id, log-probability, text).
    #[serde(with = "crate::float::top_logprobs")]
    pub top: Vec<(u32, f32, String)>,
}

/// How a job ended well.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    /// Why generation ended.
    pub finish_reason: FinishReason,
    /// Text held back until now (it could have been the start of a stop string).
    pub tail: String,
    /// Tokens counted.
    pub usage: Usage,
    /// Times measured.
    pub timings: Timings,
    /// Name of the model that answered. Filled in by the supervisor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-text token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context window.
    Length,
}

/// Tokens counted for one job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, how many came from a prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
}

/// Times of one job, in seconds. A worker fills in its own part, the supervisor the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timings {
    /// From acceptance to a worker.
    #[serde(with = "crate::float::finite_f64")]
    pub queue_s: f64,
    /// From the worker's start on it to the last prompt token.
    #[serde(with = "crate::float::finite_f64")]
    pub prefill_s: f64,
    /// From the first generated token to the last.
    #[serde(with = "crate::float::finite_f64")]
    pub decode_s: f64,
    /// From acceptance to the first token.
    #[serde(with = "crate::float::finite_f64")]
    pub ttft_s: f64,
    /// From acceptance to the end.
    #[serde(with = "crate::float::finite_f64")]
    pub total_s: f64,
    /// Slot that finished the job.
    pub slot: u32,
    /// How many times the job moved to another worker.
    pub failovers: u32,
}
