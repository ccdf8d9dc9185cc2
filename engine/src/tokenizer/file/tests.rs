//! Tokenizers of whole files: what is read, what is refused.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::{Detokenizer, Scheme, Special};
use super::*;
use crate::convert::synth::Vocabulary as SynthVocabulary;
use crate::gguf::GgufWriter;
use crate::mapping::Mapping;

fn parse(writer: GgufWriter) -> Gguf {
    let mut bytes = Vec::new();
    writer.start(&mut bytes).unwrap().finish().unwrap();
    Gguf::parse(Arc::new(Mapping::from_bytes(bytes).unwrap())).unwrap()
}

/// A file with a made-up vocabulary and what `edit` adds.
fn file_of(n_vocab: u32, architecture: &str, edit: impl FnOnce(&mut GgufWriter)) -> Gguf {
    let mut writer = GgufWriter::new();
    writer.str("general.architecture", architecture).unwrap();
    SynthVocabulary::new(n_vocab).write_keys(&mut writer, false).unwrap();
    edit(&mut writer);
    parse(writer)
}

const LLAMA: Splitting = Splitting { pre_tokenizer: PreTokenizer::LlamaBpe, ignore_merges: true };

fn splitting(tokenizer: &Tokenizer) -> Splitting {
    match &tokenizer.scheme {
        Scheme::ByteLevel { splitting, .. } => *splitting,
        Scheme::SentencePiece { .. } => panic!("{tokenizer:?}"),
    }
}

#[track_caller]
fn assert_refused(gguf: &Gguf, expected: &str) {
    assert_eq!(Tokenizer::from_gguf(gguf).unwrap_err().to_string(), expected);
}

#[test]
fn published_files_name_no_pre_tokenizer() {
    let tokenizer = Tokenizer::from_gguf(&file_of(2304, "bitnet-b1.58", |_| {})).unwrap();
    assert_eq!(splitting(&tokenizer), LLAMA);
    assert!(tokenizer.adds_bos());
    assert_eq!((tokenizer.n_vocab(), tokenizer.bos(), tokenizer.eos()), (2304, Some(2048), Some(2049)));
    let eot = tokenizer.control_token("<|eot_id|>").unwrap();
    assert_eq!(tokenizer.end_tokens(), [2049, eot]);
    assert_refused(
        &file_of(2304, "llama", |_| {}),
        "metadata key `tokenizer.ggml.pre` is missing, and a vocabulary of 2304 tokens does not tell",
    );
}

#[test]
fn pre_tokenizers_are_known_by_name() {
    let file = |pre: &str, adds_bos: Option<bool>| {
        file_of(2304, "llama", |writer| {
            writer.str("tokenizer.ggml.pre", pre).unwrap();
            if let Some(adds_bos) = adds_bos {
                writer.bool("tokenizer.ggml.add_bos_token", adds_bos).unwrap();
            }
        })
    };
    for pre in ["llama-bpe", "llama3", "falcon3"] {
        let tokenizer = Tokenizer::from_gguf(&file(pre, None)).unwrap();
        assert!(splitting(&tokenizer) == LLAMA && tokenizer.adds_bos(), "{pre}");
    }
    assert!(!Tokenizer::from_gguf(&file("llama-bpe", Some(false))).unwrap().adds_bos());
    let gpt2 = Tokenizer::from_gguf(&file("gpt-2", None)).unwrap();
    let merges_only = Splitting { pre_tokenizer: PreTokenizer::Gpt2, ignore_merges: false };
    assert!(splitting(&gpt2) == merges_only && !gpt2.adds_bos());
    assert_refused(
        &file("qwen2", None),
        "pre-tokenizer `qwen2` is not supported, only `llama-bpe` (and its aliases) and `gpt-2`",
    );
}

#[test]
fn files_without_a_usable_tokenizer_are_refused() {
    assert_refused(&parse(GgufWriter::new()), "metadata key `tokenizer.ggml.model` is missing");
    let mut writer = GgufWriter::new();
    writer.str("tokenizer.ggml.model", "t5").unwrap();
    assert_refused(
        &parse(writer),
        "tokenizer model `t5` is not supported, only `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE)",
    );
    let mut writer = GgufWriter::new();
    writer.str("tokenizer.ggml.model", "gpt2").unwrap();
    assert_refused(&parse(writer), "metadata key `tokenizer.ggml.tokens` is missing");
    let with_types = |types: &[i32]| {
        let mut writer = GgufWriter::new();
        writer.str("tokenizer.ggml.model", "gpt2").unwrap();
        writer.strings("tokenizer.ggml.tokens", ["a", "b"].into_iter()).unwrap();
        writer.strings("tokenizer.ggml.merges", [].into_iter()).unwrap();
        writer.i32s("tokenizer.ggml.token_type", types).unwrap();
        writer.str("tokenizer.ggml.pre", "llama-bpe").unwrap();
        parse(writer)
    };
    assert_refused(&with_types(&[1, 7]), "token 1 has the unknown type 7");
    assert_refused(&with_types(&[1]), "`tokenizer.ggml.token_type` has 1 entries for 2 tokens");
    assert_refused(&with_types(&[1, 1]), "no token stands for the byte 0x00");
    assert_refused(
        &file_of(2304, "bitnet", |writer| writer.u32("tokenizer.ggml.eot_token_id", 2304).unwrap()),
        "`tokenizer.ggml.eot_token_id` is 2304, but there are 2304 tokens",
    );
}

/// 128,256 tokens and 280,147 merges, as Llama 3 has.
#[test]
fn a_vocabulary_of_the_real_size_is_small() {
    let tokenizer = Tokenizer::from_gguf(&file_of(128_256, "bitnet-b1.58", |_| {})).unwrap();
    assert_eq!(tokenizer.n_vocab(), 128_256);
    let Scheme::ByteLevel { merges, .. } = &tokenizer.scheme else { panic!("{tokenizer:?}") };
    let n_bytes = tokenizer.vocabulary.memory_bytes() + merges.memory_bytes();
    assert!(n_bytes < 7 << 20, "{n_bytes} bytes");
}

/// A file with a SentencePiece vocabulary; `edit` has the keys before they are written.
fn pieces_file(edit: impl FnOnce(&mut PieceKeys)) -> Gguf {
    let mut keys = PieceKeys::new();
    edit(&mut keys);
    let mut writer = GgufWriter::new();
    writer.str("tokenizer.ggml.model", "llama").unwrap();
    writer.strings("tokenizer.ggml.tokens", keys.tokens.iter().map(String::as_str)).unwrap();
    if let Some(scores) = &keys.scores {
        writer.f32s("tokenizer.ggml.scores", scores).unwrap();
    }
    if let Some(types) = &keys.types {
        writer.i32s("tokenizer.ggml.token_type", types).unwrap();
    }
    for (key, truth) in keys.bools {
        writer.bool(key, truth).unwrap();
    }
    for (key, id) in keys.ids {
        writer.u32(key, id).unwrap();
    }
    parse(writer)
}

struct PieceKeys {
    tokens: Vec<String>,
    scores: Option<Vec<f32>>,
    types: Option<Vec<i32>>,
    bools: Vec<(&'static str, bool)>,
    ids: Vec<(&'static str, u32)>,
}

impl PieceKeys {
    /// Three special tokens, all bytes, and four pieces.
    fn new() -> Self {
        let mut tokens = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        tokens.extend((0..=255_u8).map(|byte| format!("<0x{byte:02X}>")));
        tokens.extend(["\u{2581}a", "\u{2581}", "a", "[PAD262]"].map(str::to_owned));
        let mut scores = vec![0.0; 259];
        scores.extend([-1.0, -2.0, -3.0, -1000.0]);
        let mut types = vec![6; 263];
        types[..3].copy_from_slice(&[2, 3, 3]);
        types[259..].copy_from_slice(&[1, 1, 1, 5]);
        Self { tokens, scores: Some(scores), types: Some(types), bools: Vec::new(), ids: Vec::new() }
    }

    fn scores(&mut self) -> &mut Vec<f32> {
        self.scores.as_mut().unwrap()
    }

    fn types(&mut self) -> &mut Vec<i32> {
        self.types.as_mut().unwrap()
    }
}

#[test]
fn pieces_are_read_with_the_defaults_of_llama_cpp() {
    let tokenizer = Tokenizer::from_gguf(&pieces_file(|_| {})).unwrap();
    assert_eq!(tokenizer.describe(), "SentencePiece BPE");
    assert!(tokenizer.adds_space_prefix() && tokenizer.adds_bos());
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.end_tokens()), (Some(1), Some(2), &[2_u32][..]));
    assert_eq!(tokenizer.encode("a a", Special::AsText, true).unwrap(), [1, 259, 259]);
    let other = pieces_file(|keys| {
        keys.bools =
            vec![("tokenizer.ggml.add_bos_token", false), ("tokenizer.ggml.add_space_prefix", false)];
        keys.ids = vec![("tokenizer.ggml.bos_token_id", 2), ("tokenizer.ggml.eos_token_id", 1)];
    });
    let tokenizer = Tokenizer::from_gguf(&other).unwrap();
    assert_eq!(tokenizer.describe(), "SentencePiece BPE without a space in front");
    assert!(!tokenizer.adds_space_prefix() && !tokenizer.adds_bos());
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.end_tokens()), (Some(2), Some(1), &[1_u32][..]));
    assert_eq!(tokenizer.encode("a a[PAD262]", Special::AsText, false).unwrap()[..2], [261, 259]);
}

#[test]
fn pieces_that_do_not_fit_are_refused() {
    /// What is done to a good file, and what is said.
    type Case = (fn(&mut PieceKeys), &'static str);
    let cases: [Case; 14] = [
        (|keys| keys.scores = None, "metadata key `tokenizer.ggml.scores` is missing"),
        (|keys| keys.types = None, "metadata key `tokenizer.ggml.token_type` is missing"),
        (|keys| keys.scores().truncate(262), "`tokenizer.ggml.scores` has 262 entries for 263 tokens"),
        (
            |keys| keys.scores()[259] = f32::NAN,
            "`tokenizer.ggml.scores` has `NaN` for token 259 (` a`): expected a finite number",
        ),
        (
            |keys| keys.scores()[3] = f32::NEG_INFINITY,
            "`tokenizer.ggml.scores` has `-inf` for token 3 (`\0`): expected a finite number",
        ),
        (|keys| keys.types().truncate(262), "`tokenizer.ggml.token_type` has 262 entries for 263 tokens"),
        (|keys| keys.types()[5] = 0, "token 5 has the unknown type 0"),
        (
            |keys| keys.types()[3 + 0xe2] = 5,
            "`tokenizer.ggml.tokens` has no token of type 6 (byte) for `<0xE2>`: expected one for each byte",
        ),
        (
            |keys| keys.tokens[4] = "<0x+1>".to_owned(),
            "token 4 (`<0x+1>`) has the type 6 (byte): expected a name from `<0x00>` to `<0xFF>`",
        ),
        (
            |keys| keys.tokens[5] = "<0x01>".to_owned(),
            "`tokenizer.ggml.tokens` has `<0x01>` twice, as tokens 4 and 5: expected each text once",
        ),
        (
            |keys| keys.tokens[261] = " a".to_owned(),
            "`tokenizer.ggml.tokens` has ` a` twice, as tokens 259 and 261: expected each text once",
        ),
        (
            |keys| keys.ids = vec![("tokenizer.ggml.unknown_token_id", 263)],
            "`tokenizer.ggml.unknown_token_id` is 263, but there are 263 tokens",
        ),
        (
            |keys| keys.ids = vec![("tokenizer.ggml.bos_token_id", 300)],
            "`tokenizer.ggml.bos_token_id` is 300, but there are 263 tokens",
        ),
        (
            |keys| keys.bools = vec![("tokenizer.ggml.remove_extra_whitespaces", true)],
            "`tokenizer.ggml.remove_extra_whitespaces` is set: only vocabularies that take text as it is are supported",
        ),
    ];
    for (spoil, expected) in cases {
        assert_refused(&pieces_file(spoil), expected);
    }
}

proptest! {
    /// Whatever the keys say: an error, or a tokenizer that gives text back as it was.
    #[test]
    fn keys_at_random_never_panic(
        rows in prop::collection::vec(
            (prop_oneof![4 => "[ab\u{2581}<]{0,3}", 1 => "<0x0[0-9A-F]>"], prop_oneof![6 => 1..6_i32, 1 => 0..8_i32],
             prop_oneof![9 => -9.0..9.0_f32, 1 => prop::num::f32::ANY]),
            0..6,
        ),
        n_scores_less in prop_oneof![9 => Just(0_usize), 1 => Just(1)],
        ids in prop::collection::vec(0..270_u32, 3), text in any::<String>(), prefix: bool,
    ) {
        let gguf = pieces_file(|keys| {
            keys.tokens.truncate(259);
            keys.types().truncate(259);
            keys.scores().truncate(259 - n_scores_less);
            for (token, kind, score) in rows {
                keys.tokens.push(token);
                keys.types().push(kind);
                keys.scores().push(score);
            }
            let names = [
                "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
            ];
            keys.ids = names.into_iter().zip(ids).collect();
            keys.bools = vec![("tokenizer.ggml.add_space_prefix", prefix)];
        });
        match Tokenizer::from_gguf(&gguf) {
            Err(error) => prop_assert!(!error.to_string().is_empty()),
            Ok(tokenizer) => {
                let ids = tokenizer.encode(&text, Special::AsText, false).unwrap();
                let (mut detokenizer, mut decoded) = (Detokenizer::new(), String::new());
                ids.iter().for_each(|id| detokenizer.push(&tokenizer, *id, &mut decoded));
                detokenizer.flush(&mut decoded);
                prop_assert_eq!(decoded, text.replace('\u{2581}', " "));
            }
        }
    }
}
