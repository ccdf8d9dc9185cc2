//! Models of random ternary weights in a real shape: what performance is measured on, and what tests run.
//!
//! The same shape and seed give the same bytes. Scales are chosen so that every normed activation has a spread
//! near 1 and logits a spread near 2.5, as in a trained model: nothing overflows, and no token always wins.

mod random;
mod vocabulary;

use std::path::Path;

use self::random::{GaussTable, Stream, TernaryTable};
use super::output::Output;
use super::{ConvertError, FILE_TYPE_I2_S, OnProgress, Progress};
use crate::gguf::{GgufWriteError, GgufWriter, TensorType, TensorWriter};
use crate::inspect::{ModelShape, TensorRole, TensorSpec};
use crate::model::Architecture;
use crate::ternary::i2_s_trailer;

pub use vocabulary::Vocabulary;

/// Fewest tokens: all bytes and the special tokens.
pub const N_VOCAB_MIN: u32 = 272;

/// What model to make.
#[derive(Clone, Debug)]
pub struct SynthOptions {
    /// Its shape.
    pub shape: ModelShape,
    /// `general.name`
    pub name: String,
    /// Chooses the weights.
    pub seed: u64,
}

/// Writes a model of random weights to `path`.
///
/// # Errors
/// The shape is impossible or `I2_S` cannot hold it, or the file cannot be written.
pub fn synth(path: &Path, options: &SynthOptions, on_progress: OnProgress<'_>) -> Result<(), ConvertError> {
    let shape = &options.shape;
    let shape_error = |problem: String| Err(ConvertError::Shape { problem });
    if let Some(problem) = shape.problem() {
        return shape_error(problem);
    }
    if shape.n_vocab < N_VOCAB_MIN {
        return shape_error(format!("vocab_size is {}, the least is {N_VOCAB_MIN}", shape.n_vocab));
    }
    let specs = shape.tensors();
    let writer = header(options, &specs).map_err(ConvertError::Write)?;
    let mut data = writer.start(Output::create(path)?).map_err(ConvertError::Write)?;
    let tables = Tables { gauss: GaussTable::new(), ternary: TernaryTable::new() };
    for (idx, spec) in specs.iter().enumerate() {
        let stream = Stream::new(options.seed, &spec.name);
        tables.write(spec, shape, stream, &mut data).map_err(ConvertError::Write)?;
        on_progress(Progress { tensor: &spec.name, n_done: idx + 1, n_total: specs.len() });
    }
    data.finish().map_err(ConvertError::Write)?.commit()
}

/// The keys of the published 2B-4T file in their order, and all tensors.
fn header(options: &SynthOptions, specs: &[TensorSpec]) -> Result<GgufWriter, GgufWriteError> {
    let mut writer = GgufWriter::new();
    writer.str("general.architecture", options.shape.architecture.name())?;
    writer.str("general.name", &options.name)?;
    options.shape.write_keys(&mut writer, true)?;
    writer.u32("general.file_type", FILE_TYPE_I2_S)?;
    let names_pre = options.shape.architecture == Architecture::Llama;
    Vocabulary::new(options.shape.n_vocab).write_keys(&mut writer, names_pre)?;
    writer.u32("general.quantization_version", 2)?;
    for spec in specs {
        writer.tensor(&spec.name, stored_as(spec.role), &spec.dims)?;
    }
    Ok(writer)
}

fn stored_as(role: TensorRole) -> TensorType {
    match role {
        TensorRole::Embedding | TensorRole::Head => TensorType::F16,
        TensorRole::Norm => TensorType::F32,
        TensorRole::Projection => TensorType::I2S,
    }
}

struct Tables {
    gauss: GaussTable,
    ternary: TernaryTable,
}

/// Spread of the embedding's elements times the root of the row length: that of the logits.
const LOGIT_SPREAD: f32 = 2.5;
/// Spread of what a projection into the residual stream adds to it.
const RESIDUAL_SPREAD: f32 = 0.25;
/// Spread of a norm's weights around 1.
const NORM_SPREAD: f32 = 0.1;
/// Bytes that are made at a time.
const CHUNK_BYTES: usize = 1 << 16;

impl Tables {
    fn write<W: std::io::Write>(
        &self,
        spec: &TensorSpec,
        shape: &ModelShape,
        mut stream: Stream,
        data: &mut TensorWriter<W>,
    ) -> Result<(), GgufWriteError> {
        let n_elements: u64 = spec.dims.iter().product();
        let mut chunk = vec![0; CHUNK_BYTES];
        match spec.role {
            TensorRole::Norm => for_each_chunk(n_elements * 4, &mut chunk, |chunk| {
                for element in chunk.as_chunks_mut().0 {
                    *element = (1.0 + NORM_SPREAD * self.gauss.next(&mut stream)).to_le_bytes();
                }
                data.append(chunk)
            }),
            TensorRole::Embedding | TensorRole::Head => {
                let halves = self.gauss.times(LOGIT_SPREAD / exact(shape.n_embd).sqrt());
                // Rows are whole blocks of 128, so that no element is left over.
                for_each_chunk(n_elements * 2, &mut chunk, |chunk| {
                    for four in chunk.as_chunks_mut::<8>().0 {
                        GaussTable::fill(&halves, four, &mut stream);
                    }
                    data.append(chunk)
                })
            }
            TensorRole::Projection => {
                for_each_chunk(n_elements / 4, &mut chunk, |chunk| {
                    self.ternary.fill(chunk, &mut stream);
                    data.append(chunk)
                })?;
                // About two thirds of the weights are not zero.
                let spread = (exact_u64(spec.dims[0]) * 2.0 / 3.0).sqrt();
                let is_residual = spec.name.contains("output") || spec.name.contains("down");
                let wanted = if is_residual { RESIDUAL_SPREAD } else { 1.0 };
                data.append(&i2_s_trailer(wanted / spread))
            }
        }
    }
}

fn for_each_chunk(
    n_bytes: u64,
    chunk: &mut [u8],
    mut f: impl FnMut(&mut [u8]) -> Result<(), GgufWriteError>,
) -> Result<(), GgufWriteError> {
    let mut left = n_bytes;
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
        f(&mut chunk[..len])?;
        left -= len as u64;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a spread need not be exact")]
fn exact(n: u32) -> f32 {
    n as f32
}

#[expect(clippy::cast_precision_loss, reason = "a spread need not be exact")]
fn exact_u64(n: u64) -> f32 {
    n as f32
}

#[cfg(test)]
mod tests;
