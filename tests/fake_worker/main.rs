//! A scripted worker for tests of the supervisor: it has no model, and misbehaves on order.
//!
//! Each argument is one line of the script, such as `crash=3`; see [`Script`]. Its tokens depend on nothing but seed
//! and index, as those of a real worker do, so that a test can tell whether a stream was disturbed.
//! With `serve SOCKET SLOTS …` it is a supervisor instead, with itself as the workers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]
#![allow(clippy::disallowed_methods, reason = "a worker that dies on order exits on the spot")]
#![allow(clippy::exit, reason = "a worker that dies on order exits on the spot")]

mod serve; // A whole supervisor process, for tests that kill it.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bitnetd_proto::PROTOCOL_VERSION;
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::event::{Done, FinishReason, Timings, Token, TokenLogprobs, Usage};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::frame::{FrameDecoder, read_frame, write_frame};
use bitnetd_proto::handshake::check_worker_hello;
use bitnetd_proto::request::{GenerateRequest, Prompt};
use bitnetd_proto::worker_link::{
    Confinement, FromWorker, ModelSummary, ToWorker, WORKER_LINK_FD, WorkerLoad,
};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "serve") {
        serve::run(&args[1..]);
        return;
    }
    let script = Script::parse(&args);
    let hello = read_frame::<ToWorker>(Link).unwrap().expect("the supervisor hung up before hello");
    let setup = check_worker_hello(hello).unwrap();
    let n_start = script.note_start(setup.slot);
    let salt = salt();
    let script = if script.only.is_some_and(|only| n_start >= only) { script.tame() } else { script };
    become_ready(&script);
    Worker { script, salt, jobs: BTreeMap::new(), n_tokens: 0, steps: 0 }.run();
}

/// A model is the text `salt=N` or any other, which stands for 0. Models with another salt say other tokens.
fn salt() -> u64 {
    let image = std::fs::read("/proc/self/fd/4").unwrap();
    std::str::from_utf8(&image).ok().and_then(|text| text.strip_prefix("salt=")?.parse().ok()).unwrap_or(0)
}

/// What goes wrong, and when.
#[derive(Clone, Debug, Default)]
struct Script {
    /// `state=DIR`: a file appears there for each start.
    state: Option<PathBuf>,
    /// `only=N`: only the first N processes (of all slots) misbehave.
    only: Option<u32>,
    /// `late=FILE`: not ready before that file exists.
    late: Option<PathBuf>,
    /// `version=N`: claims this version.
    version: Option<u32>,
    /// `never_ready`
    never_ready: bool,
    /// `start_failed=CODE`: says that it cannot start, and exits so.
    start_failed: Option<i32>,
    /// `exit=CODE`: exits without a word instead of getting ready.
    exit: Option<i32>,
    /// `garbage=N`: writes something that is no frame instead of token N (0: instead of `ready`).
    garbage: Option<u64>,
    /// `crash=N`: aborts instead of saying its N-th token.
    crash: Option<u64>,
    /// `hang=N`: does nothing any more instead of saying its N-th token.
    hang: Option<u64>,
    /// `confess=WORDS`: writes last words (blanks as `_`) and dies of SIGSYS instead of getting ready.
    confess: Option<String>,
    /// `gap=N`: leaves out its N-th token.
    gap: Option<u64>,
    /// `hold=N`: stands still before token N of a job (and answers pings), unless the job was resumed there.
    hold: Option<u32>,
    /// `pace_ms=N`: time one step takes.
    pace: Duration,
    /// `deaf`: never reads its link again once it is ready.
    deaf: bool,
}

impl Script {
    fn parse(args: &[String]) -> Self {
        let mut script = Self::default();
        for arg in args {
            let (key, value) = arg.split_once('=').unwrap_or((arg, ""));
            match key {
                "state" => script.state = Some(value.into()),
                "only" => script.only = Some(value.parse().unwrap()),
                "late" => script.late = Some(value.into()),
                "version" => script.version = Some(value.parse().unwrap()),
                "never_ready" => script.never_ready = true,
                "start_failed" => script.start_failed = Some(value.parse().unwrap()),
                "exit" => script.exit = Some(value.parse().unwrap()),
                "garbage" => script.garbage = Some(value.parse().unwrap()),
                "crash" => script.crash = Some(value.parse().unwrap()),
                "hang" => script.hang = Some(value.parse().unwrap()),
                "confess" => script.confess = Some(value.replace('_', " ")),
                "gap" => script.gap = Some(value.parse().unwrap()),
                "hold" => script.hold = Some(value.parse().unwrap()),
                "pace_ms" => script.pace = Duration::from_millis(value.parse().unwrap()),
                "deaf" => script.deaf = true,
                _ => panic!("unknown script line `{arg}`"),
            }
        }
        script
    }

    fn tame(&self) -> Self {
        Self { pace: self.pace, state: self.state.clone(), ..Self::default() }
    }

    /// Leaves `start-N` with what this process looks like; gives N, from 0.
    fn note_start(&self, slot: u32) -> u32 {
        let Some(state) = &self.state else { return 0 };
        let mut n = 0;
        loop {
            match OpenOptions::new().write(true).create_new(true).open(state.join(format!("start-{n}"))) {
                Ok(mut file) => {
                    writeln!(file, "slot={slot} pid={} fds={} {}", std::process::id(), fds(), affinity())
                        .unwrap();
                    return n;
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => n += 1,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Open descriptors with what they are, but for the one that lists them.
fn fds() -> String {
    let mut fds: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| {
            std::fs::read_link(entry.path()).is_ok_and(|to| !to.to_string_lossy().contains("/fd"))
        })
        .map(|entry| entry.file_name().to_str().unwrap().parse().unwrap())
        .filter(|fd| !is_own_file(*fd))
        .collect();
    fds.sort_unstable();
    fds.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn is_own_file(fd: i32) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|to| to.to_string_lossy().contains("/start-"))
}

fn affinity() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("Cpus_allowed_list")).unwrap();
    line.replace(":\t", "=")
}

fn become_ready(script: &Script) {
    while script.late.as_deref().is_some_and(|file| !Path::exists(file)) {
        std::thread::sleep(Duration::from_millis(2));
    }
    if let Some(words) = &script.confess {
        // Opened by name, as a descriptor's number may not be taken without unsafe code.
        let mut pipe = OpenOptions::new().write(true).open("/proc/self/fd/6").unwrap();
        pipe.write_all(words.as_bytes()).unwrap();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGSYS).unwrap();
    }
    if let Some(code) = script.exit {
        std::process::exit(code);
    }
    if let Some(code) = script.start_failed {
        let exit_code = ExitCode::from_raw(code).unwrap();
        let error = WireError::new(ErrorCode::Internal, "the model is a lie").with_hint("find another");
        write_frame(Link, &FromWorker::StartFailed { error, exit_code }).unwrap();
        std::process::exit(code);
    }
    if script.never_ready {
        sleep_for_ever();
    }
    if script.garbage == Some(0) {
        write_garbage();
    }
    let model = ModelSummary {
        name: "fake".into(),
        architecture: "fake".into(),
        n_params: 1,
        n_ctx: 1 << 20,
        n_vocab: 50_000,
        n_layers: 1,
        n_embd: 1,
        isa: "scalar".into(),
        head: "f16".into(),
        image_bytes: std::fs::metadata("/proc/self/fd/4").unwrap().len(),
        kv_bytes: 0,
        has_chat_template: false,
        step_bytes: 1,
        token_macs: 1,
        head_macs: 1,
    };
    let version = script.version.unwrap_or(PROTOCOL_VERSION);
    say(&FromWorker::Ready {
        version,
        model: Box::new(model),
        load_s: 0.001,
        confinement: Confinement::default(),
    });
    if script.deaf {
        sleep_for_ever();
    }
}

fn sleep_for_ever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn write_garbage() -> ! {
    let _gone = Link.write_all(b"\x07\0\0\0{\"a\":}\xff\xff\xff\xff");
    sleep_for_ever()
}

/// A worker whose supervisor is gone has nothing to say any more.
fn say(message: &FromWorker) {
    if write_frame(Link, message).is_err() {
        std::process::exit(0);
    }
}

struct Job {
    request: GenerateRequest,
    seed: u64,
    n_resumed: u32,
    next: u32,
}

struct Worker {
    script: Script,
    salt: u64,
    jobs: BTreeMap<u64, Job>,
    /// Said by this process.
    n_tokens: u64,
    steps: u64,
}

impl Worker {
    fn run(mut self) {
        let mut decoder = FrameDecoder::default();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let flags = if self.jobs.is_empty() { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
            match recv(WORKER_LINK_FD, &mut buffer, flags) {
                Ok(0) => return,
                Ok(n) => decoder.push(&buffer[..n]),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => panic!("{error}"),
            }
            while let Some(message) = decoder.next_message().unwrap() {
                if !self.obey(message) {
                    return;
                }
            }
            self.step();
        }
    }

    fn obey(&mut self, message: ToWorker) -> bool {
        match message {
            ToWorker::Hello { .. } => panic!("a second hello"),
            ToWorker::Job { job, request, resume } => {
                let seed = self.salt + request.sampling.seed.expect("the supervisor fills in the seed");
                for (index, id) in (0..).zip(&resume) {
                    assert_eq!(*id, token_id(seed, index), "job {job} is resumed with tokens it never had");
                }
                let next = u32::try_from(resume.len()).unwrap();
                self.jobs.insert(job, Job { request: *request, seed, n_resumed: next, next });
            }
            ToWorker::Cancel { job } => {
                self.jobs.remove(&job);
            }
            ToWorker::Ping { seq } => {
                let sequences = u32::try_from(self.jobs.len()).unwrap();
                let load = WorkerLoad { steps: self.steps, sequences, ..WorkerLoad::default() };
                say(&FromWorker::Pong { seq, load });
            }
            ToWorker::Drain => return false,
        }
        true
    }

    fn step(&mut self) {
        if self.jobs.is_empty() {
            return;
        }
        self.steps += 1;
        std::thread::sleep(self.script.pace);
        let jobs: Vec<u64> = self.jobs.keys().copied().collect();
        for job in jobs {
            self.advance(job);
        }
    }

    fn advance(&mut self, id: u64) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        match &job.request.prompt {
            Prompt::Text(text) if text == "poison" => std::process::abort(),
            Prompt::Text(text) if text == "refuse" => {
                self.jobs.remove(&id);
                let error = WireError::new(ErrorCode::ContextExceeded, "it does not fit");
                say(&FromWorker::Failed { job: id, error });
                return;
            }
            _ => {}
        }
        if self.script.hold == Some(job.next) && job.n_resumed < job.next.max(1) {
            return;
        }
        if job.next == job.request.max_tokens {
            self.jobs.remove(&id);
            say(&FromWorker::Done { job: id, done: done() });
            return;
        }
        self.n_tokens += 1;
        let n = Some(self.n_tokens);
        if self.script.crash == n {
            std::process::abort();
        }
        if self.script.hang == n {
            sleep_for_ever();
        }
        if self.script.garbage == n {
            write_garbage();
        }
        let index = job.next;
        job.next += 1;
        if self.script.gap != n {
            let (id_of_token, logprobs) = (token_id(job.seed, index), job.request.logprobs);
            let logprobs = logprobs.map(|_| TokenLogprobs { logprob: -0.5, top: vec![] });
            let token = Token { index, id: id_of_token, text: format!(" {id_of_token}"), logprobs };
            say(&FromWorker::Token { job: id, token });
        }
    }
}

/// The tests compute the same.
fn token_id(seed: u64, index: u32) -> u32 {
    u32::try_from((seed % 10_000) * 7 + u64::from(index) * 13).unwrap() % 50_000
}

fn done() -> Done {
    Done {
        finish_reason: FinishReason::Length,
        tail: String::new(),
        usage: Usage { prompt_tokens: 1, cached_tokens: 0, completion_tokens: 0 },
        timings: Timings { prefill_s: 0.001, ..Timings::default() },
        model: None,
    }
}

/// The inherited socket, without taking it over from a number (which has no safe form).
struct Link;

impl Read for Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(recv(WORKER_LINK_FD, buffer, MsgFlags::empty())?)
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(WORKER_LINK_FD, bytes, MsgFlags::MSG_NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
