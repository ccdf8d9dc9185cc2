//! Helpers that hide the API: a service of fake workers, its jobs, and waiting for things.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use bitnetd_config::Config;
use bitnetd_placement::{Plan, WorkerPlacement};
use bitnetd_proto::error::WireError;
use bitnetd_proto::event::{Done, Token};
use bitnetd_proto::request::{GenerateRequest, Prompt};
use bitnetd_proto::status::SlotReport;
use bitnetd_supervisor::{ClientId, Job, JobEvent, ModelSource, Service, ServiceSpec};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

/// Far longer than anything takes; a test that needs it has failed.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) const FAKE_WORKER: &str = env!("CARGO_BIN_EXE_fake_worker");

/// A folder of its own and a configuration with short waits.
pub(crate) struct Fixture {
    pub(crate) folder: TempDir,
    pub(crate) config: Config,
    pub(crate) n_slots: usize,
    script: Vec<OsString>,
}

impl Fixture {
    pub(crate) fn new(n_slots: usize, script: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.restart.backoff_min = Duration::from_millis(5);
        config.restart.backoff_max = Duration::from_millis(20);
        config.restart.max = 1000;
        let mut script: Vec<OsString> = script.iter().map(Into::into).collect();
        let mut state = OsString::from("state=");
        state.push(folder.path());
        script.push(state);
        Self { folder, config, n_slots, script }
    }

    /// The same service again, with other workers.
    pub(crate) fn again(self, n_slots: usize, script: &[&str]) -> Self {
        let mut next = Self::new(n_slots, script);
        let state = next.script.last_mut().unwrap();
        *state = OsString::from("state=");
        state.push(self.folder.path());
        Self { folder: self.folder, ..next }
    }

    pub(crate) fn spec(&self) -> ServiceSpec {
        ServiceSpec {
            config: self.config.clone(),
            plan: Plan { workers: vec![WorkerPlacement::default(); self.n_slots], ..Plan::default() },
            model: ModelSource::BuiltIn(b"fake image"),
            image_cache: None,
            worker_program: FAKE_WORKER.into(),
            worker_args: self.script.clone(),
            memory_bytes: None,
        }
    }

    pub(crate) async fn start(&self) -> Service {
        Service::start(self.spec()).await.unwrap()
    }

    pub(crate) async fn ready(&self) -> Service {
        let service = self.start().await;
        timeout(LONG, service.ready()).await.expect("not ready in time").unwrap();
        service
    }

    /// What each process said about itself, in order of start.
    pub(crate) fn starts(&self) -> Vec<String> {
        (0..)
            .map_while(|n| std::fs::read_to_string(self.folder.path().join(format!("start-{n}"))).ok())
            .filter(|line| line.ends_with('\n'))
            .collect()
    }
}

/// Polls until `condition` gives something.
#[track_caller]
pub(crate) fn wait_for<T>(
    what: &str,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> impl Future<Output = T> {
    let location = std::panic::Location::caller();
    async move {
        let end = Instant::now() + LONG;
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            assert!(Instant::now() < end, "{location}: waited {LONG:?} in vain for {what}");
            sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Waits until the slots look as wanted.
#[track_caller]
pub(crate) fn wait_for_slots(
    service: &Service,
    what: &str,
    is_it: impl Fn(&[SlotReport]) -> bool,
) -> impl Future<Output = Vec<SlotReport>> {
    wait_for(what, async move || {
        let slots = service.status().await.slots;
        is_it(&slots).then_some(slots)
    })
}

pub(crate) fn request(max_tokens: u32, seed: u64) -> GenerateRequest {
    let mut request = GenerateRequest::new(Prompt::Text("hello".into()));
    request.max_tokens = max_tokens;
    request.sampling.seed = Some(seed);
    request
}

pub(crate) async fn submit(service: &Service, request: GenerateRequest) -> Job {
    service.submit(ClientId::InProcess, request).await.unwrap()
}

pub(crate) async fn next(job: &mut Job) -> Option<JobEvent> {
    timeout(LONG, job.next()).await.expect("no event in time")
}

/// The next event, which must be a token.
pub(crate) async fn next_token(job: &mut Job) -> Token {
    match next(job).await {
        Some(JobEvent::Token(token)) => token,
        other => panic!("not a token: {other:?}"),
    }
}

/// All events to the end; the ids of the tokens, which must come without gap from `first`.
pub(crate) async fn finish(job: &mut Job, first: u32) -> (Vec<u32>, Result<Done, WireError>) {
    let mut ids = Vec::new();
    for index in first.. {
        match next(job).await.expect("the stream ended without an end") {
            JobEvent::Token(token) => {
                assert_eq!(token.index, index, "gap or repetition");
                ids.push(token.id);
            }
            JobEvent::Done(done) => {
                assert_eq!(next(job).await, None);
                return (ids, Ok(done));
            }
            JobEvent::WorkerDied { .. } => panic!("said of a job that is not durable"),
            JobEvent::Failed(error) => {
                assert_eq!(next(job).await, None);
                return (ids, Err(error));
            }
        }
    }
    unreachable!()
}

/// What an undisturbed worker says.
pub(crate) fn expected_ids(seed: u64, indexes: std::ops::Range<u32>) -> Vec<u32> {
    indexes
        .map(|index| u32::try_from((seed % 10_000) * 7 + u64::from(index) * 13).unwrap() % 50_000)
        .collect()
}

/// The process that has jobs now.
pub(crate) async fn busy_pid(service: &Service) -> u32 {
    let slots = wait_for_slots(service, "a busy slot", |slots| slots.iter().any(|slot| slot.jobs > 0)).await;
    slots.iter().find(|slot| slot.jobs > 0).unwrap().pid.unwrap()
}

/// Signals a worker; it may have been reaped since its pid was asked for.
pub(crate) fn signal(pid: u32, signal: Signal) {
    let sent = kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal);
    assert!(matches!(sent, Ok(()) | Err(Errno::ESRCH)), "{sent:?}");
}

/// True if there is such a process, other than as a corpse.
pub(crate) fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or("").starts_with('Z'))
}

/// Pids that a fixture's processes had.
pub(crate) fn pids(starts: &[String]) -> Vec<u32> {
    let field = |line: &String| {
        line.split_whitespace().find_map(|field| field.strip_prefix("pid=")).unwrap().parse().unwrap()
    };
    starts.iter().map(field).collect()
}

pub(crate) async fn end(service: Service) {
    service.stop().await;
    timeout(LONG, service.stopped()).await.expect("not stopped in time");
}

/// Number of open descriptors of this process.
pub(crate) fn n_fds(pid: u32) -> usize {
    std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd")).unwrap().count()
}
