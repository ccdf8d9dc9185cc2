//! Models with a SentencePiece vocabulary: converted, looked into, run, served, killed.

use std::fs;
use std::path::{Path, PathBuf};

use bitnetd_proto::client::GenerationEvent;
use bitnetd_proto::request::{GenerateRequest, Prompt};
use serde_json::{Value, json};

use crate::deaths::{PATIENT, no_client_sees_deaths};
use crate::support::{Daemon, Folder};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Converts the small random checkpoint with another vocabulary: `tokenizer.json`, or `tokenizer.model`. It has more
/// rows than the vocabulary tokens.
fn convert(folder: &Folder, tokenizer: &str, out: &str) {
    let checkpoint = folder.path(&format!("checkpoint-{out}"));
    fs::create_dir(&checkpoint).unwrap();
    let mut config = read_json(&golden("tiny/config.json"));
    config["bos_token_id"] = json!(1);
    config["eos_token_id"] = json!(2);
    fs::write(checkpoint.join("config.json"), config.to_string()).unwrap();
    fs::copy(golden("tiny/model.safetensors"), checkpoint.join("model.safetensors")).unwrap();
    fs::copy(golden("spm").join(tokenizer), checkpoint.join(tokenizer)).unwrap();
    let template = "{% for message in messages %}{{ bos_token }}{{ message.role }}\n{{ message.content }}\
                    {{ eos_token }}{% endfor %}{{ bos_token }}";
    let extra = json!({ "add_bos_token": true, "chat_template": template, "added_tokens_decoder": {
        "2": { "content": "</s>", "special": true }, "639": { "content": "<tool>", "special": false },
    }});
    fs::write(checkpoint.join("tokenizer_config.json"), extra.to_string()).unwrap();
    folder.run(&format!("model convert %/checkpoint-{out} %/{out}")).ok();
}

#[test]
fn either_file_of_a_checkpoint_becomes_a_model_that_says_the_same() {
    let folder = Folder::new();
    convert(&folder, "tokenizer.json", "json.gguf");
    convert(&folder, "tokenizer.model", "model.gguf");
    for file in ["json.gguf", "model.gguf"] {
        let info = folder.run(&format!("model info %/{file}")).ok();
        assert!(info.contains("vocabulary    700 tokens, SentencePiece BPE\nsupported     yes\n"), "{info}");
        folder.run(&format!("model verify %/{file}")).ok();
    }
    let flags = "-t 1 -n 40 --temp 1.2 --seed 7 --ignore-eos --json";
    let answer = |file: &str, more: &str, prompt: &str| {
        let mut answer = folder.run_prompt(&format!("run {flags} {more} -m %/{file}"), prompt).json();
        let [text, ids] = ["text", "token_ids"].map(|key| answer[key].take());
        assert_eq!(ids.as_array().unwrap().len(), 40, "{answer}");
        (text, ids)
    };
    for (more, prompt) in
        [("", "Once upon  a time\n"), ("", " \u{1f600}<tool>é"), ("--chat", "Who <s> are you?</s>")]
    {
        let expected = answer("json.gguf", more, prompt);
        assert_eq!(answer("model.gguf", more, prompt), expected, "{prompt}");
        let plain = format!("{more} --speculation off");
        assert_eq!(answer("model.gguf", &plain, prompt), expected, "{prompt}");
    }
}

#[test]
fn a_daemon_reads_prompts_as_sentencepiece_does_and_no_client_sees_deaths_of_workers() {
    let folder = Folder::new();
    convert(&folder, "tokenizer.model", "pieces.gguf");
    folder
        .write("d.toml", format!("{PATIENT}[model]\npath = \"{}\"\n", folder.path("pieces.gguf").display()));
    let daemon = Daemon::start(&folder, "-c d.toml");
    let golden = read_json(&golden("tokenizer_spm.json"));
    let mut client = daemon.connect().unwrap();
    let mut n_checked = 0;
    for case in golden["cases"].as_array().unwrap().iter().step_by(9) {
        let text = case["text"].as_str().unwrap();
        let n_ids = case.get("ids_as_text").unwrap_or(&case["ids"]).as_array().unwrap().len();
        if text.is_empty() || n_ids > 500 {
            continue;
        }
        let request =
            GenerateRequest { max_tokens: 1, ..GenerateRequest::new(Prompt::Text(text.to_owned())) };
        let done = client.generate(&request).unwrap().find_map(|event| match event.unwrap() {
            GenerationEvent::Done(done) => Some(done),
            _ => None,
        });
        assert_eq!(done.unwrap().usage.prompt_tokens as usize, n_ids + 1, "begin-of-text and {text:?}");
        n_checked += 1;
    }
    assert!(n_checked > 40, "{n_checked} prompts");
    no_client_sees_deaths(&daemon, 4);
}

/// Nobody waits for a prompt of a megabyte that fits no context.
#[test]
fn a_vocabulary_that_is_wrong_and_a_prompt_that_is_too_long_have_their_words() {
    let folder = Folder::new();
    convert(&folder, "tokenizer.json", "pieces.gguf");
    let long = "word".repeat(200_000);
    folder.write("long.txt", &long);
    let finished = folder.run("run -t 1 -m %/pieces.gguf -f %/long.txt");
    assert!(finished.stderr.contains("tokens, the context window 512"), "{finished:?}");

    let mut model = fs::read(folder.path("pieces.gguf")).unwrap();
    let key = b"tokenizer.ggml.scores";
    let scores = model.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4 + 4 + 8;
    model[scores + 4 * 300..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    folder.write("nan.gguf", model);
    let finished = folder.run("run -t 1 -p Once -m %/nan.gguf");
    insta::assert_snapshot!(finished.stderr.trim_end(), @r#"
    error: cannot start the engine: cannot read the tokenizer: `tokenizer.ggml.scores` has `NaN` for token 300 (`éééé`): expected a finite number
    hint: `bitnetd model verify FILE` says more; docs/tokenizer.md lists the vocabularies that are supported
    "#);
    let verified = folder.run("model verify %/nan.gguf");
    assert!(
        verified.stdout.starts_with("file: the vocabulary: `tokenizer.ggml.scores` has `NaN`"),
        "{verified:?}"
    );
}
