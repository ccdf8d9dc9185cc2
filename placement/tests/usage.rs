//! Counters out of recorded files, and that those of this process are found.

use std::path::Path;

use bitnetd_placement::usage::{self, CpuTimes};
use tempfile::TempDir;

fn tree(files: &[(&str, &str)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

#[test]
fn utilisation_is_the_difference_of_two_readings() {
    let stat =
        |three: &str| format!("cpu  9 9 9 9\ncpu0 1 0 1 10 0 0 0 0 0 0\ncpu3 {three}\nintr 5 5\nctxt 3\n");
    let first = tree(&[("proc/stat", &stat("100 10 50 800 40 5 5 20 7 0"))]);
    let second = tree(&[("proc/stat", &stat("160 10 60 820 40 5 5 30 7 0"))]);
    let (first, second) = (usage::cpu_times(first.path()), usage::cpu_times(second.path()));
    assert_eq!(first.keys().copied().collect::<Vec<_>>(), [0, 3]);
    assert_eq!(first[&3], CpuTimes { busy_ticks: 170, idle_ticks: 840, steal_ticks: 20 });
    assert_eq!(second[&3].utilisation_since(&first[&3]), Some(0.7));
    assert_eq!(second[&3].stolen_since(&first[&3]), Some(0.1));
    assert_eq!(second[&0].utilisation_since(&first[&0]), None);
    assert_eq!(first[&3].utilisation_since(&second[&3]), None, "counters that went back");
}

#[test]
fn threads_are_read_whatever_their_names() {
    let tail = "S 1 2 3 0 -1 64 10 0 0 0 123 45 0 0 20 0 1 0 99 1000 50 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 5 0 0 0 0 0";
    let dir = tree(&[
        ("proc/7/task/7/stat", &format!("7 (bitnetd) {tail}")),
        ("proc/7/task/70000/stat", &format!("70000 (a) b (c) {tail}")),
        ("proc/7/task/70000/schedstat", "5000 300 12"),
        ("proc/7/task/70000/sched", "a (70000, #threads: 1)\n---\nse.nr_migrations   :    4\n"),
        ("proc/7/task/9/stat", "9 (gone"),
    ]);
    let threads = usage::threads(dir.path(), 7);
    assert_eq!(threads.len(), 2);
    assert_eq!((threads[0].tid, threads[0].name.as_str(), threads[0].cpu), (7, "bitnetd", Some(5)));
    assert_eq!((threads[0].run_ns, threads[0].wait_ns, threads[0].migrations), (None, None, None));
    assert_eq!((threads[1].tid, threads[1].name.as_str()), (70_000, "a) b (c"));
    assert_eq!((threads[1].user_ticks, threads[1].system_ticks), (123, 45));
    assert_eq!(
        (threads[1].run_ns, threads[1].wait_ns, threads[1].migrations),
        (Some(5000), Some(300), Some(4))
    );
    assert_eq!(threads[1].timeslices, Some(12));
    assert!(usage::threads(dir.path(), 8).is_empty());
}

#[test]
fn compute_threads_are_known_by_name() {
    assert_eq!(usage::compute_thread("bnd-w0-t3"), Some((0, 3)));
    assert_eq!(usage::compute_thread("bnd-w12-t255"), Some((12, 255)));
    for name in ["bnd-w0", "bnd-w-t1", "bnd-wx-t1", "tokio-rt", ""] {
        assert_eq!(usage::compute_thread(name), None, "{name}");
    }
}

#[test]
fn resident_memory_is_found_among_the_rest() {
    let dir = tree(&[
        ("proc/7/status", "Name:\ta\nVmHWM:\t 900 kB\nVmRSS:\t   800 kB\n"),
        ("proc/9/status", "Name: b\n"),
    ]);
    assert_eq!(usage::resident_bytes(dir.path(), 7), Some(800 << 10));
    assert_eq!((usage::resident_bytes(dir.path(), 8), usage::resident_bytes(dir.path(), 9)), (None, None));
}

#[test]
fn this_process_has_threads_and_cpus() {
    let root = Path::new("/");
    assert!(!usage::cpu_times(root).is_empty());
    let threads = usage::threads(root, std::process::id());
    assert!(threads.iter().any(|thread| thread.tid == std::process::id()), "{threads:?}");
}
