//! Synthetic models are what they claim, and the same every time.

use std::sync::Arc;

use super::*;
use crate::gguf::Gguf;
use crate::mapping::Mapping;
use crate::ternary::{TernaryFormat, TernaryMatrix};

fn make(seed: u64) -> (Vec<u8>, Gguf) {
    let options = SynthOptions { shape: ModelShape::tiny(), name: "test".to_owned(), seed };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    let mut n_told = 0;
    synth(&path, &options, &mut |progress| n_told = progress.n_done).unwrap();
    assert_eq!(n_told, options.shape.tensors().len());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing partial is left");
    let bytes = std::fs::read(&path).unwrap();
    let gguf = Gguf::parse(Arc::new(Mapping::open(&path).unwrap())).unwrap();
    (bytes, gguf)
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    assert_eq!(make(7).0, make(7).0);
    assert_ne!(make(7).0, make(8).0);
}

#[test]
fn the_file_has_the_shape_and_valid_weights() {
    let (_, gguf) = make(1);
    assert_eq!(gguf.n_tensors(), 1 + 2 * 11 + 1);
    let model = crate::model::Model::load(Arc::new(gguf)).unwrap();
    let gguf = model.gguf();
    for spec in ModelShape::tiny().tensors() {
        let tensor = gguf.tensor(&spec.name).unwrap();
        assert_eq!(tensor.dims, spec.dims);
        if spec.role == TensorRole::Projection {
            let [n_cols, n_rows] = [0, 1].map(|at| usize::try_from(spec.dims[at]).unwrap());
            let matrix = TernaryMatrix::new(TernaryFormat::I2S, tensor.data, n_rows, n_cols).unwrap();
            assert_eq!(matrix.first_invalid_weight(), None);
            assert!(matrix.scale() > 0.0);
        }
    }
}

#[test]
fn the_keys_are_those_of_the_published_file_in_its_order() {
    let (_, gguf) = make(1);
    let keys: Vec<&str> = gguf.metadata().iter().map(|(key, _)| key).collect();
    let arch = |suffix: &str| format!("bitnet-b1.58.{suffix}");
    let expected = [
        "general.architecture".to_owned(),
        "general.name".to_owned(),
        arch("vocab_size"),
        arch("context_length"),
        arch("embedding_length"),
        arch("block_count"),
        arch("feed_forward_length"),
        arch("rope.dimension_count"),
        arch("attention.head_count"),
        arch("attention.head_count_kv"),
        "tokenizer.ggml.add_bos_token".to_owned(),
        arch("attention.layer_norm_rms_epsilon"),
        arch("rope.freq_base"),
        "general.file_type".to_owned(),
        "tokenizer.ggml.model".to_owned(),
        "tokenizer.ggml.tokens".to_owned(),
        "tokenizer.ggml.scores".to_owned(),
        "tokenizer.ggml.token_type".to_owned(),
        "tokenizer.ggml.merges".to_owned(),
        "tokenizer.ggml.bos_token_id".to_owned(),
        "tokenizer.ggml.eos_token_id".to_owned(),
        "tokenizer.ggml.padding_token_id".to_owned(),
        "tokenizer.chat_template".to_owned(),
        "general.quantization_version".to_owned(),
    ];
    assert_eq!(keys, expected);
}

#[test]
fn impossible_shapes_leave_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bad.gguf");
    let mut shape = ModelShape::tiny();
    shape.n_embd = 200;
    shape.head_dim = 50;
    let options = SynthOptions { shape, name: "test".to_owned(), seed: 0 };
    let error = synth(&path, &options, &mut |_| ()).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("blk.0.attn_q.weight"));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}
