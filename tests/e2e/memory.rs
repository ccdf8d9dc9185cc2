//! Where the model lies and stays: a copy for each memory node, and memory that is locked.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use bitnetd_config::Config;
use bitnetd_placement::{Plan, WorkerPlacement};
use bitnetd_supervisor::{ClientId, JobEvent, ModelSource, Service, ServiceSpec};
use nix::sys::signal::Signal;
use tokio::time::sleep;

use crate::security::OpenFolder;
use crate::support::{DEADLINE, Daemon, Folder, field, random_request, send};

/// A service of this process with one worker for each entry, on CPU 0, which reads the copy of that "node". Where the
/// copies lie is not asked here (a guest with two nodes does), only who has which.
fn spec(copy_nodes: &[Option<u32>]) -> ServiceSpec {
    let worker = |copy_node: &Option<u32>| WorkerPlacement {
        cpus: vec![0],
        copy_node: *copy_node,
        ..WorkerPlacement::default()
    };
    let mut config = Config::default();
    config.engine.ctx = Some(64);
    config.restart.backoff_min = Duration::from_millis(1);
    ServiceSpec {
        config,
        plan: Plan { workers: copy_nodes.iter().map(worker).collect(), ..Plan::default() },
        model: ModelSource::File(
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf"),
        ),
        memory_bytes: None,
        worker_program: env!("CARGO_BIN_EXE_bitnetd").into(),
        worker_args: vec!["worker".into()],
    }
}

/// What of a worker's mappings is the model: its file, or the memory of a copy (by inode).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reads {
    File,
    Copy(u64),
}

fn reads(pid: u32) -> Reads {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let inodes = |name: &str| -> BTreeSet<u64> {
        let lines = maps.lines().filter(|line| line.contains(name));
        lines.map(|line| line.split_whitespace().nth(4).unwrap().parse().unwrap()).collect()
    };
    let copies: Vec<u64> = inodes("memfd:bitnetd-copy").into_iter().collect();
    match (inodes("story.gguf").len(), copies.as_slice()) {
        (1, []) => Reads::File,
        (0, &[copy]) => Reads::Copy(copy),
        other => panic!("it reads {other:?}: {maps}"),
    }
}

/// The pids of the workers, once all are ready and worker 0 was restarted this often.
async fn workers(service: &Service, n_restarts: u64) -> Vec<u32> {
    let start = std::time::Instant::now();
    loop {
        let slots = service.status().await.slots;
        let is_ready = slots.iter().all(|slot| slot.state == "ready");
        if is_ready && slots[0].restarts == n_restarts {
            return slots.iter().map(|slot| slot.pid.unwrap()).collect();
        }
        assert!(start.elapsed() < DEADLINE, "{slots:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

async fn answer(service: &Service) -> String {
    let mut job = service.submit(ClientId::InProcess, random_request("Once", 3, 12)).await.unwrap();
    let mut text = String::new();
    loop {
        match job.next().await.unwrap() {
            JobEvent::Token(token) => text += &token.text,
            JobEvent::Done(done) => return text + &done.tail,
            JobEvent::WorkerDied { .. } => {}
            JobEvent::Failed(error) => panic!("{error}"),
        }
    }
}

#[test]
fn workers_of_a_node_share_its_copy_and_no_other() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let service = Service::start(spec(&[Some(0), Some(2), Some(0), None])).await.unwrap();
        let pids = workers(&service, 0).await;
        let of: Vec<Reads> = pids.iter().copied().map(reads).collect();
        assert_eq!((&of[0], &of[3]), (&of[2], &Reads::File), "{of:?}");
        assert_eq!(of.iter().collect::<BTreeSet<_>>().len(), 3, "two copies and the file: {of:?}");
        let text = answer(&service).await;
        // Whoever comes after a death finds the copy that is there.
        send(pids[0], Signal::SIGKILL);
        let pids = workers(&service, 1).await;
        assert_eq!(reads(pids[0]), of[0]);
        // So does another split with the same model; a node that has no worker any more loses its copy.
        service.reload_to(spec(&[Some(2), Some(2), None, None])).await.unwrap();
        let start = std::time::Instant::now();
        loop {
            let slots = service.status().await.slots;
            let pids: Vec<u32> = slots.iter().filter_map(|slot| slot.pid).collect();
            if slots.len() == 4 && slots.iter().all(|slot| slot.state == "ready") {
                let now: Vec<Reads> = pids.into_iter().map(reads).collect();
                if now == [of[1].clone(), of[1].clone(), Reads::File, Reads::File] {
                    break;
                }
            }
            assert!(start.elapsed() < DEADLINE, "{slots:?}");
            sleep(Duration::from_millis(5)).await;
        }
        let copies =
            fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        let n_copies = copies.filter(|link| link.to_str().unwrap().contains("bitnetd-copy")).count();
        assert_eq!(n_copies, 1, "the supervisor keeps what is in use");
        assert_eq!(answer(&service).await, text);
        service.stop().await;
        service.stopped().await;
    });
}

const LOCKED: &str = "[engine]\nmlock = true\nctx = 64\nmax_batch = 1\n[model]\nhead = \"file\"\n[split]\nworkers = 2\nthreads = 1\n";

#[test]
fn locked_memory_is_what_the_kernel_counts() {
    let folder = Folder::new();
    folder.write("d.toml", LOCKED);
    let daemon = Daemon::start(&folder, "-c %/d.toml");
    let model = daemon.status().unwrap().model.unwrap();
    let locked_kb = |pid: &u32| {
        let locked = field(format!("/proc/{pid}/status"), "VmLck");
        locked.trim_end_matches(" kB").trim().parse::<u64>().unwrap()
    };
    let needed_kb = (model.image_bytes + model.kv_bytes) / 1024;
    for pid in daemon.workers() {
        assert!(locked_kb(&pid) >= needed_kb, "{} kB of {needed_kb} kB are locked", locked_kb(&pid));
    }
    folder.write("d.toml", LOCKED.replace("mlock = true", "mlock = false"));
    folder.run("reload --socket %/bitnetd.sock").ok();
    crate::support::wait_for("workers that lock nothing", || {
        let workers = daemon.workers();
        (workers.len() == 2 && workers.iter().all(|pid| locked_kb(pid) == 0)).then_some(())
    });
}

#[test]
fn a_limit_of_locked_memory_that_is_too_low_is_told() {
    let Some(open) = OpenFolder::new() else { return };
    open.folder.write("d.toml", LOCKED);
    let own = open.folder.path("own");
    fs::create_dir(&own).unwrap();
    fs::set_permissions(&own, fs::Permissions::from_mode(0o777)).unwrap();
    // Root would raise the limit by itself.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -l 64; exec \"$0\" serve -c ../d.toml --socket s"]).arg(&open.program);
    command.uid(65_534).gid(65_534).current_dir(&own).env("HOME", &own).env("STATE_DIRECTORY", &own);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let finished = open.folder.finished(child);
    assert_eq!(finished.code, Some(78), "{finished:?}");
    for words in [
        "cannot lock ",
        " MiB of the model, ",
        "the limit is 64 KiB",
        "hint: raise the limit: `LimitMEMLOCK=",
    ] {
        assert!(finished.stderr.contains(words), "{words}: {finished:?}");
    }
}
