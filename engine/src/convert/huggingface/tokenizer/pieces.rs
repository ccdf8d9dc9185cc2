//! A `tokenizer.json` with BPE and `byte_fallback`, which transformers makes of a SentencePiece vocabulary, back to one.
//!
//! It has ranked pairs of tokens where SentencePiece has scored tokens. Both mean the same if every pair of pieces that
//! makes a piece is there, and all pairs that make the same piece follow each other; whatever else is refused.

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

use super::{BYTE, NORMAL, TokenizerFileError, UNKNOWN};

const SPACE_SYMBOL: char = '\u{2581}';

/// The type of a token of the model's own vocabulary.
pub(super) fn type_of(token: &str, unknown: Option<&str>) -> i32 {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    let is_byte = digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok());
    match unknown {
        Some(unknown) if unknown == token => UNKNOWN,
        _ if is_byte => BYTE,
        _ => NORMAL,
    }
}

/// Whether the text gets a space in front; spaces become the symbol either way.
///
/// Two spellings are known: normalizers (`Prepend` and `Replace`), and the pre-tokenizer `Metaspace`, which leaves the
/// space out in front of a space and, by its scheme `first`, after special tokens. SentencePiece does not.
pub(super) fn adds_space_prefix(
    normalizer: Option<&Json>,
    pre_tokenizer: Option<&Json>,
    tokens: &[String],
) -> Result<bool, TokenizerFileError> {
    let normalizers = steps(normalizer, "normalizers");
    let pre_tokenizers = steps(pre_tokenizer, "pretokenizers");
    let kinds = |steps: &[&Json]| -> Vec<String> {
        steps.iter().map(|step| step["type"].as_str().unwrap_or("unnamed").to_owned()).collect()
    };
    let refused = |key, found: &[&Json], expected| {
        let found =
            if found.is_empty() { "missing".to_owned() } else { format!("`{}`", kinds(found).join("`, `")) };
        Err(TokenizerFileError::Rule { key, found, expected })
    };
    match pre_tokenizers[..] {
        [] => match normalizers[..] {
            [prepend, replace] if is_prepend(prepend) && is_replace(replace) => Ok(true),
            [replace] if is_replace(replace) => Ok(false),
            _ => refused("normalizer", &normalizers, "`Prepend` and `Replace` of a space"),
        },
        [step] if step["type"] == "Metaspace" && step["replacement"] == SPACE_SYMBOL.to_string() => {
            if !normalizers.is_empty() {
                return refused("normalizer", &normalizers, "none beside `Metaspace`");
            }
            // Words apart make no difference if no piece reaches from one into the next.
            let reaches = |token: &String| token.chars().skip(1).any(|c| c == SPACE_SYMBOL);
            if step["split"] != false && tokens.iter().any(reaches) {
                return refused("pre_tokenizer", &pre_tokenizers, "`Metaspace` with `split` false");
            }
            Ok(step["prepend_scheme"] != "never" && step["add_prefix_space"] != false)
        }
        _ => refused("pre_tokenizer", &pre_tokenizers, "none or `Metaspace`"),
    }
}

/// The steps of a sequence, or the one step.
fn steps<'a>(json: Option<&'a Json>, list: &str) -> Vec<&'a Json> {
    match json {
        None | Some(Json::Null) => Vec::new(),
        Some(step) => match step[list].as_array() {
            Some(steps) => steps.iter().collect(),
            None => vec![step],
        },
    }
}

fn is_prepend(step: &Json) -> bool {
    step["type"] == "Prepend" && step["prepend"] == SPACE_SYMBOL.to_string()
}

fn is_replace(step: &Json) -> bool {
    step["type"] == "Replace"
        && step["pattern"]["String"] == " "
        && step["content"] == SPACE_SYMBOL.to_string()
}

/// Scores with which SentencePiece merges as `merges` do.
pub(super) fn scores(
    tokens: &[String],
    types: &[i32],
    merges: &[(String, String)],
) -> Result<Vec<f32>, TokenizerFileError> {
    let normal: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| types[*id] == NORMAL)
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut order = Vec::new(); // Tokens that are made, the earliest first.
    let mut is_made = HashSet::new();
    let mut pairs = HashSet::new();
    for (idx, (left, right)) in merges.iter().enumerate() {
        let token = format!("{left}{right}");
        let parts = [left, right].map(|part| normal.contains_key(part.as_str()));
        let Some(&id) = normal.get(token.as_str()).filter(|_| parts == [true; 2]) else {
            // Text is never a control token, whatever the merges say.
            if tokens.contains(&token) && parts == [true; 2] {
                continue;
            }
            return Err(TokenizerFileError::Merge { idx });
        };
        pairs.insert((left.as_str(), right.as_str()));
        if order.last() != Some(&id) {
            if !is_made.insert(id) {
                return Err(TokenizerFileError::MergeOrder { token });
            }
            order.push(id);
        }
    }
    check_complete(&normal, &pairs)?;
    let mut scores = vec![0.0; tokens.len()];
    let others = (0..tokens.len()).filter(|id| types[*id] == NORMAL && !is_made.contains(id));
    for (rank, id) in order.iter().copied().chain(others).enumerate() {
        scores[id] = score(rank);
    }
    Ok(scores)
}

/// Whether every two pieces, or characters, that make a piece do so here.
fn check_complete(
    normal: &HashMap<&str, usize>,
    pairs: &HashSet<(&str, &str)>,
) -> Result<(), TokenizerFileError> {
    let is_symbol = |part: &str| normal.contains_key(part) || part.chars().nth(1).is_none();
    let mut tokens: Vec<(&usize, &&str)> = normal.iter().map(|(token, id)| (id, token)).collect();
    tokens.sort_unstable(); // The same answer every time.
    for (_, token) in tokens {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if is_symbol(left) && is_symbol(right) && !pairs.contains(&(left, right)) {
                let [left, right] = [left, right].map(str::to_owned);
                return Err(TokenizerFileError::MergeMissing { left, right });
            }
        }
    }
    Ok(())
}

/// The first has 0, the next -1, and so on. Vocabularies have at most two million tokens, which f32 tells apart.
#[expect(clippy::cast_precision_loss, reason = "exact below 2^24")]
fn score(rank: usize) -> f32 {
    -(rank as f32)
}
