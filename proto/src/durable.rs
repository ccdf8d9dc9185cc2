//! Durable jobs: what a client is told about jobs that outlive connections, workers and the supervisor.
//!
//! A job is named by its number, which is never given twice, and optionally by a key that the client chose. Both are
//! seen by their owner alone (and by root and the daemon's own user).

use serde::{Deserialize, Serialize};

use crate::error::{ErrorCode, WireError};
use crate::event::{FinishReason, Timings, TokenLogprobs, Usage};
use crate::limits::{DURABLE_LOGPROBS_MAX, DURABLE_TOKENS_MAX, JOB_KEY_BYTES_MAX};
use crate::request::GenerateRequest;

/// Where a durable job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// On disk, not yet given to the workers.
    Queued,
    /// Given to the workers.
    Running,
    /// It has an answer.
    Done,
    /// It has an error.
    Failed,
    /// Its client gave it up.
    Cancelled,
}

impl JobState {
    /// Every state, in the order of a job's life.
    pub const ALL: [Self; 5] = [Self::Queued, Self::Running, Self::Done, Self::Failed, Self::Cancelled];

    /// True if nothing more will happen to the job.
    #[must_use]
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }

    /// As on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// One line of a list of jobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSummary {
    /// Number of the job.
    pub job: u64,
    /// Where it is.
    pub state: JobState,
    /// Whose it is, such as `uid 1000`.
    pub owner: String,
    /// The client's name of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// When it was accepted, in milliseconds since 1970.
    pub submitted_ms: u64,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<u64>,
    /// Higher goes first.
    pub priority: i8,
    /// How many times it was given to the workers; more than once if the supervisor ended in between.
    pub starts: u32,
    /// Workers that died with it on board since its last token.
    pub deaths: u32,
    /// The beginning of its prompt.
    pub prompt: String,
    /// Tokens of its answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u32>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<WireError>,
}

/// Everything there is to know about one job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Its line in a list.
    pub summary: JobSummary,
    /// What was asked, with the seed that is used.
    pub request: GenerateRequest,
    /// What was answered, if the state is `done`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<JobAnswer>,
}

/// The whole answer of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobAnswer {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// One entry for each token, if the request asked for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens counted.
    pub usage: Usage,
    /// Times measured, of the supervisor that finished it.
    pub timings: Timings,
    /// Name of the model that answered: a job that waited over a reload or a restart has that of the time it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// Checks what [`GenerateRequest::validate`] does not: whether key and answer can be kept.
///
/// # Errors
/// [`ErrorCode::InvalidRequest`] that names what is too large.
pub fn validate_durable(request: &GenerateRequest, key: Option<&str>) -> Result<(), WireError> {
    let invalid = |text: String| Err(WireError::new(ErrorCode::InvalidRequest, text));
    request.validate()?;
    if let Some(key) = key
        && (key.is_empty() || key.len() > JOB_KEY_BYTES_MAX || key.contains(char::is_control))
    {
        return invalid(format!(
            "invalid request: key must have 1 to {JOB_KEY_BYTES_MAX} bytes and no control characters"
        ));
    }
    if request.max_tokens > DURABLE_TOKENS_MAX {
        let n = request.max_tokens;
        return invalid(format!(
            "invalid request: max_tokens is {n}, for a durable job it must be from 1 to {DURABLE_TOKENS_MAX}"
        ));
    }
    let n_logprobs = request.logprobs.map_or(0, |n| u64::from(request.max_tokens) * (u64::from(n) + 1));
    if n_logprobs > DURABLE_LOGPROBS_MAX {
        return invalid(format!(
            "invalid request: {n_logprobs} log-probabilities, of a durable job at most {DURABLE_LOGPROBS_MAX} are kept \
             (max_tokens x (logprobs + 1))"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Prompt;

    #[test]
    fn what_can_be_kept_is_limited_to_the_entry() {
        let with = |max_tokens, logprobs| GenerateRequest {
            max_tokens,
            logprobs,
            ..GenerateRequest::new(Prompt::Text("hello".into()))
        };
        let refused = |request: &GenerateRequest, key| validate_durable(request, key).unwrap_err().message;
        let usual = with(9, None);
        assert_eq!(validate_durable(&usual, Some(&"k".repeat(JOB_KEY_BYTES_MAX))), Ok(()));
        let long = "k".repeat(JOB_KEY_BYTES_MAX + 1);
        for key in ["", "a\nb", &long] {
            assert!(refused(&usual, Some(key)).contains("key must have 1 to 128 bytes"), "{key:?}");
        }
        assert_eq!(validate_durable(&with(DURABLE_TOKENS_MAX, None), None), Ok(()));
        assert!(refused(&with(DURABLE_TOKENS_MAX + 1, None), None).contains("max_tokens is 32769"));
        let n = u32::try_from(DURABLE_LOGPROBS_MAX).unwrap() / 4;
        assert_eq!(validate_durable(&with(n, Some(3)), None), Ok(()));
        assert!(refused(&with(n + 1, Some(3)), None).contains("log-probabilities"));
        assert!(refused(&with(0, None), None).contains("max_tokens is 0"));
    }

    #[test]
    fn states_have_the_names_of_the_wire() {
        for state in JobState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }
}
