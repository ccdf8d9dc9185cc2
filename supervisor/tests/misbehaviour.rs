//! Workers that lie, hang, write nonsense, or never come up.

use std::time::Duration;

use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::status::Health;
use bitnetd_supervisor::{ClientId, StartError};
use tokio::time::timeout;

use crate::support::{Fixture, LONG, end, expected_ids, finish, request, submit, wait_for_slots};

#[track_caller]
fn failed_start(outcome: Result<impl std::fmt::Debug, StartError>) -> (String, ExitCode) {
    match outcome {
        Err(StartError::Worker { error, exit_code, .. }) => (error.message, exit_code),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_start_that_cannot_succeed_is_tried_once_and_explained() {
    let fixture = Fixture::new(1, &["start_failed=65"]);
    let service = fixture.start().await;
    let (message, exit_code) = failed_start(timeout(LONG, service.ready()).await.unwrap());
    assert_eq!((message.as_str(), exit_code), ("the model is a lie", ExitCode::Data));
    assert_eq!(fixture.starts().len(), 1);
    let error = service.submit(ClientId::InProcess, request(1, 0)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Degraded);
    assert_eq!(service.status().await.health, Health::Degraded);
    end(service).await;
}

#[tokio::test]
async fn a_permanent_exit_code_is_not_tried_again() {
    let fixture = Fixture::new(1, &["exit=78"]);
    let service = fixture.start().await;
    let (message, exit_code) = failed_start(timeout(LONG, service.ready()).await.unwrap());
    assert_eq!(exit_code, ExitCode::Config);
    assert!(message.contains("exited with code 78 (Config)"), "{message}");
    assert_eq!(fixture.starts().len(), 1);
    end(service).await;
}

#[tokio::test]
async fn another_exit_code_is_tried_until_the_limit() {
    let mut fixture = Fixture::new(1, &["exit=70"]);
    fixture.config.restart.max = 3;
    fixture.config.restart.backoff_max = Duration::from_millis(10);
    let service = fixture.start().await;
    let (message, exit_code) = failed_start(timeout(LONG, service.ready()).await.unwrap());
    assert_eq!(exit_code, ExitCode::Software);
    assert!(message.contains("was restarted 3 times") && message.contains("code 70"), "{message}");
    assert_eq!(fixture.starts().len(), 4);
    end(service).await;
}

#[tokio::test]
async fn a_program_that_is_not_there_is_a_permanent_failure() {
    let fixture = Fixture::new(1, &[]);
    let mut spec = fixture.spec();
    spec.worker_program = fixture.folder.path().join("nobody");
    let service = bitnetd_supervisor::Service::start(spec).await.unwrap();
    let (message, exit_code) = failed_start(timeout(LONG, service.ready()).await.unwrap());
    assert_eq!(exit_code, ExitCode::NoInput);
    assert!(message.contains("nobody"), "{message}");
    end(service).await;
}

#[tokio::test]
async fn a_worker_of_another_version_is_refused() {
    let fixture = Fixture::new(1, &["version=999"]);
    let service = fixture.start().await;
    let (message, _) = failed_start(timeout(LONG, service.ready()).await.unwrap());
    assert_eq!(message, "the worker speaks protocol version 999, this side speaks 1");
    assert_eq!(fixture.starts().len(), 1);
    end(service).await;
}

#[tokio::test]
async fn a_worker_that_never_gets_ready_is_replaced() {
    let mut fixture = Fixture::new(1, &["never_ready", "only=1"]);
    fixture.config.restart.start_timeout = Duration::from_millis(300);
    let service = fixture.start().await;
    let slots = wait_for_slots(&service, "the second process", |slots| slots[0].restarts > 0).await;
    assert_eq!(slots[0].last_exit.as_deref(), Some("killed: not ready after 300ms"));
    end(service).await;
}

#[tokio::test]
async fn jobs_wait_for_a_late_worker() {
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    let fixture = Fixture::new(1, &[&format!("late={}", gate.display())]);
    let service = fixture.start().await;
    assert_eq!(service.status().await.health, Health::Starting);
    let mut job = submit(&service, request(5, 3)).await;
    assert_eq!(service.status().await.queued, 1);
    std::fs::write(&gate, "").unwrap();
    let (ids, done) = finish(&mut job, 0).await;
    assert_eq!(ids, expected_ids(3, 0..5));
    assert!(done.unwrap().timings.queue_s > 0.0);
    end(service).await;
}

/// The first process does something wrong at its third token; the second finishes the job.
async fn one_fault(fault: &str, last_exit: &str) {
    let mut fixture = Fixture::new(1, &[fault, "only=1", "pace_ms=1"]);
    fixture.config.watchdog.interval = Duration::from_millis(100);
    fixture.config.watchdog.timeout = Duration::from_millis(1500);
    let service = fixture.start().await;
    let mut job = submit(&service, request(10, 11)).await;
    let (ids, done) = finish(&mut job, 0).await;
    assert_eq!(ids, expected_ids(11, 0..10), "{fault}");
    assert_eq!(done.unwrap().timings.failovers, 1, "{fault}");
    let found = service.status().await.slots[0].last_exit.clone().unwrap();
    assert!(found.starts_with(last_exit), "{fault}: `{found}`");
    end(service).await;
}

#[tokio::test]
async fn a_crash_in_the_middle() {
    one_fault("crash=3", "killed by signal 6 (SIGABRT)").await;
}

#[tokio::test]
async fn a_hang_in_the_middle() {
    one_fault("hang=3", "killed: its step loop did not answer for 1.5s").await;
}

#[tokio::test]
async fn garbage_in_the_middle() {
    one_fault("garbage=3", "killed: its link carries garbage: not a message of this protocol").await;
}

#[tokio::test]
async fn a_gap_in_the_tokens() {
    one_fault("gap=3", "killed: it sent token 3 of job 1 instead of 2").await;
}

#[tokio::test]
async fn garbage_instead_of_ready() {
    let fixture = Fixture::new(1, &["garbage=0", "only=1"]);
    let service = fixture.ready().await;
    assert_eq!(service.status().await.slots[0].restarts, 1);
    end(service).await;
}

#[tokio::test]
async fn a_worker_that_does_not_read_is_killed() {
    let mut fixture = Fixture::new(1, &["deaf", "only=1"]);
    fixture.config.watchdog.interval = Duration::from_millis(100);
    fixture.config.watchdog.timeout = Duration::from_millis(1500);
    let service = fixture.start().await;
    let mut job = submit(&service, request(4, 2)).await;
    assert_eq!(finish(&mut job, 0).await.0, expected_ids(2, 0..4));
    end(service).await;
}
