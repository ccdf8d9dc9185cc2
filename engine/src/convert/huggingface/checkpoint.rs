//! The safetensors files of a checkpoint, one or many, as one list of tensors.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{SafeTensorError, TensorView};
use serde::Deserialize;

use super::config::Config;
use super::{HuggingFaceError, read_json};
use crate::inspect::TensorSpec;
use crate::mapping::{Mapping, MappingError};

/// Why the files are no checkpoint.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum CheckpointError {
    #[error("cannot be mapped")]
    Map(#[source] MappingError),
    #[error("`{}` is not a safetensors file", path.display())]
    Format {
        path: PathBuf,
        #[source]
        source: SafeTensorError,
    },
    #[error("the index names `{name}`, which is not the plain name of a file")]
    FileName { name: String },
    #[error("tensor `{name}` is missing")]
    Missing { name: String },
    #[error("tensor `{name}` is in two files")]
    Twice { name: String },
    #[error("tensor `{name}` is not used by the graph, so that the model would not be the same without it")]
    Unused { name: String },
}

/// The mapped files.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<(PathBuf, Mapping)>,
}

#[derive(Debug, Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Shards {
    /// Maps `model.safetensors`, or the files that `model.safetensors.index.json` names.
    pub(super) fn open(directory: &Path) -> Result<Self, HuggingFaceError> {
        let index = directory.join("model.safetensors.index.json");
        let names: BTreeSet<String> = if index.exists() {
            read_json::<Index>(index)?.weight_map.into_values().collect()
        } else {
            BTreeSet::from(["model.safetensors".to_owned()])
        };
        let open = |name: String| {
            if Path::new(&name).file_name() != Some(name.as_ref()) {
                return Err(CheckpointError::FileName { name });
            }
            let path = directory.join(name);
            let mapping = Mapping::open(&path).map_err(CheckpointError::Map)?;
            Ok((path, mapping))
        };
        let files = names.into_iter().map(open).collect::<Result<_, _>>();
        Ok(Self { files: files.map_err(HuggingFaceError::Checkpoint)? })
    }
}

/// All tensors, by name.
#[derive(Debug)]
pub(super) struct Checkpoint<'a> {
    tensors: HashMap<String, TensorView<'a>>,
}

impl<'a> Checkpoint<'a> {
    pub(super) fn new(shards: &'a Shards) -> Result<Self, CheckpointError> {
        let mut tensors = HashMap::new();
        for (path, mapping) in &shards.files {
            let file = SafeTensors::deserialize(mapping)
                .map_err(|source| CheckpointError::Format { path: path.clone(), source })?;
            for (name, tensor) in file.tensors() {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(CheckpointError::Twice { name });
                }
            }
        }
        Ok(Self { tensors })
    }

    /// The tensor that stands under one of the names.
    pub(super) fn get(&self, names: &[String]) -> Result<&TensorView<'a>, CheckpointError> {
        names
            .iter()
            .find_map(|name| self.tensors.get(name))
            .ok_or_else(|| CheckpointError::Missing { name: names.first().cloned().unwrap_or_default() })
    }

    /// The scale of a packed weight.
    pub(super) fn scale_of(&self, names: &[String]) -> Option<&TensorView<'a>> {
        names.iter().find_map(|name| self.tensors.get(&format!("{name}_scale")))
    }

    /// Refuses tensors that the graph would leave out.
    pub(super) fn check_all_used(
        &self,
        specs: &[TensorSpec],
        config: &Config,
    ) -> Result<(), CheckpointError> {
        let used: BTreeSet<String> = specs.iter().flat_map(|spec| source_names(&spec.name)).collect();
        let is_used = |name: &str| {
            used.contains(name)
                || name.strip_suffix("_scale").is_some_and(|weight| used.contains(weight))
                // Kept by some savers although it is the embedding, or follows from the configuration.
                || (name == "lm_head.weight" && !config.shape.has_head)
                || name.ends_with("rotary_emb.inv_freq")
        };
        let mut unused: Vec<&String> = self.tensors.keys().filter(|name| !is_used(name)).collect();
        unused.sort();
        match unused.first() {
            Some(&name) => Err(CheckpointError::Unused { name: name.clone() }),
            None => Ok(()),
        }
    }
}

/// What a tensor of the GGUF file is called in checkpoints.
pub(super) fn source_names(name: &str) -> Vec<String> {
    let all = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    match name {
        "token_embd.weight" => return all(&["model.embed_tokens.weight"]),
        "output_norm.weight" => return all(&["model.norm.weight"]),
        "output.weight" => return all(&["lm_head.weight"]),
        _ => {}
    }
    let Some((layer, part)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
        return Vec::new();
    };
    // The second names are those of 1bitLLM.
    let parts: &[&str] = match part.strip_suffix(".weight").unwrap_or(part) {
        "attn_norm" => &["input_layernorm"],
        "attn_q" => &["self_attn.q_proj"],
        "attn_k" => &["self_attn.k_proj"],
        "attn_v" => &["self_attn.v_proj"],
        "attn_sub_norm" => &["self_attn.attn_sub_norm", "self_attn.inner_attn_ln"],
        "attn_output" => &["self_attn.o_proj"],
        "ffn_norm" => &["post_attention_layernorm"],
        "ffn_gate" => &["mlp.gate_proj"],
        "ffn_up" => &["mlp.up_proj"],
        "ffn_sub_norm" => &["mlp.ffn_sub_norm", "mlp.ffn_layernorm"],
        "ffn_down" => &["mlp.down_proj"],
        _ => &[],
    };
    parts.iter().map(|part| format!("model.layers.{layer}.{part}.weight")).collect()
}
