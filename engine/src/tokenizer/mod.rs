//! The vocabulary of a GGUF file: text to token ids and back, by byte-level BPE or SentencePiece BPE.
//!
//! The ids are those of the `tokenizers` and `sentencepiece` libraries and of llama.cpp for the vocabularies that are
//! supported; any other is refused by name, never approximated. `docs/tokenizer.md` says what is exact and what is
//! refused.

mod byte_level; // The alphabet of byte-level vocabularies.
mod detokenizer; // Tokens to text.
mod error; // What can be wrong with a vocabulary.
mod file; // A vocabulary's keys in a model file.
mod merge; // Merging of neighbours, of either kind.
mod merges; // By rank, as byte-level BPE does.
mod pieces; // By score, as SentencePiece does.
mod pre_tokenizer; // How text is split before byte-level BPE.
mod special; // Tokens that are found in the text beforehand.
mod stop; // Stop strings.
mod vocabulary; // Tokens by number and by bytes.

#[cfg(test)]
pub(crate) use byte_level::char_of_byte;
pub use detokenizer::Detokenizer;
pub use error::TokenizerError;
pub use pieces::PIECE_BYTES_MAX;
pub use pre_tokenizer::PreTokenizer;
pub use special::Special;
pub use stop::StopMatcher;
pub use vocabulary::TokenKind;

use merge::MergeScratch;
use merges::Merges;
use pieces::{Pieces, SPACE_SYMBOL};
use special::{Segment, SpecialTokens};
use vocabulary::{Spelling, Vocabulary};

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

/// How byte-level BPE cuts a text before it merges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splitting {
    /// How text is split.
    pub pre_tokenizer: PreTokenizer,
    /// A piece that is a token as a whole is taken as it is, without asking the merges.
    pub ignore_merges: bool,
}

/// What a tokenizer does beside its vocabulary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizerOptions {
    /// Begin-of-text.
    pub bos: Option<u32>,
    /// End-of-text, as chat templates see it. It is not added to [`Self::ends`] by itself.
    pub eos: Option<u32>,
    /// Whether a prompt starts with begin-of-text.
    pub adds_bos: bool,
    /// Tokens that end the text, beside those known by name.
    pub ends: Vec<u32>,
}

/// Text to tokens and back.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: Vocabulary,
    scheme: Scheme,
    special: SpecialTokens,
    options: TokenizerOptions,
}

/// How text between special tokens becomes tokens.
#[derive(Debug)]
enum Scheme {
    ByteLevel { splitting: Splitting, merges: Merges },
    SentencePiece { adds_space_prefix: bool, pieces: Pieces },
}

/// Reused between pieces of text.
#[derive(Default)]
struct Scratch {
    merge: MergeScratch,
    text: String, // With its prefix.
}

impl Tokenizer {
    /// Builds a byte-level tokenizer from its parts: token texts in the byte alphabet, kinds (empty: all normal) and
    /// merges.
    ///
    /// # Errors
    /// The parts do not fit together.
    pub fn from_merges<'a>(
        tokens: impl Iterator<Item = &'a str>,
        kinds: Vec<TokenKind>,
        merges: impl Iterator<Item = &'a str>,
        splitting: Splitting,
        options: TokenizerOptions,
    ) -> Result<Self, TokenizerError> {
        let has_kinds = !kinds.is_empty();
        let vocabulary = Vocabulary::build(tokens, kinds, Spelling::ByteAlphabet)?;
        let merges = Merges::build(&vocabulary, merges)?;
        Self::new(vocabulary, Scheme::ByteLevel { splitting, merges }, has_kinds, options)
    }

    /// Builds a SentencePiece tokenizer from its parts, one kind and one score for each token. `adds_space_prefix` says
    /// whether a text is read as if it began with one more space.
    ///
    /// # Errors
    /// The parts do not fit together.
    pub fn from_pieces<'a>(
        tokens: impl Iterator<Item = &'a str>,
        kinds: Vec<TokenKind>,
        scores: Vec<f32>,
        adds_space_prefix: bool,
        options: TokenizerOptions,
    ) -> Result<Self, TokenizerError> {
        let vocabulary = Vocabulary::build(tokens, kinds, Spelling::SpaceSymbol)?;
        let pieces = Pieces::build(&vocabulary, scores)?;
        Self::new(vocabulary, Scheme::SentencePiece { adds_space_prefix, pieces }, true, options)
    }

    fn new(
        mut vocabulary: Vocabulary,
        scheme: Scheme,
        has_kinds: bool,
        options: TokenizerOptions,
    ) -> Result<Self, TokenizerError> {
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
        let mut tokenizer = Self { vocabulary, scheme, special, options };
        let known = END_NAMES.iter().filter_map(|name| tokenizer.control_token(name)).collect::<Vec<_>>();
        tokenizer.options.ends.extend(known);
        tokenizer.options.ends.sort_unstable();
        tokenizer.options.ends.dedup();
        Ok(tokenizer)
    }

    /// What kind of vocabulary it is, in words.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.scheme {
            Scheme::ByteLevel { splitting, .. } => {
                format!("byte-level BPE, split as {}", splitting.pre_tokenizer.name())
            }
            Scheme::SentencePiece { adds_space_prefix: true, .. } => "SentencePiece BPE".to_owned(),
            Scheme::SentencePiece { adds_space_prefix: false, .. } => {
                "SentencePiece BPE without a space in front".to_owned()
            }
        }
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

    /// Whether a text is read as if it began with one more space.
    #[must_use]
    pub fn adds_space_prefix(&self) -> bool {
        matches!(self.scheme, Scheme::SentencePiece { adds_space_prefix: true, .. })
    }

    /// Whether this token at the start of a text has the space that was put in front.
    fn may_start_with_prefix(&self, id: u32) -> bool {
        // The encoder writes a space as a byte only if it is no piece.
        let is_written = self.kind(id) != Some(TokenKind::Byte) || self.vocabulary.token_of(b" ").is_none();
        self.adds_space_prefix() && self.token_bytes(id).starts_with(b" ") && is_written
    }

    /// The tokens of `text`, after begin-of-text if `add_bos` (and there is such a token).
    ///
    /// User-defined tokens are found in any text, control tokens as `special` says.
    ///
    /// # Errors
    /// The text is longer than [`TEXT_BYTES_MAX`].
    pub fn encode(&self, text: &str, special: Special, add_bos: bool) -> Result<Vec<u32>, TokenizerError> {
        check_len(text)?;
        let (mut ids, mut scratch) = (Vec::new(), Scratch::default());
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
        let (mut ids, mut scratch) = (Vec::new(), Scratch::default());
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

    fn encode_segments(&self, text: &str, special: Special, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        self.special.split(text, special, |segment| match segment {
            Segment::Token(id) => ids.push(id),
            Segment::Text(text) => self.encode_text(text, scratch, ids),
        });
    }

    fn encode_text(&self, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let vocabulary = &self.vocabulary;
        match &self.scheme {
            Scheme::ByteLevel { splitting, merges } => {
                for piece in splitting.pre_tokenizer.split(text).map(str::as_bytes) {
                    let whole = if splitting.ignore_merges { vocabulary.token_of(piece) } else { None };
                    match whole {
                        Some(id) => ids.push(id),
                        None => merges.encode(vocabulary, piece, &mut scratch.merge, ids),
                    }
                }
            }
            // Every text is at the start or after a special token, and has its prefix.
            Scheme::SentencePiece { adds_space_prefix, pieces } => {
                scratch.text.clear();
                if *adds_space_prefix && !text.is_empty() {
                    scratch.text.push(' ');
                }
                scratch.text.extend(text.chars().map(|c| if c == SPACE_SYMBOL { ' ' } else { c }));
                pieces.encode(vocabulary, &scratch.text, &mut scratch.merge, ids);
            }
        }
    }
}

fn check_len(text: &str) -> Result<(), TokenizerError> {
    let len = text.len();
    if len > TEXT_BYTES_MAX { Err(TokenizerError::TextTooLong { len }) } else { Ok(()) }
}

/// The first characters of a text, for messages.
fn excerpt(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests;
