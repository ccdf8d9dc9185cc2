//! Messages between a local client and the supervisor.
//!
//! The first message each way is the handshake. A connection carries any number of jobs at once; the client
//! chooses the `id` by which it and the server name a job on this connection.

use serde::{Deserialize, Serialize};

use crate::durable::{JobRecord, JobState, JobSummary};
use crate::error::WireError;
use crate::event::{Done, Token};
use crate::request::GenerateRequest;
use crate::status::StatusReport;

/// From a client to the supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientMessage {
    /// First message: who is there and which version it speaks.
    Hello {
        /// Must be [`crate::PROTOCOL_VERSION`].
        version: u32,
        /// Name for logs, such as `bitnetd-cli/0.1.0`.
        client: String,
    },
    /// Asks for a generation.
    Generate {
        /// Name of the job on this connection.
        id: u64,
        /// What to do.
        request: Box<GenerateRequest>,
    },
    /// Gives a job up.
    Cancel {
        /// Name of the job on this connection.
        id: u64,
    },
    /// Asks for a durable job: one that is on disk before it is acknowledged, and survives everything.
    Submit {
        /// Name of the question on this connection.
        id: u64,
        /// The client's name of the job: the same key of the same client is the same job.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<String>,
        /// What to do.
        request: Box<GenerateRequest>,
    },
    /// Asks for a list of durable jobs, the newest first.
    Jobs {
        /// Name of the question on this connection.
        id: u64,
        /// Only those in this state.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        state: Option<JobState>,
        /// Only those with a lower number.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        before: Option<u64>,
        /// So many at most; 100 if it is left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<u32>,
    },
    /// Asks for a durable job as it is now.
    Result {
        /// Name of the question on this connection.
        id: u64,
        /// Number of the job.
        job: u64,
    },
    /// The same, answered when the job has ended, or when the time is over.
    Wait {
        /// Name of the question on this connection.
        id: u64,
        /// Number of the job.
        job: u64,
        /// Longest wait.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_ms: Option<u64>,
    },
    /// Gives a durable job up. Answered with the job as it is then: it may have ended before.
    CancelJob {
        /// Name of the question on this connection.
        id: u64,
        /// Number of the job.
        job: u64,
    },
    /// Asks for a [`StatusReport`].
    Status,
    /// Asks for what was counted and measured.
    Metrics,
    /// Stops taking new jobs, finishes the accepted ones, then exits.
    Drain,
    /// Replaces the worker of one slot; its jobs go on elsewhere.
    Restart {
        /// Slot number.
        slot: u32,
    },
    /// Reads the configuration again and changes over to it.
    Reload,
}

/// From the supervisor to a client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerMessage {
    /// Answer to `Hello`.
    Welcome {
        /// The server's protocol version.
        version: u32,
        /// The server's name and version.
        server: String,
        /// Pid of the supervisor.
        pid: u32,
    },
    /// The job is accepted: from now on it is not lost.
    Accepted {
        /// The client's name of the job.
        id: u64,
        /// The server's name of the job, as in logs.
        job: u64,
        /// The seed that is used.
        seed: u64,
    },
    /// One more token.
    Token {
        /// The client's name of the job.
        id: u64,
        /// The token.
        token: Token,
    },
    /// The job ended well.
    Done {
        /// The client's name of the job.
        id: u64,
        /// How it ended.
        done: Done,
    },
    /// Answer to `Submit`: the job is on disk.
    Submitted {
        /// The client's name of the question.
        id: u64,
        /// Number of the job.
        job: u64,
        /// The seed that is used.
        seed: u64,
        /// False if the key named a job that was there already.
        is_new: bool,
    },
    /// Answer to `Jobs`.
    Jobs {
        /// The client's name of the question.
        id: u64,
        /// The newest first.
        jobs: Vec<JobSummary>,
        /// True if there are more: ask again with `before` the last one.
        has_more: bool,
    },
    /// Answer to `Result` and `Wait`.
    Result {
        /// The client's name of the question.
        id: u64,
        /// The job.
        record: Box<JobRecord>,
    },
    /// Answer to `CancelJob`.
    Job {
        /// The client's name of the question.
        id: u64,
        /// The job.
        summary: Box<JobSummary>,
    },
    /// A job failed or was refused (`id`), or the connection did something wrong (no `id`).
    Error {
        /// The client's name of the job, if it is about one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<u64>,
        /// What is wrong.
        error: WireError,
    },
    /// Answer to `Status`.
    Status {
        /// The report.
        report: Box<StatusReport>,
    },
    /// Answer to `Metrics`.
    Metrics {
        /// OpenMetrics text, as Prometheus reads it.
        text: String,
    },
    /// Answer to `Drain`, `Restart` and `Reload`: it was understood and begun.
    Ok,
}
