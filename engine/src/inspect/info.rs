//! A summary of a model file: metadata, tensors, sizes, and whether the engine can run it and if not, why.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::gguf::{Gguf, TensorType, Value};
use crate::tokenizer::Tokenizer;

/// The summary. Serialised, it is what `model info --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct ModelInfo {
    /// Version of the GGUF format.
    pub version: u32,
    /// Bytes of the file.
    pub file_bytes: usize,
    /// `general.alignment`, or what it is if it is missing.
    pub alignment: u64,
    /// `general.architecture`
    pub architecture: Option<String>,
    /// `general.name`
    pub name: Option<String>,
    /// Elements of all tensors.
    pub n_parameters: u64,
    /// Elements of ternary tensors.
    pub n_ternary_weights: u64,
    /// What kind of vocabulary it has, in words; `None` if it cannot be used.
    pub vocabulary: Option<String>,
    /// The engine can run it.
    pub is_supported: bool,
    /// Why not.
    pub problem: Option<String>,
    /// How much is stored in which way.
    pub types: Vec<TypeInfo>,
    /// All keys, in file order.
    pub metadata: Vec<MetadataInfo>,
    /// All tensors, in file order.
    pub tensors: Vec<TensorInfo>,
}

/// All tensors of one type.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TypeInfo {
    /// The type's name.
    #[serde(rename = "type")]
    pub kind: String,
    /// How many.
    pub n_tensors: usize,
    /// Their elements.
    pub n_elements: u64,
    /// Their bytes.
    pub n_bytes: u64,
}

/// A metadata key.
#[derive(Clone, Debug, Serialize)]
pub struct MetadataInfo {
    /// The key.
    pub key: String,
    /// The type: `u32`, `array of 3 string`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The value; of an array the first few elements.
    pub value: Json,
}

/// A tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorInfo {
    /// The name.
    pub name: String,
    /// The type's name.
    #[serde(rename = "type")]
    pub kind: String,
    /// The contiguous dimension first.
    pub dims: Vec<u64>,
    /// Bytes in the file.
    pub n_bytes: usize,
}

/// Elements of an array that are shown.
const ARRAY_LEN_SHOWN: usize = 4;

impl ModelInfo {
    /// Sums up a file. Reads no tensor data but the norms.
    #[must_use]
    pub fn new(gguf: &Arc<Gguf>) -> Self {
        let tokenizer = Tokenizer::from_gguf(gguf);
        let problem = super::problems(gguf, &tokenizer).into_iter().next();
        let metadata = gguf.metadata();
        let text = |key| metadata.str(key).ok().flatten().map(str::to_owned);
        let mut types: BTreeMap<TensorType, TypeInfo> = BTreeMap::new();
        for tensor in gguf.tensors() {
            let sum = types.entry(tensor.kind).or_default();
            sum.kind = tensor.kind.name().to_owned();
            sum.n_tensors += 1;
            sum.n_elements += tensor.n_elements();
            sum.n_bytes += tensor.data.len() as u64;
        }
        let is_ternary = |kind: &TensorType| kind.is_ternary();
        Self {
            version: gguf.version(),
            file_bytes: gguf.file_bytes(),
            alignment: gguf.alignment(),
            architecture: text("general.architecture"),
            name: text("general.name"),
            n_parameters: types.values().map(|sum| sum.n_elements).sum(),
            n_ternary_weights: types
                .iter()
                .filter(|(kind, _)| is_ternary(kind))
                .map(|(_, sum)| sum.n_elements)
                .sum(),
            vocabulary: tokenizer
                .ok()
                .map(|tokenizer| format!("{} tokens, {}", tokenizer.n_vocab(), tokenizer.describe())),
            is_supported: problem.is_none(),
            problem,
            types: types.into_values().collect(),
            metadata: metadata
                .iter()
                .map(|(key, value)| MetadataInfo {
                    key: key.to_owned(),
                    kind: value.describe(),
                    value: to_json(value),
                })
                .collect(),
            tensors: gguf
                .tensors()
                .map(|tensor| TensorInfo {
                    name: tensor.name.to_owned(),
                    kind: tensor.kind.name().to_owned(),
                    dims: tensor.dims.to_vec(),
                    n_bytes: tensor.data.len(),
                })
                .collect(),
        }
    }
}

fn to_json(value: Value<'_>) -> Json {
    match value {
        Value::U8(number) => json!(number),
        Value::I8(number) => json!(number),
        Value::U16(number) => json!(number),
        Value::I16(number) => json!(number),
        Value::U32(number) => json!(number),
        Value::I32(number) => json!(number),
        // As it was meant: 1e-5, not 0.000009999999747378752.
        Value::F32(number) => serde_json::from_str(&number.to_string()).unwrap_or(Json::Null),
        Value::F64(number) => json!(number),
        Value::Bool(truth) => json!(truth),
        Value::String(text) => json!(text),
        Value::U64(number) => json!(number),
        Value::I64(number) => json!(number),
        Value::Strings(array) => array.iter().take(ARRAY_LEN_SHOWN).map(Json::from).collect(),
        Value::Numbers(array) => (0..ARRAY_LEN_SHOWN).map_while(|idx| array.get(idx)).map(to_json).collect(),
    }
}
