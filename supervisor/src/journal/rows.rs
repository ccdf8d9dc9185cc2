//! What is kept of a job: the tables of the file, and their rows as JSON.

use bitnetd_proto::durable::{JobAnswer, JobState, JobSummary};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::limits::JOB_ANSWER_BYTES_MAX;
use bitnetd_proto::request::{GenerateRequest, Prompt};
use redb::TableDefinition;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::state::ClientId;

/// Version of everything in this module; a file with another one is not touched.
pub(super) const FORMAT: u64 = 1;
/// Numbers about the file: [`META_FORMAT`], [`META_NEXT`], [`META_BYTES`].
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
pub(super) const META_FORMAT: &str = "format";
/// The number of the next job. It only grows.
pub(super) const META_NEXT: &str = "next";
/// Bytes of all requests and answers.
pub(super) const META_BYTES: &str = "bytes";
/// Every job that is kept: number to [`JobRow`].
pub(super) const JOBS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("jobs");
/// Jobs that have not ended.
pub(super) const OPEN: TableDefinition<'_, u64, ()> = TableDefinition::new("open");
/// Jobs that have, by time of their end.
pub(super) const ENDED: TableDefinition<'_, (u64, u64), ()> = TableDefinition::new("ended");
/// [`GenerateRequest`] of each job.
pub(super) const REQUESTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("requests");
/// [`JobAnswer`] of each job that has one.
pub(super) const ANSWERS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("answers");
/// Owner and key to number.
pub(super) const KEYS: TableDefinition<'_, (&str, &str), u64> = TableDefinition::new("keys");

/// Characters of a prompt that a list shows.
const PROMPT_SHOWN_CHARS: usize = 60;
/// Characters of an error's text that are kept.
const ERROR_CHARS_MAX: usize = 2000;

/// A job without its request and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JobRow {
    /// See [`owner_name`].
    pub(crate) owner: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<String>,
    pub(crate) submitted_ms: u64,
    pub(crate) priority: i8,
    /// Milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) deadline_ms: Option<u64>,
    #[serde(default)]
    pub(crate) starts: u32,
    #[serde(default)]
    pub(crate) deaths: u32,
    pub(crate) prompt: String,
    /// Length of the request, and of the answer when there is one.
    pub(crate) bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) end: Option<EndRow>,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EndRow {
    pub(crate) state: JobState,
    pub(crate) ended_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<WireError>,
}

/// What came of a job.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    Done(Box<JobAnswer>),
    Failed(WireError),
    Cancelled,
}

impl Outcome {
    /// As it is kept. An answer that would not fit a frame any more is a failure: nothing is cut off silently.
    pub(super) fn into_rows(self, ended_ms: u64) -> (EndRow, Option<Vec<u8>>) {
        let failed = |mut error: WireError| {
            if let Some((end, _)) = error.message.char_indices().nth(ERROR_CHARS_MAX) {
                error.message.truncate(end);
            }
            (EndRow { state: JobState::Failed, ended_ms, tokens: None, error: Some(error) }, None)
        };
        match self {
            Self::Cancelled => {
                (EndRow { state: JobState::Cancelled, ended_ms, tokens: None, error: None }, None)
            }
            Self::Failed(error) => failed(error),
            Self::Done(answer) => match serde_json::to_vec(&answer) {
                Ok(bytes) if bytes.len() <= JOB_ANSWER_BYTES_MAX => {
                    let tokens = Some(answer.usage.completion_tokens);
                    (EndRow { state: JobState::Done, ended_ms, tokens, error: None }, Some(bytes))
                }
                Ok(bytes) => failed(WireError::new(
                    ErrorCode::Internal,
                    format!(
                        "the answer has {} bytes, at most {JOB_ANSWER_BYTES_MAX} can be kept",
                        bytes.len()
                    ),
                )),
                Err(error) => failed(WireError::new(
                    ErrorCode::Internal,
                    format!("the answer cannot be written: {error}"),
                )),
            },
        }
    }
}

impl JobRow {
    pub(crate) fn summary(self, job: u64, is_running: bool) -> JobSummary {
        let open = if is_running { JobState::Running } else { JobState::Queued };
        let (state, ended_ms, tokens, error) = match self.end {
            Some(end) => (end.state, Some(end.ended_ms), end.tokens, end.error),
            None => (open, None, None, None),
        };
        JobSummary {
            job,
            state,
            owner: self.owner.replacen(':', " ", 1),
            key: self.key,
            submitted_ms: self.submitted_ms,
            ended_ms,
            priority: self.priority,
            starts: self.starts,
            deaths: self.deaths,
            prompt: self.prompt,
            tokens,
            error,
        }
    }
}

/// A client as the file names it.
pub(crate) fn owner_name(client: &ClientId) -> String {
    match client {
        ClientId::InProcess => "local:".into(),
        ClientId::Uid(uid) => format!("uid:{uid}"),
        ClientId::Key(name) => format!("key:{name}"),
    }
}

/// The client of a name; nobody else can be one, so a strange name is this process.
pub(crate) fn owner_of(name: &str) -> ClientId {
    match name.split_once(':') {
        Some(("uid", uid)) => uid.parse().map_or(ClientId::InProcess, ClientId::Uid),
        Some(("key", key)) => ClientId::Key(key.to_owned()),
        _ => ClientId::InProcess,
    }
}

/// The beginning of a prompt, in one line.
pub(super) fn shown(prompt: &Prompt) -> String {
    let begin = |text: &str| -> String {
        text.chars().take(PROMPT_SHOWN_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
    };
    match prompt {
        Prompt::Text(text) => begin(text),
        Prompt::Chat(messages) => messages.last().map(|message| begin(&message.content)).unwrap_or_default(),
        Prompt::Tokens(ids) => format!("{} token ids", ids.len()),
    }
}

/// Whether a request is the one that is kept; the seed of the kept one may have been drawn.
pub(super) fn is_same(mut asked: GenerateRequest, kept: &GenerateRequest) -> bool {
    asked.sampling.seed = asked.sampling.seed.or(kept.sampling.seed);
    asked == *kept
}

/// A row as bytes. It cannot fail for what comes through validation; if it does, that is said.
pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>, RowError> {
    serde_json::to_vec(value).map_err(RowError)
}

/// Bytes as a row.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RowError> {
    serde_json::from_slice(bytes).map_err(RowError)
}

/// A row that is not what it should be.
#[derive(Debug, thiserror::Error)]
#[error("a row of the journal cannot be read or written")]
pub(crate) struct RowError(#[source] serde_json::Error);
