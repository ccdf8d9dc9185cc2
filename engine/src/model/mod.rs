//! A model ready to run: hyper-parameters and weights, borrowed from the mapped file.
//!
//! Norm weights are copied out (they are small and may be unaligned); every matrix stays where it is in the
//! file and is looked up as a slice when it is used, so that all workers read the same pages.

mod architecture; // Which graph.
mod hparams;
mod weights;

use std::ops::Range;
use std::sync::Arc;

pub use architecture::Architecture;
pub use hparams::{HyperParams, HyperParamsError};
pub use weights::{LayerWeights, TernaryWeight, WeightsError};

use crate::dense::{DenseFormat, DenseMatrix};
use crate::gguf::{Gguf, GgufError};
use crate::ternary::TernaryMatrix;

/// Why a file that is valid GGUF cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The metadata is not that of a model we know.
    #[error(transparent)]
    HyperParams(#[from] HyperParamsError),
    /// A tensor is missing or of the wrong type or shape.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A metadata value has the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

/// Hyper-parameters and weights.
#[derive(Debug)]
pub struct Model {
    gguf: Arc<Gguf>,
    hparams: HyperParams,
    token_embd: DenseWeight,
    output: DenseWeight,
    output_norm: Vec<f32>,        // (n_embd)
    rope_freqs: Option<Vec<f32>>, // (head_dim / 2)
    layers: Vec<LayerWeights>,
}

/// A dense matrix in the file: the embedding or the output head.
#[derive(Clone, Debug)]
pub(crate) struct DenseWeight {
    format: DenseFormat,
    bytes: Range<usize>,
    n_rows: usize,
    n_cols: usize,
}

impl Model {
    /// Finds every tensor of the architecture in `gguf` and checks its type and shape.
    ///
    /// # Errors
    /// [`ModelError`] names the first key or tensor that is missing, unsupported or of another shape.
    pub fn load(gguf: Arc<Gguf>) -> Result<Self, ModelError> {
        let hparams = HyperParams::read(&gguf)?;
        let mut found = weights::Finder::new(&gguf, &hparams);
        let token_embd = found.embedding()?;
        let output = found.output(&token_embd)?;
        let output_norm = found.norm("output_norm.weight", hparams.n_embd)?;
        let rope_freqs = found.rope_freqs()?;
        let layers = (0..hparams.n_layers).map(|layer| found.layer(layer)).collect::<Result<_, _>>()?;
        found.finish()?;
        Ok(Self { gguf, hparams, token_embd, output, output_norm, rope_freqs, layers })
    }

    /// Hyper-parameters.
    #[must_use]
    pub fn hparams(&self) -> &HyperParams {
        &self.hparams
    }

    /// The file the weights are in.
    #[must_use]
    pub fn gguf(&self) -> &Arc<Gguf> {
        &self.gguf
    }

    /// Weights of each layer, first layer first.
    #[must_use]
    pub fn layers(&self) -> &[LayerWeights] {
        &self.layers
    }

    /// Token embedding, (n_vocab, n_embd).
    #[must_use]
    pub fn token_embd(&self) -> DenseMatrix<'_> {
        self.dense(&self.token_embd)
    }

    /// Output head, (n_vocab, n_embd); the embedding itself where they are tied.
    #[must_use]
    pub fn output(&self) -> DenseMatrix<'_> {
        self.dense(&self.output)
    }

    /// Weight of the last RMSNorm, (n_embd).
    #[must_use]
    pub fn output_norm(&self) -> &[f32] {
        &self.output_norm
    }

    /// Divisors of the rotation frequencies, (head_dim / 2), if the file has them.
    #[must_use]
    pub fn rope_freqs(&self) -> Option<&[f32]> {
        self.rope_freqs.as_deref()
    }

    /// A ternary matrix of this model.
    #[must_use]
    pub fn ternary(&self, weight: &TernaryWeight) -> TernaryMatrix<'_> {
        weight.view(self.gguf.mapping())
    }

    /// All ternary matrices.
    pub fn ternary_matrices(&self) -> impl Iterator<Item = TernaryMatrix<'_>> {
        let weights = self.layers().iter().flat_map(|layer| {
            let LayerWeights { attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down, .. } = layer;
            [attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down]
        });
        weights.map(|weight| self.ternary(weight))
    }

    /// How many parameters the tensors of the file hold.
    #[must_use]
    pub fn n_params(&self) -> u64 {
        self.gguf.tensors().map(|tensor| tensor.dims.iter().product::<u64>()).sum()
    }

    fn dense(&self, weight: &DenseWeight) -> DenseMatrix<'_> {
        weight.view(self.gguf.mapping())
    }
}
