//! Tokenizers of whole files: what is read, what is refused.

use std::sync::Arc;

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

#[track_caller]
fn assert_refused(gguf: &Gguf, expected: &str) {
    assert_eq!(Tokenizer::from_gguf(gguf).unwrap_err().to_string(), expected);
}

#[test]
fn published_files_name_no_pre_tokenizer() {
    let tokenizer = Tokenizer::from_gguf(&file_of(2304, "bitnet-b1.58", |_| {})).unwrap();
    assert_eq!(tokenizer.options.pre_tokenizer, PreTokenizer::LlamaBpe);
    assert!(tokenizer.options.ignore_merges && tokenizer.adds_bos());
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
        assert!(tokenizer.options.pre_tokenizer == PreTokenizer::LlamaBpe && tokenizer.adds_bos(), "{pre}");
    }
    assert!(!Tokenizer::from_gguf(&file("llama-bpe", Some(false))).unwrap().adds_bos());
    let gpt2 = Tokenizer::from_gguf(&file("gpt-2", None)).unwrap();
    assert!(
        gpt2.options.pre_tokenizer == PreTokenizer::Gpt2 && !gpt2.adds_bos() && !gpt2.options.ignore_merges
    );
    assert_refused(
        &file("qwen2", None),
        "pre-tokenizer `qwen2` is not supported, only `llama-bpe` (and its aliases) and `gpt-2`",
    );
}

#[test]
fn files_without_a_usable_tokenizer_are_refused() {
    assert_refused(&parse(GgufWriter::new()), "metadata key `tokenizer.ggml.model` is missing");
    let mut writer = GgufWriter::new();
    writer.str("tokenizer.ggml.model", "llama").unwrap();
    assert_refused(&parse(writer), "tokenizer model `llama` is not supported, only `gpt2` (byte-level BPE)");
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
    let n_bytes = tokenizer.vocabulary.memory_bytes();
    assert!(n_bytes < 7 << 20, "{n_bytes} bytes");
}
