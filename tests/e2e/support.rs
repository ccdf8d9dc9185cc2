//! Starting the binary, watching processes, waiting with a deadline.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bitnetd_proto::client::{Client, ClientError, GenerationEvent};
use bitnetd_proto::request::{GenerateRequest, Prompt, Sampling};
use bitnetd_proto::status::{Health, StatusReport};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Longest wait for anything; long, because the machine may be busy with other tests.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// Polls until `probe` gives something.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "waited {DEADLINE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A folder of a test's own; also its home, so that no configuration of the user is seen.
#[derive(Debug)]
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The binary with these arguments (split at blanks; `%` stands for the folder), in this folder.
    pub(crate) fn command(&self, line: &str) -> Command {
        let home = self.0.path();
        let mut command = self.place(Command::new(env!("CARGO_BIN_EXE_bitnetd")));
        command.args(line.split_whitespace().map(|word| word.replace('%', home.to_str().unwrap())));
        command
    }

    /// A script for the shell, in this folder.
    pub(crate) fn shell(&self, script: &str) -> Command {
        let mut command = self.place(Command::new("sh"));
        command.args(["-c", script]);
        command
    }

    /// The command in this folder, and with it as home.
    fn place(&self, mut command: Command) -> Command {
        let home = self.0.path();
        command.current_dir(home).env("HOME", home).stdin(Stdio::null());
        for variable in
            ["BITNETD_SOCKET", "BITNETD_CONFIG", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME"]
        {
            command.env_remove(variable);
        }
        // Else root's daemons would all want the system's journal.
        command.env("STATE_DIRECTORY", home.join("state")).env("CACHE_DIRECTORY", home.join("cache"));
        command
    }

    /// Runs the binary to its end.
    #[track_caller]
    pub(crate) fn run(&self, line: &str) -> Finished {
        self.finish(self.command(line))
    }

    /// Runs the binary to its end with a prompt that may have blanks.
    #[track_caller]
    pub(crate) fn run_prompt(&self, line: &str, prompt: &str) -> Finished {
        let mut command = self.command(line);
        command.args(["-p", prompt]);
        self.finish(command)
    }

    /// Runs the binary to its end with something on stdin.
    #[track_caller]
    pub(crate) fn run_with_stdin(&self, line: &str, stdin: &str) -> Finished {
        let mut command = self.command(line);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        self.finished(child)
    }

    #[track_caller]
    pub(crate) fn finish(&self, mut command: Command) -> Finished {
        self.finished(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// What came of a process; its talk names this folder `[DIR]`.
    #[track_caller]
    pub(crate) fn finished(&self, child: Child) -> Finished {
        let output = child.wait_with_output().unwrap();
        let text =
            |bytes| String::from_utf8(bytes).unwrap().replace(self.0.path().to_str().unwrap(), "[DIR]");
        Finished { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// What a process left behind.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// Its stdout, if it ended well.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// Its stdout as JSON, if it ended well.
    #[track_caller]
    pub(crate) fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.ok()).unwrap()
    }
}

/// A running `bitnetd serve`. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Daemon {
    /// Starts `serve` with these arguments on a socket in the folder, and waits until it is ready.
    #[track_caller]
    pub(crate) fn start(folder: &Folder, line: &str) -> Self {
        let mut daemon = Self::spawn(folder, line);
        wait_for("the daemon is ready", || {
            assert_eq!(daemon.child.try_wait().unwrap(), None, "it ended: {}", daemon.log(folder));
            let is_ready = |report: &StatusReport| report.slots.iter().all(|slot| slot.state == "ready");
            daemon.status().filter(|report| report.health == Health::Ready && is_ready(report))
        });
        daemon
    }

    /// The same with a command that runs `serve` on the usual socket of the folder.
    #[track_caller]
    pub(crate) fn adopt(folder: &Folder, mut command: Command) -> Self {
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        let mut daemon = Self { child, socket: folder.path("bitnetd.sock") };
        wait_for("the daemon is ready", || {
            assert_eq!(daemon.child.try_wait().unwrap(), None, "it ended: {}", daemon.log(folder));
            daemon.status().filter(|report| report.health == Health::Ready)
        });
        daemon
    }

    /// Starts `serve` and does not wait.
    pub(crate) fn spawn(folder: &Folder, line: &str) -> Self {
        let socket = folder.path("bitnetd.sock");
        let log = fs::File::options().append(true).create(true).open(folder.path("log")).unwrap();
        let mut command = folder
            .command(&format!("serve --socket % {line}").replace("--socket %", "--socket %/bitnetd.sock"));
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Self { child, socket }
    }

    pub(crate) fn log(&self, folder: &Folder) -> String {
        fs::read_to_string(folder.path("log")).unwrap_or_default()
    }

    pub(crate) fn connect(&self) -> Result<Client, ClientError> {
        Client::connect(&self.socket, "e2e", Duration::from_secs(60))
    }

    /// How it is, if it answers.
    pub(crate) fn status(&self) -> Option<StatusReport> {
        self.connect().ok()?.status().ok()
    }

    /// Pids of its live workers.
    pub(crate) fn workers(&self) -> Vec<u32> {
        self.status().unwrap().slots.iter().filter_map(|slot| slot.pid).collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(self.child.id(), signal);
    }

    /// Waits for its end; gives its exit code (`None`: a signal).
    #[track_caller]
    pub(crate) fn wait(&mut self) -> Option<i32> {
        wait_for("the daemon ends", || self.child.try_wait().unwrap()).code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Sends a signal; the process may be gone already.
pub(crate) fn send(pid: u32, signal: Signal) {
    let _gone = kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal);
}

/// Whether a process runs (a zombie does not).
pub(crate) fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or_default().starts_with('Z'))
}

/// Children of a process.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

/// A field of a file such as `/proc/PID/status`.
pub(crate) fn field(file: impl AsRef<Path>, name: &str) -> String {
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
}

/// A request that draws random tokens; what comes back depends on nothing but its parameters.
pub(crate) fn random_request(prompt: &str, seed: u64, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        max_tokens,
        sampling: Sampling { temperature: 0.8, seed: Some(seed), ..Sampling::default() },
        ignore_eos: true,
        ..GenerateRequest::new(Prompt::Text(prompt.into()))
    }
}

/// A whole answer over the protocol.
pub(crate) fn generate(client: &mut Client, request: &GenerateRequest) -> Result<String, ClientError> {
    let mut text = String::new();
    for (n_tokens, event) in client.generate(request)?.enumerate() {
        match event? {
            GenerationEvent::Token(token) => {
                assert_eq!(token.index as usize, n_tokens, "a token came twice or not at all");
                text += &token.text;
            }
            GenerationEvent::Done(done) => text += &done.tail,
        }
    }
    Ok(text)
}

/// Beginnings of stories.
pub(crate) const PROMPTS: [&str; 20] = [
    "Once upon a time",
    "One day, a little girl",
    "There was a big dog",
    "Tom and Lily went to",
    "The sun was bright and",
    "In a small village",
    "A cat sat on",
    "Mia had a red ball",
    "It was raining when",
    "The old man said",
    "Far away in the forest",
    "Ben found a box",
    "The bird could not fly",
    "Every morning, Anna",
    "A boy named Max",
    "The farmer had a cow",
    "On the way to school",
    "At night, the moon",
    "Sara wanted to bake",
    "The fish swam to",
];
