//! What our control group leaves to us: a set of CPUs and a share of CPU time. Versions 1 and 2, and both at once.
//!
//! The limits of every group above ours hold too. In a container the path in `/proc/self/cgroup` may be that of the
//! host while only the container's part is mounted; then the walk up ends at the mount, which is the container's.

use crate::tree::Tree;

/// Limits of our control group.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct CgroupLimits {
    /// CPUs of the cpuset.
    pub(crate) cpuset: Option<Vec<u32>>,
    /// CPU time per time.
    pub(crate) quota_cpus: Option<f64>,
}

const MOUNT: &str = "/sys/fs/cgroup";

impl CgroupLimits {
    pub(crate) fn read(tree: Tree<'_>) -> Self {
        let memberships = tree.text("/proc/self/cgroup").unwrap_or_default();
        let mut limits = Self::default();
        for line in memberships.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            if controllers.is_empty() {
                limits.add_v2(tree, path);
            } else {
                limits.add_v1(tree, controllers, path);
            }
        }
        if memberships.is_empty() {
            limits.add_v2(tree, "/");
        }
        limits
    }

    fn add_v2(&mut self, tree: Tree<'_>, path: &str) {
        let unified = format!("{MOUNT}/unified");
        let mount = if tree.exists(&format!("{MOUNT}/cgroup.controllers")) { MOUNT } else { &unified };
        for dir in upwards(mount, path) {
            self.limit_cpuset(tree.cpus(&format!("{dir}/cpuset.cpus.effective")));
            let Some(text) = tree.text(&format!("{dir}/cpu.max")) else { continue };
            let mut fields = text.split_ascii_whitespace();
            let quota = fields.next().and_then(|quota| quota.parse().ok());
            self.limit_quota(quota, fields.next().and_then(|period| period.parse().ok()));
        }
    }

    fn add_v1(&mut self, tree: Tree<'_>, controllers: &str, path: &str) {
        let has = |name| controllers.split(',').any(|controller| controller == name);
        let mounts = |name: &str| [format!("{MOUNT}/{controllers}"), format!("{MOUNT}/{name}")];
        if has("cpuset")
            && let Some(mount) = mounts("cpuset").into_iter().find(|mount| tree.exists(mount))
        {
            for dir in upwards(&mount, path) {
                let effective = tree.cpus(&format!("{dir}/cpuset.effective_cpus"));
                self.limit_cpuset(effective.or_else(|| tree.cpus(&format!("{dir}/cpuset.cpus"))));
            }
        }
        if has("cpu")
            && let Some(mount) = mounts("cpu").into_iter().find(|mount| tree.exists(mount))
        {
            for dir in upwards(&mount, path) {
                let quota = tree.value(&format!("{dir}/cpu.cfs_quota_us"));
                self.limit_quota(quota, tree.value(&format!("{dir}/cpu.cfs_period_us")));
            }
        }
    }

    /// An empty list is what a group shows that was given none: no limit of its own.
    fn limit_cpuset(&mut self, cpus: Option<Vec<u32>>) {
        let Some(cpus) = cpus.filter(|cpus| !cpus.is_empty()) else { return };
        match &mut self.cpuset {
            Some(set) => set.retain(|cpu| cpus.binary_search(cpu).is_ok()),
            None => self.cpuset = Some(cpus),
        }
    }

    /// A quota of `max` or -1 is none.
    fn limit_quota(&mut self, quota_us: Option<f64>, period_us: Option<f64>) {
        let (Some(quota), Some(period)) = (quota_us, period_us) else { return };
        if quota > 0.0 && period > 0.0 && (quota / period).is_finite() {
            let cpus = quota / period;
            self.quota_cpus = Some(self.quota_cpus.map_or(cpus, |least| least.min(cpus)));
        }
    }
}

/// The folders that may hold a memory limit of ours: our group's, and those of the groups above it.
pub(crate) fn memory_folders(tree: Tree<'_>) -> Vec<String> {
    let memberships = tree.text("/proc/self/cgroup").unwrap_or_default();
    let mut folders = Vec::new();
    for line in memberships.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if controllers.is_empty() {
            let unified = format!("{MOUNT}/unified");
            let mount = if tree.exists(&format!("{MOUNT}/cgroup.controllers")) { MOUNT } else { &unified };
            folders.extend(upwards(mount, path));
        } else if controllers.split(',').any(|controller| controller == "memory") {
            folders.extend(upwards(&format!("{MOUNT}/memory"), path));
        }
    }
    if memberships.is_empty() {
        folders.push(MOUNT.to_owned());
    }
    folders
}

/// The directory of a group and of every group above it, up to the mount itself.
fn upwards(mount: &str, path: &str) -> Vec<String> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    if parts.contains(&"..") {
        // We are outside of the namespace whose view this is.
        return vec![mount.to_owned()];
    }
    (0..=parts.len())
        .rev()
        .map(|n| {
            let mut dir = mount.to_owned();
            for part in &parts[..n] {
                dir.push('/');
                dir.push_str(part);
            }
            dir
        })
        .collect()
}
