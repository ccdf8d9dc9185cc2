//! What the state machine hears, and what it orders.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bitnetd_proto::error::WireError;
use bitnetd_proto::event::{Done, Token};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::request::GenerateRequest;
use bitnetd_proto::worker_link::{Confinement, ModelSummary, WorkerLoad};

use super::Policy;

/// The supervisor's name of a job.
pub(crate) type JobId = u64;
/// Name of a slot: its number in the split, and which reload made it (see [`slot_id`]).
pub(crate) type SlotId = u32;
/// Counts the reloads; each brings an edition of the configuration. The first is 0.
pub(crate) type Edition = u16;
/// The edition that brought the model. Jobs of one model never run on workers of another.
pub(crate) type ModelId = Edition;
/// Counts the processes of one slot. What an older one still says is ignored.
pub(crate) type Generation = u64;

/// The slot with that number in an edition. Slots of the first edition are named by their number.
pub(crate) fn slot_id(edition: Edition, number: u16) -> SlotId {
    u32::from(edition) << 16 | u32::from(number)
}

/// The number that people know a slot by.
pub(crate) fn slot_number(slot: SlotId) -> u32 {
    slot & 0xffff
}

/// The edition that made the slot.
pub(crate) fn slot_edition(slot: SlotId) -> Edition {
    Edition::try_from(slot >> 16).unwrap_or(Edition::MAX)
}

/// A new configuration, as far as the state machine cares.
#[derive(Clone, Debug)]
pub(crate) struct NewConfig {
    pub(crate) edition: Edition,
    pub(crate) policy: Policy,
    /// That of the present one, if both give the same answers.
    pub(crate) model: ModelId,
    /// For each worker of the new split: the slot that goes on as it is, or `None` for a new process.
    pub(crate) seats: Vec<Option<SlotId>>,
}

/// On whose behalf a job runs; fairness and limits are between these.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClientId {
    /// This very process (`bitnetd run`, `bitnetd batch`).
    InProcess,
    /// Programs of one user, by the kernel's word.
    Uid(u32),
    /// The holder of an API key, by the key's name.
    Key(String),
}

/// Who waits for a job, and so which line it stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// A client reads along. Bounded by `queue.max_jobs` and `queue.max_per_client`.
    Attended,
    /// The journal holds it; whoever feeds it bounds how many there are. It goes after those that are attended.
    Durable {
        /// Workers that died with it on board since its last token, before this supervisor lived.
        deaths: u32,
    },
}

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// Somebody asks for a job. Answered with `Accept` or `Refuse`.
    JobSubmitted { job: JobId, client: ClientId, standing: Standing, request: Arc<GenerateRequest> },
    /// The client gave a job up, or went away.
    JobCancelled { job: JobId },
    /// `Spawn` was carried out.
    WorkerSpawned { slot: SlotId, generation: Generation, pid: u32 },
    /// `Spawn` could not be carried out; there is no process.
    WorkerSpawnFailed { slot: SlotId, generation: Generation, error: WireError, exit_code: ExitCode },
    /// A worker says something.
    WorkerSpoke { slot: SlotId, generation: Generation, message: WorkerSaid },
    /// A worker's link ended or carried garbage; its process may still be there.
    LinkBroke { slot: SlotId, generation: Generation, reason: String },
    /// A worker's process was reaped. The last event of its generation.
    WorkerExited { slot: SlotId, generation: Generation, exit: WorkerExit },
    /// An operator wants a new process in a slot.
    RestartRequested { slot: SlotId },
    /// A new configuration is to take the place of the present one. Answered with `Reloaded`, now or later.
    ReloadRequested { config: Box<NewConfig> },
    /// No new jobs; finish the accepted ones, then stop.
    DrainRequested,
    /// Stop now.
    StopRequested,
    /// Nothing but the time.
    TimePassed,
}

/// A worker's message, as far as the state machine cares.
#[derive(Clone, Debug)]
pub(crate) enum WorkerSaid {
    /// The model is loaded.
    Ready { version: u32, model: Box<ModelSummary>, load_s: f64, confinement: Confinement },
    /// It cannot start and exits now.
    StartFailed { error: WireError, exit_code: ExitCode },
    /// One more token.
    Token { job: JobId, token: Token },
    /// A job ended well.
    Done { job: JobId, done: Done },
    /// A job cannot be done.
    Failed { job: JobId, error: WireError },
    /// The step loop lives.
    Pong { seq: u64, load: WorkerLoad },
}

/// What is to be done. Carrying out an action never fails back into the state machine except as an event.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// The answer to `JobSubmitted`: from now on the job is not lost.
    Accept { job: JobId },
    /// The answer to `JobSubmitted`: there is no such job.
    Refuse { job: JobId, error: WireError },
    /// Hand the client one more token.
    DeliverToken { job: JobId, token: Token },
    /// A worker died with a durable job on board, the n-th in a row; the journal counts along.
    CountDeath { job: JobId, deaths: u32 },
    /// Hand the client the end of its job. Nothing follows.
    End { job: JobId, outcome: Result<Done, WireError> },
    /// Start a process. The slot has none now.
    Spawn { slot: SlotId, generation: Generation },
    /// Give a worker a job, with the tokens the client already has.
    SendJob {
        slot: SlotId,
        generation: Generation,
        job: JobId,
        request: Arc<GenerateRequest>,
        resume: Vec<u32>,
    },
    /// Tell a worker to forget a job.
    SendCancel { slot: SlotId, generation: Generation, job: JobId },
    /// Ask the step loop for a sign of life.
    SendPing { slot: SlotId, generation: Generation, seq: u64 },
    /// Signal a worker's process group.
    Signal { slot: SlotId, generation: Generation, signal: StopSignal },
    /// The answer to `ReloadRequested`: the new configuration holds, or the old one goes on holding.
    Reloaded { edition: Edition, outcome: Result<(), WireError> },
    /// Write a line into the log.
    Note(Note),
    /// Every worker is reaped, every job has ended; nothing follows.
    Stop,
}

/// How a process group is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopSignal {
    /// `SIGTERM`.
    Terminate,
    /// `SIGKILL`.
    Kill,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WorkerExit {
    /// Exit code, if it exited.
    pub(crate) code: Option<i32>,
    /// Signal, if it was killed.
    pub(crate) signal: Option<i32>,
    /// The kernel killed a process for lack of memory at about that time.
    pub(crate) is_out_of_memory: bool,
    /// What it said about a denied system call.
    pub(crate) last_words: Option<String>,
}

impl WorkerExit {
    /// The code, if it is one of ours.
    pub(crate) fn exit_code(&self) -> Option<ExitCode> {
        self.code.and_then(ExitCode::from_raw)
    }
}

impl fmt::Display for WorkerExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => match self.exit_code() {
                Some(known) => write!(f, "exited with code {code} ({known:?})")?,
                None => write!(f, "exited with code {code}")?,
            },
            (None, Some(signal)) => {
                let name =
                    nix::sys::signal::Signal::try_from(signal).map_or("unknown", |signal| signal.as_str());
                write!(f, "killed by signal {signal} ({name})")?;
                if self.is_out_of_memory {
                    write!(f, ", the kernel was out of memory")?;
                }
            }
            (None, None) => write!(f, "ended in an unknown way")?,
        }
        self.last_words.as_ref().map_or(Ok(()), |words| write!(f, ", {words}"))
    }
}

/// Why a worker's process ended: a short list to count by. The words are in the log and in `last_exit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Cause {
    /// By itself, with an exit code.
    Exited,
    /// By a signal that was not ours.
    Signalled,
    /// The kernel was out of memory.
    OutOfMemory,
    /// It said that it cannot start, or could not be started at all.
    StartFailed,
    /// Killed: not ready in time.
    StartTimeout,
    /// Killed: its step loop did not answer.
    Watchdog,
    /// Killed: its link broke, or it did not read it.
    LinkBroke,
    /// Killed: it said what cannot be.
    Misbehaved,
    /// At an operator's wish.
    Operator,
    /// Its configuration holds no more.
    Reload,
    /// The service stops.
    Stop,
}

impl Cause {
    /// As in metrics and logs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Exited => "exited",
            Self::Signalled => "signalled",
            Self::OutOfMemory => "out_of_memory",
            Self::StartFailed => "start_failed",
            Self::StartTimeout => "start_timeout",
            Self::Watchdog => "watchdog",
            Self::LinkBroke => "link_broke",
            Self::Misbehaved => "misbehaved",
            Self::Operator => "operator",
            Self::Reload => "reload",
            Self::Stop => "stop",
        }
    }
}

/// What the log is told; `event_loop.rs` chooses level and words.
#[derive(Clone, Debug)]
pub(crate) enum Note {
    /// A worker can take jobs.
    WorkerReady { slot: SlotId, pid: Option<u32>, load_s: f64, confinement: Confinement },
    /// A worker's process ended.
    WorkerExited { slot: SlotId, pid: Option<u32>, exit: WorkerExit, cause: Cause, n_jobs: usize },
    /// A worker is killed, and why.
    WorkerKilled { slot: SlotId, pid: Option<u32>, cause: Cause, reason: String, n_jobs: usize },
    /// A slot waits before its next process.
    RestartScheduled { slot: SlotId, cause: Cause, wait: Duration },
    /// A slot is given up.
    SlotFailed { slot: SlotId, error: WireError },
    /// A job was given to a worker; `waited` since it was accepted, if it is its first.
    JobDispatched { job: JobId, slot: SlotId, resumed_at: usize, waited: Option<Duration> },
    /// A job lost its worker and waits for another.
    JobFailedOver { job: JobId, slot: SlotId, n_delivered: usize },
    /// A token came: so long after the one before, or after the job was accepted if it is the first.
    TokenCame { is_first: bool, is_first_after_move: bool, after: Duration },
    /// A job ended, so long after it was accepted.
    JobEnded { job: JobId, error: Option<WireError>, n_tokens: usize, after: Duration },
    /// A job was refused.
    JobRefused { client: ClientId, error: WireError },
    /// A new configuration holds.
    Reloaded { edition: Edition, n_kept: usize, n_new: usize, is_new_model: bool },
    /// A new configuration was refused.
    ReloadFailed { edition: Edition, error: WireError },
    /// A worker of a former configuration is told to end; so many of its jobs move.
    WorkerRetired { slot: SlotId, n_jobs: usize },
    /// The service takes no new jobs.
    Draining { n_jobs: usize },
}
