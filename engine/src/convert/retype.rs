//! The same model with tensors stored in another way: ternary weights in another layout, embedding and head
//! smaller.
//!
//! Between ternary layouts codes are kept exactly. `I2_S` has one f32 scale a tensor, `TQ1_0` and `TQ2_0` one f16
//! scale per 256 weights: into those the scale is rounded, and out of those all blocks must have the same one.

use std::path::Path;

use half::f16;

use super::output::Output;
use super::{ConvertError, FILE_TYPE_I2_S, OnProgress, Progress, dense_format, dense_type};
use super::{ternary_format, ternary_type};
use crate::dense::{self, DenseError, DenseFormat, DenseMatrix};
use crate::gguf::{Gguf, GgufWriter, TensorType, TensorView, Value};
use crate::ternary::{TernaryError, TernaryFormat, TernaryMatrix, i2_s_trailer};

/// What to change; `None` leaves it.
#[derive(Clone, Copy, Debug, Default)]
pub struct RetypeOptions {
    /// How ternary weights are stored.
    pub ternary: Option<TernaryFormat>,
    /// How `token_embd.weight` is stored.
    pub embedding: Option<DenseFormat>,
    /// How `output.weight` is stored, if there is one.
    pub head: Option<DenseFormat>,
}

/// Why a tensor cannot be stored in another way.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum RetypeError {
    #[error("tensor `{name}` is stored as {kind}, which cannot be changed")]
    Type { name: String, kind: TensorType },
    #[error("tensor `{name}`")]
    Ternary {
        name: String,
        #[source]
        source: TernaryError,
    },
    #[error("tensor `{name}`")]
    Dense {
        name: String,
        #[source]
        source: DenseError,
    },
    #[error("tensor `{name}` has a weight that is none: {problem}")]
    Invalid { name: String, problem: String },
    #[error(
        "tensor `{name}` has blocks with the scales `{first}` and `{second}`: I2_S has one scale for a tensor"
    )]
    Scales { name: String, first: f32, second: f32 },
    #[error("tensor `{name}` has the scale `{scale}`, which half precision cannot hold")]
    ScaleRange { name: String, scale: f32 },
}

/// Writes `gguf` to `out`, with tensors stored as `options` says.
///
/// # Errors
/// A tensor cannot be stored that way, or the file cannot be written.
pub fn retype(
    gguf: &Gguf,
    out: &Path,
    options: RetypeOptions,
    on_progress: OnProgress<'_>,
) -> Result<(), ConvertError> {
    let mut writer = GgufWriter::new();
    for (key, value) in gguf.metadata().iter() {
        let value = match (key, options.ternary) {
            // The writer's own.
            ("general.alignment", _) => continue,
            ("general.file_type", Some(format)) => Value::U32(file_type(format)),
            _ => value,
        };
        writer.value(key, value).map_err(ConvertError::Write)?;
    }
    for tensor in gguf.tensors() {
        writer.tensor(tensor.name, new_type(&tensor, options), tensor.dims).map_err(ConvertError::Write)?;
    }
    let mut data = writer.start(Output::create(out)?).map_err(ConvertError::Write)?;
    let n_total = gguf.n_tensors();
    for (idx, tensor) in gguf.tensors().enumerate() {
        let kind = new_type(&tensor, options);
        if kind == tensor.kind {
            data.append(tensor.data).map_err(ConvertError::Write)?;
        } else {
            data.append(&retyped(&tensor, kind)?).map_err(ConvertError::Write)?;
        }
        on_progress(Progress { tensor: tensor.name, n_done: idx + 1, n_total });
    }
    data.finish().map_err(ConvertError::Write)?.commit()
}

fn file_type(format: TernaryFormat) -> u32 {
    match format {
        TernaryFormat::I2S => FILE_TYPE_I2_S,
        TernaryFormat::Tq1_0 => 36,
        TernaryFormat::Tq2_0 => 37,
    }
}

fn new_type(tensor: &TensorView<'_>, options: RetypeOptions) -> TensorType {
    let wanted = match tensor.name {
        "token_embd.weight" => options.embedding.map(dense_type),
        "output.weight" => options.head.map(dense_type),
        _ if tensor.kind.is_ternary() => options.ternary.map(ternary_type),
        _ => None,
    };
    wanted.unwrap_or(tensor.kind)
}

fn retyped(tensor: &TensorView<'_>, kind: TensorType) -> Result<Vec<u8>, RetypeError> {
    let unchangeable = || RetypeError::Type { name: tensor.name.to_owned(), kind: tensor.kind };
    let [n_rows, n_cols] =
        [tensor.n_rows(), tensor.n_cols()].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    match (ternary_format(tensor.kind), ternary_format(kind)) {
        (Some(from), Some(to)) => {
            let name = tensor.name.to_owned();
            let matrix = TernaryMatrix::new(from, tensor.data, n_rows, n_cols)
                .map_err(|source| RetypeError::Ternary { name, source })?;
            repacked(tensor.name, &matrix, to)
        }
        (None, None) => {
            let (Some(from), Some(to)) = (dense_format(tensor.kind), dense_format(kind)) else {
                return Err(unchangeable());
            };
            let error = |source| RetypeError::Dense { name: tensor.name.to_owned(), source };
            let matrix = DenseMatrix::new(from, tensor.data, n_rows, n_cols).map_err(error)?;
            let mut row = vec![0.0; n_cols];
            let mut bytes = Vec::new();
            for idx in 0..n_rows {
                matrix.dequantize_row(idx, &mut row);
                dense::quantize_row(to, &row, &mut bytes).map_err(error)?;
            }
            Ok(bytes)
        }
        _ => Err(unchangeable()),
    }
}

fn repacked(name: &str, matrix: &TernaryMatrix<'_>, to: TernaryFormat) -> Result<Vec<u8>, RetypeError> {
    if let Some(invalid) = matrix.first_invalid_weight() {
        return Err(RetypeError::Invalid { name: name.to_owned(), problem: invalid.to_string() });
    }
    let (n_rows, n_cols) = (matrix.n_rows(), matrix.n_cols());
    let unfit = || RetypeError::Ternary {
        name: name.to_owned(),
        source: TernaryError::Shape { format: to, n_rows, n_cols },
    };
    let row_bytes = to.row_bytes(n_cols).ok_or_else(unfit)?;
    let mut weights = vec![0; n_cols];
    let mut scales = vec![0.0; n_cols / matrix.format().block_cols()];
    let mut bytes = vec![0; n_rows * row_bytes];
    let mut only_scale = None;
    for (row, packed) in bytes.chunks_exact_mut(row_bytes).enumerate() {
        matrix.unpack_row(row, &mut weights, &mut scales);
        if to == TernaryFormat::I2S {
            for (block, &scale) in weights.chunks_exact(matrix.format().block_cols()).zip(&scales) {
                // The scale of a block of zeros says nothing.
                if block.iter().any(|&weight| weight != 0) && *only_scale.get_or_insert(scale) != scale {
                    let first = only_scale.unwrap_or(scale);
                    return Err(RetypeError::Scales { name: name.to_owned(), first, second: scale });
                }
            }
            to.pack_row(&weights, &[], packed);
        } else {
            let halves = block_scales(name, &scales, matrix.format(), n_cols / to.block_cols())?;
            to.pack_row(&weights, &halves, packed);
        }
    }
    if to == TernaryFormat::I2S {
        bytes.extend(i2_s_trailer(only_scale.unwrap_or(1.0)));
    }
    Ok(bytes)
}

/// The scales of the new blocks of 256 weights.
fn block_scales(
    name: &str,
    scales: &[f32],
    from: TernaryFormat,
    n_blocks: usize,
) -> Result<Vec<f16>, RetypeError> {
    let old_blocks_per_new = if from == TernaryFormat::I2S { 2 } else { 1 };
    let half = |block: usize| {
        let scale = scales[block * old_blocks_per_new];
        let half = f16::from_f32_const(scale);
        let is_lost = !half.is_finite() || (scale != 0.0 && !half.is_normal());
        if is_lost { Err(RetypeError::ScaleRange { name: name.to_owned(), scale }) } else { Ok(half) }
    };
    (0..n_blocks).map(half).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::convert::synth::{SynthOptions, synth};
    use crate::inspect::ModelShape;
    use crate::mapping::Mapping;

    fn open(path: &Path) -> Gguf {
        Gguf::parse(Arc::new(Mapping::open(path).unwrap())).unwrap()
    }

    #[test]
    fn there_and_back_keeps_codes_and_rounds_the_scale_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let options = SynthOptions { shape: ModelShape::tiny(), name: "t".to_owned(), seed: 3 };
        synth(&path("first"), &options, &mut |_| ()).unwrap();
        let first = open(&path("first"));
        for format in [TernaryFormat::Tq1_0, TernaryFormat::Tq2_0] {
            let there = RetypeOptions { ternary: Some(format), ..RetypeOptions::default() };
            retype(&first, &path("there"), there, &mut |_| ()).unwrap();
            let changed = open(&path("there"));
            assert_eq!(changed.metadata().u32("general.file_type").unwrap(), Some(file_type(format)));
            let back = RetypeOptions { ternary: Some(TernaryFormat::I2S), ..RetypeOptions::default() };
            retype(&changed, &path("back"), back, &mut |_| ()).unwrap();
            for (old, new) in first.tensors().zip(open(&path("back")).tensors()) {
                assert_eq!((old.name, old.kind), (new.name, new.kind));
                let n_codes = if old.kind == TensorType::I2S { old.data.len() - 32 } else { old.data.len() };
                assert_eq!(old.data[..n_codes], new.data[..n_codes], "{}", old.name);
                if old.kind == TensorType::I2S {
                    let scale = |view: &TensorView<'_>| {
                        f32::from_le_bytes(*view.data[n_codes..].first_chunk().unwrap())
                    };
                    assert_eq!(scale(&new), f16::from_f32(scale(&old)).to_f32());
                }
            }
        }
    }

    #[test]
    fn the_embedding_becomes_what_is_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let options = SynthOptions { shape: ModelShape::tiny(), name: "t".to_owned(), seed: 3 };
        synth(&path("first"), &options, &mut |_| ()).unwrap();
        let first = open(&path("first"));
        for format in [DenseFormat::Q8_0, DenseFormat::Q6K, DenseFormat::Q4_0, DenseFormat::Bf16] {
            let there = RetypeOptions { embedding: Some(format), ..RetypeOptions::default() };
            retype(&first, &path("there"), there, &mut |_| ()).unwrap();
            let changed = open(&path("there"));
            assert_eq!(changed.tensor("token_embd.weight").unwrap().kind, dense_type(format));
            assert_eq!(changed.tensor("blk.0.attn_q.weight").unwrap().kind, TensorType::I2S);
        }
    }
}
