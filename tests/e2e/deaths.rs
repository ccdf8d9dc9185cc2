//! Promise P3: workers are killed while they work, and no client sees it. And nobody survives the supervisor.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bitnetd_config::Config;
use bitnetd_placement::{Plan, WorkerPlacement};
use bitnetd_proto::request::GenerateRequest;
use bitnetd_supervisor::{ClientId, JobEvent, ModelSource, Service, ServiceSpec};
use nix::sys::signal::Signal;

use crate::support::{Daemon, Folder, PROMPTS, generate, is_alive, random_request, send, wait_for};

/// A supervisor that never gives a slot up.
pub(crate) const PATIENT: &str = "[split]\nworkers = 2\nthreads = 1\n[restart]\nmax = 1000\nbackoff_min = \"1ms\"\n\
                       backoff_max = \"2ms\"\n[queue]\nmax_deaths = 100\n";

#[test]
fn killed_workers_are_not_seen_by_any_client() {
    let folder = Folder::new();
    folder.write("patient.toml", PATIENT);
    no_client_sees_deaths(&Daemon::start(&folder, "-c patient.toml"), 10);
}

#[test]
fn nor_where_keys_and_values_have_eight_bits() {
    let folder = Folder::new();
    folder.write("patient.toml", PATIENT);
    let daemon = Daemon::start(&folder, "-c patient.toml");
    let f16_bytes = daemon.status().unwrap().model.unwrap().kv_bytes;
    drop(daemon);
    folder.write("patient.toml", format!("{PATIENT}[engine]\nkv_type = \"q8_0\"\n"));
    let daemon = Daemon::start(&folder, "-c patient.toml");
    let q8_bytes = daemon.status().unwrap().model.unwrap().kv_bytes;
    assert_eq!(q8_bytes * 64, f16_bytes * 34, "34 bytes for 32 numbers, not 64");
    no_client_sees_deaths(&daemon, 4);
}

/// Kills workers until so many jobs have moved in the middle of their answers.
pub(crate) fn no_client_sees_deaths(daemon: &Daemon, n_failovers: u64) {
    let request = |number: usize| random_request(PROMPTS[number], number as u64, 120);
    let calm: Vec<String> =
        (0..8).map(|number| generate(&mut daemon.connect().unwrap(), &request(number)).unwrap()).collect();

    let is_enough = AtomicBool::new(false);
    let n_answers: usize = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|number| {
                let (calm, is_enough) = (&calm, &is_enough);
                scope.spawn(move || {
                    let mut n_answers = 0;
                    while !is_enough.load(Ordering::Relaxed) {
                        let text = generate(&mut daemon.connect().unwrap(), &request(number));
                        assert_eq!(text.as_ref().ok(), Some(&calm[number]), "{text:?}");
                        n_answers += 1;
                    }
                    n_answers
                })
            })
            .collect();
        // Kill whoever has jobs, until jobs have moved in the middle several times.
        let outcome = std::panic::catch_unwind(|| {
            wait_for("enough jobs have moved", || {
                let report = daemon.status()?;
                let busy = report.slots.iter().find(|slot| slot.state == "ready" && slot.jobs > 0)?;
                send(busy.pid?, Signal::SIGKILL);
                (report.totals.failovers >= n_failovers && report.totals.restarts >= n_failovers / 2)
                    .then_some(())
            });
        });
        is_enough.store(true, Ordering::Relaxed);
        let n_answers = clients.into_iter().map(|client| client.join().unwrap()).sum();
        outcome.unwrap();
        n_answers
    });
    assert!(n_answers >= 8);
    let report = daemon.status().unwrap();
    assert_eq!((report.totals.failed, report.totals.cancelled), (0, 0), "{report:?}");
}

#[test]
fn a_hung_worker_is_replaced_and_its_job_goes_on() {
    let folder = Folder::new();
    folder.write("watch.toml", format!("{PATIENT}[watchdog]\ninterval = \"100ms\"\ntimeout = \"1s\"\n"));
    let daemon = Daemon::start(&folder, "-c watch.toml");
    let request = random_request("Once", 9, 60);
    let calm = generate(&mut daemon.connect().unwrap(), &request).unwrap();
    let workers = daemon.workers();
    workers.iter().for_each(|pid| send(*pid, Signal::SIGSTOP));
    assert_eq!(generate(&mut daemon.connect().unwrap(), &request).unwrap(), calm);
    wait_for("the hung ones are gone", || workers.iter().all(|pid| !is_alive(*pid)).then_some(()));
}

#[test]
fn no_worker_survives_a_killed_supervisor() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let workers = daemon.workers();
    assert_eq!(workers.len(), 2);
    send(workers[0], Signal::SIGSTOP); // Not even one that cannot notice.
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.wait(), None);
    wait_for("the workers are gone", || workers.iter().all(|pid| !is_alive(*pid)).then_some(()));
}

#[test]
fn the_socket_of_a_killed_supervisor_is_taken_over() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    assert!(daemon.socket.exists());
    let next = Daemon::start(&folder, "--workers 1 --threads 1");
    assert!(!generate(&mut next.connect().unwrap(), &random_request("Once", 1, 5)).unwrap().is_empty());
}

/// One job on a supervisor in this process whose workers get these extra arguments; its text, and who was replaced why.
fn answer_in_process(extra: &[&str], request: &GenerateRequest) -> (String, Option<String>) {
    let mut config = Config::default();
    config.watchdog.interval = Duration::from_millis(100);
    config.watchdog.timeout = Duration::from_secs(2);
    config.restart.backoff_min = Duration::from_millis(1);
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf");
    let mut spec = ServiceSpec {
        config,
        plan: Plan {
            workers: vec![WorkerPlacement { cpus: vec![0], ..WorkerPlacement::default() }],
            ..Plan::default()
        },
        model: ModelSource::File(model),
        memory_bytes: None,
        image_cache: None,
        worker_program: env!("CARGO_BIN_EXE_bitnetd").into(),
        worker_args: vec!["worker".into()],
    };
    spec.worker_args.extend(extra.iter().map(Into::into));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let service = Service::start(spec).await.unwrap();
        service.ready().await.unwrap();
        let mut job = service.submit(ClientId::InProcess, request.clone()).await.unwrap();
        let mut text = String::new();
        while let Some(event) = job.next().await {
            match event {
                JobEvent::Token(token) => text += &token.text,
                JobEvent::Done(done) => text += &done.tail,
                JobEvent::WorkerDied { .. } => {}
                JobEvent::Failed(error) => panic!("{error}"),
            }
        }
        let last_exit = service.status().await.slots[0].last_exit.clone();
        service.stop().await;
        service.stopped().await;
        (text, last_exit)
    })
}

#[test]
fn an_endless_loop_on_the_compute_thread_is_found_and_the_answer_goes_on() {
    // The thread that reads the link is alive and well all the time: only the step loop's silence tells.
    let request = random_request("Once", 4, 40);
    let (calm, _) = answer_in_process(&[], &request);
    let (text, last_exit) = answer_in_process(&["--hang-after", "15"], &request);
    assert_eq!(text, calm);
    assert_eq!(last_exit.as_deref(), Some("killed: its step loop did not answer for 2s"));
}

#[test]
fn a_worker_that_reads_long_prompts_or_does_nothing_is_not_taken_for_a_hung_one() {
    // Long enough for a worker that has to wait for a CPU on a busy machine.
    const TIMEOUT: Duration = Duration::from_secs(5);
    let folder = Folder::new();
    // Prompts are read a token a step, with the slow kernels: seconds for each, and no answer meanwhile.
    let text = "split = { workers = 1, threads = 1 }\nwatchdog = { interval = \"100ms\", timeout = \"5s\" }\n\
                engine = { isa = \"scalar\", prefill_chunk = 1, max_batch = 8 }\n";
    folder.write("watch.toml", text);
    let daemon = Daemon::start(&folder, "-c watch.toml");
    let worker = daemon.workers();
    // On however fast a machine: more prompts at once until reading them takes longer than a silence may.
    let was_long = [1, 2, 4, 8].into_iter().any(|n_prompts| {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for number in 0..n_prompts {
                let prompt =
                    format!("{number} {n_prompts} {}", "Once upon a time there was a dog. ".repeat(20));
                let daemon = &daemon;
                scope.spawn(move || {
                    let request = random_request(&prompt, 1, 1);
                    generate(&mut daemon.connect().unwrap(), &request).unwrap();
                });
            }
        });
        begin.elapsed() > TIMEOUT + TIMEOUT / 4
    });
    assert!(was_long, "nothing here takes long enough to be taken for a hang: give the test more to read");
    // And idle for longer than a silence may be.
    let begin = Instant::now();
    wait_for("an idle time beyond the timeout", || (begin.elapsed() > TIMEOUT + TIMEOUT / 4).then_some(()));
    let report = daemon.status().unwrap();
    assert_eq!((report.totals.restarts, report.totals.failovers), (0, 0), "{report:?}");
    assert_eq!(daemon.workers(), worker);
}

#[test]
fn both_workers_get_work() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let workers = daemon.workers();
    send(workers[0], Signal::SIGSTOP); // What is given to it stays there.
    std::thread::scope(|scope| {
        let first = scope.spawn(|| generate(&mut daemon.connect().unwrap(), &random_request("Once", 1, 30)));
        wait_for("the first job is on the first worker", || {
            (daemon.status()?.slots[0].jobs == 1).then_some(())
        });
        let second = generate(&mut daemon.connect().unwrap(), &random_request("A cat", 2, 30)).unwrap();
        assert!(!second.is_empty());
        let slots = daemon.status().unwrap().slots;
        assert_eq!(slots[0].jobs, 1, "the second was done while the first stood still");
        send(workers[0], Signal::SIGCONT);
        assert!(!first.join().unwrap().unwrap().is_empty());
    });
}

#[test]
fn a_slot_that_dies_too_often_is_seen_in_the_exit_code_and_can_be_brought_back() {
    let folder = Folder::new();
    folder.write("d.toml", "split = { workers = 2, threads = 1 }\nrestart = { max = 1, window = \"24h\", backoff_min = \"1ms\" }\n");
    let daemon = Daemon::start(&folder, "-c %/d.toml");
    folder.run("status --socket %/bitnetd.sock").ok();
    wait_for("the slot to be given up", || {
        let slots = daemon.status()?.slots;
        if slots[1].state == "ready" {
            send(slots[1].pid?, Signal::SIGKILL);
        }
        (slots[1].state == "failed").then_some(())
    });
    let status = folder.run("status --socket %/bitnetd.sock");
    assert_eq!(status.code, Some(1), "{status:?}");
    assert!(status.stdout.starts_with("health   degraded"), "{status:?}");
    let metrics = folder.run("metrics --socket %/bitnetd.sock").ok();
    assert!(metrics.contains("bitnetd_health{state=\"degraded\"} 1"), "{metrics}");
    assert!(metrics.contains("bitnetd_slots{state=\"failed\"} 1"), "{metrics}");
    let text = generate(&mut daemon.connect().unwrap(), &random_request("Once", 1, 5)).unwrap();
    assert!(!text.is_empty(), "the other worker works on");
    folder.run("restart 1 --socket %/bitnetd.sock").ok();
    wait_for("the slot is back", || {
        daemon.status().filter(|report| report.slots[1].state == "ready").map(drop)
    });
    folder.run("status --socket %/bitnetd.sock").ok();
}
