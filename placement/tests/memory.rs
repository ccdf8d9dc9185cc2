//! How much memory is left, by recorded trees.

use bitnetd_placement::memory::available_bytes;
use tempfile::TempDir;

/// A tree of files.
fn tree(files: &[(&str, &str)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    root
}

const MEMINFO: (&str, &str) = (
    "proc/meminfo",
    "MemTotal:       16000000 kB\nMemFree:  1000 kB\nMemAvailable:    8000000 kB\nCached: 5 kB\n",
);
const MACHINE: u64 = 8_000_000 * 1024;

#[test]
fn the_machine_says_what_is_available() {
    assert_eq!(available_bytes(tree(&[MEMINFO]).path()), Some(MACHINE));
    assert_eq!(available_bytes(tree(&[("proc/x", "")]).path()), None);
    assert_eq!(available_bytes(tree(&[("proc/meminfo", "MemAvailable: many kB")]).path()), None);
}

#[test]
fn the_tightest_group_counts_and_its_page_cache_gives_way() {
    let group = "sys/fs/cgroup/system.slice";
    let files = [
        MEMINFO,
        ("proc/self/cgroup", "0::/system.slice/bitnetd.service\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpu memory"),
        ("sys/fs/cgroup/system.slice/bitnetd.service/memory.max", "max\n"),
        ("sys/fs/cgroup/system.slice/bitnetd.service/memory.current", "77\n"),
        ("sys/fs/cgroup/system.slice/memory.max", "4000000000\n"),
        ("sys/fs/cgroup/system.slice/memory.current", "1500000000\n"),
        (
            "sys/fs/cgroup/system.slice/memory.stat",
            "anon 500000000\nactive_file 600000000\ninactive_file 400000000\n",
        ),
    ];
    assert_eq!(available_bytes(tree(&files).path()), Some(3_500_000_000), "{group}");
    let mut full = files.to_vec();
    full.push(("sys/fs/cgroup/system.slice/bitnetd.service/memory.max", "50\n"));
    assert_eq!(available_bytes(tree(&full).path()), Some(0));
}

#[test]
fn version_one_has_other_words() {
    let files = [
        MEMINFO,
        ("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n"),
        ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2000000000\n"),
        ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "900000000\n"),
        ("sys/fs/cgroup/memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 300000000\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
    ];
    assert_eq!(available_bytes(tree(&files).path()), Some(1_400_000_000));
}
