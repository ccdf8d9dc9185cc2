//! How many workers with how many threads: what a profile comes to on this machine.

use std::collections::BTreeMap;

use bitnetd_config::{Profile, SmtPolicy};

use super::allocate;
use super::pool::{Pool, first_siblings};
use super::words::{count, count_each, cpus};
use crate::machine::Cpu;

/// `auto` divides a node with more threads than this: each token has some two hundred joins of all threads of a
/// worker, and their cost grows with the threads.
const AUTO_THREADS_MAX: usize = 32;

/// Threads of each worker, largest first, and why.
pub(super) fn sizes(pool: &Pool<'_>, profile: Profile) -> (Vec<usize>, Vec<String>) {
    let fast = pool.without_low_power();
    let quota = pool.quota_threads();
    let n = quota.map_or(fast.len(), |quota| quota.min(fast.len()));
    let (sizes, reason) = match profile {
        Profile::Auto => auto(pool, &fast, quota),
        Profile::MaxThroughput => {
            (vec![n], format!("`max-throughput`: one worker with {}.", count(n, "thread")))
        }
        Profile::HighConcurrency => {
            let sizes = divide(&fast, n, (n / 2).max(1));
            let words = format!("`high-concurrency`: {}.", workers_words(&sizes));
            (sizes, words)
        }
        Profile::Balanced => near(pool, &fast, n, "balanced", 3.0 / 4.0),
        Profile::LowLatency => near(pool, &fast, n, "low-latency", 4.0 / 3.0),
    };
    let mut reasons = vec![reason];
    let low_power: Vec<u32> =
        pool.cpus.iter().map(|cpu| cpu.id).filter(|id| fast.iter().all(|cpu| cpu.id != *id)).collect();
    if !low_power.is_empty() {
        reasons.push(format!(
            "The low-power cores ({}) stay free: they are slow and apart from the L3, and every step would wait \
             for them.",
            cpus(&low_power)
        ));
    }
    if let (Some(quota), Some(time)) = (quota, pool.machine.quota_cpus)
        && sizes.iter().sum::<usize>() == quota
        && quota < fast.len()
    {
        let cpus = if (time - 1.0).abs() < 1e-9 { "CPU" } else { "CPUs" };
        reasons.push(format!(
            "The cgroup's quota is {} {cpus} of time, so {} at most: with more, all of them would be stopped in every \
             period.",
            trim(time),
            count(quota, "thread")
        ));
    }
    (sizes, reasons)
}

/// A number with at most two digits after the point.
pub(super) fn trim(number: f64) -> String {
    let text = format!("{number:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// One worker for each node, more on large nodes.
fn auto(pool: &Pool<'_>, fast: &[&Cpu], quota: Option<usize>) -> (Vec<usize>, String) {
    let singles = if pool.smt == SmtPolicy::Pack { fast.to_vec() } else { first_siblings(fast) };
    let mut nodes: BTreeMap<u32, usize> = BTreeMap::new();
    for cpu in &singles {
        *nodes.entry(cpu.node.unwrap_or(0)).or_default() += 1;
    }
    let mut rooms: Vec<usize> = nodes.into_values().collect();
    rooms.sort_unstable_by(|a, b| b.cmp(a));
    let smt = if singles.len() < fast.len() {
        " One thread on each core: siblings share its arithmetic units."
    } else {
        ""
    };
    if let Some(quota) = quota.filter(|quota| *quota < singles.len()) {
        // As few nodes as hold the quota, and the threads spread evenly over them.
        let mut room = 0;
        let n_nodes = rooms.iter().take_while(|here| {
            let needed = room < quota;
            room += **here;
            needed
        });
        let n_nodes = n_nodes.count().max(1);
        let sizes = spread(quota, n_nodes.max(quota.div_ceil(AUTO_THREADS_MAX)));
        return (sizes, format!("`auto`: as few workers as hold the threads of the quota.{smt}"));
    }
    let n_nodes = rooms.len();
    let mut sizes: Vec<usize> =
        rooms.into_iter().flat_map(|room| spread(room, room.div_ceil(AUTO_THREADS_MAX))).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let rule = match (n_nodes, sizes.len()) {
        (1, 1) => {
            "one worker with every usable core, since one worker answers many jobs with one pass over the weights"
                .into()
        }
        (nodes, workers) if nodes == workers => {
            "one worker for each memory node, so that no thread reads across".into()
        }
        (nodes, workers) => format!(
            "{} on {}, each with at most {AUTO_THREADS_MAX} threads, so that they meet quickly",
            count(workers, "worker"),
            count(nodes, "memory node")
        ),
    };
    (sizes, format!("`auto`: {rule}.{smt}"))
}

/// `n` threads in `parts` parts that differ by at most one, largest first.
fn spread(n: usize, parts: usize) -> Vec<usize> {
    let parts = parts.clamp(1, n.max(1));
    (0..parts).map(|idx| n / parts + usize::from(idx < n % parts)).collect()
}

/// `n` threads for `workers` workers: evenly if that works out, else in whole cores, so that no core is shared.
fn divide(cpus: &[&Cpu], n: usize, workers: usize) -> Vec<usize> {
    let n_cores = first_siblings(cpus).len();
    let per_core = cpus.len() / n_cores.max(1);
    let in_cores =
        !n.is_multiple_of(workers) && n == cpus.len() && per_core * n_cores == n && workers <= n_cores;
    if in_cores {
        return spread(n_cores, workers).into_iter().map(|cores| cores * per_core).collect();
    }
    spread(n, workers)
}

/// About the square root of the threads, times a factor, as many workers; moved to where workers fit caches and nodes.
fn near(pool: &Pool<'_>, fast: &[&Cpu], n: usize, name: &str, factor: f64) -> (Vec<usize>, String) {
    let target = (n as f64 * factor).sqrt();
    let cost = |workers: usize| {
        let sizes = divide(fast, n, workers);
        let sets = allocate::allocate(pool, &sizes);
        let (over_nodes, over_l3) = allocate::n_straddling(pool.machine, &sets);
        let uneven = if sizes.first() == sizes.last() { 0.0 } else { 0.05 };
        let per_worker = |n: usize| n as f64 / workers as f64;
        (workers as f64 / target).ln().abs()
            + uneven
            + 2.0 * per_worker(over_nodes)
            + 1.5 * per_worker(over_l3)
    };
    let is_near = |workers: &usize| (target / 2.5..=target * 2.5).contains(&(*workers as f64));
    let candidates = (1..=n).filter(|workers| is_near(workers) || *workers == 1);
    let best = candidates.map(|workers| (workers, cost(workers))).min_by(|a, b| a.1.total_cmp(&b.1));
    let workers = best.map_or(1, |(workers, _)| workers);
    let sizes = divide(fast, n, workers);
    let wished = (1..=n).min_by(|a, b| {
        let off = |workers: usize| (workers as f64 / target).ln().abs();
        off(*a).total_cmp(&off(*b))
    });
    let moved = if wished == Some(workers) {
        String::new()
    } else {
        format!(
            " ({} would be nearest to the rule, and would fit the caches and nodes worse)",
            wished.unwrap_or(1)
        )
    };
    let words = format!("`{name}`: {}{moved}.", workers_words(&sizes));
    (sizes, words)
}

/// `3 workers with 4 threads each`.
pub(super) fn workers_words(sizes: &[usize]) -> String {
    let threads = match (sizes.first(), sizes.last()) {
        (Some(most), Some(least)) if most != least => format!("{least} to {most} threads each"),
        (most, _) => count_each(sizes.len(), most.copied().unwrap_or(1)),
    };
    format!("{} with {threads}", count(sizes.len(), "worker"))
}
