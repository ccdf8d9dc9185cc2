//! `--stats` of `run` and `batch`: what the cores did meanwhile, thread by thread.
//!
//! The difference of two readings of `/proc`, one when the workers are ready and one when the work is done, made by this
//! process: its workers are its children.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use bitnetd_config::cpu_list;
use bitnetd_placement::usage::{self, CpuTimes, ThreadTimes};
use bitnetd_proto::status::{SlotReport, StatusReport};
use bitnetd_proto::worker_link::{WorkerLoad, WorkerMemory};
use serde::Serialize;

use crate::control::percent;
use crate::local::Local;
use crate::terminal;

/// A worker says what it does once a second; longer than this nobody waits for the last word.
const LAST_WORD_MAX: Duration = Duration::from_secs(3);
/// Between two looks for it.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Clock ticks of `/proc` in a second.
const TICKS_PER_S: f64 = 100.0;

/// How things were when the work began.
#[derive(Debug)]
pub(crate) struct Baseline(Reading);

/// How things are at a moment.
#[derive(Debug)]
struct Reading {
    at: Instant,
    cpus: BTreeMap<u32, CpuTimes>,
    /// Of each slot: pid and threads.
    workers: BTreeMap<u32, (u32, Vec<ThreadTimes>)>,
    loads: BTreeMap<u32, WorkerLoad>,
}

/// What came of it; as JSON, `stats` of `run --json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Stats {
    /// From the first reading to the second.
    seconds: f64,
    cpus: Vec<CpuStats>,
    workers: Vec<WorkerStats>,
}

/// One CPU of a worker.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct CpuStats {
    cpu: u32,
    slot: u32,
    busy: Option<f64>,
    stolen: Option<f64>,
}

/// One worker.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct WorkerStats {
    slot: u32,
    cpus: String,
    restarts: u64,
    cpu_seconds: f64,
    wait_seconds: Option<f64>,
    migrations: Option<u64>,
    prefill_tokens: u64,
    decode_tokens: u64,
    /// In each second of the whole time.
    prefill_per_s: f64,
    decode_per_s: f64,
    memory: Option<WorkerMemory>,
    threads: Vec<ThreadStats>,
}

/// One thread of a worker.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct ThreadStats {
    name: String,
    cpu: Option<u32>,
    cpu_seconds: f64,
    wait_seconds: Option<f64>,
    timeslices: Option<u64>,
    migrations: Option<u64>,
}

impl Baseline {
    /// Of a service whose workers are ready.
    pub(crate) async fn take(local: &Local) -> Self {
        Self(Reading::take(&local.status().await))
    }

    /// What was done since.
    pub(crate) async fn finish(self, local: &Local) -> Stats {
        let end = Reading::take(&local.status().await);
        Stats::between(&self.0, &end, &last_word(local, end.at).await)
    }
}

/// The status when every worker that lives has said what it does since `at`.
async fn last_word(local: &Local, at: Instant) -> StatusReport {
    loop {
        let report = local.status().await;
        let age = at.elapsed();
        let is_new = |slot: &SlotReport| slot.load_age_s.is_some_and(|load_s| load_s < age.as_secs_f64());
        if age > LAST_WORD_MAX || report.slots.iter().all(|slot| slot.pid.is_none() || is_new(slot)) {
            return report;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

impl Reading {
    fn take(report: &StatusReport) -> Self {
        let root = Path::new("/");
        let worker = |slot: &SlotReport| Some((slot.slot, (slot.pid?, usage::threads(root, slot.pid?))));
        Self {
            at: Instant::now(),
            cpus: usage::cpu_times(root),
            workers: report.slots.iter().filter_map(worker).collect(),
            loads: report.slots.iter().map(|slot| (slot.slot, slot.load)).collect(),
        }
    }
}

impl Stats {
    fn between(begin: &Reading, end: &Reading, last: &StatusReport) -> Self {
        let seconds = (end.at - begin.at).as_secs_f64();
        let cpu = |slot: u32, cpu: u32| {
            let (earlier, later) = (begin.cpus.get(&cpu)?, end.cpus.get(&cpu)?);
            let (busy, stolen) = (later.utilisation_since(earlier), later.stolen_since(earlier));
            Some(CpuStats { cpu, slot, busy, stolen })
        };
        let own = |slot: &SlotReport| {
            let cpus = cpu_list::parse(&slot.cpus).unwrap_or_default();
            let number = slot.slot;
            cpus.into_iter().filter_map(move |of| cpu(number, of))
        };
        Self {
            seconds,
            cpus: last.slots.iter().flat_map(own).collect(),
            workers: last.slots.iter().map(|slot| WorkerStats::between(begin, end, slot, seconds)).collect(),
        }
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _written = writeln!(text, "cores and threads in {:.2} s:", self.seconds);
        let header = ["CPU", "BUSY", "STOLEN", "WORKER", "THREAD", "CPU TIME", "WAITED", "MIGRATIONS"];
        let mut rows = vec![header.map(str::to_owned)];
        for cpu in &self.cpus {
            let worker = self.workers.iter().find(|worker| worker.slot == cpu.slot);
            let thread = worker.and_then(|worker| worker.thread_on(cpu.cpu));
            rows.push([
                cpu.cpu.to_string(),
                percent(cpu.busy),
                percent(cpu.stolen),
                cpu.slot.to_string(),
                thread.map_or_else(dash, |thread| thread.name.clone()),
                thread.map_or_else(dash, |thread| seconds(Some(thread.cpu_seconds))),
                seconds(thread.and_then(|thread| thread.wait_seconds)),
                number(thread.and_then(|thread| thread.migrations)),
            ]);
        }
        text += &terminal::columns(&rows, |_| false);
        let header =
            ["WORKER", "CPUS", "CPU TIME", "WAITED", "MIGRATIONS", "PREFILL", "DECODE", "PSS", "RESTARTS"];
        let mut rows = vec![header.map(str::to_owned)];
        for worker in &self.workers {
            rows.push([
                worker.slot.to_string(),
                worker.cpus.clone(),
                seconds(Some(worker.cpu_seconds)),
                seconds(worker.wait_seconds),
                number(worker.migrations),
                format!("{:.1}/s", worker.prefill_per_s),
                format!("{:.1}/s", worker.decode_per_s),
                worker.memory.map_or_else(dash, |memory| format!("{} MiB", memory.pss_bytes >> 20)),
                worker.restarts.to_string(),
            ]);
        }
        text += &terminal::columns(&rows, |_| false);
        text.trim_end().to_owned()
    }
}

impl WorkerStats {
    fn between(begin: &Reading, end: &Reading, slot: &SlotReport, seconds: f64) -> Self {
        // A process that was started meanwhile has done all that it has done.
        let (pid, after) = end.workers.get(&slot.slot).cloned().unwrap_or_default();
        let before = begin.workers.get(&slot.slot).filter(|(earlier, _)| *earlier == pid);
        let thread = |thread: &ThreadTimes| {
            let earlier = before.and_then(|(_, threads)| threads.iter().find(|of| of.tid == thread.tid));
            ThreadStats::between(earlier, thread)
        };
        let threads: Vec<ThreadStats> = after.iter().map(thread).collect();
        let load = before.and_then(|_| begin.loads.get(&slot.slot)).copied().unwrap_or_default();
        let prefill_tokens = slot.load.prefill_tokens.saturating_sub(load.prefill_tokens);
        let decode_tokens = slot.load.decode_tokens.saturating_sub(load.decode_tokens);
        Self {
            slot: slot.slot,
            cpus: slot.cpus.clone(),
            restarts: slot.restarts,
            cpu_seconds: threads.iter().map(|thread| thread.cpu_seconds).sum(),
            wait_seconds: threads.iter().map(|thread| thread.wait_seconds).sum(),
            migrations: threads.iter().map(|thread| thread.migrations).sum(),
            prefill_tokens,
            decode_tokens,
            prefill_per_s: per_second(prefill_tokens, seconds),
            decode_per_s: per_second(decode_tokens, seconds),
            memory: slot.load.memory,
            threads,
        }
    }

    /// The compute thread that has the CPU to itself.
    fn thread_on(&self, cpu: u32) -> Option<&ThreadStats> {
        let place = cpu_list::parse(&self.cpus).ok()?.iter().position(|&of| of == cpu)?;
        let is_it = |thread: &&ThreadStats| {
            usage::compute_thread(&thread.name).is_some_and(|(_, number)| number as usize == place)
        };
        self.threads.iter().find(is_it)
    }
}

impl ThreadStats {
    fn between(earlier: Option<&ThreadTimes>, later: &ThreadTimes) -> Self {
        let since = |count: fn(&ThreadTimes) -> Option<u64>| {
            Some(count(later)?.saturating_sub(earlier.and_then(count).unwrap_or(0)))
        };
        let ticks = since(|thread| Some(thread.user_ticks.saturating_add(thread.system_ticks))).unwrap_or(0);
        #[expect(clippy::cast_precision_loss, reason = "a time since the start of this process")]
        let (in_ticks, nanoseconds) = (ticks as f64 / TICKS_PER_S, |ns: u64| ns as f64 / 1e9);
        Self {
            name: later.name.clone(),
            cpu: later.cpu,
            cpu_seconds: since(|thread| thread.run_ns).map_or(in_ticks, nanoseconds),
            wait_seconds: since(|thread| thread.wait_ns).map(nanoseconds),
            timeslices: since(|thread| thread.timeslices),
            migrations: since(|thread| thread.migrations),
        }
    }
}

fn per_second(n: u64, seconds: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    if seconds > 0.0 { n as f64 / seconds } else { 0.0 }
}

fn seconds(seconds: Option<f64>) -> String {
    seconds.map_or_else(dash, |seconds| format!("{seconds:.2} s"))
}

fn number(number: Option<u64>) -> String {
    number.map_or_else(dash, |number| number.to_string())
}

fn dash() -> String {
    "-".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(tid: u32, name: &str, seconds: u64, schedstat: bool) -> ThreadTimes {
        let known = |value: u64| schedstat.then_some(value);
        ThreadTimes {
            tid,
            name: name.into(),
            cpu: Some(4),
            user_ticks: seconds * 90,
            system_ticks: seconds * 10,
            run_ns: known(seconds * 1_000_000_000),
            wait_ns: known(seconds * 10_000_000),
            timeslices: known(seconds),
            migrations: known(1),
        }
    }

    fn reading(at: Instant, pid: u32, seconds: u64, schedstat: bool) -> Reading {
        let threads = vec![
            thread(pid, "bnd-w0-t0", seconds, schedstat),
            thread(pid + 1, "bnd-w0-t1", seconds / 2, schedstat),
            thread(pid + 2, "bnd-link", 0, schedstat),
        ];
        let cpu = |busy| CpuTimes { busy_ticks: busy, idle_ticks: 1000 - busy, steal_ticks: 0 };
        Reading {
            at,
            cpus: [(4, cpu(seconds * 90)), (5, cpu(seconds * 50)), (6, cpu(7))].into(),
            workers: [(0, (pid, threads))].into(),
            loads: [(0, WorkerLoad { decode_tokens: seconds * 10, ..WorkerLoad::default() })].into(),
        }
    }

    fn slot(decode_tokens: u64) -> SlotReport {
        let memory = WorkerMemory { pss_bytes: 300 << 20, ..WorkerMemory::default() };
        let load =
            WorkerLoad { decode_tokens, prefill_tokens: 50, memory: Some(memory), ..WorkerLoad::default() };
        SlotReport {
            slot: 0,
            state: "ready".into(),
            pid: Some(100),
            cpus: "4-5".into(),
            memory_nodes: String::new(),
            restarts: 0,
            jobs: 0,
            load,
            load_age_s: Some(0.0),
            prefill_per_s: None,
            decode_per_s: None,
            resident_bytes: None,
            threads: Vec::new(),
            confinement: None,
            last_exit: None,
        }
    }

    fn stats(begin: &Reading, end: &Reading) -> Stats {
        let seconds = (end.at - begin.at).as_secs_f64();
        let mut stats = Stats { seconds, cpus: Vec::new(), workers: Vec::new() };
        let slot = slot(120);
        stats.workers.push(WorkerStats::between(begin, end, &slot, seconds));
        for cpu in [4, 5] {
            let busy = end.cpus[&cpu].utilisation_since(&begin.cpus[&cpu]);
            stats.cpus.push(CpuStats { cpu, slot: 0, busy, stolen: None });
        }
        stats
    }

    #[test]
    fn stats_are_the_difference_of_two_readings() {
        let at = Instant::now();
        let (begin, end) = (reading(at, 100, 2, true), reading(at + Duration::from_secs(10), 100, 10, true));
        insta::assert_snapshot!("table", stats(&begin, &end).table());
    }

    #[test]
    fn what_the_kernel_does_not_tell_is_unknown_and_a_new_process_begins_at_nothing() {
        let at = Instant::now();
        let (begin, end) = (reading(at, 70, 2, false), reading(at + Duration::from_secs(10), 100, 10, false));
        let worker = stats(&begin, &end).workers.remove(0);
        assert_eq!((worker.wait_seconds, worker.migrations), (None, None));
        assert!((worker.cpu_seconds - 15.0).abs() < 1e-9, "{worker:?}");
        assert_eq!((worker.decode_tokens, worker.prefill_tokens), (120, 50));
    }
}
