//! The [`Machine`] out of a tree of sysfs and procfs files.

use std::collections::BTreeMap;
use std::path::Path;

use bitnetd_config::cpu_list;

use crate::cgroup::CgroupLimits;
use crate::machine::{CoreKind, Cpu, Limits, Machine, Node};
use crate::tree::Tree;

const CPU: &str = "/sys/devices/system/cpu";
const NODE: &str = "/sys/devices/system/node";

impl Machine {
    /// Reads the machine below `root`, which is `/` or a recorded tree. What is missing there is left open: a
    /// sandbox that shows nothing but an affinity mask gives a machine of CPUs that share nothing we know of.
    #[must_use]
    pub fn read(root: &Path, limits: &Limits) -> Self {
        let tree = Tree::new(root);
        let affinity = limits.affinity.clone().or_else(|| affinity_of_self(tree));
        let nodes = nodes(tree);
        let mut cpus = cpus(tree, &nodes, affinity.as_deref());
        kinds(tree, &mut cpus);
        let cgroup = CgroupLimits::read(tree);
        Self {
            model_name: model_name(tree),
            cpus,
            nodes,
            affinity: affinity.map(sorted),
            cpuset: cgroup.cpuset,
            isolated: tree.cpus(&format!("{CPU}/isolated")).unwrap_or_default(),
            quota_cpus: cgroup.quota_cpus,
        }
    }
}

fn sorted(mut cpus: Vec<u32>) -> Vec<u32> {
    cpus.sort_unstable();
    cpus.dedup();
    cpus
}

fn affinity_of_self(tree: Tree<'_>) -> Option<Vec<u32>> {
    let status = tree.text("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    cpu_list::parse(line.trim()).ok().filter(|cpus| !cpus.is_empty())
}

fn model_name(tree: Tree<'_>) -> Option<String> {
    let cpuinfo = tree.text("/proc/cpuinfo")?;
    let line = cpuinfo.lines().find(|line| line.starts_with("model name") || line.starts_with("Hardware"))?;
    let name = line.split_once(':')?.1.trim();
    (!name.is_empty()).then(|| name.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
}

fn nodes(tree: Tree<'_>) -> Vec<Node> {
    let online = tree.cpus(&format!("{NODE}/online")).unwrap_or_else(|| tree.numbered(NODE, "node"));
    let read = |id: u32| {
        let dir = format!("{NODE}/node{id}");
        let distances = tree.text(&format!("{dir}/distance")).unwrap_or_default();
        Node {
            id,
            cpus: tree.cpus(&format!("{dir}/cpulist")).unwrap_or_default(),
            memory_bytes: tree.text(&format!("{dir}/meminfo")).and_then(|text| mem_total(&text)),
            distances: distances.split_ascii_whitespace().filter_map(|field| field.parse().ok()).collect(),
        }
    };
    let is_there = |id: &u32| tree.exists(&format!("{NODE}/node{id}"));
    online.into_iter().filter(is_there).map(read).collect()
}

fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.contains("MemTotal:"))?;
    let kib: u64 = line.split_once("MemTotal:")?.1.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Every CPU: the possible ones that have a directory, else what `online`, the mask or `/proc/stat` tells.
fn cpus(tree: Tree<'_>, nodes: &[Node], affinity: Option<&[u32]>) -> Vec<Cpu> {
    let shown = tree.numbered(CPU, "cpu");
    let online = tree.cpus(&format!("{CPU}/online")).filter(|online| !online.is_empty());
    let known = [Some(shown), online.clone(), affinity.map(<[u32]>::to_vec), Some(cpus_of_stat(tree))];
    let ids = known.into_iter().flatten().find(|ids| !ids.is_empty()).unwrap_or_else(|| vec![0]);
    let cpus = sorted(ids).into_iter().map(|id| {
        let is_online = online.as_ref().is_none_or(|online| online.binary_search(&id).is_ok());
        cpu(tree, nodes, id, is_online)
    });
    cpus.collect()
}

fn cpus_of_stat(tree: Tree<'_>) -> Vec<u32> {
    let stat = tree.text("/proc/stat").unwrap_or_default();
    let first_words = stat.lines().filter_map(|line| line.split_ascii_whitespace().next());
    first_words.filter_map(|word| word.strip_prefix("cpu")?.parse().ok()).collect()
}

fn cpu(tree: Tree<'_>, nodes: &[Node], id: u32, online: bool) -> Cpu {
    let dir = format!("{CPU}/cpu{id}");
    let topology = |file: &str| format!("{dir}/topology/{file}");
    let lowest = |cpus: Vec<u32>| cpus.contains(&id).then(|| cpus.first().copied()).flatten();
    let siblings =
        tree.cpus(&topology("core_cpus_list")).or_else(|| tree.cpus(&topology("thread_siblings_list")));
    let (mut l2, mut l3, mut l3_bytes) = (None, None, None);
    for idx in tree.numbered(&format!("{dir}/cache"), "index") {
        let cache = |file: &str| format!("{dir}/cache/index{idx}/{file}");
        let shared = tree.cpus(&cache("shared_cpu_list")).and_then(lowest);
        let holds_instructions_only = tree.text(&cache("type")).is_some_and(|kind| kind == "Instruction");
        match tree.value::<u32>(&cache("level")) {
            Some(2) if !holds_instructions_only => l2 = shared,
            Some(3) => {
                l3 = shared;
                l3_bytes = tree.text(&cache("size")).and_then(|text| size_bytes(&text));
            }
            _ => {}
        }
    }
    // Negative numbers stand for "unknown" and count as the only one there is.
    let number = |file: &str| tree.value::<u32>(&topology(file)).unwrap_or(0);
    Cpu {
        id,
        online,
        package: number("physical_package_id"),
        die: number("die_id"),
        core: siblings.and_then(lowest).unwrap_or(id),
        l2,
        l3,
        l3_bytes,
        node: nodes.iter().find(|node| node.cpus.binary_search(&id).is_ok()).map(|node| node.id),
        kind: CoreKind::default(),
        khz_max: tree.value(&format!("{dir}/cpufreq/cpuinfo_max_freq")),
    }
}

/// `32768K`, `32M`.
fn size_bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text.get(digits.len()..)? {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// Fills in the kinds of core: what the kernel says outright (Intel's hybrid PMUs), else the capacities of ARM's
/// device tree, else frequencies that are far apart.
fn kinds(tree: Tree<'_>, cpus: &mut [Cpu]) {
    let pmu = |name: &str| tree.cpus(&format!("/sys/devices/{name}/cpus")).unwrap_or_default();
    let (core, atom, low_power) = (pmu("cpu_core"), pmu("cpu_atom"), pmu("cpu_lowpower"));
    let others_known = !atom.is_empty() || !low_power.is_empty();
    if others_known && !core.is_empty() {
        let is_atom = |cpu: &Cpu| atom.contains(&cpu.id) && cpu.online;
        let atoms_have_l3 = cpus.iter().any(|cpu| is_atom(cpu) && cpu.l3.is_some());
        let atom_khz = cpus.iter().filter(|cpu| is_atom(cpu)).filter_map(|cpu| cpu.khz_max).max();
        for cpu in cpus.iter_mut() {
            let is_apart = (atoms_have_l3 && cpu.l3.is_none()) || is_far_below(cpu.khz_max, atom_khz);
            if low_power.contains(&cpu.id) || (is_atom(cpu) && is_apart) {
                cpu.kind = CoreKind::LowPower;
            } else if atom.contains(&cpu.id) {
                cpu.kind = CoreKind::Efficiency;
            }
        }
        return;
    }
    let capacities: BTreeMap<u32, u64> = cpus
        .iter()
        .filter_map(|cpu| Some((cpu.id, tree.value(&format!("{CPU}/cpu{}/cpu_capacity", cpu.id))?)))
        .collect();
    let speed = |cpu: &Cpu| {
        if capacities.is_empty() { cpu.khz_max } else { capacities.get(&cpu.id).copied() }
    };
    let fastest = cpus.iter().filter_map(speed).max();
    for cpu in cpus.iter_mut() {
        if is_far_below(speed(cpu), fastest) {
            cpu.kind = CoreKind::Efficiency;
        }
    }
}

/// Whether a speed is below three quarters of the highest. Favoured cores of one kind differ by far less, and kinds
/// of core by more.
fn is_far_below(speed: Option<u64>, fastest: Option<u64>) -> bool {
    matches!((speed, fastest), (Some(speed), Some(fastest)) if speed < fastest / 4 * 3)
}
