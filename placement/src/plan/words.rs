//! What there is to say about a plan: reasons for what is as it should be, warnings for what is not.

use std::collections::{BTreeMap, BTreeSet};

use bitnetd_config::{Choice as _, CopyPolicy, NumaPolicy, SmtPolicy, cpu_list};

use super::WorkerPlacement;
use super::allocate::l3_key;
use super::pool::Pool;
use super::split::trim;
use crate::machine::{CoreKind, Cpu};

/// Collects sentences.
#[derive(Debug)]
pub(super) struct Words<'p, 'm> {
    pool: &'p Pool<'m>,
    pub(super) reasons: Vec<String>,
    pub(super) warnings: Vec<String>,
}

/// `1 worker`, `3 workers`.
pub(super) fn count(n: usize, noun: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{n} {noun}{plural}")
}

/// `CPU 4`, `CPUs 4-7`.
pub(super) fn cpus(cpus: &[u32]) -> String {
    let plural = if cpus.len() == 1 { "" } else { "s" };
    format!("CPU{plural} {}", cpu_list::format(cpus))
}

/// `worker 4`, `workers 4-7`.
fn workers_of(workers: &[u32]) -> String {
    let plural = if workers.len() == 1 { "" } else { "s" };
    format!("worker{plural} {}", cpu_list::format(workers))
}

/// `4 threads each`, or `1 thread` for one worker.
pub(super) fn count_each(workers: usize, threads: usize) -> String {
    let each = if workers == 1 { "" } else { " each" };
    format!("{}{each}", count(threads, "thread"))
}

impl<'p, 'm> Words<'p, 'm> {
    /// Starts with what is usable and what is not.
    pub(super) fn new(pool: &'p Pool<'m>) -> Self {
        let n_cpus = pool.machine.cpus.len();
        let unusable = pool.unusable();
        let all = if unusable.is_empty() { String::new() } else { format!(" ({})", unusable.join("; ")) };
        let mut reasons = vec![match (n_cpus, pool.n_usable) {
            (1, _) => "The machine has 1 CPU.".into(),
            (cpus, usable) if cpus == usable => format!("All {cpus} CPUs are usable."),
            (cpus, usable) => format!("{usable} of {cpus} CPUs are usable{all}."),
        }];
        if !pool.wrong_kind.is_empty() {
            reasons.push(format!("`affinity.cores` leaves out {}.", cpus(&pool.wrong_kind)));
        }
        if !pool.second_siblings.is_empty() {
            let list = cpus(&pool.second_siblings);
            reasons.push(format!("`affinity.smt = \"off\"` leaves out the second siblings, {list}."));
        }
        Self { pool, reasons, warnings: Vec::new() }
    }

    /// Adds everything about finished placements.
    pub(super) fn about(&mut self, workers: &[WorkerPlacement], numa: NumaPolicy) {
        let sets: Vec<Vec<&Cpu>> = workers
            .iter()
            .map(|worker| worker.cpus.iter().filter_map(|id| self.pool.machine.cpu(*id)).collect())
            .collect();
        self.nodes(&sets, workers, numa);
        self.caches(&sets);
        self.siblings(&sets);
        self.kinds(&sets);
        self.limits(&sets);
        self.left_over(&sets);
    }

    /// The reserved CPUs that the supervisor may use.
    pub(super) fn supervisor(&mut self, reserve: &[u32]) -> Vec<u32> {
        let is_ours = |cpu: &&u32| self.pool.machine.why_unusable(**cpu, &[]).is_none();
        let ours: Vec<u32> = reserve.iter().filter(is_ours).copied().collect();
        if !ours.is_empty() {
            self.reasons.push(format!("The supervisor itself keeps to the reserved {}.", cpus(&ours)));
        } else if !reserve.is_empty() {
            self.warnings.push(format!(
                "`affinity.reserve = \"{}\"` names no CPU that we could use: the supervisor runs on any.",
                cpu_list::format(reserve)
            ));
        }
        ours
    }

    fn nodes(&mut self, sets: &[Vec<&Cpu>], workers: &[WorkerPlacement], numa: NumaPolicy) {
        if self.pool.machine.nodes.iter().filter(|node| !node.cpus.is_empty()).count() > 1 {
            let mut all_inside = true;
            for (idx, set) in sets.iter().enumerate() {
                let nodes: BTreeSet<u32> = set.iter().filter_map(|cpu| cpu.node).collect();
                if nodes.len() > 1 {
                    all_inside = false;
                    let list = cpu_list::format(&nodes.into_iter().collect::<Vec<_>>());
                    self.warnings.push(format!(
                        "Worker {idx} is spread over the memory nodes {list}: part of its reads cross between them."
                    ));
                }
            }
            if all_inside {
                self.reasons.push("Each worker stays within one memory node.".into());
            }
        }
        let mut moved: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
        for (idx, (worker, set)) in (0..).zip(workers.iter().zip(sets)) {
            let node = set.first().and_then(|cpu| cpu.node);
            if let (&[memory], Some(node)) = (worker.memory_nodes.as_slice(), node)
                && memory != node
            {
                moved.entry((node, memory)).or_default().push(idx);
            }
        }
        for ((node, memory), idxs) in moved {
            self.reasons.push(format!(
                "Node {node} ({}) has no memory; node {memory} is the nearest that has.",
                workers_of(&idxs)
            ));
        }
        self.policies(workers, numa);
    }

    /// Where the memory of which workers is.
    fn policies(&mut self, workers: &[WorkerPlacement], numa: NumaPolicy) {
        let (placed, left): (Vec<_>, Vec<_>) =
            (0..).zip(workers).partition(|(_, worker)| !worker.memory_nodes.is_empty());
        let numbers = |of: &[(u32, &WorkerPlacement)]| of.iter().map(|(idx, _)| *idx).collect::<Vec<u32>>();
        if placed.is_empty() && numa != NumaPolicy::Off && numa != NumaPolicy::Auto {
            self.warnings.push(format!(
                "`affinity.numa = \"{}\"` has no effect: the kernel shows no memory node of the workers' CPUs.",
                numa.name()
            ));
        }
        if !placed.is_empty() {
            let is_all = left.is_empty();
            let whose = if is_all { "each worker".into() } else { workers_of(&numbers(&placed)) };
            let its = if is_all || placed.len() == 1 { "its" } else { "their" };
            let is_one = placed.iter().all(|(_, worker)| worker.memory_nodes.len() == 1);
            let noun = if is_one { "node" } else { "nodes" };
            self.reasons.push(match numa {
                NumaPolicy::Preferred => format!("The memory of {whose} prefers {its} {noun}."),
                NumaPolicy::Interleave => format!("The memory of {whose} is interleaved over {its} {noun}."),
                _ => format!("The memory of {whose} is bound to {its} {noun}."),
            });
        }
        if self.pool.machine.n_memory_nodes() > 1 && !left.is_empty() && numa == NumaPolicy::Auto {
            self.reasons.push(format!(
                "The memory of {} is left to the kernel: it lies where it is touched first.",
                workers_of(&numbers(&left))
            ));
        }
    }

    /// How often the model is in memory.
    pub(super) fn copies(&mut self, workers: &[WorkerPlacement], policy: CopyPolicy) {
        if policy == CopyPolicy::None {
            return;
        }
        let nodes: BTreeSet<u32> = workers.iter().filter_map(|worker| worker.copy_node).collect();
        let nodes: Vec<u32> = nodes.into_iter().collect();
        if self.pool.machine.n_memory_nodes() < 2 {
            self.reasons
                .push("`affinity.copies = \"node\"`: one copy, since there is one memory node.".into());
            return;
        }
        match nodes.len() {
            0 => {
                self.warnings.push(
                    "`affinity.copies = \"node\"` has no effect: no worker's memory is bound to one node.".into(),
                );
                return;
            }
            1 => self
                .reasons
                .push(format!("Node {} has its own copy of the model.", cpu_list::format(&nodes))),
            n => self.reasons.push(format!(
                "Each of the nodes {} has its own copy of the model, read by its workers alone: {n} copies in memory.",
                cpu_list::format(&nodes)
            )),
        }
        let without: Vec<u32> =
            (0..).zip(workers).filter(|(_, worker)| worker.copy_node.is_none()).map(|(idx, _)| idx).collect();
        if !without.is_empty() {
            let (verb, its) = if without.len() == 1 { ("reads", "its") } else { ("read", "their") };
            self.warnings.push(format!(
                "{} {verb} the model as the kernel has it and no node's copy, since {its} memory is not bound to one node.",
                capitalised(&workers_of(&without))
            ));
        }
    }

    fn caches(&mut self, sets: &[Vec<&Cpu>]) {
        let known: BTreeSet<_> =
            self.pool.machine.cpus.iter().filter(|cpu| cpu.online && cpu.l3.is_some()).map(l3_key).collect();
        if known.len() < 2 {
            return;
        }
        let n_l3 = |set: &[&Cpu]| set.iter().map(|cpu| l3_key(cpu)).collect::<BTreeSet<_>>().len();
        let over: Vec<u32> = (0..).zip(sets).filter(|(_, set)| n_l3(set) > 1).map(|(idx, _)| idx).collect();
        if over.is_empty() {
            self.reasons.push("Each worker stays within one L3.".into());
            return;
        }
        let mut rooms: BTreeMap<_, usize> = BTreeMap::new();
        for cpu in &self.pool.cpus {
            *rooms.entry(l3_key(cpu)).or_default() += 1;
        }
        let room = rooms.into_values().max().unwrap_or(0);
        let fits = over.iter().all(|idx| sets.get(*idx as usize).is_some_and(|set| set.len() <= room));
        let verb = if over.len() == 1 { "is" } else { "are" };
        let are = format!("{} {verb}", capitalised(&workers_of(&over)));
        if fits {
            self.warnings
                .push(format!("{are} spread over several L3s, although one would hold a worker's threads."));
        } else {
            self.reasons
                .push(format!("{are} spread over several L3s: one L3 has {} for us.", count(room, "CPU")));
        }
    }

    fn siblings(&mut self, sets: &[Vec<&Cpu>]) {
        let mut owners: BTreeMap<u32, BTreeSet<usize>> = BTreeMap::new();
        let mut threads: BTreeMap<u32, usize> = BTreeMap::new();
        for (idx, cpu) in sets.iter().enumerate().flat_map(|(idx, set)| set.iter().map(move |cpu| (idx, cpu)))
        {
            owners.entry(cpu.core).or_default().insert(idx);
            *threads.entry(cpu.core).or_default() += 1;
        }
        let split: Vec<u32> =
            owners.iter().filter(|(_, owners)| owners.len() > 1).map(|(core, _)| *core).collect();
        if !split.is_empty() {
            self.warnings.push(format!(
                "{} (of {}) {} shared by two workers, which slow each other down: threads in whole cores would avoid \
                 it.",
                count(split.len(), "core"),
                cpus(&split),
                if split.len() == 1 { "is" } else { "are" }
            ));
        }
        let has_smt = self.pool.cpus.iter().any(|cpu| cpu.id != cpu.core);
        if !has_smt {
            return;
        }
        let n_doubled = threads.values().filter(|n| **n > 1).count();
        if n_doubled == 0 {
            self.reasons.push("One thread on each core; second SMT siblings stay free.".into());
        } else if split.is_empty() {
            let why = match self.pool.smt {
                SmtPolicy::Pack => "as `affinity.smt = \"pack\"` asks",
                _ => "since there are more threads than cores for them",
            };
            self.reasons.push(format!(
                "{} both siblings busy, within one worker, {why}.",
                if n_doubled == 1 { "1 core has".into() } else { format!("{n_doubled} cores have") }
            ));
        }
    }

    fn kinds(&mut self, sets: &[Vec<&Cpu>]) {
        if !self.pool.machine.is_hybrid() {
            return;
        }
        let mut pure: BTreeMap<CoreKind, Vec<u32>> = BTreeMap::new();
        for (idx, set) in (0..).zip(sets) {
            let mut kinds: BTreeMap<CoreKind, Vec<u32>> = BTreeMap::new();
            for cpu in set {
                kinds.entry(cpu.kind).or_default().push(cpu.id);
            }
            if kinds.len() == 1 {
                kinds.into_keys().for_each(|kind| pure.entry(kind).or_default().push(idx));
                continue;
            }
            let words: Vec<String> =
                kinds.iter().map(|(kind, ids)| format!("{} ({})", kind.label(), cpus(ids))).collect();
            self.reasons.push(format!(
                "Worker {idx} mixes kinds of core, {}: its threads take work in small pieces, so the fast ones do more.",
                words.join(" and ")
            ));
            if let Some(slow) = kinds.get(&CoreKind::LowPower) {
                self.warnings.push(format!(
                    "Worker {idx} waits in every step for low-power cores, {}; `affinity.reserve = \"{}\"` leaves them \
                     out.",
                    cpus(slow),
                    cpu_list::format(slow)
                ));
            }
        }
        for (kind, idxs) in pure {
            let verb = if idxs.len() == 1 { "has" } else { "have" };
            self.reasons.push(format!(
                "{} {verb} only {} cores.",
                capitalised(&workers_of(&idxs)),
                kind.label()
            ));
        }
    }

    fn limits(&mut self, sets: &[Vec<&Cpu>]) {
        let n_threads: usize = sets.iter().map(Vec::len).sum();
        if let Some(quota) = self.pool.machine.quota_cpus
            && n_threads as f64 > quota
            && n_threads > 1
        {
            self.warnings.push(format!(
                "{n_threads} threads share a cgroup quota of {} CPUs: busy, they are all stopped for {:.0} % of the time.",
                trim(quota),
                (1.0 - quota / n_threads as f64) * 100.0
            ));
        }
        let isolated = &self.pool.machine.isolated;
        let used: Vec<u32> =
            sets.iter().flatten().map(|cpu| cpu.id).filter(|id| isolated.binary_search(id).is_ok()).collect();
        if !used.is_empty() {
            self.reasons.push(format!(
                "Isolated from the scheduler, and used because our affinity mask has them: {}.",
                cpus(&used)
            ));
        }
    }

    fn left_over(&mut self, sets: &[Vec<&Cpu>]) {
        let used: BTreeSet<u32> = sets.iter().flatten().map(|cpu| cpu.core).collect();
        let idle: Vec<u32> =
            self.pool.cpus.iter().filter(|cpu| !used.contains(&cpu.core)).map(|cpu| cpu.id).collect();
        let is_plain =
            |id: &u32| self.pool.machine.cpu(*id).is_some_and(|cpu| cpu.kind != CoreKind::LowPower);
        let idle: Vec<u32> = idle.into_iter().filter(is_plain).collect();
        if !idle.is_empty() {
            self.reasons.push(format!("The cores of {} stay free.", cpus(&idle)));
        }
    }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
