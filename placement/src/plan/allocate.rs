//! Which CPUs each worker gets, given how many: whole groups where they fit, neighbours where they do not.
//!
//! A worker is placed by walking down the tree of what CPUs share: memory node, L3, kind of core, L2, core. Where some
//! group has room for all of its threads it goes into one of those, the one with most room, so that workers
//! spread over nodes and caches. Where none has, it takes as few groups as it can.

use std::collections::{BTreeMap, BTreeSet};

use bitnetd_config::SmtPolicy;

use super::pool::{Pool, first_siblings};
use crate::machine::{CoreKind, Cpu, Machine};

/// Levels of the tree of what CPUs share, from far to near.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Node,
    L3,
    Kind,
    L2,
    Core,
}

impl Level {
    /// The next nearer level.
    fn below(self) -> Option<Self> {
        match self {
            Self::Node => Some(Self::L3),
            Self::L3 => Some(Self::Kind),
            Self::Kind => Some(Self::L2),
            Self::L2 => Some(Self::Core),
            Self::Core => None,
        }
    }

    /// What names the group of `cpu` at this level. CPUs without a cache that can be seen share one group of their
    /// die (L3), or are their own (L2).
    fn key(self, cpu: &Cpu) -> (u32, u32, u32) {
        match self {
            Self::Node => (0, 0, cpu.node.unwrap_or(0)),
            Self::L3 => l3_key(cpu),
            Self::Kind => (0, 0, cpu.kind as u32),
            Self::L2 => (0, 0, cpu.l2.unwrap_or(cpu.core)),
            Self::Core => (0, 0, cpu.core),
        }
    }
}

/// What names the L3 of a CPU.
pub(super) fn l3_key(cpu: &Cpu) -> (u32, u32, u32) {
    (cpu.package, cpu.die, cpu.l3.unwrap_or(u32::MAX))
}

/// CPU sets of the given sizes, disjoint; the sum of the sizes is at most the pool. Fast cores come first, then
/// neighbours stand together.
pub(super) fn allocate(pool: &Pool<'_>, sizes: &[usize]) -> Vec<Vec<u32>> {
    let mut sets = choose(pool, sizes);
    sets.sort_by_cached_key(|set| {
        let cpus = set.iter().filter_map(|id| pool.machine.cpu(*id));
        cpus.map(|cpu| (cpu.kind, cpu.node, l3_key(cpu), cpu.id)).min()
    });
    sets
}

fn choose(pool: &Pool<'_>, sizes: &[usize]) -> Vec<Vec<u32>> {
    let needed: usize = sizes.iter().sum();
    let fast = pool.without_low_power();
    let candidates = if needed <= fast.len() { fast } else { pool.cpus.clone() };
    let mut whole = place(pool.machine, &candidates, sizes, pool.smt);
    if pool.smt == SmtPolicy::Spread {
        let single = first_siblings(&candidates);
        if needed <= single.len() {
            let spread = place(pool.machine, &single, sizes, pool.smt);
            if n_straddling(pool.machine, &spread) <= n_straddling(pool.machine, &whole) {
                return spread;
            }
        }
        spread_siblings(&candidates, pool.machine, &mut whole);
    }
    whole
}

/// How many workers are on several nodes, and on several L3s.
pub(super) fn n_straddling(machine: &Machine, sets: &[Vec<u32>]) -> (usize, usize) {
    let several = |set: &[u32], level: Level| {
        let keys: BTreeSet<_> =
            set.iter().filter_map(|id| machine.cpu(*id)).map(|cpu| level.key(cpu)).collect();
        keys.len() > 1
    };
    let count = |level| sets.iter().filter(|set| several(set, level)).count();
    (count(Level::Node), count(Level::L3))
}

fn place(machine: &Machine, candidates: &[&Cpu], sizes: &[usize], smt: SmtPolicy) -> Vec<Vec<u32>> {
    let mut free: Vec<&Cpu> = candidates.to_vec();
    let mut sets = Vec::with_capacity(sizes.len());
    let picker = Picker { machine, smt };
    for &size in sizes {
        let mut taken = Vec::with_capacity(size);
        picker.pick(&free, size, Level::Node, &mut taken);
        free.retain(|cpu| !taken.contains(&cpu.id));
        sets.push(taken);
    }
    sets
}

struct Picker<'m> {
    machine: &'m Machine,
    smt: SmtPolicy,
}

impl Picker<'_> {
    /// Takes `n` of the CPUs of `free` into `taken`.
    fn pick(&self, free: &[&Cpu], n: usize, level: Level, taken: &mut Vec<u32>) {
        let mut groups: BTreeMap<_, Vec<&Cpu>> = BTreeMap::new();
        for cpu in free {
            groups.entry(level.key(cpu)).or_default().push(cpu);
        }
        let mut groups: Vec<Vec<&Cpu>> = groups.into_values().collect();
        let mut left = n.min(free.len());
        if let Some(idx) = self.roomy(&groups, left, level) {
            return self.descend(&groups[idx], left, level, taken);
        }
        let mut home = None;
        while left > 0 && !groups.is_empty() {
            let idx = match level {
                Level::Kind => 0,
                _ => self.next_group(&groups, left, home),
            };
            let group = groups.remove(idx);
            home = home.or(group.first().and_then(|cpu| cpu.node));
            let part = left.min(group.len());
            self.descend(&group, part, level, taken);
            left -= part;
        }
    }

    fn descend(&self, group: &[&Cpu], n: usize, level: Level, taken: &mut Vec<u32>) {
        match level.below() {
            Some(below) if n < group.len() => self.pick(group, n, below, taken),
            _ => taken.extend(group.iter().take(n).map(|cpu| cpu.id)),
        }
    }

    /// The group that has room for `n`: of the fastest kind of core, then with most room. Not asked for kinds, which
    /// are used up from the fastest on.
    fn roomy(&self, groups: &[Vec<&Cpu>], n: usize, level: Level) -> Option<usize> {
        if level == Level::Kind {
            return None;
        }
        let fits = groups.iter().enumerate().filter(|(_, group)| group.len() >= n);
        let tightest_first = level == Level::Core && self.smt == SmtPolicy::Pack;
        let key = |(idx, group): &(usize, &Vec<&Cpu>)| {
            let room = if tightest_first { group.len() } else { usize::MAX - group.len() };
            (fastest_kind(group), room, *idx)
        };
        fits.min_by_key(key).map(|(idx, _)| idx)
    }

    /// Where a worker that fits nowhere goes on: the tightest group that takes the rest, else the largest, and of
    /// equal ones the nearest to where it began.
    fn next_group(&self, groups: &[Vec<&Cpu>], n: usize, home: Option<u32>) -> usize {
        let key = |(idx, group): &(usize, &Vec<&Cpu>)| {
            let takes_all = group.len() >= n;
            let room = if takes_all { group.len() } else { usize::MAX - group.len() };
            (self.distance(home, group), !takes_all, fastest_kind(group), room, *idx)
        };
        groups.iter().enumerate().min_by_key(key).map_or(0, |(idx, _)| idx)
    }

    fn distance(&self, home: Option<u32>, group: &[&Cpu]) -> u32 {
        let there = group.first().and_then(|cpu| cpu.node);
        let (Some(home), Some(there)) = (home, there) else { return 0 };
        let idx = self.machine.nodes.iter().position(|node| node.id == there);
        let from = self.machine.nodes.iter().find(|node| node.id == home);
        from.zip(idx).and_then(|(from, idx)| from.distances.get(idx).copied()).unwrap_or(0)
    }
}

fn fastest_kind(group: &[&Cpu]) -> CoreKind {
    group.iter().map(|cpu| cpu.kind).min().unwrap_or_default()
}

/// Moves second siblings to cores that nobody uses, of the same kind and L3, one worker after the other.
fn spread_siblings(candidates: &[&Cpu], machine: &Machine, sets: &mut [Vec<u32>]) {
    let mut used_cores: BTreeSet<u32> =
        sets.iter().flatten().filter_map(|id| machine.cpu(*id)).map(|cpu| cpu.core).collect();
    let place_of = |cpu: &Cpu| (cpu.node, l3_key(cpu), cpu.kind);
    let mut moved = true;
    while moved {
        moved = false;
        for set in sets.iter_mut() {
            let mut cores = BTreeSet::new();
            let doubled =
                set.iter().position(|id| machine.cpu(*id).is_some_and(|cpu| !cores.insert(cpu.core)));
            let Some(position) = doubled else { continue };
            let Some(from) = set.get(position).and_then(|id| machine.cpu(*id)) else { continue };
            let is_free = |to: &&&Cpu| !used_cores.contains(&to.core) && place_of(to) == place_of(from);
            let Some(to) = candidates.iter().find(is_free) else { continue };
            used_cores.insert(to.core);
            set[position] = to.id;
            moved = true;
        }
    }
}
