//! Pure inference library for ternary (BitNet b1.58) models.
//!
//! No async, no sockets, no environment, no logging set-up: bytes of a GGUF file in, tokens out.
//!
//! Invariant (promise P4): a token depends on the model, the prompt, the sampling parameters and the seed, and
//! on nothing else. Integer sums are exact; every float reduction has one order, the same on every path.

pub mod chat; // Conversations as prompts.
pub mod convert; // Makes model files.
pub mod dense; // Float and block-quantised matrices: layouts, conversion.
pub mod engine; // Continuous batching: the step loop's other half.
pub mod fast_image; // What decoding reads instead of the file.
pub mod forward; // The graph.
pub mod gguf; // Model files: bounded zero-copy reader, streaming writer.
pub mod head; // A few bits of the output head, which find the rows worth computing.
pub mod inspect; // What a model file holds and whether it is sound.
pub mod kernels; // What is computed: the scalar definition and its fast twins.
pub mod kv; // Keys and values of the tokens so far.
pub mod mapping; // Bytes of a model, shared read-only by all who map them.
pub mod model; // Hyper-parameters and weights of a file.
pub mod noise; // Random numbers by seed, position and token.
pub mod pool; // Which threads compute it.
pub mod sampler; // Which token comes next.
pub mod sequence; // One answer in the making.
pub mod speculation; // Guesses of what comes next, checked several at a time.
pub mod ternary; // How ternary weights are stored.
pub mod tokenizer; // Text to token ids and back.

pub use engine::{Engine, EngineError, EngineOptions, EngineStats, SubmitError, buffer_bytes};
pub use sequence::{EngineEvent, StepEvents};
