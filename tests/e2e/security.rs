//! What holds real workers in, and who may connect: by /proc, on a kernel without Landlock, and with other users.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bitnetd_proto::client::Client;
use bitnetd_proto::status::SlotReport;
use bitnetd_proto::worker_link::Confinement;
use nix::libc;
use nix::sys::signal::Signal;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

use crate::support::{DEADLINE, Daemon, Finished, Folder, field, generate, random_request, send, wait_for};

/// A field of `/proc/PID/status` for each thread.
fn of_threads(pid: u32, name: &str) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.map(|thread| field(thread.unwrap().path().join("status"), name)).collect()
}

fn with_confinement(folder: &Folder, mode: &str) -> String {
    folder.write("c.toml", format!("[security]\nconfinement = \"{mode}\"\n[restart]\nmax = 1\n"));
    "-c %/c.toml --workers 1 --threads 2".into()
}

/// Runs something as on a kernel without Landlock: its system calls do not exist.
fn without_landlock<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    without(libc::SYS_landlock_create_ruleset, libc::ENOSYS, work)
}

/// Runs something that gets an error from a system call, and so does everything that it starts.
fn without<T: Send + 'static>(call: i64, errno: i32, work: impl FnOnce() -> T + Send + 'static) -> T {
    let in_thread = move || {
        let rules = [(call, Vec::new())].into();
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let missing = SeccompAction::Errno(errno.unsigned_abs());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, missing, arch).unwrap();
        let program: BpfProgram = filter.try_into().unwrap();
        apply_filter(&program).unwrap();
        work()
    };
    std::thread::spawn(in_thread).join().unwrap()
}

#[test]
fn every_thread_of_every_worker_is_confined() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let report = daemon.status().unwrap();
    for slot in &report.slots {
        let held = slot.confinement.expect("a ready worker says what holds it in");
        assert!(held.seccomp && held.landlock > 0, "{held:?}: this kernel is expected to have both");
        let pid = slot.pid.unwrap();
        let everywhere = [
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            ("Seccomp_filters", "3"),
            ("CapInh", "0000000000000000"),
            ("CapPrm", "0000000000000000"),
            ("CapEff", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
        ];
        for (name, expected) in everywhere {
            let found = of_threads(pid, name);
            assert!(found.len() > 1 && found.iter().all(|found| found == expected), "{name}: {found:?}");
        }
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        for name in ["Max core file size", "Max file size", "Max open files", "Max processes"] {
            let limit = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            assert_eq!(limit.split_whitespace().take(2).collect::<Vec<_>>(), ["0", "0"], "{name}");
        }
        if nix::unistd::geteuid().is_root() {
            let log = fs::read_link(format!("/proc/{pid}/fd/2")).unwrap();
            assert!(log.to_str().unwrap().starts_with("pipe:"), "{log:?}");
            // stdin, stdout, stderr, the link twice, the pipe of last words, the kernel's account of its own memory: no
            // model, no head, nothing else.
            let n_open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
            assert_eq!(n_open, 7, "descriptors of worker {pid}");
            // What is not dumpable belongs to root in /proc.
            assert_eq!(fs::metadata(format!("/proc/{pid}/mem")).unwrap().uid(), 0);
        }
    }
    let status = folder.run("status --socket %/bitnetd.sock").ok();
    assert!(status.contains("confined landlock ") && status.contains(" and seccomp\n"), "{status}");
}

#[test]
fn stray_files_of_whoever_starts_the_daemon_do_not_reach_a_worker() {
    let folder = Folder::new();
    folder.write("stray", "x");
    let program = env!("CARGO_BIN_EXE_bitnetd");
    let script =
        format!("exec 5<stray 7<stray 8<stray 9<stray {program} serve --socket ./bitnetd.sock 2>>log");
    let daemon = Daemon::adopt(&folder, folder.shell(&script));
    let files = |pid: u32| -> Vec<String> {
        let links =
            fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|fd| fs::read_link(fd.unwrap().path()));
        links.filter_map(|link| Some(link.ok()?.display().to_string())).collect()
    };
    let is_stray = |file: &String| file.ends_with("/stray");
    assert_eq!(
        files(daemon.status().unwrap().pid).iter().filter(|file| is_stray(file)).count(),
        4,
        "the daemon has them"
    );
    for pid in daemon.workers() {
        let files = files(pid);
        assert!(!files.is_empty() && !files.iter().any(is_stray), "{files:?}");
    }
}

#[test]
fn a_worker_may_write_the_fast_image_and_no_byte_more() {
    let folder = Folder::new();
    folder.write("c.toml", "[model]\nhead = \"fast\"\n[split]\nworkers = 2\nthreads = 1\n");
    let daemon = Daemon::start(&folder, "-c %/c.toml");
    let size = wait_for("the image is made", || {
        let slots = daemon.status()?.slots;
        let is_used = |slot: &SlotReport| slot.load.image.is_used();
        slots.iter().all(is_used).then(|| slots[0].load.image_bytes.to_string())
    });
    for pid in daemon.workers() {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max file size")).unwrap();
        assert_eq!(limit.split_whitespace().take(2).collect::<Vec<_>>(), [size.as_str(), size.as_str()]);
    }
}

#[test]
fn the_supervisor_keeps_no_right_that_it_does_not_need() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    let pid = daemon.status().unwrap().pid;
    assert!(of_threads(pid, "NoNewPrivs").iter().all(|found| found == "1"));
    for name in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        for found in of_threads(pid, name) {
            let left = u64::from_str_radix(&found, 16).unwrap();
            let kept = (1 << 2) | (1 << 23);
            assert_eq!(left & !kept, 0, "{name} {found}: more than CAP_DAC_READ_SEARCH and CAP_SYS_NICE");
        }
    }
}

#[test]
fn a_confined_worker_that_dies_is_reported_as_ever() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    for (signal, name) in [
        (Signal::SIGSEGV, "SIGSEGV"),
        (Signal::SIGBUS, "SIGBUS"),
        (Signal::SIGABRT, "SIGABRT"),
        (Signal::SIGSYS, "SIGSYS"),
    ] {
        let pid = daemon.workers()[0];
        wait_for("the death is reported", || {
            // Rust's handler of bad accesses puts the default back and returns: the second such signal kills.
            send(pid, signal);
            let slot = daemon.status()?.slots.remove(0);
            let said = slot.last_exit.filter(|said| said.contains(name))?;
            assert!(!said.contains("denied"), "{said}");
            (slot.state == "ready" && slot.pid != Some(pid)).then_some(())
        });
    }
}

#[test]
fn a_kernel_without_landlock_still_serves_and_says_so() {
    let folder = Folder::new();
    let line = with_confinement(&folder, "auto");
    let (folder, daemon) = without_landlock(move || {
        let daemon = Daemon::start(&folder, &line);
        (folder, daemon)
    });
    let held = daemon.status().unwrap().slots[0].confinement;
    assert_eq!(held, Some(Confinement { landlock: 0, seccomp: true }));
    let answer = generate(&mut daemon.connect().unwrap(), &random_request("Once", 1, 5)).unwrap();
    assert!(!answer.is_empty());
    let log = daemon.log(&folder);
    assert!(log.contains("this kernel has no Landlock"), "{log}");
    let status = folder.run("status --socket %/bitnetd.sock").ok();
    assert!(status.contains("confined seccomp only\n"), "{status}");
}

#[test]
fn confinement_that_is_required_and_not_there_is_a_reason_not_to_start() {
    let folder = Folder::new();
    let line = with_confinement(&folder, "require");
    let finished: Finished = without_landlock(move || folder.run(&format!("serve --socket %/s {line}")));
    assert_eq!(finished.code, Some(78), "{finished:?}");
    for words in
        ["this kernel has no Landlock, and `security.confinement` requires it", "hint: `security.confinement"]
    {
        assert!(finished.stderr.contains(words), "{finished:?}");
    }
    // With it, all is well.
    let folder = Folder::new();
    let line = with_confinement(&folder, "require");
    let daemon = Daemon::start(&folder, &line);
    assert!(daemon.status().unwrap().slots[0].confinement.unwrap().seccomp);
}

#[test]
fn a_kernel_without_seccomp_is_told_of_or_refused() {
    let (call, errno) = (libc::SYS_seccomp, libc::ENOSYS);
    let folder = Folder::new();
    let line = with_confinement(&folder, "require");
    let finished: Finished = without(call, errno, move || folder.run(&format!("serve --socket %/s {line}")));
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert!(finished.stderr.contains("cannot filter system calls"), "{finished:?}");
    let folder = Folder::new();
    let line = with_confinement(&folder, "auto");
    let (folder, daemon) = without(call, errno, move || {
        let daemon = Daemon::start(&folder, &line);
        (folder, daemon)
    });
    let held = daemon.status().unwrap().slots[0].confinement.unwrap();
    assert!(!held.seccomp && held.landlock > 0, "{held:?}");
    assert!(daemon.log(&folder).contains("system calls are not filtered"), "{}", daemon.log(&folder));
    assert!(!generate(&mut daemon.connect().unwrap(), &random_request("Once", 1, 5)).unwrap().is_empty());
}

#[test]
fn confinement_can_be_switched_off() {
    let folder = Folder::new();
    let line = with_confinement(&folder, "off");
    let daemon = Daemon::start(&folder, &line);
    let slot = daemon.status().unwrap().slots.remove(0);
    assert_eq!(slot.confinement, Some(Confinement::default()));
    assert_eq!(field(format!("/proc/{}/status", slot.pid.unwrap()), "NoNewPrivs"), "0");
    assert!(daemon.log(&folder).contains("not confined"), "{}", daemon.log(&folder));
    assert!(folder.run("status --socket %/bitnetd.sock").ok().contains("confined none\n"));
}

/// A folder that other users may enter, with a copy of the binary that they may run.
pub(crate) struct OpenFolder {
    pub(crate) folder: Folder,
    pub(crate) program: PathBuf,
}

impl OpenFolder {
    /// `None`, and said aloud, where this process may not become somebody else.
    pub(crate) fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            #[expect(clippy::print_stderr, reason = "a test that proves nothing says so")]
            {
                eprintln!("SKIPPED: only root can try the socket as other users");
            }
            return None;
        }
        let folder = Folder::new();
        fs::set_permissions(folder.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        let program = folder.path("bitnetd");
        fs::copy(env!("CARGO_BIN_EXE_bitnetd"), &program).unwrap();
        Some(Self { folder, program })
    }

    /// What `status` ends with for a user with this uid, gid and one further group.
    fn status_as(&self, uid: u32, gid: u32, further: Option<u32>) -> Finished {
        let mut command = match further {
            None => {
                let mut command = Command::new(&self.program);
                command.uid(uid).gid(gid);
                command
            }
            Some(further) => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid", &uid.to_string(), "--regid", &gid.to_string()]);
                command.args(["--groups", &further.to_string()]).arg(&self.program);
                command
            }
        };
        command.arg("status").arg("--socket").arg(self.folder.path("bitnetd.sock"));
        let child =
            command.current_dir("/").env("HOME", "/").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        self.folder.finished(child.unwrap())
    }

    fn serve(&self, listen: &str) -> Daemon {
        self.folder.write("c.toml", format!("[listen]\n{listen}\n"));
        Daemon::start(&self.folder, "-c %/c.toml --workers 1 --threads 1")
    }
}

#[test]
fn a_service_manager_may_forbid_what_there_is_no_need_for() {
    let Some(open) = OpenFolder::new() else { return };
    // A user without capabilities, under a filter as the unit's: there is nothing to drop.
    let finished = without(libc::SYS_capset, libc::EPERM, move || {
        let mut command = Command::new(&open.program);
        command.args(["run", "-p", "Once upon a time", "-n", "4", "-t", "1"]).uid(65_534).gid(65_534);
        command.current_dir("/").env("HOME", "/");
        open.folder.finish(command)
    });
    assert_eq!(finished.code, Some(0), "{finished:?}");
}

#[test]
fn a_proc_that_hides_the_workers_costs_their_threads_and_nothing_else() {
    let Some(open) = OpenFolder::new() else { return };
    open.folder.write("c.toml", "[split]\nworkers = 2\nthreads = 1\n");
    let own = open.folder.path("own");
    fs::create_dir(&own).unwrap();
    fs::set_permissions(&own, fs::Permissions::from_mode(0o777)).unwrap();
    // As `ProtectProc=invisible` does it: a /proc of its own, for a user who may look into no process that is not dumpable.
    let as_a_user = "mount -t proc -o hidepid=2 proc /proc || exit 99\n\
        exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"";
    let in_there = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", as_a_user, "sh"]).args(args);
        command.current_dir(&own).env("HOME", &own).env("STATE_DIRECTORY", &own).stdin(Stdio::null());
        command
    };
    let tried = in_there(&["true"]).output();
    if !tried.as_ref().is_ok_and(|output| output.status.success()) {
        #[expect(clippy::print_stderr, reason = "a test that proves nothing says so")]
        {
            eprintln!("SKIPPED: /proc cannot be mounted here: {tried:?}");
        }
        return;
    }
    let socket = own.join("s");
    let [program, socket] = [&open.program, &socket].map(|path| path.to_str().unwrap());
    let log = fs::File::create(open.folder.path("log")).unwrap();
    let mut command = in_there(&[program, "serve", "-c", "../c.toml", "--socket", socket]);
    let mut daemon = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let outcome = std::panic::catch_unwind(|| {
        let report = wait_for("it knows all that it can know", || {
            let report = Client::connect(Path::new(socket), "e2e", DEADLINE).ok()?.status().ok()?;
            let is_known = |slot: &SlotReport| slot.state == "ready" && slot.load.memory.is_some();
            let is_complete = !report.cpus.is_empty() && report.cpus.iter().any(|cpu| cpu.busy.is_some());
            (is_complete && report.slots.iter().all(is_known)).then_some(report)
        });
        for slot in &report.slots {
            assert!(slot.threads.is_empty(), "they are hidden: {slot:?}");
            let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", slot.pid.unwrap())).unwrap();
            assert_eq!(score, "500\n", "it goes before the supervisor does");
        }
        let mut client = Client::connect(Path::new(socket), "e2e", DEADLINE).unwrap();
        assert!(!generate(&mut client, &random_request("Once", 1, 5)).unwrap().is_empty());
        // What dies is replaced, and said to have died.
        send(report.slots[0].pid.unwrap(), Signal::SIGKILL);
        wait_for("another worker", || {
            let slot = client.status().ok()?.slots.remove(0);
            (slot.restarts == 1 && slot.state == "ready").then_some(())
        });
        let shown = open.folder.run(&format!("status --socket {socket}")).ok();
        assert!(shown.contains("killed by signal 9 (SIGKILL)"), "{shown}");
    });
    let _gone = daemon.kill();
    let _reaped = daemon.wait();
    outcome.unwrap();
}

const FORBIDDEN_BY_MODE: Option<i32> = Some(77);

#[test]
fn the_socket_has_the_mode_the_owner_and_the_group_of_the_configuration() {
    let Some(open) = OpenFolder::new() else { return };
    let daemon = open.serve("mode = \"0660\"\nowner = 4100\ngroup = \"4200\"");
    let metadata = fs::metadata(&daemon.socket).unwrap();
    assert_eq!((metadata.mode() & 0o777, metadata.uid(), metadata.gid()), (0o660, 4100, 4200));
    assert_eq!(open.status_as(4100, 1, None).code, Some(0), "the owner");
    assert_eq!(open.status_as(4101, 4200, None).code, Some(0), "a member of the group");
    assert_eq!(open.status_as(4101, 1, Some(4200)).code, Some(0), "a member by a further group");
    let refused = open.status_as(4101, 1, Some(4201));
    assert_eq!(refused.code, FORBIDDEN_BY_MODE, "{refused:?}");
}

#[test]
fn allowed_users_and_groups_come_in_and_nobody_else() {
    let Some(open) = OpenFolder::new() else { return };
    let daemon = open.serve("mode = \"0666\"\nallow_uids = [0, 4100]\nallow_gids = [4200]");
    for (uid, gid, further) in [(4100, 1, None), (4101, 4200, None), (4101, 1, Some(4200)), (0, 0, None)] {
        let finished = open.status_as(uid, gid, further);
        assert_eq!(finished.code, Some(0), "{uid} {gid} {further:?}: {finished:?}");
    }
    for (uid, gid, further) in [(4101, 1, None), (4200, 4100, None), (65_534, 65_534, Some(4100))] {
        let finished = open.status_as(uid, gid, further);
        assert_eq!(finished.code, Some(77), "{uid} {gid} {further:?}: {finished:?}");
        let words = format!("uid {uid} (gid {gid}) may not use this socket");
        assert!(finished.stderr.contains(&words) && finished.stdout.is_empty(), "{finished:?}");
        assert!(daemon.log(&open.folder).contains(&words));
    }
    // The lists are read again like everything else that needs no new socket.
    open.folder.write("c.toml", "[listen]\nmode = \"0666\"\nallow_uids = [0, 65534]\n");
    open.folder.run("reload --socket %/bitnetd.sock").ok();
    for (uid, code) in [(65_534, 0), (4100, 77), (0, 0)] {
        let finished = open.status_as(uid, 4200, None);
        assert_eq!(finished.code, Some(code), "{uid} after the reload: {finished:?}");
    }
}

#[test]
fn an_owner_that_does_not_exist_is_a_wrong_configuration() {
    let folder = Folder::new();
    folder.write("c.toml", "[listen]\ngroup = \"nobody-has-this-name\"\n");
    let finished = folder.run("serve --socket %/s -c %/c.toml");
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert!(finished.stderr.contains("there is no group `nobody-has-this-name`"), "{finished:?}");
    assert!(!folder.path("s").exists());
}
