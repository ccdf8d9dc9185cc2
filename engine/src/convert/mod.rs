//! Makes model files: of random weights, from Hugging Face checkpoints, from other model files.
//!
//! Everything is streamed, so that a large model needs little memory, into a file beside the wanted one, which
//! is renamed when it is complete: an interrupted conversion leaves no half model under the wanted name.

pub mod huggingface;
mod output;
pub mod retype;
pub mod synth;

use std::io;
use std::path::PathBuf;

use crate::dense::DenseFormat;
use crate::gguf::{GgufWriteError, TensorType};
use crate::ternary::TernaryFormat;

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
    #[error("cannot use the checkpoint")]
    HuggingFace(#[from] huggingface::HuggingFaceError),
    #[error("cannot use the model")]
    Retype(#[from] retype::RetypeError),
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

/// `general.file_type` of files whose projections are `I2_S`.
const FILE_TYPE_I2_S: u32 = 40;

/// The tensor type of a dense format.
#[must_use]
pub fn dense_type(format: DenseFormat) -> TensorType {
    match format {
        DenseFormat::F32 => TensorType::F32,
        DenseFormat::F16 => TensorType::F16,
        DenseFormat::Bf16 => TensorType::Bf16,
        DenseFormat::Q8_0 => TensorType::Q8_0,
        DenseFormat::Q6K => TensorType::Q6K,
        DenseFormat::Q4_0 => TensorType::Q4_0,
    }
}

/// The dense format of a tensor type, if it is one.
#[must_use]
pub fn dense_format(kind: TensorType) -> Option<DenseFormat> {
    match kind {
        TensorType::F32 => Some(DenseFormat::F32),
        TensorType::F16 => Some(DenseFormat::F16),
        TensorType::Bf16 => Some(DenseFormat::Bf16),
        TensorType::Q8_0 => Some(DenseFormat::Q8_0),
        TensorType::Q6K => Some(DenseFormat::Q6K),
        TensorType::Q4_0 => Some(DenseFormat::Q4_0),
        _ => None,
    }
}

/// The tensor type of a ternary format.
#[must_use]
pub fn ternary_type(format: TernaryFormat) -> TensorType {
    match format {
        TernaryFormat::I2S => TensorType::I2S,
        TernaryFormat::Tq2_0 => TensorType::Tq2_0,
        TernaryFormat::Tq1_0 => TensorType::Tq1_0,
    }
}

/// The ternary format of a tensor type, if it is one.
#[must_use]
pub fn ternary_format(kind: TensorType) -> Option<TernaryFormat> {
    match kind {
        TensorType::I2S => Some(TernaryFormat::I2S),
        TensorType::Tq2_0 => Some(TernaryFormat::Tq2_0),
        TensorType::Tq1_0 => Some(TernaryFormat::Tq1_0),
        _ => None,
    }
}
