//! `config.json`: which graph, which shape, and how the weights are to be read.

use std::path::Path;

use serde::Deserialize;

use super::{HuggingFaceError, read_json};
use crate::inspect::ModelShape;
use crate::model::Architecture;

/// Why a configuration cannot be converted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum ConfigError {
    #[error("`model_type` is `{found}`: expected `bitnet`, or `llama` with a bitnet `quantization_config`")]
    ModelType { found: String },
    #[error("`hidden_act` is `{found}`: expected {expected}")]
    Activation { found: String, expected: &'static str },
    #[error("`{key}` is set, which no supported graph has")]
    Unsupported { key: &'static str },
    #[error("`tie_word_embeddings` is not true, but the graphs of BitNet take the embedding as head")]
    UntiedHead,
    #[error("the shape is impossible: {problem}")]
    Shape { problem: String },
}

/// What is needed of a configuration.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) shape: ModelShape,
    pub(super) scale: WeightScale,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) pad: Option<u32>,
}

/// What `weight_scale` of a packed checkpoint means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WeightScale {
    /// The outputs are multiplied with it (`autobitlinear`).
    Factor,
    /// The outputs are divided by it (`bitlinear`, the default).
    Divisor,
}

#[derive(Debug, Deserialize)]
struct Raw {
    model_type: String,
    #[serde(default)]
    architectures: Vec<String>,
    hidden_act: String,
    hidden_size: u32,
    intermediate_size: u32,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    head_dim: Option<u32>,
    max_position_embeddings: u32,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    rope_scaling: Option<RopeRaw>,
    rope_parameters: Option<RopeRaw>,
    vocab_size: u32,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    bos_token_id: Option<OneOrMany>,
    eos_token_id: Option<OneOrMany>,
    pad_token_id: Option<OneOrMany>,
    quantization_config: Option<QuantizationRaw>,
}

#[derive(Debug, Deserialize)]
struct RopeRaw {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct QuantizationRaw {
    quant_method: String,
    linear_class: Option<String>,
    use_rms_norm: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn first(&self) -> Option<u32> {
        match self {
            Self::One(id) => Some(*id),
            Self::Many(ids) => ids.first().copied(),
        }
    }
}

impl Config {
    pub(super) fn read(directory: &Path) -> Result<Self, HuggingFaceError> {
        let raw: Raw = read_json(directory.join("config.json"))?;
        Self::from_raw(&raw).map_err(HuggingFaceError::Config)
    }

    fn from_raw(raw: &Raw) -> Result<Self, ConfigError> {
        let architecture = architecture(raw)?;
        let rope = raw.rope_scaling.as_ref().or(raw.rope_parameters.as_ref());
        let rope_type = rope.and_then(|rope| rope.rope_type.as_deref());
        let quantization = raw.quantization_config.as_ref();
        for (is_set, key) in [
            (raw.attention_bias, "attention_bias"),
            (raw.mlp_bias, "mlp_bias"),
            (rope_type.is_some_and(|kind| kind != "default"), "rope_scaling"),
            (quantization.is_some_and(|raw| raw.use_rms_norm), "quantization_config.use_rms_norm"),
        ] {
            if is_set {
                return Err(ConfigError::Unsupported { key });
            }
        }
        if !raw.tie_word_embeddings && architecture != Architecture::Llama {
            return Err(ConfigError::UntiedHead);
        }
        let rope_base = raw.rope_theta.or_else(|| raw.rope_parameters.as_ref()?.rope_theta);
        let shape = ModelShape {
            architecture,
            n_vocab: raw.vocab_size,
            n_ctx: raw.max_position_embeddings,
            n_embd: raw.hidden_size,
            n_layers: raw.num_hidden_layers,
            n_ff: raw.intermediate_size,
            n_heads: raw.num_attention_heads,
            n_kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim: raw
                .head_dim
                .or_else(|| raw.hidden_size.checked_div(raw.num_attention_heads))
                .unwrap_or(0),
            rms_eps: raw.rms_norm_eps,
            rope_base: rope_base.unwrap_or(10_000.0),
            has_head: !raw.tie_word_embeddings,
        };
        if let Some(problem) = shape.problem() {
            return Err(ConfigError::Shape { problem });
        }
        let is_auto = quantization.and_then(|raw| raw.linear_class.as_deref()) == Some("autobitlinear");
        Ok(Self {
            shape,
            scale: if is_auto { WeightScale::Factor } else { WeightScale::Divisor },
            bos: raw.bos_token_id.as_ref().and_then(OneOrMany::first),
            eos: raw.eos_token_id.as_ref().and_then(OneOrMany::first),
            pad: raw.pad_token_id.as_ref().and_then(OneOrMany::first),
        })
    }
}

fn architecture(raw: &Raw) -> Result<Architecture, ConfigError> {
    let is_bitnet = raw.quantization_config.as_ref().is_some_and(|raw| raw.quant_method == "bitnet");
    // The checkpoints of 1bitLLM call themselves `llama`; their own code, under this name, has the graph of BitNet.
    let is_1bit_llm = raw.architectures.iter().any(|name| name == "BitnetForCausalLM");
    let unexpected = |expected| Err(ConfigError::Activation { found: raw.hidden_act.clone(), expected });
    match (raw.model_type.as_str(), raw.hidden_act.as_str()) {
        ("bitnet", "relu2") => Ok(Architecture::BitNetB158),
        ("bitnet", "silu") => Ok(Architecture::BitNet),
        ("bitnet", _) => unexpected("`relu2` or `silu`"),
        ("llama", "silu") if is_1bit_llm => Ok(Architecture::BitNet),
        ("llama", "silu") if is_bitnet => Ok(Architecture::Llama),
        ("llama", _) if is_bitnet => unexpected("`silu`"),
        (found, _) => Err(ConfigError::ModelType { found: found.to_owned() }),
    }
}
