//! `bitnetd run` with the built-in model: the story, its JSON, and that nothing but the request decides the text.

use std::io::Read as _;
use std::process::Stdio;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{Folder, children, is_alive, send, wait_for};

#[test]
fn a_story_needs_no_model_and_no_daemon() {
    let folder = Folder::new();
    let finished = folder.run_prompt("run -n 64", "Once upon a time");
    let stderr = finished.stderr.clone();
    let text = finished.ok();
    assert!(text.split_whitespace().count() >= 30, "{text}");
    assert!(text.chars().all(|c| c.is_ascii_graphic() || c.is_whitespace()), "{text}");
    assert!(stderr.contains("tokens") && stderr.contains("thread"), "{stderr}");
    let quiet = folder.run_prompt("run -q -n 64", "Once upon a time");
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), (text.as_str(), ""));
}

#[test]
fn json_has_the_documented_fields() {
    let folder = Folder::new();
    let text = folder.run_prompt("run -n 12", "One day").ok();
    let json = folder.run_prompt("run -n 12 --json --logprobs 2", "One day").json();
    let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    insta::assert_snapshot!(format!("{keys:?}"), @r#"["cached_tokens", "decode_seconds", "finish_reason", "index", "logprobs", "model", "prefill_seconds", "prompt", "prompt_tokens", "seconds", "seed", "text", "token_ids", "tokens", "ttft_seconds"]"#);
    assert_eq!(json["text"].as_str().unwrap().trim_end_matches('\n'), text.trim_end_matches('\n'));
    assert_eq!((&json["prompt"], &json["index"]), (&Value::from("One day"), &Value::from(0)));
    assert_eq!(json["finish_reason"], "length");
    for list in ["token_ids", "logprobs"] {
        assert_eq!(json[list].as_array().unwrap().len(), 12, "{list}");
    }
    assert_eq!(json["logprobs"][0]["top"].as_array().unwrap().len(), 2);
    assert!(json["seconds"].as_f64().unwrap() > 0.0);
}

fn token_ids(folder: &Folder, flags: &str) -> Value {
    let line = format!("run -n 40 --ignore-eos --temp 0.9 --json {flags}");
    folder.run_prompt(&line, "The little boat").json()["token_ids"].clone()
}

#[test]
fn threads_instruction_set_and_chunks_do_not_change_a_token() {
    let folder = Folder::new();
    let expected = token_ids(&folder, "-s 7 -t 1");
    for flags in ["-s 7 -t 2", "-s 7", "-s 7 -t 1 --isa scalar", "-s 7 -b 1", "-s 7 -b 3 -t 2"] {
        assert_eq!(token_ids(&folder, flags), expected, "{flags}");
    }
    assert_ne!(token_ids(&folder, "-s 8"), expected);
}

#[test]
fn a_drawn_seed_is_told_and_gives_the_same_again() {
    let folder = Folder::new();
    let first = folder.run_prompt("run -n 30 --temp 1 --json", "A fox").json();
    let again = folder.run_prompt(&format!("run -n 30 --temp 1 --json -s {}", first["seed"]), "A fox").json();
    assert_eq!(first["token_ids"], again["token_ids"]);
}

#[test]
fn the_prompt_may_come_from_a_file_or_from_stdin() {
    let folder = Folder::new();
    folder.write("prompt.txt", "Once upon a time\n");
    let expected = folder.run_prompt("run -n 16", "Once upon a time").ok();
    assert_eq!(folder.run("run -n 16 -f prompt.txt").ok(), expected);
    assert_eq!(folder.run_with_stdin("run -n 16 -f -", "Once upon a time").ok(), expected);
}

#[test]
fn a_stop_text_ends_the_answer_and_is_not_in_it() {
    let folder = Folder::new();
    let whole = folder.run_prompt("run -n 64", "Once upon a time").ok();
    let word = whole.split_whitespace().nth(9).unwrap();
    let cut = folder.run_prompt(&format!("run -n 64 --json -r {word}"), "Once upon a time").json();
    assert_eq!(cut["text"].as_str().unwrap(), &whole[..whole.find(word).unwrap()]);
    assert_eq!(cut["finish_reason"], "stop");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = Folder::new();
    let mut command = folder.command("run -n 200 --ignore-eos -p Once");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1]).unwrap();
    drop(stdout);
    let finished = folder.finished(child);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(!finished.stderr.contains("error"), "{finished:?}");
}

#[test]
fn ctrl_c_ends_the_run_and_its_worker() {
    let folder = Folder::new();
    let mut command = folder.command("run -n 240 --ignore-eos -p Once");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Not before it is a program of its own: whoever starts a process waits for that.
    let is_worker = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("worker"))
    };
    let worker = wait_for("a worker", || children(child.id()).into_iter().find(is_worker));
    send(worker, Signal::SIGSTOP); // It cannot finish now.
    send(child.id(), Signal::SIGINT);
    let finished = folder.finished(child);
    assert_eq!(finished.code, Some(130), "{finished:?}");
    assert!(!is_alive(worker));
}
