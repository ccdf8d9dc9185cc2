//! Why there is no tokenizer for a file, or no tokens for a text.

use super::{PIECE_BYTES_MAX, SPECIAL_TOKEN_BYTES_MAX, TEXT_BYTES_MAX};
use crate::gguf::GgufError;

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
    /// Neither of the two kinds.
    #[error(
        "tokenizer model `{model}` is not supported, only `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE)"
    )]
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
    /// As many scores as tokens are needed.
    #[error("`tokenizer.ggml.scores` has {n_scores} entries for {n_tokens} tokens")]
    ScoreCount {
        /// Tokens.
        n_tokens: usize,
        /// Entries.
        n_scores: usize,
    },
    /// A score that orders nothing.
    #[error("`tokenizer.ggml.scores` has `{score}` for token {id} (`{text}`): expected a finite number")]
    BadScore {
        /// The token.
        id: u32,
        /// Its start.
        text: String,
        /// What the file says.
        score: f32,
    },
    /// A text that is two tokens.
    #[error(
        "`tokenizer.ggml.tokens` has `{text}` twice, as tokens {first} and {second}: expected each text once"
    )]
    SameText {
        /// The one.
        first: u32,
        /// The other.
        second: u32,
        /// What both are, with spaces as they are in text.
        text: String,
    },
    /// A byte token that names no byte.
    #[error("token {id} (`{text}`) has the type 6 (byte): expected a name from `<0x00>` to `<0xFF>`")]
    ByteName {
        /// The token.
        id: u32,
        /// Its start.
        text: String,
    },
    /// Text that no piece fits could not be written.
    #[error(
        "`tokenizer.ggml.tokens` has no token of type 6 (byte) for `<0x{byte:02X}>`: expected one for each byte"
    )]
    MissingByteToken {
        /// The byte.
        byte: u8,
    },
    /// A piece that no trainer makes.
    #[error("token {id} has {len} bytes, more than {PIECE_BYTES_MAX}")]
    PieceTooLong {
        /// The token.
        id: u32,
        /// Its length.
        len: usize,
    },
    /// Text would have to be changed before it is tokenised.
    #[error("`{key}` is set: only vocabularies that take text as it is are supported")]
    ChangesText {
        /// The key.
        key: &'static str,
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
