//! Machines described in a few lines, written out as the sysfs and procfs files the kernel would show.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use bitnetd_config::cpu_list;
use bitnetd_placement::{Limits, Machine};
use tempfile::TempDir;

const CPU: &str = "/sys/devices/system/cpu";
const NODE: &str = "/sys/devices/system/node";

/// One core, with everything that is special about it.
#[derive(Clone, Debug)]
pub(crate) struct CoreSpec {
    /// CPUs of the core.
    pub cpus: Vec<u32>,
    /// Package.
    pub package: u32,
    /// Memory node.
    pub node: Option<u32>,
    /// Name of its L2, any number; cores with the same one share it.
    pub l2: u32,
    /// Name of its L3.
    pub l3: Option<u32>,
    /// `cpu_core`, `cpu_atom`: the PMU its CPUs belong to.
    pub pmu: Option<&'static str>,
    /// `cpu_capacity`.
    pub capacity: Option<u32>,
    /// `cpuinfo_max_freq`.
    pub khz: Option<u32>,
}

/// A machine to be written as a tree.
#[derive(Clone, Debug, Default)]
pub(crate) struct MachineSpec {
    /// `model name`.
    pub model: &'static str,
    /// Cores.
    pub cores: Vec<CoreSpec>,
    /// Nodes: id, memory in MiB, distances.
    pub nodes: Vec<(u32, u64, Vec<u32>)>,
    /// Offline CPUs.
    pub offline: Vec<u32>,
    /// Isolated CPUs.
    pub isolated: Vec<u32>,
    /// Affinity mask; all online CPUs if `None`.
    pub affinity: Option<Vec<u32>>,
    /// Further files: path and text.
    pub files: Vec<(&'static str, String)>,
}

impl MachineSpec {
    /// `n_cores` equal cores of `n_siblings` CPUs; siblings are numbered as x86 servers do, second ones after all
    /// first ones. `cores_per_l3` cores share an L3, `cores_per_node` cores a node (0: no nodes).
    pub(crate) fn server(n_cores: u32, n_siblings: u32, cores_per_l3: u32, cores_per_node: u32) -> Self {
        let core = |core: u32| CoreSpec {
            cpus: (0..n_siblings).map(|sibling| core + sibling * n_cores).collect(),
            package: 0,
            node: core.checked_div(cores_per_node),
            l2: core,
            l3: core.checked_div(cores_per_l3),
            pmu: None,
            capacity: None,
            khz: Some(3_500_000),
        };
        let n_nodes = n_cores.checked_div(cores_per_node).unwrap_or(0);
        let distance = |from: u32, to: u32| if from == to { 10 } else { 12 };
        Self {
            model: "Test CPU @ 3.50GHz",
            cores: (0..n_cores).map(core).collect(),
            nodes: (0..n_nodes)
                .map(|from| (from, 65_536, (0..n_nodes).map(|to| distance(from, to)).collect()))
                .collect(),
            ..Self::default()
        }
    }

    /// The nodes of package 1 further away than those of package 0: two packages with half of the cores each.
    pub(crate) fn two_packages(mut self) -> Self {
        let n_cores = self.cores.len();
        for (idx, core) in self.cores.iter_mut().enumerate() {
            core.package = u32::from(idx >= n_cores / 2);
        }
        let n_nodes = self.nodes.len();
        let package = |node: usize| node >= n_nodes / 2;
        for (from, node) in self.nodes.iter_mut().enumerate() {
            let distance = |to: usize| match (from == to, package(from) == package(to)) {
                (true, _) => 10,
                (false, true) => 12,
                (false, false) => 21,
            };
            node.2 = (0..n_nodes).map(distance).collect();
        }
        self
    }

    /// Adds a file.
    pub(crate) fn file(mut self, path: &'static str, text: &str) -> Self {
        self.files.push((path, text.to_owned()));
        self
    }

    /// CPUs that are online.
    fn online(&self) -> Vec<u32> {
        let all = self.cores.iter().flat_map(|core| core.cpus.iter().copied());
        let mut online: Vec<u32> = all.filter(|cpu| !self.offline.contains(cpu)).collect();
        online.sort_unstable();
        online
    }

    /// Online CPUs of the cores for which `matches` holds, as a list.
    fn list(&self, matches: impl Fn(&CoreSpec) -> bool) -> String {
        let cpus = self.cores.iter().filter(|core| matches(core)).flat_map(|core| core.cpus.iter().copied());
        cpu_list::format(&cpus.filter(|cpu| !self.offline.contains(cpu)).collect::<Vec<_>>())
    }

    /// Writes the tree below `root`.
    pub(crate) fn write(&self, root: &Path) {
        let mask = |online: &[u32]| cpu_list::format(self.affinity.as_deref().unwrap_or(online));
        let status = format!("Name:\tx\nCpus_allowed_list:\t{}\nMems_allowed_list:\t0", mask(&self.online()));
        write(root, "/proc/self/status", &status);
        if !self.cores.is_empty() {
            write(root, &format!("{CPU}/online"), &cpu_list::format(&self.online()));
            write(root, &format!("{CPU}/isolated"), &cpu_list::format(&self.isolated));
            write(root, "/proc/cpuinfo", &format!("processor\t: 0\nmodel name\t: {}", self.model));
        }
        for core in &self.cores {
            self.write_core(root, core);
        }
        for pmu in ["cpu_core", "cpu_atom"] {
            let cpus = self.list(|core| core.pmu == Some(pmu));
            if !cpus.is_empty() {
                write(root, &format!("/sys/devices/{pmu}/cpus"), &cpus);
            }
        }
        for (id, mib, distances) in &self.nodes {
            let dir = format!("{NODE}/node{id}");
            write(root, &format!("{dir}/cpulist"), &self.list(|core| core.node == Some(*id)));
            write(root, &format!("{dir}/meminfo"), &format!("Node {id} MemTotal:       {} kB", mib * 1024));
            let distances: Vec<String> = distances.iter().map(u32::to_string).collect();
            write(root, &format!("{dir}/distance"), &distances.join(" "));
        }
        if !self.nodes.is_empty() {
            let ids: Vec<u32> = self.nodes.iter().map(|node| node.0).collect();
            write(root, &format!("{NODE}/online"), &cpu_list::format(&ids));
        }
        for (path, text) in &self.files {
            write(root, path, text);
        }
    }

    fn write_core(&self, root: &Path, core: &CoreSpec) {
        let caches = [
            (2, "2048K", self.list(|other| other.l2 == core.l2)),
            (3, "32768K", self.list(|other| core.l3.is_some() && other.l3 == core.l3)),
        ];
        for cpu in &core.cpus {
            let dir = format!("{CPU}/cpu{cpu}");
            if self.offline.contains(cpu) {
                write(root, &format!("{dir}/online"), "0");
                continue;
            }
            write(root, &format!("{dir}/topology/physical_package_id"), &core.package.to_string());
            write(
                root,
                &format!("{dir}/topology/core_cpus_list"),
                &self.list(|other| other.cpus == core.cpus),
            );
            for (level, size, shared) in caches.iter().filter(|(_, _, shared)| !shared.is_empty()) {
                let cache = format!("{dir}/cache/index{level}");
                write(root, &format!("{cache}/level"), &level.to_string());
                write(root, &format!("{cache}/size"), size);
                write(root, &format!("{cache}/shared_cpu_list"), shared);
            }
            if let Some(capacity) = core.capacity {
                write(root, &format!("{dir}/cpu_capacity"), &capacity.to_string());
            }
            if let Some(khz) = core.khz {
                write(root, &format!("{dir}/cpufreq/cpuinfo_max_freq"), &khz.to_string());
            }
        }
    }

    /// The machine as it is read from its tree.
    pub(crate) fn machine(&self) -> Machine {
        // Thousands of small files: in memory, where the system has such a place, or the disk takes most of the time.
        let dir = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap();
        self.write(dir.path());
        Machine::read(dir.path(), &Limits::default())
    }
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path.trim_start_matches('/'));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, format!("{text}\n")).unwrap();
}

/// A machine by its name, read once for all tests.
pub(crate) fn named_machine(name: &str) -> Machine {
    static MACHINES: Mutex<BTreeMap<String, Machine>> = Mutex::new(BTreeMap::new());
    let mut machines = MACHINES.lock().unwrap();
    machines.entry(name.to_owned()).or_insert_with(|| named(name).machine()).clone()
}

/// A core of one CPU list, with everything shared, in one package and node.
fn core(cpus: &[u32], l2: u32) -> CoreSpec {
    let (pmu, capacity, khz) = (None, None, None);
    CoreSpec { cpus: cpus.to_vec(), package: 0, node: Some(0), l2, l3: Some(0), pmu, capacity, khz }
}

fn laptop() -> MachineSpec {
    let hybrid = |spec: CoreSpec, pmu, khz| CoreSpec { pmu: Some(pmu), khz: Some(khz), ..spec };
    let performance = [core(&[0, 1], 0), core(&[2, 3], 1)].map(|spec| hybrid(spec, "cpu_core", 4_800_000));
    let efficiency = (4..12).map(|cpu| hybrid(core(&[cpu], 2 + cpu / 4), "cpu_atom", 3_800_000));
    let apart = |cpu| CoreSpec { l3: None, ..core(&[cpu], 9) };
    let low_power = (12..14).map(|cpu| hybrid(apart(cpu), "cpu_atom", 2_100_000));
    MachineSpec {
        model: "Intel(R) Core(TM) Ultra 5 125U",
        cores: performance.into_iter().chain(efficiency).chain(low_power).collect(),
        nodes: vec![(0, 32_768, vec![10])],
        ..MachineSpec::default()
    }
}

fn arm() -> MachineSpec {
    let arm = |cpu: u32, capacity: u32| {
        let l2 = u32::from(capacity > 500);
        CoreSpec { capacity: Some(capacity), l3: None, node: None, ..core(&[cpu], l2) }
    };
    let cores = (0..4).map(|cpu| arm(cpu, 446)).chain((4..8).map(|cpu| arm(cpu, 1024))).collect();
    MachineSpec { cores, ..MachineSpec::default() }
}

/// Machines by name.
pub(crate) fn named(name: &str) -> MachineSpec {
    match name {
        "laptop 2P+8E+2LP-E" => laptop(),
        "ARM big.LITTLE" => arm(),
        "6 cores 12 threads" => {
            let mut spec = MachineSpec::server(6, 2, 6, 6);
            spec.model = "AMD Ryzen 5 5600";
            spec
        }
        "EPYC 12 CCDs NPS4" => {
            let mut spec = MachineSpec::server(96, 2, 8, 24);
            spec.model = "AMD EPYC 9654 96-Core Processor";
            spec
        }
        "EPYC 12 CCDs NPS1" => {
            let mut spec = MachineSpec::server(96, 1, 8, 96);
            spec.model = "AMD EPYC 9654 96-Core Processor";
            spec
        }
        "2 Xeons with SNC" => {
            let mut spec = MachineSpec::server(64, 2, 32, 16).two_packages();
            spec.model = "Intel(R) Xeon(R) Platinum 8562Y+";
            spec
        }
        "offline CPUs" => {
            let mut spec = MachineSpec::server(8, 2, 8, 8);
            spec.offline = vec![3, 8, 9, 10, 11, 12, 13, 14, 15];
            spec
        }
        "container with 3.5 CPUs" => MachineSpec::server(16, 2, 8, 16)
            .file("/proc/self/cgroup", "0::/")
            .file("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids")
            .file("/sys/fs/cgroup/cpu.max", "350000 100000")
            .file("/sys/fs/cgroup/cpuset.cpus.effective", "0-31"),
        "CPU-less nodes" => {
            // Two sockets; node 1 has no memory of its own, nodes 2 and 3 are memory alone (CXL).
            let mut spec = MachineSpec::server(16, 1, 8, 8);
            spec.nodes = vec![
                (0, 65_536, vec![10, 20, 14, 24]),
                (1, 0, vec![20, 10, 24, 14]),
                (2, 131_072, vec![14, 24, 10, 28]),
                (3, 131_072, vec![24, 14, 28, 10]),
            ];
            spec
        }
        "1 CPU" => MachineSpec::server(1, 1, 1, 1),
        "192 cores 8 nodes" => MachineSpec::server(192, 1, 8, 24).two_packages(),
        "no topology" => MachineSpec { affinity: Some((0..4).collect()), ..Default::default() },
        other => panic!("no machine `{other}`"),
    }
}

/// The names of all machines.
pub(crate) const NAMES: [&str; 12] = [
    "laptop 2P+8E+2LP-E",
    "6 cores 12 threads",
    "EPYC 12 CCDs NPS4",
    "EPYC 12 CCDs NPS1",
    "2 Xeons with SNC",
    "ARM big.LITTLE",
    "offline CPUs",
    "container with 3.5 CPUs",
    "CPU-less nodes",
    "1 CPU",
    "192 cores 8 nodes",
    "no topology",
];
