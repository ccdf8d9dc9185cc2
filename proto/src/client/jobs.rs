//! Durable jobs through the blocking client: submit, list, wait, cancel.

use std::time::Duration;

use crate::client::{Client, ClientError, unexpected};
use crate::client_link::{ClientMessage, ServerMessage};
use crate::durable::{JobRecord, JobState, JobSummary};
use crate::error::WireError;
use crate::limits::PENDING_QUESTIONS_MAX;
use crate::request::GenerateRequest;

/// Submissions that are on their way at once; more would only wait at the other end.
const SUBMISSIONS_AT_ONCE: usize = PENDING_QUESTIONS_MAX / 2;

/// A job that is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submitted {
    /// Its number.
    pub job: u64,
    /// The seed that is used.
    pub seed: u64,
    /// False if its key named a job that was there already.
    pub is_new: bool,
}

/// Something to submit.
#[derive(Clone, Debug, PartialEq)]
pub struct Submission {
    /// The client's name of it; with one, it can be submitted again without doubling.
    pub key: Option<String>,
    /// What to do.
    pub request: GenerateRequest,
}

/// Which jobs to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobFilter {
    /// Only those in this state.
    pub state: Option<JobState>,
    /// Only those with a lower number.
    pub before: Option<u64>,
    /// So many at most.
    pub limit: Option<u32>,
}

impl Client {
    /// Submits a durable job; it is on disk when this returns.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the server does not take it. After any other error it may or may not be there:
    /// with a key, submit it again.
    pub fn submit(&mut self, submission: Submission) -> Result<Submitted, ClientError> {
        let Submission { key, request } = submission;
        let id = self.next_question();
        self.send(&ClientMessage::Submit { id, key, request: Box::new(request) })?;
        match self.answer_to(id)? {
            ServerMessage::Submitted { job, seed, is_new, .. } => Ok(Submitted { job, seed, is_new }),
            message => Err(unexpected(&message)),
        }
    }

    /// Submits many jobs, many of them at once, so that they share writes to disk. `on_answer` is called for each, in any
    /// order, with its place among `submissions`; it says whether to go on.
    ///
    /// # Errors
    /// If the connection fails. Refusals of single jobs go to `on_answer`.
    pub fn submit_many(
        &mut self,
        submissions: impl IntoIterator<Item = Submission>,
        mut on_answer: impl FnMut(usize, Result<Submitted, WireError>) -> bool,
    ) -> Result<(), ClientError> {
        let first = self.next_id + 1;
        let (mut n_sent, mut n_answered, mut is_wanted) = (0_usize, 0, true);
        let mut submissions = submissions.into_iter();
        loop {
            while is_wanted && n_sent - n_answered < SUBMISSIONS_AT_ONCE {
                let Some(Submission { key, request }) = submissions.next() else { break };
                let id = self.next_question();
                self.send(&ClientMessage::Submit { id, key, request: Box::new(request) })?;
                n_sent += 1;
            }
            if n_answered == n_sent {
                return Ok(());
            }
            let (id, answer) = match self.receive()? {
                ServerMessage::Submitted { id, job, seed, is_new } => {
                    (id, Ok(Submitted { job, seed, is_new }))
                }
                ServerMessage::Error { id: Some(id), error } => (id, Err(error)),
                ServerMessage::Error { id: None, error } => return Err(error.into()),
                message => return Err(unexpected(&message)),
            };
            let place = id.checked_sub(first).and_then(|place| usize::try_from(place).ok());
            let Some(place) = place.filter(|place| *place < n_sent) else { continue };
            n_answered += 1;
            is_wanted &= on_answer(place, answer);
        }
    }

    /// Lists durable jobs, the newest first; the second value says whether there are more.
    ///
    /// # Errors
    /// If the connection fails or the server refuses.
    pub fn jobs(&mut self, filter: JobFilter) -> Result<(Vec<JobSummary>, bool), ClientError> {
        let JobFilter { state, before, limit } = filter;
        let id = self.next_question();
        self.send(&ClientMessage::Jobs { id, state, before, limit })?;
        match self.answer_to(id)? {
            ServerMessage::Jobs { jobs, has_more, .. } => Ok((jobs, has_more)),
            message => Err(unexpected(&message)),
        }
    }

    /// A durable job as it is now.
    ///
    /// # Errors
    /// If the connection fails or there is no such job.
    pub fn result(&mut self, job: u64) -> Result<JobRecord, ClientError> {
        let id = self.next_question();
        self.send(&ClientMessage::Result { id, job })?;
        self.record(id)
    }

    /// A durable job when it has ended, or as it is when `timeout` is over.
    ///
    /// # Errors
    /// If the connection fails or there is no such job.
    pub fn wait(&mut self, job: u64, timeout: Option<Duration>) -> Result<JobRecord, ClientError> {
        let id = self.next_question();
        let timeout_ms = timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
        self.send(&ClientMessage::Wait { id, job, timeout_ms })?;
        self.set_read_timeout(timeout.map(|timeout| timeout.saturating_add(self.timeout)))?;
        let record = self.record(id);
        self.set_read_timeout(Some(self.timeout))?;
        record
    }

    /// Gives a durable job up. It may have ended before: the summary says so.
    ///
    /// # Errors
    /// If the connection fails or there is no such job.
    pub fn cancel_job(&mut self, job: u64) -> Result<JobSummary, ClientError> {
        let id = self.next_question();
        self.send(&ClientMessage::CancelJob { id, job })?;
        match self.answer_to(id)? {
            ServerMessage::Job { summary, .. } => Ok(*summary),
            message => Err(unexpected(&message)),
        }
    }

    fn record(&mut self, id: u64) -> Result<JobRecord, ClientError> {
        match self.answer_to(id)? {
            ServerMessage::Result { record, .. } => Ok(*record),
            message => Err(unexpected(&message)),
        }
    }

    fn next_question(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// The answer with this id; what is left of earlier questions is passed over.
    fn answer_to(&mut self, id: u64) -> Result<ServerMessage, ClientError> {
        loop {
            match self.receive()? {
                ServerMessage::Error { id: None, error } => return Err(error.into()),
                ServerMessage::Error { id: Some(of), error } if of == id => return Err(error.into()),
                answer if super::is_about_an_earlier_job(&answer, id) => {}
                answer => return Ok(answer),
            }
        }
    }
}
