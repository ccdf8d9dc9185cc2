//! The shape of a model to be made: its hyper-parameters as metadata keys, and the tensors that follow from them.
//!
//! What a file that exists has is read by [`crate::model`], not here.

use crate::gguf::{GgufWriteError, GgufWriter};
use crate::model::Architecture;

/// The hyper-parameters, named as in the rest of the engine.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// `general.architecture`
    pub architecture: Architecture,
    /// `{arch}.vocab_size`
    pub n_vocab: u32,
    /// `{arch}.context_length`
    pub n_ctx: u32,
    /// `{arch}.embedding_length`
    pub n_embd: u32,
    /// `{arch}.block_count`
    pub n_layers: u32,
    /// `{arch}.feed_forward_length`
    pub n_ff: u32,
    /// `{arch}.attention.head_count`
    pub n_heads: u32,
    /// `{arch}.attention.head_count_kv`
    pub n_kv_heads: u32,
    /// `{arch}.attention.key_length`, else `n_embd / n_heads`
    pub head_dim: u32,
    /// `{arch}.attention.layer_norm_rms_epsilon`
    pub rms_eps: f32,
    /// `{arch}.rope.freq_base`
    pub rope_base: f32,
    /// There is an `output.weight`; otherwise the embedding is the head.
    pub has_head: bool,
}

/// What a tensor is for, which decides how it may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorRole {
    /// `token_embd.weight`
    Embedding,
    /// A weight of an RMS norm: `F32`.
    Norm,
    /// A projection with ternary weights.
    Projection,
    /// `output.weight`
    Head,
}

/// A tensor that a model of a shape has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name in the file.
    pub name: String,
    /// The contiguous dimension first.
    pub dims: Vec<u64>,
    /// What it is for.
    pub role: TensorRole,
}

impl ModelShape {
    /// The shape of microsoft/bitnet-b1.58-2B-4T.
    #[must_use]
    pub fn bitnet_2b_4t() -> Self {
        Self {
            architecture: Architecture::BitNetB158,
            n_vocab: 128_256,
            n_ctx: 4096,
            n_embd: 2560,
            n_layers: 30,
            n_ff: 6912,
            n_heads: 20,
            n_kv_heads: 5,
            head_dim: 128,
            rms_eps: 1e-5,
            rope_base: 500_000.0,
            has_head: false,
        }
    }

    /// The smallest shape that has every part: for tests.
    #[must_use]
    pub fn tiny() -> Self {
        Self {
            architecture: Architecture::BitNetB158,
            n_vocab: 512,
            n_ctx: 256,
            n_embd: 256,
            n_layers: 2,
            n_ff: 512,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 64,
            rms_eps: 1e-5,
            rope_base: 10_000.0,
            has_head: false,
        }
    }

    /// The shape with that name on the command line.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "2b-4t" => Some(Self::bitnet_2b_4t()),
            "tiny" => Some(Self::tiny()),
            _ => None,
        }
    }

    /// Why no model can have this shape, if so.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let positive = [
            ("vocab_size", self.n_vocab),
            ("context_length", self.n_ctx),
            ("embedding_length", self.n_embd),
            ("block_count", self.n_layers),
            ("feed_forward_length", self.n_ff),
            ("attention.head_count", self.n_heads),
            ("attention.head_count_kv", self.n_kv_heads),
            ("head dimension", self.head_dim),
        ];
        if let Some((name, _)) = positive.into_iter().find(|&(_, value)| value == 0) {
            return Some(format!("{name} is 0"));
        }
        let [n_heads, n_kv_heads, head_dim] = [self.n_heads, self.n_kv_heads, self.head_dim];
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Some(format!("{n_heads} heads cannot share {n_kv_heads} key/value heads evenly"));
        }
        if head_dim % 2 != 0 {
            return Some(format!("the head dimension {head_dim} is odd"));
        }
        if n_heads.checked_mul(head_dim).is_none() {
            return Some(format!("{n_heads} heads of {head_dim} are too many"));
        }
        let is_positive = |value: f32| value.is_finite() && value > 0.0;
        if !is_positive(self.rms_eps) || !is_positive(self.rope_base) {
            let (eps, base) = (self.rms_eps, self.rope_base);
            return Some(format!("epsilon {eps} or RoPE base {base} is not a positive number"));
        }
        None
    }

    /// Every tensor of the model, in the order of the file.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let [n_embd, n_ff, n_vocab] = [self.n_embd, self.n_ff, self.n_vocab].map(u64::from);
        let q_dim = u64::from(self.n_heads) * u64::from(self.head_dim);
        let kv_dim = u64::from(self.n_kv_heads) * u64::from(self.head_dim);
        let mut specs = vec![spec("token_embd.weight", &[n_embd, n_vocab], TensorRole::Embedding)];
        for layer in 0..self.n_layers {
            let mut add = |name: &str, dims: &[u64]| {
                let role = if dims.len() == 1 { TensorRole::Norm } else { TensorRole::Projection };
                specs.push(spec(&format!("blk.{layer}.{name}.weight"), dims, role));
            };
            add("attn_norm", &[n_embd]);
            add("attn_q", &[n_embd, q_dim]);
            add("attn_k", &[n_embd, kv_dim]);
            add("attn_v", &[n_embd, kv_dim]);
            if self.architecture.has_sub_norms() {
                add("attn_sub_norm", &[q_dim]);
            }
            add("attn_output", &[q_dim, n_embd]);
            add("ffn_norm", &[n_embd]);
            add("ffn_gate", &[n_embd, n_ff]);
            add("ffn_up", &[n_embd, n_ff]);
            if self.architecture.has_sub_norms() {
                add("ffn_sub_norm", &[n_ff]);
            }
            add("ffn_down", &[n_ff, n_embd]);
        }
        specs.push(spec("output_norm.weight", &[n_embd], TensorRole::Norm));
        if self.has_head {
            specs.push(spec("output.weight", &[n_embd, n_vocab], TensorRole::Head));
        }
        specs
    }

    /// Writes the keys 2 to 9 and 11 to 12 of a published file's, in its order, with what stands between them.
    ///
    /// # Errors
    /// A key is there already.
    pub fn write_keys(&self, writer: &mut GgufWriter, has_bos: bool) -> Result<(), GgufWriteError> {
        let name = self.architecture.name();
        let key = |suffix: &str| format!("{name}.{suffix}");
        writer.u32(&key("vocab_size"), self.n_vocab)?;
        writer.u32(&key("context_length"), self.n_ctx)?;
        writer.u32(&key("embedding_length"), self.n_embd)?;
        writer.u32(&key("block_count"), self.n_layers)?;
        writer.u32(&key("feed_forward_length"), self.n_ff)?;
        writer.u32(&key("rope.dimension_count"), self.head_dim)?;
        writer.u32(&key("attention.head_count"), self.n_heads)?;
        writer.u32(&key("attention.head_count_kv"), self.n_kv_heads)?;
        writer.bool("tokenizer.ggml.add_bos_token", has_bos)?;
        writer.f32(&key("attention.layer_norm_rms_epsilon"), self.rms_eps)?;
        writer.f32(&key("rope.freq_base"), self.rope_base)?;
        if self.n_heads.checked_mul(self.head_dim) != Some(self.n_embd) {
            writer.u32(&key("attention.key_length"), self.head_dim)?;
            writer.u32(&key("attention.value_length"), self.head_dim)?;
        }
        Ok(())
    }
}

fn spec(name: &str, dims: &[u64], role: TensorRole) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dims: dims.to_vec(), role }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_2b_4t_shape_has_the_published_tensors() {
        let tensors = ModelShape::bitnet_2b_4t().tensors();
        assert_eq!(tensors.len(), 332);
        let count = |role| tensors.iter().filter(|tensor| tensor.role == role).count();
        assert_eq!(count(TensorRole::Norm), 121);
        assert_eq!(count(TensorRole::Projection), 210);
        let projections = tensors.iter().filter(|tensor| tensor.role == TensorRole::Projection);
        let weights: u64 = projections.map(|tensor| tensor.dims.iter().product::<u64>()).sum();
        assert_eq!(weights, 2_084_044_800);
    }

    #[test]
    fn impossible_shapes_are_named() {
        let with = |change: fn(&mut ModelShape)| {
            let mut shape = ModelShape::tiny();
            change(&mut shape);
            shape.problem().unwrap()
        };
        assert_eq!(ModelShape::tiny().problem(), None);
        assert_eq!(with(|shape| shape.n_heads = 0), "attention.head_count is 0");
        assert!(with(|shape| shape.n_kv_heads = 3).contains("evenly"));
        assert!(with(|shape| shape.head_dim = 63).contains("odd"));
        assert!(with(|shape| shape.rms_eps = f32::NAN).contains("not a positive number"));
    }
}
