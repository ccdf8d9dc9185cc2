//! The tokenizer of a model file, from its `tokenizer.*` keys.

use super::{
    BOS_KEY, END_KEYS, PreTokenizer, Splitting, TokenKind, Tokenizer, TokenizerError, TokenizerOptions,
    excerpt,
};
use crate::gguf::{Gguf, Metadata};

const MODEL_KEY: &str = "tokenizer.ggml.model";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const MERGES_KEY: &str = "tokenizer.ggml.merges";
const SCORES_KEY: &str = "tokenizer.ggml.scores";
const KINDS_KEY: &str = "tokenizer.ggml.token_type";
const UNKNOWN_KEY: &str = "tokenizer.ggml.unknown_token_id";
const ADD_BOS_KEY: &str = "tokenizer.ggml.add_bos_token";
const SPACE_PREFIX_KEY: &str = "tokenizer.ggml.add_space_prefix";
const EXTRA_SPACES_KEY: &str = "tokenizer.ggml.remove_extra_whitespaces";
const CHARSMAP_KEY: &str = "tokenizer.ggml.precompiled_charsmap";

/// What a file with the vocabulary of Llama 2 means if it does not say: llama.cpp's words.
const SENTENCE_PIECE_BOS: u32 = 1;
const SENTENCE_PIECE_EOS: u32 = 2;

impl Tokenizer {
    /// Reads the tokenizer of a model file.
    ///
    /// # Errors
    /// The file has none, or one that would not be exact.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TokenizerError> {
        let metadata = gguf.metadata();
        match required(metadata.str(MODEL_KEY)?, MODEL_KEY)? {
            "gpt2" => byte_level(&metadata),
            "llama" => sentence_piece(&metadata),
            model => Err(TokenizerError::UnsupportedModel { model: excerpt(model) }),
        }
    }
}

fn byte_level(metadata: &Metadata<'_>) -> Result<Tokenizer, TokenizerError> {
    let tokens = required(metadata.strings(TOKENS_KEY)?, TOKENS_KEY)?;
    let merges = required(metadata.strings(MERGES_KEY)?, MERGES_KEY)?;
    let n_tokens = tokens.len();
    let kinds = read_kinds(metadata, n_tokens)?.unwrap_or_default();
    let pre_tokenizer = match metadata.str("tokenizer.ggml.pre")? {
        Some(pre) => PreTokenizer::from_name(pre)
            .ok_or_else(|| TokenizerError::UnsupportedPreTokenizer { pre: excerpt(pre) })?,
        None if is_llama3_family(metadata, n_tokens)? => PreTokenizer::LlamaBpe,
        None => return Err(TokenizerError::MissingPreTokenizer { n_tokens }),
    };
    let is_llama = pre_tokenizer == PreTokenizer::LlamaBpe;
    let splitting = Splitting { pre_tokenizer, ignore_merges: is_llama };
    let options = read_options(metadata, n_tokens, is_llama)?;
    Tokenizer::from_merges(tokens.iter(), kinds, merges.iter(), splitting, options)
}

fn sentence_piece(metadata: &Metadata<'_>) -> Result<Tokenizer, TokenizerError> {
    let tokens = required(metadata.strings(TOKENS_KEY)?, TOKENS_KEY)?;
    let scores = required(metadata.f32s(SCORES_KEY)?, SCORES_KEY)?;
    let n_tokens = tokens.len();
    let kinds = required(read_kinds(metadata, n_tokens)?, KINDS_KEY)?;
    if metadata.bool(EXTRA_SPACES_KEY)? == Some(true) {
        return Err(TokenizerError::ChangesText { key: EXTRA_SPACES_KEY });
    }
    if metadata.get(CHARSMAP_KEY).is_some() {
        return Err(TokenizerError::ChangesText { key: CHARSMAP_KEY });
    }
    if let Some(id) = metadata.u32(UNKNOWN_KEY)?.filter(|id| *id as usize >= n_tokens) {
        return Err(TokenizerError::NoSuchToken { key: UNKNOWN_KEY, id, n_tokens });
    }
    let mut options = read_options(metadata, n_tokens, true)?;
    let control = |id: u32| (kinds.get(id as usize) == Some(&TokenKind::Control)).then_some(id);
    options.bos = options.bos.or_else(|| control(SENTENCE_PIECE_BOS));
    if options.eos.is_none() {
        options.eos = control(SENTENCE_PIECE_EOS);
        options.ends.extend(options.eos);
    }
    let adds_space_prefix = metadata.bool(SPACE_PREFIX_KEY)?.unwrap_or(true);
    Tokenizer::from_pieces(tokens.iter(), kinds, scores.iter().collect(), adds_space_prefix, options)
}

fn required<T>(value: Option<T>, key: &'static str) -> Result<T, TokenizerError> {
    value.ok_or(TokenizerError::MissingKey { key })
}

fn read_kinds(metadata: &Metadata<'_>, n_tokens: usize) -> Result<Option<Vec<TokenKind>>, TokenizerError> {
    let Some(ids) = metadata.i32s(KINDS_KEY)? else { return Ok(None) };
    if ids.len() != n_tokens {
        return Err(TokenizerError::KindCount { n_tokens, n_kinds: ids.len() });
    }
    let kind_of = |(idx, kind)| TokenKind::from_id(kind).ok_or(TokenizerError::UnknownKind { idx, kind });
    ids.iter().enumerate().map(kind_of).collect::<Result<_, _>>().map(Some)
}

fn read_options(
    metadata: &Metadata<'_>,
    n_tokens: usize,
    adds_bos: bool,
) -> Result<TokenizerOptions, TokenizerError> {
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
        bos: metadata.u32(BOS_KEY)?,
        eos: metadata.u32(END_KEYS[0])?,
        adds_bos: metadata.bool(ADD_BOS_KEY)?.unwrap_or(adds_bos),
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
mod tests;
