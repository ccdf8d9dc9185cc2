//! `bitnetd batch`: the same answers with any split, results as they finish, resumed after a kill.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::support::{Daemon, Folder, PROMPTS, wait_for};

/// Index to text of a results file; an index that comes twice is a fault.
#[track_caller]
fn texts(path: &Path) -> BTreeMap<u64, String> {
    let mut texts = BTreeMap::new();
    for line in fs::read_to_string(path).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let text = line["text"].as_str().unwrap_or_else(|| panic!("{line}")).to_owned();
        let before = texts.insert(line["index"].as_u64().unwrap(), text);
        assert_eq!(before, None, "{line}");
    }
    texts
}

#[test]
fn twenty_prompts_have_the_same_answers_with_every_split() {
    let folder = Folder::new();
    folder.write("prompts.txt", PROMPTS.join("\n"));
    let flags = "-n 40 --temp 0.8 -s 11";
    let splits = [
        "--workers 1 --threads 2",
        "--workers 2 --threads 1",
        "--workers 1 --threads 1 -P 1",
        "--profile auto",
    ];
    let mut answers = Vec::new();
    for (number, split) in splits.iter().enumerate() {
        let finished = folder.run(&format!("batch prompts.txt -o {number}.jsonl {flags} {split}"));
        assert!(finished.stderr.contains("20 done, 0 failed in"), "{finished:?}");
        assert!(PROMPTS.iter().all(|prompt| finished.stdout.contains(prompt)), "{finished:?}");
        finished.ok();
        answers.push(texts(&folder.path(&format!("{number}.jsonl"))));
    }
    assert_eq!(answers[0].len(), 20);
    for (answer, split) in answers.iter().zip(splits) {
        assert_eq!(*answer, answers[0], "{split} against {}", splits[0]);
    }
    let alone = folder.run_prompt(&format!("run {flags} --json"), PROMPTS[5]).json();
    assert_eq!(alone["text"], answers[0][&5].as_str());
}

#[test]
fn a_killed_batch_goes_on_where_it_stopped() {
    let folder = Folder::new();
    let prompts: Vec<String> = (0..60).map(|number| format!("{} {number}", PROMPTS[number % 20])).collect();
    folder.write("prompts.txt", prompts.join("\n"));
    let line = "batch prompts.txt -o out.jsonl -n 24 -P 2 --temp 0.8 -s 3";
    let mut child = folder.command(line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let out = folder.path("out.jsonl");
    let n_lines = || fs::read_to_string(&out).map_or(0, |text| text.lines().count());
    wait_for("a few results", || (n_lines() >= 3).then_some(()));
    child.kill().unwrap();
    child.wait().unwrap();
    let n_before = fs::read_to_string(&out).unwrap().matches('\n').count();
    assert!(n_before < 60, "it was too fast to be killed");
    // A power cut may leave half a line.
    fs::write(&out, fs::read_to_string(&out).unwrap() + "{\"index\":59,\"pro").unwrap();

    let resumed = folder.run(line);
    let summary = format!("{} done, 0 failed, {n_before} from before", 60 - n_before);
    assert!(resumed.stderr.contains(&summary), "{resumed:?}");
    resumed.ok();
    folder.run(&line.replace("out.jsonl", "calm.jsonl")).ok();
    assert_eq!(texts(&out), texts(&folder.path("calm.jsonl")));

    let content = fs::read_to_string(&out).unwrap();
    let again = folder.run(line);
    assert!(again.stderr.contains("0 done, 0 failed, 60 from before"), "{again:?}");
    assert_eq!(fs::read_to_string(&out).unwrap(), content);
    let other = folder.run(&line.replace("-n 24", "-n 25"));
    assert_eq!(other.code, Some(65), "{other:?}");
    assert_eq!(fs::read_to_string(&out).unwrap(), content);
}

#[test]
fn one_bad_prompt_fails_alone() {
    let folder = Folder::new();
    folder.write("prompts.txt", format!("Once\n{}\nOne day", "many words ".repeat(2000)));
    let finished = folder.run("batch prompts.txt -o out.jsonl -n 8 --json");
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert!(finished.stderr.contains("prompt 1 failed:"), "{finished:?}");
    assert!(finished.stderr.contains("2 done, 1 failed"), "{finished:?}");
    assert_eq!(finished.stdout, fs::read_to_string(folder.path("out.jsonl")).unwrap());
    let lines: Vec<Value> = finished.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let errors: Vec<u64> = lines
        .iter()
        .filter(|line| line["error"].is_string())
        .map(|line| line["index"].as_u64().unwrap())
        .collect();
    assert_eq!(errors, [1]);
}

#[test]
fn lines_of_json_change_single_parameters() {
    let folder = Folder::new();
    folder.write("prompts.jsonl", "{\"prompt\":\"Once\",\"max_tokens\":3}\n{\"prompt\":\"Once\"}\n");
    let out = folder.run("batch prompts.jsonl -n 5 --ignore-eos --json -P 1").ok();
    let tokens: Vec<Value> =
        out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["tokens"].clone()).collect();
    assert_eq!(tokens, [3, 5]);
}

#[test]
fn a_daemon_gives_the_same_answers() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    folder.write("prompts.txt", PROMPTS.join("\n"));
    folder.run("batch prompts.txt -o own.jsonl -n 16 --temp 0.8 -s 5").ok();
    folder.run("batch prompts.txt -o its.jsonl -n 16 --temp 0.8 -s 5 --socket %/bitnetd.sock").ok();
    assert_eq!(texts(&folder.path("its.jsonl")), texts(&folder.path("own.jsonl")));
    assert_eq!(daemon.status().unwrap().totals.completed, 20);
}
