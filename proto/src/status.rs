//! The state of the service as `bitnetd status` shows it.

use serde::{Deserialize, Serialize};

use crate::worker_link::{Confinement, ModelSummary, WorkerLoad};

/// Everything `bitnetd status --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Server name and version.
    pub server: String,
    /// Pid of the supervisor.
    pub pid: u32,
    /// Seconds since it started.
    #[serde(with = "crate::float::finite_f64")]
    pub uptime_s: f64,
    /// `ready`, `starting`, `degraded` or `draining`.
    pub health: Health,
    /// What is served, once a worker has read it.
    pub model: Option<ModelSummary>,
    /// Jobs accepted and not yet given to a worker.
    pub queued: u32,
    /// Most of those there may be.
    pub queue_max: u32,
    /// Counters since the start.
    pub totals: Totals,
    /// The journal of durable jobs, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<JournalReport>,
    /// One entry for each slot.
    pub slots: Vec<SlotReport>,
}

/// The service as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// No worker is ready yet.
    Starting,
    /// Every slot works or is being replaced.
    Ready,
    /// At least one slot has failed for good, or the journal of durable jobs needs somebody.
    Degraded,
    /// No new jobs.
    Draining,
}

/// Counters since the start of the supervisor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Jobs accepted.
    pub accepted: u64,
    /// Jobs that ended well.
    pub completed: u64,
    /// Jobs that ended with an error.
    pub failed: u64,
    /// Jobs cancelled by their clients.
    pub cancelled: u64,
    /// Jobs refused at the door.
    pub refused: u64,
    /// Times a job moved to another worker.
    pub failovers: u64,
    /// Worker processes started again.
    pub restarts: u64,
    /// Tokens generated.
    pub tokens: u64,
}

/// The journal of durable jobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalReport {
    /// Its file.
    pub path: String,
    /// Whether jobs can be taken.
    pub is_writable: bool,
    /// What an operator should see to.
    pub problem: Option<String>,
    /// Jobs that wait for the workers.
    pub queued: u64,
    /// Jobs that were given to them.
    pub running: u64,
    /// Results that are kept.
    pub ended: u64,
    /// Length of all requests and answers.
    pub bytes: u64,
    /// Most of that.
    pub bytes_max: u64,
}

/// One worker slot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlotReport {
    /// Slot number.
    pub slot: u32,
    /// `starting`, `ready`, `retiring` (of a former configuration), `draining`, `backoff`, `failed`.
    pub state: String,
    /// Pid of the live process.
    pub pid: Option<u32>,
    /// CPUs it owns, in the kernel's list form (`0-3,8`).
    pub cpus: String,
    /// Memory nodes it is bound to, in the kernel's list form; empty if that is left to the kernel.
    #[serde(default)]
    pub memory_nodes: String,
    /// Times it was started again.
    pub restarts: u64,
    /// Jobs on it.
    pub jobs: u32,
    /// What it said last about itself.
    pub load: WorkerLoad,
    /// What holds the live process in, once it is ready.
    #[serde(default)]
    pub confinement: Option<Confinement>,
    /// Why the last process ended, if one did.
    pub last_exit: Option<String>,
}
