//! A byte-level BPE vocabulary of any size, made by rule: all bytes, merges of letters, Llama 3's special tokens.
//!
//! Every merge joins two tokens that exist, into a token that exists; as in published vocabularies, tokens can
//! be reached in several ways (280,147 merges for 127,744 merged tokens in the largest).

use std::collections::HashMap;

use crate::gguf::{GgufWriteError, GgufWriter};

/// Tokens, merges and special tokens.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    /// By id, in the alphabet of GPT-2 for bytes; the last `n_special` are control tokens.
    pub tokens: Vec<String>,
    /// `left right`, by rank.
    pub merges: Vec<String>,
    /// Control tokens at the end of `tokens`.
    pub n_special: usize,
}

const TOKEN_TYPE_NORMAL: i32 = 1;
const TOKEN_TYPE_CONTROL: i32 = 3;

/// Letters by how often English has them.
const LETTERS: &str = "etaoinshrdlcumwfgypbvkjxqz";

/// Role, trimmed text, end of turn: the format of the 2B-4T model's own tokenizer configuration.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ message['role'] | capitalize }}: \
    {{ message['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}";

impl Vocabulary {
    /// A vocabulary of exactly `n_vocab` tokens, at least [`super::N_VOCAB_MIN`].
    #[must_use]
    pub fn new(n_vocab: u32) -> Self {
        let n_vocab = n_vocab as usize;
        let n_special = if n_vocab >= 2048 { 256 } else { 16 };
        let mut tokens: Vec<String> = byte_alphabet().iter().map(char::to_string).collect();
        let mut ids: HashMap<String, usize> = HashMap::new();
        for (id, token) in tokens.iter().enumerate() {
            ids.insert(token.clone(), id);
        }
        let n_merged = n_vocab.saturating_sub(tokens.len() + n_special);
        let mut firsts = Vec::with_capacity(n_merged);
        for (left, right) in candidates() {
            if firsts.len() == n_merged {
                break;
            }
            let token = format!("{left}{right}");
            if ids.contains_key(&left) && ids.contains_key(&right) && !ids.contains_key(&token) {
                ids.insert(token.clone(), tokens.len());
                tokens.push(token);
                firsts.push((left, right));
            }
        }
        // More than 163,000 tokens: numbers, which never end.
        for number in 1000.. {
            if firsts.len() == n_merged {
                break;
            }
            let (left, right) = (format!("{}", number / 10), format!("{}", number % 10));
            ids.insert(format!("{left}{right}"), tokens.len());
            tokens.push(format!("{left}{right}"));
            firsts.push((left, right));
        }
        let merges = all_merges(&firsts, &ids);
        tokens.extend((0..n_special).map(special_token));
        Self { tokens, merges, n_special }
    }

    /// Writes `tokenizer.*` as the published 2B-4T file has it, in its order. As there, `tokenizer.ggml.pre` is
    /// missing, unless the architecture does not tell which one it is (`names_pre`).
    ///
    /// # Errors
    /// A key is there already.
    pub fn write_keys(&self, writer: &mut GgufWriter, names_pre: bool) -> Result<(), GgufWriteError> {
        let n_normal = self.tokens.len() - self.n_special;
        let mut types = vec![TOKEN_TYPE_NORMAL; n_normal];
        types.resize(self.tokens.len(), TOKEN_TYPE_CONTROL);
        writer.str("tokenizer.ggml.model", "gpt2")?;
        if names_pre {
            writer.str("tokenizer.ggml.pre", "llama-bpe")?;
        }
        writer.strings("tokenizer.ggml.tokens", self.tokens.iter().map(String::as_str))?;
        writer.f32s("tokenizer.ggml.scores", &vec![0.0; self.tokens.len()])?;
        writer.i32s("tokenizer.ggml.token_type", &types)?;
        writer.strings("tokenizer.ggml.merges", self.merges.iter().map(String::as_str))?;
        let bos = u32::try_from(n_normal).unwrap_or(u32::MAX);
        writer.u32("tokenizer.ggml.bos_token_id", bos)?;
        writer.u32("tokenizer.ggml.eos_token_id", bos + 1)?;
        writer.u32("tokenizer.ggml.padding_token_id", bos + 1)?;
        writer.str("tokenizer.chat_template", CHAT_TEMPLATE)
    }
}

/// The 256 characters that stand for bytes, in the order of their token ids: first those that stand for
/// themselves, then the others, from U+0100 on.
fn byte_alphabet() -> Vec<char> {
    let is_printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let printable = (0..=255_u8).filter(is_printable).map(char::from);
    let n_others = 256 - printable.clone().count();
    printable.chain(('\u{100}'..).take(n_others)).collect()
}

/// A space, in that alphabet.
const SPACE: &str = "\u{120}";

/// Pairs of tokens to merge, the most useful first.
fn candidates() -> impl Iterator<Item = (String, String)> {
    let letters = || LETTERS.chars().map(String::from);
    let upper = || LETTERS.to_uppercase().chars().map(String::from).collect::<Vec<_>>();
    let pairs: Vec<String> = letters().flat_map(|a| letters().map(move |b| format!("{a}{b}"))).collect();
    let triples: Vec<(String, String)> =
        pairs.iter().flat_map(|pair| letters().map(move |c| (pair.clone(), c))).collect();
    let syllables: Vec<String> = pairs.iter().filter(|pair| is_syllable(pair)).cloned().collect();
    let fours: Vec<(String, String)> =
        syllables.iter().flat_map(|a| syllables.iter().map(move |b| (a.clone(), b.clone()))).collect();
    let digits = || (0..10).map(|digit: u32| digit.to_string());
    let two_digits: Vec<(String, String)> =
        digits().flat_map(|a| digits().map(move |b| (a.clone(), b))).collect();
    let three_digits: Vec<(String, String)> =
        two_digits.iter().flat_map(|(a, b)| digits().map(move |c| (format!("{a}{b}"), c))).collect();
    let capitals: Vec<(String, String)> =
        upper().into_iter().flat_map(|a| letters().map(move |b| (a.clone(), b))).collect();
    let spaced = |list: &[(String, String)]| -> Vec<(String, String)> {
        list.iter().map(|(a, b)| (SPACE.to_owned(), format!("{a}{b}"))).collect()
    };
    let spaced_letters: Vec<(String, String)> = letters().map(|a| (SPACE.to_owned(), a)).collect();
    let spaced_pairs: Vec<(String, String)> =
        pairs.iter().map(|pair| (SPACE.to_owned(), pair.clone())).collect();
    let plain_pairs: Vec<(String, String)> =
        letters().flat_map(|a| letters().map(move |b| (a.clone(), b))).collect();
    let (spaced_capitals, spaced_triples, spaced_fours) =
        (spaced(&capitals), spaced(&triples), spaced(&fours));
    [
        spaced_letters,
        plain_pairs,
        spaced_pairs,
        two_digits,
        three_digits,
        capitals,
        spaced_capitals,
        triples,
        spaced_triples,
        fours,
        spaced_fours,
    ]
    .into_iter()
    .flatten()
}

fn is_syllable(pair: &str) -> bool {
    pair.chars().any(|letter| "aeiou".contains(letter))
}

/// Each token's first merge, and other ways to reach it, so that the count grows as in the published vocabulary.
fn all_merges(firsts: &[(String, String)], ids: &HashMap<String, usize>) -> Vec<String> {
    let n_wanted = firsts.len() * 280_147 / 127_744;
    let mut n_others_left = n_wanted - firsts.len();
    let mut merges = Vec::with_capacity(n_wanted);
    for (left, right) in firsts {
        merges.push(format!("{left} {right}"));
        let token = format!("{left}{right}");
        for (at, _) in token.char_indices().skip(1) {
            let (other_left, other_right) = token.split_at(at);
            let is_reachable = ids.contains_key(other_left) && ids.contains_key(other_right);
            if n_others_left > 0 && other_left != left && is_reachable {
                merges.push(format!("{other_left} {other_right}"));
                n_others_left -= 1;
            }
        }
    }
    merges
}

fn special_token(idx: usize) -> String {
    let fixed =
        ["begin_of_text", "end_of_text", "", "", "", "", "start_header_id", "end_header_id", "", "eot_id"];
    match fixed.get(idx) {
        Some(&name) if !name.is_empty() => format!("<|{name}|>"),
        // The reserved ones are numbered without the others.
        _ => {
            let n_named_before = fixed.iter().take(idx).filter(|name| !name.is_empty()).count();
            format!("<|reserved_special_token_{}|>", idx - n_named_before)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_largest_has_the_counts_and_special_tokens_of_llama_3() {
        let vocabulary = Vocabulary::new(128_256);
        assert_eq!(vocabulary.tokens.len(), 128_256);
        assert_eq!(vocabulary.merges.len(), 280_147);
        assert_eq!(vocabulary.tokens[128_000], "<|begin_of_text|>");
        assert_eq!(vocabulary.tokens[128_002], "<|reserved_special_token_0|>");
        assert_eq!(vocabulary.tokens[128_009], "<|eot_id|>");
        assert_eq!(vocabulary.tokens[128_010], "<|reserved_special_token_5|>");
        assert_eq!(vocabulary.tokens[128_255], "<|reserved_special_token_250|>");
    }

    #[test]
    fn every_merge_joins_tokens_into_a_token_and_none_is_twice() {
        for n_vocab in [272, 512, 2048, 128_256, 170_000] {
            let vocabulary = Vocabulary::new(n_vocab);
            assert_eq!(vocabulary.tokens.len(), n_vocab as usize);
            let tokens: HashSet<&str> = vocabulary.tokens.iter().map(String::as_str).collect();
            assert_eq!(tokens.len(), vocabulary.tokens.len(), "a token is there twice");
            let mut reached = HashSet::new();
            for merge in &vocabulary.merges {
                let (left, right) = merge.split_once(' ').unwrap();
                assert!(tokens.contains(left) && tokens.contains(right), "{merge}");
                let joined = format!("{left}{right}");
                assert!(tokens.contains(joined.as_str()), "{merge}");
                reached.insert(joined);
            }
            let merges: HashSet<&String> = vocabulary.merges.iter().collect();
            assert_eq!(merges.len(), vocabulary.merges.len(), "a merge is there twice");
            assert_eq!(reached.len() + 256 + vocabulary.n_special, vocabulary.tokens.len());
        }
    }
}
