//! How much memory there is to take: of the machine, and of our control group and every group above it.

use std::path::Path;

use crate::cgroup;
use crate::tree::Tree;

/// Bytes that can be taken without swapping or being killed; `None` if nothing says so.
///
/// The page cache counts as free, as the kernel does in `MemAvailable`: it gives way.
#[must_use]
pub fn available_bytes(root: &Path) -> Option<u64> {
    let tree = Tree::new(root);
    let machine = tree.text("/proc/meminfo").and_then(|text| kib_line(&text, "MemAvailable:"));
    let groups = cgroup::memory_folders(tree).into_iter().filter_map(|folder| left_in(tree, &folder));
    groups.chain(machine).min()
}

/// What a group leaves, in either version's words; `None` if it has no limit.
fn left_in(tree: Tree<'_>, folder: &str) -> Option<u64> {
    let stat = tree.text(&format!("{folder}/memory.stat")).unwrap_or_default();
    let counter = |name: &str| {
        let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
        lines
            .find(|(key, _)| *key == name)
            .and_then(|(_, value)| value.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    // A limit of `max` is no number.
    let (limit, used, cache): (u64, u64, u64) = match tree.value(&format!("{folder}/memory.max")) {
        Some(limit) => {
            let used = tree.value(&format!("{folder}/memory.current")).unwrap_or(0);
            (limit, used, counter("inactive_file") + counter("active_file"))
        }
        None => {
            let limit = tree.value(&format!("{folder}/memory.limit_in_bytes"))?;
            let used = tree.value(&format!("{folder}/memory.usage_in_bytes")).unwrap_or(0);
            (limit, used, counter("total_inactive_file") + counter("total_active_file"))
        }
    };
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

/// The bytes of a line such as `MemAvailable:   24117248 kB`.
fn kib_line(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
