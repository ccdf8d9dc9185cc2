//! Where the supervisor's own threads may run: on reserved CPUs, if there are any, so that workers are left in peace.
//!
//! The mask that the process was given is remembered, because plans are made from it, and it comes back when nothing is
//! reserved any more. Whoever changes the mask from outside meanwhile (`taskset`, a cpuset) gives us a new one.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, PoisonError};

use bitnetd_config::cpu_list;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// What this process has done to its own mask; a mask belongs to the process, hence the one place for it.
static PINNED: Mutex<Option<Pinned>> = Mutex::new(None);

/// A mask of ours in place of another.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pinned {
    /// The mask that was given to us.
    given: Vec<u32>,
    /// The mask as the kernel showed it after we had set ours.
    ours: Vec<u32>,
}

/// The affinity mask that was given to this process, whatever part of it the supervisor keeps to.
#[must_use]
pub fn given_affinity() -> Option<Vec<u32>> {
    let pinned = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
    Some(given(mask()?, pinned.as_ref()))
}

/// Of the mask that holds and what we did before, the mask that was given to us.
fn given(now: Vec<u32>, pinned: Option<&Pinned>) -> Vec<u32> {
    match pinned {
        Some(pinned) if pinned.ours == now => pinned.given.clone(),
        _ => now,
    }
}

/// Keeps all threads of this process to `cpus`; to the mask that was given to it if `cpus` is empty.
pub(crate) fn keep_to(cpus: &[u32]) {
    let mut pinned = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
    if cpus.is_empty() && pinned.is_none() {
        return; // Nothing was ever reserved.
    }
    let Some(given) = mask().map(|now| given(now, pinned.as_ref())) else {
        tracing::warn!("the supervisor does not know its affinity mask, and leaves it as it is");
        return;
    };
    let target = if cpus.is_empty() { &given } else { cpus };
    if let Err(error) = set_for_all_threads(target) {
        tracing::warn!(cpus = cpu_list::format(target), %error, "the supervisor cannot keep to its CPUs");
        return;
    }
    tracing::info!(cpus = cpu_list::format(target), "the supervisor keeps to its CPUs");
    *pinned = if cpus.is_empty() { None } else { mask().map(|ours| Pinned { given, ours }) };
}

/// The mask of the main thread, CPUs that are offline included.
fn mask() -> Option<Vec<u32>> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    cpu_list::parse(list.trim()).ok()
}

fn set_for_all_threads(cpus: &[u32]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(usize::try_from(cpu).unwrap_or(usize::MAX))?;
    }
    // A thread inherits the mask of the one that starts it: look again until all that are there have been seen.
    let mut seen = BTreeSet::new();
    loop {
        let threads: BTreeSet<i32> = std::fs::read_dir("/proc/self/task")?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        if threads.is_subset(&seen) {
            return Ok(());
        }
        for &thread in threads.difference(&seen) {
            match sched_setaffinity(Pid::from_raw(thread), &set) {
                Ok(()) | Err(Errno::ESRCH) => {} // It may have ended.
                Err(error) => return Err(error.into()),
            }
        }
        seen.extend(threads);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_that_came_from_outside_is_the_given_one() {
        let pinned = Pinned { given: vec![0, 1, 2, 3], ours: vec![0] };
        assert_eq!(given(vec![1, 2], None), [1, 2]);
        assert_eq!(given(vec![0], Some(&pinned)), [0, 1, 2, 3], "it is ours");
        assert_eq!(given(vec![2, 3], Some(&pinned)), [2, 3], "somebody has changed it since");
    }
}
