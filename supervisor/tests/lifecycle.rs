//! Start, placement, admission, drain, restart, and nothing left over.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use bitnetd_proto::client_link::ServerMessage;
use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::status::Health;
use bitnetd_supervisor::{ClientId, JobEvent, Service};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpgid};
use tokio::time::timeout;

use crate::support::{
    FAKE_WORKER, Fixture, LONG, busy_pid, end, expected_ids, finish, is_alive, n_fds, next, next_token, pids,
    request, signal, submit, wait_for, wait_for_slots,
};

#[tokio::test]
async fn a_worker_has_its_cpus_its_group_and_three_descriptors() {
    let fixture = Fixture::new(1, &[]);
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpu = (0..CpuSet::count()).rfind(|&cpu| allowed.is_set(cpu).unwrap()).unwrap();
    let mut spec = fixture.spec();
    spec.plan.workers[0].cpus = vec![u32::try_from(cpu).unwrap()];
    let service = Service::start(spec).await.unwrap();
    let model = timeout(LONG, service.ready()).await.unwrap().unwrap();
    assert_eq!(model.image_bytes, 10, "fd 4 is the image");
    let slot = service.status().await.slots.remove(0);
    let pid = slot.pid.unwrap();
    assert_eq!(slot.cpus, cpu.to_string());
    let start = fixture.starts().remove(0);
    assert!(start.contains(&format!("Cpus_allowed_list={cpu}\n")), "{start}");
    assert!(start.contains(" fds=0,1,2,3,4,5,6 "), "{start}");
    let raw = Pid::from_raw(i32::try_from(pid).unwrap());
    assert_eq!(getpgid(Some(raw)).unwrap(), raw);
    end(service).await;
    assert!(!is_alive(pid));
}

#[tokio::test]
async fn overload_is_typed_and_says_when_to_come_back() {
    let mut fixture = Fixture::new(1, &["pace_ms=5"]);
    fixture.config.engine.max_batch = 1;
    fixture.config.queue.max_jobs = 3;
    fixture.config.queue.max_per_client = 2;
    let service = fixture.ready().await;
    let ask = |uid| service.submit(ClientId::Uid(uid), request(100_000, 0));
    let running = ask(1).await.unwrap();
    let waiting = [ask(1).await.unwrap(), ask(1).await.unwrap()];
    let share = ask(1).await.unwrap_err();
    assert_eq!(
        (share.code, share.message.as_str()),
        (ErrorCode::Overloaded, "2 jobs of this client are waiting already")
    );
    let other = ask(2).await.unwrap();
    let full = ask(3).await.unwrap_err();
    assert_eq!((full.code, full.message.as_str()), (ErrorCode::Overloaded, "3 jobs are waiting already"));
    assert!(full.retry_after_ms.is_some_and(|ms| ms >= 50), "{full:?}");
    drop((running, waiting, other));
    wait_for("the cancelled jobs to go", async || {
        let status = service.status().await;
        (status.queued == 0 && status.slots[0].jobs == 0).then_some(())
    })
    .await;
    assert_eq!(service.status().await.totals.cancelled, 4);
    end(service).await;
}

#[tokio::test]
async fn an_invalid_request_never_reaches_a_worker() {
    let fixture = Fixture::new(1, &[]);
    let service = fixture.ready().await;
    let error = service.submit(ClientId::InProcess, request(0, 0)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    end(service).await;
}

#[tokio::test]
async fn a_deadline_ends_a_running_job() {
    let fixture = Fixture::new(1, &["pace_ms=5"]);
    let service = fixture.ready().await;
    let mut short = request(100_000, 0);
    short.deadline_ms = Some(100);
    let (_, outcome) = finish(&mut submit(&service, short).await, 0).await;
    assert_eq!(outcome.unwrap_err().code, ErrorCode::DeadlineExceeded);
    assert_eq!(service.status().await.slots[0].jobs, 0);
    end(service).await;
}

#[tokio::test]
async fn a_drain_finishes_accepted_jobs_and_refuses_new_ones() {
    let mut fixture = Fixture::new(2, &["pace_ms=1"]);
    fixture.config.engine.max_batch = 1;
    let service = fixture.ready().await;
    let mut jobs = Vec::new();
    for seed in 0..6 {
        jobs.push(submit(&service, request(50, seed)).await);
    }
    service.drain().await;
    assert_eq!(service.status().await.health, Health::Draining);
    let refused = service.submit(ClientId::InProcess, request(1, 0)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Draining);
    for (seed, job) in (0..).zip(&mut jobs) {
        let (ids, done) = finish(job, 0).await;
        assert_eq!(ids, expected_ids(seed, 0..50));
        assert!(done.is_ok());
    }
    assert_eq!(timeout(LONG, service.stopped()).await.unwrap(), ExitCode::Ok);
    assert!(pids(&fixture.starts()).iter().all(|&pid| !is_alive(pid)));
    assert_eq!(service.status().await.totals.completed, 6, "the last report stays");
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline() {
    let mut fixture = Fixture::new(1, &["pace_ms=5"]);
    fixture.config.restart.drain_timeout = Duration::from_millis(100);
    let service = fixture.ready().await;
    let mut job = submit(&service, request(100_000, 0)).await;
    next_token(&mut job).await;
    service.drain().await;
    let (_, outcome) = finish(&mut job, 1).await;
    assert_eq!(outcome.unwrap_err().code, ErrorCode::Draining);
    timeout(LONG, service.stopped()).await.unwrap();
}

#[tokio::test]
async fn a_stop_ends_everything_at_once() {
    let fixture = Fixture::new(2, &["pace_ms=5"]);
    let service = fixture.ready().await;
    let mut job = submit(&service, request(100_000, 0)).await;
    next_token(&mut job).await;
    service.stop().await;
    timeout(LONG, service.stopped()).await.unwrap();
    let last = loop {
        match next(&mut job).await {
            Some(JobEvent::Token(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(last, Some(JobEvent::Failed(error)) if error.code == ErrorCode::Draining));
    assert!(pids(&fixture.starts()).iter().all(|&pid| !is_alive(pid)));
}

#[tokio::test]
async fn workers_end_with_the_last_handle() {
    let fixture = Fixture::new(2, &[]);
    let service = fixture.ready().await;
    let pids = pids(&fixture.starts());
    assert_eq!(pids.len(), 2);
    drop(service);
    wait_for("the workers to end", async || pids.iter().all(|&pid| !is_alive(pid)).then_some(())).await;
}

#[tokio::test]
async fn a_restart_replaces_a_worker_and_its_jobs_go_on() {
    let fixture = Fixture::new(2, &["hold=1"]);
    let service = fixture.ready().await;
    let mut job = submit(&service, request(300, 4)).await;
    next_token(&mut job).await;
    let pid = busy_pid(&service).await;
    let slot = service.status().await.slots.iter().find(|slot| slot.pid == Some(pid)).unwrap().slot;
    service.restart(slot).await.unwrap();
    let (ids, done) = finish(&mut job, 1).await;
    assert_eq!(ids, expected_ids(4, 1..300));
    assert_eq!(done.unwrap().timings.failovers, 1);
    wait_for_slots(&service, "a new process", |slots| {
        slots.iter().all(|slot| slot.state == "ready" && slot.pid != Some(pid))
    })
    .await;
    let error = service.restart(9).await.unwrap_err();
    assert_eq!((error.code, error.hint.as_deref()), (ErrorCode::NotFound, Some("slots are 0 to 1")));
    end(service).await;
}

#[tokio::test]
async fn many_restarts_leave_no_descriptor_and_no_corpse() {
    let mut fixture = Fixture::new(1, &[]);
    fixture.config.restart.backoff_min = Duration::from_micros(100);
    fixture.config.restart.backoff_max = Duration::from_millis(1);
    let service = fixture.ready().await;
    let n_restarts = 60;
    for n in 1..=n_restarts {
        let pid = service.status().await.slots[0].pid.unwrap();
        signal(pid, Signal::SIGKILL);
        wait_for_slots(&service, "the replacement", |slots| {
            slots[0].restarts == n && slots[0].state == "ready" && slots[0].pid.is_some()
        })
        .await;
    }
    let dead = pids(&fixture.starts());
    assert_eq!(dead.len(), usize::try_from(n_restarts).unwrap() + 1);
    for pid in &dead[..dead.len() - 1] {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid} is left over");
    }
    end(service).await;
}

/// A supervisor in its own process, ready to be killed.
fn supervisor_process(fixture: &Fixture, n_slots: usize) -> (std::process::Child, std::path::PathBuf) {
    let socket = fixture.folder.path().join("bitnetd.sock");
    let state = format!("state={}", fixture.folder.path().display());
    let child = Command::new(FAKE_WORKER)
        .arg("serve")
        .arg(&socket)
        .args([&n_slots.to_string(), &state])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    (child, socket)
}

#[tokio::test]
async fn a_killed_supervisor_leaves_no_orphan_and_its_socket_is_taken_over() {
    let fixture = Fixture::new(3, &[]);
    let (mut supervisor, socket) = supervisor_process(&fixture, 3);
    let pids = wait_for("three workers", async || {
        let starts = fixture.starts();
        (starts.len() == 3).then(|| pids(&starts))
    })
    .await;
    assert!(socket.exists());
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    wait_for("the workers to end", async || pids.iter().all(|&pid| !is_alive(pid)).then_some(())).await;
    assert!(socket.exists(), "a killed process cannot tidy up");
    let (mut next, _) = supervisor_process(&fixture, 1);
    wait_for("the next supervisor's worker", async || (fixture.starts().len() == 4).then_some(())).await;
    let mut client = wait_for("the next supervisor", async || {
        bitnetd_proto::client::Client::connect(&socket, "test", LONG).ok()
    })
    .await;
    client.drain().unwrap();
    assert!(next.wait().unwrap().success());
    assert!(!socket.exists(), "a drained one tidies up");
}

#[tokio::test]
async fn restarts_in_a_separate_process_keep_its_descriptors_flat() {
    let fixture = Fixture::new(1, &[]);
    let (mut supervisor, socket) = supervisor_process(&fixture, 1);
    let mut client = wait_for("the supervisor", async || {
        bitnetd_proto::client::Client::connect(&socket, "test", LONG).ok()
    })
    .await;
    let mut counts = Vec::new();
    for n in 0..40_u64 {
        wait_for("a ready worker", async || {
            let slot = client.status().unwrap().slots.remove(0);
            (slot.state == "ready" && slot.restarts == n).then_some(())
        })
        .await;
        counts.push(n_fds(supervisor.id()));
        client.restart(0).unwrap();
    }
    let (first, last) = (counts[1], counts[39]);
    assert!(last <= first + 1, "descriptors grow: {counts:?}");
    client.drain().unwrap();
    assert!(supervisor.wait().unwrap().success());
}

/// The protocol as someone without this crate would speak it.
#[tokio::test]
async fn the_protocol_is_a_length_and_json() {
    let fixture = Fixture::new(1, &[]);
    let (mut supervisor, socket) = supervisor_process(&fixture, 1);
    let stream =
        wait_for("the supervisor", async || std::os::unix::net::UnixStream::connect(&socket).ok()).await;
    let mut reader = BufReader::new(&stream);
    let say = |json: &str| {
        let mut frame = u32::try_from(json.len()).unwrap().to_le_bytes().to_vec();
        frame.extend_from_slice(json.as_bytes());
        std::io::Write::write_all(&mut &stream, &frame).unwrap();
    };
    say(r#"{"type":"hello","version":1,"client":"by hand"}"#);
    say(
        r#"{"type":"generate","id":5,"request":{"prompt":{"text":"hi"},"max_tokens":2,"sampling":{"seed":1}}}"#,
    );
    let mut kinds = Vec::new();
    while kinds.len() < 5 {
        reader.fill_buf().unwrap();
        let message: ServerMessage = bitnetd_proto::frame::read_frame(&mut reader).unwrap().unwrap();
        kinds.push(match message {
            ServerMessage::Welcome { .. } => "welcome",
            ServerMessage::Accepted { id: 5, seed: 1, .. } => "accepted",
            ServerMessage::Token { id: 5, .. } => "token",
            ServerMessage::Done { id: 5, .. } => "done",
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(kinds, ["welcome", "accepted", "token", "token", "done"]);
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
}

#[tokio::test]
async fn a_denied_call_is_named_in_the_report() {
    let fixture =
        Fixture::new(1, &["only=1", "confess=refused_x\nand\ndenied_system_call_41_(socket)\u{7}\n"]);
    let service = fixture.ready().await;
    let slot = service.status().await.slots.remove(0);
    let said = slot.last_exit.unwrap();
    assert_eq!(said, "killed by signal 31 (SIGSYS), denied system call 41 (socket)");
    end(service).await;
}
