//! Promise P4 for every way that weights and heads are stored.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{Folder, PROMPTS};

/// Types of ternary matrices and of the embedding, which is also the head.
const FORMATS: [(&str, &str); 4] = [("tq2_0", "f32"), ("tq1_0", "q8_0"), ("i2_s", "q6_k"), ("tq2_0", "q4_0")];

/// Ways to run that change nothing.
fn ways() -> Vec<&'static str> {
    let mut ways = vec!["-t 2", "-t 1 -b 3", "-t 2 --isa scalar"];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    {
        ways.push("-t 1 --isa avx2");
    }
    ways
}

#[test]
fn instruction_set_threads_and_neighbours_do_not_change_a_token_of_any_format() {
    let folder = Folder::new();
    let story = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf");
    folder.write("prompts.txt", PROMPTS[..6].join("\n"));
    for (weights, embedding) in FORMATS {
        let convert =
            format!("model convert {} %/m.gguf --weights {weights} --embedding {embedding}", story.display());
        folder.run(&convert).ok();
        let flags = "-m m.gguf -n 24 --ignore-eos --temp 0.9 -s 5";
        let run = |more: &str| folder.run_prompt(&format!("run {flags} --json {more}"), PROMPTS[2]).json();
        let expected = run("-t 1 --isa scalar");
        for way in ways() {
            assert_eq!(run(way)["token_ids"], expected["token_ids"], "{weights}, {embedding}, {way}");
        }
        folder.run(&format!("batch prompts.txt -o out.jsonl {flags} --workers 1 --threads 2")).ok();
        let results = fs::read_to_string(folder.path("out.jsonl")).unwrap();
        let results = results.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let together = results.into_iter().find(|result| result["index"] == 2).unwrap();
        assert_eq!(together["text"], expected["text"], "{weights}, {embedding}, among six");
        fs::remove_file(folder.path("out.jsonl")).unwrap();
        fs::remove_file(folder.path("m.gguf")).unwrap();
    }
}
