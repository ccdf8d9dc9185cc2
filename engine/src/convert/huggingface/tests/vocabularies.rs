//! SentencePiece vocabularies of checkpoints: `tokenizer.json`, `tokenizer.model`, and what must be refused.

use super::*;
use crate::tokenizer::{Special, Tokenizer};

/// What the golden vocabulary has; the model has more rows.
const N_TOKENS: u32 = 639;
const N_ROWS: usize = 650;

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/spm").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A checkpoint with the golden vocabulary as `tokenizer.json`.
fn source_with_pieces() -> Source {
    let mut source = source();
    source.config["vocab_size"] = json!(N_ROWS);
    source.config["bos_token_id"] = json!(1);
    source.config["eos_token_id"] = json!(2);
    source.config["pad_token_id"] = json!(640);
    let embedding = floats(&[N_ROWS, N_EMBD], |at| weight(at) / 8.0);
    source.tensors.insert("model.embed_tokens.weight".to_owned(), embedding);
    source.tokenizer = serde_json::from_slice(&golden("tokenizer.json")).unwrap();
    source
}

/// The same as `tokenizer.model`, with the user-defined token beside.
fn source_with_model() -> Source {
    let mut source = source_with_pieces();
    source.tokenizer = Json::Null;
    source.files.insert("tokenizer.model", golden("tokenizer.model"));
    source.files.insert("added_tokens.json", br#"{"<tool>": 639, "<pad>": 640}"#.to_vec());
    source
}

/// Fields of the protocol buffer: the tag with its wire type, then the value.
fn with_fields(path: &[u8], fields: &[u8]) -> Vec<u8> {
    // Messages of the same field are merged, so that a later value counts.
    let mut model = golden("tokenizer.model");
    model.extend_from_slice(path);
    model.push(u8::try_from(fields.len()).unwrap());
    model.extend_from_slice(fields);
    model
}

const TRAINER: [u8; 1] = [2 << 3 | 2];
const NORMALIZER: [u8; 1] = [3 << 3 | 2];

#[test]
fn both_files_become_the_same_vocabulary() {
    let texts = ["", "Once upon a time", " a  b\n\u{2581}", "\u{e9}\u{1f600}<tool> x</s>"];
    let json = source_with_pieces().convert().unwrap();
    let model = source_with_model().convert().unwrap();
    let [from_json, from_model] = [&json, &model].map(|gguf| Tokenizer::from_gguf(gguf).unwrap());
    assert_eq!(from_json.describe(), "SentencePiece BPE");
    for tokenizer in [&from_json, &from_model] {
        assert_eq!(tokenizer.n_vocab(), N_ROWS);
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (Some(1), Some(2), true));
        assert_eq!(tokenizer.control_token("<tool>"), Some(N_TOKENS));
    }
    for text in texts {
        for special in [Special::AsText, Special::Parse] {
            let ids = from_json.encode(text, special, true).unwrap();
            assert_eq!(ids, from_model.encode(text, special, true).unwrap(), "{text:?}");
        }
    }
    let types = |gguf: &Gguf| {
        let types = gguf.metadata().i32s("tokenizer.ggml.token_type").unwrap().unwrap();
        [0, 1, 3, 300, 639, 641].map(|idx| types.get(idx).unwrap())
    };
    assert_eq!((types(&json), types(&model)), ([2, 3, 6, 1, 4, 5], [2, 3, 6, 1, 4, 5]));
    let pad = |gguf: &Gguf| gguf.metadata().i32s("tokenizer.ggml.token_type").unwrap().unwrap().get(640);
    assert_eq!((pad(&json), pad(&model)), (Some(5), Some(3)));
    assert_eq!(json.metadata().u32("tokenizer.ggml.unknown_token_id").unwrap(), Some(0));
}

#[test]
fn the_space_in_front_is_read_from_either_spelling() {
    /// Whether there is one, and the change that says so.
    type Case = (bool, fn(&mut Source));
    let cases: [Case; 6] = [
        (true, |_| {}),
        (false, |source| {
            let replace = source.tokenizer["normalizer"]["normalizers"][1].take();
            source.tokenizer["normalizer"] = replace;
        }),
        (true, |source| use_metaspace(source, json!({"prepend_scheme": "first", "split": false}))),
        (true, |source| use_metaspace(source, json!({"add_prefix_space": true, "split": false}))),
        (false, |source| use_metaspace(source, json!({"prepend_scheme": "never", "split": false}))),
        (false, |source| {
            *source = source_with_model();
            source.files.insert("tokenizer.model", with_fields(&NORMALIZER, &[3 << 3, 0]));
        }),
    ];
    for (idx, (expected, change)) in cases.into_iter().enumerate() {
        let mut source = source_with_pieces();
        change(&mut source);
        let gguf = source.convert().unwrap_or_else(|error| panic!("case {idx}: {error}"));
        assert_eq!(Tokenizer::from_gguf(&gguf).unwrap().adds_space_prefix(), expected, "case {idx}");
    }
}

fn use_metaspace(source: &mut Source, mut options: Json) {
    options["type"] = json!("Metaspace");
    options["replacement"] = json!("\u{2581}");
    source.tokenizer["normalizer"] = Json::Null;
    source.tokenizer["pre_tokenizer"] = options;
}

#[test]
fn checkpoints_of_1bit_llm_have_the_graph_of_bitnet() {
    let mut source = source_with_model();
    source.config["model_type"] = json!("llama");
    source.config["architectures"] = json!(["BitnetForCausalLM"]);
    source.config["hidden_act"] = json!("silu");
    let config = source.config.as_object_mut().unwrap();
    config.remove("quantization_config");
    let gguf = source.convert().unwrap();
    assert_eq!(gguf.metadata().str("general.architecture").unwrap(), Some("bitnet"));
    assert_eq!(verify(&Arc::new(gguf), &mut |_| ()).problems, []);
}

#[test]
fn vocabularies_that_cannot_be_had_are_named() {
    /// What the message says, and the change that causes it.
    type Case = (&'static str, fn(&mut Source));
    let cases: [Case; 14] = [
        ("the model is `Unigram`", |source| source.tokenizer["model"]["type"] = json!("Unigram")),
        ("`normalizer` is `NFC`", |source| source.tokenizer["normalizer"] = json!({"type": "NFC"})),
        ("`pre_tokenizer` is `Whitespace`", |source| {
            source.tokenizer["pre_tokenizer"] = json!({"type": "Whitespace"});
        }),
        ("expected `Metaspace` with `split` false", |source| {
            use_metaspace(source, json!({"prepend_scheme": "always"}));
        }),
        ("`ignore_merges` is true", |source| source.tokenizer["model"]["ignore_merges"] = json!(true)),
        ("no merge makes the token `th` of `t` and `h`", |source| {
            let merges = source.tokenizer["model"]["merges"].as_array_mut().unwrap();
            merges.retain(|merge| *merge != json!(["t", "h"]));
        }),
        ("merges into the token `aa` stand in two places", |source| {
            let merges = source.tokenizer["model"]["merges"].as_array_mut().unwrap();
            merges.push(json!(["a", "a"]));
        }),
        ("merge number 0 is not a pair of tokens", |source| {
            source.tokenizer["model"]["merges"][0] = json!(["t", "nothing"]);
        }),
        ("no token of type 6 (byte) for `<0x41>`", |source| {
            source.tokenizer["model"]["vocab"].as_object_mut().unwrap().remove("<0x41>");
        }),
        ("tokenizer.model: it is not the protocol buffer of SentencePiece", |source| {
            *source = source_with_model();
            source.files.insert("tokenizer.model", b"Dear diary".to_vec());
        }),
        ("the model is `Unigram of SentencePiece`", |source| {
            *source = source_with_model();
            source.files.insert("tokenizer.model", with_fields(&TRAINER, &[3 << 3, 1]));
        }),
        ("`normalizer_spec.precompiled_charsmap` is 2 bytes", |source| {
            *source = source_with_model();
            source.files.insert("tokenizer.model", with_fields(&NORMALIZER, &[2 << 3 | 2, 2, 0, 0]));
        }),
        ("`normalizer_spec.remove_extra_whitespaces` is true: expected false", |source| {
            *source = source_with_model();
            source.files.insert("tokenizer.model", with_fields(&NORMALIZER, &[4 << 3, 1]));
        }),
        ("the id 500, the model has 500 tokens", |source| {
            *source = source_with_model();
            source.config["vocab_size"] = json!(500);
        }),
    ];
    for (expected, spoil) in cases {
        let mut source = source_with_pieces();
        spoil(&mut source);
        let text = source.convert().expect_err(expected);
        assert!(text.contains(expected), "expected `{expected}` in `{text}`");
    }
}
