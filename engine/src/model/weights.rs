//! Where each tensor of a model is in its file, found by name and checked for type and shape.

use std::collections::HashSet;
use std::ops::Range;

use super::{DenseWeight, HyperParams};
use crate::dense::{DenseFormat, DenseMatrix};
use crate::gguf::{Gguf, TensorType, TensorView};
use crate::ternary::{TernaryFormat, TernaryMatrix};

/// Weights of one layer. Names are those of the file, without `blk.{i}.` and `.weight`.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the comments give the shapes, the names are the file's")]
pub struct LayerWeights {
    pub attn_norm: Vec<f32>,             // (n_embd)
    pub attn_q: TernaryWeight,           // (n_heads * head_dim, n_embd)
    pub attn_k: TernaryWeight,           // (n_kv_heads * head_dim, n_embd)
    pub attn_v: TernaryWeight,           // (n_kv_heads * head_dim, n_embd)
    pub attn_sub_norm: Option<Vec<f32>>, // (n_heads * head_dim)
    pub attn_output: TernaryWeight,      // (n_embd, n_heads * head_dim)
    pub ffn_norm: Vec<f32>,              // (n_embd)
    pub ffn_gate: TernaryWeight,         // (n_ff, n_embd)
    pub ffn_up: TernaryWeight,           // (n_ff, n_embd)
    pub ffn_sub_norm: Option<Vec<f32>>,  // (n_ff)
    pub ffn_down: TernaryWeight,         // (n_embd, n_ff)
}

/// A ternary matrix in the file.
#[derive(Clone, Debug)]
pub struct TernaryWeight {
    format: TernaryFormat,
    bytes: Range<usize>,
    n_rows: usize,
    n_cols: usize,
}

impl TernaryWeight {
    #[expect(clippy::expect_used, reason = "`Finder::ternary` built the same view before")]
    pub(super) fn view<'a>(&self, file: &'a [u8]) -> TernaryMatrix<'a> {
        TernaryMatrix::new(self.format, &file[self.bytes.clone()], self.n_rows, self.n_cols)
            .expect("checked at load")
    }
}

impl DenseWeight {
    #[expect(clippy::expect_used, reason = "`Finder::dense` built the same view before")]
    pub(super) fn view<'a>(&self, file: &'a [u8]) -> DenseMatrix<'a> {
        DenseMatrix::new(self.format, &file[self.bytes.clone()], self.n_rows, self.n_cols)
            .expect("checked at load")
    }
}

/// Why the tensors of a file are not those of its architecture.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A tensor of the architecture is not in the file.
    #[error("tensor `{name}` is missing")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A tensor has another shape than the hyper-parameters say.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// In the order of the file: columns first.
        found: Vec<u64>,
        /// In the same order.
        expected: Vec<u64>,
    },
    /// A tensor is stored in a type that cannot be used for it.
    #[error("tensor `{name}` has type {found}, expected {expected}")]
    Type {
        /// Its name.
        name: String,
        /// Type in the file.
        found: String,
        /// What can be used.
        expected: &'static str,
    },
    /// A norm weight is not a finite number.
    #[error("tensor `{name}` holds {found}, expected finite numbers")]
    NotFinite {
        /// Its name.
        name: String,
        /// The value.
        found: f32,
    },
    /// Its layout refuses it: columns that do not fill its blocks, or a scale that is not finite.
    #[error("tensor `{name}` cannot be used: {reason}")]
    Unusable {
        /// Its name.
        name: String,
        /// What its layout refuses.
        reason: String,
    },
    /// The file holds a tensor that this architecture has no place for; to ignore it could change the answer.
    #[error("tensor `{name}` has no place in architecture `{architecture}`")]
    Unexpected {
        /// Its name.
        name: String,
        /// The architecture.
        architecture: String,
    },
}

/// Finds tensors by name and remembers which ones were asked for.
pub(super) struct Finder<'a> {
    gguf: &'a Gguf,
    hparams: &'a HyperParams,
    used: HashSet<&'a str>,
}

const TERNARY_TYPES: &str = "I2_S, TQ2_0 or TQ1_0";
const DENSE_TYPES: &str = "F32, F16, BF16, Q8_0, Q6_K or Q4_0";

impl<'a> Finder<'a> {
    pub(super) fn new(gguf: &'a Gguf, hparams: &'a HyperParams) -> Self {
        Self { gguf, hparams, used: HashSet::new() }
    }

    pub(super) fn embedding(&mut self) -> Result<DenseWeight, WeightsError> {
        let shape = [self.hparams.n_embd, self.hparams.n_vocab];
        self.dense("token_embd.weight", shape)
    }

    /// The head: `output.weight`, or the embedding where there is none or the architecture ties them.
    pub(super) fn output(&mut self, token_embd: &DenseWeight) -> Result<DenseWeight, WeightsError> {
        let name = "output.weight";
        if self.gguf.tensor(name).is_none() {
            return Ok(token_embd.clone());
        }
        let own = self.dense(name, [self.hparams.n_embd, self.hparams.n_vocab])?;
        Ok(if self.hparams.architecture.is_always_tied() { token_embd.clone() } else { own })
    }

    pub(super) fn rope_freqs(&mut self) -> Result<Option<Vec<f32>>, WeightsError> {
        let name = "rope_freqs.weight";
        match self.gguf.tensor(name) {
            None => Ok(None),
            Some(_) => self.norm(name, self.hparams.head_dim / 2).map(Some),
        }
    }

    pub(super) fn layer(&mut self, layer: usize) -> Result<LayerWeights, WeightsError> {
        let HyperParams { n_embd, n_ff, architecture, .. } = *self.hparams;
        let (q_width, kv_width) = (self.hparams.q_width(), self.hparams.kv_width());
        let name = |tensor: &str| format!("blk.{layer}.{tensor}.weight");
        let has_sub_norms = architecture.has_sub_norms();
        Ok(LayerWeights {
            attn_norm: self.norm(&name("attn_norm"), n_embd)?,
            attn_q: self.ternary(&name("attn_q"), [n_embd, q_width])?,
            attn_k: self.ternary(&name("attn_k"), [n_embd, kv_width])?,
            attn_v: self.ternary(&name("attn_v"), [n_embd, kv_width])?,
            attn_sub_norm: has_sub_norms.then(|| self.norm(&name("attn_sub_norm"), q_width)).transpose()?,
            attn_output: self.ternary(&name("attn_output"), [q_width, n_embd])?,
            ffn_norm: self.norm(&name("ffn_norm"), n_embd)?,
            ffn_gate: self.ternary(&name("ffn_gate"), [n_embd, n_ff])?,
            ffn_up: self.ternary(&name("ffn_up"), [n_embd, n_ff])?,
            ffn_sub_norm: has_sub_norms.then(|| self.norm(&name("ffn_sub_norm"), n_ff)).transpose()?,
            ffn_down: self.ternary(&name("ffn_down"), [n_ff, n_embd])?,
        })
    }

    /// A vector of F32: norm weights and the like.
    pub(super) fn norm(&mut self, name: &str, len: usize) -> Result<Vec<f32>, WeightsError> {
        let tensor = self.take(name, &[len])?;
        if tensor.kind != TensorType::F32 {
            return Err(wrong_type(&tensor, "F32"));
        }
        let (values, _) = tensor.data.as_chunks::<4>();
        let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        match values.iter().find(|value| !value.is_finite()) {
            Some(found) => Err(WeightsError::NotFinite { name: name.to_owned(), found: *found }),
            None => Ok(values),
        }
    }

    /// Refuses what is left over: a bias or a scale that is ignored would change the answer silently.
    pub(super) fn finish(self) -> Result<(), WeightsError> {
        match self.gguf.tensors().find(|tensor| !self.used.contains(tensor.name)) {
            None => Ok(()),
            Some(tensor) => Err(WeightsError::Unexpected {
                name: tensor.name.to_owned(),
                architecture: self.hparams.architecture_name.clone(),
            }),
        }
    }

    fn ternary(&mut self, name: &str, [n_cols, n_rows]: [usize; 2]) -> Result<TernaryWeight, WeightsError> {
        let tensor = self.take(name, &[n_cols, n_rows])?;
        let format = match tensor.kind {
            TensorType::I2S => TernaryFormat::I2S,
            TensorType::Tq2_0 => TernaryFormat::Tq2_0,
            TensorType::Tq1_0 => TernaryFormat::Tq1_0,
            _ => return Err(wrong_type(&tensor, TERNARY_TYPES)),
        };
        TernaryMatrix::new(format, tensor.data, n_rows, n_cols)
            .map_err(|error| WeightsError::Unusable { name: name.to_owned(), reason: error.to_string() })?;
        Ok(TernaryWeight { format, bytes: range_in(self.gguf, &tensor), n_rows, n_cols })
    }

    fn dense(&mut self, name: &str, [n_cols, n_rows]: [usize; 2]) -> Result<DenseWeight, WeightsError> {
        let tensor = self.take(name, &[n_cols, n_rows])?;
        let format = match tensor.kind {
            TensorType::F32 => DenseFormat::F32,
            TensorType::F16 => DenseFormat::F16,
            TensorType::Bf16 => DenseFormat::Bf16,
            TensorType::Q8_0 => DenseFormat::Q8_0,
            TensorType::Q6K => DenseFormat::Q6K,
            TensorType::Q4_0 => DenseFormat::Q4_0,
            _ => return Err(wrong_type(&tensor, DENSE_TYPES)),
        };
        DenseMatrix::new(format, tensor.data, n_rows, n_cols)
            .map_err(|error| WeightsError::Unusable { name: name.to_owned(), reason: error.to_string() })?;
        Ok(DenseWeight { format, bytes: range_in(self.gguf, &tensor), n_rows, n_cols })
    }

    /// The tensor `name`, whose dimensions must be `dims` (columns first), not counting ones at the end.
    fn take(&mut self, name: &str, dims: &[usize]) -> Result<TensorView<'a>, WeightsError> {
        let tensor = self.gguf.tensor(name).ok_or_else(|| WeightsError::Missing { name: name.to_owned() })?;
        let expected: Vec<u64> = dims.iter().map(|dim| *dim as u64).collect();
        let n_used = tensor.dims.iter().rposition(|dim| *dim != 1).map_or(1, |last| last + 1).max(dims.len());
        if tensor.dims.get(..n_used) != Some(&expected[..]) {
            return Err(WeightsError::Shape { name: name.to_owned(), found: tensor.dims.to_vec(), expected });
        }
        self.used.insert(tensor.name);
        Ok(tensor)
    }
}

/// Where the bytes of a tensor are in its file.
fn range_in(gguf: &Gguf, tensor: &TensorView<'_>) -> Range<usize> {
    let start = tensor.data.as_ptr().addr() - gguf.mapping().as_ptr().addr();
    start..start + tensor.data.len()
}

fn wrong_type(tensor: &TensorView<'_>, expected: &'static str) -> WeightsError {
    WeightsError::Type { name: tensor.name.to_owned(), found: tensor.kind.to_string(), expected }
}
