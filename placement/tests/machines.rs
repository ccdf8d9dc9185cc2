//! What is read out of recorded trees.

use bitnetd_config::cpu_list;
use bitnetd_placement::{CoreKind, Limits, Machine};
use tempfile::TempDir;

use crate::support::{MachineSpec, named};

fn kind(machine: &Machine, kind: CoreKind) -> String {
    let of_kind = machine.cpus.iter().filter(|cpu| cpu.kind == kind).map(|cpu| cpu.id);
    cpu_list::format(&of_kind.collect::<Vec<_>>())
}

#[test]
fn hybrid_kinds_come_from_the_pmus_and_the_missing_l3() {
    let laptop = named("laptop 2P+8E+2LP-E").machine();
    assert_eq!(kind(&laptop, CoreKind::Performance), "0-3");
    assert_eq!(kind(&laptop, CoreKind::Efficiency), "4-11");
    assert_eq!(kind(&laptop, CoreKind::LowPower), "12-13");
    assert!(laptop.is_hybrid());
    let (one, seven) = (laptop.cpu(1).unwrap(), laptop.cpu(7).unwrap());
    assert_eq!((one.core, one.l2, one.l3, one.l3_bytes), (0, Some(0), Some(0), Some(32 << 20)));
    assert_eq!((seven.core, seven.l2, seven.l3), (7, Some(4), Some(0)));
}

#[test]
fn arm_kinds_come_from_the_capacities() {
    let arm = named("ARM big.LITTLE").machine();
    assert_eq!(kind(&arm, CoreKind::Efficiency), "0-3");
    assert_eq!(kind(&arm, CoreKind::Performance), "4-7");
}

#[test]
fn favoured_cores_are_no_kind_of_their_own() {
    let mut spec = MachineSpec::server(4, 1, 4, 4);
    spec.cores[0].khz = Some(4_400_000);
    assert!(!spec.machine().is_hybrid());
    spec.cores[1].khz = Some(2_000_000);
    assert_eq!(kind(&spec.machine(), CoreKind::Efficiency), "1");
}

#[test]
fn nodes_have_distances_and_memory() {
    let machine = named("CPU-less nodes").machine();
    assert_eq!(machine.nodes.len(), 4);
    assert_eq!(machine.nodes[1].memory_bytes, Some(0));
    assert_eq!(machine.nodes[2].cpus, Vec::<u32>::new());
    assert_eq!(machine.nodes[1].distances, [20, 10, 24, 14]);
    assert_eq!(machine.memory_node(0), Some(0));
    assert_eq!(machine.memory_node(1), Some(3));
    assert_eq!(machine.cpu(9).unwrap().node, Some(1));
}

#[test]
fn offline_cpus_are_known_and_not_usable() {
    let machine = named("offline CPUs").machine();
    assert_eq!(machine.cpus.len(), 16);
    assert_eq!(machine.usable(&[0]), [1, 2, 4, 5, 6, 7]);
    assert_eq!(machine.why_unusable(3, &[]), Some("offline"));
    assert_eq!(machine.why_unusable(16, &[]), Some("not on this machine"));
}

#[test]
fn the_mask_is_the_callers_or_the_trees() {
    let mut spec = MachineSpec::server(8, 1, 8, 8);
    spec.affinity = Some(vec![1, 2, 3]);
    assert_eq!(spec.machine().usable(&[]), [1, 2, 3]);
    let dir = TempDir::new().unwrap();
    spec.write(dir.path());
    let machine = Machine::read(dir.path(), &Limits { affinity: Some(vec![7, 4]) });
    assert_eq!(machine.usable(&[]), [4, 7]);
}

#[test]
fn an_empty_tree_is_a_machine_with_one_cpu() {
    let dir = TempDir::new().unwrap();
    let machine = Machine::read(dir.path(), &Limits::default());
    assert_eq!(machine.usable(&[]), [0]);
    let machine = Machine::read(dir.path(), &Limits { affinity: Some(vec![0, 1, 5]) });
    assert_eq!(machine.usable(&[]), [0, 1, 5]);
}

#[test]
fn this_machine_can_be_read() {
    let machine = Machine::read(std::path::Path::new("/"), &Limits::default());
    assert!(!machine.usable(&[]).is_empty(), "{machine:?}");
}

#[track_caller]
fn check_cgroup(files: &[(&'static str, &str)], cpuset: Option<&str>, quota: Option<f64>) {
    let mut spec = MachineSpec::server(16, 1, 16, 16);
    for (path, text) in files {
        spec = spec.file(path, text);
    }
    let machine = spec.machine();
    assert_eq!(machine.cpuset.as_deref().map(cpu_list::format).as_deref(), cpuset);
    assert_eq!(machine.quota_cpus, quota);
}

#[test]
fn cgroup_2_limits_of_all_groups_above_hold() {
    check_cgroup(
        &[
            ("/proc/self/cgroup", "0::/system.slice/bitnetd.service"),
            ("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu"),
            ("/sys/fs/cgroup/cpuset.cpus.effective", "0-15"),
            ("/sys/fs/cgroup/system.slice/cpu.max", "200000 100000"),
            ("/sys/fs/cgroup/system.slice/cpuset.cpus.effective", "0-7"),
            ("/sys/fs/cgroup/system.slice/bitnetd.service/cpu.max", "max 100000"),
            ("/sys/fs/cgroup/system.slice/bitnetd.service/cpuset.cpus.effective", "4-7"),
        ],
        Some("4-7"),
        Some(2.0),
    );
}

#[test]
fn cgroup_1_limits_of_a_container_are_found_at_the_mount() {
    check_cgroup(
        &[
            ("/proc/self/cgroup", "4:cpu,cpuacct:/docker/abc\n3:cpuset:/docker/abc\n2:memory:/docker/abc"),
            ("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000"),
            ("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000"),
            ("/sys/fs/cgroup/cpuset/cpuset.cpus", "2-5"),
        ],
        Some("2-5"),
        Some(1.5),
    );
}

#[test]
fn cgroups_1_and_2_at_once_and_none_at_all() {
    check_cgroup(
        &[
            ("/proc/self/cgroup", "3:cpu:/a\n0::/b"),
            ("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1"),
            ("/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000"),
            ("/sys/fs/cgroup/unified/b/cpu.max", "50000 100000"),
        ],
        None,
        Some(0.5),
    );
    check_cgroup(&[], None, None);
    check_cgroup(
        &[("/proc/self/cgroup", "nonsense\n0::/../..\n::::"), ("/sys/fs/cgroup/unified/cpu.max", "x y")],
        None,
        None,
    );
}
