//! Any bytes as a GGUF file: no panic, and what is read writes back as the same file.
//!
//! Memory is bounded by the fuzzer's `-malloc_limit_mb` (see the README beside).
#![no_main]

use std::sync::Arc;

use bitnetd_engine::gguf::{Gguf, GgufWriter, Value};
use bitnetd_engine::inspect::{ModelInfo, verify};
use bitnetd_engine::mapping::Mapping;
use bitnetd_engine::tokenizer::{Detokenizer, Special, Tokenizer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mapping = Arc::new(Mapping::from_bytes(bytes).expect("memory for a copy"));
    match Gguf::parse(mapping) {
        Ok(gguf) => check(Arc::new(gguf)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

fn check(gguf: Arc<Gguf>) {
    let rewritten = write(&gguf);
    let again = Gguf::parse(Arc::new(Mapping::from_bytes(&rewritten).expect("memory"))).expect("own output");
    assert_eq!(write(&again), rewritten, "what is read back differs");
    assert_eq!(again.n_tensors(), gguf.n_tensors());
    for tensor in gguf.tensors() {
        let copy = again.tensor(tensor.name).expect("every tensor is found by its name");
        assert_eq!((copy.kind, copy.dims, copy.data), (tensor.kind, tensor.dims, tensor.data));
    }
    // The writer has an alignment of its own.
    for (key, value) in gguf.metadata().iter().filter(|(key, _)| *key != "general.alignment") {
        let copy = again.metadata().get(key).expect("every key is found by its name");
        assert_eq!(copy.describe(), value.describe());
        if let Value::Strings(strings) = value {
            for (idx, text) in strings.iter().enumerate() {
                assert_eq!(strings.get(idx), Some(text));
            }
            assert_eq!(strings.iter().count(), strings.len());
        }
    }
    match Tokenizer::from_gguf(&gguf) {
        Ok(tokenizer) => check_vocabulary(&tokenizer),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let info = ModelInfo::new(&gguf);
    let found = verify(&gguf, &mut |_| ());
    assert!(info.is_supported || !found.problems.is_empty());
}

/// Text comes back from any vocabulary that is accepted, whatever its tokens are called.
fn check_vocabulary(tokenizer: &Tokenizer) {
    let text = " Once  upon a\ttime,\n\u{4e2d}\u{1f600}e\u{301} <0x41> \0 <s>";
    let ids = tokenizer.encode(text, Special::AsText, false).expect("it is short");
    let (mut detokenizer, mut decoded) = (Detokenizer::new(), String::new());
    ids.iter().for_each(|id| detokenizer.push(tokenizer, *id, &mut decoded));
    detokenizer.flush(&mut decoded);
    assert_eq!(decoded, text);
    for id in (0..).take(tokenizer.n_vocab()) {
        detokenizer.push(tokenizer, id, &mut decoded);
    }
}

fn write(gguf: &Gguf) -> Vec<u8> {
    let mut writer = GgufWriter::new();
    for (key, value) in gguf.metadata().iter().filter(|(key, _)| *key != "general.alignment") {
        writer.value(key, value).expect("keys are unique");
    }
    for tensor in gguf.tensors() {
        writer.tensor(tensor.name, tensor.kind, tensor.dims).expect("shapes were checked");
    }
    let mut data = writer.start(Vec::new()).expect("a vector takes everything");
    for tensor in gguf.tensors() {
        data.append(tensor.data).expect("as many bytes as planned");
    }
    data.finish().expect("all were written")
}
