//! Workers die in the middle of answers; clients notice nothing.

use std::collections::HashSet;
use std::time::Duration;

use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::request::Prompt;
use nix::sys::signal::Signal;

use crate::support::{
    Fixture, busy_pid, end, expected_ids, finish, is_alive, next_token, pids, request, signal, submit,
    wait_for, wait_for_slots,
};

#[tokio::test]
async fn an_undisturbed_job_streams_and_is_timed() {
    let fixture = Fixture::new(2, &[]);
    let service = fixture.ready().await;
    let mut with_logprobs = request(20, 7);
    with_logprobs.logprobs = Some(0);
    let mut job = submit(&service, with_logprobs).await;
    assert_eq!(job.seed, 7);
    assert!(next_token(&mut job).await.logprobs.is_some());
    let (ids, done) = finish(&mut job, 1).await;
    assert_eq!(ids, expected_ids(7, 1..20));
    let done = done.unwrap();
    assert_eq!((done.usage.prompt_tokens, done.usage.completion_tokens, done.timings.failovers), (1, 20, 0));
    let timings = done.timings;
    assert!(0.0 < timings.ttft_s && timings.queue_s <= timings.ttft_s && timings.ttft_s <= timings.total_s);
    end(service).await;
}

#[tokio::test]
async fn a_seed_is_drawn_where_there_is_none() {
    let fixture = Fixture::new(1, &[]);
    let service = fixture.ready().await;
    let mut without = request(3, 0);
    without.sampling.seed = None;
    let mut first = submit(&service, without.clone()).await;
    let second = submit(&service, without).await;
    assert_ne!(first.seed, second.seed);
    assert!(first.seed < 1 << 53);
    let (ids, _) = finish(&mut first, 0).await;
    assert_eq!(ids, expected_ids(first.seed, 0..3));
    end(service).await;
}

/// The worker stands still after `n_before` tokens, is killed there, and the job goes on elsewhere.
async fn kill_9_after(n_before: u32) {
    let fixture = Fixture::new(2, &[&format!("hold={n_before}"), "only=2", "pace_ms=1"]);
    let service = fixture.ready().await;
    let mut job = submit(&service, request(30, 3)).await;
    for index in 0..n_before {
        assert_eq!(next_token(&mut job).await.index, index);
    }
    // Nothing tells a fresh job from one that is resumed before its first token: then both workers hold.
    let n_kills = if n_before == 0 { 2 } else { 1 };
    for n in 1..=n_kills {
        signal(busy_pid(&service).await, Signal::SIGKILL);
        wait_for("the job to go elsewhere", async || {
            (service.status().await.totals.failovers == n).then_some(())
        })
        .await;
    }
    let (ids, done) = finish(&mut job, n_before).await;
    assert_eq!(ids, expected_ids(3, n_before..30), "killed after {n_before} tokens");
    let done = done.unwrap();
    assert_eq!(done.usage.completion_tokens, 30);
    assert_eq!(u64::from(done.timings.failovers), n_kills);
    end(service).await;
}

#[tokio::test]
async fn kill_9_at_any_token_leaves_no_gap_and_no_repetition() {
    for n_before in [0, 1, 2, 17, 29, 30] {
        kill_9_after(n_before).await;
    }
}

#[tokio::test]
async fn many_jobs_survive_many_deaths() {
    let mut fixture = Fixture::new(2, &["hold=30", "pace_ms=1"]);
    fixture.config.engine.max_batch = 4;
    fixture.config.queue.max_deaths = 100;
    let service = fixture.ready().await;
    let mut jobs = Vec::new();
    for seed in 0..24 {
        jobs.push(submit(&service, request(60, seed)).await);
    }
    // Each job stands still at its 30th token until its worker is killed there.
    let mut killed = HashSet::new();
    loop {
        let victim = wait_for("a worker to kill, or the end", async || {
            let status = service.status().await;
            let is_over = status.totals.completed == 24;
            let busy = status.slots.iter().filter(|slot| slot.jobs > 0).filter_map(|slot| slot.pid);
            let victim = busy.into_iter().find(|pid| !killed.contains(pid));
            (is_over || victim.is_some()).then_some((victim, status.totals))
        })
        .await;
        let (Some(pid), before) = victim else { break };
        killed.insert(pid);
        signal(pid, Signal::SIGKILL);
        wait_for("progress after a death", async || {
            let totals = service.status().await.totals;
            ((totals.tokens, totals.completed) != (before.tokens, before.completed)).then_some(())
        })
        .await;
    }
    for (seed, job) in (0..).zip(&mut jobs) {
        let (ids, done) = finish(job, 0).await;
        assert!(done.is_ok_and(|done| done.timings.failovers > 0), "job with seed {seed}");
        assert_eq!(ids, expected_ids(seed, 0..60));
    }
    let totals = service.status().await.totals;
    assert_eq!((totals.completed, totals.failed), (24, 0));
    assert!(totals.failovers >= 24 && totals.restarts >= 3, "{totals:?}");
    end(service).await;
}

#[tokio::test]
async fn a_stopped_worker_is_found_killed_and_replaced() {
    let mut fixture = Fixture::new(2, &["hold=1"]);
    fixture.config.watchdog.interval = Duration::from_millis(100);
    fixture.config.watchdog.timeout = Duration::from_millis(1500);
    let service = fixture.ready().await;
    let mut job = submit(&service, request(40, 5)).await;
    next_token(&mut job).await;
    let pid = busy_pid(&service).await;
    signal(pid, Signal::SIGSTOP);
    let (ids, done) = finish(&mut job, 1).await;
    assert_eq!(ids, expected_ids(5, 1..40));
    assert_eq!(done.unwrap().timings.failovers, 1);
    wait_for("the hung process to be reaped", async || (!is_alive(pid)).then_some(())).await;
    let slots = wait_for_slots(&service, "the replacement", |slots| {
        slots.iter().all(|slot| slot.state == "ready") && slots.iter().any(|slot| slot.restarts == 1)
    })
    .await;
    let last_exit = slots.iter().find_map(|slot| slot.last_exit.clone()).unwrap();
    assert_eq!(last_exit, "killed: its step loop did not answer for 1.5s");
    end(service).await;
}

#[tokio::test]
async fn a_poison_job_is_given_up_alone() {
    let mut fixture = Fixture::new(2, &["pace_ms=1"]);
    fixture.config.engine.max_batch = 4;
    let service = fixture.ready().await;
    let mut innocent = Vec::new();
    for seed in 0..6 {
        innocent.push(submit(&service, request(200, seed)).await);
    }
    let mut poison = request(5, 0);
    poison.prompt = Prompt::Text("poison".into());
    let mut poison = submit(&service, poison).await;
    let (ids, outcome) = finish(&mut poison, 0).await;
    let error = outcome.unwrap_err();
    assert_eq!((ids.len(), error.code), (0, ErrorCode::Poisoned), "{error}");
    assert_eq!(error.message, "3 workers died with this job on board; it is given up");
    for (seed, job) in (0..).zip(&mut innocent) {
        let (ids, done) = finish(job, 0).await;
        assert!(done.is_ok(), "{done:?}");
        assert_eq!(ids, expected_ids(seed, 0..200));
    }
    let n_starts = pids(&fixture.starts()).len();
    assert!(
        (4..=5).contains(&n_starts),
        "{n_starts} processes: two, and one for each death but perhaps the last"
    );
    end(service).await;
}

#[tokio::test]
async fn what_a_worker_refuses_is_passed_on_and_not_tried_again() {
    let fixture = Fixture::new(1, &[]);
    let service = fixture.ready().await;
    let mut too_long = request(5, 0);
    too_long.prompt = Prompt::Text("refuse".into());
    let (_, outcome) = finish(&mut submit(&service, too_long).await, 0).await;
    assert_eq!(outcome.unwrap_err().code, ErrorCode::ContextExceeded);
    end(service).await;
}
