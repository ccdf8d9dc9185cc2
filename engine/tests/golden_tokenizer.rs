//! Token ids, splits and character classes against those of the `tokenizers` library (`tests/golden`).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitnetd_engine::chat::ChatTemplate;
use bitnetd_engine::gguf::Gguf;
use bitnetd_engine::mapping::Mapping;
use bitnetd_engine::tokenizer::{
    Detokenizer, PreTokenizer, Special, Splitting, TokenKind, Tokenizer, TokenizerOptions,
};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn strings_of(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect()
}

/// A tokenizer from a Hugging Face `tokenizer.json`, as far as the golden ones go.
fn from_tokenizer_json(path: &Path) -> Tokenizer {
    let spec = read_json(path);
    let vocab = spec["model"]["vocab"].as_object().unwrap();
    let added = spec["added_tokens"].as_array().unwrap();
    let n_vocab =
        vocab.values().chain(added.iter().map(|t| &t["id"])).map(|id| id.as_u64().unwrap()).max().unwrap()
            + 1;
    let mut tokens = vec![String::new(); usize::try_from(n_vocab).unwrap()];
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    for (text, id) in vocab {
        tokens[usize::try_from(id.as_u64().unwrap()).unwrap()] = text.clone();
    }
    for token in added {
        let id = usize::try_from(token["id"].as_u64().unwrap()).unwrap();
        tokens[id] = token["content"].as_str().unwrap().to_owned();
        kinds[id] = TokenKind::Control;
    }
    let merges: Vec<String> =
        spec["model"]["merges"].as_array().unwrap().iter().map(|pair| strings_of(pair).join(" ")).collect();
    let splitting = Splitting { pre_tokenizer: PreTokenizer::LlamaBpe, ignore_merges: true };
    let (tokens, merges) = (tokens.iter().map(String::as_str), merges.iter().map(String::as_str));
    Tokenizer::from_merges(tokens, kinds, merges, splitting, TokenizerOptions::default()).unwrap()
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let (mut detokenizer, mut text) = (Detokenizer::new(), String::new());
    ids.iter().for_each(|id| detokenizer.push(tokenizer, *id, &mut text));
    detokenizer.flush(&mut text);
    text
}

#[track_caller]
fn assert_golden(tokenizer: &Tokenizer, file: &str) {
    let golden = read_json(&golden(file));
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 400, "{} cases", cases.len());
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let parsed = ids_of(&case["ids"]);
        assert_eq!(tokenizer.encode(text, Special::Parse, false).unwrap(), parsed, "{text:?}");
        let plain = case.get("ids_as_text").map_or_else(|| parsed.clone(), ids_of);
        assert_eq!(tokenizer.encode(text, Special::AsText, false).unwrap(), plain, "as text: {text:?}");
        let decoded = case.get("decoded").map_or(text, |decoded| decoded.as_str().unwrap());
        assert_eq!(decode(tokenizer, &parsed), decoded);
        assert_eq!(decode(tokenizer, &plain), text);
    }
}

#[test]
fn tiny_tokenizer_gives_the_ids_of_tokenizers() {
    assert_golden(&from_tokenizer_json(&golden("tiny/tokenizer.json")), "tokenizer_tiny.json");
}

/// The pieces that the script trained, and its user-defined token.
fn from_golden_pieces(golden: &Value, adds_space_prefix: bool) -> Tokenizer {
    let pieces = golden["pieces"].as_array().unwrap();
    let kind_of = |piece: &Value| i32::try_from(piece[2].as_i64().unwrap()).ok().and_then(TokenKind::from_id);
    let tokens = pieces.iter().map(|piece| piece[0].as_str().unwrap()).chain(["<tool>"]);
    let kinds = pieces.iter().map(|piece| kind_of(piece).unwrap()).chain([TokenKind::UserDefined]).collect();
    #[expect(clippy::cast_possible_truncation, reason = "they were f32 before they were text")]
    let scores = pieces.iter().map(|piece| piece[1].as_f64().unwrap() as f32).chain([0.0]).collect();
    Tokenizer::from_pieces(tokens, kinds, scores, adds_space_prefix, TokenizerOptions::default()).unwrap()
}

#[test]
fn pieces_give_the_ids_of_sentencepiece_and_tokenizers() {
    let golden = read_json(&golden("tokenizer_spm.json"));
    let (tokenizer, bare) = (from_golden_pieces(&golden, true), from_golden_pieces(&golden, false));
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 500, "{} cases", cases.len());
    for (case, ids_without_prefix) in cases.iter().zip(golden["ids_without_prefix"].as_array().unwrap()) {
        let text = case["text"].as_str().unwrap();
        let ids = ids_of(&case["ids"]);
        // sentencepiece knows of no token that was added later; tokenizers does.
        let plain = case.get("ids_as_text").map_or_else(|| ids.clone(), ids_of);
        let parsed = case.get("ids_parsed").map_or_else(|| plain.clone(), ids_of);
        assert_eq!(tokenizer.encode(text, Special::AsText, false).unwrap(), plain, "as text: {text:?}");
        assert_eq!(tokenizer.encode(text, Special::Parse, false).unwrap(), parsed, "{text:?}");
        let decoded = case.get("decoded").map_or(text, |decoded| decoded.as_str().unwrap());
        assert_eq!(
            (decode(&tokenizer, &ids), decode(&tokenizer, &plain)),
            (decoded.to_owned(), decoded.to_owned())
        );
        if plain == ids {
            let ids = bare.encode(text, Special::AsText, false).unwrap();
            assert_eq!(ids, ids_of(ids_without_prefix), "without prefix: {text:?}");
            assert_eq!(decode(&bare, &ids), decoded);
        }
    }
}

#[test]
fn tokens_that_a_model_chooses_are_the_text_of_sentencepiece() {
    let golden = read_json(&golden("tokenizer_spm.json"));
    let tokenizer = from_golden_pieces(&golden, true);
    let sampled = golden["sampled"].as_array().unwrap();
    assert!(sampled.len() >= 60, "{} cases", sampled.len());
    for case in sampled {
        assert_eq!(decode(&tokenizer, &ids_of(&case[0])), case[1].as_str().unwrap(), "{}", case[0]);
    }
}

#[test]
fn gpt2_splits_are_those_of_tokenizers() {
    let golden = read_json(&golden("splits_gpt2.json"));
    let (texts, splits) = (golden["texts"].as_array().unwrap(), golden["splits"].as_array().unwrap());
    assert!(texts.len() > 400 && texts.len() == splits.len());
    for (text, expected) in texts.iter().zip(splits) {
        let found: Vec<&str> = PreTokenizer::Gpt2.split(text.as_str().unwrap()).collect();
        assert_eq!(found, strings_of(expected));
    }
}

/// The Unicode version of `tokenizers` may be another than ours; then only code points that one of the two does not
/// know may differ.
#[test]
fn character_classes_are_those_of_tokenizers() {
    let golden = read_json(&golden("unicode_classes.json"));
    let mut differences = Vec::new();
    for class in ["letter", "number", "space"] {
        let mut is_member = vec![false; 0x11_0000];
        for range in golden[class].as_array().unwrap() {
            let [first, last] = ids_of(range)[..] else { panic!("{range}") };
            is_member[first as usize..=last as usize].fill(true);
        }
        for c in '\0'..=char::MAX {
            let ours = PreTokenizer::class_name(c) == class;
            if ours != is_member[c as usize] {
                differences.push((class, u32::from(c)));
            }
        }
    }
    assert!(differences.is_empty(), "{} code points: {differences:x?}", differences.len());
}

#[test]
fn story_tokenizer_gives_the_ids_of_tokenizers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf");
    let gguf = Gguf::parse(Arc::new(Mapping::open(&path).unwrap())).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    assert_golden(&tokenizer, "tokenizer_story.json");
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (Some(0), Some(1), true));
    assert_eq!(tokenizer.end_tokens(), [1, 2]);
    assert!(ChatTemplate::from_gguf(&gguf).unwrap().is_none());
}
