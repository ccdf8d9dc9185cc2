//! `tokenizer.json` (and what its neighbours add) to `tokenizer.*` keys.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;

use super::config::Config;
use super::{HuggingFaceError, read_json, read_json_if_there};
use crate::gguf::{GgufWriteError, GgufWriter};

/// Why a tokenizer cannot be converted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum TokenizerFileError {
    #[error("the model is `{found}`: expected a byte-level `BPE`")]
    Model { found: String },
    #[error("the pre-tokenizer splits by `{pattern}`: expected the pattern of Llama 3 or GPT-2")]
    PreTokenizer { pattern: String },
    #[error("the normalizer changes the text, which no supported tokenizer does")]
    Normalizer,
    #[error("token `{token}` has the id {id}, the model has {n_vocab} tokens")]
    Id { token: String, id: u32, n_vocab: u32 },
    #[error("tokens `{first}` and `{second}` have the same id {id}")]
    SameId { first: String, second: String, id: u32 },
    #[error("merge number {idx} is not a pair of tokens")]
    Merge { idx: usize },
}

/// How Llama 3 cuts text into words.
const LLAMA_3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What kind a token is, by the numbers of the file format.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// A tokenizer, ready to be written.
#[derive(Debug)]
pub(super) struct TokenizerFile {
    pre: &'static str,
    tokens: Vec<String>, // (n_vocab)
    types: Vec<i32>,     // (n_vocab)
    merges: Vec<String>,
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    pad: Option<u32>,
    adds_bos: bool,
    chat_template: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Raw {
    model: ModelRaw,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Json>,
    pre_tokenizer: Option<Json>,
}

#[derive(Debug, Deserialize)]
struct ModelRaw {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    vocab: Json,
    #[serde(default)]
    merges: Vec<MergeRaw>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum MergeRaw {
    Pair(String, String),
    Text(String),
}

#[derive(Debug, Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfigRaw {
    add_bos_token: Option<bool>,
    chat_template: Option<Json>,
}

impl TokenizerFile {
    pub(super) fn read(directory: &Path, config: &Config) -> Result<Self, HuggingFaceError> {
        let raw: Raw = read_json(directory.join("tokenizer.json"))?;
        let extra: TokenizerConfigRaw =
            read_json_if_there(directory.join("tokenizer_config.json"))?.unwrap_or_default();
        let mut file = Self::from_raw(raw, config).map_err(HuggingFaceError::Tokenizer)?;
        file.adds_bos = extra.add_bos_token.unwrap_or(file.bos.is_some());
        // A list of templates by name is of no use to programs that know one.
        file.chat_template = extra.chat_template.and_then(|json| json.as_str().map(str::to_owned));
        let path = directory.join("chat_template.jinja");
        if path.exists() {
            match std::fs::read_to_string(&path) {
                Ok(text) => file.chat_template = Some(text),
                Err(source) => return Err(HuggingFaceError::Read { path, source }),
            }
        }
        Ok(file)
    }

    fn from_raw(raw: Raw, config: &Config) -> Result<Self, TokenizerFileError> {
        let kind = raw.model.kind.as_deref().unwrap_or("unnamed");
        let Json::Object(vocab) = raw.model.vocab else {
            return Err(TokenizerFileError::Model { found: kind.to_owned() });
        };
        if kind != "BPE" || raw.model.byte_fallback {
            return Err(TokenizerFileError::Model { found: format!("{kind} (SentencePiece)") });
        }
        if raw.normalizer.is_some_and(|normalizer| !normalizer.is_null()) {
            return Err(TokenizerFileError::Normalizer);
        }
        let pre = pre_tokenizer(raw.pre_tokenizer.as_ref())?;
        let mut table = Table::new(config.shape.n_vocab);
        for (token, id) in vocab {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).unwrap_or(u32::MAX);
            table.put(token, id, NORMAL)?;
        }
        for token in raw.added_tokens {
            table.put(token.content, token.id, if token.special { CONTROL } else { USER_DEFINED })?;
        }
        let eot = table.ids.get("<|eot_id|>").or_else(|| table.ids.get("<|im_end|>")).copied();
        let (tokens, types) = table.finish();
        let merges = raw.model.merges.into_iter().enumerate().map(|(idx, merge)| match merge {
            MergeRaw::Pair(left, right) => Ok(format!("{left} {right}")),
            MergeRaw::Text(text) if text.split(' ').count() == 2 => Ok(text),
            MergeRaw::Text(_) => Err(TokenizerFileError::Merge { idx }),
        });
        Ok(Self {
            pre,
            tokens,
            types,
            merges: merges.collect::<Result<_, _>>()?,
            bos: config.bos,
            eos: config.eos,
            eot,
            pad: config.pad,
            adds_bos: config.bos.is_some(),
            chat_template: None,
        })
    }

    pub(super) fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    pub(super) fn write_keys(&self, writer: &mut GgufWriter) -> Result<(), GgufWriteError> {
        writer.str("tokenizer.ggml.model", "gpt2")?;
        writer.str("tokenizer.ggml.pre", self.pre)?;
        writer.strings("tokenizer.ggml.tokens", self.tokens.iter().map(String::as_str))?;
        writer.i32s("tokenizer.ggml.token_type", &self.types)?;
        writer.strings("tokenizer.ggml.merges", self.merges.iter().map(String::as_str))?;
        for (key, id) in [("bos", self.bos), ("eos", self.eos), ("eot", self.eot), ("padding", self.pad)] {
            if let Some(id) = id {
                writer.u32(&format!("tokenizer.ggml.{key}_token_id"), id)?;
            }
        }
        match &self.chat_template {
            Some(template) => writer.str("tokenizer.chat_template", template),
            None => Ok(()),
        }
    }
}

/// Tokens by id while they are gathered.
struct Table {
    tokens: Vec<Option<(String, i32)>>, // (n_vocab)
    ids: HashMap<String, u32>,
    n_vocab: u32,
}

impl Table {
    fn new(n_vocab: u32) -> Self {
        Self { tokens: vec![None; n_vocab as usize], ids: HashMap::new(), n_vocab }
    }

    // An added token is in the vocabulary, too, or not; its own entry says what kind it is.
    fn put(&mut self, token: String, id: u32, kind: i32) -> Result<(), TokenizerFileError> {
        let n_vocab = self.n_vocab;
        let Some(place) = self.tokens.get_mut(id as usize) else {
            return Err(TokenizerFileError::Id { token, id, n_vocab });
        };
        if let Some((first, _)) = place.take_if(|(first, _)| *first != token) {
            return Err(TokenizerFileError::SameId { first, second: token, id });
        }
        self.ids.insert(token.clone(), id);
        *place = Some((token, kind));
        Ok(())
    }

    // Models often have more rows than the tokenizer has tokens.
    fn finish(self) -> (Vec<String>, Vec<i32>) {
        let fill = |(id, token): (usize, Option<(String, i32)>)| {
            token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED))
        };
        self.tokens.into_iter().enumerate().map(fill).unzip()
    }
}

/// The name of the pre-tokenizer, by the pattern it splits with.
fn pre_tokenizer(json: Option<&Json>) -> Result<&'static str, TokenizerFileError> {
    let steps = match json {
        Some(Json::Object(step)) if step.contains_key("pretokenizers") => {
            step["pretokenizers"].as_array().cloned().unwrap_or_default()
        }
        Some(step) => vec![step.clone()],
        None => Vec::new(),
    };
    let kind_of = |step: &Json| step["type"].as_str().unwrap_or("").to_owned();
    let patterns: Vec<&str> = steps.iter().filter_map(|step| step["pattern"]["Regex"].as_str()).collect();
    let has_byte_level = steps.iter().any(|step| kind_of(step) == "ByteLevel");
    let has_gpt2_split = steps.iter().any(|step| kind_of(step) == "ByteLevel" && step["use_regex"] != false);
    match patterns[..] {
        [LLAMA_3_PATTERN] if has_byte_level && !has_gpt2_split && steps.len() == 2 => Ok("llama-bpe"),
        [] if has_gpt2_split && steps.len() == 1 => Ok("gpt-2"),
        _ => {
            let pattern =
                if patterns.is_empty() { "nothing known".to_owned() } else { patterns.join("` and `") };
            Err(TokenizerFileError::PreTokenizer { pattern })
        }
    }
}
