//! Small text files of sysfs and procfs below a root, which is `/` or a recorded tree.
//!
//! A file that is missing, unreadable or strange is `None`: containers and sandboxes show any part of a machine.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bitnetd_config::cpu_list;

/// Longest file that is read; `/proc/stat` and `/proc/cpuinfo` of a large machine are the longest.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// A file tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tree<'a> {
    root: &'a Path,
}

impl<'a> Tree<'a> {
    pub(crate) fn new(root: &'a Path) -> Self {
        Self { root }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The text of a file without the white space around it.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        let file = std::fs::File::open(self.path(path)).ok()?;
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// A file that holds one value.
    pub(crate) fn value<T: FromStr>(&self, path: &str) -> Option<T> {
        self.text(path)?.parse().ok()
    }

    /// A file that holds a CPU list (or another list of numbers in that form).
    pub(crate) fn cpus(&self, path: &str) -> Option<Vec<u32>> {
        cpu_list::parse(&self.text(path)?).ok()
    }

    /// Whether there is a file or directory.
    pub(crate) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The numbers N of the entries `{prefix}N` of a directory, ascending; numbers no CPU can have are left out.
    pub(crate) fn numbered(&self, dir: &str, prefix: &str) -> Vec<u32> {
        let mut numbers = self.entries(dir, prefix);
        numbers.retain(|number| *number <= cpu_list::CPU_MAX);
        numbers
    }

    /// The entries of a directory that are numbers, ascending.
    pub(crate) fn numbers(&self, dir: &str) -> Vec<u32> {
        self.entries(dir, "")
    }

    fn entries(&self, dir: &str, prefix: &str) -> Vec<u32> {
        let entries = std::fs::read_dir(self.path(dir)).into_iter().flatten().flatten();
        let mut numbers: Vec<u32> = entries
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok())
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }
}
