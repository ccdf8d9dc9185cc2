//! Merging by score against its definition, and back again, on made-up vocabularies.

use std::ops::RangeInclusive;

use proptest::prelude::*;
use proptest::sample::select;

use super::super::{Detokenizer, Scheme, Special, Tokenizer, TokenizerOptions};
use super::*;

/// Three special tokens, all bytes, the pieces with their scores, and a user-defined token.
fn tokenizer_of(pieces: &[(&str, f32)], adds_space_prefix: bool) -> Tokenizer {
    let (tokens, kinds, scores) = parts(pieces);
    let tokens = tokens.iter().map(String::as_str);
    let options = TokenizerOptions { bos: Some(1), ..TokenizerOptions::default() };
    Tokenizer::from_pieces(tokens, kinds, scores, adds_space_prefix, options).unwrap()
}

fn parts(pieces: &[(&str, f32)]) -> (Vec<String>, Vec<TokenKind>, Vec<f32>) {
    let mut parts: Vec<(String, TokenKind, f32)> = vec![
        ("<unk>".to_owned(), TokenKind::Unknown, 0.0),
        ("<s>".to_owned(), TokenKind::Control, 0.0),
        ("</s>".to_owned(), TokenKind::Control, 0.0),
    ];
    parts.extend((0..=255_u8).map(|byte| (format!("<0x{byte:02X}>"), TokenKind::Byte, 0.0)));
    parts.extend(pieces.iter().map(|(text, score)| ((*text).to_owned(), TokenKind::Normal, *score)));
    parts.push(("<tool>".to_owned(), TokenKind::UserDefined, 0.0));
    let mut lists = (Vec::new(), Vec::new(), Vec::new());
    for (token, kind, score) in parts {
        lists.0.push(token);
        lists.1.push(kind);
        lists.2.push(score);
    }
    lists
}

/// Merging as it is defined: look at all pairs for the one that makes the best piece, again and again.
fn merge_by_definition(pieces: &[(String, f32)], text: &str) -> Vec<String> {
    let mut symbols: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let mut best: Option<(f32, usize)> = None;
        for (at, pair) in symbols.windows(2).enumerate() {
            let both = pair.concat();
            let score = pieces.iter().find(|(text, _)| *text == both).map(|(_, score)| *score);
            if let Some(score) = score
                && best.is_none_or(|(best, _)| score > best)
            {
                best = Some((score, at));
            }
        }
        let Some((_, at)) = best else { return symbols };
        let right = symbols.remove(at + 1);
        symbols[at].push_str(&right);
    }
}

/// Texts of the tokens, and the bytes of a character that has none as a text.
fn texts_of(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut texts: Vec<String> = Vec::new();
    let mut bytes = Vec::new();
    for id in ids {
        if tokenizer.kind(*id) == Some(TokenKind::Byte) {
            bytes.extend_from_slice(tokenizer.token_bytes(*id));
            if let Ok(c) = str::from_utf8(&bytes) {
                texts.push(c.to_owned());
                bytes.clear();
            }
        } else {
            texts.push(String::from_utf8(tokenizer.token_bytes(*id).to_vec()).unwrap());
        }
    }
    assert!(bytes.is_empty());
    texts
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let (mut detokenizer, mut text) = (Detokenizer::new(), String::new());
    ids.iter().for_each(|id| detokenizer.push(tokenizer, *id, &mut text));
    detokenizer.flush(&mut text);
    text
}

/// Few letters, so that pieces overlap in all ways; few scores, so that many are equal. Not every letter is a piece.
fn any_pieces(lens: RangeInclusive<usize>) -> impl Strategy<Value = Vec<(String, f32)>> {
    let letter = || select(vec!['a', 'b', '\u{2581}', '\u{e9}', '\u{4e2d}']);
    let text = prop::collection::vec(letter(), lens).prop_map(String::from_iter);
    let score = select(vec![0.0_f32, -0.0, -1.0, -2.0, -3.0, 1.5, -1e9]);
    prop::collection::btree_map(text, score, 0..40).prop_map(|pieces| pieces.into_iter().collect())
}

proptest! {
    #[test]
    fn merges_as_defined(
        pieces in any_pieces(1..=6), text in "[ab \u{e9}\u{4e2d}x]{0,40}", adds_space_prefix: bool
    ) {
        let borrowed: Vec<(&str, f32)> = pieces.iter().map(|(text, score)| (text.as_str(), *score)).collect();
        let tokenizer = tokenizer_of(&borrowed, adds_space_prefix);
        let ids = tokenizer.encode(&text, Special::AsText, false).unwrap();
        let spaced: Vec<(String, f32)> =
            pieces.iter().map(|(text, score)| (text.replace(SPACE_SYMBOL, " "), *score)).collect();
        let prefix = if adds_space_prefix && !text.is_empty() { " " } else { "" };
        prop_assert_eq!(texts_of(&tokenizer, &ids), merge_by_definition(&spaced, &format!("{prefix}{text}")));
    }

    #[test]
    fn decoding_undoes_encoding(
        pieces in any_pieces(1..=3), text in prop_oneof![any::<String>(), "[ab \u{e9}\n]{0,9}(<tool>)?[ ab]{0,9}"],
        adds_space_prefix: bool
    ) {
        let borrowed: Vec<(&str, f32)> = pieces.iter().map(|(text, score)| (text.as_str(), *score)).collect();
        let tokenizer = tokenizer_of(&borrowed, adds_space_prefix);
        let ids = tokenizer.encode(&text, Special::AsText, true).unwrap();
        prop_assert_eq!(decode(&tokenizer, &ids), text.replace(SPACE_SYMBOL, " "));
    }

    /// Whoever has the first tokens and their text goes on with the others, as after a worker's death.
    #[test]
    fn a_text_that_is_cut_anywhere_is_the_same(
        pieces in any_pieces(1..=3), text in "[ab \u{e9}\u{1f600}\n]{0,9}(<tool>)?[ ab\u{e9}]{0,9}", cut: usize
    ) {
        let borrowed: Vec<(&str, f32)> = pieces.iter().map(|(text, score)| (text.as_str(), *score)).collect();
        let tokenizer = tokenizer_of(&borrowed, true);
        let ids = tokenizer.encode(&text, Special::AsText, true).unwrap();
        let cut = cut % ids.len() + 1;
        // Replayed: the same detokenizer state, whatever was shown before.
        let (mut detokenizer, mut shown) = (Detokenizer::new(), String::new());
        ids[..cut].iter().for_each(|id| detokenizer.push(&tokenizer, *id, &mut shown));
        prop_assert!(text.starts_with(&shown), "{:?} is no start of {:?}", shown, text);
        let (mut again, mut rest) = (detokenizer.clone(), String::new());
        ids[cut..].iter().for_each(|id| again.push(&tokenizer, *id, &mut rest));
        again.flush(&mut rest);
        prop_assert_eq!(format!("{shown}{rest}"), text.as_str());
        // As an answer to the first tokens as a prompt, if these are whole characters.
        if str::from_utf8(&ids[..cut].iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect::<Vec<_>>()).is_ok() {
            let (mut answer, mut rest) = (Detokenizer::after(&tokenizer, ids[cut - 1]), String::new());
            ids[cut..].iter().for_each(|id| answer.push(&tokenizer, *id, &mut rest));
            answer.flush(&mut rest);
            prop_assert_eq!(shown + &rest, text);
        }
    }
}

#[test]
fn a_megabyte_is_no_way_to_wait() {
    let pieces = [
        ("\u{2581}", -9.0),
        ("a", -9.0),
        ("b", -9.0),
        ("aa", -1.0),
        ("aaaa", -2.0),
        ("aaaaaaaa", -2.0),
        ("ab", -3.0),
        ("\u{2581}\u{2581}", -4.0),
        ("b\u{2581}a", -5.0),
        ("\u{e9}", -6.0),
        ("\u{e9}\u{e9}", -7.0),
    ];
    let tokenizer = tokenizer_of(&pieces, true);
    let parsed = ["<tool>", "<s>"].map(|unit| (unit, Special::Parse));
    let plain = ["a", "ab", "b a", " ", "\u{e9}", "<", "\u{1f600}", "<tool>", "<s>"];
    for (unit, special) in plain.map(|unit| (unit, Special::AsText)).into_iter().chain(parsed) {
        let text = unit.repeat((1 << 20) / unit.len());
        let ids = tokenizer.encode(&text, special, false).unwrap();
        let expected = if (unit, special) == ("<s>", Special::Parse) { "" } else { &text };
        assert!(decode(&tokenizer, &ids) == expected, "{unit:?}");
    }
}

#[test]
fn a_piece_of_the_greatest_length_is_found_and_a_longer_one_refused() {
    let texts: Vec<String> = (0..=10).map(|log| "a".repeat(1 << log)).collect();
    let mut pieces: Vec<(&str, f32)> = texts.iter().map(|text| (text.as_str(), 0.0)).collect();
    let ids =
        tokenizer_of(&pieces, false).encode(&"a".repeat(PIECE_BYTES_MAX), Special::AsText, false).unwrap();
    assert_eq!(ids.len(), 1);
    let longer = "a".repeat(PIECE_BYTES_MAX + 1);
    pieces.push((&longer, 0.0));
    let (tokens, kinds, scores) = parts(&pieces);
    let tokens = tokens.iter().map(String::as_str);
    let error = Tokenizer::from_pieces(tokens, kinds, scores, true, TokenizerOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "token 270 has 1025 bytes, more than 1024");
}

#[test]
fn special_tokens_start_a_text_with_its_prefix() {
    let tokenizer = tokenizer_of(&[("\u{2581}", -9.0), ("a", -9.0), ("\u{2581}a", -1.0)], true);
    let [space, a, spaced_a] = [259, 260, 261];
    let encode = |text, special| tokenizer.encode(text, special, false).unwrap();
    assert_eq!(encode("<s>a<s> a</s>", Special::Parse), [1, spaced_a, 1, space, spaced_a, 2]);
    assert_eq!(encode("a<tool>a", Special::AsText), [spaced_a, 262, spaced_a]);
    assert_eq!(encode("aa", Special::AsText), [spaced_a, a]);
    assert_eq!(encode("", Special::AsText), Vec::<u32>::new());
    assert_eq!(tokenizer.encode("", Special::AsText, true).unwrap(), [1]);
    assert_eq!(
        tokenizer.encode_marked("<s>a\u{fdd0}<s>\u{fdd0}", '\u{fdd0}').unwrap(),
        encode("<s>a<s>", Special::Parse)
    );
    assert_eq!(tokenizer.control_token("</s>"), Some(2));
}

/// An answer: to a prompt that ends in text it goes on, after a control token it begins.
#[test]
fn the_prefix_is_dropped_where_a_text_begins() {
    let tokenizer = tokenizer_of(&[("\u{2581}", -9.0), ("a", -9.0), ("\u{2581}a", -1.0)], true);
    let [a, spaced_a] = [260, 261];
    let answer = |prompt_end: u32, ids: &[u32]| {
        let (mut detokenizer, mut text) = (Detokenizer::after(&tokenizer, prompt_end), String::new());
        ids.iter().for_each(|id| detokenizer.push(&tokenizer, *id, &mut text));
        detokenizer.flush(&mut text);
        text
    };
    assert_eq!(answer(a, &[spaced_a, spaced_a]), " a a");
    assert_eq!(answer(1, &[spaced_a, spaced_a]), "a a");
    assert_eq!(answer(1, &[2, spaced_a, 2, spaced_a]), "a a");
    assert_eq!(answer(1, &[262, spaced_a, 262, 262, a]), "<tool>a<tool><tool>a");
    let bytes = |text: &str| text.bytes().map(|byte| u32::from(byte) + 3).collect::<Vec<_>>();
    assert_eq!(answer(1, &bytes(" \u{1f600}")), " \u{1f600}", "sentencepiece puts no byte in front");
    assert_eq!(answer(a, &bytes(" \u{1f600}")[..4]), " \u{fffd}");
}

/// Nothing else than the 32,000 pieces of Llama 2 in size.
#[test]
fn a_vocabulary_of_the_real_size_is_small() {
    let texts: Vec<String> = (0..31_741_u32).map(|number| format!("\u{2581}{number:x}")).collect();
    let pieces: Vec<(&str, f32)> = texts.iter().map(|text| (text.as_str(), 0.0)).collect();
    let tokenizer = tokenizer_of(&pieces, true);
    let Scheme::SentencePiece { pieces, .. } = &tokenizer.scheme else { panic!("{tokenizer:?}") };
    let n_bytes = tokenizer.vocabulary.memory_bytes() + pieces.memory_bytes();
    assert!(n_bytes < 1 << 20, "{n_bytes} bytes");
}
