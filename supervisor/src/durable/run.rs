//! One durable job on the workers: its request from the journal, its tokens into an answer.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use bitnetd_proto::durable::JobAnswer;
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::event::{Done, Token};
use tokio::sync::{mpsc, watch};

use crate::event_loop::{Command, Ended, Submission};
use crate::journal::{DurableId, OpenJob, Outcome, Question, Reader, now_ms, owner_of};
use crate::service::{JobEvent, Service};
use crate::state::Standing;

/// The service that works, as long as somebody else keeps it.
#[derive(Clone, Debug)]
pub(crate) struct Workers {
    /// Weak: durable jobs alone do not keep a service alive that its owner has dropped.
    pub(crate) commands: mpsc::WeakSender<Command>,
    /// Says when the service has ended.
    pub(crate) ended: watch::Receiver<Option<Ended>>,
    /// Jobs that are given to the workers at a time, at most.
    pub(crate) n_places: Arc<AtomicUsize>,
}

/// How a run ended.
#[derive(Debug)]
pub(super) enum Ran {
    Ended(Outcome),
    /// The workers do not take it now; it stays in the journal.
    GivenBack,
}

/// What a run says before its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeathsCounted {
    pub(super) job: DurableId,
    pub(super) deaths: u32,
}

/// Works on one job to its end.
pub(super) async fn run(
    open: OpenJob,
    workers: Workers,
    reader: Reader,
    deaths_out: mpsc::Sender<DeathsCounted>,
) -> Ran {
    let job = open.job;
    let work = match reader.ask(|reply| Question::Work { job, reply }).await {
        Ok(work) => work,
        Err(error) if error.code == ErrorCode::NotFound => return Ran::Ended(Outcome::Failed(error)),
        Err(_) => return Ran::GivenBack, // The reader has logged it, or has too much to do.
    };
    let mut request = work.request;
    if let Some(deadline_ms) = open.deadline_ms {
        match deadline_ms.checked_sub(now_ms()).filter(|ms| *ms > 0) {
            Some(left_ms) => request.deadline_ms = Some(left_ms),
            None => return Ran::Ended(too_late()),
        }
    }
    let Some(commands) = workers.commands.upgrade() else { return Ran::GivenBack };
    let new = Submission {
        client: owner_of(&open.owner),
        standing: Standing::Durable { deaths: work.deaths },
        request: Box::new(request),
    };
    let mut running = match Service::submit_with(commands, new).await {
        Ok(running) => running,
        Err(error) => return refused(error),
    };
    let (mut answer, mut deaths) = (Collected::default(), work.deaths);
    loop {
        match running.next().await {
            Some(JobEvent::Token(token)) => {
                if deaths > 0 {
                    deaths = 0;
                    // The keeper is there as long as this task is; if it has too much to do, it waits a little.
                    let _gone = deaths_out.send(DeathsCounted { job, deaths }).await;
                }
                answer.push(token);
            }
            Some(JobEvent::WorkerDied { deaths: n }) => {
                deaths = n;
                let _gone = deaths_out.send(DeathsCounted { job, deaths }).await;
            }
            Some(JobEvent::Done(done)) => return Ran::Ended(Outcome::Done(Box::new(answer.finish(done)))),
            Some(JobEvent::Failed(error)) => return refused(error),
            None => return Ran::GivenBack,
        }
    }
}

/// A refusal that says nothing about the job leaves it where it was. `Cancelled` is one: its client cancels through the
/// journal, so this is the service that went away, or that found us too slow a reader.
fn refused(error: WireError) -> Ran {
    match error.code {
        ErrorCode::Draining | ErrorCode::Degraded | ErrorCode::Overloaded | ErrorCode::Cancelled => {
            Ran::GivenBack
        }
        _ => Ran::Ended(Outcome::Failed(error)),
    }
}

pub(super) fn too_late() -> Outcome {
    let text = "the job's deadline passed before it ended";
    Outcome::Failed(WireError::new(ErrorCode::DeadlineExceeded, text))
}

/// An answer as it grows.
#[derive(Debug, Default)]
struct Collected {
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<bitnetd_proto::event::TokenLogprobs>,
}

impl Collected {
    fn push(&mut self, token: Token) {
        self.text.push_str(&token.text);
        self.token_ids.push(token.id);
        self.logprobs.extend(token.logprobs);
    }

    fn finish(self, done: Done) -> JobAnswer {
        let Done { finish_reason, tail, usage, timings, model } = done;
        JobAnswer {
            text: self.text + &tail,
            token_ids: self.token_ids,
            logprobs: self.logprobs,
            finish_reason,
            usage,
            timings,
            model,
        }
    }
}
