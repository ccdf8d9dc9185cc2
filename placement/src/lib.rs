//! The machine as sysfs shows it, and the plan: which worker gets which CPUs and which memory node, and why.

/// Which worker gets which CPUs, and the reasons in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// One entry for each worker slot; CPU sets are disjoint.
    pub workers: Vec<WorkerPlacement>,
    /// Why it is so, one sentence each.
    pub reasons: Vec<String>,
    /// What is unwise about it, one sentence each.
    pub warnings: Vec<String>,
}

/// Where one worker runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerPlacement {
    /// CPUs, ascending; one compute thread is pinned to each.
    pub cpus: Vec<u32>,
    /// NUMA node of its memory, where that is to be bound.
    pub memory_node: Option<u32>,
}
