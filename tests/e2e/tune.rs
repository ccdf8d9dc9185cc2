//! `tune`: a sweep of the built-in model, what it leaves behind, and going on after a break.

use std::fs;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Folder, wait_for};

/// The smallest sweep there is.
const SWEEP: &str = "tune --quick --workload small --json";

#[test]
fn the_winner_is_written_down_and_auto_means_it() {
    let folder = Folder::new();
    folder.write("bitnetd.toml", "# Mine.\n[queue]\nmax_jobs = 9\n\n[split]\nprofile = \"balanced\"\n");
    let report = folder.run(&format!("{SWEEP} --write bitnetd.toml --plot tune.svg --plot tune.png")).json();

    let splits: Vec<&str> =
        report["splits"].as_array().unwrap().iter().map(|split| split["name"].as_str().unwrap()).collect();
    let rows = report["workloads"][0]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), splits.len());
    for row in rows {
        for rate in
            ["prefill_tokens_per_s", "decode_tokens_per_s", "decode_bytes_per_s", "whole_tokens_per_s"]
        {
            assert!(row[rate].as_f64().unwrap() > 0.0, "{rate} in {row}");
        }
    }

    let written = fs::read_to_string(folder.path("bitnetd.toml")).unwrap();
    assert!(
        written.starts_with("# Mine.\n") && written.contains("# Measured by `bitnetd tune`:"),
        "{written}"
    );
    let taken = |key: &str| {
        let document: toml::Table = written.parse().unwrap();
        document["split"][key].as_integer().unwrap()
    };
    assert!(splits.contains(&format!("{}x{}", taken("workers"), taken("threads")).as_str()), "{written}");
    folder.run("config check -q bitnetd.toml").ok();

    let plan = folder.run("topology --json").json();
    let n_workers = plan["plan"]["workers"].as_array().unwrap().len();
    assert_eq!(i64::try_from(n_workers).unwrap(), taken("workers"));
    let reasons = plan["plan"]["reasons"].as_array().unwrap();
    let is_told = |reason: &&serde_json::Value| {
        let text = reason.as_str().unwrap();
        text.starts_with("`auto`: ") && text.contains(" measured here by `tune` on ")
    };
    assert_eq!(reasons.iter().filter(is_told).count(), 1, "{plan}");

    assert!(fs::read_to_string(folder.path("tune.svg")).unwrap().contains("</svg>"));
    assert!(fs::read(folder.path("tune.png")).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn a_sweep_that_was_interrupted_goes_on() {
    let folder = Folder::new();
    let mut command = folder.command(SWEEP);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let journal = folder.path("state/tune.jsonl");
    wait_for("the first trial is written down", || {
        fs::read_to_string(&journal).ok().filter(|text| text.lines().count() >= 2)
    });
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    let interrupted = folder.finished(child);
    let finished = folder.run(SWEEP);
    // On a fast machine the sweep may have ended by itself just before the signal.
    if interrupted.code == Some(130) {
        assert!(finished.stderr.contains("from an interrupted sweep"), "{finished:?}");
    }
    finished.json();
    assert!(!journal.exists(), "a sweep that is over leaves no journal");
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_measured() {
    let folder = Folder::new();
    let refused = folder.run("tune --plot tune.jpg");
    assert_eq!(refused.code, Some(64), "{refused:?}");
    assert!(refused.stderr.contains("`tune.jpg`: a picture is .svg or .png"), "{refused:?}");
    let refused = folder.run("tune -m nowhere.gguf");
    assert_eq!(refused.code, Some(66), "{refused:?}");
}
