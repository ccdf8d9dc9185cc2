//! Hyper-parameters of a model, from the metadata of its file.

use std::fmt;

use super::architecture::Architecture;
use crate::gguf::{Gguf, GgufError};

/// The most layers, heads or context a file may ask for: far above any real model, low enough that sums fit.
const N_LAYERS_MAX: u32 = 1024;
const WIDTH_MAX: u32 = 1 << 17;
const N_CTX_MAX: u32 = 1 << 20;

/// Sizes and constants of a model. The comment gives the metadata key after the architecture's name.
#[derive(Clone, Debug, PartialEq)]
pub struct HyperParams {
    /// Model family (`general.architecture`).
    pub architecture: Architecture,
    /// `general.architecture` as written.
    pub architecture_name: String,
    /// `general.name`, if there is one.
    pub name: Option<String>,
    /// `block_count`
    pub n_layers: usize,
    /// `embedding_length`
    pub n_embd: usize,
    /// `feed_forward_length`
    pub n_ff: usize,
    /// `attention.head_count`
    pub n_heads: usize,
    /// `attention.head_count_kv`
    pub n_kv_heads: usize,
    /// `attention.key_length`, else `rope.dimension_count`, else `n_embd / n_heads`
    pub head_dim: usize,
    /// Rows of the embedding.
    pub n_vocab: usize,
    /// `context_length`
    pub n_ctx: usize,
    /// `attention.layer_norm_rms_epsilon`
    pub rms_eps: f32,
    /// `rope.freq_base`
    pub rope_base: f32,
}

/// Why the metadata does not describe a model that can be run.
#[derive(Debug, thiserror::Error)]
pub enum HyperParamsError {
    /// `general.architecture` is none that a graph exists for.
    #[error("architecture `{found}` is not supported, expected one of {KnownNames}")]
    UnsupportedArchitecture {
        /// As in the file.
        found: String,
    },
    /// A key that every model of the architecture has is not there.
    #[error("metadata key `{key}` is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A value is out of its range.
    #[error("metadata key `{key}` is {found}, expected {expected}")]
    OutOfRange {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What it must be.
        expected: String,
    },
    /// A value has the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

struct KnownNames;

impl fmt::Display for KnownNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Architecture::ALL.map(|architecture| format!("`{architecture}`")).join(", "))
    }
}

impl HyperParams {
    /// Reads and checks the hyper-parameters.
    ///
    /// # Errors
    /// [`HyperParamsError`] names the key.
    pub fn read(gguf: &Gguf) -> Result<Self, HyperParamsError> {
        let metadata = gguf.metadata();
        let key = "general.architecture";
        let name = metadata.str(key)?.ok_or_else(|| HyperParamsError::MissingKey { key: key.into() })?;
        let architecture = Architecture::from_name(name).ok_or_else(|| {
            HyperParamsError::UnsupportedArchitecture { found: name.chars().take(64).collect() }
        })?;
        let keys = Keys { gguf, prefix: name };
        let n_embd = keys.count("embedding_length", WIDTH_MAX)?;
        let n_heads = keys.count("attention.head_count", WIDTH_MAX)?;
        let n_kv_heads = keys.optional_count("attention.head_count_kv", WIDTH_MAX)?.unwrap_or(n_heads);
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Err(keys.out_of_range(
                "attention.head_count_kv",
                n_kv_heads,
                format!("a divisor of {n_heads}"),
            ));
        }
        let n_rot = keys.optional_count("rope.dimension_count", WIDTH_MAX)?;
        let key_length = keys.optional_count("attention.key_length", WIDTH_MAX)?;
        let head_dim = key_length.or(n_rot).unwrap_or(n_embd / n_heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(keys.out_of_range("rope.dimension_count", head_dim, "a positive even number".into()));
        }
        if let Some(n_rot) = n_rot.filter(|n_rot| *n_rot != head_dim) {
            return Err(keys.out_of_range(
                "rope.dimension_count",
                n_rot,
                format!("the head size, {head_dim}"),
            ));
        }
        keys.refuse_rope_scaling()?;
        Ok(Self {
            architecture,
            architecture_name: name.to_owned(),
            name: metadata.str("general.name")?.map(str::to_owned),
            n_layers: keys.count("block_count", N_LAYERS_MAX)?,
            n_embd,
            n_ff: keys.count("feed_forward_length", WIDTH_MAX)?,
            n_heads,
            n_kv_heads,
            head_dim,
            n_vocab: keys.n_vocab()?,
            n_ctx: keys.count("context_length", N_CTX_MAX)?,
            rms_eps: keys.positive("attention.layer_norm_rms_epsilon", None)?,
            rope_base: keys.positive("rope.freq_base", Some(10_000.0))?,
        })
    }

    /// Width of the query projection.
    #[must_use]
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of the key and of the value projection.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

/// Typed access to `{architecture}.*`.
struct Keys<'a> {
    gguf: &'a Gguf,
    prefix: &'a str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn out_of_range(&self, key: &str, found: impl fmt::Display, expected: String) -> HyperParamsError {
        HyperParamsError::OutOfRange { key: self.full(key), found: found.to_string(), expected }
    }

    fn optional_count(&self, key: &str, max: u32) -> Result<Option<usize>, HyperParamsError> {
        match self.gguf.metadata().u32(&self.full(key))? {
            Some(n) if n == 0 || n > max => Err(self.out_of_range(key, n, format!("1 to {max}"))),
            found => Ok(found.map(|n| n as usize)),
        }
    }

    fn count(&self, key: &str, max: u32) -> Result<usize, HyperParamsError> {
        self.optional_count(key, max)?.ok_or_else(|| HyperParamsError::MissingKey { key: self.full(key) })
    }

    fn positive(&self, key: &str, default: Option<f32>) -> Result<f32, HyperParamsError> {
        let value = self.gguf.metadata().f32(&self.full(key))?.or(default);
        let value = value.ok_or_else(|| HyperParamsError::MissingKey { key: self.full(key) })?;
        if !value.is_finite() || value <= 0.0 {
            return Err(self.out_of_range(key, value, "a positive finite number".into()));
        }
        Ok(value)
    }

    /// The embedding says how many rows it has; `vocab_size` is optional and must not lie.
    fn n_vocab(&self) -> Result<usize, HyperParamsError> {
        let rows = self.gguf.tensor("token_embd.weight").and_then(|t| t.dims.get(1).copied()).unwrap_or(0);
        let stated = self.optional_count("vocab_size", u32::MAX)?;
        let rows = usize::try_from(rows).unwrap_or(usize::MAX);
        match stated {
            Some(stated) if rows != 0 && stated != rows => Err(self.out_of_range(
                "vocab_size",
                stated,
                format!("{rows}, the rows of `token_embd.weight`"),
            )),
            _ => Ok(rows.max(stated.unwrap_or(0))),
        }
    }

    fn refuse_rope_scaling(&self) -> Result<(), HyperParamsError> {
        let key = "rope.scaling.type";
        match self.gguf.metadata().str(&self.full(key))? {
            None | Some("none") => Ok(()),
            Some(other) => Err(self.out_of_range(key, format!("`{other}`"), "`none` or no key".into())),
        }
    }
}
