//! What systemd sees of the daemon: notifications, its watchdog's food, its sockets. A small stand-in plays systemd; the
//! real one is in `tests/guest/systemd.sh`.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bitnetd_proto::client::Client;
use command_fds::{CommandFdExt as _, FdMapping};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

use crate::support::{
    DEADLINE, Folder, PROMPTS, children, generate, is_alive, random_request, send, wait_for,
};

/// Listens where the daemon reports to.
pub(crate) struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    pub(crate) fn new(folder: &Folder) -> Self {
        let socket = UnixDatagram::bind(folder.path("notify")).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { socket }
    }

    /// The next message.
    #[track_caller]
    fn hear(&self) -> String {
        let mut bytes = [0; 4096];
        let n = self.socket.recv(&mut bytes).expect("the daemon says something in time");
        String::from_utf8(bytes[..n].to_vec()).unwrap()
    }

    /// The next file that is to be kept, with its name.
    #[track_caller]
    pub(crate) fn receive_file(&self) -> (String, fs::File) {
        loop {
            let mut bytes = [0; 4096];
            let mut control = nix::cmsg_space!([i32; 4]);
            let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message =
                recvmsg::<UnixAddr>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), flags).unwrap();
            let numbers: Vec<i32> = message
                .cmsgs()
                .unwrap()
                .flat_map(|part| match part {
                    ControlMessageOwned::ScmRights(numbers) => numbers,
                    _ => Vec::new(),
                })
                .collect();
            let n = message.bytes;
            let text = String::from_utf8(bytes[..n].to_vec()).unwrap();
            if let [number] = numbers[..] {
                assert_eq!(field(&text, "FDSTORE"), Some("1"), "{text}");
                // Opened by its name, because a number alone belongs to nobody.
                let path = format!("/proc/self/fd/{number}");
                let file = fs::File::options().read(true).write(true).open(path).unwrap();
                nix::unistd::close(number).unwrap();
                return (field(&text, "FDNAME").unwrap().to_owned(), file);
            }
            assert!(numbers.is_empty(), "{text}");
        }
    }

    /// Everything up to the first message with such a line, which is the last.
    #[track_caller]
    pub(crate) fn hear_until(&self, line: &str) -> Vec<String> {
        let mut messages = Vec::new();
        loop {
            messages.push(self.hear());
            if messages.last().is_some_and(|message| message.lines().any(|said| said.starts_with(line))) {
                return messages;
            }
        }
    }
}

pub(crate) fn field<'a>(message: &'a str, name: &str) -> Option<&'a str> {
    message.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

/// A daemon on sockets that it was given, as systemd starts it. Killed when dropped.
struct Activated {
    child: Child,
}

impl Activated {
    /// Passes `files` on as descriptors 3, 4, … with their names.
    fn start(folder: &Folder, files: Vec<(&str, OwnedFd)>, line: &str) -> Self {
        let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
        // The number of a process is known only in it: the shell becomes the daemon.
        let mut command = Command::new("sh");
        command.arg("-c").arg("LISTEN_PID=$$ exec \"$@\"").arg("sh").arg(env!("CARGO_BIN_EXE_bitnetd"));
        command.args(line.split_whitespace());
        command.current_dir(folder.path("")).env("HOME", folder.path("")).env_remove("XDG_RUNTIME_DIR");
        command.env("LISTEN_FDS", files.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        command.env("NOTIFY_SOCKET", folder.path("notify"));
        let log = fs::File::options().append(true).create(true).open(folder.path("log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mappings = (3..).zip(files).map(|(child_fd, (_, parent_fd))| FdMapping { parent_fd, child_fd });
        command.fd_mappings(mappings.collect()).unwrap();
        Self { child: command.spawn().unwrap() }
    }

    #[track_caller]
    fn wait(&mut self) -> Option<i32> {
        wait_for("the daemon ends", || self.child.try_wait().unwrap()).code()
    }
}

impl Drop for Activated {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn connect(socket: &Path) -> Client {
    Client::connect(socket, "e2e", DEADLINE).unwrap()
}

#[test]
fn ready_is_said_when_every_worker_is_and_life_signs_follow() {
    let folder = Folder::new();
    let manager = Manager::new(&folder);
    let mut command = folder.command("serve --socket %/b.sock --workers 2 --threads 1");
    command.env("NOTIFY_SOCKET", folder.path("notify")).env("WATCHDOG_USEC", "300000");
    let mut daemon = Activated { child: command.stderr(Stdio::null()).spawn().unwrap() };
    let before = manager.hear_until("READY=1");
    let ready = before.last().unwrap();
    assert!(
        before.iter().any(|message| field(message, "EXTEND_TIMEOUT_USEC") == Some("30000000")),
        "time to load: {before:?}"
    );
    assert_eq!(field(ready, "MAINPID"), Some(daemon.child.id().to_string().as_str()));
    let status = field(ready, "STATUS").unwrap();
    assert_eq!(status, "ready: 2 of 2 workers ready, 0 jobs running, 0 of 512 waiting");
    let report = connect(&folder.path("b.sock")).status().unwrap();
    assert!(report.slots.iter().all(|slot| slot.state == "ready"), "{report:?}");
    for pid in report.slots.iter().filter_map(|slot| slot.pid) {
        let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
        assert!(!environment.contains("NOTIFY_SOCKET"), "a worker could speak for the service");
    }
    for _ in 0..3 {
        manager.hear_until("WATCHDOG=1");
    }
    // A job is seen in the line, and a lost worker at once.
    send(report.slots[0].pid.unwrap(), Signal::SIGKILL);
    let lost = manager.hear_until("STATUS=ready: 1 of 2 workers ready");
    assert!(lost.iter().all(|message| field(message, "READY").is_none()), "ready is said once: {lost:?}");
    manager.hear_until("STATUS=ready: 2 of 2 workers ready");
    send(daemon.child.id(), Signal::SIGTERM);
    let stopping = manager.hear_until("STOPPING=1");
    let time = field(stopping.last().unwrap(), "EXTEND_TIMEOUT_USEC").unwrap();
    assert_eq!(time, "45000000", "the drain of 30 s, and the way out");
    assert_eq!(daemon.wait(), Some(0));
}

#[test]
fn ready_is_said_when_enough_workers_are() {
    let folder = Folder::new();
    let manager = Manager::new(&folder);
    folder.write("one.toml", "[split]\nworkers = 2\nthreads = 1\n[service]\nready_workers = 1\n");
    let mut command = folder.command("serve --socket %/b.sock -c one.toml");
    let child = command.env("NOTIFY_SOCKET", folder.path("notify")).stderr(Stdio::null()).spawn().unwrap();
    let _daemon = Activated { child };
    let said = manager.hear_until("READY=1");
    let status = field(said.last().unwrap(), "STATUS").unwrap();
    let both = "ready: 2 of 2 workers ready";
    assert!(status.starts_with("ready: 1 of 2 workers ready") || status.starts_with(both), "{said:?}");
    if !status.starts_with(both) {
        manager.hear_until(&format!("STATUS={both}"));
    }
}

#[test]
fn a_reload_is_announced_with_its_time_and_ends_whatever_comes_of_it() {
    let folder = Folder::new();
    let manager = Manager::new(&folder);
    folder.write("b.toml", "[split]\nworkers = 1\nthreads = 1\n");
    let mut command = folder.command("serve --socket %/b.sock -c b.toml");
    let child = command.env("NOTIFY_SOCKET", folder.path("notify")).stderr(Stdio::null()).spawn().unwrap();
    let daemon = Activated { child };
    manager.hear_until("READY=1");
    for (text, is_loaded) in [("[split]\nworkers = 2\nthreads = 1\n", true), ("nonsense = 1\n", false)] {
        folder.write("b.toml", text);
        send(daemon.child.id(), Signal::SIGHUP);
        let announced = manager.hear_until("RELOADING=1");
        let time: u64 = field(announced.last().unwrap(), "MONOTONIC_USEC").unwrap().parse().unwrap();
        assert!(time > 0);
        let until = manager.hear_until("READY=1");
        // A worker of the new configuration has to load, which may take longer than systemd waits for a reload.
        let n_asked =
            until.iter().filter(|message| field(message, "EXTEND_TIMEOUT_USEC") == Some("30000000")).count();
        assert_eq!(n_asked > 0, is_loaded, "{until:?}");
        wait_for("so many workers", || {
            let slots = connect(&folder.path("b.sock")).status().unwrap().slots;
            (slots.len() == 2 && slots.iter().all(|slot| slot.state == "ready")).then_some(())
        });
    }
}

#[test]
fn a_notification_socket_that_is_gone_stops_nobody() {
    let folder = Folder::new();
    let mut command = folder.command("serve --socket %/b.sock --workers 1 --threads 1");
    let log = fs::File::create(folder.path("log")).unwrap();
    command.env("NOTIFY_SOCKET", folder.path("nobody")).env("WATCHDOG_USEC", "1000000").stderr(log);
    let mut daemon = Activated { child: command.spawn().unwrap() };
    wait_for("it serves", || Client::connect(&folder.path("b.sock"), "e2e", DEADLINE).ok()?.status().ok());
    let log = fs::read_to_string(folder.path("log")).unwrap();
    assert!(log.contains("the service manager cannot be told anything"), "{log}");
    send(daemon.child.id(), Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
}

#[test]
fn a_socket_of_systemd_outlives_the_daemon_and_refuses_nobody() {
    let folder = Folder::new();
    let _manager = Manager::new(&folder);
    let path = folder.path("b.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let start = || {
        let socket = OwnedFd::from(listener.try_clone().unwrap());
        Activated::start(&folder, vec![("bitnetd", socket)], "serve --workers 2 --threads 1")
    };
    let calm: Vec<String> = {
        let mut daemon = start(); // Clients come before it runs: they wait.
        let calm = PROMPTS[..4]
            .iter()
            .map(|prompt| generate(&mut connect(&path), &random_request(prompt, 5, 40)).unwrap())
            .collect();
        send(daemon.child.id(), Signal::SIGTERM);
        assert_eq!(daemon.wait(), Some(0));
        calm
    };
    assert!(path.exists(), "the socket belongs to systemd");
    let (is_enough, n_answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let clients: Vec<_> = PROMPTS
            .iter()
            .zip(&calm)
            .map(|(prompt, calm)| {
                let (folder, is_enough, n_answers) = (&folder, &is_enough, &n_answers);
                scope.spawn(move || {
                    while !is_enough.load(Ordering::Relaxed) {
                        let line = "generate --socket %/b.sock -n 40 --temp 0.8 -s 5 --ignore-eos -q";
                        let finished = folder.run_prompt(line, prompt);
                        assert_eq!(finished.code, Some(0), "{finished:?}");
                        assert_eq!(finished.stdout.trim_end(), calm.trim_end());
                        n_answers.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        // Restarted in the middle of it, again and again; each life serves some.
        let outcome = std::panic::catch_unwind(|| {
            for _ in 0..3 {
                let mut daemon = start();
                let n_before = n_answers.load(Ordering::Relaxed);
                wait_for("it serves", || (n_answers.load(Ordering::Relaxed) > n_before + 4).then_some(()));
                send(daemon.child.id(), Signal::SIGTERM);
                assert_eq!(daemon.wait(), Some(0));
            }
        });
        is_enough.store(true, Ordering::Relaxed);
        let _last = start(); // For those who wait.
        wait_for("the clients end", || clients.iter().all(|client| client.is_finished()).then_some(()));
        for client in clients {
            client.join().unwrap();
        }
        outcome.unwrap();
    });
}

#[test]
fn what_systemd_passes_on_is_looked_at() {
    let folder = Folder::new();
    let _manager = Manager::new(&folder);
    let datagrams = UnixDatagram::bind(folder.path("d.sock")).unwrap();
    let mut daemon = Activated::start(&folder, vec![("http", OwnedFd::from(datagrams))], "serve");
    assert_eq!(daemon.wait(), Some(78));
    let log = fs::read_to_string(folder.path("log")).unwrap();
    let words = "socket `http` of the service manager is not a listening Unix stream socket\nhint: ";
    assert!(log.contains(words), "{log}");
}

#[test]
fn the_lists_of_users_hold_on_a_socket_of_systemd() {
    let folder = Folder::new();
    let manager = Manager::new(&folder);
    folder.write("a.toml", "[split]\nworkers = 1\nthreads = 1\n[listen]\nallow_uids = [4100]\n");
    let socket = OwnedFd::from(UnixListener::bind(folder.path("b.sock")).unwrap());
    let _daemon = Activated::start(&folder, vec![("bitnetd", socket)], "serve -c a.toml");
    manager.hear_until("READY=1");
    let refused = folder.run("status --socket %/b.sock");
    assert_eq!(refused.code, Some(77), "{refused:?}");
    assert!(refused.stderr.contains("may not use this socket"), "{refused:?}");
}

#[test]
fn a_killed_activated_daemon_leaves_no_worker_and_a_socket_that_works() {
    let folder = Folder::new();
    let manager = Manager::new(&folder);
    let path = folder.path("b.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let start = || {
        let socket = OwnedFd::from(listener.try_clone().unwrap());
        Activated::start(&folder, vec![("bitnetd", socket)], "serve --workers 1 --threads 1")
    };
    let mut daemon = start();
    manager.hear_until("READY=1");
    let workers = children(daemon.child.id());
    assert_eq!(workers.len(), 1);
    send(daemon.child.id(), Signal::SIGKILL);
    assert_eq!(daemon.wait(), None);
    wait_for("its workers are gone", || (!workers.iter().any(|pid| is_alive(*pid))).then_some(()));
    let waiting = std::thread::scope(|scope| {
        let client = scope.spawn(|| generate(&mut connect(&path), &random_request("Once", 1, 8)));
        let _next = start();
        client.join().unwrap()
    });
    assert!(waiting.is_ok(), "{waiting:?}");
}

#[test]
fn socket_activation_by_systemds_own_tool() {
    let tool = Path::new("/usr/bin/systemd-socket-activate");
    if !tool.exists() {
        // Not everybody has it; `a_socket_of_systemd_outlives_the_daemon_and_refuses_nobody` holds without.
        return;
    }
    let folder = Folder::new();
    let path = folder.path("b.sock");
    let mut command = Command::new(tool);
    command
        .arg("-l")
        .arg(&path)
        .arg("--fdname=bitnetd")
        .arg("-E")
        .arg(format!("HOME={}", folder.path("").display()));
    command.arg(env!("CARGO_BIN_EXE_bitnetd")).args(["serve", "--workers", "1", "--threads", "1"]);
    let log = fs::File::create(folder.path("log")).unwrap();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let mut daemon = Activated { child };
    let mut client = wait_for("it listens", || match Client::connect(&path, "e2e", DEADLINE) {
        Ok(client) => Some(client),
        Err(error) => {
            assert!(is_not_there_yet(&error), "{error}");
            None
        }
    });
    assert!(!generate(&mut client, &random_request("Once", 1, 8)).unwrap().is_empty());
    let log = fs::read_to_string(folder.path("log")).unwrap();
    assert!(log.contains("listening on a socket of the service manager"), "{log}");
    send(daemon.child.id(), Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
}

fn is_not_there_yet(error: &bitnetd_proto::client::ClientError) -> bool {
    use bitnetd_proto::client::ClientError::Connect;
    let kinds = [ErrorKind::NotFound, ErrorKind::ConnectionRefused];
    matches!(error, Connect { source, .. } if kinds.contains(&source.kind()))
}

/// Whether a process has mapped the file or memory with this inode.
fn has_mapped(pid: u32, inode: u64) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines().any(|line| line.split_whitespace().nth(4) == Some(inode.to_string().as_str()))
}

#[test]
fn the_prepared_model_is_kept_over_a_restart_and_nothing_else_is() {
    let folder = Folder::new();
    let manager = Manager::new(&folder);
    let path = folder.path("b.sock");
    let listener = UnixListener::bind(&path).unwrap();
    folder.write("fast.toml", "[model]\nhead = \"fast\"\n[split]\nworkers = 1\nthreads = 1\n");
    let start = |stored: Vec<(&str, OwnedFd)>| {
        let socket = OwnedFd::from(listener.try_clone().unwrap());
        let files = std::iter::once(("bitnetd", socket)).chain(stored).collect();
        Activated::start(&folder, files, "serve -c fast.toml")
    };
    let stop = |mut daemon: Activated| {
        send(daemon.child.id(), Signal::SIGTERM);
        assert_eq!(daemon.wait(), Some(0));
    };
    let first = start(vec![]);
    let (name, kept) = manager.receive_file();
    let inode = kept.metadata().unwrap().ino();
    let calm = generate(&mut connect(&path), &random_request("Once", 3, 40)).unwrap();
    stop(first);

    // Beside it: memory under the right name that anybody could still change, and something unknown.
    let open = memfd_create(c"open", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    fs::File::from(open.try_clone().unwrap()).set_len(4096).unwrap();
    let unknown = OwnedFd::from(fs::File::open(folder.path("fast.toml")).unwrap());
    let stored = vec![(name.as_str(), open), (name.as_str(), kept.into()), ("unknown", unknown)];
    let second = start(stored);
    wait_for("its worker maps what was kept", || {
        let pid = connect(&path).status().unwrap().slots[0].pid?;
        has_mapped(pid, inode).then_some(())
    });
    assert_eq!(generate(&mut connect(&path), &random_request("Once", 3, 40)).unwrap(), calm);
    let removed = manager.hear_until("FDSTOREREMOVE=1");
    assert_eq!(field(removed.last().unwrap(), "FDNAME"), Some("unknown"));
    stop(second);
    let log = fs::read_to_string(folder.path("log")).unwrap();
    assert_eq!(log.matches("the prepared model was kept by the service manager").count(), 1, "{log}");
}
