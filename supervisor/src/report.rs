//! The state in the words of the wire protocol: for `bitnetd status`, and for a worker's first message.

use std::collections::BTreeMap;
use std::time::Duration;

use bitnetd_config::{Choice, HeadChoice, cpu_list};
use bitnetd_placement::WorkerPlacement;
use bitnetd_proto::status::{Health, JOBS_REPORTED_MAX, JournalReport, SlotReport, StatusReport, Totals};
use bitnetd_proto::worker_link::WorkerSetup;

use crate::editions::Editions;
use crate::monitor::Monitor;
use crate::service::ServiceSpec;
use crate::state::{Slot, State, slot_number};

/// Name and version, as in the handshake.
pub(crate) const SERVER: &str = concat!("bitnetd/", env!("CARGO_PKG_VERSION"));

pub(crate) fn status(
    state: &State,
    editions: &Editions,
    monitor: &Monitor,
    uptime: Duration,
) -> StatusReport {
    let mut slots: Vec<&Slot> = state.slots().iter().collect();
    slots.sort_by_key(|slot| (slot_number(slot.id), slot.id));
    let slots: Vec<(&Slot, &WorkerPlacement)> =
        slots.into_iter().filter_map(|slot| Some((slot, editions.of_slot(slot.id)?.1))).collect();
    // Of two that share a CPU (during a reload) the one that stays comes last.
    let own = |(slot, placement): &(&Slot, &WorkerPlacement)| {
        let number = slot_number(slot.id);
        placement.cpus.iter().map(move |&cpu| (cpu, number)).collect::<Vec<_>>()
    };
    let slot_of: BTreeMap<u32, u32> = slots.iter().flat_map(own).collect();
    let (jobs, n_jobs_beyond) = state.job_reports(JOBS_REPORTED_MAX, uptime);
    StatusReport {
        server: SERVER.into(),
        pid: std::process::id(),
        uptime_s: uptime.as_secs_f64(),
        health: state.health(),
        model: state.model().cloned(),
        queued: u32::try_from(state.n_queued()).unwrap_or(u32::MAX),
        queue_max: editions.present().spec.config.queue.max_jobs,
        totals: state.totals(),
        journal: None,
        kept_image: None,
        slots: slots.iter().map(|(slot, placement)| slot_report(slot, placement, monitor, uptime)).collect(),
        jobs,
        n_jobs_beyond,
        cpus: monitor.cpus(&slot_of),
        usage_window_s: monitor.window_s(),
    }
}

/// The same with the journal. One that cannot be written, or that an operator must see to, makes the service degraded.
pub(crate) fn with_journal(mut report: StatusReport, journal: Option<JournalReport>) -> StatusReport {
    if report.health == Health::Ready && journal.as_ref().is_some_and(|journal| journal.problem.is_some()) {
        report.health = Health::Degraded;
    }
    report.journal = journal;
    report
}

/// The report of a service that is gone.
pub(crate) fn nothing() -> StatusReport {
    StatusReport {
        server: SERVER.into(),
        pid: std::process::id(),
        uptime_s: 0.0,
        health: Health::Draining,
        model: None,
        queued: 0,
        queue_max: 0,
        totals: Totals::default(),
        journal: None,
        kept_image: None,
        slots: Vec::new(),
        jobs: Vec::new(),
        n_jobs_beyond: 0,
        cpus: Vec::new(),
        usage_window_s: None,
    }
}

fn slot_report(slot: &Slot, placement: &WorkerPlacement, monitor: &Monitor, now: Duration) -> SlotReport {
    let (prefill_per_s, decode_per_s) = slot.rates();
    SlotReport {
        slot: slot_number(slot.id),
        state: slot.state_name().into(),
        pid: slot.pid,
        cpus: cpu_list(&placement.cpus),
        memory_nodes: cpu_list::format(&placement.memory_nodes),
        restarts: slot.restarts,
        jobs: u32::try_from(slot.n_jobs()).unwrap_or(u32::MAX),
        load: slot.load,
        load_age_s: slot.load_age(now).map(|age| age.as_secs_f64()),
        prefill_per_s,
        decode_per_s,
        resident_bytes: slot.pid.and_then(|pid| monitor.resident_bytes(pid)),
        threads: slot.pid.map_or_else(Vec::new, |pid| monitor.threads(pid)),
        confinement: slot.confinement,
        last_exit: slot.last_exit.clone(),
    }
}

pub(crate) fn worker_setup(slot: u32, spec: &ServiceSpec, placement: &WorkerPlacement) -> WorkerSetup {
    let engine = &spec.config.engine;
    let head = match spec.config.model.head {
        HeadChoice::Auto => "auto",
        HeadChoice::File => "file",
        HeadChoice::Fast => "fast",
    };
    let n_threads: usize = spec.plan.workers.iter().map(|worker| worker.cpus.len()).sum();
    WorkerSetup {
        slot,
        cpus: placement.cpus.clone(),
        model_name: spec.model.name(),
        ctx: engine.ctx.unwrap_or(0),
        max_batch: engine.max_batch,
        prefill_chunk: engine.prefill_chunk,
        prefill_ms: u32::try_from(engine.prefill_time.as_millis()).unwrap_or(u32::MAX),
        isa: engine.isa.clone(),
        head: head.into(),
        kv_type: engine.kv_type.clone(),
        wait: engine.wait.clone(),
        huge_pages: engine.huge_pages.clone(),
        speculation: engine.speculation.clone(),
        mlock: engine.mlock,
        n_workers: u32::try_from(spec.plan.workers.len()).unwrap_or(u32::MAX),
        n_threads: u32::try_from(n_threads).unwrap_or(u32::MAX),
        n_copies: u32::try_from(spec.plan.n_copies()).unwrap_or(u32::MAX),
        has_copy: placement.copy_node.is_some(),
        memory_bytes: spec.memory_bytes.unwrap_or(0),
        confinement: spec.config.security.confinement.name().into(),
    }
}

/// Ascending CPU numbers in the kernel's list form: `0-3,8`.
pub(crate) fn cpu_list(cpus: &[u32]) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(cpu) => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let show = |&(first, last): &(u32, u32)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.iter().map(show).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_the_kernels() {
        let cases: [(&[u32], &str); 4] =
            [(&[], ""), (&[3], "3"), (&[0, 1, 2, 3, 8], "0-3,8"), (&[1, 3, 5, 6], "1,3,5-6")];
        for (cpus, expected) in cases {
            assert_eq!(cpu_list(cpus), expected);
        }
    }
}
