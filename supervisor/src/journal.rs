//! The journal of durable jobs: one `redb` file, written in batches of one transaction each.
//!
//! Runs on the thread of `writer.rs`, never on the event loop: it waits for the disk. What [`Journal::apply`] has
//! returned is on disk. After a failed write nothing is assumed: the file is opened again, checked, and what it then
//! says is what counts.
//!
//! Invariants, each kept by being one transaction:
//! * a job is in `OPEN` or in `ENDED`, never in both, and ends once;
//! * a number is never given twice, also not after a damaged file was set aside;
//! * `META_BYTES` is the length of all requests and answers.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bitnetd_config::DurableConfig;
use bitnetd_proto::durable::JobState;
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::request::GenerateRequest;
use bitnetd_proto::status::JournalReport;
use nix::fcntl::Flock;
use redb::{Database, Durability, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _};
use tokio::sync::mpsc;

mod file; // The lock, opening, setting aside.
mod reader; // The thread that reads.
mod rows; // Tables and rows.
mod tables; // One transaction.
#[cfg(test)]
mod tests;
mod writer; // The thread that writes.

pub use file::JournalError;
use file::Opened;
pub(crate) use reader::{Asker, Listing, Question, Reader};
use rows::{ENDED, FORMAT, JOBS, JobRow, META, META_BYTES, META_FORMAT, META_NEXT, OPEN, decode};
pub(crate) use rows::{Outcome, owner_name, owner_of};
use tables::Tables;
pub(crate) use writer::{Report, Writer};

/// Number of a durable job.
pub(crate) type DurableId = u64;

/// Something to be written.
#[derive(Clone, Debug)]
pub(crate) enum Order {
    Submit {
        owner: String,
        key: Option<String>,
        /// Its seed is filled in.
        request: Arc<GenerateRequest>,
        /// Whether the seed was the client's own.
        has_own_seed: bool,
    },
    /// A job was given to the workers. Not worth a wait for the disk: it comes with the next write that is.
    Start {
        job: DurableId,
    },
    /// Workers died with it on board.
    CountDeaths {
        job: DurableId,
        deaths: u32,
    },
    End {
        job: DurableId,
        outcome: Outcome,
    },
    /// Nothing but a look whether writing works, and whether results are too old.
    Probe,
}

impl Order {
    fn is_soft(&self) -> bool {
        matches!(self, Self::Start { .. })
    }
}

/// What an order came to, when it is on disk.
#[derive(Clone, Debug)]
pub(crate) enum Applied {
    /// The job is there; `false` if its key named one that was there before.
    Submitted {
        job: DurableId,
        seed: u64,
        is_new: bool,
        open: Option<OpenJob>,
    },
    /// The order was refused; nothing was written.
    Refused(WireError),
    /// How the job ended, now or before; `None` if there is no such job.
    Ended(Option<JobState>),
    Noted,
}

/// A job that has not ended, as much of it as is held in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenJob {
    pub(crate) job: DurableId,
    pub(crate) owner: String,
    pub(crate) priority: i8,
    pub(crate) deadline_ms: Option<u64>,
}

/// Numbers for the status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) n_open: u64,
    pub(crate) n_ended: u64,
    pub(crate) bytes: u64,
    n_open_of: HashMap<String, u64>,
    next: DurableId,
}

/// A write that did not come to be; the file is closed and opened again with the next one.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the journal: {0}")]
pub(crate) struct WriteError(String);

impl<E: Into<redb::Error>> From<E> for WriteError {
    fn from(error: E) -> Self {
        Self(error.into().to_string())
    }
}

/// The open file, shared with the reader's thread. The lock is held for writing only to close or open it.
type Shared = Arc<RwLock<Option<Database>>>;

/// Opens a file; another one in tests.
type Opener = Box<dyn FnMut(&Path) -> Result<Opened, JournalError> + Send>;

/// The file and what is known about it.
pub struct Journal {
    path: PathBuf,
    limits: DurableConfig,
    database: Shared,
    opener: Opener,
    counts: Counts,
    /// What has not ended, read at the last opening and not told to anybody yet.
    fresh: Option<Vec<OpenJob>>,
    /// Damaged files beside it.
    damaged: Vec<PathBuf>,
    _lock: Flock<File>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal")
            .field("path", &self.path)
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl Journal {
    /// Opens a journal, or makes it. A damaged one gets another name and a new one is begun; a full disk or an I/O error
    /// is no error here: the journal refuses jobs until it passes.
    ///
    /// # Errors
    /// [`JournalError`] if it is somebody else's, or cannot ever be written. Nothing was changed then.
    pub fn open(path: &Path, limits: &DurableConfig) -> Result<Self, JournalError> {
        Self::open_with(path, limits, Box::new(file::open))
    }

    fn open_with(path: &Path, limits: &DurableConfig, opener: Opener) -> Result<Self, JournalError> {
        let lock = file::lock_beside(path)?;
        let mut journal = Self {
            path: path.to_owned(),
            limits: limits.clone(),
            database: Shared::default(),
            opener,
            counts: Counts::default(),
            fresh: None,
            damaged: file::damaged_files(path),
            _lock: lock,
        };
        match journal.reopen() {
            Ok(()) => {}
            Err(error) if error.may_pass() => {
                tracing::error!(path = %path.display(), %error, "the journal cannot be opened for now");
            }
            Err(error) => return Err(error),
        }
        for damaged in &journal.damaged {
            tracing::error!(damaged = %damaged.display(), "a damaged journal waits to be seen to");
        }
        Ok(journal)
    }

    /// Closes the file if it is open, opens and checks it, and reads what has not ended.
    fn reopen(&mut self) -> Result<(), JournalError> {
        *write_lock(&self.database) = None;
        let mut first = 1;
        let opened = match (self.opener)(&self.path)? {
            Opened::Usable(database) => Ok(database),
            Opened::Damaged(reason) => Err(reason),
        };
        let loaded = opened.and_then(|database| {
            load(&database, first).map(|loaded| (database, loaded)).map_err(|error| error.to_string())
        });
        let (database, (open, counts)) = match loaded {
            Ok(loaded) => loaded,
            Err(reason) => {
                let aside = file::set_aside(&self.path, now_ms())?;
                tracing::error!(
                    path = %self.path.display(), aside = %aside.display(), reason,
                    "THE JOURNAL WAS DAMAGED: it was set aside, and its durable jobs are not known any more"
                );
                self.damaged.push(aside);
                // Numbers of the old file must not name jobs of the new one; so many seconds have not seen as many jobs.
                first = now_ms() / 1000;
                let Opened::Usable(database) = (self.opener)(&self.path)? else {
                    let source = std::io::Error::other("a new file is damaged at once");
                    return Err(JournalError::Io { path: self.path.clone(), source });
                };
                let unusable = |error: WriteError| JournalError::Io {
                    path: self.path.clone(),
                    source: std::io::Error::other(error),
                };
                let loaded = load(&database, first).map_err(unusable)?;
                (database, loaded)
            }
        };
        file::sync_folder(&self.path)?;
        self.counts = counts;
        self.fresh = Some(open);
        *write_lock(&self.database) = Some(database);
        Ok(())
    }

    /// Carries out all orders in one transaction; they are on disk when this returns.
    ///
    /// # Errors
    /// [`WriteError`] if none of them may be relied upon; the file is closed then.
    fn apply(&mut self, orders: &[Order]) -> Result<Vec<Applied>, WriteError> {
        let applied = {
            let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
            let Some(database) = database.as_ref() else { return Err(WriteError("it is not open".into())) };
            let mut counts = self.counts.clone();
            transact(database, orders, &self.limits, &mut counts).map(|applied| (applied, counts))
        };
        match applied {
            Ok((applied, counts)) => {
                self.counts = counts;
                Ok(applied)
            }
            Err(error) => {
                *write_lock(&self.database) = None;
                Err(error)
            }
        }
    }

    /// Starts the threads that write and read.
    pub(crate) fn start(self) -> std::io::Result<(Writer, mpsc::Receiver<Report>, Reader)> {
        let reader = Reader::start(self.database.clone())?;
        let (writer, reports) = Writer::start(self)?;
        Ok((writer, reports, reader))
    }

    /// How it is before anything is done with it.
    pub(crate) fn report(&self) -> JournalReport {
        JournalReport {
            path: self.path.display().to_string(),
            is_writable: self.is_open(),
            problem: self.notice(),
            queued: self.counts.n_open,
            running: 0,
            ended: self.counts.n_ended,
            bytes: self.counts.bytes,
            bytes_max: u64::from(self.limits.max_mib) << 20,
        }
    }

    fn is_open(&self) -> bool {
        self.database.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// What an operator must know even if everything works.
    fn notice(&self) -> Option<String> {
        let damaged = self.damaged.iter().filter(|path| path.exists());
        let names: Vec<String> = damaged.map(|path| format!("`{}`", path.display())).collect();
        (!names.is_empty()).then(|| {
            format!(
                "a damaged journal was set aside as {}; move or remove it when it is seen to",
                names.join(", ")
            )
        })
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // The reader's thread may live a little longer; the file is closed before the lock is given up.
        *write_lock(&self.database) = None;
    }
}

fn write_lock(shared: &Shared) -> std::sync::RwLockWriteGuard<'_, Option<Database>> {
    shared.write().unwrap_or_else(PoisonError::into_inner)
}

fn transact(
    database: &Database,
    orders: &[Order],
    limits: &DurableConfig,
    counts: &mut Counts,
) -> Result<Vec<Applied>, WriteError> {
    let mut transaction = database.begin_write()?;
    if orders.iter().all(Order::is_soft) {
        transaction.set_durability(Durability::None)?;
    }
    let applied = {
        let mut tables = Tables::open(&transaction, limits, counts)?;
        let applied: Result<Vec<Applied>, WriteError> =
            orders.iter().map(|order| tables.apply(order, now_ms())).collect();
        tables.prune(now_ms(), orders.len())?;
        tables.finish()?;
        applied?
    };
    transaction.commit()?;
    Ok(applied)
}

/// Makes the tables if the file is new, and reads what has not ended.
fn load(database: &Database, first: DurableId) -> Result<(Vec<OpenJob>, Counts), WriteError> {
    let is_new = database.begin_read()?.list_tables()?.next().is_none();
    if is_new {
        let transaction = database.begin_write()?;
        {
            let mut meta = transaction.open_table(META)?;
            meta.insert(META_FORMAT, FORMAT)?;
            meta.insert(META_NEXT, first)?;
            meta.insert(META_BYTES, 0)?;
        }
        drop(Tables::open(&transaction, &DurableConfig::default(), &mut Counts::default())?);
        transaction.commit()?;
    }
    let read = database.begin_read()?;
    let meta = read.open_table(META)?;
    let number = |name| -> Result<u64, WriteError> {
        let value = meta.get(name)?.ok_or_else(|| WriteError(format!("it has no `{name}`")))?;
        Ok(value.value())
    };
    let ended = read.open_table(ENDED)?;
    let mut counts = Counts {
        n_ended: ended.len()?,
        bytes: number(META_BYTES)?,
        next: number(META_NEXT)?,
        ..Counts::default()
    };
    let jobs = read.open_table(JOBS)?;
    let mut open = Vec::new();
    for entry in read.open_table(OPEN)?.iter()? {
        let job = entry?.0.value();
        let row = jobs.get(job)?.ok_or_else(|| WriteError(format!("job {job} has no row")))?;
        let row: JobRow = decode(row.value()).map_err(|error| WriteError(format!("job {job}: {error}")))?;
        counts.n_open += 1;
        *counts.n_open_of.entry(row.owner.clone()).or_default() += 1;
        open.push(OpenJob { job, owner: row.owner, priority: row.priority, deadline_ms: row.deadline_ms });
    }
    Ok((open, counts))
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn overloaded(text: String, retry_after_ms: u64) -> Applied {
    Applied::Refused(WireError::new(ErrorCode::Overloaded, text).with_retry_after_ms(retry_after_ms))
}
