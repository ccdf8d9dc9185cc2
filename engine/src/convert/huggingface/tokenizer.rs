//! `tokenizer.json` or `tokenizer.model` (and what their neighbours add) to `tokenizer.*` keys.

mod byte_level;
mod pieces;
mod sentence_piece;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;

use super::config::Config;
use super::{HuggingFaceError, read_json, read_json_if_there};
use crate::gguf::{GgufWriteError, GgufWriter};
use crate::tokenizer::{PreTokenizer, Splitting, TokenKind, Tokenizer, TokenizerError, TokenizerOptions};

/// Why a tokenizer cannot be converted.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum TokenizerFileError {
    #[error("the model is `{found}`: expected `BPE`, of bytes or of SentencePiece")]
    Model { found: String },
    #[error("the pre-tokenizer splits by `{pattern}`: expected the pattern of Llama 3 or GPT-2")]
    PreTokenizer { pattern: String },
    #[error("the normalizer changes the text, which no supported tokenizer does")]
    Normalizer,
    #[error(
        "`{key}` is {found}: expected {expected}, as in the vocabulary of Llama 2, where text is taken as it is"
    )]
    Rule { key: &'static str, found: String, expected: &'static str },
    #[error(
        "merges into the token `{token}` stand in two places, so that no score for the token gives the same order"
    )]
    MergeOrder { token: String },
    #[error("no merge makes the token `{left}{right}` of `{left}` and `{right}`, as SentencePiece would")]
    MergeMissing { left: String, right: String },
    #[error("it is not the protocol buffer of SentencePiece")]
    ModelFile(#[source] prost::DecodeError),
    #[error("the vocabulary cannot be used")]
    Unusable(#[source] TokenizerError),
    #[error("token `{token}` has the id {id}, the model has {n_vocab} tokens")]
    Id { token: String, id: u32, n_vocab: u32 },
    #[error("tokens `{first}` and `{second}` have the same id {id}")]
    SameId { first: String, second: String, id: u32 },
    #[error("merge number {idx} is not a pair of tokens")]
    Merge { idx: usize },
}

/// What kind a token is, by the numbers of the file format.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// A tokenizer, ready to be written.
#[derive(Debug)]
pub(super) struct TokenizerFile {
    tokens: Vec<String>, // (n_vocab)
    types: Vec<i32>,     // (n_vocab)
    rules: Rules,
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    pad: Option<u32>,
    adds_bos: bool,
    chat_template: Option<String>,
}

/// How text becomes tokens.
#[derive(Debug)]
enum Rules {
    Merges {
        pre: &'static str,
        merges: Vec<String>,
    },
    Scores {
        scores: Vec<f32>, // (n_vocab)
        adds_space_prefix: bool,
    },
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
    #[serde(default)]
    ignore_merges: bool,
    unk_token: Option<String>,
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
    add_prefix_space: Option<bool>,
    added_tokens_decoder: BTreeMap<u32, AddedTokenRaw>,
    chat_template: Option<Json>,
}

#[derive(Debug, Deserialize)]
struct AddedTokenRaw {
    content: String,
    #[serde(default)]
    special: bool,
}

impl TokenizerFile {
    /// Reads `tokenizer.json`, or `tokenizer.model` where there is no other.
    pub(super) fn read(directory: &Path, config: &Config) -> Result<Self, HuggingFaceError> {
        let extra: TokenizerConfigRaw =
            read_json_if_there(directory.join("tokenizer_config.json"))?.unwrap_or_default();
        let model_path = directory.join("tokenizer.model");
        let mut file = if model_path.exists() && !directory.join("tokenizer.json").exists() {
            let model = match std::fs::read(&model_path) {
                Ok(model) => model,
                Err(source) => return Err(HuggingFaceError::Read { path: model_path, source }),
            };
            let added: BTreeMap<String, u32> =
                read_json_if_there(directory.join("added_tokens.json"))?.unwrap_or_default();
            Self::from_model(&model, added, &extra, config).map_err(HuggingFaceError::TokenizerModel)?
        } else {
            let raw: Raw = read_json(directory.join("tokenizer.json"))?;
            Self::from_json(raw, config).map_err(HuggingFaceError::Tokenizer)?
        };
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

    fn from_json(raw: Raw, config: &Config) -> Result<Self, TokenizerFileError> {
        let kind = raw.model.kind.as_deref().unwrap_or("unnamed").to_owned();
        if kind != "BPE" {
            return Err(TokenizerFileError::Model { found: kind });
        }
        let Json::Object(vocab) = raw.model.vocab else {
            return Err(TokenizerFileError::Model { found: format!("{kind} without a map of tokens") });
        };
        let is_pieces = raw.model.byte_fallback;
        let unknown = raw.model.unk_token.filter(|_| is_pieces);
        let mut table = Table::new(config.shape.n_vocab);
        for (token, id) in vocab {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).unwrap_or(u32::MAX);
            let kind = if is_pieces { pieces::type_of(&token, unknown.as_deref()) } else { NORMAL };
            table.put(token, id, kind)?;
        }
        for token in raw.added_tokens {
            let is_unknown = unknown.as_ref() == Some(&token.content);
            let added_kind = if token.special { CONTROL } else { USER_DEFINED };
            table.put(token.content, token.id, if is_unknown { UNKNOWN } else { added_kind })?;
        }
        let merges = raw.model.merges.into_iter().enumerate().map(|(idx, merge)| merge.split(idx));
        let merges = merges.collect::<Result<Vec<_>, _>>()?;
        let (eot, (tokens, types)) = (table.eot(), table.finish());
        let rules = if is_pieces {
            if raw.model.ignore_merges {
                let found = "true".to_owned();
                return Err(TokenizerFileError::Rule { key: "ignore_merges", found, expected: "false" });
            }
            let adds_space_prefix =
                pieces::adds_space_prefix(raw.normalizer.as_ref(), raw.pre_tokenizer.as_ref(), &tokens)?;
            Rules::Scores { scores: pieces::scores(&tokens, &types, &merges)?, adds_space_prefix }
        } else {
            if raw.normalizer.is_some_and(|normalizer| !normalizer.is_null()) {
                return Err(TokenizerFileError::Normalizer);
            }
            let pre = byte_level::pre_tokenizer(raw.pre_tokenizer.as_ref())?;
            let merges = merges.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
            Rules::Merges { pre, merges }
        };
        Self::new(tokens, types, rules, eot, config)
    }

    fn new(
        tokens: Vec<String>,
        types: Vec<i32>,
        rules: Rules,
        eot: Option<u32>,
        config: &Config,
    ) -> Result<Self, TokenizerFileError> {
        let file = Self {
            tokens,
            types,
            rules,
            bos: config.bos,
            eos: config.eos,
            eot,
            pad: config.pad,
            adds_bos: config.bos.is_some(),
            chat_template: None,
        };
        file.check().map_err(TokenizerFileError::Unusable)?;
        Ok(file)
    }

    /// Builds what the file's reader will build.
    fn check(&self) -> Result<(), TokenizerError> {
        let tokens = self.tokens.iter().map(String::as_str);
        let kinds = self.types.iter().filter_map(|kind| TokenKind::from_id(*kind)).collect();
        let ends = [self.eos, self.eot].into_iter().flatten().collect();
        let options = TokenizerOptions { bos: self.bos, eos: self.eos, adds_bos: self.adds_bos, ends };
        match &self.rules {
            Rules::Merges { pre, merges } => {
                let pre_tokenizer = PreTokenizer::from_name(pre)
                    .ok_or_else(|| TokenizerError::UnsupportedPreTokenizer { pre: (*pre).to_owned() })?;
                let splitting = Splitting { pre_tokenizer, ignore_merges: false };
                let merges = merges.iter().map(String::as_str);
                Tokenizer::from_merges(tokens, kinds, merges, splitting, options)?;
            }
            Rules::Scores { scores, adds_space_prefix } => {
                Tokenizer::from_pieces(tokens, kinds, scores.clone(), *adds_space_prefix, options)?;
            }
        }
        Ok(())
    }

    pub(super) fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    pub(super) fn write_keys(&self, writer: &mut GgufWriter) -> Result<(), GgufWriteError> {
        let tokens = self.tokens.iter().map(String::as_str);
        match &self.rules {
            Rules::Merges { pre, merges } => {
                writer.str("tokenizer.ggml.model", "gpt2")?;
                writer.str("tokenizer.ggml.pre", pre)?;
                writer.strings("tokenizer.ggml.tokens", tokens)?;
                writer.i32s("tokenizer.ggml.token_type", &self.types)?;
                writer.strings("tokenizer.ggml.merges", merges.iter().map(String::as_str))?;
            }
            Rules::Scores { scores, adds_space_prefix } => {
                writer.str("tokenizer.ggml.model", "llama")?;
                writer.str("tokenizer.ggml.pre", "default")?;
                writer.strings("tokenizer.ggml.tokens", tokens)?;
                writer.f32s("tokenizer.ggml.scores", scores)?;
                writer.i32s("tokenizer.ggml.token_type", &self.types)?;
                writer.bool("tokenizer.ggml.add_space_prefix", *adds_space_prefix)?;
                if let Some(id) = (0..).zip(&self.types).find(|(_, kind)| **kind == UNKNOWN) {
                    writer.u32("tokenizer.ggml.unknown_token_id", id.0)?;
                }
            }
        }
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

impl MergeRaw {
    /// The two tokens of merge number `idx`.
    fn split(self, idx: usize) -> Result<(String, String), TokenizerFileError> {
        match self {
            Self::Pair(left, right) => Ok((left, right)),
            Self::Text(text) => match text.split_once(' ') {
                Some((left, right)) if !right.contains(' ') => Ok((left.to_owned(), right.to_owned())),
                _ => Err(TokenizerFileError::Merge { idx }),
            },
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

    /// What kind the token of this text is, if there is one.
    fn kind(&self, token: &str) -> Option<i32> {
        self.tokens.get(*self.ids.get(token)? as usize)?.as_ref().map(|(_, kind)| *kind)
    }

    /// The token that ends a turn, by the names that are known.
    fn eot(&self) -> Option<u32> {
        self.ids.get("<|eot_id|>").or_else(|| self.ids.get("<|im_end|>")).copied()
    }

    // Models often have more rows than the tokenizer has tokens.
    fn finish(self) -> (Vec<String>, Vec<i32>) {
        let fill = |(id, token): (usize, Option<(String, i32)>)| {
            token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED))
        };
        self.tokens.into_iter().enumerate().map(fill).unzip()
    }
}
