//! Byte-level BPE over the vocabulary of a GGUF file: text to token ids and back.
//!
//! The ids are those of the `tokenizers` library and of llama.cpp for the pre-tokenizers that are supported; any
//! other is refused by name, never approximated. `docs/tokenizer.md` says what is exact and what is refused.

mod byte_level;
mod detokenizer;
mod merge;
mod pre_tokenizer;
mod special;
mod stop;
mod vocabulary;

use crate::gguf::{Gguf, GgufError, Metadata};

#[cfg(test)]
pub(crate) use byte_level::char_of_byte;
pub use detokenizer::Detokenizer;
pub use pre_tokenizer::PreTokenizer;
pub use special::Special;
pub use stop::StopMatcher;
pub use vocabulary::TokenKind;

use merge::MergeScratch;
use special::{Segment, SpecialTokens};
use vocabulary::Vocabulary;

/// Longest text that [`Tokenizer::encode`] takes, in bytes.
pub const TEXT_BYTES_MAX: usize = 64 << 20;
/// Longest text of a special token, in bytes.
pub const SPECIAL_TOKEN_BYTES_MAX: usize = 1024;

/// Names of control tokens that end a text or a turn, in the vocabularies of the supported models.
const END_NAMES: [&str; 6] =
    ["<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|end|>", "<|eom_id|>"];
/// Keys that name such a token.
const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
const BOS_KEY: &str = "tokenizer.ggml.bos_token_id";

/// Why there is no tokenizer for a file, or no tokens for a text.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A key is not what it should be.
    #[error("the tokenizer's metadata cannot be read")]
    Metadata(#[from] GgufError),
    /// A key that no tokenizer can do without.
    #[error("metadata key `{key}` is missing")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// Not a byte-level BPE.
    #[error("tokenizer model `{model}` is not supported, only `gpt2` (byte-level BPE)")]
    UnsupportedModel {
        /// Value of `tokenizer.ggml.model`.
        model: String,
    },
    /// A pattern that is not written here.
    #[error("pre-tokenizer `{pre}` is not supported, only `llama-bpe` (and its aliases) and `gpt-2`")]
    UnsupportedPreTokenizer {
        /// Value of `tokenizer.ggml.pre`.
        pre: String,
    },
    /// The file does not say how to split text, and it cannot be told from the vocabulary.
    #[error(
        "metadata key `tokenizer.ggml.pre` is missing, and a vocabulary of {n_tokens} tokens does not tell"
    )]
    MissingPreTokenizer {
        /// Size of the vocabulary.
        n_tokens: usize,
    },
    /// As many kinds as tokens are needed.
    #[error("`tokenizer.ggml.token_type` has {n_kinds} entries for {n_tokens} tokens")]
    KindCount {
        /// Tokens.
        n_tokens: usize,
        /// Entries.
        n_kinds: usize,
    },
    /// A number that is no kind.
    #[error("token {idx} has the unknown type {kind}")]
    UnknownKind {
        /// Token.
        idx: usize,
        /// Its `tokenizer.ggml.token_type`.
        kind: i32,
    },
    /// A merge that is not two tokens which make a third.
    #[error("merge {idx} (`{merge}`) is not of two tokens whose concatenation is a token")]
    BadMerge {
        /// Its rank.
        idx: usize,
        /// Its start.
        merge: String,
    },
    /// Some text could not be written.
    #[error("no token stands for the byte {byte:#04x}")]
    MissingByte {
        /// The byte.
        byte: u8,
    },
    /// A key names a token that does not exist.
    #[error("`{key}` is {id}, but there are {n_tokens} tokens")]
    NoSuchToken {
        /// The key.
        key: &'static str,
        /// What it says.
        id: u32,
        /// Size of the vocabulary.
        n_tokens: usize,
    },
    /// A special token that no template could mean.
    #[error("special token {id} has {len} bytes, more than {SPECIAL_TOKEN_BYTES_MAX}")]
    SpecialTooLong {
        /// The token.
        id: u32,
        /// Its length.
        len: usize,
    },
    /// More than two million tokens, or merges than 32-bit indexes can number.
    #[error("the vocabulary is too large")]
    TooLarge,
    /// The caller should have refused it.
    #[error("the text has {len} bytes, more than {TEXT_BYTES_MAX}")]
    TextTooLong {
        /// Its length.
        len: usize,
    },
}

/// What a tokenizer does beside its vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerOptions {
    /// How text is split.
    pub pre_tokenizer: PreTokenizer,
    /// A piece that is a token as a whole is taken as it is, without asking the merges.
    pub ignore_merges: bool,
    /// Begin-of-text.
    pub bos: Option<u32>,
    /// End-of-text, as chat templates see it. It is not added to [`Self::ends`] by itself.
    pub eos: Option<u32>,
    /// Whether a prompt starts with begin-of-text.
    pub adds_bos: bool,
    /// Tokens that end the text, beside those known by name.
    pub ends: Vec<u32>,
}

/// A byte-level BPE tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: Vocabulary,
    special: SpecialTokens,
    options: TokenizerOptions,
}

impl Tokenizer {
    /// Reads the tokenizer of a model file.
    ///
    /// # Errors
    /// The file has none, or one that would not be exact.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TokenizerError> {
        let metadata = gguf.metadata();
        let model = required(metadata.str("tokenizer.ggml.model")?, "tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(TokenizerError::UnsupportedModel { model: vocabulary::excerpt(model) });
        }
        let tokens = required(metadata.strings("tokenizer.ggml.tokens")?, "tokenizer.ggml.tokens")?;
        let merges = required(metadata.strings("tokenizer.ggml.merges")?, "tokenizer.ggml.merges")?;
        let mut kinds = Vec::new();
        if let Some(ids) = metadata.i32s("tokenizer.ggml.token_type")? {
            for (idx, kind) in ids.iter().enumerate() {
                kinds.push(TokenKind::from_id(kind).ok_or(TokenizerError::UnknownKind { idx, kind })?);
            }
            if kinds.len() != tokens.len() {
                return Err(TokenizerError::KindCount { n_tokens: tokens.len(), n_kinds: kinds.len() });
            }
        }
        let options = read_options(&metadata, tokens.len())?;
        Self::from_parts(tokens.iter(), kinds, merges.iter(), options)
    }

    /// Builds a tokenizer from its parts: token texts in the byte alphabet, kinds (empty: all normal) and merges.
    ///
    /// # Errors
    /// The parts do not fit together.
    pub fn from_parts<'a>(
        tokens: impl Iterator<Item = &'a str>,
        kinds: Vec<TokenKind>,
        merges: impl Iterator<Item = &'a str>,
        options: TokenizerOptions,
    ) -> Result<Self, TokenizerError> {
        let has_kinds = !kinds.is_empty();
        let mut vocabulary = Vocabulary::build(tokens, kinds, merges)?;
        let n_tokens = vocabulary.n_vocab();
        for (key, id) in options
            .bos
            .iter()
            .map(|id| (BOS_KEY, *id))
            .chain(options.ends.iter().map(|id| (END_KEYS[0], *id)))
        {
            if vocabulary.kind(id).is_none() {
                return Err(TokenizerError::NoSuchToken { key, id, n_tokens });
            }
            if !has_kinds {
                vocabulary.set_kind(id, TokenKind::Control);
            }
        }
        for id in vocabulary.special_ids() {
            let len = vocabulary.token_bytes(id).map_or(0, <[u8]>::len);
            if len > SPECIAL_TOKEN_BYTES_MAX {
                return Err(TokenizerError::SpecialTooLong { id, len });
            }
        }
        let special = SpecialTokens::of(&vocabulary);
        let mut tokenizer = Self { vocabulary, special, options };
        let known = END_NAMES.iter().filter_map(|name| tokenizer.control_token(name)).collect::<Vec<_>>();
        tokenizer.options.ends.extend(known);
        tokenizer.options.ends.sort_unstable();
        tokenizer.options.ends.dedup();
        Ok(tokenizer)
    }

    /// Number of tokens.
    #[must_use]
    pub fn n_vocab(&self) -> usize {
        self.vocabulary.n_vocab()
    }

    /// The begin-of-text token, if there is one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.options.bos
    }

    /// The end-of-text token, if there is one.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.options.eos
    }

    /// Whether a prompt starts with the begin-of-text token.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.options.adds_bos && self.options.bos.is_some()
    }

    /// Whether generation ends with this token.
    #[must_use]
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.options.ends.binary_search(&id).is_ok()
    }

    /// Every token that ends generation, ascending.
    #[must_use]
    pub fn end_tokens(&self) -> &[u32] {
        &self.options.ends
    }

    /// The special token with this text.
    #[must_use]
    pub fn control_token(&self, text: &str) -> Option<u32> {
        let found = self.special.longest_at_start(text.as_bytes(), Special::Parse);
        found.filter(|(len, _)| *len == text.len()).map(|(_, id)| id)
    }

    /// What a token is for.
    #[must_use]
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.vocabulary.kind(id)
    }

    /// The bytes of a token, which need not be whole characters. Empty for a number that is no token.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.token_bytes(id).unwrap_or_default()
    }

    /// The tokens of `text`, after begin-of-text if `add_bos` (and there is such a token).
    ///
    /// User-defined tokens are found in any text, control tokens as `special` says.
    ///
    /// # Errors
    /// The text is longer than [`TEXT_BYTES_MAX`].
    pub fn encode(&self, text: &str, special: Special, add_bos: bool) -> Result<Vec<u32>, TokenizerError> {
        check_len(text)?;
        let (mut ids, mut scratch) = (Vec::new(), MergeScratch::default());
        if add_bos {
            ids.extend(self.options.bos);
        }
        self.encode_segments(text, special, &mut scratch, &mut ids);
        Ok(ids)
    }

    /// Encodes after leaving out every `mark`, which control tokens do not reach across. They are found as they are in
    /// [`Special::Parse`], user-defined tokens as if there were no marks.
    pub(crate) fn encode_marked(&self, text: &str, mark: char) -> Result<Vec<u32>, TokenizerError> {
        check_len(text)?;
        let (mut ids, mut scratch) = (Vec::new(), MergeScratch::default());
        self.special.split(text, Special::Parse, |segment| match segment {
            Segment::Token(id) => ids.push(id),
            Segment::Text(marked) => {
                self.encode_segments(&marked.replace(mark, ""), Special::AsText, &mut scratch, &mut ids);
            }
        });
        Ok(ids)
    }

    /// Texts of the control tokens.
    pub(crate) fn control_texts(&self) -> impl Iterator<Item = &str> {
        let is_control = |id: &u32| self.kind(*id) != Some(TokenKind::UserDefined);
        self.vocabulary
            .special_ids()
            .filter(is_control)
            .filter_map(|id| str::from_utf8(self.token_bytes(id)).ok())
    }

    fn encode_segments(&self, text: &str, special: Special, scratch: &mut MergeScratch, ids: &mut Vec<u32>) {
        self.special.split(text, special, |segment| match segment {
            Segment::Token(id) => ids.push(id),
            Segment::Text(text) => self.encode_text(text, scratch, ids),
        });
    }

    fn encode_text(&self, text: &str, scratch: &mut MergeScratch, ids: &mut Vec<u32>) {
        for piece in self.options.pre_tokenizer.split(text) {
            let whole =
                if self.options.ignore_merges { self.vocabulary.token_of(piece.as_bytes()) } else { None };
            match whole {
                Some(id) => ids.push(id),
                None => merge::merge_piece(&self.vocabulary, piece.as_bytes(), scratch, ids),
            }
        }
    }
}

fn check_len(text: &str) -> Result<(), TokenizerError> {
    let len = text.len();
    if len > TEXT_BYTES_MAX { Err(TokenizerError::TextTooLong { len }) } else { Ok(()) }
}

fn required<T>(value: Option<T>, key: &'static str) -> Result<T, TokenizerError> {
    value.ok_or(TokenizerError::MissingKey { key })
}

fn read_options(metadata: &Metadata<'_>, n_tokens: usize) -> Result<TokenizerOptions, TokenizerError> {
    let pre_tokenizer = match metadata.str("tokenizer.ggml.pre")? {
        Some(pre) => PreTokenizer::from_name(pre)
            .ok_or_else(|| TokenizerError::UnsupportedPreTokenizer { pre: vocabulary::excerpt(pre) })?,
        None if is_llama3_family(metadata, n_tokens)? => PreTokenizer::LlamaBpe,
        None => return Err(TokenizerError::MissingPreTokenizer { n_tokens }),
    };
    let is_llama = pre_tokenizer == PreTokenizer::LlamaBpe;
    let mut ends = Vec::new();
    for key in END_KEYS {
        if let Some(id) = metadata.u32(key)? {
            if id as usize >= n_tokens {
                return Err(TokenizerError::NoSuchToken { key, id, n_tokens });
            }
            ends.push(id);
        }
    }
    Ok(TokenizerOptions {
        pre_tokenizer,
        ignore_merges: is_llama,
        bos: metadata.u32(BOS_KEY)?,
        eos: metadata.u32(END_KEYS[0])?,
        adds_bos: metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(is_llama),
        ends,
    })
}

/// Whether a file without `tokenizer.ggml.pre` means `llama-bpe`: the published BitNet files do, and so does every
/// file with the vocabulary of Llama 3.
fn is_llama3_family(metadata: &Metadata<'_>, n_tokens: usize) -> Result<bool, TokenizerError> {
    let is_bitnet = metadata.str("general.architecture")?.is_some_and(|name| name.starts_with("bitnet"));
    Ok(is_bitnet || n_tokens == 128_256)
}

#[cfg(test)]
mod file_tests;
#[cfg(test)]
mod tests;
