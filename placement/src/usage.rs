//! What the kernel counts about CPUs, threads and memory: `/proc/stat`, `task/*/stat`, `schedstat`, `status`.
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
        self.share_since(earlier, |times| times.busy_ticks)
    }

    /// Share of the time since `earlier` that the hypervisor took, 0 to 1; `None` if no time has passed.
    #[must_use]
    pub fn stolen_since(&self, earlier: &Self) -> Option<f64> {
        self.share_since(earlier, |times| times.steal_ticks)
    }

    fn share_since(&self, earlier: &Self, part: fn(&Self) -> u64) -> Option<f64> {
        // The kernel lets the idle counters of a CPU go back a little.
        let grown = |part: fn(&Self) -> u64| part(self).saturating_sub(part(earlier));
        let parts: [fn(&Self) -> u64; 3] = [|of| of.busy_ticks, |of| of.idle_ticks, |of| of.steal_ticks];
        let all = parts.into_iter().map(grown).fold(0_u64, u64::saturating_add);
        (all > 0).then(|| grown(part) as f64 / all as f64)
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
    /// Times it was given a CPU.
    pub timeslices: Option<u64>,
    /// Times it moved to another CPU; not every kernel tells.
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
        timeslices: next_wait(),
        migrations: migrations.and_then(|rest| rest.trim_start_matches([' ', ':']).trim().parse().ok()),
    })
}

/// Worker and thread of a compute thread, by its name: `bnd-w0-t3` is thread 3 of worker 0.
#[must_use]
pub fn compute_thread(name: &str) -> Option<(u32, u32)> {
    let (worker, thread) = name.strip_prefix("bnd-w")?.split_once("-t")?;
    Some((worker.parse().ok()?, thread.parse().ok()?))
}

/// What a process has in memory, pages that it shares counted in full; `None` if it is gone or hidden.
#[must_use]
pub fn resident_bytes(root: &Path, pid: u32) -> Option<u64> {
    let text = Tree::new(root).text(&format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
