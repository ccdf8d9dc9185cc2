//! Small checkpoints, made here: float and packed, one file and several, and what must be refused.

mod vocabularies;

use std::collections::BTreeMap;
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorView as Stored;
use serde_json::{Value as Json, json};

use super::*;
use crate::gguf::{Gguf, TensorView};
use crate::inspect::verify;
use crate::mapping::Mapping;

/// One tensor: type, shape, bytes.
type Blob = (Dtype, Vec<usize>, Vec<u8>);

const N_EMBD: usize = 128;
const N_FF: usize = 256;
const N_VOCAB: usize = 264;

/// A checkpoint in memory, to be changed before it is converted.
struct Source {
    config: Json,
    tokenizer: Json,                        // `tokenizer.json`; none if it is null.
    files: BTreeMap<&'static str, Vec<u8>>, // Beside it.
    tensors: BTreeMap<String, Blob>,
    index: Option<Json>,
}

fn floats(shape: &[usize], value: impl Fn(usize) -> f32) -> Blob {
    let n_elements = shape.iter().product();
    (Dtype::F32, shape.to_vec(), (0..n_elements).flat_map(|at| value(at).to_le_bytes()).collect())
}

/// Spread over -1.2 to 1.2, none of them a multiple of another by chance.
fn weight(at: usize) -> f32 {
    f32::from(u16::try_from(at * 7919 % 4801).unwrap()) / 2000.0 - 1.2
}

fn projections() -> [(&'static str, usize, usize); 7] {
    [
        ("self_attn.q_proj", 128, N_EMBD),
        ("self_attn.k_proj", 64, N_EMBD),
        ("self_attn.v_proj", 64, N_EMBD),
        ("self_attn.o_proj", N_EMBD, 128),
        ("mlp.gate_proj", N_FF, N_EMBD),
        ("mlp.up_proj", N_FF, N_EMBD),
        ("mlp.down_proj", N_EMBD, N_FF),
    ]
}

fn source() -> Source {
    let mut tensors = BTreeMap::new();
    let mut add = |name: &str, blob: Blob| tensors.insert(format!("model.{name}.weight"), blob);
    add("embed_tokens", floats(&[N_VOCAB, N_EMBD], |at| weight(at) / 8.0));
    add("norm", floats(&[N_EMBD], |_| 1.0));
    for (name, len) in [
        ("input_layernorm", N_EMBD),
        ("post_attention_layernorm", N_EMBD),
        ("self_attn.attn_sub_norm", 128),
        ("mlp.ffn_sub_norm", N_FF),
    ] {
        add(&format!("layers.0.{name}"), floats(&[len], |at| 1.0 + weight(at) / 100.0));
    }
    for (idx, (name, n_rows, n_cols)) in projections().into_iter().enumerate() {
        add(&format!("layers.0.{name}"), floats(&[n_rows, n_cols], |at| weight(at + idx) / 16.0));
    }
    let config = json!({
        "model_type": "bitnet", "hidden_act": "relu2", "hidden_size": N_EMBD, "intermediate_size": N_FF,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": N_VOCAB,
        "tie_word_embeddings": true, "bos_token_id": 258, "eos_token_id": [259],
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
    });
    Source { config, tokenizer: tokenizer(), files: BTreeMap::new(), tensors, index: None }
}

/// All bytes, two merges, three added tokens, and ids that no token has.
fn tokenizer() -> Json {
    let printable = (33..=126_u32).chain(161..=172).chain(174..=255);
    let letters: Vec<char> = printable.chain(256..324).filter_map(char::from_u32).collect();
    let mut vocab: BTreeMap<String, usize> =
        letters.iter().enumerate().map(|(id, letter)| (letter.to_string(), id)).collect();
    vocab.insert("he".to_owned(), 256);
    vocab.insert("\u{120}t".to_owned(), 257);
    json!({
        "added_tokens": [
            {"id": 258, "content": "<|begin_of_text|>", "special": true},
            {"id": 259, "content": "<|end_of_text|>", "special": true},
            {"id": 260, "content": "<think>", "special": false},
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", ["\u{120}", "t"]]},
    })
}

impl Source {
    fn convert(&self) -> Result<Gguf, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("config.json"), self.config.to_string()).unwrap();
        if !self.tokenizer.is_null() {
            std::fs::write(path("tokenizer.json"), self.tokenizer.to_string()).unwrap();
        }
        for (name, bytes) in &self.files {
            std::fs::write(path(name), bytes).unwrap();
        }
        let mut files: BTreeMap<String, Vec<(&str, Stored<'_>)>> = BTreeMap::new();
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let file = self.index.as_ref().and_then(|index| index["weight_map"][name].as_str());
            let file = file.unwrap_or("model.safetensors").to_owned();
            let stored = Stored::new(*dtype, shape.clone(), bytes).unwrap();
            files.entry(file).or_default().push((name.as_str(), stored));
        }
        for (file, tensors) in files {
            if !file.contains('/') {
                std::fs::write(path(&file), safetensors::serialize(tensors, None).unwrap()).unwrap();
            }
        }
        if let Some(index) = &self.index {
            std::fs::write(path("model.safetensors.index.json"), index.to_string()).unwrap();
        }
        let options = HuggingFaceOptions { name: Some("small".to_owned()), embedding: DenseFormat::F16 };
        let out = path("out.gguf");
        let result = convert(directory.path(), &out, &options, &mut |_| ());
        if let Err(error) = result {
            assert!(!out.exists(), "a failed conversion leaves no file");
            let mut text = error.to_string();
            let mut next = std::error::Error::source(&error);
            while let Some(cause) = next {
                text = format!("{text}: {cause}");
                next = cause.source();
            }
            return Err(text);
        }
        Ok(Gguf::parse(Arc::new(Mapping::open(&out).unwrap())).unwrap())
    }

    fn tensor(&mut self, part: &str) -> &mut Blob {
        self.tensors.get_mut(&format!("model.layers.0.{part}.weight")).unwrap()
    }

    /// Codes and scales as the float conversion gives them, in the packed layout.
    fn pack(&mut self, gguf: &Gguf, scale_of: impl Fn(f32) -> f32) {
        for ((part, n_rows, n_cols), target) in projections().into_iter().zip(TARGETS) {
            let tensor = gguf.tensor(&format!("blk.0.{target}.weight")).unwrap();
            let codes = codes_of(&tensor);
            let mut packed = vec![0_u8; n_rows / 4 * n_cols];
            for (row, codes) in codes.chunks_exact(n_cols).enumerate() {
                for (col, code) in codes.iter().enumerate() {
                    packed[row % (n_rows / 4) * n_cols + col] |= code << (row / (n_rows / 4) * 2);
                }
            }
            *self.tensor(part) = (Dtype::U8, vec![n_rows / 4, n_cols], packed);
            let scale = floats(&[1], |_| scale_of(scale(&tensor)));
            self.tensors.insert(format!("model.layers.0.{part}.weight_scale"), scale);
        }
    }
}

const TARGETS: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// Codes 0, 1, 2 by row and column, unpacked without the engine's own code.
fn codes_of(tensor: &TensorView<'_>) -> Vec<u8> {
    let codes = &tensor.data[..tensor.data.len() - 32];
    codes
        .chunks_exact(32)
        .flat_map(|block| {
            [6, 4, 2, 0].into_iter().flat_map(move |shift| block.iter().map(move |byte| byte >> shift & 3))
        })
        .collect()
}

fn scale(tensor: &TensorView<'_>) -> f32 {
    f32::from_le_bytes(*tensor.data[tensor.data.len() - 32..].first_chunk().unwrap())
}

#[test]
fn float_masters_become_the_codes_and_scales_of_transformers() {
    let source = source();
    let gguf = source.convert().unwrap();
    assert_eq!(verify(&Arc::new(source.convert().unwrap()), &mut |_| ()).problems, []);
    for ((part, n_rows, n_cols), target) in projections().into_iter().zip(TARGETS) {
        let (_, _, bytes) = &source.tensors[&format!("model.layers.0.{part}.weight")];
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        let sum: f64 = values.iter().map(|value| f64::from(value.abs())).sum();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            reason = "that is the definition"
        )]
        let inverse = 1.0 / (sum / (n_rows * n_cols) as f64) as f32;
        let tensor = gguf.tensor(&format!("blk.0.{target}.weight")).unwrap();
        assert_eq!(scale(&tensor), 1.0 / inverse);
        let expected = values.iter().map(|value| (value * inverse).round_ties_even().clamp(-1.0, 1.0));
        let found = codes_of(&tensor).into_iter().map(|code| f32::from(code) - 1.0);
        assert!(expected.eq(found), "{target}");
    }
}

#[test]
fn the_tokenizer_becomes_keys() {
    let gguf = source().convert().unwrap();
    let metadata = gguf.metadata();
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens.len(), N_VOCAB);
    let at = |idx| tokens.get(idx).unwrap();
    assert_eq!(
        [at(0), at(256), at(258), at(260), at(261)],
        ["!", "he", "<|begin_of_text|>", "<think>", "[PAD261]"]
    );
    let types = metadata.i32s("tokenizer.ggml.token_type").unwrap().unwrap();
    assert_eq!([0, 258, 260, 261].map(|idx| types.get(idx).unwrap()), [1, 3, 4, 5]);
    let merges = metadata.strings("tokenizer.ggml.merges").unwrap().unwrap();
    assert_eq!(merges.iter().collect::<Vec<_>>(), ["h e", "\u{120} t"]);
    assert_eq!(metadata.str("tokenizer.ggml.pre").unwrap(), Some("gpt-2"));
    assert_eq!(metadata.u32("tokenizer.ggml.bos_token_id").unwrap(), Some(258));
    assert_eq!(metadata.u32("tokenizer.ggml.eos_token_id").unwrap(), Some(259));
}

#[test]
fn packed_weights_are_taken_over_with_either_meaning_of_the_scale() {
    let float = source().convert().unwrap();
    let mut factor = source();
    factor.pack(&float, |scale| scale);
    let mut divisor = source();
    divisor.pack(&float, |scale| 1.0 / scale);
    divisor.config["quantization_config"]["linear_class"] = json!("bitlinear");
    for (source, is_exact) in [(factor, true), (divisor, false)] {
        let packed = source.convert().unwrap();
        for (old, new) in float.tensors().zip(packed.tensors()) {
            if old.kind == TensorType::I2S {
                assert_eq!(codes_of(&old), codes_of(&new), "{}", old.name);
                let ratio = scale(&old) / scale(&new);
                assert!(ratio == 1.0 || (!is_exact && (ratio - 1.0).abs() < 1e-6), "{}: {ratio}", old.name);
            } else {
                assert_eq!(old.data, new.data);
            }
        }
    }
}

#[test]
fn shards_give_the_same_file() {
    let whole = source().convert().unwrap();
    let mut sharded = source();
    let shard_of = |idx: usize| format!("model-{}.safetensors", idx % 3);
    let map: BTreeMap<&String, String> =
        sharded.tensors.keys().enumerate().map(|(idx, name)| (name, shard_of(idx))).collect();
    sharded.index = Some(json!({ "weight_map": map }));
    assert_eq!(whole.mapping()[..], sharded.convert().unwrap().mapping()[..]);
    sharded.index = Some(json!({ "weight_map": { "model.norm.weight": "../model.safetensors" } }));
    assert!(sharded.convert().unwrap_err().contains("`../model.safetensors`"));
}

#[test]
fn llama_has_a_head_of_its_own_and_reordered_queries() {
    let bitnet = source().convert().unwrap();
    let mut llama = source();
    llama.config["model_type"] = json!("llama");
    llama.config["hidden_act"] = json!("silu");
    llama.config["tie_word_embeddings"] = json!(false);
    llama.tensors.retain(|name, _| !name.contains("sub_norm"));
    llama.tensors.insert("lm_head.weight".to_owned(), floats(&[N_VOCAB, N_EMBD], weight));
    let llama = llama.convert().unwrap();
    assert_eq!(verify(&Arc::new(llama), &mut |_| ()).problems, []);
    let mut again = source();
    again.config["model_type"] = json!("llama");
    again.config["hidden_act"] = json!("silu");
    again.tensors.retain(|name, _| !name.contains("sub_norm"));
    let llama = again.convert().unwrap();
    for (target, is_reordered) in [("attn_q", true), ("attn_k", true), ("attn_v", false)] {
        let name = format!("blk.0.{target}.weight");
        let [old, new] = [&bitnet, &llama].map(|gguf| codes_of(&gguf.tensor(&name).unwrap()));
        let source_row =
            |row: usize| if is_reordered { row / 64 * 64 + row % 2 * 32 + row % 64 / 2 } else { row };
        for (row, codes) in new.chunks_exact(N_EMBD).enumerate() {
            let start = source_row(row) * N_EMBD;
            assert_eq!(codes, &old[start..start + N_EMBD], "{name} row {row}");
        }
    }
}

#[test]
fn what_cannot_be_converted_is_named() {
    /// What the message says, and the change that causes it.
    type Case = (&'static str, fn(&mut Source));
    let cases: [Case; 14] = [
        ("`model_type` is `gpt2`", |source| source.config["model_type"] = json!("gpt2")),
        ("`hidden_act` is `gelu`", |source| source.config["hidden_act"] = json!("gelu")),
        ("`attention_bias` is set", |source| source.config["attention_bias"] = json!(true)),
        ("`rope_scaling` is set", |source| source.config["rope_scaling"] = json!({"rope_type": "llama3"})),
        ("`tie_word_embeddings` is not true", |source| source.config["tie_word_embeddings"] = json!(false)),
        ("attention.head_count_kv is 0", |source| source.config["num_key_value_heads"] = json!(0)),
        ("`model.norm.weight` is missing", |source| drop(source.tensors.remove("model.norm.weight"))),
        ("`model.extra` is not used", |source| {
            source.tensors.insert("model.extra".to_owned(), floats(&[1], weight));
        }),
        ("expected [128, 256]", |source| *source.tensor("mlp.down_proj") = floats(&[128, 128], weight)),
        ("value `NaN` in row 1", |source| {
            *source.tensor("mlp.up_proj") = floats(&[256, 128], |at| if at == 130 { f32::NAN } else { 1.0 });
        }),
        ("no `weight_scale`", |source| {
            *source.tensor("mlp.up_proj") = (Dtype::U8, vec![64, 128], vec![0; 64 * 128]);
        }),
        ("the code 3 in row 64, column 5", |source| {
            let mut bytes = vec![0; 64 * 128];
            bytes[5] = 0b1100;
            *source.tensor("mlp.up_proj") = (Dtype::U8, vec![64, 128], bytes);
            source
                .tensors
                .insert("model.layers.0.mlp.up_proj.weight_scale".to_owned(), floats(&[1], |_| 1.0));
        }),
        ("the id 9999", |source| source.tokenizer["added_tokens"][0]["id"] = json!(9999)),
        ("splits by `\\w+`", |source| {
            source.tokenizer["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "\\w+"}});
        }),
    ];
    for (expected, spoil) in cases {
        let mut source = source();
        spoil(&mut source);
        let text = source.convert().expect_err(expected);
        assert!(text.contains(expected), "expected `{expected}` in `{text}`");
    }
}
