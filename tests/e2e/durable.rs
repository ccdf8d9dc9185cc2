//! Durable jobs with the real binary: killed again and again, a full disk, a damaged file, two daemons.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::Stdio;

use bitnetd_proto::client::Submission;
use bitnetd_proto::durable::JobState;
use bitnetd_proto::error::ErrorCode;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{Daemon, Folder, PROMPTS, generate, random_request, wait_for};

/// What is said of a job that was submitted now, and of the service's model.
fn model_of_a_new_job(folder: &Folder, daemon: &Daemon) -> (u64, Value) {
    let job = folder.run_prompt("submit -n 4 --socket %/bitnetd.sock", "Once").ok();
    let answer = folder.run(&format!("wait {} --json --socket %/bitnetd.sock", job.trim())).json();
    assert_eq!(answer["model"], daemon.status().unwrap().model.unwrap().name, "{answer}");
    (job.trim().parse().unwrap(), answer["model"].clone())
}

#[test]
fn a_result_says_which_model_gave_it_after_a_reload_and_a_restart_too() {
    let folder = Folder::new();
    folder.run("model synth tiny %/other.gguf --seed 1").ok();
    folder.write("d.toml", "[split]\nworkers = 1\nthreads = 1\n");
    let daemon = Daemon::start(&folder, "-c %/d.toml");
    let (first, model) = model_of_a_new_job(&folder, &daemon);
    folder.write("d.toml", "model.path = \"other.gguf\"\nsplit = { workers = 1, threads = 1 }\n");
    folder.run("reload --socket %/bitnetd.sock").ok();
    let (second, other) = model_of_a_new_job(&folder, &daemon);
    assert_ne!(model, other);
    drop(daemon);
    let _daemon = Daemon::start(&folder, "-c %/d.toml");
    for (job, model) in [(first, model), (second, other)] {
        let kept = folder.run(&format!("result {job} --json --socket %/bitnetd.sock")).json();
        assert_eq!(kept["model"], model, "{kept}");
    }
}

const SPLIT: &str = "--workers 2 --threads 1";

fn submission(number: usize, key: &str) -> Submission {
    let kind = number % PROMPTS.len();
    let request = random_request(PROMPTS[kind], kind as u64, 60);
    Submission { key: Some(format!("{key}/{number}")), request }
}

#[test]
fn every_acknowledged_job_has_one_result_however_often_the_supervisor_is_killed() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, SPLIT);
    let calm: Vec<String> = (0..PROMPTS.len())
        .map(|number| generate(&mut daemon.connect().unwrap(), &submission(number, "").request).unwrap())
        .collect();

    let (mut acknowledged, mut n_offered): (Vec<(u64, usize)>, usize) = (Vec::new(), 0);
    for round in 0..5_usize {
        // Offer jobs and kill the supervisor while they are on their way, or being worked on.
        let mut client = daemon.connect().unwrap();
        let before = acknowledged.len();
        let _broken =
            client.submit_many((n_offered..n_offered + 40).map(|n| submission(n, "job")), |place, answer| {
                acknowledged.push((answer.unwrap().job, n_offered + place));
                if round % 2 == 0 && acknowledged.len() - before == 7 * (round + 1) {
                    daemon.signal(Signal::SIGKILL); // Some acknowledgements never arrive.
                }
                true
            });
        n_offered += 40;
        if round % 2 == 1 {
            wait_for("some are done", || {
                let report = daemon.status()?.journal?;
                (report.ended > 3).then_some(())
            });
            daemon.signal(Signal::SIGKILL);
        }
        assert_eq!(daemon.wait(), None);
        daemon = Daemon::start(&folder, SPLIT);
        // What is not known to be there is offered again, under the same keys.
        let mut client = daemon.connect().unwrap();
        let known: BTreeSet<usize> = acknowledged.iter().map(|(_, number)| *number).collect();
        let missing: Vec<usize> = (0..n_offered).filter(|number| !known.contains(number)).collect();
        client
            .submit_many(missing.iter().map(|n| submission(*n, "job")), |place, answer| {
                acknowledged.push((answer.unwrap().job, missing[place]));
                true
            })
            .unwrap();
    }

    assert_eq!(acknowledged.len(), 200);
    let numbers: BTreeSet<u64> = acknowledged.iter().map(|(job, _)| *job).collect();
    assert_eq!(numbers.len(), 200, "two keys are one job");
    let mut client = daemon.connect().unwrap();
    for (job, number) in acknowledged {
        let record = client.wait(job, None).unwrap();
        assert_eq!(record.summary.state, JobState::Done, "{record:?}");
        assert_eq!(record.summary.key, Some(format!("job/{number}")));
        assert_eq!(record.answer.unwrap().text, calm[number % PROMPTS.len()], "job {job}");
    }
    let report = daemon.status().unwrap().journal.unwrap();
    assert_eq!((report.queued, report.running, report.ended), (0, 0, 200), "nothing is lost or doubled");
}

#[test]
fn the_commands_do_what_they_say() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, SPLIT);
    let on = |line: &str| format!("{line} --socket %/bitnetd.sock");
    let told =
        folder.run_prompt(&on("submit -n 20 --temp 0.8 -s 5 --id mine --json"), "Once upon a time").json();
    assert_eq!(
        (&told["job"], &told["seed"], &told["is_new"]),
        (&1.into(), &5.into(), &true.into()),
        "{told}"
    );
    let again = folder.run_prompt(&on("submit -n 20 --temp 0.8 -s 5 --id mine"), "Once upon a time").ok();
    assert_eq!(again, "1\n");
    let text = folder.run_prompt("run -q -n 20 --temp 0.8 -s 5", "Once upon a time").ok();
    assert_eq!(folder.run(&on("wait 1")).ok(), text);
    assert_eq!(folder.run(&on("result 1")).ok(), text);
    let json = folder.run(&on("result 1 --json")).json();
    assert_eq!(json["text"], Value::from(text.trim_end_matches('\n')));
    for key in ["job", "state", "id", "prompt", "tokens", "finish_reason", "seconds", "token_ids", "seed"] {
        assert!(!json[key].is_null(), "no {key}: {json}");
    }

    folder.write(
        "many.jsonl",
        "{\"prompt\": \"A\", \"max_tokens\": 3}\n{\"prompt\": \"B\", \"max_tokens\": 4}\n",
    );
    assert_eq!(folder.run(&on("submit many.jsonl --id many")).ok(), "2\n3\n");
    let lines = folder.run(&on("wait 2 3 --json --timeout 60")).ok();
    let tokens: Vec<Value> =
        lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["tokens"].clone()).collect();
    assert_eq!(tokens, [3, 4]);
    assert_eq!(folder.run_with_stdin(&on("submit -f - -n 2"), "From a pipe\n").ok(), "4\n");
    folder.run(&on("wait 4")).ok();
    let list = folder.run(&on("jobs --state done")).ok();
    assert_eq!(list.lines().count(), 5, "{list}");
    assert!(list.lines().nth(1).unwrap().contains("From a pipe"), "{list}");
    let late = folder.run(&on("cancel 1"));
    assert_eq!((late.code, late.stderr.trim()), (Some(1), "error: job 1 had ended before: it is done"));
    let nobody = folder.run(&on("wait 99"));
    assert_eq!(nobody.code, Some(1));
    assert!(nobody.stderr.starts_with("error: there is no job 99\nhint: "), "{nobody:?}");
    assert!(folder.run(&on("status")).ok().contains("4 results kept"));
    drop(daemon);
}

#[test]
fn who_waits_outlives_a_restart_of_the_daemon() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, SPLIT);
    let job = daemon.connect().unwrap().submit(submission(3, "a")).unwrap().job;
    // Enough in front of it that it has not ended when the daemon is killed.
    let mut last = submission(4, "b");
    last.request.priority = -1;
    let crowd = (10..200).map(|n| submission(n, "crowd")).chain([last]);
    let mut target = 0;
    daemon
        .connect()
        .unwrap()
        .submit_many(crowd, |_, answer| {
            target = answer.unwrap().job;
            true
        })
        .unwrap();
    let mut command = folder.command(&format!("wait {job} {target} --json --socket %/bitnetd.sock"));
    let mut waiting = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(waiting.stdout.take().unwrap());
    let mut lines = String::new();
    stdout.read_line(&mut lines).unwrap(); // The first is done, and the second is waited for.
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    let _next = Daemon::start(&folder, SPLIT);
    stdout.read_to_string(&mut lines).unwrap();
    folder.finished(waiting).ok();
    assert_eq!(lines.lines().count(), 2, "{lines}");
}

#[test]
fn a_full_disk_is_told_and_what_was_acknowledged_is_done() {
    let folder = Folder::new();
    folder.write("b.toml", "[split]\nworkers = 1\nthreads = 1\n[queue]\njournal = \"jobs.redb\"\n");
    // No file of the daemon may grow beyond 16 MiB (in blocks of 512 bytes); the model in memory needs some of that, too.
    let script = format!(
        "ulimit -f 32768; exec {} serve -c b.toml --socket bitnetd.sock 2>>log",
        env!("CARGO_BIN_EXE_bitnetd")
    );
    let mut daemon = Daemon::adopt(&folder, folder.shell(&script));
    let mut client = daemon.connect().unwrap();
    // Prompts that no context window takes: each ends at once, and is kept.
    let large = |n: usize| {
        let mut submission = submission(n, "large");
        let bitnetd_proto::request::Prompt::Text(text) = &mut submission.request.prompt else { panic!() };
        *text = "x ".repeat(400_000);
        submission
    };
    let mut acknowledged = Vec::new();
    // The end of a job is small and may still find room, after which all is well until the next one.
    wait_for("a refusal, and a status that tells of it", || {
        assert!(acknowledged.len() < 100, "the disk is never full");
        match client.submit(large(acknowledged.len())) {
            Ok(submitted) => acknowledged.push(submitted.job),
            Err(refusal) => {
                let code = refusal.wire().map(|error| error.code);
                assert_eq!(code, Some(ErrorCode::JournalUnavailable), "{refusal}");
            }
        }
        let shown = folder.run("status --socket %/bitnetd.sock");
        let is_told = shown.stdout.starts_with("health   degraded") && shown.stdout.contains("PROBLEM: ");
        assert_eq!(shown.code, Some(i32::from(is_told)), "{shown:?}");
        is_told.then_some(())
    });
    // Clients who wait for an answer notice nothing.
    assert!(!generate(&mut daemon.connect().unwrap(), &random_request("Once", 1, 5)).unwrap().is_empty());
    assert!(daemon.log(&folder).contains("the journal cannot be written"));
    daemon.signal(Signal::SIGKILL);
    daemon.wait();

    let daemon = Daemon::start(&folder, "-c b.toml");
    let mut client = daemon.connect().unwrap();
    for job in &acknowledged {
        let record = client.wait(*job, None).unwrap();
        assert_eq!(record.summary.error.map(|error| error.code), Some(ErrorCode::ContextExceeded));
    }
    let report = daemon.status().unwrap().journal.unwrap();
    assert_eq!((report.problem, report.is_writable), (None, true));
    let more = client.submit(submission(1, "after")).unwrap().job;
    assert_eq!(client.wait(more, None).unwrap().summary.state, JobState::Done);
}

#[test]
fn a_damaged_journal_is_set_aside_and_everybody_can_see_it() {
    let folder = Folder::new();
    folder.write("b.toml", "[split]\nworkers = 1\nthreads = 1\n[queue]\njournal = \"jobs.redb\"\n");
    let mut daemon = Daemon::start(&folder, "-c b.toml");
    let mut client = daemon.connect().unwrap();
    let job = client.submit(submission(1, "a")).unwrap().job;
    client.wait(job, None).unwrap();
    let metrics = client.metrics().unwrap();
    assert!(metrics.contains("\nbitnetd_durable_jobs{state=\"ended\"} 1\n"), "{metrics}");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    let mut bytes = fs::read(folder.path("jobs.redb")).unwrap();
    bytes[8192..].iter_mut().for_each(|byte| *byte = !*byte);
    fs::write(folder.path("jobs.redb"), &bytes).unwrap();

    let daemon = Daemon::spawn(&folder, "-c b.toml");
    let report = wait_for("it answers", || daemon.status()?.journal);
    let problem = report.problem.unwrap();
    assert!(problem.contains("jobs.redb.damaged-"), "{problem}");
    wait_for("it is ready, and says that it is degraded", || {
        let shown = folder.run("status --socket %/bitnetd.sock");
        (shown.code == Some(1) && shown.stdout.starts_with("health   degraded")).then_some(())
    });
    assert!(daemon.log(&folder).contains("THE JOURNAL WAS DAMAGED"));
    let metrics = folder.run("metrics --socket %/bitnetd.sock").ok();
    for line in ["bitnetd_health{state=\"degraded\"} 1", "bitnetd_durable_jobs{state=\"ended\"} 0"] {
        assert!(metrics.lines().any(|found| found == line), "no `{line}` in\n{metrics}");
    }
    let lost = daemon.connect().unwrap().result(job).unwrap_err();
    assert_eq!(lost.wire().map(|error| error.code), Some(ErrorCode::NotFound));
    let new = daemon.connect().unwrap().submit(submission(1, "a")).unwrap();
    assert!(new.is_new && new.job > 1_000_000_000, "{new:?}");
}

#[test]
fn two_daemons_do_not_share_a_journal() {
    let folder = Folder::new();
    folder.write("b.toml", "[split]\nworkers = 1\nthreads = 1\n[queue]\njournal = \"jobs.redb\"\n");
    folder.write("c.toml", "[split]\nworkers = 1\nthreads = 1\n");
    let daemon = Daemon::start(&folder, "-c b.toml");
    let second = folder.run("serve -c b.toml --socket %/second.sock");
    assert_eq!(second.code, Some(75), "{second:?}");
    assert!(
        second.stderr.contains("error: journal `[DIR]/jobs.redb` is in use by another process\nhint: "),
        "{second:?}"
    );
    // The usual place: whoever comes second works without durable jobs, and says so to whoever wants one.
    drop(daemon);
    let _first = Daemon::start(&folder, "-c c.toml");
    let mut command = folder.command("serve -c c.toml --socket %/second.sock -q");
    let mut second = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let refused = wait_for("the second answers", || {
        let told = folder.run("submit -p hello --socket %/second.sock");
        (told.code != Some(69)).then_some(told)
    });
    second.kill().unwrap();
    second.wait().unwrap();
    assert_eq!(refused.code, Some(71), "{refused:?}");
    assert!(refused.stderr.contains("is in use by another process"), "{refused:?}");
}

#[test]
fn a_drain_leaves_the_queue_to_the_next_daemon() {
    let folder = Folder::new();
    folder.write("b.toml", "[split]\nworkers = 1\nthreads = 1\n[restart]\ndrain_timeout = \"10ms\"\n");
    let mut daemon = Daemon::start(&folder, "-c b.toml");
    let mut jobs = Vec::new();
    daemon
        .connect()
        .unwrap()
        .submit_many((0..60).map(|n| submission(n, "a")), |_, answer| {
            jobs.push(answer.unwrap().job);
            true
        })
        .unwrap();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    let next = Daemon::start(&folder, "-c b.toml");
    let mut client = next.connect().unwrap();
    for job in jobs {
        assert_eq!(client.wait(job, None).unwrap().summary.state, JobState::Done);
    }
}
