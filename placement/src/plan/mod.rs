//! The plan: from the machine and the configuration to disjoint CPU sets, one for each worker, with the reasons.
//!
//! Four steps: which CPUs come into question (`pool`), how many workers and threads (`split`), which CPUs each
//! worker gets (`allocate`), and what there is to say about it (`words`). The same input gives the same plan.

mod allocate;
pub(crate) mod candidates;
mod pool;
mod split;
mod words;

use std::collections::BTreeSet;

use bitnetd_config::{AffinityConfig, CopyPolicy, NumaPolicy, SplitConfig, cpu_list};
use serde::Serialize;

use self::pool::Pool;
use crate::machine::Machine;

/// Which worker gets which CPUs, and the reasons in words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// One entry for each worker slot; CPU sets are disjoint.
    pub workers: Vec<WorkerPlacement>,
    /// Reserved CPUs to which the supervisor keeps; empty lets it run anywhere.
    pub supervisor_cpus: Vec<u32>,
    /// Why it is so, one sentence each.
    pub reasons: Vec<String>,
    /// What is unwise about it, one sentence each.
    pub warnings: Vec<String>,
}

/// Where one worker runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkerPlacement {
    /// CPUs, ascending; one compute thread is pinned to each.
    pub cpus: Vec<u32>,
    /// NUMA nodes of its memory, ascending, where that is to be bound, preferred or interleaved; empty leaves it to
    /// the kernel.
    pub memory_nodes: Vec<u32>,
    /// The node whose own copy of the model it reads; `None`: it reads what all read.
    pub copy_node: Option<u32>,
}

impl WorkerPlacement {
    /// `, memory on node 0`, `, memory on nodes 0-1`, or nothing: what follows the CPUs in a sentence.
    #[must_use]
    pub fn memory_words(&self) -> String {
        let list = cpu_list::format(&self.memory_nodes);
        match self.memory_nodes.len() {
            0 => String::new(),
            1 => format!(", memory on node {list}"),
            _ => format!(", memory on nodes {list}"),
        }
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// There is no CPU to run on.
    #[error("none of the {n_cpus} CPUs can be used: {why}")]
    NothingUsable {
        /// CPUs of the machine.
        n_cpus: usize,
        /// Where they went.
        why: String,
    },
    /// `affinity.cores` leaves nothing.
    #[error("`affinity.cores = \"{wanted}\"`, and none of the {n_usable} usable CPUs is of that kind")]
    NoCoreOfKind {
        /// The kind asked for.
        wanted: &'static str,
        /// Usable CPUs of any kind.
        n_usable: usize,
    },
    /// More threads than CPUs.
    #[error(
        "{workers} workers with {threads} threads need {needed} CPUs, and {n_usable} are usable ({detail})"
    )]
    TooManyThreads {
        /// Workers asked for.
        workers: usize,
        /// Threads in each.
        threads: usize,
        /// Their product.
        needed: usize,
        /// CPUs there are for them.
        n_usable: usize,
        /// Which those are, and why no more.
        detail: String,
    },
    /// A CPU of an explicit list cannot be used.
    #[error("worker {worker} (counted from 0) cannot have CPU {cpu}: it is {why}")]
    CpuNotUsable {
        /// The worker.
        worker: usize,
        /// The CPU.
        cpu: u32,
        /// Why not.
        why: &'static str,
    },
    /// A CPU in two explicit lists.
    #[error("CPU {cpu} is given to workers {first} and {second} (counted from 0)")]
    CpuTwice {
        /// The CPU.
        cpu: u32,
        /// One worker.
        first: usize,
        /// The other.
        second: usize,
    },
    /// A worker without a CPU, or no worker.
    #[error("worker {worker} (counted from 0) has no CPU")]
    NoCpu {
        /// The worker.
        worker: usize,
    },
}

/// Divides the usable CPUs of `machine` among workers.
///
/// # Errors
/// If what is asked for cannot be had on this machine; the error names the numbers.
pub fn plan(machine: &Machine, split: &SplitConfig, affinity: &AffinityConfig) -> Result<Plan, PlanError> {
    plan_because(machine, split, affinity, None)
}

/// The same for `workers` with `threads` each that were not asked for but measured to be best; `evidence` says when, and
/// by how much.
///
/// # Errors
/// As [`plan`].
pub fn plan_as_measured(
    machine: &Machine,
    (workers, threads): (usize, usize),
    affinity: &AffinityConfig,
    evidence: &str,
) -> Result<Plan, PlanError> {
    plan_because(machine, &SplitConfig::Counts { workers, threads }, affinity, Some(evidence))
}

fn plan_because(
    machine: &Machine,
    split: &SplitConfig,
    affinity: &AffinityConfig,
    evidence: Option<&str>,
) -> Result<Plan, PlanError> {
    let pool = Pool::new(machine, affinity)?;
    let mut words = words::Words::new(&pool);
    let sets = match split {
        SplitConfig::Explicit(lists) => {
            check_explicit(&pool, lists)?;
            words
                .reasons
                .push(format!("As asked: {}, each with its CPUs.", words::count(lists.len(), "worker")));
            lists.clone()
        }
        SplitConfig::Counts { workers, threads } => {
            let needed = workers.saturating_mul(*threads);
            if *workers == 0 || *threads == 0 {
                return Err(PlanError::NoCpu { worker: 0 });
            }
            if needed > pool.cpus.len() {
                let (workers, threads, n_usable) = (*workers, *threads, pool.cpus.len());
                return Err(PlanError::TooManyThreads {
                    workers,
                    threads,
                    needed,
                    n_usable,
                    detail: pool.detail(),
                });
            }
            let size = split::workers_words(&vec![*threads; *workers]);
            words.reasons.push(match evidence {
                Some(evidence) => format!("`auto`: {size}, {evidence}"),
                None => format!("As asked: {size}."),
            });
            allocate::allocate(&pool, &vec![*threads; *workers])
        }
        SplitConfig::Profile(profile) => {
            let (sizes, reasons) = split::sizes(&pool, *profile);
            words.reasons.extend(reasons);
            allocate::allocate(&pool, &sizes)
        }
    };
    let workers: Vec<WorkerPlacement> = sets
        .into_iter()
        .map(|mut cpus| {
            cpus.sort_unstable();
            let memory_nodes = memory_nodes(machine, affinity.numa, &cpus);
            let copy_node = copy_node(machine, affinity.copies, &memory_nodes);
            WorkerPlacement { cpus, memory_nodes, copy_node }
        })
        .collect();
    let supervisor_cpus = words.supervisor(&affinity.reserve);
    words.about(&workers, affinity.numa);
    words.copies(&workers, affinity.copies);
    Ok(Plan { workers, supervisor_cpus, reasons: words.reasons, warnings: words.warnings })
}

fn check_explicit(pool: &Pool<'_>, lists: &[Vec<u32>]) -> Result<(), PlanError> {
    let mut owners = std::collections::BTreeMap::new();
    if lists.is_empty() {
        return Err(PlanError::NoCpu { worker: 0 });
    }
    for (worker, list) in lists.iter().enumerate() {
        if list.is_empty() {
            return Err(PlanError::NoCpu { worker });
        }
        for &cpu in list {
            if let Some(why) = pool.machine.why_unusable(cpu, pool.reserve) {
                return Err(PlanError::CpuNotUsable { worker, cpu, why });
            }
            if let Some(first) = owners.insert(cpu, worker) {
                return Err(PlanError::CpuTwice { cpu, first, second: worker });
            }
        }
    }
    Ok(())
}

/// The nodes on which the memory of a worker on `cpus` is to be: those of its CPUs, or the nearest with memory.
fn memory_nodes(machine: &Machine, policy: NumaPolicy, cpus: &[u32]) -> Vec<u32> {
    if policy == NumaPolicy::Off || (policy == NumaPolicy::Auto && machine.n_memory_nodes() < 2) {
        return Vec::new();
    }
    let node_of = |&cpu: &u32| machine.memory_node(machine.cpu(cpu)?.node?);
    let nodes: BTreeSet<u32> = cpus.iter().filter_map(node_of).collect();
    // Several nodes: whoever touches memory first knows best where it is needed, unless the user knows better.
    let is_left = policy == NumaPolicy::Auto && nodes.len() > 1;
    if is_left { Vec::new() } else { nodes.into_iter().collect() }
}

/// The node whose copy of the model a worker reads: the one that its memory is bound to, and no copy if that is not one.
fn copy_node(machine: &Machine, policy: CopyPolicy, memory_nodes: &[u32]) -> Option<u32> {
    match (policy, memory_nodes) {
        (CopyPolicy::Node, &[node]) if machine.n_memory_nodes() > 1 => Some(node),
        _ => None,
    }
}

impl Plan {
    /// The nodes that have a copy of the model of their own, ascending.
    #[must_use]
    pub fn copy_nodes(&self) -> BTreeSet<u32> {
        self.workers.iter().filter_map(|worker| worker.copy_node).collect()
    }

    /// How often the model is in memory.
    #[must_use]
    pub fn n_copies(&self) -> usize {
        self.copy_nodes().len() + usize::from(self.workers.iter().any(|worker| worker.copy_node.is_none()))
    }

    /// The plan as one line for each worker: `worker 0: CPUs 0-3, memory node 0`.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let line = |(idx, worker): (usize, &WorkerPlacement)| {
            let memory = worker.memory_words();
            let threads = words::count(worker.cpus.len(), "thread");
            format!("worker {idx}: {threads} on {}{memory}", words::cpus(&worker.cpus))
        };
        self.workers.iter().enumerate().map(line).collect()
    }
}
