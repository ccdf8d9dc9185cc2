//! The splits worth measuring on a machine: what `tune` sweeps.

use std::collections::BTreeSet;
use std::fmt;

use bitnetd_config::{AffinityConfig, CoreChoice, Profile, SplitConfig};
use serde::Serialize;

use super::pool::{Pool, first_siblings};
use super::{Plan, PlanError, plan, split};
use crate::machine::Machine;

/// Threads of one worker that are tried, beside all of them.
const THREADS: [usize; 16] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];
/// Most worker processes that are tried.
const WORKERS_MAX: usize = 64;
/// A split is tried only if it uses at least this share of the CPUs, in percent; one worker alone may use fewer.
const USE_PERCENT_MIN: usize = 80;

/// One way to divide the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// Worker processes.
    pub workers: usize,
    /// Compute threads in each; the most, where they differ.
    pub threads: usize,
    /// Whether it keeps to performance cores on a machine that has others.
    pub is_performance_only: bool,
    /// What runs where.
    #[serde(skip)]
    pub plan: Plan,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_performance_only { " P" } else { "" };
        f.pad(&format!("{}x{}{kind}", self.workers, self.threads))
    }
}

impl Candidate {
    /// As a configuration has it.
    #[must_use]
    pub fn split(&self) -> SplitConfig {
        SplitConfig::Counts { workers: self.workers, threads: self.threads }
    }

    /// Which cores it asks for, where `base` asks for all.
    #[must_use]
    pub fn affinity(&self, base: &AffinityConfig) -> AffinityConfig {
        let cores = if self.is_performance_only { CoreChoice::Performance } else { base.cores };
        AffinityConfig { cores, ..base.clone() }
    }
}

/// Splits to measure, the likely ones first, at most `n_max`: all CPUs, one thread on each core, performance cores
/// alone, each divided among one to many workers, and one worker with fewer threads.
///
/// # Errors
/// If no CPU can be used.
pub fn candidates(
    machine: &Machine,
    base: &AffinityConfig,
    n_max: usize,
) -> Result<Vec<Candidate>, PlanError> {
    let mut found = Found { machine, base, n_max: n_max.max(1), list: Vec::new() };
    let pool = Pool::new(machine, base)?;
    for profile in [Profile::Auto, Profile::MaxThroughput, Profile::Balanced, Profile::HighConcurrency] {
        let (sizes, _) = split::sizes(&pool, profile);
        if let (Some(&threads), true) = (sizes.first(), sizes.first() == sizes.last()) {
            found.add(sizes.len(), threads, false);
        }
    }
    let totals = totals(machine, base);
    for &(total, is_performance_only) in &totals {
        found.add(1, total, is_performance_only);
    }
    for &(total, is_performance_only) in &totals {
        for threads in THREADS.into_iter().rev().filter(|threads| *threads <= total) {
            let workers = (total / threads).min(WORKERS_MAX);
            if workers * threads * 100 >= total * USE_PERCENT_MIN {
                found.add(workers, threads, is_performance_only);
            }
        }
    }
    for &(total, is_performance_only) in &totals {
        for threads in THREADS.into_iter().rev().filter(|threads| *threads < total) {
            found.add(1, threads, is_performance_only);
        }
    }
    Ok(found.list)
}

/// How many CPUs to divide: all, one on each core, and both for performance cores alone.
fn totals(machine: &Machine, base: &AffinityConfig) -> Vec<(usize, bool)> {
    let has_choice = machine.is_hybrid() && base.cores == CoreChoice::All;
    let kinds: &[bool] = if has_choice { &[false, true] } else { &[false] };
    let mut totals = Vec::new();
    for &is_performance_only in kinds {
        let cores = if is_performance_only { CoreChoice::Performance } else { base.cores };
        let affinity = AffinityConfig { cores, ..base.clone() };
        let Ok(pool) = Pool::new(machine, &affinity) else { continue };
        let fast = pool.without_low_power();
        let quota = pool.quota_threads().unwrap_or(usize::MAX);
        let counts = BTreeSet::from([fast.len().min(quota), first_siblings(&fast).len().min(quota)]);
        totals.extend(counts.into_iter().rev().map(|total| (total, is_performance_only)));
    }
    totals
}

/// Candidates in the order in which they were thought of; two with the same CPU sets are one.
struct Found<'a> {
    machine: &'a Machine,
    base: &'a AffinityConfig,
    n_max: usize,
    list: Vec<Candidate>,
}

impl Found<'_> {
    fn add(&mut self, workers: usize, threads: usize, is_performance_only: bool) {
        if self.list.len() == self.n_max {
            return;
        }
        let candidate = Candidate { workers, threads, is_performance_only, plan: Plan::default() };
        // What cannot be had on this machine is not tried.
        let Ok(plan) = plan(self.machine, &candidate.split(), &candidate.affinity(self.base)) else { return };
        if self.list.iter().all(|other| other.plan.workers != plan.workers) {
            self.list.push(Candidate { plan, ..candidate });
        }
    }
}
