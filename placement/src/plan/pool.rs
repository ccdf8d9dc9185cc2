//! The CPUs that come into question: usable, of the kinds asked for, with or without SMT siblings.

use std::collections::BTreeMap;

use bitnetd_config::{AffinityConfig, Choice as _, CoreChoice, SmtPolicy, cpu_list};

use super::PlanError;
use crate::machine::{CoreKind, Cpu, Machine};

/// The CPUs that workers may get.
#[derive(Debug)]
pub(super) struct Pool<'m> {
    pub(super) machine: &'m Machine,
    pub(super) reserve: &'m [u32],
    pub(super) smt: SmtPolicy,
    /// Usable CPUs of every kind.
    pub(super) n_usable: usize,
    /// Those of them that workers may get, ascending.
    pub(super) cpus: Vec<&'m Cpu>,
    /// Usable CPUs left out because of `affinity.cores`.
    pub(super) wrong_kind: Vec<u32>,
    /// Usable CPUs left out because of `affinity.smt`.
    pub(super) second_siblings: Vec<u32>,
}

impl<'m> Pool<'m> {
    pub(super) fn new(machine: &'m Machine, affinity: &'m AffinityConfig) -> Result<Self, PlanError> {
        let reserve = affinity.reserve.as_slice();
        let usable: Vec<&Cpu> =
            machine.usable(reserve).into_iter().filter_map(|id| machine.cpu(id)).collect();
        let n_usable = usable.len();
        let mut pool = Self {
            machine,
            reserve,
            smt: affinity.smt,
            n_usable,
            cpus: usable,
            wrong_kind: Vec::new(),
            second_siblings: Vec::new(),
        };
        if n_usable == 0 {
            return Err(PlanError::NothingUsable {
                n_cpus: machine.cpus.len(),
                why: pool.unusable().join(", "),
            });
        }
        pool.wrong_kind = pool.leave_out(|cpu| match affinity.cores {
            CoreChoice::All => false,
            CoreChoice::Performance => cpu.kind != CoreKind::Performance,
            CoreChoice::Efficiency => cpu.kind == CoreKind::Performance,
        });
        if pool.cpus.is_empty() {
            return Err(PlanError::NoCoreOfKind { wanted: affinity.cores.name(), n_usable });
        }
        if affinity.smt == SmtPolicy::Off {
            let ranks = sibling_ranks(&pool.cpus);
            pool.second_siblings = pool.leave_out(|cpu| ranks.get(&cpu.id).is_some_and(|rank| *rank > 0));
        }
        Ok(pool)
    }

    fn leave_out(&mut self, is_out: impl Fn(&Cpu) -> bool) -> Vec<u32> {
        let (out, kept): (Vec<&Cpu>, Vec<&Cpu>) = self.cpus.iter().partition(|cpu| is_out(cpu));
        self.cpus = kept;
        out.into_iter().map(|cpu| cpu.id).collect()
    }

    /// What keeps the other CPUs of the machine out, with their numbers.
    pub(super) fn unusable(&self) -> Vec<String> {
        let mut by_reason: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for cpu in &self.machine.cpus {
            if let Some(why) = self.machine.why_unusable(cpu.id, self.reserve) {
                by_reason.entry(why).or_default().push(cpu.id);
            }
        }
        by_reason.into_iter().map(|(why, cpus)| format!("{} {why}", cpu_list::format(&cpus))).collect()
    }

    /// The pool in words, for an error: which CPUs, and where the others went.
    pub(super) fn detail(&self) -> String {
        let ids: Vec<u32> = self.cpus.iter().map(|cpu| cpu.id).collect();
        let mut parts = vec![format!("CPUs {}", cpu_list::format(&ids))];
        parts.extend(self.unusable());
        if !self.wrong_kind.is_empty() {
            parts.push(format!("{} of the other kind of core", cpu_list::format(&self.wrong_kind)));
        }
        if !self.second_siblings.is_empty() {
            parts.push(format!("{} second SMT siblings", cpu_list::format(&self.second_siblings)));
        }
        parts.join("; ")
    }

    /// The pool without low-power cores, unless it has no others.
    pub(super) fn without_low_power(&self) -> Vec<&'m Cpu> {
        let fast: Vec<&Cpu> =
            self.cpus.iter().copied().filter(|cpu| cpu.kind != CoreKind::LowPower).collect();
        if fast.is_empty() { self.cpus.clone() } else { fast }
    }

    /// The whole CPUs of the cgroup's quota, at least one; `None` without a quota.
    pub(super) fn quota_threads(&self) -> Option<usize> {
        let quota = self.machine.quota_cpus?;
        Some((1..=self.cpus.len()).take_while(|&n| n as f64 <= quota).last().unwrap_or(1))
    }
}

/// For each CPU how many of its core's CPUs come before it in `cpus`.
pub(super) fn sibling_ranks(cpus: &[&Cpu]) -> BTreeMap<u32, usize> {
    let mut seen: BTreeMap<u32, usize> = BTreeMap::new();
    cpus.iter()
        .map(|cpu| {
            let count = seen.entry(cpu.core).or_default();
            *count += 1;
            (cpu.id, *count - 1)
        })
        .collect()
}

/// The first CPU of each core.
pub(super) fn first_siblings<'m>(cpus: &[&'m Cpu]) -> Vec<&'m Cpu> {
    let ranks = sibling_ranks(cpus);
    cpus.iter().copied().filter(|cpu| ranks.get(&cpu.id) == Some(&0)).collect()
}
