//! Durable jobs over the socket: kept, worked on, waited for, given up, and back after a stop.

use std::path::PathBuf;
use std::time::Duration;

use bitnetd_config::ListenConfig;
use bitnetd_proto::client::{Client, ClientError, JobFilter, Submission};
use bitnetd_proto::durable::{JobRecord, JobState};
use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::status::Health;
use bitnetd_supervisor::{Journal, Listener, Service};
use tokio::task::{JoinHandle, spawn_blocking};

use crate::support::{Fixture, LONG, end, expected_ids, request, wait_for};

/// A service with a journal, and its socket.
struct Kept {
    service: Service,
    socket: PathBuf,
    serving: JoinHandle<()>,
}

impl Kept {
    async fn start(fixture: &Fixture) -> Self {
        let journal = Journal::open(&fixture.folder.path().join("jobs.redb"), &fixture.config.queue.durable);
        let service = fixture.start().await;
        service.keep_jobs(journal.unwrap()).unwrap();
        let socket = fixture.folder.path().join("b.sock");
        let listener = Listener::bind(&socket, &ListenConfig::default()).unwrap();
        let serving = tokio::spawn(listener.serve(service.clone()));
        Self { service, socket, serving }
    }

    async fn ready(fixture: &Fixture) -> Self {
        let kept = Self::start(fixture).await;
        tokio::time::timeout(LONG, kept.service.ready()).await.expect("not ready in time").unwrap();
        kept
    }

    /// Does something with a client, on a thread of its own.
    async fn with<T: Send + 'static>(&self, work: impl FnOnce(&mut Client) -> T + Send + 'static) -> T {
        let socket = self.socket.clone();
        spawn_blocking(move || work(&mut Client::connect(&socket, "test", LONG).unwrap())).await.unwrap()
    }

    /// Submits jobs with these seeds; gives their numbers.
    async fn submit(&self, max_tokens: u32, seeds: std::ops::Range<u64>) -> Vec<u64> {
        self.with(move |client| {
            let submissions: Vec<Submission> =
                seeds.map(|seed| Submission { key: None, request: request(max_tokens, seed) }).collect();
            let mut jobs = vec![0; submissions.len()];
            client
                .submit_many(submissions, |place, answer| {
                    jobs[place] = answer.unwrap().job;
                    true
                })
                .unwrap();
            jobs
        })
        .await
    }

    async fn wait(&self, job: u64) -> JobRecord {
        self.with(move |client| client.wait(job, Some(LONG)).unwrap()).await
    }

    async fn state(&self, job: u64) -> JobState {
        self.with(move |client| client.result(job).unwrap().summary.state).await
    }

    async fn end(self) {
        end(self.service).await;
        self.serving.await.unwrap();
    }
}

#[track_caller]
fn assert_answered(record: &JobRecord, seed: u64, max_tokens: u32) {
    assert_eq!(record.summary.state, JobState::Done, "{record:?}");
    assert_eq!(record.answer.as_ref().unwrap().token_ids, expected_ids(seed, 0..max_tokens));
}

#[track_caller]
fn code_of<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> ErrorCode {
    outcome.unwrap_err().wire().expect("not refused by the server").code
}

#[tokio::test]
async fn more_jobs_than_the_memory_queue_takes_wait_on_disk_and_are_done() {
    let mut fixture = Fixture::new(2, &[]);
    (fixture.config.queue.max_jobs, fixture.config.queue.max_per_client) = (2, 1);
    let kept = Kept::ready(&fixture).await;
    let jobs = kept.submit(5, 0..200).await;
    let unique: std::collections::BTreeSet<&u64> = jobs.iter().collect();
    assert_eq!(unique.len(), 200);
    for (seed, job) in (0..).zip(&jobs) {
        assert_answered(&kept.wait(*job).await, seed, 5);
    }
    let report = kept.service.status().await.journal.unwrap();
    assert_eq!((report.queued, report.ended, report.problem), (0, 200, None));
    kept.end().await;
}

#[tokio::test]
async fn a_flood_beyond_the_limit_is_refused_with_its_type() {
    let mut fixture = Fixture::new(1, &["never_ready"]);
    fixture.config.queue.durable.max_jobs = 300;
    let kept = Kept::start(&fixture).await;
    let (accepted, refused) = kept
        .with(|client| {
            let flood = (0..1000).map(|seed| Submission { key: None, request: request(5, seed) });
            let (mut accepted, mut refused) = (0, Vec::new());
            client
                .submit_many(flood, |_, answer| {
                    match answer {
                        Ok(_) => accepted += 1,
                        Err(error) => refused.push(error),
                    }
                    true
                })
                .unwrap();
            (accepted, refused)
        })
        .await;
    assert_eq!((accepted, refused.len()), (300, 700));
    for error in refused {
        assert_eq!((error.code, error.retry_after_ms.is_some()), (ErrorCode::Overloaded, true), "{error:?}");
    }
    let listed = kept
        .with(|client| {
            let filter = JobFilter { state: Some(JobState::Done), ..JobFilter::default() };
            assert_eq!(client.jobs(filter).unwrap(), (vec![], false));
            let mut page =
                |before| client.jobs(JobFilter { before, limit: Some(200), ..JobFilter::default() });
            let (first, has_more) = page(None).unwrap();
            let (second, is_end) = page(first.last().map(|job| job.job)).unwrap();
            assert!(has_more && !is_end);
            first.into_iter().chain(second).map(|job| job.job).collect::<Vec<u64>>()
        })
        .await;
    assert_eq!(listed, (1..=300).rev().collect::<Vec<u64>>(), "all of them, the newest first");
    kept.end().await;
}

#[tokio::test]
async fn a_job_is_cancelled_wherever_it_is() {
    let mut fixture = Fixture::new(1, &["hold=2"]);
    fixture.config.queue.durable.per_worker = 1;
    let kept = Kept::ready(&fixture).await;
    let jobs = kept.submit(5, 0..4).await;
    wait_for("the first runs", async || {
        let status = kept.service.status().await;
        (status.slots[0].jobs == 1 && status.totals.tokens == 2).then_some(())
    })
    .await;
    for job in [jobs[3], jobs[1], jobs[0]] {
        // Far back in the queue, next in line, and on a worker.
        let summary = kept.with(move |client| client.cancel_job(job).unwrap()).await;
        assert_eq!((summary.state, summary.job), (JobState::Cancelled, job));
        let again = kept.with(move |client| client.cancel_job(job).unwrap()).await;
        assert_eq!(again.state, JobState::Cancelled);
    }
    // The place is free again: the job that is left gets as far as the first did.
    wait_for("the last one runs", async || (kept.service.status().await.totals.tokens == 4).then_some(()))
        .await;
    assert_eq!(kept.state(jobs[2]).await, JobState::Running);
    assert_eq!(code_of(kept.with(|client| client.cancel_job(99)).await), ErrorCode::NotFound);
    kept.end().await;
}

#[tokio::test]
async fn cancelling_what_has_ended_changes_nothing() {
    let fixture = Fixture::new(1, &[]);
    let kept = Kept::ready(&fixture).await;
    let job = kept.submit(3, 5..6).await[0];
    assert_answered(&kept.wait(job).await, 5, 3);
    let summary = kept.with(move |client| client.cancel_job(job).unwrap()).await;
    assert_eq!(summary.state, JobState::Done);
    kept.end().await;
}

#[tokio::test]
async fn who_waits_may_go_away_and_come_back() {
    let late = tempfile::tempdir().unwrap();
    let late = late.path().join("now");
    let fixture = Fixture::new(1, &[&format!("late={}", late.display())]);
    let kept = Kept::start(&fixture).await;
    let job = kept.submit(3, 8..9).await[0];
    let state = |timeout| move |client: &mut Client| client.wait(job, Some(timeout)).unwrap().summary.state;
    let now = kept.with(state(Duration::from_millis(1))).await;
    assert!(matches!(now, JobState::Queued | JobState::Running), "{now:?}");
    // Two that wait: one of them hangs up.
    let socket = kept.socket.clone();
    let waiting = spawn_blocking(move || Client::connect(&socket, "test", LONG).unwrap().wait(job, None));
    let mut gone = std::os::unix::net::UnixStream::connect(&kept.socket).unwrap();
    let hello = bitnetd_proto::handshake::client_hello("gone");
    bitnetd_proto::frame::write_frame(&mut gone, &hello).unwrap();
    let wait = bitnetd_proto::client_link::ClientMessage::Wait { id: 1, job, timeout_ms: None };
    bitnetd_proto::frame::write_frame(&mut gone, &wait).unwrap();
    drop(gone);
    std::fs::write(&late, "").unwrap();
    assert_answered(&waiting.await.unwrap().unwrap(), 8, 3);
    assert_answered(&kept.wait(job).await, 8, 3);
    assert_eq!(code_of(kept.with(|client| client.wait(99, None)).await), ErrorCode::NotFound);
    kept.end().await;
}

#[tokio::test]
async fn the_same_key_is_the_same_job() {
    let fixture = Fixture::new(1, &[]);
    let kept = Kept::ready(&fixture).await;
    let submit = |seed| {
        let submission = Submission { key: Some("mine".into()), request: request(3, seed) };
        kept.with(move |client| client.submit(submission))
    };
    let (first, second) = (submit(4).await.unwrap(), submit(4).await.unwrap());
    assert_eq!((first.job, first.is_new, second.is_new), (second.job, true, false));
    assert_answered(&kept.wait(first.job).await, 4, 3);
    assert!(!submit(4).await.unwrap().is_new);
    assert_eq!(code_of(submit(5).await), ErrorCode::InvalidRequest);
    kept.end().await;
}

#[tokio::test]
async fn a_drain_leaves_the_queue_for_the_next_start() {
    let mut fixture = Fixture::new(1, &["hold=2"]);
    fixture.config.restart.drain_timeout = Duration::from_millis(50);
    let kept = Kept::ready(&fixture).await;
    let jobs = kept.submit(4, 0..20).await;
    wait_for("some run", async || (kept.service.status().await.slots[0].jobs > 0).then_some(())).await;
    kept.service.drain().await;
    let refused = kept.with(|client| client.submit(Submission { key: None, request: request(1, 1) })).await;
    assert_eq!(code_of(refused), ErrorCode::Draining);
    tokio::time::timeout(LONG, kept.service.stopped()).await.expect("not stopped in time");
    kept.serving.await.unwrap();

    let fixture = fixture.again(2, &[]);
    let next = Kept::ready(&fixture).await;
    for (seed, job) in (0..).zip(jobs) {
        assert_answered(&next.wait(job).await, seed, 4);
    }
    next.end().await;
}

#[tokio::test]
async fn a_poison_job_stays_one_after_a_restart_and_fails_alone() {
    // One slot that may not be restarted: after two deaths nothing can take the job, which goes back to the journal.
    let mut fixture = Fixture::new(1, &["crash=1"]);
    (fixture.config.restart.max, fixture.config.queue.max_deaths) = (1, 3);
    let kept = Kept::start(&fixture).await;
    let poison = kept.submit(3, 0..1).await[0];
    wait_for("the slot is given up", async || {
        let status = kept.service.status().await;
        (status.health == Health::Degraded).then_some(())
    })
    .await;
    wait_for("the deaths are counted on disk", async || {
        let record = kept.with(move |client| client.result(poison).unwrap()).await;
        (record.summary.deaths == 2 && record.summary.state == JobState::Queued).then_some(())
    })
    .await;
    let innocent = kept.submit(3, 7..8).await[0];
    kept.end().await;

    // It needs one more death; the third worker is the last that misbehaves.
    let fixture = fixture.again(1, &["crash=1", "only=3"]);
    let next = Kept::start(&fixture).await;
    let record = next.wait(poison).await;
    assert_eq!(record.summary.error.map(|error| error.code), Some(ErrorCode::Poisoned));
    assert_answered(&next.wait(innocent).await, 7, 3);
    next.end().await;
}

#[tokio::test]
async fn a_deadline_counts_while_nobody_works() {
    let fixture = Fixture::new(1, &["never_ready"]);
    let kept = Kept::start(&fixture).await;
    let mut late = request(3, 1);
    late.deadline_ms = Some(20);
    let job = kept.with(|client| client.submit(Submission { key: None, request: late }).unwrap().job).await;
    let record = kept.wait(job).await;
    assert_eq!(record.summary.error.map(|error| error.code), Some(ErrorCode::DeadlineExceeded));
    kept.end().await;
}

#[tokio::test]
async fn without_a_journal_the_reason_is_said() {
    let fixture = Fixture::new(1, &[]);
    let service = fixture.ready().await;
    service.keep_no_jobs("it is off");
    let socket = fixture.folder.path().join("b.sock");
    let serving =
        tokio::spawn(Listener::bind(&socket, &ListenConfig::default()).unwrap().serve(service.clone()));
    let refused =
        spawn_blocking(move || Client::connect(&socket, "test", LONG).unwrap().result(1)).await.unwrap();
    let error = refused.unwrap_err();
    assert_eq!(error.wire().unwrap().code, ErrorCode::JournalUnavailable);
    assert!(error.to_string().contains("it is off"), "{error}");
    end(service).await;
    serving.await.unwrap();
}
