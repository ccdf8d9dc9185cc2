//! What workers use of the machine: CPUs, threads and resident memory, read once a second.
//!
//! A blocking thread reads `/proc` (a large machine takes milliseconds, and the event loop never waits); the loop keeps the
//! two last readings and shows their difference. What is read belongs to nobody else: `docs/decisions/monitoring.md` says
//! what a supervisor may see of its workers, and why it is the one that looks.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use bitnetd_placement::usage::{self, CpuTimes, ThreadTimes};
use bitnetd_proto::status::{CpuReport, ThreadReport};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

/// From one reading to the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// Clock ticks of `/proc` in a second: the same on every machine that this is built for.
const TICKS_PER_S: f64 = 100.0;

/// What there was to read at one moment.
#[derive(Debug)]
pub(crate) struct Reading {
    at: Instant,
    cpus: BTreeMap<u32, CpuTimes>,
    /// By pid.
    workers: BTreeMap<u32, WorkerReading>,
}

#[derive(Debug)]
struct WorkerReading {
    threads: Vec<ThreadTimes>,
    resident_bytes: Option<u64>,
}

/// The last two readings, and when the next is due.
#[derive(Debug)]
pub(crate) struct Monitor {
    due: Duration,
    is_reading: bool,
    /// Cloned into each reading.
    readings: mpsc::Sender<Reading>,
    readings_in: mpsc::Receiver<Reading>,
    last: Option<Reading>,
    before: Option<Reading>,
}

impl Monitor {
    pub(crate) fn new() -> Self {
        let (readings, readings_in) = mpsc::channel(1);
        Self { due: INTERVAL, is_reading: false, readings, readings_in, last: None, before: None }
    }

    /// When to look again.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        (!self.is_reading).then_some(self.due)
    }

    /// Starts a reading if one is due.
    pub(crate) fn look(&mut self, pids: impl Iterator<Item = u32>, now: Duration) {
        if self.is_reading || now < self.due {
            return;
        }
        self.is_reading = true;
        self.due = now + INTERVAL;
        let (pids, readings) = (pids.collect::<Vec<u32>>(), self.readings.clone());
        // If it panics no further reading is made: its sender is not the last one, so nobody waits for it.
        drop(spawn_blocking(move || readings.blocking_send(read(Path::new("/"), &pids))));
    }

    /// The next reading that is done.
    ///
    /// # Cancel safety
    /// Nothing is lost if it is dropped before it is ready.
    pub(crate) async fn finished(&mut self) -> Option<Reading> {
        self.readings_in.recv().await
    }

    /// Takes a reading in.
    pub(crate) fn take(&mut self, reading: Reading) {
        self.is_reading = false;
        self.before = self.last.replace(reading);
    }

    /// Seconds between the two last readings.
    pub(crate) fn window_s(&self) -> Option<f64> {
        Some((self.last.as_ref()?.at - self.before.as_ref()?.at).as_secs_f64())
    }

    /// Every CPU; `slot_of` says who owns it.
    pub(crate) fn cpus(&self, slot_of: &BTreeMap<u32, u32>) -> Vec<CpuReport> {
        let Some(last) = &self.last else { return Vec::new() };
        let show = |(cpu, times): (&u32, &CpuTimes)| {
            let earlier = self.before.as_ref().and_then(|before| before.cpus.get(cpu));
            CpuReport {
                cpu: *cpu,
                slot: slot_of.get(cpu).copied(),
                busy: earlier.and_then(|earlier| times.utilisation_since(earlier)),
                stolen: earlier.and_then(|earlier| times.stolen_since(earlier)),
            }
        };
        last.cpus.iter().map(show).collect()
    }

    /// The threads of a process.
    pub(crate) fn threads(&self, pid: u32) -> Vec<ThreadReport> {
        let Some(of) = self.last.as_ref().and_then(|last| last.workers.get(&pid)) else { return Vec::new() };
        let before = self.before.as_ref().and_then(|before| before.workers.get(&pid));
        let window_s = self.window_s();
        let show = |thread: &ThreadTimes| {
            let earlier = before.and_then(|of| of.threads.iter().find(|of| of.tid == thread.tid));
            thread_report(thread, earlier.zip(window_s))
        };
        of.threads.iter().map(show).collect()
    }

    /// Bytes that a process has in memory, what it shares with others in full.
    pub(crate) fn resident_bytes(&self, pid: u32) -> Option<u64> {
        self.last.as_ref()?.workers.get(&pid)?.resident_bytes
    }
}

fn read(root: &Path, pids: &[u32]) -> Reading {
    let worker = |pid: &u32| {
        let resident_bytes = usage::resident_bytes(root, *pid);
        (*pid, WorkerReading { threads: usage::threads(root, *pid), resident_bytes })
    };
    let workers = pids.iter().map(worker).collect();
    Reading { at: Instant::now(), cpus: usage::cpu_times(root), workers }
}

fn thread_report(thread: &ThreadTimes, earlier: Option<(&ThreadTimes, f64)>) -> ThreadReport {
    let share = |now: Option<f64>, then: fn(&ThreadTimes) -> Option<f64>| {
        let (earlier, window_s) = earlier?;
        // The kernel counts in steps that are a little longer than the window at times.
        (window_s > 0.0).then_some(((now? - then(earlier)?) / window_s).clamp(0.0, 1.0))
    };
    let cpu_s = cpu_s(thread);
    ThreadReport {
        tid: thread.tid,
        name: thread.name.clone(),
        thread: usage::compute_thread(&thread.name).map(|(_, thread)| thread),
        cpu: thread.cpu,
        cpu_s: cpu_s.unwrap_or(0.0),
        wait_s: wait_s(thread),
        timeslices: thread.timeslices,
        migrations: thread.migrations,
        running: share(cpu_s, self::cpu_s),
        waiting: share(wait_s(thread), wait_s),
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "2^53 ns are three months of one thread, and then microseconds"
)]
fn cpu_s(thread: &ThreadTimes) -> Option<f64> {
    let ticks = || thread.user_ticks.saturating_add(thread.system_ticks) as f64 / TICKS_PER_S;
    Some(thread.run_ns.map_or_else(ticks, |ns| ns as f64 / 1e9))
}

#[expect(clippy::cast_precision_loss, reason = "as above")]
fn wait_s(thread: &ThreadTimes) -> Option<f64> {
    thread.wait_ns.map(|ns| ns as f64 / 1e9)
}
