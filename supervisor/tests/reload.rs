//! From one configuration to the next, while jobs run: whole or not at all, and no job is lost.

use std::time::Duration;

use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::status::{Health, SlotReport, StatusReport};
use bitnetd_supervisor::{ClientId, Job, ModelSource, Service, ServiceSpec};
use nix::sys::signal::Signal;
use tokio::time::timeout;

use crate::support::{
    Fixture, LONG, end, expected_ids, finish, is_alive, next_token, request, signal, submit, wait_for,
    wait_for_slots,
};

/// A model whose answers are those of the first one with seeds that are one higher.
const OTHER_MODEL: ModelSource = ModelSource::BuiltIn(b"salt=1");

/// A spec whose workers answer pings and take their time.
fn spec(fixture: &Fixture, n_workers: usize) -> ServiceSpec {
    let mut spec = fixture.spec();
    spec.plan.workers = vec![spec.plan.workers[0].clone(); n_workers];
    spec
}

/// The same with another setting in the workers' set-up, so that none can stay.
fn changed(fixture: &Fixture, n_workers: usize) -> ServiceSpec {
    let mut spec = spec(fixture, n_workers);
    spec.config.engine.prefill_chunk = 77;
    spec
}

async fn reload_to(service: &Service, spec: ServiceSpec) -> Result<(), WireError> {
    timeout(LONG, service.reload_to(spec)).await.expect("the reload is not decided in time")
}

/// Waits until exactly these slots are there and ready.
async fn settled(service: &Service, numbers: &[u32]) -> Vec<SlotReport> {
    wait_for_slots(service, "the new split", |slots| {
        slots.iter().map(|slot| slot.slot).eq(numbers.iter().copied())
            && slots.iter().all(|slot| slot.state == "ready" && slot.pid.is_some())
    })
    .await
}

fn pids(status: &StatusReport) -> Vec<u32> {
    status.slots.iter().filter_map(|slot| slot.pid).collect()
}

/// Jobs that have had their first token.
async fn running(service: &Service, n_jobs: u64, n_tokens: u32) -> Vec<Job> {
    let mut jobs = Vec::new();
    for seed in 0..n_jobs {
        let mut job = submit(service, request(n_tokens, seed)).await;
        next_token(&mut job).await;
        jobs.push(job);
    }
    jobs
}

#[tokio::test]
async fn a_new_split_takes_over_under_load_and_no_stream_is_disturbed() {
    let mut fixture = Fixture::new(3, &["pace_ms=2"]);
    fixture.config.engine.max_batch = 4;
    let service = fixture.ready().await;
    let old = pids(&service.status().await);
    let mut jobs = running(&service, 8, 300).await;
    let mut waiting = Vec::new();
    for seed in 100..110 {
        waiting.push(submit(&service, request(20, seed)).await);
    }
    reload_to(&service, changed(&fixture, 2)).await.unwrap();
    settled(&service, &[0, 1]).await;
    wait_for("the former workers to go", async || old.iter().all(|&pid| !is_alive(pid)).then_some(())).await;
    for (seed, job) in (0..).zip(&mut jobs) {
        let (ids, done) = finish(job, 1).await;
        assert_eq!(ids, expected_ids(seed, 1..300), "seed {seed}");
        assert!(done.is_ok(), "{done:?}");
    }
    for (seed, job) in (100..).zip(&mut waiting) {
        assert_eq!(finish(job, 0).await.0, expected_ids(seed, 0..20), "seed {seed}");
    }
    // And more workers again.
    reload_to(&service, changed(&fixture, 4)).await.unwrap();
    settled(&service, &[0, 1, 2, 3]).await;
    assert_eq!(service.status().await.totals.failed, 0);
    end(service).await;
}

#[tokio::test]
async fn what_stays_the_same_is_not_restarted() {
    let fixture = Fixture::new(2, &[]);
    let service = fixture.ready().await;
    let before = pids(&service.status().await);
    let mut limits = spec(&fixture, 2);
    limits.config.queue.max_jobs = 7;
    reload_to(&service, limits).await.unwrap();
    let status = service.status().await;
    assert_eq!((pids(&status), status.queue_max), (before.clone(), 7));
    reload_to(&service, spec(&fixture, 3)).await.unwrap();
    let slots = settled(&service, &[0, 1, 2]).await;
    assert_eq!(slots.iter().take(2).filter_map(|slot| slot.pid).collect::<Vec<_>>(), before);
    reload_to(&service, spec(&fixture, 1)).await.unwrap();
    let slots = settled(&service, &[0]).await;
    assert_eq!(slots[0].pid, Some(before[0]));
    // A slot of a former edition is still what it was: it can be restarted by its number.
    service.restart(0).await.unwrap();
    wait_for_slots(&service, "a new process", |slots| {
        slots.len() == 1 && slots[0].state == "ready" && slots[0].pid != Some(before[0])
    })
    .await;
    end(service).await;
}

#[tokio::test]
async fn jobs_end_with_the_model_they_were_accepted_for() {
    let mut fixture = Fixture::new(2, &["pace_ms=2"]);
    fixture.config.engine.max_batch = 2;
    let service = fixture.ready().await;
    let mut running = running(&service, 4, 400).await;
    let mut waiting = Vec::new();
    for seed in 50..56 {
        waiting.push(submit(&service, request(30, seed)).await);
    }
    let mut new_model = spec(&fixture, 2);
    new_model.model = OTHER_MODEL;
    reload_to(&service, new_model.clone()).await.unwrap();
    let mut after = submit(&service, request(40, 7)).await;
    let again = reload_to(&service, fixture.spec()).await.unwrap_err();
    assert_eq!(again.code, ErrorCode::Overloaded, "a third model beside two that are in use: {again}");
    assert_eq!(finish(&mut after, 0).await.0, expected_ids(8, 0..40), "new jobs get the new model at once");
    // A worker of the former model is replaced as long as there is work for it.
    let victim = wait_for("a former worker with jobs", async || {
        let slots = service.status().await.slots;
        slots.iter().find(|slot| slot.state == "retiring" && slot.jobs > 0).and_then(|slot| slot.pid)
    })
    .await;
    signal(victim, Signal::SIGKILL);
    for (seed, job) in (0..).zip(&mut running) {
        let (ids, done) = finish(job, 1).await;
        assert!(done.is_ok(), "{done:?}");
        assert_eq!(ids, expected_ids(seed, 1..400), "seed {seed}");
    }
    for (seed, job) in (50..).zip(&mut waiting) {
        assert_eq!(
            finish(job, 0).await.0,
            expected_ids(seed, 0..30),
            "accepted before the change: seed {seed}"
        );
    }
    settled(&service, &[0, 1]).await;
    reload_to(&service, fixture.spec()).await.unwrap();
    let mut back = submit(&service, request(5, 7)).await;
    assert_eq!(finish(&mut back, 0).await.0, expected_ids(7, 0..5));
    end(service).await;
}

/// Reloads to something that cannot work; nothing may change.
async fn refused(script: &str, tweak: impl FnOnce(&mut ServiceSpec)) -> WireError {
    let fixture = Fixture::new(2, &["pace_ms=2"]);
    let service = fixture.ready().await;
    let before = pids(&service.status().await);
    let mut jobs = running(&service, 4, 200).await;
    let mut bad = changed(&fixture, 3);
    bad.worker_args.push(script.into());
    tweak(&mut bad);
    let error = reload_to(&service, bad).await.unwrap_err();
    let status = service.status().await;
    assert_eq!((pids(&status), status.health), (before, Health::Ready), "{error}");
    for (seed, job) in (0..).zip(&mut jobs) {
        let (ids, done) = finish(job, 1).await;
        assert_eq!((ids, done.unwrap().timings.failovers), (expected_ids(seed, 1..200), 0));
    }
    // The next one is not held up by it, and the workers that stay are restarted as they were.
    service.restart(0).await.unwrap();
    settled(&service, &[0, 1]).await;
    reload_to(&service, changed(&fixture, 1)).await.unwrap();
    settled(&service, &[0]).await;
    end(service).await;
    error
}

#[tokio::test]
async fn a_worker_that_cannot_start_keeps_the_old_configuration() {
    let error = refused("start_failed=65", |_| {}).await;
    assert_eq!((error.message.as_str(), error.hint.as_deref()), ("the model is a lie", Some("find another")));
}

#[tokio::test]
async fn a_worker_that_dies_at_its_start_keeps_the_old_configuration() {
    let error = refused("exit=70", |_| {}).await;
    assert!(error.message.contains("first worker of the new configuration exited with code 70"), "{error}");
}

#[tokio::test]
async fn a_worker_that_is_never_ready_keeps_the_old_configuration() {
    // The time limit is that of the configuration that holds.
    let fixture = {
        let mut fixture = Fixture::new(1, &[]);
        fixture.config.restart.start_timeout = Duration::from_secs(3);
        fixture
    };
    let service = fixture.ready().await;
    let mut bad = changed(&fixture, 1);
    bad.worker_args.push("never_ready".into());
    let error = reload_to(&service, bad).await.unwrap_err();
    assert!(error.message.contains("not ready after 3s"), "{error}");
    settled(&service, &[0]).await;
    end(service).await;
}

#[tokio::test]
async fn a_model_that_is_not_there_keeps_the_old_configuration() {
    let error =
        refused("pace_ms=2", |spec| spec.model = ModelSource::File("/nowhere/model.gguf".into())).await;
    assert!(error.message.contains("/nowhere/model.gguf"), "{error}");
}

#[tokio::test]
async fn a_program_that_is_not_there_keeps_the_old_configuration() {
    let error = refused("pace_ms=2", |spec| spec.worker_program = "/nowhere/bitnetd".into()).await;
    assert!(error.message.contains("/nowhere/bitnetd"), "{error}");
}

#[tokio::test]
async fn a_stop_ends_a_reload_that_is_under_way() {
    let fixture = Fixture::new(1, &[]);
    let service = fixture.ready().await;
    let mut slow = changed(&fixture, 2);
    slow.worker_args.push("never_ready".into());
    let reloading = tokio::spawn({
        let service = service.clone();
        async move { service.reload_to(slow).await }
    });
    wait_for("the trial to start", async || (fixture.starts().len() == 2).then_some(())).await;
    let busy = reload_to(&service, changed(&fixture, 2)).await.unwrap_err();
    assert_eq!((busy.code, busy.message.as_str()), (ErrorCode::Overloaded, "another reload is under way"));
    service.drain().await;
    let error = timeout(LONG, reloading).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.code, ErrorCode::Draining);
    timeout(LONG, service.stopped()).await.unwrap();
    assert!(crate::support::pids(&fixture.starts()).iter().all(|&pid| !is_alive(pid)));
}

#[tokio::test]
async fn a_reload_brings_back_a_service_that_was_given_up() {
    let mut fixture = Fixture::new(1, &["exit=70", "only=3"]);
    fixture.config.restart.max = 2;
    let service = fixture.start().await;
    wait_for_slots(&service, "the slot to be given up", |slots| slots[0].state == "failed").await;
    assert_eq!(service.status().await.health, Health::Degraded);
    let refused = service.submit(ClientId::InProcess, request(1, 0)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Degraded);
    reload_to(&service, fixture.spec()).await.unwrap(); // Nothing has changed but the world.
    settled(&service, &[0]).await;
    let mut job = submit(&service, request(3, 1)).await;
    assert_eq!(finish(&mut job, 0).await.0, expected_ids(1, 0..3));
    end(service).await;
}
