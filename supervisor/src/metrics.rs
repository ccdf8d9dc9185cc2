//! What is counted and measured, in the words of Prometheus (OpenMetrics text).
//!
//! Counters and histograms are fed by the state machine's notes as they happen; gauges are taken from the status at the
//! moment someone looks. No name of a client, prompt or file is a label: every label has a short, closed list of values.

use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::status::{Health, SlotReport, StatusReport};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

mod usage; // What workers use of the machine.

use crate::state::Note;
use usage::UsageMetrics;

/// One label and its value.
type Label = [(&'static str, String); 1];

/// Bounds of waits and of times to a first token, in seconds.
const WAIT_BUCKETS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Bounds of times between two tokens, in seconds.
const TOKEN_BUCKETS: [f64; 14] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0, 10.0];
/// Bounds of times of whole jobs, in seconds.
const JOB_BUCKETS: [f64; 12] = [0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0];

/// Everything that is counted and measured.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    jobs_ended: Family<Label, Counter>,
    jobs_refused: Family<Label, Counter>,
    tokens: Counter,
    moves: Counter,
    starts: Counter,
    exits: Family<Label, Counter>,
    restarts: Family<Label, Counter>,
    reloads: Family<Label, Counter>,
    queue_wait: Histogram,
    first_token: Histogram,
    between_tokens: Histogram,
    move_gap: Histogram,
    job_time: Histogram,
    start_time: Histogram,
    gauges: Gauges,
}

/// Taken from the status when someone looks.
#[derive(Debug, Default)]
struct Gauges {
    health: Family<Label, Gauge>,
    slots: Family<Label, Gauge>,
    queued: Gauge,
    queue_max: Gauge,
    uptime: Gauge<f64, std::sync::atomic::AtomicU64>,
    jobs_of_slot: Family<Label, Gauge>,
    kv_used: Family<Label, Gauge>,
    kv_max: Family<Label, Gauge>,
    durable_jobs: Family<Label, Gauge>,
    usage: UsageMetrics,
    resident: Gauge,
    open_fds: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("bitnetd"),
            jobs_ended: Family::default(),
            jobs_refused: Family::default(),
            tokens: Counter::default(),
            moves: Counter::default(),
            starts: Counter::default(),
            exits: Family::default(),
            restarts: Family::default(),
            reloads: Family::default(),
            queue_wait: Histogram::new(WAIT_BUCKETS),
            first_token: Histogram::new(WAIT_BUCKETS),
            between_tokens: Histogram::new(TOKEN_BUCKETS),
            move_gap: Histogram::new(WAIT_BUCKETS),
            job_time: Histogram::new(JOB_BUCKETS),
            start_time: Histogram::new(WAIT_BUCKETS),
            gauges: Gauges::default(),
        };
        metrics.register_counters();
        metrics.register_histograms();
        metrics.gauges.register(&mut metrics.registry);
        metrics
    }
}

impl Metrics {
    fn register_counters(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "jobs_ended",
            "Jobs that ended, by how: done, or the code of their error",
            self.jobs_ended.clone(),
        );
        registry.register("jobs_refused", "Jobs refused at the door, by code", self.jobs_refused.clone());
        registry.register("tokens_generated", "Tokens delivered to clients", self.tokens.clone());
        registry.register("jobs_moved", "Times a job went on on another worker", self.moves.clone());
        registry.register("worker_starts", "Worker processes started", self.starts.clone());
        registry.register("worker_exits", "Worker processes that ended, by cause", self.exits.clone());
        registry.register(
            "worker_restarts",
            "Worker processes that are started again, by the cause of the last one's end",
            self.restarts.clone(),
        );
        registry.register(
            "reloads",
            "Reloads of the configuration, by outcome: done, or the code of the error",
            self.reloads.clone(),
        );
    }

    fn register_histograms(&mut self) {
        let mut seconds = |name: &str, help: &str, histogram: &Histogram| {
            self.registry.register(format!("{name}_seconds"), help, histogram.clone());
        };
        seconds("queue_wait", "From acceptance of a job to its first worker", &self.queue_wait);
        seconds("time_to_first_token", "From acceptance of a job to its first token", &self.first_token);
        seconds("inter_token", "Between two tokens of a job that did not move", &self.between_tokens);
        seconds(
            "move_gap",
            "Between two tokens of a job that moved to another worker between them",
            &self.move_gap,
        );
        seconds("job", "From acceptance of a job to its end", &self.job_time);
        seconds("worker_load", "From the start of a worker's program to ready", &self.start_time);
    }

    /// Counts what happened.
    pub(crate) fn note(&self, note: &Note) {
        match note {
            Note::WorkerReady { load_s, .. } => self.start_time.observe(*load_s),
            Note::WorkerExited { cause, .. } => count(&self.exits, "cause", cause.name()),
            Note::RestartScheduled { cause, .. } => count(&self.restarts, "cause", cause.name()),
            Note::JobDispatched { waited: Some(waited), .. } => self.queue_wait.observe(waited.as_secs_f64()),
            Note::JobDispatched { waited: None, .. } => {
                self.moves.inc();
            }
            Note::TokenCame { is_first, is_first_after_move, after } => {
                self.tokens.inc();
                self.token_histogram(*is_first, *is_first_after_move).observe(after.as_secs_f64());
            }
            Note::JobEnded { error, after, .. } => {
                self.job_time.observe(after.as_secs_f64());
                count(&self.jobs_ended, "outcome", &outcome(error.as_ref()));
            }
            Note::JobRefused { error, .. } => count(&self.jobs_refused, "code", &code_name(error.code)),
            Note::Reloaded { .. } => count(&self.reloads, "outcome", "done"),
            Note::ReloadFailed { error, .. } => count(&self.reloads, "outcome", &code_name(error.code)),
            Note::WorkerKilled { .. }
            | Note::SlotFailed { .. }
            | Note::JobFailedOver { .. }
            | Note::WorkerRetired { .. }
            | Note::Draining { .. } => {}
        }
    }

    fn token_histogram(&self, is_first: bool, is_first_after_move: bool) -> &Histogram {
        match (is_first, is_first_after_move) {
            (true, _) => &self.first_token,
            (false, true) => &self.move_gap,
            (false, false) => &self.between_tokens,
        }
    }

    /// A process was started.
    pub(crate) fn worker_started(&self) {
        self.starts.inc();
    }

    /// Everything as text, with gauges from `report`.
    pub(crate) fn render(&self, report: &StatusReport) -> String {
        self.gauges.set(report);
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            tracing::error!("metrics cannot be written as text"); // Into a string: cannot be.
        }
        text
    }
}

impl Gauges {
    fn register(&self, registry: &mut Registry) {
        registry.register("health", "1 for the state of the service, 0 for the others", self.health.clone());
        registry.register("slots", "Worker slots in each state", self.slots.clone());
        registry.register("jobs_queued", "Jobs accepted and without a worker", self.queued.clone());
        registry.register("jobs_queued_max", "Most of those there may be", self.queue_max.clone());
        registry.register("uptime_seconds", "Since the start", self.uptime.clone());
        registry.register("worker_jobs", "Jobs on a worker", self.jobs_of_slot.clone());
        registry.register("worker_kv_tokens", "Tokens in the KV cache of a worker", self.kv_used.clone());
        registry.register("worker_kv_tokens_max", "Tokens that fit in there", self.kv_max.clone());
        registry.register(
            "durable_jobs",
            "Durable jobs in each state; ended: results that are kept",
            self.durable_jobs.clone(),
        );
        self.usage.register(registry);
        let resident = self.resident.clone();
        registry.register("supervisor_resident_memory_bytes", "Of the supervisor alone", resident);
        registry.register("supervisor_open_fds", "Open files of the supervisor", self.open_fds.clone());
    }

    fn set(&self, report: &StatusReport) {
        for health in [Health::Starting, Health::Ready, Health::Degraded, Health::Draining] {
            set(&self.health, "state", &health_name(health), u64::from(health == report.health));
        }
        for state in ["starting", "ready", "retiring", "draining", "backoff", "failed", "stopped"] {
            let n = report.slots.iter().filter(|slot| slot.state == state).count();
            set(&self.slots, "state", state, n as u64);
        }
        self.queued.set(report.queued.into());
        self.queue_max.set(report.queue_max.into());
        self.uptime.set(report.uptime_s);
        for family in [&self.jobs_of_slot, &self.kv_used, &self.kv_max] {
            family.clear(); // A reload may have taken slots away.
        }
        // Of two with one number (during a reload) the one that stays comes last.
        for SlotReport { slot, jobs, load, .. } in &report.slots {
            let slot = slot.to_string();
            set(&self.jobs_of_slot, "slot", &slot, (*jobs).into());
            set(&self.kv_used, "slot", &slot, load.kv_tokens);
            set(&self.kv_max, "slot", &slot, load.kv_tokens_max);
        }
        self.usage.set(report);
        let counts = report.journal.iter();
        let counts =
            counts.flat_map(|of| [("queued", of.queued), ("running", of.running), ("ended", of.ended)]);
        for (state, n) in counts {
            set(&self.durable_jobs, "state", state, n);
        }
        self.resident.set(resident_bytes().unwrap_or(0));
        self.open_fds.set(n_open_fds().unwrap_or(0));
    }
}

fn set(family: &Family<Label, Gauge>, label: &'static str, value: &str, n: u64) {
    family.get_or_create(&[(label, value.to_owned())]).set(i64::try_from(n).unwrap_or(i64::MAX));
}

fn count(family: &Family<Label, Counter>, label: &'static str, value: &str) {
    family.get_or_create(&[(label, value.to_owned())]).inc();
}

fn outcome(error: Option<&WireError>) -> String {
    error.map_or_else(|| "done".to_owned(), |error| code_name(error.code))
}

/// The name on the wire, which is that of the metrics too.
fn code_name(code: ErrorCode) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.extend(letter.to_lowercase());
    }
    name
}

fn health_name(health: Health) -> String {
    format!("{health:?}").to_lowercase()
}

fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse::<i64>().ok().map(|kb| kb * 1024)
}

fn n_open_fds() -> Option<i64> {
    // The folder itself is open while it is read.
    i64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1)).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::report;
    use crate::state::Cause;

    #[test]
    fn codes_have_their_names_of_the_wire() {
        for code in [ErrorCode::Overloaded, ErrorCode::DeadlineExceeded, ErrorCode::InvalidRequest] {
            assert_eq!(serde_json::to_value(code).unwrap(), code_name(code));
        }
        assert_eq!(serde_json::to_value(Health::Degraded).unwrap(), health_name(Health::Degraded));
    }

    #[test]
    fn what_happened_is_in_the_text() {
        let metrics = Metrics::default();
        let ms = Duration::from_millis;
        metrics.note(&Note::JobDispatched { job: 1, slot: 0, resumed_at: 0, waited: Some(ms(7)) });
        metrics.note(&Note::TokenCame { is_first: true, is_first_after_move: false, after: ms(30) });
        metrics.note(&Note::TokenCame { is_first: false, is_first_after_move: true, after: ms(400) });
        metrics.note(&Note::RestartScheduled { slot: 0, cause: Cause::Watchdog, wait: ms(1) });
        let error = WireError::new(ErrorCode::Poisoned, "");
        metrics.note(&Note::JobEnded { job: 1, error: Some(error), n_tokens: 2, after: ms(900) });
        let text = metrics.render(&report::nothing());
        for line in [
            "bitnetd_queue_wait_seconds_bucket{le=\"0.01\"} 1",
            "bitnetd_time_to_first_token_seconds_sum 0.03",
            "bitnetd_move_gap_seconds_count 1",
            "bitnetd_inter_token_seconds_count 0",
            "bitnetd_worker_restarts_total{cause=\"watchdog\"} 1",
            "bitnetd_jobs_ended_total{outcome=\"poisoned\"} 1",
            "bitnetd_tokens_generated_total 2",
            "bitnetd_health{state=\"draining\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
