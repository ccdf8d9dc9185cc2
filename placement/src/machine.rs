//! The machine: CPUs with their cores, caches and kinds, memory nodes, and what of it is ours.

use serde::Serialize;

/// What the caller knows about this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPUs in our affinity mask; `None` reads `/proc/self/status` of the tree.
    pub affinity: Option<Vec<u32>>,
}

/// The machine, as far as it can be seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Machine {
    /// Name of the processor.
    pub model_name: Option<String>,
    /// Every CPU the kernel knows, ascending, offline ones included.
    pub cpus: Vec<Cpu>,
    /// Memory nodes, ascending; empty where the kernel shows none.
    pub nodes: Vec<Node>,
    /// Our affinity mask.
    pub affinity: Option<Vec<u32>>,
    /// CPUs of our control group's cpuset.
    pub cpuset: Option<Vec<u32>>,
    /// CPUs taken out of the scheduler's balancing (`isolcpus`).
    pub isolated: Vec<u32>,
    /// CPU time per time that our control group may use.
    pub quota_cpus: Option<f64>,
}

/// One CPU: a hardware thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// The kernel's number.
    pub id: u32,
    /// Whether it is online; of an offline CPU nothing else is known.
    pub online: bool,
    /// Package (socket).
    pub package: u32,
    /// Die in the package.
    pub die: u32,
    /// Core, named by its lowest CPU.
    pub core: u32,
    /// CPUs that share its L2, named by the lowest; `None` if there is no L2 to be seen.
    pub l2: Option<u32>,
    /// CPUs that share its L3, named by the lowest.
    pub l3: Option<u32>,
    /// Size of that L3.
    pub l3_bytes: Option<u64>,
    /// Memory node.
    pub node: Option<u32>,
    /// Kind of core.
    pub kind: CoreKind,
    /// Highest frequency.
    pub khz_max: Option<u64>,
}

/// Kinds of core, fastest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CoreKind {
    /// A performance core; every core of a machine with one kind.
    #[default]
    Performance,
    /// An efficiency core.
    Efficiency,
    /// An efficiency core for idle times, apart from the others and their L3.
    LowPower,
}

impl CoreKind {
    /// `P`, `E` or `LP-E`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Performance => "P",
            Self::Efficiency => "E",
            Self::LowPower => "LP-E",
        }
    }
}

/// A memory node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// The kernel's number.
    pub id: u32,
    /// Its CPUs; a node of memory alone has none.
    pub cpus: Vec<u32>,
    /// Its memory.
    pub memory_bytes: Option<u64>,
    /// Distance to each node that is online, in their order; 10 is "here".
    pub distances: Vec<u32>,
}

impl Machine {
    /// The CPU with this number.
    #[must_use]
    pub fn cpu(&self, id: u32) -> Option<&Cpu> {
        self.cpus.binary_search_by_key(&id, |cpu| cpu.id).ok().and_then(|idx| self.cpus.get(idx))
    }

    /// CPUs on which our threads may run: online, in our affinity mask and in our cpuset, without `reserve`.
    #[must_use]
    pub fn usable(&self, reserve: &[u32]) -> Vec<u32> {
        self.cpus.iter().map(|cpu| cpu.id).filter(|&id| self.why_unusable(id, reserve).is_none()).collect()
    }

    /// Why a CPU is not usable, in words; `None` if it is.
    #[must_use]
    pub fn why_unusable(&self, id: u32, reserve: &[u32]) -> Option<&'static str> {
        let outside =
            |set: &Option<Vec<u32>>| set.as_ref().is_some_and(|set| set.binary_search(&id).is_err());
        match self.cpu(id) {
            None => Some("not on this machine"),
            Some(cpu) if !cpu.online => Some("offline"),
            _ if outside(&self.cpuset) => Some("outside our cgroup's cpuset"),
            _ if outside(&self.affinity) => Some("outside our affinity mask"),
            _ if reserve.contains(&id) => Some("reserved"),
            _ => None,
        }
    }

    /// Numbers of CPUs that are online.
    #[must_use]
    pub fn online(&self) -> Vec<u32> {
        self.cpus.iter().filter(|cpu| cpu.online).map(|cpu| cpu.id).collect()
    }

    /// Whether cores of more than one kind are online.
    #[must_use]
    pub fn is_hybrid(&self) -> bool {
        let mut kinds = self.cpus.iter().filter(|cpu| cpu.online).map(|cpu| cpu.kind);
        kinds.next().is_some_and(|first| kinds.any(|kind| kind != first))
    }

    /// Memory nodes that have memory.
    #[must_use]
    pub fn n_memory_nodes(&self) -> usize {
        self.nodes.iter().filter(|node| node.memory_bytes != Some(0)).count()
    }

    /// The node whose memory is nearest to CPUs of node `id`: that node itself unless it has no memory.
    #[must_use]
    pub fn memory_node(&self, id: u32) -> Option<u32> {
        let here = self.nodes.iter().find(|node| node.id == id)?;
        if here.memory_bytes != Some(0) {
            return Some(id);
        }
        let distance = |node: &Node| {
            let idx = self.nodes.iter().position(|other| other.id == node.id)?;
            here.distances.get(idx).copied()
        };
        let with_memory = self.nodes.iter().filter(|node| node.memory_bytes.is_none_or(|bytes| bytes > 0));
        with_memory.min_by_key(|node| (distance(node).unwrap_or(u32::MAX), node.id)).map(|node| node.id)
    }
}
