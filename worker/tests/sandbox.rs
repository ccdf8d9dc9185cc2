//! Files, network, other processes and further rights are refused in the sandbox, and the log says so.
//!
//! Each act is tried without the sandbox first: a test that cannot fail proves nothing.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Output, Stdio};

use nix::libc;

/// Runs the probe to its end.
fn probe(stage: &str, act: &str, argument: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sandbox_probe"))
        .args([stage, act, argument])
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The act is possible outside.
#[track_caller]
fn assert_possible(act: &str, argument: &str) {
    let output = probe("none", act, argument);
    let said = text(&output.stdout);
    assert!(output.status.success() && !said.contains("refused"), "`{act}` outside: {said} {output:?}");
}

/// The act ends the process, which names the call.
#[track_caller]
fn assert_deadly(stage: &str, act: &str, argument: &str, calls: &[&str]) {
    let output = probe(stage, act, argument);
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{stage} {act}: {output:?}");
    let log = text(&output.stderr);
    let is_named = calls.iter().any(|call| log.contains(&format!("({call})")));
    assert!(is_named && log.contains(": denied system call "), "{stage} {act}: {log}");
}

/// The act fails, the process goes on, and the log names the call.
#[track_caller]
fn assert_refused(stage: &str, act: &str, argument: &str, calls: &[&str]) {
    let output = probe(stage, act, argument);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{stage} {act}: {output:?}");
    assert!(said.contains("refused: Permission denied"), "{stage} {act}: {said}");
    let log = text(&output.stderr);
    for heard in [&log, &said] {
        let is_named = calls.iter().any(|call| heard.contains(&format!("({call})")));
        assert!(
            is_named && heard.contains("refused system call ") && heard.contains(argument),
            "{stage} {act}: {heard}"
        );
    }
}

/// Somebody else's process, to be left in peace. Killed at the end.
struct Bystander(Child);

impl Bystander {
    fn start() -> Self {
        Self(Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }

    #[track_caller]
    fn assert_lives(mut self) {
        assert_eq!(self.0.try_wait().unwrap(), None, "it was killed");
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

const STAGES: [&str; 2] = ["loading", "serving"];

#[test]
fn no_file_is_opened_made_listed_or_changed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    std::fs::write(&file, "x").unwrap();
    let (file, folder) = (file.to_str().unwrap(), folder.path().to_str().unwrap());
    let new = format!("{folder}/new");
    for (act, path) in [("open", file), ("list", folder), ("create", &new), ("stat", file)] {
        assert_possible(act, path);
    }
    std::fs::remove_file(&new).unwrap();
    for (act, path) in [("open", file), ("list", folder), ("create", &new)] {
        assert_refused("serving", act, path, &["openat", "open"]);
        assert_refused("serving", &format!("thread-{act}"), path, &["openat", "open"]);
        assert_refused("loading", act, path, &["openat", "open"]);
    }
    assert_refused("serving", "stat", file, &["statx", "newfstatat"]);
    for act in ["remove", "rename"] {
        for stage in STAGES {
            assert_deadly(stage, act, file, &["unlink", "unlinkat", "rename", "renameat", "renameat2"]);
        }
    }
    assert!(std::path::Path::new(file).exists() && !std::path::Path::new(&new).exists());
}

#[test]
fn no_file_that_came_along_grows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    for (stage, signal, n_bytes) in [("none", None, 1), ("serving", Some(libc::SIGXFSZ), 0)] {
        let file = std::fs::File::create(&path).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandbox_probe"));
        let status = command.args([stage, "grow"]).stdout(Stdio::null()).stderr(file).status().unwrap();
        assert_eq!(status.signal(), signal, "{stage}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), n_bytes, "{stage}");
    }
}

#[test]
fn no_socket_is_made() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let _unix = UnixListener::bind(&path).unwrap();
    let (address, path) = (tcp.local_addr().unwrap().to_string(), path.to_str().unwrap());
    for (act, argument) in
        [("tcp", address.as_str()), ("listen", ""), ("udp", ""), ("unix", path), ("pair", "")]
    {
        assert_possible(act, argument);
        for stage in STAGES {
            assert_deadly(stage, act, argument, &["socket", "socketpair"]);
        }
        assert_deadly("serving", &format!("thread-{act}"), argument, &["socket", "socketpair"]);
    }
}

#[test]
fn nothing_is_executed() {
    assert_possible("exec", "/bin/true");
    assert_possible("fork", "/bin/true");
    for stage in STAGES {
        assert_deadly(stage, "exec", "/bin/true", &["execve"]);
        // The C library holds all signals back while it makes a process, so nobody can name the call; it dies all the same.
        let output = probe(stage, "fork", "/bin/true");
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{stage} {output:?}");
    }
    let output = probe("serving", "thread", "");
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "a thread after the last step: {output:?}");
    assert_possible("code", "");
    for stage in STAGES {
        assert_deadly(stage, "code", "", &["mprotect"]);
    }
}

#[test]
fn other_processes_are_left_in_peace() {
    for (act, call) in [("kill", "kill"), ("ptrace", "ptrace"), ("peek", "process_vm_readv")] {
        let bystander = Bystander::start();
        let (pid, ours) = (bystander.pid(), std::process::id().to_string());
        for stage in STAGES {
            assert_deadly(stage, act, &pid, &[call]);
            assert_deadly(stage, act, &ours, &[call]);
        }
        assert_deadly("serving", &format!("thread-{act}"), &pid, &[call]);
        bystander.assert_lives();
    }
    let bystander = Bystander::start();
    assert_possible("kill", &bystander.pid());
}

#[test]
fn no_right_comes_back() {
    // The C library changes the user of all threads, and wakes them first.
    for stage in STAGES {
        assert_deadly(stage, "setuid", "", &["setuid", "tgkill"]);
        assert_deadly(stage, "dumps", "", &["prctl"]);
    }
    assert_deadly("serving", "limits", "", &["prlimit64"]);
}

#[test]
fn what_serving_needs_goes_on() {
    for stage in ["none", "loading", "serving"] {
        for act in ["work", "thread-work"] {
            let output = probe(stage, act, "");
            let said = text(&output.stdout);
            assert!(said.contains("worked: 59700000 true true true\nwords: \n"), "{stage} {act}: {output:?}");
            // The panic inside was reported as ever.
            assert!(text(&output.stderr).contains("panicked at"), "{stage} {act}: {output:?}");
        }
        // Running out of memory ends so.
        assert_eq!(probe(stage, "abort", "").status.signal(), Some(libc::SIGABRT), "{stage}");
    }
}

#[test]
fn a_panic_still_names_its_functions() {
    for stage in ["none", "serving"] {
        let output = Command::new(env!("CARGO_BIN_EXE_sandbox_probe"))
            .args([stage, "work"])
            .env("RUST_BACKTRACE", "1")
            .output()
            .unwrap();
        let log = text(&output.stderr);
        assert!(log.contains("sandbox_probe::work"), "{stage}: {log}");
    }
}
