//! What workers use of the machine: CPUs, threads, memory, tokens.
//!
//! Taken from the status when someone looks, counters too: those of a worker begin again with its next process, which is what
//! Prometheus expects of a counter. There are as many samples as workers have CPUs and threads, and no more.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use bitnetd_proto::status::{SlotReport, StatusReport, ThreadReport};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Of a CPU: who owns it, and which.
type CpuLabels = [(&'static str, String); 2];
/// Of a thread: its worker, and its number there, or `other` for all that do not compute.
type ThreadLabels = [(&'static str, String); 2];
type SlotLabel = [(&'static str, String); 1];
type Seconds = Counter<f64, AtomicU64>;
type Share = Gauge<f64, AtomicU64>;

#[derive(Debug, Default)]
pub(super) struct UsageMetrics {
    cpu_busy: Family<CpuLabels, Share>,
    cpu_stolen: Family<CpuLabels, Share>,
    thread_cpu: Family<ThreadLabels, Seconds>,
    thread_wait: Family<ThreadLabels, Seconds>,
    thread_migrations: Family<ThreadLabels, Counter>,
    prefill_tokens: Family<SlotLabel, Counter>,
    decode_tokens: Family<SlotLabel, Counter>,
    resident: Family<SlotLabel, Gauge>,
    pss: Family<SlotLabel, Gauge>,
    swap: Family<SlotLabel, Gauge>,
}

/// What the kernel says of one thread, or of several together.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    cpu_s: f64,
    wait_s: Option<f64>,
    migrations: Option<u64>,
}

impl UsageMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let mut share = |name, help, family: &Family<CpuLabels, Share>| {
            registry.register(name, help, family.clone());
        };
        share("cpu_busy_ratio", "Share of the last second in which a worker's CPU was busy", &self.cpu_busy);
        share("cpu_stolen_ratio", "Share that the hypervisor took", &self.cpu_stolen);
        let mut seconds = |name, help, family: &Family<ThreadLabels, Seconds>| {
            registry.register(name, help, family.clone());
        };
        seconds("thread_cpu_seconds", "CPU time of a worker's thread", &self.thread_cpu);
        seconds("thread_wait_seconds", "Time in which it could have run and had no CPU", &self.thread_wait);
        registry.register(
            "thread_migrations",
            "Times it moved to another CPU",
            self.thread_migrations.clone(),
        );
        let mut tokens = |name, help, family: &Family<SlotLabel, Counter>| {
            registry.register(name, help, family.clone());
        };
        tokens("worker_prefill_tokens", "Prompt tokens that a worker computed", &self.prefill_tokens);
        tokens("worker_decode_tokens", "Tokens that it generated", &self.decode_tokens);
        let mut bytes = |name, help, family: &Family<SlotLabel, Gauge>| {
            registry.register(name, help, family.clone());
        };
        bytes(
            "worker_resident_memory_bytes",
            "What a worker has in memory, shared pages in full",
            &self.resident,
        );
        bytes("worker_pss_bytes", "The same, shared pages by share", &self.pss);
        bytes("worker_swap_bytes", "What of it is swapped out", &self.swap);
    }

    pub(super) fn set(&self, report: &StatusReport) {
        self.clear(); // What is gone has no value, and counters are set by adding to nothing.
        for cpu in &report.cpus {
            let Some(slot) = cpu.slot else { continue };
            let labels = || [("slot", slot.to_string()), ("cpu", cpu.cpu.to_string())];
            for (family, share) in [(&self.cpu_busy, cpu.busy), (&self.cpu_stolen, cpu.stolen)] {
                if let Some(share) = share {
                    family.get_or_create(&labels()).set(share);
                }
            }
        }
        // Of two with one number (during a reload) the one that stays comes last.
        let slots: BTreeMap<u32, &SlotReport> = report.slots.iter().map(|slot| (slot.slot, slot)).collect();
        for slot in slots.into_values() {
            self.set_slot(slot);
        }
    }

    fn clear(&self) {
        self.cpu_busy.clear();
        self.cpu_stolen.clear();
        self.thread_cpu.clear();
        self.thread_wait.clear();
        self.thread_migrations.clear();
        for family in [&self.prefill_tokens, &self.decode_tokens] {
            family.clear();
        }
        for family in [&self.resident, &self.pss, &self.swap] {
            family.clear();
        }
    }

    fn set_slot(&self, slot: &SlotReport) {
        let label = [("slot", slot.slot.to_string())];
        for (family, n) in
            [(&self.prefill_tokens, slot.load.prefill_tokens), (&self.decode_tokens, slot.load.decode_tokens)]
        {
            family.get_or_create(&label).inc_by(n);
        }
        let memory = slot.load.memory;
        for (family, bytes) in [
            (&self.resident, slot.resident_bytes.or(memory.map(|memory| memory.rss_bytes))),
            (&self.pss, memory.map(|memory| memory.pss_bytes)),
            (&self.swap, memory.map(|memory| memory.swap_bytes)),
        ] {
            if let Some(bytes) = bytes {
                family.get_or_create(&label).set(i64::try_from(bytes).unwrap_or(i64::MAX));
            }
        }
        for (thread, sums) in by_thread(&slot.threads) {
            let labels = [("slot", slot.slot.to_string()), ("thread", thread)];
            self.thread_cpu.get_or_create(&labels).inc_by(sums.cpu_s);
            if let Some(wait_s) = sums.wait_s {
                self.thread_wait.get_or_create(&labels).inc_by(wait_s);
            }
            if let Some(migrations) = sums.migrations {
                self.thread_migrations.get_or_create(&labels).inc_by(migrations);
            }
        }
    }
}

/// Each compute thread by its number, and all others together.
fn by_thread(threads: &[ThreadReport]) -> BTreeMap<String, Sums> {
    let mut sums = BTreeMap::<String, Sums>::new();
    for of in threads {
        let name = of.thread.map_or_else(|| "other".to_owned(), |thread| thread.to_string());
        let sum = sums.entry(name).or_default();
        sum.cpu_s += of.cpu_s;
        sum.wait_s = of.wait_s.map_or(sum.wait_s, |wait_s| Some(sum.wait_s.unwrap_or(0.0) + wait_s));
        sum.migrations = of.migrations.map_or(sum.migrations, |n| Some(sum.migrations.unwrap_or(0) + n));
    }
    sums
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bitnetd_proto::status::CpuReport;
    use bitnetd_proto::worker_link::{WorkerLoad, WorkerMemory};

    use super::*;
    use crate::metrics::Metrics;
    use crate::report;

    fn thread(thread: Option<u32>, migrations: Option<u64>) -> ThreadReport {
        ThreadReport {
            tid: 7,
            name: String::new(),
            thread,
            cpu: Some(3),
            cpu_s: 1.5,
            wait_s: Some(0.25),
            timeslices: None,
            migrations,
            running: None,
            waiting: None,
        }
    }

    fn slot(number: u32) -> SlotReport {
        let memory = WorkerMemory { pss_bytes: 900, ..WorkerMemory::default() };
        SlotReport {
            slot: number,
            state: "ready".into(),
            pid: Some(7),
            cpus: "2-3".into(),
            memory_nodes: String::new(),
            restarts: 0,
            jobs: 0,
            load: WorkerLoad { decode_tokens: 20, memory: Some(memory), ..WorkerLoad::default() },
            load_age_s: None,
            prefill_per_s: None,
            decode_per_s: None,
            resident_bytes: Some(1000),
            threads: vec![thread(Some(0), Some(2)), thread(None, None), thread(None, None)],
            confinement: None,
            last_exit: None,
        }
    }

    #[test]
    fn counters_are_what_the_kernel_says_however_often_they_are_read() {
        let metrics = Metrics::default();
        let cpu = |cpu, slot| CpuReport { cpu, slot, busy: Some(0.5), stolen: None };
        let report = StatusReport {
            slots: vec![slot(0), slot(1)],
            cpus: vec![cpu(2, Some(0)), cpu(9, None)],
            ..report::nothing()
        };
        let twice = (metrics.render(&report), metrics.render(&report));
        // Lines of one family come in any order, and this process goes on meanwhile.
        let sorted = |text: &str| -> BTreeSet<String> {
            let of_workers = text.lines().filter(|line| !line.starts_with("bitnetd_supervisor_"));
            of_workers.map(str::to_owned).collect()
        };
        assert_eq!(sorted(&twice.0), sorted(&twice.1));
        for line in [
            "bitnetd_cpu_busy_ratio{slot=\"0\",cpu=\"2\"} 0.5",
            "bitnetd_thread_cpu_seconds_total{slot=\"0\",thread=\"0\"} 1.5",
            "bitnetd_thread_cpu_seconds_total{slot=\"1\",thread=\"other\"} 3.0",
            "bitnetd_thread_wait_seconds_total{slot=\"1\",thread=\"other\"} 0.5",
            "bitnetd_thread_migrations_total{slot=\"0\",thread=\"0\"} 2",
            "bitnetd_worker_decode_tokens_total{slot=\"1\"} 20",
            "bitnetd_worker_pss_bytes{slot=\"0\"} 900",
            "bitnetd_worker_resident_memory_bytes{slot=\"0\"} 1000",
        ] {
            assert!(twice.0.lines().any(|found| found == line), "no `{line}` in\n{}", twice.0);
        }
        for absent in ["cpu=\"9\"", "cpu_stolen_ratio{", "migrations_total{slot=\"0\",thread=\"other\"}"] {
            assert!(!twice.0.contains(absent), "`{absent}` in\n{}", twice.0);
        }
        let after_a_reload = metrics.render(&StatusReport { slots: vec![slot(0)], ..report });
        assert!(!after_a_reload.contains("slot=\"1\""), "{after_a_reload}");
    }
}
