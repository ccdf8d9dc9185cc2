//! The results file: what is refused, what is resumed, what a crash leaves.

use std::fs;

use bitnetd_proto::event::FinishReason;
use bitnetd_proto::request::{GenerateRequest, Prompt};

use super::*;

fn item(index: usize, prompt: &str) -> Item {
    Item { index, prompt: prompt.into(), request: GenerateRequest::new(Prompt::Text(prompt.into())) }
}

fn items() -> Vec<Item> {
    vec![item(0, "zero"), item(1, "one"), item(2, "two")]
}

fn answer(item: &Item) -> Answer {
    Answer {
        index: item.index,
        prompt: item.prompt.clone(),
        text: format!("after {}\n", item.prompt),
        tokens: 2,
        finish_reason: FinishReason::Stop,
        seconds: 0.5,
        prompt_tokens: 1,
        cached_tokens: 0,
        ttft_seconds: 0.25,
        prefill_seconds: 0.25,
        decode_seconds: 0.25,
        seed: 7,
        model: Some("tales".into()),
        token_ids: vec![10, 11],
        logprobs: None,
    }
}

fn done_line(item: &Item) -> String {
    line(item, Ok(&answer(item))).unwrap()
}

#[test]
fn a_line_has_what_the_documentation_names() {
    let items = items();
    insta::assert_snapshot!(done_line(&items[0]), @r#"{"index":0,"prompt":"zero","text":"after zero\n","tokens":2,"finish_reason":"stop","seconds":0.5,"prompt_tokens":1,"cached_tokens":0,"ttft_seconds":0.25,"prefill_seconds":0.25,"decode_seconds":0.25,"seed":7,"model":"tales","token_ids":[10,11],"request":"a24b97fcaf56b32f"}"#);
    insta::assert_snapshot!(line(&items[1], Err("too long")).unwrap(), @r#"{"index":1,"prompt":"one","error":"too long","request":"370f483dc9d48e99"}"#);
}

#[test]
fn what_is_done_is_not_done_again_and_what_failed_is() {
    let folder = tempfile::tempdir().unwrap();
    let (path, items) = (folder.path().join("out.jsonl"), items());
    let mut results = Results::open(&path, &items).unwrap();
    assert_eq!(results.n_done(), 0);
    results.append(&done_line(&items[2])).unwrap();
    results.append(&line(&items[0], Err("no")).unwrap()).unwrap();
    results.sync().unwrap();
    drop(results);

    let mut results = Results::open(&path, &items).unwrap();
    assert_eq!((0..3).map(|index| results.is_done(index)).collect::<Vec<_>>(), [false, false, true]);
    results.append(&done_line(&items[0])).unwrap();
    drop(results);
    assert_eq!(Results::open(&path, &items).unwrap().n_done(), 2);
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
}

#[test]
fn a_cut_line_is_removed_wherever_the_cut_is() {
    let folder = tempfile::tempdir().unwrap();
    let (path, items) = (folder.path().join("out.jsonl"), items());
    let (first, second) = (done_line(&items[0]), done_line(&items[1]));
    for cut in 1..second.len() {
        fs::write(&path, first.clone() + &second[..cut]).unwrap();
        let mut results = Results::open(&path, &items).unwrap();
        assert!(results.is_done(0) && !results.is_done(1), "cut at {cut}");
        results.append(&second).unwrap();
        drop(results);
        assert_eq!(fs::read_to_string(&path).unwrap(), first.clone() + &second, "cut at {cut}");
    }
}

#[test]
fn a_file_of_something_else_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (path, items) = (folder.path().join("out.jsonl"), items());
    let other_parameters =
        Item { request: GenerateRequest { max_tokens: 5, ..items[1].request.clone() }, ..items[1].clone() };
    let contents = [
        "hello\n".to_owned(),
        "dear diary".to_owned(),
        "{\"index\":0,\"prompt\":\"zero\"}\n".to_owned(),
        done_line(&item(7, "zero")),
        done_line(&item(0, "nought")),
        done_line(&items[0]) + &done_line(&other_parameters),
    ];
    let mut complaints = Vec::new();
    for content in contents {
        fs::write(&path, &content).unwrap();
        let error = Results::open(&path, &items).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Data);
        assert_eq!(fs::read_to_string(&path).unwrap(), content);
        complaints.push(error.to_string().replace(&path.display().to_string(), "out.jsonl"));
    }
    insta::assert_snapshot!(complaints.join("\n"), @r#"
    error: `out.jsonl` is not a result of this batch (line 1: expected value at line 1 column 1)
    hint: choose another -o, or delete the file; nothing was changed in it
    error: `out.jsonl` is not a result of this batch (line 1: it is none of ours)
    hint: choose another -o, or delete the file; nothing was changed in it
    error: `out.jsonl` is not a result of this batch (line 1: missing field `request` at line 1 column 27)
    hint: choose another -o, or delete the file; nothing was changed in it
    error: `out.jsonl` is not a result of this batch (line 1: there are not so many prompts)
    hint: choose another -o, or delete the file; nothing was changed in it
    error: `out.jsonl` is not a result of this batch (line 1: its prompt is another)
    hint: choose another -o, or delete the file; nothing was changed in it
    error: `out.jsonl` is not a result of this batch (line 2: it was made with other parameters)
    hint: choose another -o, or delete the file; nothing was changed in it
    "#);
}

#[test]
fn two_batches_do_not_write_to_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let (path, items) = (folder.path().join("out.jsonl"), items());
    let _first = Results::open(&path, &items).unwrap();
    assert_eq!(Results::open(&path, &items).unwrap_err().exit_code(), ExitCode::Temporary);
}
