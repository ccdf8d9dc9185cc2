//! Hugging Face checkpoints (`config.json`, safetensors, `tokenizer.json` or `tokenizer.model`) to GGUF.
//!
//! Float master weights become ternary as `transformers` does it when it loads them (`AutoBitLinear`, online):
//! in f32, `s = 1 / max(mean |W|, 1e-5)` over the whole tensor, code = `clamp(round(w * s), -1, 1)` with halves to
//! even, weight = `code / s`; so `I2_S` gets the scale `1 / s`. The mean is summed in f64 and rounded once, where
//! torch sums in f32 in an order of its own: the scale may differ in its last bits, a code only where `|w| * s` is
//! within an ulp of a half. Packed checkpoints (`uint8` and `weight_scale`) are taken over code by code.

mod checkpoint;
mod config;
mod tensors;
mod tokenizer;

use std::path::{Path, PathBuf};

pub use self::checkpoint::CheckpointError;
pub use self::config::ConfigError;
pub use self::tensors::TensorError;
pub use self::tokenizer::TokenizerFileError;

use self::checkpoint::{Checkpoint, Shards};
use self::config::Config;
use self::tokenizer::TokenizerFile;
use super::output::Output;
use super::{ConvertError, FILE_TYPE_I2_S, OnProgress, Progress};
use crate::dense::DenseFormat;
use crate::gguf::{GgufWriteError, GgufWriter, TensorType};
use crate::inspect::{TensorRole, TensorSpec};

/// What the file shall be like.
#[derive(Clone, Debug)]
pub struct HuggingFaceOptions {
    /// `general.name`; the directory's name if `None`.
    pub name: Option<String>,
    /// How the embedding (and an untied head) is stored.
    pub embedding: DenseFormat,
}

/// Why a directory could not be read as a checkpoint.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum HuggingFaceError {
    #[error("cannot read `{}`", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("`{}` is not the JSON that is expected there", path.display())]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("config.json")]
    Config(#[source] ConfigError),
    #[error("the safetensors files")]
    Checkpoint(#[source] CheckpointError),
    #[error("the weights")]
    Tensor(#[source] TensorError),
    #[error("tokenizer.json")]
    Tokenizer(#[source] TokenizerFileError),
    #[error("tokenizer.model")]
    TokenizerModel(#[source] TokenizerFileError),
}

/// Converts the checkpoint in `directory` to the GGUF file `out`.
///
/// # Errors
/// The checkpoint is incomplete, or is not a ternary model of a supported architecture, or cannot be stored.
pub fn convert(
    directory: &Path,
    out: &Path,
    options: &HuggingFaceOptions,
    on_progress: OnProgress<'_>,
) -> Result<(), ConvertError> {
    let config = Config::read(directory)?;
    let tokenizer = TokenizerFile::read(directory, &config)?;
    let shards = Shards::open(directory)?;
    let checkpoint = Checkpoint::new(&shards).map_err(HuggingFaceError::Checkpoint)?;
    let specs = config.shape.tensors();
    checkpoint.check_all_used(&specs, &config).map_err(HuggingFaceError::Checkpoint)?;

    let name = options.name.clone().or_else(|| Some(directory.file_name()?.to_str()?.to_owned()));
    let name = name.unwrap_or_else(|| "model".to_owned());
    let writer = header(&name, &config, &tokenizer, &specs, options).map_err(ConvertError::Write)?;
    let mut data = writer.start(Output::create(out)?).map_err(ConvertError::Write)?;
    for (idx, spec) in specs.iter().enumerate() {
        tensors::write(&checkpoint, spec, &config, options, &mut data)?;
        on_progress(Progress { tensor: &spec.name, n_done: idx + 1, n_total: specs.len() });
    }
    data.finish().map_err(ConvertError::Write)?.commit()
}

fn header(
    name: &str,
    config: &Config,
    tokenizer: &TokenizerFile,
    specs: &[TensorSpec],
    options: &HuggingFaceOptions,
) -> Result<GgufWriter, GgufWriteError> {
    let mut writer = GgufWriter::new();
    writer.str("general.architecture", config.shape.architecture.name())?;
    writer.str("general.name", name)?;
    config.shape.write_keys(&mut writer, tokenizer.adds_bos())?;
    writer.u32("general.file_type", FILE_TYPE_I2_S)?;
    tokenizer.write_keys(&mut writer)?;
    writer.u32("general.quantization_version", 2)?;
    for spec in specs {
        let kind = match spec.role {
            TensorRole::Projection => TensorType::I2S,
            TensorRole::Norm => TensorType::F32,
            TensorRole::Embedding | TensorRole::Head => super::dense_type(options.embedding),
        };
        writer.tensor(&spec.name, kind, &spec.dims)?;
    }
    Ok(writer)
}

/// Reads and parses a JSON file of the checkpoint.
fn read_json<T: serde::de::DeserializeOwned>(path: PathBuf) -> Result<T, HuggingFaceError> {
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(source) => return Err(HuggingFaceError::Read { path, source }),
    };
    serde_json::from_slice(&text).map_err(|source| HuggingFaceError::Json { path, source })
}

/// The same, of a file that need not be there.
fn read_json_if_there<T: serde::de::DeserializeOwned>(path: PathBuf) -> Result<Option<T>, HuggingFaceError> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests;
