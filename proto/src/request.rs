//! What a client asks for: a prompt, sampling parameters and limits.

use serde::{Deserialize, Serialize};

/// One generation job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// Most tokens to generate, at least 1.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: u32,
    /// How to choose each token.
    #[serde(default)]
    pub sampling: Sampling,
    /// Texts that end the answer; they are not part of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Report the log-probability of each token, and of this many most likely ones (0 to 20).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u8>,
    /// Go on after an end-of-text token (benchmarks).
    #[serde(default)]
    pub ignore_eos: bool,
    /// Higher goes first; 0 is usual.
    #[serde(default)]
    pub priority: i8,
    /// Give the job up if it has not ended this long after it was accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

impl GenerateRequest {
    /// A request with defaults for everything but the prompt.
    #[must_use]
    pub fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            max_tokens: default_max_tokens(),
            sampling: Sampling::default(),
            stop: Vec::new(),
            logprobs: None,
            ignore_eos: false,
            priority: 0,
            deadline_ms: None,
        }
    }
}

fn default_max_tokens() -> u32 {
    128
}

/// What to continue. A worker tokenises it; the supervisor never looks inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// Plain text. Special tokens in it are text, not control.
    Text(String),
    /// A conversation, rendered with the model's chat template.
    Chat(Vec<ChatMessage>),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// How a token is chosen from the logits. The defaults are greedy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// 0 takes the most likely token.
    #[serde(with = "crate::float::exact_f32")]
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens with at least this probability in all; 1 keeps all.
    #[serde(with = "crate::float::exact_f32")]
    pub top_p: f32,
    /// Keep tokens with at least this share of the most likely one's probability; 0 keeps all.
    #[serde(with = "crate::float::exact_f32")]
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 is off.
    #[serde(with = "crate::float::exact_f32")]
    pub repetition_penalty: f32,
    /// How many last tokens (prompt included) the penalties look at; 0 means none.
    pub penalty_last_n: u32,
    /// Subtracted once from the logit of each recent token; 0 is off.
    #[serde(with = "crate::float::exact_f32")]
    pub presence_penalty: f32,
    /// Subtracted for each occurrence of a recent token; 0 is off.
    #[serde(with = "crate::float::exact_f32")]
    pub frequency_penalty: f32,
    /// Added to single logits: (token id, bias).
    #[serde(skip_serializing_if = "Vec::is_empty", with = "crate::float::logit_bias")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Keys the random stream. The supervisor fills it in where a client leaves it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl Default for Sampling {
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
            seed: None,
        }
    }
}
