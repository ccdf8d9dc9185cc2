//! A failure as a peer sees it: a closed code, a text that is safe to show, and whether to try again.

use serde::{Deserialize, Serialize};

/// What went wrong, as a program can match it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    // The client's fault.
    /// The frame or message cannot be understood.
    BadMessage,
    /// A frame is longer than the limit.
    FrameTooLarge,
    /// The peer speaks another protocol version.
    UnsupportedVersion,
    /// A parameter is out of its range.
    InvalidRequest,
    /// The prompt has no tokens.
    EmptyPrompt,
    /// Prompt and answer do not fit the context window.
    ContextExceeded,
    /// The peer's uid or gid may not use this socket.
    PermissionDenied,
    /// No such job, slot or model.
    NotFound,
    // Capacity.
    /// The queue, or this client's share of it, is full.
    Overloaded,
    /// The service is draining and takes no new work.
    Draining,
    /// The job's deadline passed.
    DeadlineExceeded,
    /// No worker can take work now (all failed).
    Degraded,
    // The server's fault.
    /// The journal of durable jobs cannot be written, or there is none.
    JournalUnavailable,
    /// The job was on board of several worker deaths and is given up.
    Poisoned,
    /// A bug or an operating-system failure; the log has the details.
    Internal,
    /// The job was cancelled.
    Cancelled,
}

impl ErrorCode {
    /// True if the same request may succeed later.
    #[must_use]
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Overloaded | Self::Draining | Self::Degraded | Self::JournalUnavailable)
    }
}

/// A failure on the wire. `Display` is what a client prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}")]
pub struct WireError {
    /// The closed code.
    pub code: ErrorCode,
    /// Names the thing, what was found and what was expected.
    pub message: String,
    /// The next step, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// When to try again, for retryable codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl WireError {
    /// An error with a code and a text.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, retry_after_ms: None }
    }

    /// The same error with a next step.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error with a time to wait before the next try.
    #[must_use]
    pub fn with_retry_after_ms(mut self, retry_after_ms: u64) -> Self {
        self.retry_after_ms = Some(retry_after_ms);
        self
    }
}
