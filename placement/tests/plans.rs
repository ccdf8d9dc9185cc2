//! Plans with their reasons, for the machines people have.

use bitnetd_config::{
    AffinityConfig, Choice, CopyPolicy, CoreChoice, NumaPolicy, Profile, SmtPolicy, SplitConfig,
};
use bitnetd_placement::{Machine, candidates, plan, plan_as_measured};

use crate::support::{NAMES, named_machine};

/// The plan in words.
pub(crate) fn words(machine: &Machine, split: &SplitConfig, affinity: &AffinityConfig) -> String {
    match plan(machine, split, affinity) {
        Ok(plan) => {
            let sentences = |list: Vec<String>, mark: &str| {
                list.into_iter().map(|text| format!("{mark} {text}\n")).collect::<String>()
            };
            let mut lines = plan.lines();
            if lines.len() > 32 {
                let n_more = lines.len() - 4;
                lines.truncate(4);
                lines.push(format!("… and {n_more} more"));
            }
            sentences(lines, " ") + &sentences(plan.reasons, "+") + &sentences(plan.warnings, "!")
        }
        Err(error) => format!("x {error}\n"),
    }
}

#[track_caller]
fn profiles(name: &str) -> String {
    let machine = named_machine(name);
    let with = |(profile, value): &(&str, Profile)| {
        format!("{profile}\n{}", words(&machine, &SplitConfig::Profile(*value), &AffinityConfig::default()))
    };
    Profile::CHOICES.iter().map(with).collect::<Vec<_>>().join("\n")
}

macro_rules! profile_snapshots {
    ($($test:ident: $name:literal,)*) => {
        $(#[test]
        fn $test() {
            insta::assert_snapshot!(profiles($name));
        })*
    };
}

profile_snapshots! {
    laptop: "laptop 2P+8E+2LP-E",
    six_cores_twelve_threads: "6 cores 12 threads",
    epyc_nps4: "EPYC 12 CCDs NPS4",
    epyc_nps1: "EPYC 12 CCDs NPS1",
    two_xeons_with_snc: "2 Xeons with SNC",
    arm_big_little: "ARM big.LITTLE",
    offline_cpus: "offline CPUs",
    container_with_a_quota: "container with 3.5 CPUs",
    cpuless_nodes: "CPU-less nodes",
    one_cpu: "1 CPU",
    large_server: "192 cores 8 nodes",
    no_topology: "no topology",
}

#[test]
fn counts_and_policies() {
    let counts = |workers, threads| SplitConfig::Counts { workers, threads };
    let default = AffinityConfig::default;
    let pack = || AffinityConfig { smt: SmtPolicy::Pack, ..default() };
    let off = || AffinityConfig { smt: SmtPolicy::Off, ..default() };
    let copies = || AffinityConfig { copies: CopyPolicy::Node, ..default() };
    let cores = |cores| AffinityConfig { cores, ..default() };
    let cases = [
        ("6 cores 12 threads", counts(3, 2), default()),
        ("6 cores 12 threads", counts(3, 2), pack()),
        ("6 cores 12 threads", counts(2, 4), default()),
        ("6 cores 12 threads", counts(1, 8), default()),
        ("6 cores 12 threads", counts(2, 3), off()),
        ("6 cores 12 threads", counts(3, 3), AffinityConfig { reserve: vec![0, 6], ..default() }),
        ("6 cores 12 threads", counts(1, 2), AffinityConfig { reserve: vec![12], ..default() }),
        ("CPU-less nodes", counts(3, 5), default()),
        ("EPYC 12 CCDs NPS4", SplitConfig::Profile(Profile::Auto), copies()),
        ("CPU-less nodes", counts(3, 5), copies()),
        ("CPU-less nodes", counts(1, 4), copies()),
        ("CPU-less nodes", counts(2, 4), AffinityConfig { numa: NumaPolicy::Off, ..copies() }),
        ("6 cores 12 threads", counts(2, 3), copies()),
        ("laptop 2P+8E+2LP-E", counts(1, 4), default()),
        ("laptop 2P+8E+2LP-E", counts(2, 4), cores(CoreChoice::Efficiency)),
        ("laptop 2P+8E+2LP-E", counts(1, 14), default()),
        ("laptop 2P+8E+2LP-E", SplitConfig::Profile(Profile::Auto), cores(CoreChoice::Performance)),
        ("EPYC 12 CCDs NPS4", counts(2, 8), default()),
        ("EPYC 12 CCDs NPS4", counts(2, 30), default()),
        ("2 Xeons with SNC", counts(1, 20), AffinityConfig { numa: NumaPolicy::Bind, ..default() }),
        ("2 Xeons with SNC", counts(2, 4), AffinityConfig { numa: NumaPolicy::Preferred, ..default() }),
        ("container with 3.5 CPUs", counts(2, 4), default()),
        ("6 cores 12 threads", SplitConfig::Explicit(vec![vec![0, 6, 1], vec![7, 2]]), default()),
    ];
    let shown = cases.map(|(name, split, affinity)| {
        format!("{name}, {split:?}, {affinity:?}\n{}", words(&named_machine(name), &split, &affinity))
    });
    insta::assert_snapshot!(shown.join("\n"));
}

#[test]
fn workers_of_a_node_read_its_copy_and_no_other() {
    let affinity = AffinityConfig { copies: CopyPolicy::Node, ..AffinityConfig::default() };
    let of = |name, workers, threads| {
        let split = SplitConfig::Counts { workers, threads };
        let plan = plan(&named_machine(name), &split, &affinity).unwrap();
        let nodes: Vec<Option<u32>> = plan.workers.iter().map(|worker| worker.copy_node).collect();
        (nodes, plan.n_copies())
    };
    let on = |nodes: &[u32]| nodes.iter().copied().map(Some).collect::<Vec<_>>();
    assert_eq!(of("2 Xeons with SNC", 8, 8), (on(&[0, 0, 1, 1, 2, 2, 3, 3]), 4));
    assert_eq!(of("2 Xeons with SNC", 1, 8), (on(&[0]), 1));
    assert_eq!(of("CPU-less nodes", 4, 4), (on(&[0, 0, 3, 3]), 2), "where the memory is, not the CPUs");
    assert_eq!(of("CPU-less nodes", 3, 5), (vec![Some(0), None, Some(3)], 3), "one is on both");
    assert_eq!(of("6 cores 12 threads", 2, 6), (vec![None; 2], 1), "there is but one node");
}

#[test]
fn what_was_measured_is_not_what_was_asked_for() {
    let evidence = "measured here by `tune` on 23 Nov 2026: 3x4 wins, 12.5 % ahead of 1x6.";
    let machine = named_machine("6 cores 12 threads");
    let plan = plan_as_measured(&machine, (3, 4), &AffinityConfig::default(), evidence).unwrap();
    assert_eq!(plan.reasons[1], format!("`auto`: 3 workers with 4 threads each, {evidence}"));
    let asked = SplitConfig::Counts { workers: 3, threads: 4 };
    assert_eq!(
        plan.workers,
        bitnetd_placement::plan(&machine, &asked, &AffinityConfig::default()).unwrap().workers
    );
}

#[test]
fn splits_worth_measuring() {
    let list = |name: &&str| {
        let found = candidates(&named_machine(name), &AffinityConfig::default(), 12).unwrap();
        let names: Vec<String> = found.iter().map(ToString::to_string).collect();
        format!("{name}: {}\n", names.join(", "))
    };
    insta::assert_snapshot!(NAMES.iter().map(list).collect::<String>());
}
