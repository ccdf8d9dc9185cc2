//! Merging, special tokens and parts that do not fit, on made-up vocabularies.

use proptest::prelude::*;

use super::byte_level::char_of_byte;
use super::merge::MergeScratch;
use super::merges::Merges;
use super::*;

const GPT2: Splitting = Splitting { pre_tokenizer: PreTokenizer::Gpt2, ignore_merges: false };

/// All bytes, then what `merges` make, then the special tokens.
fn tokenizer_of(merges: &[&str], specials: &[(&str, TokenKind)]) -> Tokenizer {
    let mut tokens: Vec<String> = (0..=255).map(|byte| char_of_byte(byte).to_string()).collect();
    tokens.extend(merges.iter().map(|merge| merge.replacen(' ', "", 1)));
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    tokens.extend(specials.iter().map(|(text, _)| (*text).to_owned()));
    kinds.extend(specials.iter().map(|(_, kind)| *kind));
    let splitting = Splitting { pre_tokenizer: PreTokenizer::LlamaBpe, ignore_merges: true };
    let options = TokenizerOptions {
        bos: (0..).zip(&tokens).find(|(_, text)| *text == "<s>").map(|(id, _)| id),
        adds_bos: true,
        ..TokenizerOptions::default()
    };
    let (tokens, merges) = (tokens.iter().map(String::as_str), merges.iter().copied());
    Tokenizer::from_merges(tokens, kinds, merges, splitting, options).unwrap()
}

/// Merging as it is defined: find the best pair by looking at all of them, again and again.
fn merge_by_definition(vocabulary: &Vocabulary, merges: &Merges, piece: &[u8]) -> Vec<u32> {
    let mut ids: Vec<u32> = piece.iter().map(|byte| vocabulary.byte_token(*byte)).collect();
    loop {
        let ranked = ids.windows(2).enumerate().filter_map(|(at, w)| Some((merges.rank(w[0], w[1])?, at)));
        let Some((rank, at)) = ranked.min() else { return ids };
        ids[at] = merges.merge(rank).result;
        ids.remove(at + 1);
    }
}

const MERGES: [&str; 12] =
    ["a b", "a a", "b a", "ab a", "aa aa", "ab ab", "b b", "aba b", "c a", "ca b", "bb a", "aaaa a"];

proptest! {
    #[test]
    fn merges_as_defined(piece in prop::collection::vec(prop::sample::select(b"aaabbcd".to_vec()), 1..60)) {
        let tokenizer = tokenizer_of(&MERGES, &[]);
        let Tokenizer { vocabulary, scheme: Scheme::ByteLevel { merges, .. }, .. } = &tokenizer else {
            panic!("{tokenizer:?}")
        };
        let mut found = Vec::new();
        merges.encode(vocabulary, &piece, &mut MergeScratch::default(), &mut found);
        prop_assert_eq!(found, merge_by_definition(vocabulary, merges, &piece));
    }

    #[test]
    fn decoding_undoes_encoding(text in any::<String>()) {
        let tokenizer = tokenizer_of(&MERGES, &[]);
        let ids = tokenizer.encode(&text, Special::AsText, false).unwrap();
        let (mut detokenizer, mut decoded) = (Detokenizer::new(), String::new());
        ids.iter().for_each(|id| detokenizer.push(&tokenizer, *id, &mut decoded));
        detokenizer.flush(&mut decoded);
        prop_assert_eq!(decoded, text);
    }
}

#[test]
fn a_megabyte_without_a_space_is_no_way_to_wait() {
    let tokenizer = tokenizer_of(&MERGES, &[("<|", TokenKind::Control), ("<|<|<|x", TokenKind::Control)]);
    for unit in ["a", "ab", "<", "<|", "!", " ", "é"] {
        let text = unit.repeat((1 << 20) / unit.len());
        for special in [Special::AsText, Special::Parse] {
            let ids = tokenizer.encode(&text, special, false).unwrap();
            assert_eq!(ids.iter().map(|id| tokenizer.token_bytes(*id).len()).sum::<usize>(), text.len());
        }
    }
}

#[test]
fn special_tokens_are_leftmost_longest_and_only_when_asked() {
    let kinds = [
        ("<s>", TokenKind::Control),
        ("<|x", TokenKind::Control),
        ("<|x|>", TokenKind::Control),
        ("<|x|>y", TokenKind::UserDefined),
        ("é!", TokenKind::UserDefined),
    ];
    let tokenizer = tokenizer_of(&[], &kinds);
    let texts = |text, special| {
        let ids = tokenizer.encode(text, special, false).unwrap();
        ids.iter()
            .map(|id| String::from_utf8_lossy(tokenizer.token_bytes(*id)).into_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(texts("a<|x|<|x|>b", Special::Parse), ["a", "<|x", "|", "<|x|>", "b"]);
    assert_eq!(texts("<|x|>yé!<s", Special::Parse), ["<|x|>y", "é!", "<", "s"]);
    assert_eq!(texts("<|x|>yé!", Special::AsText), ["<|x|>y", "é!"]);
    assert_eq!(texts("<|x|>", Special::AsText), ["<", "|", "x", "|", ">"]);
    assert_eq!(tokenizer.encode("a", Special::Parse, true).unwrap(), [256, u32::from(b'a') - 33 + 33]);
}

#[test]
fn marks_keep_special_tokens_apart_and_vanish() {
    let tokenizer = tokenizer_of(&["a b"], &[("<|x|>", TokenKind::Control)]);
    let marked = tokenizer.encode_marked("<|x|>a\u{fdd0}b<\u{fdd0}|x|>", '\u{fdd0}').unwrap();
    let mut expected = tokenizer.encode("<|x|>", Special::Parse, false).unwrap();
    expected.extend(tokenizer.encode("ab<|x|>", Special::AsText, false).unwrap());
    assert_eq!(marked, expected);
}

#[test]
fn ends_are_known_by_name_only_among_control_tokens() {
    let tokenizer =
        tokenizer_of(&[], &[("<|eot_id|>", TokenKind::Control), ("<|im_end|>", TokenKind::Control)]);
    assert_eq!(tokenizer.end_tokens(), [256, 257]);
    assert!(tokenizer.is_end_of_generation(256) && !tokenizer.is_end_of_generation(0));
    assert_eq!(tokenizer.control_token("<|eot_id|>"), Some(256));
    assert_eq!(tokenizer.control_token("<|eot_id|>x"), None);
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let bytes: Vec<String> = (0..=255).map(|byte| char_of_byte(byte).to_string()).collect();
    let build = |tokens: Vec<&str>, kinds: Vec<TokenKind>, merges: &[&str], bos| {
        let options = TokenizerOptions { bos, ..TokenizerOptions::default() };
        Tokenizer::from_merges(tokens.into_iter(), kinds, merges.iter().copied(), GPT2, options)
            .map(|_| ())
            .unwrap_err()
    };
    let all = || bytes.iter().map(String::as_str).collect::<Vec<_>>();
    let text = |error: TokenizerError| error.to_string();
    assert_eq!(text(build(all()[1..].to_vec(), vec![], &[], None)), "no token stands for the byte 0x00");
    let merge = "merge 0 (`a b`) is not of two tokens whose concatenation is a token";
    assert_eq!(text(build(all(), vec![], &["a b"], None)), merge);
    assert!(text(build(all(), vec![], &["ab"], None)).starts_with("merge 0 (`ab`)"));
    assert_eq!(
        text(build(all(), vec![TokenKind::Normal], &[], None)),
        "`tokenizer.ggml.token_type` has 1 entries for 256 tokens"
    );
    assert_eq!(
        text(build(all(), vec![], &[], Some(256))),
        "`tokenizer.ggml.bos_token_id` is 256, but there are 256 tokens"
    );
    for len in [SPECIAL_TOKEN_BYTES_MAX, SPECIAL_TOKEN_BYTES_MAX + 1] {
        let long = "x".repeat(len);
        let mut tokens = all();
        tokens.push(&long);
        let mut kinds = vec![TokenKind::Normal; 256];
        kinds.push(TokenKind::Control);
        let none = std::iter::empty();
        let result =
            Tokenizer::from_merges(tokens.into_iter(), kinds, none, GPT2, TokenizerOptions::default());
        assert_eq!(result.is_ok(), len == SPECIAL_TOKEN_BYTES_MAX, "{result:?}");
    }
}
