//! Starts engines on the story model and runs sequences to their end.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bitnetd_engine::fast_image::{FastImage, FastImageBuilder, FastParts};
use bitnetd_engine::gguf::Gguf;
use bitnetd_engine::kernels::KernelSet;
use bitnetd_engine::kv::KvType;
use bitnetd_engine::mapping::{Mapping, MappingMut};
use bitnetd_engine::model::Model;
use bitnetd_engine::pool::Wait;
use bitnetd_engine::sampler::SamplingParams;
use bitnetd_engine::sequence::{SequenceRequest, Summary};
use bitnetd_engine::speculation::Speculation;
use bitnetd_engine::tokenizer::Special;
use bitnetd_engine::{Engine, EngineEvent, EngineOptions, StepEvents};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// What one sequence gave.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: String,
    /// Bits of the log-probability of each token, so that "equal" means to the bit.
    pub(crate) logprob_bits: Vec<u32>,
    pub(crate) end: Option<(bitnetd_engine::sequence::FinishReason, usize)>,
}

/// How to run an engine: everything that must not change an answer.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) kernels: KernelSet,
    pub(crate) n_threads: usize,
    pub(crate) max_batch: usize,
    pub(crate) prefill_chunk: usize,
    pub(crate) prefill_time: Duration,
    pub(crate) speculation: Speculation,
    pub(crate) kv_type: KvType,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            kernels: KernelSet::detect(),
            n_threads: 1,
            max_batch: 4,
            prefill_chunk: 64,
            prefill_time: Duration::from_millis(300),
            speculation: Speculation::Always,
            kv_type: KvType::F16,
        }
    }
}

pub(crate) fn story_model() -> Arc<Model> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf");
    let mapping = Mapping::open(&path).unwrap();
    Arc::new(Model::load(Arc::new(Gguf::parse(Arc::new(mapping)).unwrap())).unwrap())
}

pub(crate) fn engine(model: &Arc<Model>, setting: &Setting) -> Engine {
    let options = EngineOptions {
        cpus: vec![None; setting.n_threads],
        wait: Wait::Hybrid,
        thread_name: "test".into(),
        kernels: setting.kernels,
        n_ctx: None,
        max_batch: setting.max_batch,
        prefill_chunk: setting.prefill_chunk,
        prefill_time: setting.prefill_time,
        speculation: setting.speculation,
        kv_type: setting.kv_type,
    };
    Engine::new(Arc::clone(model), options).unwrap()
}

/// The fast image of a model with all its parts, made a little at a time.
pub(crate) fn fast_image(engine: &Engine) -> FastImage {
    let parts = FastParts { ternary: true, head: true };
    let model = Arc::clone(engine.model());
    let n_bytes = FastImageBuilder::n_bytes(&model, parts).unwrap();
    let memory = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    memory.set_len(n_bytes as u64).unwrap();
    let mapping = MappingMut::new(&memory, n_bytes).unwrap();
    let mut builder = FastImageBuilder::new(Arc::clone(&model), parts, mapping).unwrap();
    let mut n_slices = 1;
    while !builder.advance(engine.kernels(), engine.pool(), Duration::ZERO).unwrap() {
        n_slices += 1;
    }
    assert!(n_slices > 10, "it came in {n_slices} slices");
    drop(builder);
    FastImage::new(Mapping::from_fd(memory.into()).unwrap(), &model).unwrap()
}

pub(crate) fn request(
    engine: &Engine,
    prompt: &str,
    max_tokens: usize,
    sampling: SamplingParams,
) -> SequenceRequest {
    SequenceRequest {
        prompt: engine.tokenizer().encode(prompt, Special::AsText, engine.tokenizer().adds_bos()).unwrap(),
        resume: Vec::new(),
        max_tokens,
        sampling,
        stop: Vec::new(),
        n_logprobs: Some(0),
        ignore_eos: false,
    }
}

pub(crate) fn seeded(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.02,
        seed,
        ..SamplingParams::default()
    }
}

/// Steps until everything has ended.
pub(crate) fn run(engine: &mut Engine) -> BTreeMap<u64, (Answer, Summary)> {
    let mut answers = BTreeMap::new();
    let mut open: BTreeMap<u64, Answer> = BTreeMap::new();
    let mut events = StepEvents::new();
    while !engine.is_idle() {
        engine.step(&mut events);
        for (event, text) in events.drain() {
            match event {
                EngineEvent::Token { id, token, logprobs, .. } => {
                    let answer = open.entry(id).or_insert_with(Answer::empty);
                    answer.tokens.push(token);
                    answer.text.push_str(text);
                    answer.logprob_bits.extend(logprobs.map(|logprobs| logprobs.logprob.to_bits()));
                }
                EngineEvent::Finished { id, summary } => {
                    let mut answer = open.remove(&id).unwrap_or_else(Answer::empty);
                    answer.text.push_str(&summary.tail);
                    answer.end = Some((summary.reason, summary.n_generated));
                    answers.insert(id, (answer, summary));
                }
            }
        }
    }
    answers
}

impl Answer {
    fn empty() -> Self {
        Self { tokens: Vec::new(), text: String::new(), logprob_bits: Vec::new(), end: None }
    }
}
