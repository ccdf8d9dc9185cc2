//! The file: locked, opened, and set aside if it is damaged. A file that is not ours is never touched.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bitnetd_proto::exit_code::ExitCode;
use nix::fcntl::Flock;
use redb::{Builder, Database, DatabaseError, ReadableDatabase as _, StorageError, TableError};

use super::rows::{FORMAT, META, META_FORMAT};
use crate::files::{self, LockError};

/// Memory for pages of the file.
const CACHE_BYTES: usize = 16 << 20;
/// First bytes of a redb file.
const MAGIC: &[u8] = b"redb\x1a\x0a\xa9\x0d\x0a";
/// A file that starts with so many zeros has lost its beginning.
const HEAD_BYTES: u64 = 64;

/// Why a journal cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another supervisor has it.
    #[error("journal `{path}` is in use by another process")]
    InUse {
        /// The journal.
        path: PathBuf,
    },
    /// The file is something else, or of another version.
    #[error("`{path}` is not a journal of this version of bitnetd: {reason}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is, as far as is known.
        reason: String,
    },
    /// The folder or the file may not be written.
    #[error("journal `{path}` may not be written")]
    NotPermitted {
        /// The journal.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The folder is not there.
    #[error("the folder of journal `{path}` does not exist")]
    NoFolder {
        /// The journal.
        path: PathBuf,
    },
    /// A full disk, an I/O error.
    #[error("cannot open journal `{path}`")]
    Io {
        /// The journal.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

impl JournalError {
    fn new(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::NoFolder { path },
            io::ErrorKind::IsADirectory => Self::Foreign { path, reason: "it is a folder".into() },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotPermitted { path, source }
            }
            _ => Self::Io { path, source },
        }
    }

    /// How the program should end.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::InUse { .. } => ExitCode::Temporary,
            Self::NotPermitted { .. } => ExitCode::Permission,
            Self::NoFolder { .. } | Self::Foreign { .. } => ExitCode::Config,
            Self::Io { .. } => ExitCode::Os,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "one journal belongs to one daemon: choose another `queue.journal`",
            Self::Foreign { .. } => {
                "nothing was changed; choose another `queue.journal`, or move the file away"
            }
            Self::NotPermitted { .. } => "choose a `queue.journal` that this user may write, or \"off\"",
            Self::NoFolder { .. } => "create the folder, or choose another `queue.journal`",
            Self::Io { .. } => "see to the disk; `queue.journal = \"off\"` runs without durable jobs",
        }
    }

    /// True if it may be gone later without anybody changing the configuration.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}

/// What opening came to.
#[derive(Debug)]
pub(super) enum Opened {
    Usable(Database),
    /// Ours, and damaged.
    Damaged(String),
}

/// Makes the lock file beside the journal ours.
pub(super) fn lock_beside(path: &Path) -> Result<Flock<File>, JournalError> {
    files::lock_beside(path).map_err(|error| match error {
        LockError::InUse => JournalError::InUse { path: path.to_owned() },
        LockError::Io(source) => JournalError::new(path, source),
    })
}

/// Opens the file, or makes it. Every page is checked: what was changed since it was written is damage.
pub(super) fn open(path: &Path) -> Result<Opened, JournalError> {
    let failed = |source| JournalError::new(path, source);
    // Prompts and answers are private; redb itself would make a file that others may read.
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let foreign = |reason: &str| JournalError::Foreign { path: path.to_owned(), reason: reason.to_owned() };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(foreign("it is not a file"));
    }
    let mut head = Vec::new();
    (&mut file).take(HEAD_BYTES).read_to_end(&mut head).map_err(failed)?;
    if !head.is_empty() && !head.starts_with(MAGIC) {
        let is_blank = head.iter().all(|byte| *byte == 0);
        return if is_blank {
            Ok(Opened::Damaged("its first bytes are zero".into()))
        } else {
            Err(foreign("it begins with something else"))
        };
    }
    drop(file);
    // It answers damage with an error; should it ever panic over it, that is damage too.
    let opened = catch_unwind(AssertUnwindSafe(|| {
        Builder::new().set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true).create(path)
    }));
    match opened {
        Ok(Ok(database)) => check_format(path, database),
        Ok(Err(error)) => judge(path, error),
        Err(_) => Ok(Opened::Damaged("its pages make no sense".into())),
    }
}

/// Only what is surely damage counts as such: a file that is set aside for a full disk would look like a loss.
pub(super) fn judge(path: &Path, error: DatabaseError) -> Result<Opened, JournalError> {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen => Err(JournalError::InUse { path }),
        DatabaseError::UpgradeRequired(version) => {
            Err(JournalError::Foreign { path, reason: format!("its file format is {version}") })
        }
        DatabaseError::Storage(StorageError::Corrupted(reason)) => Ok(Opened::Damaged(reason)),
        DatabaseError::RepairAborted => Ok(Opened::Damaged("it cannot be repaired".into())),
        DatabaseError::Storage(StorageError::Io(source)) => match source.kind() {
            // What redb says of a file that is shorter than its header claims.
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
                Ok(Opened::Damaged(source.to_string()))
            }
            _ => Err(JournalError::new(&path, source)),
        },
        error => Err(JournalError::Io { path, source: io::Error::other(error) }),
    }
}

/// A file of redb's with other tables belongs to somebody else. An empty one is new.
fn check_format(path: &Path, database: Database) -> Result<Opened, JournalError> {
    let foreign = |reason: String| JournalError::Foreign { path: path.to_owned(), reason };
    let damaged = |error: &dyn std::error::Error| Ok(Opened::Damaged(error.to_string()));
    let read = match database.begin_read() {
        Ok(read) => read,
        Err(error) => return damaged(&error),
    };
    let format = match read.open_table(META) {
        Ok(meta) => meta.get(META_FORMAT).map(|format| format.map(|format| format.value())),
        Err(TableError::TableDoesNotExist(_)) => {
            return match read.list_tables().map(Iterator::count) {
                Ok(0) => Ok(Opened::Usable(database)),
                Ok(_) => Err(foreign("it has tables of another program".into())),
                Err(error) => damaged(&error),
            };
        }
        Err(TableError::Storage(error)) => return damaged(&error),
        Err(error) => return Err(foreign(error.to_string())),
    };
    match format {
        Ok(Some(FORMAT)) => Ok(Opened::Usable(database)),
        Ok(format) => Err(foreign(format!("its format is {format:?}, this version writes {FORMAT}"))),
        Err(error) => damaged(&error),
    }
}

/// Gives a damaged file another name, which is returned, so that nothing of it is lost.
pub(super) fn set_aside(path: &Path, now_ms: u64) -> Result<PathBuf, JournalError> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("{DAMAGED_MARK}{}", now_ms / 1000));
    let aside = PathBuf::from(name);
    std::fs::rename(path, &aside).map_err(|source| JournalError::new(path, source))?;
    sync_folder(path)?;
    Ok(aside)
}

/// Stands between the name of a journal and the time at which it was set aside.
const DAMAGED_MARK: &str = ".damaged-";

/// Files that were set aside and that nobody has seen to yet.
pub(super) fn damaged_files(path: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Vec::new();
    };
    let prefix = format!("{name}{DAMAGED_MARK}");
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// Makes sure that a new name survives a loss of power.
pub(super) fn sync_folder(path: &Path) -> Result<(), JournalError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|source| JournalError::new(path, source))
}
