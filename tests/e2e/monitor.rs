//! What runs where: cores, threads, jobs and memory in `status` and metrics, and the whole screen of `top`.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread::JoinHandle;

use bitnetd_config::cpu_list;
use bitnetd_proto::status::{SlotReport, StatusReport};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;
use nix::sys::termios::tcgetattr;
use nix::unistd::{Gid, Uid, chown};

use crate::support::{DEADLINE, Daemon, Folder, generate, random_request, send, wait_for};

/// Generates until it is told to stop.
struct Busy {
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    fn start(daemon: &Daemon, seed: u64) -> Self {
        let mut client = daemon.connect().unwrap();
        let (stop, is_stopped) = mpsc::channel();
        let work = move || {
            while let Err(mpsc::TryRecvError::Empty) = is_stopped.try_recv() {
                generate(&mut client, &random_request("Once", seed, 200)).unwrap();
            }
        };
        Self { stop, thread: Some(std::thread::spawn(work)) }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ended = self.stop.send(());
        let _failed = self.thread.take().map(JoinHandle::join);
    }
}

/// A report in which every worker works, and everything is known of it.
#[track_caller]
fn report_of_work(daemon: &Daemon) -> StatusReport {
    let knows_all = |slot: &SlotReport| {
        slot.load.memory.is_some()
            && slot.resident_bytes.is_some()
            && slot.decode_per_s.is_some_and(|rate| rate > 0.0)
            && slot.prefill_per_s.is_some()
            && slot.running_share().is_some_and(|share| share > 0.0)
            && slot.waiting_share().is_some()
    };
    wait_for("everything is known of every worker", || {
        let report = daemon.status()?;
        (report.slots.iter().all(knows_all) && report.jobs.len() == 2).then_some(report)
    })
}

#[track_caller]
fn assert_all_is_there(report: &StatusReport) {
    assert!(report.usage_window_s.is_some_and(|window_s| window_s > 0.0), "{report:?}");
    for slot in &report.slots {
        let cpus = cpu_list::parse(&slot.cpus).unwrap();
        let compute: Vec<_> = slot.threads.iter().filter(|thread| thread.thread.is_some()).collect();
        assert_eq!(compute.len(), cpus.len(), "one compute thread for each CPU: {slot:?}");
        for (number, thread) in compute.iter().enumerate() {
            assert_eq!(thread.name, format!("bnd-w{}-t{number}", slot.slot));
            assert_eq!((thread.cpu, thread.cpu_s > 0.0), (Some(cpus[number]), true), "{thread:?}");
        }
        assert!(slot.threads.iter().any(|thread| thread.name == "bnd-link"), "{slot:?}");
        for cpu in cpus {
            let of = report.cpus.iter().find(|of| of.cpu == cpu).unwrap();
            assert_eq!(of.slot, Some(slot.slot));
            assert!(of.busy.is_some_and(|busy| (0.0..=1.0).contains(&busy)), "{of:?}");
        }
        let memory = slot.load.memory.unwrap();
        assert!(0 < memory.pss_bytes && memory.pss_bytes <= memory.rss_bytes, "{memory:?}");
    }
    for job in &report.jobs {
        assert!(job.tokens <= job.tokens_max && job.tokens_max == 200, "{job:?}");
        assert!(["waiting", "prefill", "decode"].contains(&job.phase.as_str()), "{job:?}");
    }
}

#[test]
fn status_and_metrics_know_every_core_thread_and_job() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let _work = [Busy::start(&daemon, 1), Busy::start(&daemon, 2)];
    assert_all_is_there(&report_of_work(&daemon));
    let text = folder.run("status --socket %/bitnetd.sock").ok();
    let rows: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("CPU ")).skip(1).collect();
    for slot in 0..2 {
        let thread = format!("bnd-w{slot}-t0");
        assert!(rows.iter().any(|row| row.contains(&thread) && row.contains('%')), "{thread}:\n{text}");
    }
    let metrics = folder.run("metrics --socket %/bitnetd.sock").ok();
    for (slot, name) in [(0, "thread=\"0\""), (1, "thread=\"0\""), (1, "thread=\"other\"")] {
        let sample = format!("bitnetd_thread_cpu_seconds_total{{slot=\"{slot}\",{name}}} ");
        assert!(metrics.contains(&sample), "no `{sample}` in\n{metrics}");
    }
    let n_samples = metrics.lines().filter(|line| line.starts_with("bitnetd_cpu_busy_ratio{")).count();
    assert_eq!(n_samples, 2, "{metrics}");
}

/// A user without rights sees as much of its workers, although they are not dumpable.
#[test]
fn an_ordinary_user_sees_as_much() {
    if !nix::unistd::geteuid().is_root() {
        return; // Then the other test is this one.
    }
    let (uid, gid) = (4100, 4200);
    let folder = Folder::new();
    let home = folder.path("home");
    fs::create_dir(&home).unwrap();
    for path in [&folder.path(""), &home] {
        chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).unwrap();
    }
    // The program may be where only root may look: the descriptor that it is started from is open already.
    let mut command = folder.command("serve --socket %/bitnetd.sock --workers 2 --threads 1");
    command.env("STATE_DIRECTORY", &home).uid(uid).gid(gid);
    let daemon = Daemon::adopt(&folder, command);
    let _work = [Busy::start(&daemon, 1), Busy::start(&daemon, 2)];
    assert_all_is_there(&report_of_work(&daemon));
}

#[test]
fn stats_say_what_each_core_did() {
    let folder = Folder::new();
    let answer = folder.run_prompt("run --stats --json -n 100 -t 1 -s 1 --temp 1 -q", "Once").json();
    assert_eq!(answer["index"], 0);
    let stats = &answer["stats"];
    assert_eq!(stats["cpus"].as_array().unwrap().len(), 1, "{stats}");
    let worker = &stats["workers"][0];
    assert_eq!(worker["threads"][0]["name"], "bnd-w0-t0", "{stats}");
    for figure in ["cpu_seconds", "decode_tokens", "decode_per_s", "prefill_tokens"] {
        assert!(worker[figure].as_f64().unwrap() > 0.0, "{figure}: {stats}");
    }
    assert!(worker["memory"]["pss_bytes"].as_u64().unwrap() > 0, "{stats}");

    let shown = folder.run_prompt("run --stats -n 10 -t 1 -q", "Once");
    assert!(
        shown.stderr.starts_with("cores and threads in ") && shown.stderr.contains("bnd-w0-t0"),
        "{shown:?}"
    );
    folder.write("prompts.txt", "Once\nOne day\n");
    let batch = folder.run("batch prompts.txt --stats --json -n 10 --workers 2 --threads 1 -q");
    let stats: serde_json::Value = serde_json::from_str(&batch.stderr).unwrap();
    assert_eq!(stats["workers"].as_array().unwrap().len(), 2, "{stats}");
    assert_eq!(batch.stdout.lines().count(), 2, "{batch:?}");
}

/// `top` on a terminal of its own.
struct Top {
    child: std::process::Child,
    ours: fs::File,
    /// Its side of the terminal; stays open so that what it left can be looked at.
    theirs: OwnedFd,
    shown: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Top {
    fn start(folder: &Folder, line: &str) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).unwrap();
        let mut command = folder.command(line);
        command.stdin(pty.slave.try_clone().unwrap()).stdout(pty.slave.try_clone().unwrap());
        let child = command.stderr(Stdio::piped()).env("TERM", "xterm").spawn().unwrap();
        let ours = fs::File::from(pty.master);
        let (send, shown) = mpsc::channel();
        let mut from = ours.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                if send.send(bytes[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, ours, theirs: pty.slave, shown, seen: String::new() }
    }

    /// Waits until all of these were written to the terminal since the last call.
    #[track_caller]
    fn wait_for(&mut self, words: &[&str]) {
        while !words.iter().all(|word| self.seen.contains(word)) {
            let bytes = self.shown.recv_timeout(DEADLINE);
            let bytes = bytes.unwrap_or_else(|error| panic!("{error}: {words:?} not in {}", self.seen));
            self.seen += &String::from_utf8_lossy(&bytes);
        }
        self.seen.clear();
    }

    #[track_caller]
    fn end(mut self, how: impl FnOnce(&mut Self)) {
        how(&mut self);
        let code = wait_for("top ends", || self.child.try_wait().unwrap()).code();
        assert_eq!(code, Some(0), "{}", self.seen);
        self.wait_for(&["\u{1b}[?1049l", "\u{1b}[?25h"]); // The usual screen, and a cursor.
        let modes = tcgetattr(&self.theirs).unwrap().local_flags;
        assert!(modes.contains(nix::sys::termios::LocalFlags::ICANON), "the terminal is still raw");
    }
}

#[test]
fn top_shows_the_daemon_lives_through_its_restart_and_leaves_the_terminal_as_it_was() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let line = "top --interval 0.1 --socket %/bitnetd.sock";
    let type_key = |key: &'static [u8]| move |top: &mut Top| top.ours.write_all(key).unwrap();
    let mut top = Top::start(&folder, line);
    top.wait_for(&["Cores", "Workers", "Jobs", "ready", "q quit"]);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    top.wait_for(&["NO ANSWER"]);
    daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    top.wait_for(&["ready"]);
    top.end(type_key(b"q"));
    for key in [b"\x1b", b"\x03"] {
        let mut top = Top::start(&folder, line);
        top.wait_for(&["Workers"]);
        top.end(type_key(key));
    }
    let mut top = Top::start(&folder, line);
    top.wait_for(&["Workers"]);
    top.end(|top| send(top.child.id(), Signal::SIGTERM));
    drop(daemon);
}

#[test]
fn top_without_a_terminal_says_what_to_do_and_prints_a_frame_if_told() {
    let folder = Folder::new();
    let gone = folder.run("top --once --socket %/bitnetd.sock");
    assert_eq!(gone.code, Some(69), "{gone:?}");
    let _daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    let refused = folder.run("top --socket %/bitnetd.sock");
    assert_eq!(refused.code, Some(64), "{refused:?}");
    assert!(refused.stderr.starts_with("error: `top` needs a terminal\nhint: --once "), "{refused:?}");
    let text = folder.run("top --once --socket %/bitnetd.sock").ok();
    assert!(text.starts_with("bitnetd ready, up ") && text.contains("─ Workers ─"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn top_ends_when_its_terminal_is_gone() {
    let folder = Folder::new();
    let _daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).unwrap();
    // Its end is only ours, or it would not be gone.
    fcntl(&pty.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    let mut command = folder.command("top --socket %/bitnetd.sock");
    command
        .stdin(pty.slave.try_clone().unwrap())
        .stdout(pty.slave)
        .stderr(Stdio::null())
        .env("TERM", "xterm");
    let mut child = command.spawn().unwrap();
    drop(command); // It has our copies of that end.
    fcntl(&pty.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let mut ours = fs::File::from(pty.master);
    let (mut seen, mut bytes) = (String::new(), [0; 4096]);
    wait_for("the first frame", || {
        let n_bytes = ours.read(&mut bytes).ok()?;
        seen += &String::from_utf8_lossy(&bytes[..n_bytes]);
        seen.contains("Workers").then_some(())
    });
    drop(ours);
    // No SIGHUP comes: it is not the controlling terminal.
    wait_for("top ends", || child.try_wait().unwrap());
}
