//! What several files of ours have in common: a lock file beside them, and the state they are in.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::FileStat;

/// Why the lock file beside a file is not ours.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Another process has it.
    InUse,
    /// The system refuses.
    Io(io::Error),
}

/// Makes the lock file beside `path` ours. It stays: removing it would let two processes hold "the" lock.
pub(crate) fn lock_beside(path: &Path) -> Result<Flock<File>, LockError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(PathBuf::from(name))
        .map_err(LockError::Io)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => LockError::InUse,
        errno => LockError::Io(errno.into()),
    })
}

/// Changes with every write to a file, and is another one for every other file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileState([i128; 7]);

impl From<&FileStat> for FileState {
    fn from(stat: &FileStat) -> Self {
        Self([
            stat.st_dev.into(),
            stat.st_ino.into(),
            stat.st_size.into(),
            stat.st_mtime.into(),
            stat.st_mtime_nsec.into(),
            stat.st_ctime.into(),
            stat.st_ctime_nsec.into(),
        ])
    }
}

impl fmt::Display for FileState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.0.map(|part| format!("{part:x}"));
        f.write_str(&parts.join("-"))
    }
}
