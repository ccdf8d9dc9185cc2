//! Every wrong input is named, with a hint where there is a next step, and has its exit code.

use std::fs;
use std::path::Path;

use bitnetd_proto::exit_code::ExitCode;

use crate::support::{Daemon, Finished, Folder};

/// What a user sees of a failure.
fn shown(finished: &Finished) -> String {
    let code = finished.code.and_then(ExitCode::from_raw);
    format!("{code:?}\n{}", finished.stderr.trim_end())
}

/// The built-in model's bytes.
fn story_model() -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf")).unwrap()
}

/// Where `needle` ends.
fn end_of(bytes: &[u8], needle: &[u8]) -> usize {
    bytes.windows(needle.len()).position(|window| window == needle).unwrap() + needle.len()
}

#[track_caller]
fn run_model(name: &str, bytes: &[u8]) -> String {
    let folder = Folder::new();
    folder.write(name, bytes);
    let finished = folder.run(&format!("run -t 1 -n 4 -p Once -m %/{name}"));
    assert_eq!(finished.stdout, "", "{finished:?}");
    shown(&finished)
}

#[test]
fn a_model_that_is_not_there() {
    let folder = Folder::new();
    insta::assert_snapshot!(shown(&folder.run("run -p Once -m none.gguf")), @"");
    insta::assert_snapshot!(shown(&folder.run("run -p Once -m .")), @"");
}

#[test]
fn a_model_that_is_none() {
    insta::assert_snapshot!(run_model("empty.gguf", b""), @"");
    insta::assert_snapshot!(run_model("notes.gguf", b"Dear diary, today I trained a model."), @"");
}

#[test]
fn a_model_that_is_cut() {
    let model = story_model();
    insta::assert_snapshot!(run_model("half.gguf", &model[..model.len() / 2]), @"");
    insta::assert_snapshot!(run_model("start.gguf", &model[..100]), @"");
}

#[test]
fn a_model_that_lies() {
    let mut model = story_model();
    model[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    insta::assert_snapshot!(run_model("count.gguf", &model), @"");
    let mut model = story_model();
    let dimensions = end_of(&model, b"blk.0.attn_q.weight") + 4;
    model[dimensions..dimensions + 8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    insta::assert_snapshot!(run_model("dimension.gguf", &model), @"");
}

#[test]
fn a_model_that_is_not_supported() {
    let mut model = story_model();
    let name = end_of(&model, b"general.architecture") + 4 + 8;
    model[name] = b'X';
    insta::assert_snapshot!(run_model("architecture.gguf", &model), @"");
    let mut model = story_model();
    let kind = end_of(&model, b"blk.0.attn_q.weight") + 4 + 2 * 8;
    model[kind..kind + 4].copy_from_slice(&12_u32.to_le_bytes()); // Q4_K
    insta::assert_snapshot!(run_model("type.gguf", &model), @"");
}

#[test]
fn a_prompt_that_cannot_be() {
    let folder = Folder::new();
    insta::assert_snapshot!(shown(&folder.run_prompt("run", "")), @"");
    insta::assert_snapshot!(shown(&folder.run_prompt("run", &"word ".repeat(3000))), @"");
    insta::assert_snapshot!(shown(&folder.run("run -f none.txt")), @"");
    folder.write("latin1.txt", b"caf\xe9");
    insta::assert_snapshot!(shown(&folder.run("run -f latin1.txt")), @"");
    insta::assert_snapshot!(shown(&folder.run_prompt("run --chat", "hello")), @"");
}

#[test]
fn a_command_line_that_cannot_be() {
    let folder = Folder::new();
    insta::assert_snapshot!(shown(&folder.run("run -p Once --top-p 7")), @"");
    insta::assert_snapshot!(shown(&folder.run("run -p Once --tmp 7")), @"");
    insta::assert_snapshot!(shown(&folder.run("run")), @"");
    insta::assert_snapshot!(shown(&folder.run("rnu")), @"");
    let many = folder.run("run -p Once -t 5000");
    assert_eq!(many.code, Some(78), "{many:?}");
    assert!(many.stderr.contains("5000 CPUs") && many.stderr.contains("hint: "), "{many:?}");
}

#[test]
fn a_configuration_that_is_wrong() {
    let folder = Folder::new();
    folder.write("bitnetd.toml", "[engine]\nmax_bach = 3\n[split]\nprofile = \"fast\"\n");
    insta::assert_snapshot!(shown(&folder.run("serve -c bitnetd.toml --socket %/s")), @"");
    insta::assert_snapshot!(shown(&folder.run("serve -c none.toml --socket %/s")), @"");
}

#[test]
fn a_daemon_that_is_not_there() {
    let folder = Folder::new();
    insta::assert_snapshot!(shown(&folder.run("generate -p Once --socket %/none.sock")), @"");
    folder.write("file.sock", "");
    insta::assert_snapshot!(shown(&folder.run("status --socket %/file.sock")), @"");
}

#[test]
fn a_socket_that_cannot_be_had() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    insta::assert_snapshot!(shown(&folder.run("serve -q --socket %/bitnetd.sock")), @"");
    folder.write("precious", "not a socket");
    insta::assert_snapshot!(shown(&folder.run("serve -q --socket %/precious")), @"");
    assert_eq!(fs::read_to_string(folder.path("precious")).unwrap(), "not a socket");
    insta::assert_snapshot!(shown(&folder.run("serve -q --socket %/no/such/folder/s")), @"");
    assert!(daemon.status().is_some(), "the first one was disturbed");
}

#[test]
fn a_prompt_that_the_daemon_refuses() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    let long = folder.run_prompt("generate --socket %/bitnetd.sock", &"word ".repeat(3000));
    insta::assert_snapshot!(shown(&long), @"");
    assert_eq!(daemon.status().unwrap().totals.restarts, 0);
}
