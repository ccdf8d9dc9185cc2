//! From a handshake to an engine that can take jobs.

use std::error::Error;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitnetd_engine::chat::{ChatError, ChatTemplate};
use bitnetd_engine::fast_image::{FastImageBuilder, FastParts};
use bitnetd_engine::gguf::{Gguf, GgufError};
use bitnetd_engine::kernels::{Isa, KernelSet};
use bitnetd_engine::kv::KvType;
use bitnetd_engine::mapping::{Mapping, MappingError};
use bitnetd_engine::model::{Model, ModelError};
use bitnetd_engine::pool::Wait;
use bitnetd_engine::speculation::Speculation;
use bitnetd_engine::{Engine, EngineError, EngineOptions};
use bitnetd_proto::PROTOCOL_VERSION;
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::frame::FrameError;
use bitnetd_proto::worker_link::{Confinement, FromWorker, ModelSummary, ToWorker, WorkerSetup};
use nix::sys::prctl;

use crate::budget::{self, DoesNotFit, Weights};
use crate::link::Link;
use crate::locked_memory::{self, CannotLock};
use crate::node_copy::{self, NodeCopyError};
use crate::sandbox::SandboxError;
use crate::shared_image::{HugePages, SharedImage};

/// Memory that is left to others when room for something that can be done without is looked for.
const MEMORY_LEFT: u64 = 512 << 20;

/// The open files that the model and its fast image are in, as [`crate::inherited::Inherited`] has them.
pub(crate) struct Memories {
    pub(crate) image: OwnedFd,
    pub(crate) copy: Option<OwnedFd>,
    pub(crate) head: OwnedFd,
    pub(crate) kept: Option<OwnedFd>,
}

/// An engine, and the model's way to write a conversation.
pub(crate) struct Started {
    pub(crate) engine: Engine,
    pub(crate) template: Result<Option<ChatTemplate>, ChatError>,
    pub(crate) fast_image: SharedImage,
    summary: Box<ModelSummary>,
    load_s: f64,
}

/// Why a worker cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("the supervisor closed the link")]
    LinkClosed,
    #[error("the link broke")]
    Link(#[from] FrameError),
    #[error("expected `hello` as the first message")]
    NoHello,
    #[error("the supervisor speaks protocol version {found}, this worker {PROTOCOL_VERSION}")]
    Version { found: u32 },
    #[error("`{key}` is `{found}`, expected {expected}")]
    Setting { key: &'static str, found: String, expected: String },
    #[error("this CPU cannot run the `{0}` kernels")]
    IsaNotPresent(Isa),
    #[error("cannot map `{name}`")]
    Map { name: String, source: MappingError },
    #[error("`{name}` is not a GGUF file that can be read")]
    Gguf { name: String, source: GgufError },
    #[error("`{name}` cannot be run")]
    Model { name: String, source: ModelError },
    #[error("cannot copy `{name}` to the memory of this node")]
    Copy { name: String, source: NodeCopyError },
    #[error(transparent)]
    Memory(DoesNotFit),
    #[error(transparent)]
    Lock(CannotLock),
    #[error("cannot start the engine")]
    Engine(#[source] EngineError),
    #[error("cannot start the reader of the link")]
    Reader(#[source] io::Error),
    #[error("cannot confine the worker")]
    Sandbox(#[from] SandboxError),
}

impl StartError {
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::LinkClosed => ExitCode::Ok,
            Self::Link(_) | Self::NoHello | Self::Version { .. } => ExitCode::Software,
            Self::Setting { .. } | Self::IsaNotPresent(_) | Self::Memory(_) | Self::Lock(_) => {
                ExitCode::Config
            }
            Self::Map { .. } | Self::Copy { .. } => ExitCode::Os,
            Self::Gguf { .. } | Self::Model { .. } => ExitCode::Data,
            Self::Engine(EngineError::ContextTooLong { .. } | EngineError::Zero(_)) => ExitCode::Config,
            Self::Engine(EngineError::Tokenizer(_) | EngineError::VocabularySize { .. }) => ExitCode::Data,
            Self::Engine(EngineError::Pool(_)) | Self::Reader(_) => ExitCode::Os,
            Self::Sandbox(error) => error.exit_code(),
        }
    }

    /// The whole chain of causes in one line, and what to do next.
    pub(crate) fn to_wire(&self) -> WireError {
        let mut message = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !message.ends_with(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            cause = error.source();
        }
        let error = WireError::new(ErrorCode::Internal, message);
        match self {
            Self::Gguf { .. } => {
                error.with_hint("`bitnetd model info FILE` says more; is the download complete?")
            }
            Self::Model { .. } => error.with_hint("`bitnetd model info FILE` lists what is supported"),
            Self::IsaNotPresent(_) => error.with_hint("use `isa = \"auto\"`"),
            Self::Lock(_) => error.with_hint(CannotLock::HINT),
            Self::Memory(refusal) => error.with_hint(refusal.hint()),
            Self::Engine(EngineError::Tokenizer(_)) => error.with_hint(
                "`bitnetd model verify FILE` says more; docs/tokenizer.md lists the vocabularies that are supported",
            ),
            Self::Engine(EngineError::ContextTooLong { .. }) => error.with_hint("leave `engine.ctx` out"),
            Self::Sandbox(_) => error.with_hint(
                "`security.confinement = \"auto\"` takes what the kernel has; docs/security.md says what is lost",
            ),
            _ => error,
        }
    }
}

/// Waits for the first message.
pub(crate) fn handshake(link: &mut Link) -> Result<WorkerSetup, StartError> {
    match link.receive()? {
        None => Err(StartError::LinkClosed),
        Some(ToWorker::Hello { version: PROTOCOL_VERSION, setup }) => Ok(*setup),
        Some(ToWorker::Hello { version, .. }) => Err(StartError::Version { found: version }),
        Some(_) => Err(StartError::NoHello),
    }
}

/// Loads the model.
pub(crate) fn start(setup: &WorkerSetup, memories: Memories) -> Result<Started, StartError> {
    let Memories { image, copy, head, kept } = memories;
    let begun = Instant::now();
    name_this_thread(&format!("{}-t0", thread_name(setup)));
    let name = || setup.model_name.clone();
    let kernels = choose_kernels(&setup.isa)?;
    let wait = choose_wait(&setup.wait)?;
    require("model.head", &setup.head, &["auto", "file", "fast"])?;
    require("engine.speculation", &setup.speculation, &["auto", "off"])?;
    let huge_pages = choose_huge_pages(&setup.huge_pages)?;
    let kv_type = choose_kv_type(&setup.kv_type)?;
    let mapping = map_model(setup, image, copy)?;
    let image_bytes = mapping.len() as u64;
    let gguf = Gguf::parse(Arc::new(mapping)).map_err(|source| StartError::Gguf { name: name(), source })?;
    let gguf = Arc::new(gguf);
    let template = ChatTemplate::from_gguf(&gguf);
    let model = Model::load(gguf).map_err(|source| StartError::Model { name: name(), source })?;
    let wanted = image_wanted(&model, kernels, &setup.head);
    // An image that nobody asked for is made only if there is room left.
    let image = if setup.head == "fast" { wanted.1 } else { 0 };
    let weights = Weights { file: image_bytes, image, n_copies: setup.n_copies.max(1) };
    let n_ctx = budget::context(model.hparams(), (setup, kv_type), weights).map_err(StartError::Memory)?;
    if setup.ctx == 0 && n_ctx < model.hparams().n_ctx {
        let asked = model.hparams().n_ctx;
        tracing::warn!("the model's context window of {asked} tokens does not fit in memory: {n_ctx} it is");
    }
    let cpus: Vec<_> = setup.cpus.iter().copied().map(Some).collect();
    let wanted = if setup.head == "auto" {
        let taken = budget::needed_bytes(model.hparams(), (setup, kv_type), weights, n_ctx);
        if_there_is_room(wanted, setup, taken)
    } else {
        wanted
    };
    let options = EngineOptions {
        cpus,
        wait,
        thread_name: thread_name(setup),
        kernels,
        n_ctx: Some(n_ctx),
        max_batch: setup.max_batch as usize,
        prefill_chunk: setup.prefill_chunk as usize,
        prefill_time: Duration::from_millis(setup.prefill_ms.into()),
        kv_type,
        speculation: if setup.speculation == "off" { Speculation::Off } else { Speculation::Auto },
    };
    let engine = Engine::new(Arc::new(model), options).map_err(StartError::Engine)?;
    if setup.mlock {
        locked_memory::lock_engine(&engine, wanted.1).map_err(StartError::Lock)?;
    }
    let load_s = begun.elapsed().as_secs_f64();
    let summary = Box::new(summarise(&engine, setup, image_bytes, matches!(template, Ok(Some(_)))));
    tracing::info!(slot = setup.slot, isa = %kernels.isa(), load_s, "loaded");
    let fast_image = SharedImage::new((head, kept), wanted, huge_pages, setup.mlock);
    Ok(Started { engine, template, fast_image, summary, load_s })
}

/// Maps the model: the file, or the copy of it that the workers of this node share.
fn map_model(setup: &WorkerSetup, image: OwnedFd, copy: Option<OwnedFd>) -> Result<Mapping, StartError> {
    let name = || setup.model_name.clone();
    let mapping = Mapping::from_fd(image).map_err(|source| StartError::Map { name: name(), source })?;
    if !setup.has_copy {
        return Ok(mapping);
    }
    copy.ok_or(NodeCopyError::NoMemory)
        .and_then(|memory| node_copy::open(memory, &mapping))
        .map_err(|source| StartError::Copy { name: name(), source })
}

/// Says that jobs can come.
pub(crate) fn say_ready(
    started: &Started,
    confinement: Confinement,
    link: &mut Link,
) -> Result<(), StartError> {
    let Started { summary, load_s, .. } = started;
    let (model, load_s) = (summary.clone(), *load_s);
    Ok(link.send(&FromWorker::Ready { version: PROTOCOL_VERSION, model, load_s, confinement })?)
}

fn summarise(
    engine: &Engine,
    setup: &WorkerSetup,
    image_bytes: u64,
    has_chat_template: bool,
) -> ModelSummary {
    let hparams = engine.model().hparams();
    let cost = engine.cost();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    ModelSummary {
        name: hparams.name.clone().unwrap_or_else(|| setup.model_name.clone()),
        architecture: hparams.architecture_name.clone(),
        n_params: engine.model().n_params(),
        n_ctx: count(engine.n_ctx()),
        n_vocab: count(hparams.n_vocab),
        n_layers: count(hparams.n_layers),
        n_embd: count(hparams.n_embd),
        isa: engine.kernels().isa().to_string(),
        head: engine.model().output().format().name().to_owned(),
        image_bytes,
        kv_bytes: engine.kv().shape().bytes(),
        has_chat_template,
        step_bytes: cost.bytes,
        token_macs: cost.row_macs,
        head_macs: cost.logits_macs,
    }
}

/// Start of the names of all compute threads, as `top`, `ps` and our own monitoring see them.
fn thread_name(setup: &WorkerSetup) -> String {
    format!("bnd-w{}", setup.slot)
}

/// The step loop runs on the process's first thread, whose name is also that of the process.
fn name_this_thread(name: &str) {
    let named = CString::new(name).map(|name| prctl::set_name(&name));
    if !matches!(named, Ok(Ok(()))) {
        tracing::debug!(name, "the thread keeps its name");
    }
}

const NO_IMAGE: (FastParts, u64) = (FastParts { ternary: false, head: false }, 0);

/// The parts of a fast image that a choice of `model.head` asks for, and how many bytes they take.
fn image_wanted(model: &Model, kernels: KernelSet, head: &str) -> (FastParts, u64) {
    let parts = match head {
        "file" => return NO_IMAGE,
        "fast" => FastParts { ternary: kernels.reads_image(), head: true },
        _ => FastParts::that_pay(model, kernels),
    };
    match FastImageBuilder::n_bytes(model, parts) {
        Ok(n_bytes) => (parts, n_bytes as u64),
        // Why it cannot be made of this model is said when it is tried.
        Err(_) if head == "fast" => (parts, 0),
        Err(_) => NO_IMAGE,
    }
}

/// The image, if there is room for it beside the model and what all workers remember.
fn if_there_is_room(wanted: (FastParts, u64), setup: &WorkerSetup, taken: u64) -> (FastParts, u64) {
    let n_bytes = wanted.1.saturating_mul(setup.n_copies.max(1).into());
    let available = setup.memory_bytes;
    if available > 0 && taken.saturating_add(n_bytes).saturating_add(MEMORY_LEFT) > available {
        tracing::info!(n_bytes, taken, available, "no room for a fast image: decoding reads the model file");
        return NO_IMAGE;
    }
    wanted
}

fn choose_kernels(isa: &str) -> Result<KernelSet, StartError> {
    if isa == "auto" {
        return Ok(KernelSet::detect());
    }
    let isa: Isa = isa.parse().map_err(|_| StartError::Setting {
        key: "engine.isa",
        found: isa.into(),
        expected: format!("auto, {}", Isa::ALL.map(Isa::name).join(", ")),
    })?;
    KernelSet::for_isa(isa).ok_or(StartError::IsaNotPresent(isa))
}

fn choose_kv_type(kv_type: &str) -> Result<KvType, StartError> {
    kv_type.parse().map_err(|_| StartError::Setting {
        key: "engine.kv_type",
        found: kv_type.into(),
        expected: KvType::ALL.map(KvType::name).join(" or "),
    })
}

fn choose_wait(wait: &str) -> Result<Wait, StartError> {
    match wait {
        "spin" => Ok(Wait::Spin),
        "hybrid" => Ok(Wait::Hybrid),
        "park" => Ok(Wait::Park),
        other => Err(StartError::Setting {
            key: "engine.wait",
            found: other.into(),
            expected: "spin, hybrid or park".into(),
        }),
    }
}

fn choose_huge_pages(huge_pages: &str) -> Result<HugePages, StartError> {
    match huge_pages {
        "auto" => Ok(HugePages::Auto),
        "on" => Ok(HugePages::On),
        "off" => Ok(HugePages::Off),
        other => Err(StartError::Setting {
            key: "engine.huge_pages",
            found: other.into(),
            expected: "auto, on or off".into(),
        }),
    }
}

fn require(key: &'static str, found: &str, choices: &[&str]) -> Result<(), StartError> {
    if choices.contains(&found) {
        return Ok(());
    }
    Err(StartError::Setting { key, found: found.into(), expected: choices.join(", ") })
}
