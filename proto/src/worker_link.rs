//! Messages between the supervisor and one worker, over an inherited socket pair.
//!
//! The supervisor speaks first (`Hello`); the worker answers `Ready` when the model is loaded and it can take
//! jobs, or `StartFailed` and exits with the same code. `Pong` is sent by the worker's step loop, not by its
//! I/O thread, so that an answer proves that work goes on.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::WireError;
use crate::event::{Done, Token};
use crate::exit_code::ExitCode;
use crate::request::GenerateRequest;

/// File descriptor of the link in a worker.
pub const WORKER_LINK_FD: i32 = 3;
/// File descriptor of the model image in a worker, opened read-only.
pub const WORKER_IMAGE_FD: i32 = 4;
/// File descriptor of the memory for the fast image of the model in a worker: empty, or filled and sealed.
pub const WORKER_HEAD_FD: i32 = 5;

/// File descriptor of the pipe on which a worker says why it dies.
pub const WORKER_LAST_WORDS_FD: i32 = 6;

/// File descriptor of the memory for a copy of the model, shared by the workers of one memory node: empty, or filled and
/// sealed. Not there unless [`WorkerSetup::has_copy`].
pub const WORKER_COPY_FD: i32 = 7;
/// The descriptor of a file in which an earlier process kept the fast image ([`crate::kept`]), read-only; only open if there is
/// one.
pub const WORKER_KEPT_FD: i32 = 8;

/// From the supervisor to a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToWorker {
    /// First message: version and everything the worker needs to know.
    Hello {
        /// Must be [`crate::PROTOCOL_VERSION`].
        version: u32,
        /// Set-up of this worker.
        setup: Box<WorkerSetup>,
    },
    /// Takes on a job. `resume` holds the tokens that were already delivered to the client.
    Job {
        /// The supervisor's name of the job.
        job: u64,
        /// What to do; the seed is always filled in.
        request: Box<GenerateRequest>,
        /// Tokens already delivered; the first new token has index `resume.len()`.
        resume: Vec<u32>,
    },
    /// Gives a job up; the worker says nothing more about it.
    Cancel {
        /// The supervisor's name of the job.
        job: u64,
    },
    /// Asks the step loop for a sign of life.
    Ping {
        /// Comes back in the answer.
        seq: u64,
    },
    /// Finish the jobs on board and exit with code 0.
    Drain,
}

/// What a worker is told at the handshake.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerSetup {
    /// Slot number, for names and logs.
    pub slot: u32,
    /// CPUs to pin compute threads to, one thread each. The process affinity is already this set.
    pub cpus: Vec<u32>,
    /// What to call the model in messages: a path or `built-in`.
    pub model_name: String,
    /// Context window in tokens, at most; 0 takes the model's own.
    pub ctx: u32,
    /// Sequences that are worked on together, at most.
    pub max_batch: u32,
    /// Prompt tokens processed in one step, at most.
    pub prefill_chunk: u32,
    /// Milliseconds of a step with prompt tokens while others wait for their next token, about.
    pub prefill_ms: u32,
    /// `auto`, or the name of an instruction set.
    pub isa: String,
    /// `auto`, or the type of the output head.
    pub head: String,
    /// `f16`.
    pub kv_type: String,
    /// `spin`, `hybrid` or `park`.
    pub wait: String,
    /// `auto`, `on` or `off`.
    pub huge_pages: String,
    /// `auto` or `off`.
    pub speculation: String,
    /// Lock the model and the KV cache in memory.
    pub mlock: bool,
    /// How many workers there are; each takes its own memory for keys and values.
    pub n_workers: u32,
    /// Compute threads of all workers together.
    pub n_threads: u32,
    /// How often the model is in memory, for all workers together.
    pub n_copies: u32,
    /// Whether there is memory for a copy of the model at [`WORKER_COPY_FD`], which is to be read instead of the image.
    pub has_copy: bool,
    /// Bytes that the model and all workers may take together; 0 if that is not known.
    pub memory_bytes: u64,
    /// `auto`, `require` or `off`.
    pub confinement: String,
}

/// From a worker to the supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromWorker {
    /// The model is loaded and jobs can come.
    Ready {
        /// The worker's protocol version.
        version: u32,
        /// What it serves.
        model: Box<ModelSummary>,
        /// Seconds from its start to now.
        #[serde(with = "crate::float::finite_f64")]
        load_s: f64,
        /// What holds it in.
        #[serde(default)]
        confinement: Confinement,
    },
    /// It cannot start; it exits with `exit_code` now.
    StartFailed {
        /// Why, as a client may see it.
        error: WireError,
        /// The code it exits with.
        exit_code: ExitCode,
    },
    /// One more token of a job.
    Token {
        /// The supervisor's name of the job.
        job: u64,
        /// The token.
        token: Token,
    },
    /// A job ended well.
    Done {
        /// The supervisor's name of the job.
        job: u64,
        /// How it ended.
        done: Done,
    },
    /// A job cannot be done (a fault of the request).
    Failed {
        /// The supervisor's name of the job.
        job: u64,
        /// Why.
        error: WireError,
    },
    /// Answer to `Ping`, from the step loop.
    Pong {
        /// From the `Ping`.
        seq: u64,
        /// What it does.
        load: WorkerLoad,
    },
}

/// What keeps a worker from files, network and other processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Confinement {
    /// Version of the kernel's Landlock interface; 0 if it has none or it is not used.
    pub landlock: u32,
    /// System calls are filtered.
    pub seccomp: bool,
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.landlock, self.seccomp) {
            (0, false) => f.write_str("none"),
            (0, true) => f.write_str("seccomp only"),
            (abi, false) => write!(f, "landlock {abi} only"),
            (abi, true) => write!(f, "landlock {abi} and seccomp"),
        }
    }
}

/// The model as a worker read it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSummary {
    /// `general.name`, else the file's name.
    pub name: String,
    /// `general.architecture`.
    pub architecture: String,
    /// Parameters.
    pub n_params: u64,
    /// Context window in tokens.
    pub n_ctx: u32,
    /// Vocabulary size.
    pub n_vocab: u32,
    /// Layers.
    pub n_layers: u32,
    /// Width.
    pub n_embd: u32,
    /// Instruction set of the kernels.
    pub isa: String,
    /// Type of the output head.
    pub head: String,
    /// Size of the model image.
    pub image_bytes: u64,
    /// Size of the KV cache at its fullest.
    pub kv_bytes: u64,
    /// Whether it has a chat template.
    pub has_chat_template: bool,
    /// Bytes of weights that a step of a worker reads.
    #[serde(default)]
    pub step_bytes: u64,
    /// Multiplications of a prompt token, all but the head's.
    #[serde(default)]
    pub token_macs: u64,
    /// Multiplications of the head for a generated token.
    #[serde(default)]
    pub head_macs: u64,
}

/// What a worker does, as it said last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerLoad {
    /// Steps of the loop since its start.
    pub steps: u64,
    /// Sequences on board.
    pub sequences: u32,
    /// Prompt tokens processed since its start.
    pub prefill_tokens: u64,
    /// Tokens generated since its start.
    pub decode_tokens: u64,
    /// Seconds spent in steps that processed prompts.
    #[serde(with = "crate::float::finite_f64")]
    pub prefill_s: f64,
    /// Seconds spent in steps that only generated.
    #[serde(with = "crate::float::finite_f64")]
    pub decode_s: f64,
    /// Tokens in the KV cache.
    pub kv_tokens: u64,
    /// Tokens that fit in the KV cache.
    pub kv_tokens_max: u64,
    /// Prompt tokens that were found in the KV cache since its start.
    pub cached_tokens: u64,
    /// Guesses of speculation that were checked since its start.
    pub guessed_tokens: u64,
    /// Of those, the right ones.
    pub right_guesses: u64,
    /// What decoding reads instead of the model file, as far as this worker is concerned.
    pub image: ImageState,
    /// Bytes of that.
    pub image_bytes: u64,
    /// Bytes of weights that the last step read which only generated: those that are multiplied with zero are left out. Before the first
    /// such step, what one would read at most.
    pub step_bytes: u64,
    /// Its memory, if the kernel tells; read every second or so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<WorkerMemory>,
}

/// What a worker has to do with the fast image of the model, which all workers share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageState {
    /// There is none: it does not pay, has no room, or is not wanted.
    #[default]
    None,
    /// It is not there yet, and this worker is not at it.
    Waiting,
    /// This worker makes it, beside its jobs.
    Making,
    /// In use; this worker has made it.
    Made,
    /// In use; another worker has made it, or one before.
    Mapped,
    /// In use; this worker has read it from disk, where an earlier process kept it.
    Read,
}

impl ImageState {
    /// True if decoding reads it.
    #[must_use]
    pub fn is_used(self) -> bool {
        matches!(self, Self::Made | Self::Mapped | Self::Read)
    }
}

/// Memory of one worker, in bytes, as `/proc/PID/smaps_rollup` has it. Pages shared by n processes count 1/n in each PSS, so
/// that the sum over all workers is what they cost together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerMemory {
    /// Pages in memory, shared ones counted in full.
    pub rss_bytes: u64,
    /// Pages in memory, shared ones by share.
    pub pss_bytes: u64,
    /// Of that the pages of no file: heap, KV cache.
    pub pss_anon_bytes: u64,
    /// Of that the pages of files: the model and the program.
    pub pss_file_bytes: u64,
    /// Of that shared memory: the model where it is a memfd.
    pub pss_shmem_bytes: u64,
    /// Pages swapped out.
    pub swap_bytes: u64,
    /// Pages that cannot be.
    pub locked_bytes: u64,
}
