//! The machine and the plan as lines of text, at most 80 columns wide.

use std::collections::{BTreeMap, BTreeSet};

use bitnetd_config::cpu_list;
use bitnetd_placement::{Cpu, Machine, Plan};

use super::owner;

/// Width of the text.
const COLUMNS: usize = 80;
/// CPUs drawn in one line.
const CELLS: usize = 32;
/// Marks of workers; a machine with more of them starts again.
const MARKS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// Package, die and L3.
type L3Key = (u32, u32, u32);

/// Everything as text.
pub(super) fn text(machine: &Machine, usable: &[u32], plan: Option<&Plan>) -> String {
    let mut lines = summary(machine, usable);
    lines.push(String::new());
    lines.extend(map(machine, usable, plan));
    lines.push(String::new());
    if let Some(plan) = plan {
        lines.push("Plan".into());
        lines.extend(plan.lines().iter().flat_map(|line| wrapped(line, "  ", "      ")));
        lines.push("Why".into());
        lines.extend(plan.reasons.iter().flat_map(|reason| wrapped(reason, "  - ", "    ")));
        if !plan.warnings.is_empty() {
            lines.push("Warnings".into());
            lines.extend(plan.warnings.iter().flat_map(|warning| wrapped(warning, "  ! ", "    ")));
        }
    }
    lines.join("\n") + "\n"
}

/// What the machine has, in a few lines.
fn summary(machine: &Machine, usable: &[u32]) -> Vec<String> {
    let online: Vec<&Cpu> = machine.cpus.iter().filter(|cpu| cpu.online).collect();
    let different = |key: fn(&Cpu) -> Option<L3Key>| {
        online.iter().filter_map(|cpu| key(cpu)).collect::<BTreeSet<_>>().len()
    };
    let counts = [
        (online.len(), "CPU"),
        (different(|cpu| Some((0, 0, cpu.core))), "core"),
        (different(|cpu| Some((0, 0, cpu.package))), "package"),
        (different(|cpu| Some((cpu.package, cpu.die, cpu.l3?))), "L3"),
        (machine.nodes.len(), "memory node"),
    ];
    let counts: Vec<String> = counts
        .into_iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, noun)| format!("{n} {noun}{}", if n == 1 { "" } else { "s" }))
        .collect();
    let mut lines =
        wrapped(machine.model_name.as_deref().unwrap_or("unknown processor"), "Machine  ", "         ");
    lines.extend(wrapped(&counts.join(", "), "Has      ", "         "));
    lines.extend(wrapped(
        &format!("{} CPUs: {}", usable.len(), cpu_list::format(usable)),
        "Usable   ",
        "         ",
    ));
    let rounded = |cpus: f64| format!("{cpus:.2}").trim_end_matches('0').trim_end_matches('.').to_owned();
    if let Some(quota) = machine.quota_cpus {
        lines.push(format!("Quota    {} CPUs of time (cgroup)", rounded(quota)));
    }
    lines
}

/// The CPUs by memory node and L3, one mark for each.
fn map(machine: &Machine, usable: &[u32], plan: Option<&Plan>) -> Vec<String> {
    let mut nodes: BTreeMap<Option<u32>, Vec<&Cpu>> = BTreeMap::new();
    for cpu in machine.cpus.iter().filter(|cpu| cpu.online) {
        nodes.entry(cpu.node).or_default().push(cpu);
    }
    let mut lines = Vec::new();
    for (node, cpus) in &nodes {
        let packages: Vec<u32> = cpus.iter().map(|cpu| cpu.package).collect();
        let memory = node.and_then(|id| machine.nodes.iter().find(|node| node.id == id)?.memory_bytes);
        let memory = memory.map_or_else(String::new, |bytes| format!(", {}", memory_words(bytes)));
        let head = node.map_or("no memory nodes".into(), |id| format!("node {id}"));
        lines.push(format!("{head}{memory}, package {}", cpu_list::format(&packages)));
        let mut groups: BTreeMap<_, Vec<&Cpu>> = BTreeMap::new();
        for cpu in cpus {
            groups.entry((cpu.package, cpu.die, cpu.l3.unwrap_or(u32::MAX), cpu.kind)).or_default().push(cpu);
        }
        for ((.., kind), cpus) in groups {
            let l3 = cpus.first().and_then(|cpu| cpu.l3.map(|_| cpu.l3_bytes));
            let l3 = l3.map_or("no L3".into(), |bytes| format!("L3 {}", bytes.map_or(String::new(), size)));
            let label = if machine.is_hybrid() { format!("{l3} {}", kind.label()) } else { l3 };
            lines.extend(rows(&label, &cpus, usable, plan));
        }
    }
    let without_cpus = machine.nodes.iter().filter(|node| node.cpus.is_empty());
    lines.extend(without_cpus.map(|node| {
        let memory = node.memory_bytes.map_or("memory".into(), memory_words);
        format!("node {}, {memory}, no CPUs", node.id)
    }));
    let offline: Vec<u32> = machine.cpus.iter().filter(|cpu| !cpu.online).map(|cpu| cpu.id).collect();
    if !offline.is_empty() {
        lines.extend(wrapped(&cpu_list::format(&offline), "offline: CPUs ", "    "));
    }
    lines.push("(digit or letter: worker; `.` free; `-` not usable; one row for each sibling)".into());
    lines
}

/// The CPUs of one group: a row for the first CPU of each core, one for the second ones; a space between L2s that
/// several cores share.
fn rows(label: &str, cpus: &[&Cpu], usable: &[u32], plan: Option<&Plan>) -> Vec<String> {
    let mut siblings: BTreeMap<usize, Vec<&Cpu>> = BTreeMap::new();
    for cpu in cpus {
        let rank = cpus.iter().filter(|other| other.core == cpu.core && other.id < cpu.id).count();
        siblings.entry(rank).or_default().push(cpu);
    }
    let cores_in =
        |l2: u32| cpus.iter().filter(|cpu| cpu.l2 == Some(l2)).map(|cpu| cpu.core).collect::<BTreeSet<_>>();
    let mut lines = Vec::new();
    for row in siblings.values().flat_map(|row| row.chunks(CELLS)) {
        let mut cells = String::new();
        let mut last_l2 = row.first().and_then(|cpu| cpu.l2);
        for cpu in row {
            if cpu.l2 != last_l2 && cpu.l2.is_some_and(|l2| cores_in(l2).len() > 1) {
                cells.push(' ');
            }
            last_l2 = cpu.l2;
            cells.push(mark(cpu.id, usable, plan));
        }
        let ids: Vec<u32> = row.iter().map(|cpu| cpu.id).collect();
        let label = if lines.is_empty() { label } else { "" };
        lines.push(format!("  {label:<15} CPUs {:<16} {cells}", cpu_list::format(&ids)));
    }
    lines
}

fn mark(cpu: u32, usable: &[u32], plan: Option<&Plan>) -> char {
    match owner(plan, cpu) {
        Some(worker) => char::from(MARKS[worker % MARKS.len()]),
        None if usable.binary_search(&cpu).is_ok() => '.',
        None => '-',
    }
}

/// `16 GiB of memory`, `no memory`.
pub(super) fn memory_words(bytes: u64) -> String {
    if bytes == 0 { "no memory".into() } else { format!("{} of memory", size(bytes)) }
}

/// A size in the largest unit that it fills.
pub(super) fn size(bytes: u64) -> String {
    let (unit, name) = [(1_u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")]
        .into_iter()
        .find(|(unit, _)| bytes >= *unit)
        .unwrap_or((1, "B"));
    format!("{} {name}", (bytes + unit / 2) / unit)
}

/// Words in lines of at most [`COLUMNS`].
fn wrapped(text: &str, first: &str, next: &str) -> Vec<String> {
    let mut lines = vec![first.to_owned()];
    let mut is_fresh = true;
    // A CPU list breaks after its commas.
    for piece in text.split_inclusive([' ', ',']) {
        let columns = |text: &str| text.chars().count();
        let Some(line) = lines.last_mut() else { break };
        if !is_fresh && columns(line) + columns(piece.trim_end()) > COLUMNS {
            let kept = line.trim_end().len();
            line.truncate(kept);
            lines.push(format!("{next}{piece}"));
        } else {
            line.push_str(piece);
        }
        is_fresh = false;
    }
    lines
}

#[cfg(test)]
pub(super) mod tests {
    use bitnetd_config::{AffinityConfig, Profile, SplitConfig};
    use bitnetd_placement::Node;

    use super::*;

    /// Two nodes with an L3 of 4 cores of 2 CPUs each.
    pub(in crate::topology) fn machine() -> Machine {
        let cpu = |id: u32| Cpu {
            id,
            online: true,
            package: 0,
            die: 0,
            core: id % 8,
            l2: Some(id % 8),
            l3: Some(id % 8 / 4 * 4),
            l3_bytes: Some(32 << 20),
            node: Some(id % 8 / 4),
            kind: bitnetd_placement::CoreKind::Performance,
            khz_max: None,
        };
        let node = |id: u32| Node {
            id,
            cpus: (0..16).filter(|cpu| cpu % 8 / 4 == id).collect(),
            memory_bytes: Some(16 << 30),
            distances: vec![10, 12],
        };
        Machine {
            model_name: Some("A Processor".into()),
            cpus: (0..16).map(cpu).collect(),
            nodes: vec![node(0), node(1)],
            quota_cpus: Some(14.5),
            ..Machine::default()
        }
    }

    #[test]
    fn machine_and_plan_fit_80_columns() {
        let machine = machine();
        let affinity = AffinityConfig { reserve: vec![0, 8], ..AffinityConfig::default() };
        let plan =
            bitnetd_placement::plan(&machine, &SplitConfig::Profile(Profile::Auto), &affinity).unwrap();
        let shown = text(&machine, &machine.usable(&affinity.reserve), Some(&plan));
        assert!(shown.lines().all(|line| line.chars().count() <= COLUMNS), "{shown}");
        insta::assert_snapshot!(shown);
    }

    #[test]
    fn long_lists_are_broken() {
        let list: Vec<String> = (0..60).map(|cpu| (2 * cpu).to_string()).collect();
        let lines = wrapped(&format!("CPUs {}", list.join(",")), "  - ", "    ");
        assert!(lines.len() > 2 && lines.iter().all(|line| line.len() <= COLUMNS), "{lines:?}");
    }
}
