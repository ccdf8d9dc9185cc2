//! Where the model lies and stays: a copy for each memory node, and memory that is locked.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use bitnetd_config::{Config, HeadChoice, ServiceManager};
use bitnetd_placement::{Plan, WorkerPlacement};
use bitnetd_proto::status::SlotReport;
use bitnetd_proto::worker_link::ImageState;
use bitnetd_supervisor::{ClientId, JobEvent, ModelSource, Notifier, Service, ServiceSpec};
use nix::sys::signal::Signal;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::security::OpenFolder;
use crate::support::{DEADLINE, Daemon, Folder, field, random_request, send};
use crate::systemd::{Manager, field as system_field};

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
        image_cache: None,
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
    let copies: Vec<u64> = mapped(pid, "memfd:bitnetd-copy").into_iter().collect();
    match (mapped(pid, "story.gguf").len(), copies.as_slice()) {
        (1, []) => Reads::File,
        (0, &[copy]) => Reads::Copy(copy),
        other => panic!("it reads {other:?}"),
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
        // Other tests of this process have copies of their own.
        let files =
            fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::metadata(fd.unwrap().path()).ok());
        let held: BTreeSet<u64> = files.map(|file| file.ino()).collect();
        let is_held = |reads: &Reads| matches!(reads, Reads::Copy(inode) if held.contains(inode));
        assert!(is_held(&of[1]) && !is_held(&of[0]), "the supervisor keeps what is in use");
        assert_eq!(answer(&service).await, text);
        service.stop().await;
        service.stopped().await;
    });
}

/// Inodes of what a process has mapped under this name.
fn mapped(pid: u32, name: &str) -> BTreeSet<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let lines = maps.lines().filter(|line| line.contains(name));
    lines.map(|line| line.split_whitespace().nth(4).unwrap().parse().unwrap()).collect()
}

/// Start of the name of something kept.
fn kind(name: &str) -> String {
    name.split('.').next().unwrap().to_owned()
}

/// What the manager is told next to keep no longer.
fn removed(manager: &Manager) -> String {
    let said = manager.hear_until("FDSTOREREMOVE=1");
    kind(system_field(said.last().unwrap(), "FDNAME").unwrap())
}

#[test]
fn the_copies_of_nodes_are_kept_over_a_restart() {
    let folder = Folder::new();
    let manager = Manager::new(&folder);
    let notify_socket = Some(folder.path("notify").into());
    let notifier = Notifier::new(&ServiceManager { notify_socket, ..ServiceManager::default() });
    let with_images = |copy_nodes: &[Option<u32>]| {
        let mut spec = spec(copy_nodes);
        spec.config.model.head = HeadChoice::Fast;
        spec
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let first = with_images(&[Some(0), Some(3)]);
        let service = Service::start_under(first, notifier.clone(), Vec::new()).await.unwrap();
        let text = answer(&service).await;
        let files = spawn_blocking(move || ([(); 4].map(|()| manager.receive_file()), manager));
        let (mut files, manager) = files.await.unwrap();
        service.stop().await;
        service.stopped().await;
        files.sort_by(|(a, _), (b, _)| a.cmp(b));
        let kinds = files.each_ref().map(|(name, _)| kind(name));
        assert_eq!(kinds, ["copy-0", "copy-3", "prepared-0", "prepared-3"]);
        let inodes = files.each_ref().map(|(_, file)| file.metadata().unwrap().ino());
        // One node has no worker any more, another one is new.
        let second = with_images(&[Some(3), Some(1)]);
        let stored = files.into_iter().map(|(name, file)| (name, file.into())).collect();
        let service = Service::start_under(second, notifier, stored).await.unwrap();
        let start = std::time::Instant::now();
        loop {
            let slots = service.status().await.slots;
            let is_used = |slot: &SlotReport| slot.load.image.is_used();
            if slots.iter().all(|slot| slot.state == "ready" && is_used(slot)) {
                let of = |slot: &SlotReport, name| mapped(slot.pid.unwrap(), name);
                assert_eq!(of(&slots[0], "memfd:bitnetd-copy"), BTreeSet::from([inodes[1]]));
                assert_eq!(of(&slots[0], "memfd:bitnetd-head"), BTreeSet::from([inodes[3]]));
                assert_eq!(slots[0].load.image, ImageState::Mapped, "nobody made it again");
                assert_eq!(slots[1].load.image, ImageState::Made);
                assert!(of(&slots[1], "memfd:bitnetd-copy").is_disjoint(&inodes.into()));
                break;
            }
            assert!(start.elapsed() < DEADLINE, "{slots:?}");
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(answer(&service).await, text);
        let listen = spawn_blocking(move || {
            let removed = [(); 2].map(|()| removed(&manager));
            let mut stored = [(); 2].map(|()| kind(&manager.receive_file().0));
            stored.sort();
            ((removed, stored), manager)
        });
        let (heard, manager) = listen.await.unwrap();
        assert_eq!(
            heard,
            (["copy-0", "prepared-0"].map(str::to_owned), ["copy-1", "prepared-1"].map(str::to_owned))
        );
        // So it goes with a reload: what a node had goes when its workers do.
        service.reload_to(with_images(&[Some(3), Some(3)])).await.unwrap();
        let listen = spawn_blocking(move || [(); 2].map(|()| removed(&manager)));
        assert_eq!(listen.await.unwrap(), ["copy-1", "prepared-1"]);
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
