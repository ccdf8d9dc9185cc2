//! What is impossible, and in which words.

use bitnetd_config::{AffinityConfig, CoreChoice, SmtPolicy, SplitConfig};

use crate::plans::words;
use crate::support::{MachineSpec, named};

#[test]
fn the_impossible_is_refused_with_numbers() {
    let counts = |workers, threads| SplitConfig::Counts { workers, threads };
    let default = AffinityConfig::default;
    let mut masked = MachineSpec::server(8, 1, 8, 8)
        .file("/proc/self/cgroup", "0::/")
        .file("/sys/fs/cgroup/cgroup.controllers", "cpu")
        .file("/sys/fs/cgroup/cpuset.cpus.effective", "0-5");
    masked.offline = vec![1];
    masked.affinity = Some(vec![0, 2, 3, 6]);
    let six = named("6 cores 12 threads");
    let cases = [
        (&six, counts(5, 3), default()),
        (&six, counts(4, 2), AffinityConfig { smt: SmtPolicy::Off, ..default() }),
        (&six, counts(1, 1), AffinityConfig { cores: CoreChoice::Efficiency, ..default() }),
        (&six, counts(usize::MAX, usize::MAX), default()),
        (&six, SplitConfig::Explicit(vec![vec![0, 12]]), default()),
        (&six, SplitConfig::Explicit(vec![vec![0, 1], vec![1]]), default()),
        (&six, SplitConfig::Explicit(vec![vec![0], vec![]]), default()),
        (&six, SplitConfig::Explicit(vec![]), default()),
        (&masked, counts(1, 4), AffinityConfig { reserve: vec![0], ..default() }),
        (&masked, SplitConfig::Explicit(vec![vec![1]]), default()),
        (&masked, SplitConfig::Explicit(vec![vec![4]]), default()),
        (&masked, counts(1, 1), AffinityConfig { reserve: (0..8).collect(), ..default() }),
    ];
    let shown = cases
        .map(|(spec, split, affinity)| format!("{split:?}\n{}", words(&spec.machine(), &split, &affinity)));
    insta::assert_snapshot!(shown.join("\n"));
}
