//! The types of a validated configuration, one for each section of the file, with their defaults.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Everything there is to configure, validated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// Which model.
    pub model: ModelConfig,
    /// How many workers with how many threads.
    pub split: SplitConfig,
    /// Which CPUs may be used.
    pub affinity: AffinityConfig,
    /// How a worker computes.
    pub engine: EngineConfig,
    /// Admission.
    pub queue: QueueConfig,
    /// When a dead worker is started again.
    pub restart: RestartConfig,
    /// When a silent worker counts as hung.
    pub watchdog: WatchdogConfig,
    /// When the whole service counts as ready.
    pub service: ServiceConfig,
    /// Where clients come in.
    pub listen: ListenConfig,
    /// What holds workers in.
    pub security: SecurityConfig,
    /// Logs.
    pub log: LogConfig,
}

/// `[model]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelConfig {
    /// GGUF file; the built-in model if there is none.
    pub path: Option<PathBuf>,
    /// Name for clients.
    pub alias: Option<String>,
    /// Type of the output head.
    pub head: HeadChoice,
    /// Directory of the fast images that are kept for later processes.
    pub image_cache: Place,
}

/// `model.head`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadChoice {
    /// The engine chooses.
    #[default]
    Auto,
    /// As the file has it.
    File,
    /// A four-bit image that finds the tokens worth computing from the file's head.
    Fast,
}

/// `[split]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SplitConfig {
    /// A named profile.
    Profile(Profile),
    /// This many workers with this many threads each.
    Counts {
        /// Worker processes.
        workers: usize,
        /// Compute threads in each.
        threads: usize,
    },
    /// One worker for each list of CPUs.
    Explicit(Vec<Vec<u32>>),
}

impl Default for SplitConfig {
    fn default() -> Self {
        Self::Profile(Profile::Auto)
    }
}

/// `split.profile`; for 12 usable CPUs, workers x threads in brackets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// What `tune` measured here, else a rule.
    #[default]
    Auto,
    /// One worker with every CPU \[1x12\].
    MaxThroughput,
    /// \[3x4\]
    Balanced,
    /// \[6x2\]
    HighConcurrency,
    /// \[4x3\]
    LowLatency,
}

/// `[affinity]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AffinityConfig {
    /// CPUs left to others, the supervisor among them.
    pub reserve: Vec<u32>,
    /// What to do with SMT siblings.
    pub smt: SmtPolicy,
    /// Which kinds of core to use.
    pub cores: CoreChoice,
    /// Memory placement.
    pub numa: NumaPolicy,
    /// How often the model is in memory.
    pub copies: CopyPolicy,
}

/// `affinity.smt`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SmtPolicy {
    /// One thread on each core first, siblings only when cores run out.
    #[default]
    Spread,
    /// Both siblings of a core side by side in one worker.
    Pack,
    /// Never use a second sibling.
    Off,
}

/// `affinity.cores`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CoreChoice {
    /// Every kind.
    #[default]
    All,
    /// Performance cores only.
    Performance,
    /// Efficiency cores only.
    Efficiency,
}

/// `affinity.numa`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NumaPolicy {
    /// Bind a worker's memory to its node if there are several nodes.
    #[default]
    Auto,
    /// Always bind.
    Bind,
    /// Prefer the node.
    Preferred,
    /// Interleave over the nodes of the worker's CPUs.
    Interleave,
    /// Leave it to the kernel.
    Off,
}

/// `affinity.copies`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyPolicy {
    /// All workers read one.
    #[default]
    None,
    /// Each memory node with workers has its own, if there are several nodes.
    Node,
}

/// `[engine]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Context window in tokens; `None` takes the model's.
    pub ctx: Option<u32>,
    /// Sequences worked on together in one worker.
    pub max_batch: u32,
    /// Prompt tokens in one step.
    pub prefill_chunk: u32,
    /// Time of a step with prompt tokens while others wait.
    pub prefill_time: Duration,
    /// Type of the KV cache: `f16`, `q8_0`.
    pub kv_type: String,
    /// Instruction set: `auto`, `scalar`, `avx2`, `avx-vnni`, `avx512-vnni`, `neon`, `neon-dotprod`.
    pub isa: String,
    /// How a compute thread waits: `spin`, `hybrid`, `park`.
    pub wait: String,
    /// `auto`, `on`, `off`.
    pub huge_pages: String,
    /// Niceness of the workers; more is less important.
    pub nice: i8,
    /// How the kernel schedules the workers.
    pub scheduler: SchedulerChoice,
    /// Guess tokens from the text so far and check several in a step: `auto` (where it pays), `off`.
    pub speculation: String,
    /// Keep the model and the KV cache in memory, whatever else wants it.
    pub mlock: bool,
    /// MiB that the model and all workers may take together; `None` takes what there is at the start.
    pub memory_mib: Option<u32>,
}

/// `engine.scheduler`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SchedulerChoice {
    /// `SCHED_OTHER`.
    #[default]
    Normal,
    /// `SCHED_BATCH`: longer slices, and waking up interrupts nobody.
    Batch,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            ctx: None,
            max_batch: 8,
            prefill_chunk: 256,
            prefill_time: Duration::from_millis(300),
            kv_type: "f16".into(),
            isa: "auto".into(),
            wait: "hybrid".into(),
            huge_pages: "auto".into(),
            nice: 0,
            scheduler: SchedulerChoice::Normal,
            speculation: "auto".into(),
            mlock: false,
            memory_mib: None,
        }
    }
}

/// `[queue]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Jobs that wait, at most.
    pub max_jobs: u32,
    /// Of those from one client, at most.
    pub max_per_client: u32,
    /// Deaths with the same job on board after which the job is given up.
    pub max_deaths: u32,
    /// Where durable jobs are kept.
    pub journal: Place,
    /// Limits of what is kept there.
    pub durable: DurableConfig,
}

/// Where something is kept: `queue.journal`, `model.image_cache`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// In the usual directory, see [`crate::Environment::journal`] and [`crate::Environment::cache_dir`].
    #[default]
    Usual,
    /// It is not kept.
    Off,
    /// In this file or directory.
    At(PathBuf),
}

/// Keys of `[queue]` about durable jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DurableConfig {
    /// Durable jobs that have not ended, at most.
    pub max_jobs: u32,
    /// Of those of one client, at most.
    pub max_per_client: u32,
    /// Mebibytes of requests and answers that are kept, at most.
    pub max_mib: u32,
    /// Durable jobs on one worker at a time, at most.
    pub per_worker: u32,
    /// Ended jobs whose results are kept, at most.
    pub results_max: u32,
    /// How long a result is kept.
    pub results_keep: Duration,
}

impl Default for DurableConfig {
    fn default() -> Self {
        Self {
            max_jobs: 100_000,
            max_per_client: 50_000,
            max_mib: 1024,
            per_worker: 4,
            results_max: 100_000,
            results_keep: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            max_jobs: 512,
            max_per_client: 64,
            max_deaths: 3,
            journal: Place::default(),
            durable: DurableConfig::default(),
        }
    }
}

/// `[restart]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestartConfig {
    /// Restarts of one slot within `window`, after which the slot is given up.
    pub max: u32,
    /// Length of the window.
    pub window: Duration,
    /// First wait.
    pub backoff_min: Duration,
    /// Longest wait.
    pub backoff_max: Duration,
    /// A worker that is not ready after this long is killed.
    pub start_timeout: Duration,
    /// Jobs get this long to end when the service stops.
    pub drain_timeout: Duration,
}

impl Default for RestartConfig {
    fn default() -> Self {
        Self {
            max: 5,
            window: Duration::from_secs(30),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(10),
            start_timeout: Duration::from_secs(120),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// `[watchdog]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchdogConfig {
    /// Time between pings.
    pub interval: Duration,
    /// A worker whose step loop has not answered for this long is killed.
    pub timeout: Duration,
}

impl Default for WatchdogConfig {
    fn default() -> Self {
        Self { interval: Duration::from_secs(1), timeout: Duration::from_secs(10) }
    }
}

/// `[service]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceConfig {
    /// Workers that must have been ready before the service is; `None`: every one.
    pub ready_workers: Option<u32>,
}

/// `[listen]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenConfig {
    /// Unix socket for clients; `None` takes the default place.
    pub socket: Option<PathBuf>,
    /// Permission bits of the socket.
    pub mode: u32,
    /// User who owns the socket, by name or number; ours without it.
    pub owner: Option<String>,
    /// Group of the socket, by name or number; ours without it.
    pub group: Option<String>,
    /// Uids that may connect; empty means whoever the mode lets in.
    pub allow_uids: Vec<u32>,
    /// Gids that may connect; empty means whoever the mode lets in.
    pub allow_gids: Vec<u32>,
    /// Connections open at once, at most.
    pub max_connections: u32,
    /// Where Prometheus fetches metrics; nowhere if there is none.
    pub metrics: Option<MetricsAddress>,
}

/// `listen.metrics`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// Address and port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            socket: None,
            mode: 0o660,
            owner: None,
            group: None,
            allow_uids: Vec::new(),
            allow_gids: Vec::new(),
            max_connections: 1024,
            metrics: None,
        }
    }
}

/// `[security]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecurityConfig {
    /// How far workers are confined.
    pub confinement: Confinement,
}

/// `security.confinement`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Confinement {
    /// As far as the kernel can; what it cannot is said.
    #[default]
    Auto,
    /// With Landlock and seccomp, or not at all.
    Require,
    /// Not at all.
    Off,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// How lines look.
    pub format: LogFormat,
    /// Lowest level shown, or a `tracing` filter.
    pub level: String,
    /// Where the journal takes entries.
    pub journal_socket: PathBuf,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            format: LogFormat::Auto,
            level: "info".into(),
            journal_socket: "/run/systemd/journal/socket".into(),
        }
    }
}

/// `log.format`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// The journal, where stderr would lead to it; else text.
    #[default]
    Auto,
    /// Lines for people, on stderr.
    Text,
    /// One JSON object a line, on stderr.
    Json,
    /// Entries of systemd's journal, with fields.
    Journald,
}
