//! `bitnetd status`, `metrics`, `drain`, `restart` and `reload`: look at the daemon and tell it what to do.

use std::fmt::Write as _;
use std::time::Duration;

use bitnetd_config::cpu_list;
use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::status::{
    CpuReport, Health, JobReport, JournalReport, KeptImageReport, KeptImageState, SlotReport, StatusReport,
    ThreadReport,
};
use bitnetd_proto::worker_link::ImageState;
use clap::Args;

use crate::answer::json_line;
use crate::daemon::SocketArgs;
use crate::error::CliError;
use crate::{terminal, top};

/// `bitnetd status`
#[derive(Debug, Args)]
#[command(after_help = "Exit code: 0 if the service is ready or draining, 1 if it starts or is degraded.")]
pub(crate) struct StatusArgs {
    /// Print the whole report as JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    socket: SocketArgs,
}

/// `bitnetd drain`
#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    socket: SocketArgs,
}

/// `bitnetd restart`
#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    /// Slot number, as `bitnetd status` shows it
    slot: u32,
    #[command(flatten)]
    socket: SocketArgs,
}

/// `bitnetd metrics`
#[derive(Debug, Args)]
#[command(
    after_help = "docs/metrics.md says what each of them means. `listen.metrics` lets Prometheus fetch them."
)]
pub(crate) struct MetricsArgs {
    #[command(flatten)]
    socket: SocketArgs,
}

/// `bitnetd reload`
#[derive(Debug, Args)]
#[command(after_help = "\
Ends when the new configuration holds (its first worker is ready; the others follow one by one) or is refused: then the\n\
old one stays, whole, and the error says why. Nothing that was accepted is lost either way.")]
pub(crate) struct ReloadArgs {
    #[command(flatten)]
    socket: SocketArgs,
}

/// Prints how the service is.
pub(crate) fn status(args: &StatusArgs) -> Result<ExitCode, CliError> {
    let report = args.socket.connect()?.status()?;
    let shown = if args.json { json_line(&report)? } else { table(&report) };
    terminal::put(shown.as_bytes())?;
    Ok(match report.health {
        Health::Ready | Health::Draining => ExitCode::Ok,
        Health::Starting | Health::Degraded => ExitCode::Failure,
    })
}

/// Prints what the service has counted and measured.
pub(crate) fn metrics(args: &MetricsArgs) -> Result<ExitCode, CliError> {
    terminal::put(args.socket.connect()?.metrics()?.as_bytes())?;
    Ok(ExitCode::Ok)
}

/// Asks the service to finish what it has and end.
pub(crate) fn drain(args: &DrainArgs) -> Result<ExitCode, CliError> {
    args.socket.connect()?.drain()?;
    Ok(ExitCode::Ok)
}

/// Asks for a new process in one slot.
pub(crate) fn restart(args: &RestartArgs) -> Result<ExitCode, CliError> {
    args.socket.connect()?.restart(args.slot)?;
    Ok(ExitCode::Ok)
}

/// Asks the service to read its configuration again; waits until it is decided.
pub(crate) fn reload(args: &ReloadArgs) -> Result<ExitCode, CliError> {
    args.socket.connect()?.reload().map_err(|error| {
        let is_refused = error.wire().is_some_and(|wire| wire.code == ErrorCode::InvalidRequest);
        let error = CliError::from(error);
        if is_refused { error.with_exit_code(ExitCode::Config) } else { error }
    })?;
    Ok(ExitCode::Ok)
}

pub(crate) fn health_name(health: Health) -> &'static str {
    match health {
        Health::Starting => "starting",
        Health::Ready => "ready",
        Health::Degraded => "degraded",
        Health::Draining => "draining",
    }
}

/// The report for people.
fn table(report: &StatusReport) -> String {
    let mut lines = String::new();
    let totals = &report.totals;
    let health = health_name(report.health);
    let up = format_age(Duration::try_from_secs_f64(report.uptime_s).unwrap_or_default());
    let mut line = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _written = writeln!(lines, "{name:<9}{value}");
    };
    line("health", format!("{health}, up {up}, pid {}, {}", report.pid, report.server));
    if let Some(model) = &report.model {
        let size = format!("{:.1} MB", mega(model.image_bytes));
        line(
            "model",
            format!(
                "{} ({}, {} parameters, {size}, context {}, {})",
                model.name,
                model.architecture,
                format_count(model.n_params),
                model.n_ctx,
                model.isa
            ),
        );
    }
    if let Some(image) = image_words(&report.slots) {
        line("image", image);
        if let Some(kept) = report.kept_image.as_ref().and_then(kept_words) {
            line("", kept);
        }
    }
    line(
        "jobs",
        format!(
            "{} waiting of {}, {} completed, {} failed, {} cancelled, {} refused",
            report.queued,
            report.queue_max,
            totals.completed,
            totals.failed,
            totals.cancelled,
            totals.refused
        ),
    );
    if let Some(journal) = &report.journal {
        let JournalReport { queued, running, ended, .. } = journal;
        let (used, all) = (mega(journal.bytes), mega(journal.bytes_max));
        line(
            "durable",
            format!(
                "{queued} waiting, {running} with workers, {ended} results kept, {used:.1} of {all:.0} MB in {}",
                journal.path
            ),
        );
        if let Some(problem) = &journal.problem {
            line("", format!("PROBLEM: {problem}"));
        }
    }
    let mut held: Vec<String> =
        report.slots.iter().filter_map(|slot| Some(slot.confinement?.to_string())).collect();
    held.sort();
    held.dedup();
    if !held.is_empty() {
        line("confined", held.join("; "));
    }
    line("repairs", format!("{} restarts, {} jobs moved", totals.restarts, totals.failovers));
    line("tokens", format!("{} generated", totals.tokens));
    lines.push('\n');
    lines.push_str(&slot_table(&report.slots));
    if !report.cpus.is_empty() {
        lines.push('\n');
        lines.push_str(&core_table(report));
    }
    lines
}

/// What decoding reads instead of the model file, and who has made it.
fn image_words(slots: &[SlotReport]) -> Option<String> {
    let bytes = slots.iter().map(|slot| slot.load.image_bytes).max()?;
    let who = |state| slots.iter().filter(move |slot| slot.pid.is_some() && slot.load.image == state);
    let n_users = slots.iter().filter(|slot| slot.pid.is_some() && slot.load.image.is_used()).count();
    let size = format!("{:.1} MB", mega(bytes));
    if let Some(maker) = who(ImageState::Making).next() {
        return Some(format!("{size}, being made by worker {}", maker.slot));
    }
    if n_users == 0 {
        return who(ImageState::Waiting).next().map(|_| format!("{size}, not made yet"));
    }
    let origin = match (who(ImageState::Made).next(), who(ImageState::Read).next()) {
        (Some(maker), _) => format!("made by worker {}", maker.slot),
        (None, Some(reader)) => format!("read from disk by worker {}", reader.slot),
        (None, None) => "made by an earlier worker".into(),
    };
    Some(format!("{size}, {origin}, in use by {n_users} of {}", slots.len()))
}

/// Where it is on disk, or why not.
fn kept_words(kept: &KeptImageReport) -> Option<String> {
    let path = &kept.path;
    match kept.state {
        KeptImageState::Absent => None,
        KeptImageState::Found | KeptImageState::Kept => Some(format!("kept in {path}")),
        KeptImageState::Writing => Some(format!("being written to {path}")),
        KeptImageState::Failed => {
            Some(format!("NOT KEPT in {path}: {}", kept.problem.as_deref().unwrap_or("no reason is known")))
        }
    }
}

fn slot_table(slots: &[SlotReport]) -> String {
    let header = ["SLOT", "STATE", "PID", "CPUS", "NODE", "JOBS", "RESTARTS", "TOKENS", "PSS", "LAST EXIT"];
    let mut rows = vec![header.map(str::to_owned)];
    let optional = |value: Option<u32>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    for slot in slots {
        rows.push([
            slot.slot.to_string(),
            slot.state.clone(),
            optional(slot.pid),
            slot.cpus.clone(),
            if slot.memory_nodes.is_empty() { "-".into() } else { slot.memory_nodes.clone() },
            slot.jobs.to_string(),
            slot.restarts.to_string(),
            slot.load.decode_tokens.to_string(),
            top::memory(slot),
            slot.last_exit.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    terminal::columns(&rows, |_| false)
}

/// Each core of a worker, with the thread that is pinned to it and the jobs that it works on.
fn core_table(report: &StatusReport) -> String {
    let header = ["CPU", "BUSY", "STOLEN", "SLOT", "THREAD", "RAN", "WAITED", "MIGRATIONS", "JOBS"];
    let mut rows = vec![header.map(str::to_owned)];
    let (owned, others): (Vec<&CpuReport>, Vec<_>) = report.cpus.iter().partition(|cpu| cpu.slot.is_some());
    for cpu in owned {
        let slot = report.slots.iter().rev().find(|slot| Some(slot.slot) == cpu.slot);
        let thread = slot.and_then(|slot| thread_on(slot, cpu.cpu));
        let jobs = jobs_on(&report.jobs, cpu.slot);
        rows.push([
            cpu.cpu.to_string(),
            percent(cpu.busy),
            percent(cpu.stolen),
            cpu.slot.map_or_else(dash, |slot| slot.to_string()),
            thread.map_or_else(dash, |thread| thread.name.clone()),
            percent(thread.and_then(|thread| thread.running)),
            percent(thread.and_then(|thread| thread.waiting)),
            thread.and_then(|thread| thread.migrations).map_or_else(dash, |n| n.to_string()),
            jobs,
        ]);
    }
    let mut shown = terminal::columns(&rows, |_| false);
    if !others.is_empty() {
        let busy: f64 = others.iter().filter_map(|cpu| cpu.busy).sum();
        // Writing to a String cannot fail.
        let _written = writeln!(shown, "CPUs of no worker: {}, of which {busy:.1} are busy", others.len());
    }
    shown
}

/// The compute thread that is pinned to a CPU: the n-th thread has the n-th CPU of its worker, whatever runs there now.
fn thread_on(slot: &SlotReport, cpu: u32) -> Option<&ThreadReport> {
    let cpus = cpu_list::parse(&slot.cpus).ok()?;
    let place = cpus.iter().position(|&of| of == cpu)?;
    slot.threads.iter().find(|thread| thread.thread.is_some_and(|thread| thread as usize == place))
}

/// `87%`, or `-` if it is not known.
pub(crate) fn percent(share: Option<f64>) -> String {
    share.map_or_else(dash, |share| format!("{:.0}%", share * 100.0))
}

/// Numbers of some of the jobs on a worker.
fn jobs_on(jobs: &[JobReport], slot: Option<u32>) -> String {
    const SHOWN_MAX: usize = 4;
    let numbers: Vec<String> =
        jobs.iter().filter(|job| job.slot == slot).map(|job| job.job.to_string()).collect();
    match numbers.len() {
        0 => dash(),
        n if n > SHOWN_MAX => format!("{} … {} more", numbers[..SHOWN_MAX].join(" "), n - SHOWN_MAX),
        _ => numbers.join(" "),
    }
}

fn dash() -> String {
    "-".to_owned()
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// `7.4M`, `2.4B`.
pub(crate) fn format_count(count: u64) -> String {
    let millions = mega(count);
    if millions >= 1000.0 { format!("{:.1}B", millions / 1000.0) } else { format!("{millions:.1}M") }
}

/// `12s`, `3m 5s`, `7h 12m`, `3d 4h`.
pub(crate) fn format_age(age: Duration) -> String {
    let seconds = age.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use bitnetd_proto::status::Totals;
    use bitnetd_proto::worker_link::{Confinement, ModelSummary, WorkerLoad};

    use super::*;

    fn slots() -> Vec<SlotReport> {
        let thread = ThreadReport {
            tid: 4244,
            name: "bnd-w0-t1".into(),
            thread: Some(1),
            cpu: Some(1),
            cpu_s: 7.5,
            wait_s: Some(0.1),
            timeslices: Some(9),
            migrations: Some(2),
            running: Some(0.876),
            waiting: Some(0.014),
        };
        let slot = SlotReport {
            slot: 0,
            state: "ready".into(),
            pid: Some(4243),
            cpus: "0-3".into(),
            memory_nodes: String::new(),
            restarts: 0,
            jobs: 2,
            load: WorkerLoad {
                decode_tokens: 512,
                image: ImageState::Made,
                image_bytes: 450_000_000,
                ..WorkerLoad::default()
            },
            load_age_s: Some(0.5),
            prefill_per_s: None,
            decode_per_s: Some(99.5),
            resident_bytes: Some(300 << 20),
            threads: vec![thread],
            confinement: Some(Confinement { landlock: 7, seccomp: true }),
            last_exit: None,
        };
        let broken = SlotReport {
            slot: 1,
            state: "backoff".into(),
            pid: None,
            cpus: "4-7".into(),
            memory_nodes: "1".into(),
            restarts: 12,
            last_exit: Some("killed by signal 9".into()),
            resident_bytes: None,
            threads: Vec::new(),
            ..slot.clone()
        };
        vec![slot, broken]
    }

    fn story() -> ModelSummary {
        ModelSummary {
            name: "story".into(),
            architecture: "bitnet-b1.58".into(),
            n_params: 7_350_000,
            n_ctx: 256,
            n_vocab: 4096,
            n_layers: 8,
            n_embd: 256,
            isa: "avx2".into(),
            head: "F16".into(),
            image_bytes: 4_200_000,
            kv_bytes: 0,
            has_chat_template: false,
            step_bytes: 1,
            token_macs: 1,
            head_macs: 1,
        }
    }

    fn report() -> StatusReport {
        let cpu = |cpu, slot| CpuReport { cpu, slot, busy: Some(0.9), stolen: Some(0.0) };
        let job = |job| JobReport {
            job,
            slot: Some(0),
            phase: "decode".into(),
            is_durable: false,
            tokens: 1,
            tokens_max: 2,
            tokens_per_s: None,
            age_s: 1.0,
        };
        StatusReport {
            server: "bitnetd/0.1.0".into(),
            pid: 4242,
            uptime_s: 3671.0,
            health: Health::Ready,
            model: Some(story()),
            queued: 3,
            queue_max: 512,
            totals: Totals {
                accepted: 20,
                completed: 17,
                restarts: 12,
                failovers: 1,
                tokens: 700,
                ..Totals::default()
            },
            journal: None,
            kept_image: None,
            slots: slots(),
            jobs: (18..23).map(job).collect(),
            n_jobs_beyond: 0,
            cpus: vec![cpu(0, Some(0)), cpu(1, Some(0)), cpu(4, Some(1)), cpu(9, None)],
            usage_window_s: Some(1.0),
        }
    }

    #[test]
    fn the_table_for_people() {
        let report = report();
        insta::assert_snapshot!(table(&report), @r#"
        health   ready, up 1h 1m, pid 4242, bitnetd/0.1.0
        model    story (bitnet-b1.58, 7.3M parameters, 4.2 MB, context 256, avx2)
        image    450.0 MB, made by worker 0, in use by 1 of 2
        jobs     3 waiting of 512, 17 completed, 0 failed, 0 cancelled, 0 refused
        confined landlock 7 and seccomp
        repairs  12 restarts, 1 jobs moved
        tokens   700 generated

        SLOT  STATE    PID   CPUS  NODE  JOBS  RESTARTS  TOKENS  PSS    LAST EXIT
        0     ready    4243  0-3   -     2     0         512     ~300M  -
        1     backoff  -     4-7   1     2     12        512     -      killed by signal 9

        CPU  BUSY  STOLEN  SLOT  THREAD     RAN  WAITED  MIGRATIONS  JOBS
        0    90%   0%      0     -          -    -       -           18 19 20 21 … 1 more
        1    90%   0%      0     bnd-w0-t1  88%  1%      2           18 19 20 21 … 1 more
        4    90%   0%      1     -          -    -       -           -
        CPUs of no worker: 1, of which 0.9 are busy
        "#);
    }

    #[test]
    fn ages_and_counts() {
        let age = |seconds| format_age(Duration::from_secs(seconds));
        assert_eq!([age(59), age(185), age(25_920), age(273_600)], ["59s", "3m 5s", "7h 12m", "3d 4h"]);
        assert_eq!([format_count(7_350_000), format_count(2_412_820_480)], ["7.3M", "2.4B"]);
    }
}
