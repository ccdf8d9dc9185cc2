//! The results of a batch: a JSONL file that grows by whole lines and tells a later run what is done.
//!
//! Invariant: after a crash at any instant the file holds whole lines and at most one cut one at its end, which the
//! next run removes. Only one process writes to it at a time.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bitnetd_proto::exit_code::ExitCode;
use serde::{Deserialize, Serialize};

use crate::answer::{Answer, json_line};
use crate::batch::input::Item;
use crate::error::CliError;

/// A result line that ended well.
#[derive(Debug, Serialize)]
struct DoneLine<'a> {
    #[serde(flatten)]
    answer: &'a Answer,
    request: &'a str,
}

/// A result line that ended with an error; a later run tries it again.
#[derive(Debug, Serialize)]
struct FailedLine<'a> {
    index: usize,
    prompt: &'a str,
    error: String,
    request: &'a str,
}

/// How every line starts, so that a cut one can be told from something else.
const LINE_START: &[u8] = b"{\"index\":";

/// What a later run needs to know of a line.
#[derive(Debug, Deserialize)]
struct SeenLine {
    index: usize,
    prompt: String,
    request: String,
    #[serde(default)]
    error: Option<String>,
}

/// A result as its line.
pub(crate) fn line(item: &Item, outcome: Result<&Answer, &str>) -> Result<String, CliError> {
    let request = &item.fingerprint()?;
    match outcome {
        Ok(answer) => json_line(&DoneLine { answer, request }),
        Err(error) => json_line(&FailedLine {
            index: item.index,
            prompt: &item.prompt,
            error: error.to_owned(),
            request,
        }),
    }
}

/// Looks at a lock that somebody has, and the pause between two.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Locks the file. A program that another thread of ours is just starting has a copy of every descriptor until its `exec`,
/// and with it a lock that was given back here: that passes.
fn lock(file: &File) -> Result<(), TryLockError> {
    for _ in 1..LOCK_TRIES {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::park_timeout(LOCK_PAUSE),
            decided => return decided,
        }
    }
    file.try_lock()
}

/// The results file.
#[derive(Debug)]
pub(crate) struct Results {
    path: PathBuf,
    file: File,
    done: BTreeSet<usize>,
}

impl Results {
    /// Opens or makes the file, and sees what is done. A file that is not of these prompts is refused, unchanged.
    pub(crate) fn open(path: &Path, items: &[Item]) -> Result<Self, CliError> {
        let failed = |source| CliError::file("write results to", path, source);
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(failed)
            .map_err(|error| error.hint("-o takes a file in a folder that exists"))?;
        match lock(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = format!("another batch is writing to `{}`", path.display());
                return Err(
                    CliError::new(ExitCode::Temporary, message).hint("wait for it, or choose another -o")
                );
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let (done, whole_bytes) = read_done(&file, path, items)?;
        if whole_bytes < file.metadata().map_err(failed)?.len() {
            file.set_len(whole_bytes).map_err(failed)?;
        }
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, done })
    }

    /// Whether an earlier run has done this one.
    pub(crate) fn is_done(&self, index: usize) -> bool {
        self.done.contains(&index)
    }

    /// How many an earlier run has done.
    pub(crate) fn n_done(&self) -> usize {
        self.done.len()
    }

    /// Adds a line, in one write.
    pub(crate) fn append(&mut self, line: &str) -> Result<(), CliError> {
        self.file
            .write_all(line.as_bytes())
            .map_err(|source| CliError::file("write results to", &self.path, source))
    }

    /// Makes sure that it is on disk.
    pub(crate) fn sync(&self) -> Result<(), CliError> {
        match self.file.sync_data() {
            // Not a file on a disk: a pipe or a device.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(()),
            outcome => outcome.map_err(|source| CliError::file("write results to", &self.path, source)),
        }
    }
}

/// The indexes that are done, and the length of the whole lines.
fn read_done(file: &File, path: &Path, items: &[Item]) -> Result<(BTreeSet<usize>, u64), CliError> {
    let mut reader = BufReader::new(file);
    let (mut done, mut whole_bytes, mut line) = (BTreeSet::new(), 0, Vec::new());
    for number in 1.. {
        line.clear();
        let n_bytes =
            reader.read_until(b'\n', &mut line).map_err(|source| CliError::file("read", path, source))?;
        if !line.ends_with(b"\n") {
            let start = &LINE_START[..LINE_START.len().min(n_bytes)];
            if !line.starts_with(start) {
                return Err(foreign(path, number, "it is none of ours"));
            }
            break;
        }
        let seen: SeenLine =
            serde_json::from_slice(&line).map_err(|error| foreign(path, number, &error.to_string()))?;
        let item =
            items.get(seen.index).ok_or_else(|| foreign(path, number, "there are not so many prompts"))?;
        if item.prompt != seen.prompt {
            return Err(foreign(path, number, "its prompt is another"));
        }
        if item.fingerprint()? != seen.request {
            return Err(foreign(path, number, "it was made with other parameters"));
        }
        if seen.error.is_none() {
            done.insert(seen.index);
        }
        whole_bytes += n_bytes as u64;
    }
    Ok((done, whole_bytes))
}

fn foreign(path: &Path, number: usize, why: &str) -> CliError {
    let message = format!("`{}` is not a result of this batch (line {number}: {why})", path.display());
    CliError::new(ExitCode::Data, message)
        .hint("choose another -o, or delete the file; nothing was changed in it")
}

#[cfg(test)]
mod tests;
