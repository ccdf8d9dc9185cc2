//! One tensor of a checkpoint to the bytes of one tensor of a GGUF file.

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::checkpoint::{Checkpoint, source_names};
use super::config::{Config, WeightScale};
use super::{ConvertError, HuggingFaceError, HuggingFaceOptions};
use crate::convert::output::Output;
use crate::dense::{self, DenseError, DenseFormat};
use crate::gguf::TensorWriter;
use crate::inspect::{TensorRole, TensorSpec};
use crate::model::Architecture;
use crate::ternary::{TernaryFormat, i2_s_trailer};

/// Why a tensor cannot be converted.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum TensorError {
    #[error("tensor `{name}` has shape {found:?}: expected {expected:?}")]
    Shape { name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor `{name}` has elements of type {found:?}: expected {expected}")]
    Dtype { name: String, found: Dtype, expected: &'static str },
    #[error("tensor `{name}` has the value `{value}` in row {row}")]
    NotFinite { name: String, row: usize, value: f32 },
    #[error("tensor `{name}` has the code 3 in row {row}, column {col}")]
    Code { name: String, row: usize, col: usize },
    #[error("tensor `{name}` has the value `{value}` beside a `weight_scale`: expected -1, 0 or 1")]
    NotTernary { name: String, value: f32 },
    #[error("tensor `{name}` has packed weights, but no `weight_scale`")]
    NoScale { name: String },
    #[error("tensor `{name}` has the scale `{scale}`: expected a positive number")]
    Scale { name: String, scale: f32 },
    #[error("tensor `{name}`")]
    Dense {
        name: String,
        #[source]
        source: DenseError,
    },
}

/// The least mean that a scale is made of, as in training.
const MEAN_MIN: f32 = 1e-5;

/// Appends the bytes of `spec`.
pub(super) fn write(
    checkpoint: &Checkpoint<'_>,
    spec: &TensorSpec,
    config: &Config,
    options: &HuggingFaceOptions,
    data: &mut TensorWriter<Output>,
) -> Result<(), ConvertError> {
    let names = source_names(&spec.name);
    let tensor = checkpoint.get(&names).map_err(HuggingFaceError::Checkpoint)?;
    let name = names.first().map_or("", String::as_str);
    let dims: Vec<usize> =
        spec.dims.iter().rev().map(|&dim| usize::try_from(dim).unwrap_or(usize::MAX)).collect();
    let bytes = match spec.role {
        TensorRole::Projection => {
            let source = Source { name, tensor, n_rows: dims[0], n_cols: dims[1] };
            let scale = checkpoint.scale_of(&names).map(|scale| scalar(name, scale)).transpose();
            scale.and_then(|scale| {
                let scale = scale.map(|scale| match config.scale {
                    WeightScale::Factor => scale,
                    WeightScale::Divisor => 1.0 / scale,
                });
                source.ternary(scale, row_order(&spec.name, config))
            })
        }
        TensorRole::Norm => dense(name, tensor, &dims, DenseFormat::F32),
        TensorRole::Embedding | TensorRole::Head => dense(name, tensor, &dims, options.embedding),
    };
    data.append(&bytes.map_err(HuggingFaceError::Tensor)?).map_err(ConvertError::Write)
}

fn dense(
    name: &str,
    tensor: &TensorView<'_>,
    dims: &[usize],
    format: DenseFormat,
) -> Result<Vec<u8>, TensorError> {
    check_shape(name, tensor, dims)?;
    let n_cols = dims.last().copied().unwrap_or(1);
    let n_rows = dims[..dims.len() - 1].iter().product();
    let mut row = vec![0.0; n_cols];
    let mut bytes = Vec::new();
    for idx in 0..n_rows {
        read_row(name, tensor, idx, &mut row)?;
        dense::quantize_row(format, &row, &mut bytes)
            .map_err(|source| TensorError::Dense { name: name.to_owned(), source })?;
    }
    Ok(bytes)
}

/// Which row of the checkpoint goes where. llama.cpp's `llama` graph turns neighbouring elements of a head of Q
/// and K, the checkpoint's graph turns elements half a head apart.
#[derive(Clone, Copy, Debug)]
enum RowOrder {
    Same,
    Interleaved { head_dim: usize },
}

fn row_order(name: &str, config: &Config) -> RowOrder {
    let is_turned = name.ends_with("attn_q.weight") || name.ends_with("attn_k.weight");
    if is_turned && config.shape.architecture == Architecture::Llama {
        RowOrder::Interleaved { head_dim: config.shape.head_dim as usize }
    } else {
        RowOrder::Same
    }
}

impl RowOrder {
    fn source_of(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Interleaved { head_dim } => {
                let (head, at) = (row / head_dim, row % head_dim);
                head * head_dim + at % 2 * (head_dim / 2) + at / 2
            }
        }
    }
}

/// A projection in the checkpoint.
struct Source<'a> {
    name: &'a str,
    tensor: &'a TensorView<'a>,
    n_rows: usize,
    n_cols: usize,
}

impl Source<'_> {
    /// The bytes of the `I2_S` tensor.
    fn ternary(&self, scale: Option<f32>, order: RowOrder) -> Result<Vec<u8>, TensorError> {
        let name = || self.name.to_owned();
        let is_packed = self.tensor.dtype() == Dtype::U8;
        let packed_rows = self.n_rows.div_ceil(4);
        let dims = [if is_packed { packed_rows } else { self.n_rows }, self.n_cols];
        check_shape(self.name, self.tensor, &dims)?;
        let inverse = match scale {
            None if is_packed => return Err(TensorError::NoScale { name: name() }),
            None => 1.0 / self.mean()?.max(MEAN_MIN),
            Some(_) => 1.0,
        };
        let is_ternary_already = scale.is_some();
        let scale = scale.unwrap_or(1.0 / inverse);
        if !(scale.is_finite() && scale > 0.0) {
            return Err(TensorError::Scale { name: name(), scale });
        }
        let row_bytes = self.n_cols / 4;
        let mut bytes = vec![0; self.n_rows * row_bytes];
        let mut codes = vec![0; self.n_cols];
        let mut row = vec![0.0; self.n_cols];
        for (idx, packed) in bytes.chunks_exact_mut(row_bytes).enumerate() {
            let source_row = order.source_of(idx);
            if is_packed {
                self.unpack_row(source_row, packed_rows, &mut codes)?;
            } else {
                read_row(self.name, self.tensor, source_row, &mut row)?;
                for (code, &value) in codes.iter_mut().zip(&row) {
                    *code = ternary_code(value * inverse);
                    if is_ternary_already && f32::from(*code) != value {
                        return Err(TensorError::NotTernary { name: name(), value });
                    }
                }
            }
            TernaryFormat::I2S.pack_row(&codes, &[], packed);
        }
        bytes.extend(i2_s_trailer(scale));
        Ok(bytes)
    }

    /// Mean of the absolute values, correctly rounded.
    fn mean(&self) -> Result<f32, TensorError> {
        let mut row = vec![0.0; self.n_cols];
        let mut sum = 0.0_f64;
        for idx in 0..self.n_rows {
            read_row(self.name, self.tensor, idx, &mut row)?;
            sum += row.iter().map(|value| f64::from(value.abs())).sum::<f64>();
        }
        #[expect(clippy::cast_precision_loss, reason = "fewer than 2^53 elements fit into memory")]
        let n_elements = (self.n_rows * self.n_cols) as f64;
        #[expect(clippy::cast_possible_truncation, reason = "this is the rounding")]
        Ok((sum / n_elements) as f32)
    }

    /// Four rows, a quarter of the matrix apart, share a row of bytes; the first has the lowest bits.
    fn unpack_row(&self, row: usize, packed_rows: usize, codes: &mut [i8]) -> Result<(), TensorError> {
        let start = row % packed_rows * self.n_cols;
        let shift = row / packed_rows * 2;
        let bytes = &self.tensor.data()[start..start + self.n_cols];
        for (col, (code, byte)) in codes.iter_mut().zip(bytes).enumerate() {
            let stored = byte >> shift & 3;
            if stored == 3 {
                return Err(TensorError::Code { name: self.name.to_owned(), row, col });
            }
            *code = stored.cast_signed() - 1;
        }
        Ok(())
    }
}

/// Rounds, halves to even, and clamps to -1, 0, 1.
fn ternary_code(scaled: f32) -> i8 {
    // From a half to a half: `round` of 0.5 is 0, of anything above is 1.
    if scaled > 0.5 {
        1
    } else if scaled < -0.5 {
        -1
    } else {
        0
    }
}

fn check_shape(name: &str, tensor: &TensorView<'_>, expected: &[usize]) -> Result<(), TensorError> {
    if tensor.shape() == expected {
        return Ok(());
    }
    let (name, found) = (name.to_owned(), tensor.shape().to_vec());
    Err(TensorError::Shape { name, found, expected: expected.to_vec() })
}

/// Reads a row of floats of any width; the tensor has rows of `row.len()` elements.
fn read_row(name: &str, tensor: &TensorView<'_>, idx: usize, row: &mut [f32]) -> Result<(), TensorError> {
    let element_bytes = match tensor.dtype() {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
        found => {
            let expected = "F32, F16 or BF16";
            return Err(TensorError::Dtype { name: name.to_owned(), found, expected });
        }
    };
    let row_bytes = row.len() * element_bytes;
    let bytes = &tensor.data()[idx * row_bytes..(idx + 1) * row_bytes];
    for (value, bytes) in row.iter_mut().zip(bytes.chunks_exact(element_bytes)) {
        *value = match *bytes {
            [a, b] if tensor.dtype() == Dtype::F16 => f16::from_le_bytes([a, b]).to_f32(),
            [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            _ => 0.0, // Not reached: chunks have 2 or 4 bytes.
        };
    }
    match row.iter().find(|value| !value.is_finite()) {
        Some(&value) => Err(TensorError::NotFinite { name: name.to_owned(), row: idx, value }),
        None => Ok(()),
    }
}

fn scalar(name: &str, tensor: &TensorView<'_>) -> Result<f32, TensorError> {
    if tensor.shape().iter().product::<usize>() != 1 {
        let name = format!("{name}_scale");
        return Err(TensorError::Shape { name, found: tensor.shape().to_vec(), expected: vec![1] });
    }
    let mut value = [0.0];
    read_row(name, tensor, 0, &mut value)?;
    Ok(value[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_halves_to_even_and_clamp() {
        for (scaled, code) in [
            (0.0, 0),
            (0.5, 0),
            (-0.5, 0),
            (0.500_000_06, 1),
            (-0.500_000_06, -1),
            (1.5, 1),
            (-7.0, -1),
            (0.499_999_97, 0),
        ] {
            assert_eq!(ternary_code(scaled), code, "{scaled}");
            assert_eq!(f32::from(code), scaled.round_ties_even().clamp(-1.0, 1.0), "{scaled}");
        }
    }

    #[test]
    fn interleaving_pairs_elements_half_a_head_apart() {
        let order = RowOrder::Interleaved { head_dim: 6 };
        let rows: Vec<usize> = (0..12).map(|row| order.source_of(row)).collect();
        assert_eq!(rows, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }
}
