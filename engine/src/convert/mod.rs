//! Makes model files: of random weights, from Hugging Face checkpoints, from other model files.
//!
//! Everything is streamed, so that a large model needs little memory, into a file beside the wanted one, which
//! is renamed when it is complete: an interrupted conversion leaves no half model under the wanted name.

mod output;
pub mod synth;

use std::io;
use std::path::PathBuf;

use crate::gguf::GgufWriteError;

/// Why a model file was not made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum ConvertError {
    #[error("cannot write `{}`", path.display())]
    Output {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write the model")]
    Write(#[source] GgufWriteError),
    #[error("impossible shape: {problem}")]
    Shape { problem: String },
}

/// How far a conversion is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The tensor that was finished.
    pub tensor: &'a str,
    /// Tensors finished.
    pub n_done: usize,
    /// All tensors.
    pub n_total: usize,
}

/// Is told about every finished tensor.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress<'_>);
