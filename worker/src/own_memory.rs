//! The worker's own memory, as the kernel counts it.
//!
//! Nobody else may look: the process is not dumpable. So it opens the file while it still may, and reads it from then on.
//! Reading walks the page tables of the whole model, some milliseconds for each gigabyte: the thread of the link does it,
//! after it has passed a ping on, and pauses are in proportion.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use bitnetd_proto::worker_link::WorkerMemory;

/// Shortest pause between two readings.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// A pause is at least so many times as long as the reading before it took: half a percent of one CPU.
const PAUSE_FACTOR: u32 = 200;
/// Longer than the file is.
const TEXT_BYTES_MAX: usize = 8 << 10;

/// The open file, and when to read it again.
#[derive(Debug)]
pub(crate) struct OwnMemory {
    file: Option<File>,
    due: Instant,
}

impl OwnMemory {
    /// Opens the file. Call it before the sandbox is entered.
    pub(crate) fn open() -> Self {
        let file = File::open("/proc/self/smaps_rollup")
            .inspect_err(|error| tracing::debug!(%error, "the kernel does not tell what is shared"));
        Self { file: file.ok(), due: Instant::now() }
    }

    /// A new reading, if it is time for one.
    pub(crate) fn read_if_due(&mut self) -> Option<WorkerMemory> {
        let file = self.file.as_ref()?;
        let begun = Instant::now();
        if begun < self.due {
            return None;
        }
        let memory = read(file).ok().as_deref().and_then(parse);
        self.due = Instant::now() + PAUSE_MIN.max(begun.elapsed() * PAUSE_FACTOR);
        memory
    }
}

/// The whole file, from its beginning.
fn read(file: &File) -> io::Result<String> {
    let mut bytes = vec![0; TEXT_BYTES_MAX];
    let mut len = 0;
    while len < bytes.len() {
        match file.read_at(&mut bytes[len..], len as u64)? {
            0 => break,
            n => len += n,
        }
    }
    bytes.truncate(len);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn parse(text: &str) -> Option<WorkerMemory> {
    let bytes = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(WorkerMemory {
        rss_bytes: bytes("Rss")?,
        pss_bytes: bytes("Pss")?,
        pss_anon_bytes: bytes("Pss_Anon").unwrap_or(0),
        pss_file_bytes: bytes("Pss_File").unwrap_or(0),
        pss_shmem_bytes: bytes("Pss_Shmem").unwrap_or(0),
        swap_bytes: bytes("Swap").unwrap_or(0),
        locked_bytes: bytes("Locked").unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_by_share() {
        let text = "5500-7ffc ---p 00000000 00:00 0    [rollup]\nRss:       2000 kB\nPss:        900 kB\n\
                    Pss_Anon:   300 kB\nPss_File:   500 kB\nPss_Shmem:  100 kB\nSwap:         8 kB\n\
                    SwapPss: 8 kB\nLocked:   40 kB\n";
        let expected = WorkerMemory {
            rss_bytes: 2000 << 10,
            pss_bytes: 900 << 10,
            pss_anon_bytes: 300 << 10,
            pss_file_bytes: 500 << 10,
            pss_shmem_bytes: 100 << 10,
            swap_bytes: 8 << 10,
            locked_bytes: 40 << 10,
        };
        assert_eq!(parse(text), Some(expected));
        assert_eq!(parse("Rss: many kB\nPss: 1 kB\n"), None);
    }

    #[test]
    fn an_open_file_is_read_from_its_beginning_each_time() {
        let mut memory = OwnMemory::open();
        let first = memory.read_if_due().expect("this kernel has the file");
        assert!(0 < first.pss_bytes && first.pss_bytes <= first.rss_bytes, "{first:?}");
        assert_eq!(memory.read_if_due(), None, "it is not time for another one");
        memory.due = Instant::now();
        let block = vec![1_u8; 32 << 20];
        let second = memory.read_if_due().expect("it is there still");
        assert!(
            second.pss_anon_bytes >= first.pss_anon_bytes + (16 << 20),
            "{first:?} {second:?} {}",
            block[9]
        );
    }
}
