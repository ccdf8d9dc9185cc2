//! The thread that reads: lists, records, and the requests that are to be worked on. It never holds up a write.

use std::collections::HashSet;
use std::io;
use std::sync::PoisonError;

use bitnetd_proto::durable::{JobRecord, JobState, JobSummary};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::request::GenerateRequest;
use redb::{Database, ReadableDatabase as _};
use tokio::sync::{mpsc, oneshot};

use super::rows::{ANSWERS, JOBS, JobRow, REQUESTS, decode};
use super::{DurableId, Shared, WriteError};

/// Questions that wait, at most; who asks more is refused.
const QUESTIONS_MAX: usize = 256;
/// A list ends when it has so many bytes, roughly, so that it fits a frame.
const LISTED_BYTES_MAX: usize = 1 << 20;

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    /// As the file names it.
    pub(crate) owner: String,
    /// Root, and the user of the daemon itself.
    pub(crate) sees_all: bool,
}

impl Asker {
    pub(crate) fn may_see(&self, owner: &str) -> bool {
        self.sees_all || self.owner == owner
    }
}

/// Which jobs to list.
#[derive(Clone, Debug)]
pub(crate) struct Listing {
    pub(crate) asker: Asker,
    pub(crate) state: Option<JobState>,
    pub(crate) before: Option<DurableId>,
    pub(crate) limit: u32,
    /// Those the workers have now; the file does not know.
    pub(crate) running: HashSet<DurableId>,
}

/// What is needed to work on a job.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub(crate) request: GenerateRequest,
    pub(crate) deaths: u32,
}

type Reply<T> = oneshot::Sender<Result<T, WireError>>;

/// Something to be read.
#[derive(Debug)]
pub(crate) enum Question {
    List { listing: Listing, reply: Reply<(Vec<JobSummary>, bool)> },
    Record { job: DurableId, asker: Asker, is_running: bool, reply: Reply<JobRecord> },
    Work { job: DurableId, reply: Reply<Work> },
}

/// The way to the thread. When the last one is dropped, the thread ends.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    questions: mpsc::Sender<Question>,
}

impl Reader {
    pub(super) fn start(shared: Shared) -> io::Result<Self> {
        let (questions, mut questions_in) = mpsc::channel(QUESTIONS_MAX);
        std::thread::Builder::new().name("journal-read".into()).spawn(move || {
            while let Some(question) = questions_in.blocking_recv() {
                answer(&shared, question);
            }
        })?;
        Ok(Self { questions })
    }

    /// Asks. Overload is answered at once.
    pub(crate) async fn ask<T>(&self, question: impl FnOnce(Reply<T>) -> Question) -> Result<T, WireError> {
        let (reply, answer) = oneshot::channel();
        self.questions.try_send(question(reply)).map_err(|_| {
            WireError::new(
                ErrorCode::Overloaded,
                format!("{QUESTIONS_MAX} questions about jobs wait already"),
            )
            .with_retry_after_ms(200)
        })?;
        answer.await.map_err(|_| WireError::new(ErrorCode::Draining, "the service has stopped"))?
    }
}

fn answer(shared: &Shared, question: Question) {
    let guard = shared.read().unwrap_or_else(PoisonError::into_inner);
    let database = guard.as_ref();
    // Whoever asked may have gone away: then nobody hears the answer.
    match question {
        Question::List { listing, reply } => drop(reply.send(read(database, |db| list(db, &listing)))),
        Question::Record { job, asker, is_running, reply } => {
            drop(reply.send(read(database, |db| record(db, job, &asker, is_running))));
        }
        Question::Work { job, reply } => drop(reply.send(read(database, |db| work(db, job)))),
    }
}

/// Why nothing can be read, or why there is nothing.
enum Failure {
    NoSuchJob(DurableId),
    Broken(String),
}

impl<E: Into<WriteError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Broken(error.into().0)
    }
}

fn read<T>(
    database: Option<&Database>,
    what: impl FnOnce(&Database) -> Result<T, Failure>,
) -> Result<T, WireError> {
    let unavailable =
        |text: &str| WireError::new(ErrorCode::JournalUnavailable, text).with_retry_after_ms(1000);
    let Some(database) = database else {
        return Err(unavailable("the journal cannot be read now; the daemon's log says why"));
    };
    what(database).map_err(|failure| match failure {
        Failure::NoSuchJob(job) => WireError::new(ErrorCode::NotFound, format!("there is no job {job}"))
            .with_hint("`bitnetd jobs` lists those that are kept"),
        Failure::Broken(reason) => {
            tracing::error!(reason, "the journal cannot be read");
            unavailable("the journal cannot be read; the daemon's log says why")
        }
    })
}

fn list(database: &Database, listing: &Listing) -> Result<(Vec<JobSummary>, bool), Failure> {
    let read = database.begin_read()?;
    let jobs = read.open_table(JOBS)?;
    let (mut found, mut n_bytes) = (Vec::new(), 0);
    for entry in jobs.range(..listing.before.unwrap_or(DurableId::MAX))?.rev() {
        let (job, row) = entry?;
        let (job, n_row) = (job.value(), row.value().len());
        let row: JobRow = decode(row.value())?;
        if !listing.asker.may_see(&row.owner) {
            continue;
        }
        let summary = row.summary(job, listing.running.contains(&job));
        if listing.state.is_some_and(|state| state != summary.state) {
            continue;
        }
        if found.len() >= listing.limit as usize || n_bytes > LISTED_BYTES_MAX {
            return Ok((found, true));
        }
        n_bytes += n_row;
        found.push(summary);
    }
    Ok((found, false))
}

fn record(
    database: &Database,
    job: DurableId,
    asker: &Asker,
    is_running: bool,
) -> Result<JobRecord, Failure> {
    let read = database.begin_read()?;
    let row: JobRow = match read.open_table(JOBS)?.get(job)? {
        Some(row) => decode(row.value())?,
        None => return Err(Failure::NoSuchJob(job)),
    };
    // Whose job it is, is nobody else's business: for others it is not there.
    if !asker.may_see(&row.owner) {
        return Err(Failure::NoSuchJob(job));
    }
    let request = match read.open_table(REQUESTS)?.get(job)? {
        Some(request) => decode(request.value())?,
        None => return Err(Failure::Broken(format!("job {job} has no request"))),
    };
    let answer = read.open_table(ANSWERS)?.get(job)?.map(|answer| decode(answer.value())).transpose()?;
    Ok(JobRecord { summary: row.summary(job, is_running), request, answer })
}

fn work(database: &Database, job: DurableId) -> Result<Work, Failure> {
    let read = database.begin_read()?;
    let (row, request) = (read.open_table(JOBS)?.get(job)?, read.open_table(REQUESTS)?.get(job)?);
    let (Some(row), Some(request)) = (row, request) else { return Err(Failure::NoSuchJob(job)) };
    let row: JobRow = decode(row.value())?;
    Ok(Work { request: decode(request.value())?, deaths: row.deaths })
}
