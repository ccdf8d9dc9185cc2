//! What holds for every plan on every machine.

use std::collections::BTreeSet;

use bitnetd_config::{
    AffinityConfig, Choice, CopyPolicy, CoreChoice, NumaPolicy, Profile, SmtPolicy, SplitConfig,
};
use bitnetd_placement::{Machine, candidates, plan};
use proptest::prelude::*;

use crate::support::{MachineSpec, NAMES, named_machine};

fn machine() -> impl Strategy<Value = Machine> {
    let server = (1..4_u32, 1..3_u32, 1..4_u32, 1..3_u32, prop::collection::btree_set(0..36_u32, 0..6));
    let built = server.prop_map(|(per_l3, l3_per_node, n_nodes, n_siblings, missing)| {
        let n_cores = per_l3 * l3_per_node * n_nodes;
        let mut spec = MachineSpec::server(n_cores, n_siblings, per_l3, per_l3 * l3_per_node);
        spec.offline = missing.into_iter().filter(|cpu| (1..n_cores * n_siblings).contains(cpu)).collect();
        spec.machine()
    });
    prop_oneof![built, prop::sample::select(NAMES.to_vec()).prop_map(named_machine)]
}

fn choice<T: Choice + std::fmt::Debug>() -> impl Strategy<Value = T> {
    prop::sample::select(T::CHOICES.iter().map(|(_, value)| *value).collect::<Vec<_>>())
}

fn split() -> impl Strategy<Value = SplitConfig> {
    prop_oneof![
        choice::<Profile>().prop_map(SplitConfig::Profile),
        (1..9_usize, 1..9_usize).prop_map(|(workers, threads)| SplitConfig::Counts { workers, threads }),
    ]
}

fn affinity() -> impl Strategy<Value = AffinityConfig> {
    let reserve = prop::collection::btree_set(0..16_u32, 0..4);
    let copies = choice::<CopyPolicy>();
    (reserve, choice::<SmtPolicy>(), choice::<CoreChoice>(), choice::<NumaPolicy>(), copies).prop_map(
        |(reserve, smt, cores, numa, copies)| AffinityConfig {
            reserve: reserve.into_iter().collect(),
            smt,
            cores,
            numa,
            copies,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_split_to_measure_can_be_had(machine in machine(), affinity in affinity(), n_max in 1..8_usize) {
        let Ok(found) = candidates(&machine, &affinity, n_max) else { return Ok(()) };
        prop_assert!((1..=n_max).contains(&found.len()));
        for (idx, candidate) in found.iter().enumerate() {
            let made = plan(&machine, &candidate.split(), &candidate.affinity(&affinity)).unwrap();
            prop_assert_eq!(&made, &candidate.plan);
            prop_assert!(found.iter().take(idx).all(|other| other.plan.workers != made.workers), "twice: {}", candidate);
        }
    }

    #[test]
    fn plans_keep_their_promises(machine in machine(), split in split(), affinity in affinity()) {
        let Ok(made) = plan(&machine, &split, &affinity) else { return Ok(()) };
        prop_assert_eq!(&made, &plan(&machine, &split, &affinity).unwrap(), "stable");

        let usable: BTreeSet<u32> = machine.usable(&affinity.reserve).into_iter().collect();
        let mut seen = BTreeSet::new();
        prop_assert!(!made.workers.is_empty());
        for worker in &made.workers {
            prop_assert!(!worker.cpus.is_empty(), "{:?}", made);
            prop_assert!(worker.cpus.is_sorted());
            for cpu in &worker.cpus {
                prop_assert!(usable.contains(cpu), "CPU {} is not usable: {:?}", cpu, made);
                prop_assert!(seen.insert(*cpu), "CPU {} is in two workers: {:?}", cpu, made);
            }
            if affinity.smt == SmtPolicy::Off {
                let cores: BTreeSet<u32> = worker.cpus.iter().map(|cpu| machine.cpu(*cpu).unwrap().core).collect();
                prop_assert_eq!(cores.len(), worker.cpus.len());
            }
            if let Some(node) = worker.copy_node {
                prop_assert_eq!(&worker.memory_nodes, &[node], "a copy is where its worker's memory is: {:?}", made);
            }
            for &node in &worker.memory_nodes {
                prop_assert!(machine.nodes.iter().any(|other| other.id == node && other.memory_bytes != Some(0)));
            }
        }

        for cpu in &made.supervisor_cpus {
            prop_assert!(affinity.reserve.contains(cpu) && machine.why_unusable(*cpu, &[]).is_none(), "{:?}", made);
            prop_assert!(!seen.contains(cpu), "CPU {} is the supervisor's and a worker's: {:?}", cpu, made);
        }

        let sizes: Vec<usize> = made.workers.iter().map(|worker| worker.cpus.len()).collect();
        let (least, most) = (*sizes.iter().min().unwrap(), *sizes.iter().max().unwrap());
        match split {
            SplitConfig::Counts { workers, threads } => prop_assert_eq!(sizes, vec![threads; workers]),
            // `auto` follows the nodes, which may differ in size. Two threads are one core with SMT.
            SplitConfig::Profile(profile) if profile != Profile::Auto => {
                prop_assert!(most - least <= 2, "{:?}", made);
                if let Some(quota) = machine.quota_cpus {
                    prop_assert!(seen.len() as f64 <= quota.max(1.0));
                }
            }
            _ => {}
        }
    }

    #[test]
    fn workers_that_fit_a_node_stay_in_it(n_nodes in 1..5_u32, per_node in 1..9_u32, threads in 1..9_u32, workers in 1..9_u32) {
        let machine = MachineSpec::server(n_nodes * per_node, 1, per_node, per_node).machine();
        let split = SplitConfig::Counts { workers: workers as usize, threads: threads as usize };
        let made = plan(&machine, &split, &AffinityConfig::default());
        if per_node / threads * n_nodes >= workers {
            for worker in made.unwrap().workers {
                let nodes: BTreeSet<_> = worker.cpus.iter().map(|cpu| machine.cpu(*cpu).unwrap().node).collect();
                prop_assert_eq!(nodes.len(), 1);
            }
        }
    }
}
