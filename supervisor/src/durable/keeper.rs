//! The keeper: one task that knows every durable job that has not ended, feeds the workers, and tells who waits.
//!
//! It owns the order and the places of jobs in memory; what they ask and answer is on disk. It never waits for the
//! disk: orders go to the journal's thread by `try_send`, and what came of them comes back as a report. An end that
//! cannot be written (a full disk) is kept and tried again; until it is written, nothing new is begun.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::request::GenerateRequest;
use bitnetd_proto::status::JournalReport;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};

use super::run::{DeathsCounted, Ran, Workers, run, too_late};
use super::{Ask, Reply, Submitted, stopping};
use crate::journal::{
    Applied, Asker, Counts, DurableId, OpenJob, Order, Outcome, Reader, Report, Writer, now_ms, owner_of,
};
use crate::state::WaitQueue;

/// How long nothing is begun after the workers took nothing.
const PAUSE: Duration = Duration::from_secs(2);
/// How often writing is tried again after it failed.
const RETRY: Duration = Duration::from_secs(1);
/// How often old results are looked for when nothing else is written.
const LOOK_ROUND: Duration = Duration::from_secs(60);
/// Deaths that wait to be counted.
const DEATHS_MAX: usize = 64;

/// Where a job is that has not ended on disk.
#[derive(Debug)]
enum Place {
    /// In `Keeper::queue`.
    Queued,
    /// A task works on it.
    Running(AbortHandle),
    /// Its end is on the way to the disk.
    Ending,
}

#[derive(Debug)]
struct Held {
    open: OpenJob,
    place: Place,
    watchers: Vec<Reply<()>>,
}

/// Who waits for an order.
#[derive(Debug)]
enum Ticket {
    Submission(Reply<Submitted>),
    Cancellation(DurableId, Reply<()>),
}

/// The task.
#[derive(Debug)]
pub(super) struct Keeper {
    writer: Writer,
    reader: Reader,
    workers: Workers,
    jobs: HashMap<DurableId, Held>,
    queue: WaitQueue,
    /// Of queued and running jobs, in milliseconds since 1970.
    deadlines: BTreeSet<(u64, DurableId)>,
    runs: JoinSet<Ran>,
    run_of: HashMap<tokio::task::Id, DurableId>,
    deaths: (mpsc::Sender<DeathsCounted>, mpsc::Receiver<DeathsCounted>),
    /// Ends that are to be written.
    unsent: VecDeque<Order>,
    tickets: HashMap<u64, Ticket>,
    last_ticket: u64,
    seeds: RandomState,
    /// Nothing is begun before.
    paused_until: Option<Instant>,
    next_look: Instant,
    /// When writing is tried again after it failed.
    retry_at: Option<Instant>,
    /// Whether the journal's thread has said how it is; until then the report is what opening it came to.
    is_known: bool,
    /// Why nothing can be written.
    problem: Option<String>,
    notice: Option<String>,
    counts: Counts,
    report: Arc<Mutex<JournalReport>>,
    is_closing: Arc<AtomicBool>,
}

impl Keeper {
    pub(super) fn new(
        writer: Writer,
        reader: Reader,
        workers: Workers,
        report: Arc<Mutex<JournalReport>>,
        is_closing: Arc<AtomicBool>,
    ) -> Self {
        Self {
            writer,
            reader,
            workers,
            jobs: HashMap::new(),
            queue: WaitQueue::default(),
            deadlines: BTreeSet::new(),
            runs: JoinSet::new(),
            run_of: HashMap::new(),
            deaths: mpsc::channel(DEATHS_MAX),
            unsent: VecDeque::new(),
            tickets: HashMap::new(),
            last_ticket: 0,
            seeds: RandomState::new(),
            paused_until: None,
            next_look: Instant::now() + LOOK_ROUND,
            retry_at: None,
            is_known: false,
            problem: None,
            notice: None,
            counts: Counts::default(),
            report,
            is_closing,
        }
    }

    /// Runs until the service has ended, or nobody holds it any more; then writes what there is and closes the file.
    pub(super) async fn run(mut self, mut asks: mpsc::Receiver<Ask>, mut reports: mpsc::Receiver<Report>) {
        let mut ended = self.workers.ended.clone();
        loop {
            self.send_ends();
            self.feed();
            self.publish();
            let wake = self.next_wake();
            tokio::select! {
                report = reports.recv() => match report {
                    Some(report) => self.hear(report),
                    None => {
                        tracing::error!("the journal's thread has ended; durable jobs are not kept any more");
                        break;
                    }
                },
                ask = asks.recv() => match ask {
                    Some(ask) => self.answer(ask),
                    None => {
                        // Nobody holds the service any more.
                        self.runs.abort_all();
                        break;
                    }
                },
                Some(ran) = self.runs.join_next_with_id() => self.run_ended(ran),
                Some(counted) = self.deaths.1.recv() => {
                    let DeathsCounted { job, deaths } = counted;
                    self.write_if_possible(Order::CountDeaths { job, deaths });
                }
                _ = ended.wait_for(Option::is_some) => break,
                () = sleep_until(wake) => self.look_round(),
            }
        }
        self.close(reports).await;
    }

    /// Takes in what the last runs came to, has everything written, and waits for the thread.
    async fn close(mut self, mut reports: mpsc::Receiver<Report>) {
        self.is_closing.store(true, Ordering::Relaxed);
        while let Some(ran) = self.runs.join_next_with_id().await {
            self.run_ended(ran);
        }
        self.send_ends();
        let n_unwritten = self.unsent.len();
        if n_unwritten > 0 {
            tracing::error!(
                n_unwritten,
                "answers could not be written; these jobs run again after the next start"
            );
        }
        let thread = self.writer.close();
        while let Some(report) = reports.recv().await {
            if let Report::Carried { ticket, outcome, .. } = report {
                let ticket = self.tickets.remove(&ticket);
                settle(ticket, &outcome);
            }
        }
        // The thread drops its end of `reports` last.
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the journal's thread panicked");
        }
    }

    fn next_wake(&self) -> Instant {
        let deadline = self.deadlines.first().map(|&(at_ms, _)| {
            Instant::now() + Duration::from_millis(at_ms.saturating_sub(now_ms())).min(LOOK_ROUND)
        });
        let others = [deadline, self.retry_at, self.paused_until];
        others.into_iter().flatten().fold(self.next_look, Instant::min)
    }

    /// What the time asks for: deadlines, another try to write, old results.
    fn look_round(&mut self) {
        let now = Instant::now();
        self.paused_until = self.paused_until.filter(|until| *until > now);
        while let Some(&(_, job)) = self.deadlines.first().filter(|(at_ms, _)| *at_ms <= now_ms()) {
            self.deadlines.pop_first();
            // One that runs ends by the supervisor's own clock.
            if self.jobs.get(&job).is_some_and(|held| matches!(held.place, Place::Queued)) {
                self.end(job, too_late());
            }
        }
        if self.retry_at.is_some_and(|at| at <= now) || self.next_look <= now {
            self.retry_at = None;
            self.next_look = now + LOOK_ROUND;
            self.write_if_possible(Order::Probe);
        }
    }

    // Questions.

    fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::Submit { owner, key, request, reply } => self.submit(owner, key, *request, reply),
            Ask::Running { reply } => {
                let running = |held: &&Held| matches!(held.place, Place::Running(_));
                let running = self.jobs.values().filter(running).map(|held| held.open.job).collect();
                let _gone = reply.send(Ok(running));
            }
            Ask::Watch { job, asker, reply } => self.watch(job, &asker, reply),
            Ask::Cancel { job, asker, reply } => self.cancel(job, &asker, reply),
        }
    }

    fn submit(
        &mut self,
        owner: String,
        key: Option<String>,
        mut request: GenerateRequest,
        reply: Reply<Submitted>,
    ) {
        let refusal = match &self.problem {
            _ if self.is_closing.load(Ordering::Relaxed) => Some(stopping()),
            Some(problem) => Some(unavailable(problem)),
            None => None,
        };
        if let Some(refusal) = refusal {
            let _gone = reply.send(Err(refusal));
            return;
        }
        let has_own_seed = request.sampling.seed.is_some();
        // Below 2^53, so that a client in any language can hold it exactly.
        let drawn = || self.seeds.hash_one((self.last_ticket, now_ms())) >> 11;
        request.sampling.seed = Some(request.sampling.seed.unwrap_or_else(drawn));
        let order = Order::Submit { owner, key, request: Arc::new(request), has_own_seed };
        self.write(order, Ticket::Submission(reply));
    }

    /// A job that is not held has ended, or never was: the reader knows.
    fn watch(&mut self, job: DurableId, asker: &Asker, reply: Reply<()>) {
        match self.jobs.get_mut(&job).filter(|held| asker.may_see(&held.open.owner)) {
            Some(held) => {
                held.watchers.retain(|watcher| !watcher.is_closed());
                held.watchers.push(reply);
            }
            None => drop(reply.send(Ok(()))),
        }
    }

    fn cancel(&mut self, job: DurableId, asker: &Asker, reply: Reply<()>) {
        let Some(held) = self.jobs.get_mut(&job).filter(|held| asker.may_see(&held.open.owner)) else {
            drop(reply.send(Ok(())));
            return;
        };
        if let Some(problem) = &self.problem {
            drop(reply.send(Err(unavailable(problem))));
            return;
        }
        match std::mem::replace(&mut held.place, Place::Ending) {
            Place::Ending => held.watchers.push(reply),
            Place::Queued => {
                self.queue.remove(&owner_of(&held.open.owner), held.open.priority, job);
                self.write(Order::End { job, outcome: Outcome::Cancelled }, Ticket::Cancellation(job, reply));
            }
            Place::Running(task) => {
                task.abort(); // It drops the job, which takes it from its worker.
                self.write(Order::End { job, outcome: Outcome::Cancelled }, Ticket::Cancellation(job, reply));
            }
        }
    }

    // Orders to the journal, and what comes of them.

    fn write(&mut self, order: Order, ticket: Ticket) {
        self.last_ticket += 1;
        let number = self.last_ticket;
        match self.writer.send(number, order) {
            Ok(()) => {
                self.tickets.insert(number, ticket);
            }
            Err(_) => {
                let error = WireError::new(ErrorCode::Overloaded, "too many writes wait for the disk")
                    .with_retry_after_ms(500);
                self.undo(ticket, error);
            }
        }
    }

    /// For orders that nobody waits for and that may get lost.
    fn write_if_possible(&mut self, order: Order) {
        self.last_ticket += 1;
        let _full = self.writer.send(self.last_ticket, order);
    }

    fn end(&mut self, job: DurableId, outcome: Outcome) {
        let Some(held) = self.jobs.get_mut(&job) else { return };
        if matches!(std::mem::replace(&mut held.place, Place::Ending), Place::Queued) {
            self.queue.remove(&owner_of(&held.open.owner), held.open.priority, job);
        }
        self.unsent.push_back(Order::End { job, outcome });
    }

    fn send_ends(&mut self) {
        while self.retry_at.is_none()
            && let Some(order) = self.unsent.pop_front()
        {
            self.last_ticket += 1;
            if let Err(order) = self.writer.send(self.last_ticket, order) {
                self.unsent.push_front(order);
                return; // The next report is a sign that there is room.
            }
        }
    }

    fn hear(&mut self, report: Report) {
        match report {
            Report::Opened { jobs } => self.reconcile(jobs),
            Report::Carried { ticket, order, outcome } => self.carried(ticket, order, outcome),
            Report::Now { counts, problem, notice } => {
                match (&self.problem, &problem) {
                    (None, Some(problem)) => {
                        tracing::error!(
                            problem,
                            "the journal cannot be written: durable jobs are refused until it can"
                        );
                    }
                    (Some(_), None) => tracing::info!("the journal can be written again"),
                    _ => {}
                }
                if problem.is_some() {
                    self.retry_at.get_or_insert_with(|| Instant::now() + RETRY);
                } else {
                    self.retry_at = None;
                }
                (self.counts, self.problem, self.notice) = (counts, problem, notice);
                self.is_known = true;
            }
        }
    }

    /// The file says what there is; what runs goes on.
    fn reconcile(&mut self, jobs: Vec<OpenJob>) {
        let known: BTreeSet<DurableId> = jobs.iter().map(|open| open.job).collect();
        let lost: Vec<DurableId> = self.jobs.keys().copied().filter(|job| !known.contains(job)).collect();
        for job in lost {
            if let Some(held) = self.jobs.get(&job)
                && matches!(held.place, Place::Queued)
            {
                self.queue.remove(&owner_of(&held.open.owner), held.open.priority, job);
                self.forget(job);
            }
        }
        let n_before = self.jobs.len();
        jobs.into_iter().for_each(|open| self.hold(open));
        let n_jobs = self.jobs.len() - n_before;
        if n_jobs > 0 {
            tracing::info!(n_jobs, "durable jobs of the journal go on");
        }
    }

    fn hold(&mut self, open: OpenJob) {
        let job = open.job;
        if self.jobs.contains_key(&job) {
            return;
        }
        self.queue.push(owner_of(&open.owner), open.priority, job);
        if let Some(at_ms) = open.deadline_ms {
            self.deadlines.insert((at_ms, job));
        }
        self.jobs.insert(job, Held { open, place: Place::Queued, watchers: Vec::new() });
    }

    /// The job has ended on disk.
    fn forget(&mut self, job: DurableId) {
        let Some(held) = self.jobs.remove(&job) else { return };
        if let Some(at_ms) = held.open.deadline_ms {
            self.deadlines.remove(&(at_ms, job));
        }
        for watcher in held.watchers {
            let _gone = watcher.send(Ok(()));
        }
    }

    fn carried(&mut self, ticket: u64, order: Order, outcome: Result<Applied, String>) {
        let ticket = self.tickets.remove(&ticket);
        match (&outcome, order) {
            (Ok(Applied::Submitted { open: Some(open), .. }), _) => self.hold(open.clone()),
            (Ok(Applied::Ended(state)), Order::End { job, .. }) => {
                tracing::debug!(durable = job, ?state, "durable job ended");
                self.forget(job);
            }
            (Err(reason), order) => {
                if let Some(ticket) = ticket {
                    self.undo(ticket, unavailable(reason));
                } else if matches!(order, Order::End { .. }) {
                    self.unsent.push_back(order);
                    self.retry_at.get_or_insert_with(|| Instant::now() + RETRY);
                }
                return;
            }
            _ => {}
        }
        settle(ticket, &outcome);
    }

    /// An order was not carried out, and who waits for it hears why.
    fn undo(&mut self, ticket: Ticket, error: WireError) {
        match ticket {
            Ticket::Submission(reply) => drop(reply.send(Err(error))),
            Ticket::Cancellation(job, reply) => {
                self.back_to_queue(job);
                drop(reply.send(Err(error)));
            }
        }
    }

    // Work.

    fn feed(&mut self) {
        let may_begin = |keeper: &Self| {
            keeper.runs.len() < keeper.workers.n_places.load(Ordering::Relaxed)
                && keeper.problem.is_none()
                && keeper.unsent.is_empty()
                && keeper.paused_until.is_none()
                && !keeper.is_closing.load(Ordering::Relaxed)
        };
        while may_begin(self)
            && let Some(job) = self.queue.pop()
        {
            let Some(held) = self.jobs.get_mut(&job) else { continue };
            let work =
                run(held.open.clone(), self.workers.clone(), self.reader.clone(), self.deaths.0.clone());
            let task = self.runs.spawn(work);
            self.run_of.insert(task.id(), job);
            held.place = Place::Running(task);
            self.write_if_possible(Order::Start { job });
        }
    }

    fn run_ended(&mut self, ran: Result<(tokio::task::Id, Ran), JoinError>) {
        let id = match &ran {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let Some(job) = self.run_of.remove(&id) else { return };
        if !self.jobs.get(&job).is_some_and(|held| matches!(held.place, Place::Running(_))) {
            return; // It was cancelled meanwhile.
        }
        match ran {
            Ok((_, Ran::Ended(outcome))) => self.end(job, outcome),
            Ok((_, Ran::GivenBack)) => {
                self.paused_until = Some(Instant::now() + PAUSE);
                self.back_to_queue(job);
            }
            Err(error) => {
                tracing::error!(durable = job, %error, "the task of a durable job failed");
                self.paused_until = Some(Instant::now() + PAUSE);
                self.back_to_queue(job);
            }
        }
    }

    fn back_to_queue(&mut self, job: DurableId) {
        if let Some(held) = self.jobs.get_mut(&job)
            && !matches!(std::mem::replace(&mut held.place, Place::Queued), Place::Queued)
        {
            self.queue.push(owner_of(&held.open.owner), held.open.priority, job);
        }
    }

    fn publish(&self) {
        if !self.is_known {
            return;
        }
        let n_running = self.runs.len() as u64;
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.running = n_running;
        report.queued = (self.jobs.len() as u64).saturating_sub(n_running);
        report.ended = self.counts.n_ended;
        report.bytes = self.counts.bytes;
        report.problem = self.problem.clone().or_else(|| self.notice.clone());
        report.is_writable = self.problem.is_none();
    }
}

/// Tells who waits for an order what came of it.
fn settle(ticket: Option<Ticket>, outcome: &Result<Applied, String>) {
    let lost = || WireError::new(ErrorCode::Internal, "the journal answered something else");
    match (ticket, outcome) {
        (Some(Ticket::Submission(reply)), outcome) => {
            let answer = match outcome {
                Ok(Applied::Submitted { job, seed, is_new, .. }) => {
                    Ok(Submitted { job: *job, seed: *seed, is_new: *is_new })
                }
                Ok(Applied::Refused(error)) => Err(error.clone()),
                Ok(_) => Err(lost()),
                Err(reason) => Err(unavailable(reason)),
            };
            drop(reply.send(answer));
        }
        (Some(Ticket::Cancellation(_, reply)), outcome) => {
            drop(reply.send(outcome.as_ref().map(|_| ()).map_err(|reason| unavailable(reason))));
        }
        (None, _) => {}
    }
}

fn unavailable(reason: &str) -> WireError {
    WireError::new(ErrorCode::JournalUnavailable, format!("nothing was written: {reason}"))
        .with_hint("`bitnetd status` and the daemon's log say how the journal is")
        .with_retry_after_ms(1000)
}
