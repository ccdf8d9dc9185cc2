//! Durable jobs, as clients see them: submit, list, wait, cancel. What is decided and done about them is in `keeper`.
//!
//! Questions go to the keeper's task or straight to the journal's reader; nothing here waits for the disk on the
//! event loop.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bitnetd_proto::durable::{JobRecord, JobState, JobSummary, validate_durable};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::limits::JOBS_LISTED_MAX;
use bitnetd_proto::request::GenerateRequest;
use bitnetd_proto::status::JournalReport;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::journal::{Asker, DurableId, Journal, Listing, Question, Reader, owner_name};
use crate::state::ClientId;

mod keeper; // The task that knows every job that has not ended.
mod run; // One job on the workers.

use keeper::Keeper;
pub(crate) use run::Workers;

/// Questions that wait for the keeper, at most.
const ASKS_MAX: usize = 1024;
/// Jobs in a list whose length is not given.
const LISTED_USUALLY: u32 = 100;

/// A job that is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Submitted {
    pub(crate) job: DurableId,
    pub(crate) seed: u64,
    pub(crate) is_new: bool,
}

type Reply<T> = oneshot::Sender<Result<T, WireError>>;

/// What the keeper is asked.
#[derive(Debug)]
enum Ask {
    Submit {
        owner: String,
        key: Option<String>,
        request: Box<GenerateRequest>,
        reply: Reply<Submitted>,
    },
    /// Which jobs run now.
    Running {
        reply: Reply<HashSet<DurableId>>,
    },
    /// Answered when the job has ended, or is not there.
    Watch {
        job: DurableId,
        asker: Asker,
        reply: Reply<()>,
    },
    /// The same, and the job is given up first.
    Cancel {
        job: DurableId,
        asker: Asker,
        reply: Reply<()>,
    },
}

/// The way to the durable jobs of a service.
#[derive(Clone, Debug)]
pub(crate) struct Durable {
    asks: mpsc::Sender<Ask>,
    reader: Reader,
    report: Arc<Mutex<JournalReport>>,
    is_closing: Arc<AtomicBool>,
    closed: watch::Receiver<bool>,
}

impl Durable {
    /// Takes a journal into service: what has not ended in it goes on.
    pub(crate) fn start(journal: Journal, workers: Workers) -> std::io::Result<Self> {
        let report = Arc::new(Mutex::new(journal.report()));
        let (writer, reports, reader) = journal.start()?;
        let (asks, asks_in) = mpsc::channel(ASKS_MAX);
        let (closed_out, closed) = watch::channel(false);
        let is_closing = Arc::new(AtomicBool::new(false));
        let keeper = Keeper::new(writer, reader.clone(), workers, report.clone(), is_closing.clone());
        tokio::spawn(async move {
            keeper.run(asks_in, reports).await;
            closed_out.send_replace(true);
        });
        Ok(Self { asks, reader, report, is_closing, closed })
    }

    pub(crate) async fn submit(
        &self,
        client: &ClientId,
        key: Option<String>,
        request: Box<GenerateRequest>,
    ) -> Result<Submitted, WireError> {
        validate_durable(&request, key.as_deref())?;
        if self.is_closing.load(Ordering::Relaxed) {
            return Err(stopping());
        }
        let owner = owner_name(client);
        self.ask(|reply| Ask::Submit { owner, key, request, reply }).await
    }

    pub(crate) async fn jobs(
        &self,
        client: &ClientId,
        state: Option<JobState>,
        before: Option<DurableId>,
        limit: Option<u32>,
    ) -> Result<(Vec<JobSummary>, bool), WireError> {
        let limit = limit.unwrap_or(LISTED_USUALLY);
        if !(1..=JOBS_LISTED_MAX).contains(&limit) {
            let text = format!("invalid request: limit is {limit}, it must be from 1 to {JOBS_LISTED_MAX}");
            return Err(WireError::new(ErrorCode::InvalidRequest, text));
        }
        let running = self.ask(|reply| Ask::Running { reply }).await?;
        let listing = Listing { asker: asker(client), state, before, limit, running };
        self.reader.ask(|reply| Question::List { listing, reply }).await
    }

    pub(crate) async fn result(&self, client: &ClientId, job: DurableId) -> Result<JobRecord, WireError> {
        let asker = asker(client);
        let running = self.ask(|reply| Ask::Running { reply }).await?;
        let is_running = running.contains(&job);
        self.reader.ask(|reply| Question::Record { job, asker, is_running, reply }).await
    }

    /// The job when it has ended, or as it is after `longest`.
    pub(crate) async fn wait(
        &self,
        client: &ClientId,
        job: DurableId,
        longest: Option<Duration>,
    ) -> Result<JobRecord, WireError> {
        let asker = asker(client);
        let ended = self.ask(|reply| Ask::Watch { job, asker, reply });
        match longest {
            None => ended.await?,
            Some(longest) => timeout(longest, ended).await.unwrap_or(Ok(()))?,
        }
        self.result(client, job).await
    }

    pub(crate) async fn cancel(&self, client: &ClientId, job: DurableId) -> Result<JobSummary, WireError> {
        let asker = asker(client);
        self.ask(|reply| Ask::Cancel { job, asker, reply }).await?;
        Ok(self.result(client, job).await?.summary)
    }

    /// How the journal is.
    pub(crate) fn report(&self) -> JournalReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on nothing is accepted.
    pub(crate) fn refuse_more(&self) {
        self.is_closing.store(true, Ordering::Relaxed);
    }

    /// Waits until everything is written and the file is closed.
    pub(crate) async fn closed(&self) {
        let mut closed = self.closed.clone();
        let _gone = closed.wait_for(|closed| *closed).await;
    }

    async fn ask<T>(&self, question: impl FnOnce(Reply<T>) -> Ask) -> Result<T, WireError> {
        let (reply, answer) = oneshot::channel();
        self.asks.try_send(question(reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                WireError::new(ErrorCode::Overloaded, format!("{ASKS_MAX} questions about jobs wait already"))
                    .with_retry_after_ms(200)
            }
            mpsc::error::TrySendError::Closed(_) => stopping(),
        })?;
        answer.await.map_err(|_| stopping())?
    }
}

/// Everybody sees its own jobs; root and the daemon's own user see all, since they could read the file anyway.
fn asker(client: &ClientId) -> Asker {
    let sees_all = match client {
        ClientId::InProcess => true,
        ClientId::Uid(uid) => *uid == 0 || *uid == nix::unistd::geteuid().as_raw(),
        ClientId::Key(_) => false,
    };
    Asker { owner: owner_name(client), sees_all }
}

fn stopping() -> WireError {
    WireError::new(ErrorCode::Draining, "the service is stopping").with_retry_after_ms(1000)
}
