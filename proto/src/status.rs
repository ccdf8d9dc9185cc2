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
    /// The fast image on disk, if it may be kept there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_image: Option<KeptImageReport>,
    /// One entry for each slot.
    pub slots: Vec<SlotReport>,
    /// Jobs: those on workers first, then those that wait, [`JOBS_REPORTED_MAX`] at most.
    #[serde(default)]
    pub jobs: Vec<JobReport>,
    /// Jobs that there are beyond those.
    #[serde(default)]
    pub n_jobs_beyond: u64,
    /// CPUs that are online, whoever owns them; empty as long as nothing was read.
    #[serde(default)]
    pub cpus: Vec<CpuReport>,
    /// Seconds that shares of CPUs and threads are about: the time between the two last readings.
    #[serde(default)]
    pub usage_window_s: Option<f64>,
}

/// Jobs in a report, at most.
pub const JOBS_REPORTED_MAX: usize = 1024;

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

/// The fast image of the model on disk, where the next process finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptImageReport {
    /// Its file.
    pub path: String,
    /// What there is.
    pub state: KeptImageState,
    /// Why it cannot be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Whether the fast image is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeptImageState {
    /// No: it is written when it has been made.
    Absent,
    /// A process before left one, for workers to check and read.
    Found,
    /// It is being written.
    Writing,
    /// This process has written it.
    Kept,
    /// It cannot be written.
    Failed,
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
    /// Seconds since it said that.
    #[serde(default)]
    pub load_age_s: Option<f64>,
    /// Prompt tokens computed in a second, lately.
    #[serde(default)]
    pub prefill_per_s: Option<f64>,
    /// Tokens generated in a second, lately.
    #[serde(default)]
    pub decode_per_s: Option<f64>,
    /// What its process has in memory, pages that it shares counted in full; `load.memory` knows better, where the kernel
    /// tells.
    #[serde(default)]
    pub resident_bytes: Option<u64>,
    /// Its threads; empty if the supervisor may not see them.
    #[serde(default)]
    pub threads: Vec<ThreadReport>,
    /// What holds the live process in, once it is ready.
    #[serde(default)]
    pub confinement: Option<Confinement>,
    /// Why the last process ended, if one did.
    pub last_exit: Option<String>,
}

impl SlotReport {
    /// Share of the time in which its compute threads ran, in the mean; `None` if that is not known.
    #[must_use]
    pub fn running_share(&self) -> Option<f64> {
        self.mean_of_compute_threads(|thread| thread.running)
    }

    /// Share of the time in which its compute threads could have run and had no CPU, in the mean.
    #[must_use]
    pub fn waiting_share(&self) -> Option<f64> {
        self.mean_of_compute_threads(|thread| thread.waiting)
    }

    fn mean_of_compute_threads(&self, share: impl Fn(&ThreadReport) -> Option<f64>) -> Option<f64> {
        let compute = self.threads.iter().filter(|thread| thread.thread.is_some());
        let shares: Vec<f64> = compute.map(share).collect::<Option<_>>()?;
        let n = u32::try_from(shares.len()).ok().filter(|&n| n > 0)?;
        Some(shares.iter().sum::<f64>() / f64::from(n))
    }
}

/// One thread of a worker. Times are since its start, shares are of the last window (`usage_window_s`), 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ThreadReport {
    /// Thread id.
    pub tid: u32,
    /// Its name.
    pub name: String,
    /// Which compute thread of its worker it is; `None` for one that serves them.
    pub thread: Option<u32>,
    /// The CPU it ran on last.
    pub cpu: Option<u32>,
    /// Time on a CPU.
    #[serde(with = "crate::float::finite_f64")]
    pub cpu_s: f64,
    /// Time in which it could have run and had no CPU.
    pub wait_s: Option<f64>,
    /// Times it was given a CPU.
    pub timeslices: Option<u64>,
    /// Times it moved to another CPU; `None` where the kernel does not tell.
    pub migrations: Option<u64>,
    /// Share of the window in which it ran.
    pub running: Option<f64>,
    /// Share of the window in which it could have run and had no CPU.
    pub waiting: Option<f64>,
}

/// One CPU. Shares are of the last window, 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuReport {
    /// Its number.
    pub cpu: u32,
    /// The worker that owns it.
    pub slot: Option<u32>,
    /// Share in which it ran something, whoever's.
    pub busy: Option<f64>,
    /// Share that the hypervisor took.
    pub stolen: Option<f64>,
}

/// One job that has not ended. Nothing is said of who wants it and what it is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobReport {
    /// The service's name of the job, as in its logs.
    pub job: u64,
    /// The worker it is on.
    pub slot: Option<u32>,
    /// `waiting`, `prefill`, `decode`, `moving` (lost its worker), `suspect` (was on board of deaths and waits to run
    /// alone).
    pub phase: String,
    /// The journal holds it.
    pub is_durable: bool,
    /// Tokens delivered.
    pub tokens: u32,
    /// Most of those there may be.
    pub tokens_max: u32,
    /// Tokens delivered in a second, lately.
    pub tokens_per_s: Option<f64>,
    /// Seconds since it was accepted.
    #[serde(with = "crate::float::finite_f64")]
    pub age_s: f64,
}
