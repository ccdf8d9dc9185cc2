//! What the kernel counts about CPUs, threads and memory: `/proc/stat`, `task/*/stat`, `schedstat`, `smaps_rollup`.
//!
//! Readings of counters as they are; utilisation is the difference of two of them. Pure functions over the root of a
//! tree, as everything in this crate: whoever shows the numbers decides when to read.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::tree::Tree;

/// Time of one CPU since boot, in clock ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CpuTimes {
    /// Running something, a guest included.
    pub busy_ticks: u64,
    /// Running nothing, or waiting for a disk.
    pub idle_ticks: u64,
    /// Taken away by the hypervisor.
    pub steal_ticks: u64,
}

impl CpuTimes {
    /// Share of the time since `earlier` in which the CPU was busy, 0 to 1; `None` if no time has passed. Time that the
    /// hypervisor took counts as time in which it was not.
    #[must_use]
    pub fn utilisation_since(&self, earlier: &Self) -> Option<f64> {
        // The kernel lets the idle counters of a CPU go back a little.
        let busy = self.busy_ticks.saturating_sub(earlier.busy_ticks);
        let idle = self.idle_ticks.saturating_sub(earlier.idle_ticks);
        let steal = self.steal_ticks.saturating_sub(earlier.steal_ticks);
        let all = busy.saturating_add(idle).saturating_add(steal);
        (all > 0).then(|| busy as f64 / all as f64)
    }
}

/// The times of every CPU that is online.
#[must_use]
pub fn cpu_times(root: &Path) -> BTreeMap<u32, CpuTimes> {
    let stat = Tree::new(root).text("/proc/stat").unwrap_or_default();
    stat.lines().filter_map(cpu_line).collect()
}

/// `cpu3 user nice system idle iowait irq softirq steal guest guest_nice`; guests are part of user and nice.
fn cpu_line(line: &str) -> Option<(u32, CpuTimes)> {
    let mut fields = line.split_ascii_whitespace();
    let cpu = fields.next()?.strip_prefix("cpu")?.parse().ok()?;
    let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
    let at = |idx: usize| ticks.get(idx).copied().unwrap_or(0);
    let busy_ticks = [0, 1, 2, 5, 6].into_iter().fold(0_u64, |sum, idx| sum.saturating_add(at(idx)));
    let idle_ticks = at(3).saturating_add(at(4));
    (ticks.len() >= 4).then_some((cpu, CpuTimes { busy_ticks, idle_ticks, steal_ticks: at(7) }))
}

/// What the kernel counts about one thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ThreadTimes {
    /// Thread id.
    pub tid: u32,
    /// Its name, 15 bytes at most.
    pub name: String,
    /// The CPU it ran on last.
    pub cpu: Option<u32>,
    /// CPU time in user mode, in clock ticks.
    pub user_ticks: u64,
    /// CPU time in the kernel, in clock ticks.
    pub system_ticks: u64,
    /// CPU time, in nanoseconds; `None` without `schedstat`.
    pub run_ns: Option<u64>,
    /// Time in which it could have run and had no CPU.
    pub wait_ns: Option<u64>,
    /// Times it moved to another CPU; few kernels tell.
    pub migrations: Option<u64>,
}

/// The threads of a process, by their ids; empty if it is gone. Threads that end meanwhile are left out.
#[must_use]
pub fn threads(root: &Path, pid: u32) -> Vec<ThreadTimes> {
    let tree = Tree::new(root);
    let dir = format!("/proc/{pid}/task");
    tree.numbers(&dir).into_iter().filter_map(|tid| thread(tree, &dir, tid)).collect()
}

fn thread(tree: Tree<'_>, dir: &str, tid: u32) -> Option<ThreadTimes> {
    let stat = tree.text(&format!("{dir}/{tid}/stat"))?;
    // The name stands in parentheses and may hold any characters, parentheses and spaces among them.
    let (before, after) = stat.rsplit_once(')')?;
    let name = before.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = after.split_ascii_whitespace().collect();
    // The first of `fields` is what proc(5) calls field 3.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let schedstat = tree.text(&format!("{dir}/{tid}/schedstat")).unwrap_or_default();
    let mut waits = schedstat.split_ascii_whitespace().map(str::parse::<u64>);
    let mut next_wait = || waits.next().and_then(Result::ok);
    let sched = tree.text(&format!("{dir}/{tid}/sched")).unwrap_or_default();
    let migrations = sched.lines().find_map(|line| line.strip_prefix("se.nr_migrations"));
    Some(ThreadTimes {
        tid,
        name,
        cpu: field(39).and_then(|cpu| u32::try_from(cpu).ok()),
        user_ticks: field(14)?,
        system_ticks: field(15)?,
        run_ns: next_wait(),
        wait_ns: next_wait(),
        migrations: migrations.and_then(|rest| rest.trim_start_matches([' ', ':']).trim().parse().ok()),
    })
}

/// Worker and thread of a compute thread, by its name: `bnd-w0-t3` is thread 3 of worker 0.
#[must_use]
pub fn compute_thread(name: &str) -> Option<(u32, u32)> {
    let (worker, thread) = name.strip_prefix("bnd-w")?.split_once("-t")?;
    Some((worker.parse().ok()?, thread.parse().ok()?))
}

/// Memory of one process, in bytes. Pages shared by n processes count 1/n in each PSS, so that the sum over all workers
/// is what they cost together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryUse {
    /// Pages in memory, shared ones counted in full.
    pub rss_bytes: u64,
    /// Pages in memory, shared ones by share.
    pub pss_bytes: u64,
    /// Of that the pages of no file: heap, KV cache.
    pub pss_anon_bytes: u64,
    /// Of that the pages of files: the model and the program.
    pub pss_file_bytes: u64,
    /// Of that shared memory: the model where it is a memfd.
    pub pss_shmem_bytes: u64,
    /// Pages swapped out.
    pub swap_bytes: u64,
}

/// The memory of a process; `None` if it is gone or belongs to somebody else.
#[must_use]
pub fn memory(root: &Path, pid: u32) -> Option<MemoryUse> {
    let text = Tree::new(root).text(&format!("/proc/{pid}/smaps_rollup"))?;
    let bytes = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(MemoryUse {
        rss_bytes: bytes("Rss")?,
        pss_bytes: bytes("Pss")?,
        pss_anon_bytes: bytes("Pss_Anon").unwrap_or(0),
        pss_file_bytes: bytes("Pss_File").unwrap_or(0),
        pss_shmem_bytes: bytes("Pss_Shmem").unwrap_or(0),
        swap_bytes: bytes("Swap").unwrap_or(0),
    })
}
