//! The state machine: slots, jobs, admission, routing, fail-over. `(state, event, now) -> actions`, nothing else.
//!
//! It reads no clock, owns no descriptor and talks to nobody, so that any history can be replayed in a test.
//! `event_loop.rs` carries the actions out and turns what happens into events. Time is the distance from the
//! supervisor's start.
//!
//! Invariants, held by the property test in `state/tests.rs` after every event:
//! * a slot has at most one live process; what an older generation says changes nothing;
//! * a job is in one place (one of the two waiting lines, to be resumed, suspect, or on one slot) and ends exactly once;
//! * the client gets tokens 0, 1, 2 … of each job, without gap or repetition;
//! * no more jobs wait than the configuration allows.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bitnetd_config::{QueueConfig, RestartConfig, WatchdogConfig};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::status::{Health, Totals};
use bitnetd_proto::worker_link::ModelSummary;

mod events; // The closed enums: what happened, what to do.
mod jobs; // Admission, routing, tokens, fail-over, the end.
mod queue; // Who waits, in which order.
mod slots; // One process after the other in each slot.
#[cfg(test)]
mod tests;

pub use events::ClientId;
pub(crate) use events::{
    Action, Event, Generation, JobId, Note, SlotId, Standing, StopSignal, WorkerExit, WorkerSaid,
};
use jobs::{JobRecord, NewJob};
pub(crate) use queue::WaitQueue;
pub(crate) use slots::Slot;
use slots::Then;

use crate::backoff::Jitter;

/// A worker that was told to stop and has nothing left to do gets this long before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// The rules, from the configuration.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) queue: QueueConfig,
    pub(crate) restart: RestartConfig,
    pub(crate) watchdog: WatchdogConfig,
    /// Jobs on one slot, at most.
    pub(crate) max_batch: u32,
    /// The service is ready when so many slots have been; `None`: all of them.
    pub(crate) n_ready_min: Option<u32>,
}

/// The life of the whole service. It only ever goes down this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    /// Takes jobs.
    Running,
    /// Takes none; the accepted ones go on until `until`, workers are still replaced for them.
    Draining { until: Duration },
    /// No job is left; workers are being stopped and not replaced.
    Stopping,
    /// No process is left. `Stop` was ordered.
    Stopped,
}

/// Whether the service has come up.
#[derive(Clone, Debug)]
pub(crate) enum Readiness {
    /// Some slot has not been ready yet.
    Starting,
    /// Enough slots have been ready once.
    Ready(ModelSummary),
    /// So many slots were given up before that that it cannot be reached.
    Failed { slot: SlotId, error: WireError, exit_code: ExitCode },
}

/// Everything the supervisor knows.
#[derive(Debug)]
pub(crate) struct State {
    policy: Policy,
    service: Service,
    slots: Vec<Slot>,
    jobs: BTreeMap<JobId, JobRecord>,
    /// Accepted, never on a worker.
    waiting: WaitQueue,
    /// The same, of the journal.
    durable: WaitQueue,
    /// Attended jobs that went before a durable one that could have gone.
    n_overtaken: u32,
    /// Lost their worker; they go first, since their clients are in the middle of an answer.
    resumed: BTreeSet<(Reverse<i8>, JobId)>,
    /// One death from being given up: each gets a worker to itself.
    suspects: VecDeque<JobId>,
    deadlines: BTreeSet<(Duration, JobId)>,
    jitter: Jitter,
    totals: Totals,
    model: Option<ModelSummary>,
    /// Moving average of the time a job spends on a worker, for the retry hint.
    job_seconds: f64,
    /// When the last event came, to notice that the supervisor itself was stopped.
    last_now: Duration,
    actions: Vec<Action>,
}

impl State {
    /// `n_slots` empty slots. The first event makes them start.
    pub(crate) fn new(policy: Policy, n_slots: u32, seed: u64) -> Self {
        Self {
            policy,
            service: Service::Running,
            slots: (0..n_slots).map(Slot::new).collect(),
            jobs: BTreeMap::new(),
            waiting: WaitQueue::default(),
            durable: WaitQueue::default(),
            n_overtaken: 0,
            resumed: BTreeSet::new(),
            suspects: VecDeque::new(),
            deadlines: BTreeSet::new(),
            jitter: Jitter::new(seed),
            totals: Totals::default(),
            model: None,
            job_seconds: 1.0,
            last_now: Duration::ZERO,
            actions: Vec::new(),
        }
    }

    /// Takes in what happened at `now` and gives what to do, in order.
    pub(crate) fn handle(&mut self, event: Event, now: Duration) -> Vec<Action> {
        self.forgive_own_pause(now);
        match event {
            Event::JobSubmitted { job, client, standing, request } => {
                self.submit(NewJob { job, client, standing, request }, now);
            }
            Event::JobCancelled { job } => {
                let error = WireError::new(ErrorCode::Cancelled, "the job was cancelled");
                self.give_up(job, error);
            }
            Event::WorkerSpawned { slot, generation, pid } => {
                if let Some(slot) = self.current(slot, generation) {
                    slot.pid = Some(pid);
                }
            }
            Event::WorkerSpawnFailed { slot, generation, error, exit_code } => {
                if let Some(of) = self.current(slot, generation) {
                    of.start_failure = Some((error, exit_code));
                    self.process_is_gone(slot, None, now);
                }
            }
            Event::WorkerSpoke { slot, generation, message } => {
                if self.current(slot, generation).is_some() {
                    self.worker_spoke(slot, message, now);
                }
            }
            Event::LinkBroke { slot, generation, reason } => {
                if self.current(slot, generation).is_some_and(|slot| slot.is_serving()) {
                    self.kill(slot, reason, Then::Backoff);
                }
            }
            Event::WorkerExited { slot, generation, exit } => {
                if self.current(slot, generation).is_some() {
                    self.process_is_gone(slot, Some(exit), now);
                }
            }
            Event::RestartRequested { slot } => self.restart_slot(slot, now),
            Event::DrainRequested => self.drain(now),
            Event::StopRequested => self.stop_now(),
            Event::TimePassed => {}
        }
        self.expire_jobs(now);
        self.tick_slots(now);
        self.settle(now);
        self.last_now = now;
        std::mem::take(&mut self.actions)
    }

    /// When to send `TimePassed` at the latest.
    ///
    /// While a worker owes an answer that is at least once in a watchdog interval, so that a longer silence is
    /// known to be a pause of the supervisor itself.
    pub(crate) fn next_deadline(&self) -> Option<Duration> {
        let drain = match self.service {
            Service::Draining { until } => Some(until),
            _ => None,
        };
        let job = self.deadlines.first().map(|&(at, _)| at);
        let slots = self.slots.iter().filter_map(|slot| slot.next_deadline(&self.policy));
        let interval = self.policy.watchdog.interval.max(Duration::from_millis(1));
        let look_again = self.slots.iter().any(Slot::owes_answer).then(|| self.last_now + interval);
        slots.chain(drain).chain(job).chain(look_again).min()
    }

    /// If the supervisor did not run for a while (stopped, or the machine slept), the answers of workers may lie
    /// unread: give them a new chance instead of killing them all.
    fn forgive_own_pause(&mut self, now: Duration) {
        let pause = now.saturating_sub(self.last_now);
        if pause > self.policy.watchdog.timeout / 2 + self.policy.watchdog.interval {
            for slot in &mut self.slots {
                slot.forgive_pause(now);
            }
        }
    }

    /// The slot, if `generation` is the process that lives in it now.
    fn current(&mut self, slot: SlotId, generation: Generation) -> Option<&mut Slot> {
        self.slot_mut(slot).filter(|slot| slot.generation == generation && slot.is_live())
    }

    fn slot_mut(&mut self, slot: SlotId) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(slot).ok()?)
    }

    fn drain(&mut self, now: Duration) {
        if self.service == Service::Running {
            self.service = Service::Draining { until: now + self.policy.restart.drain_timeout };
            // What has not begun goes on after the next start.
            while let Some(job) = self.durable.pop() {
                self.give_up(job, WireError::new(ErrorCode::Draining, "the service is stopping"));
            }
            self.note(Note::Draining { n_jobs: self.jobs.len() });
        }
    }

    fn stop_now(&mut self) {
        if self.service == Service::Stopped {
            return;
        }
        self.service = Service::Stopping;
        self.end_all(&WireError::new(ErrorCode::Draining, "the service is stopping"));
        for slot in 0..self.n_slots() {
            self.stop_slot(slot, StopSignal::Kill, Duration::ZERO);
        }
    }

    /// Brings everything that depends on several slots or jobs up to date.
    fn settle(&mut self, now: Duration) {
        if !self.slots.is_empty() && self.slots.iter().all(Slot::is_failed) {
            self.end_all(&self.degraded_error());
        }
        self.dispatch(now);
        if let Service::Draining { until } = self.service {
            if until <= now {
                self.end_all(&WireError::new(
                    ErrorCode::Draining,
                    "the service stopped before the job could end",
                ));
            }
            if self.jobs.is_empty() {
                self.service = Service::Stopping;
                for slot in 0..self.n_slots() {
                    self.stop_slot(slot, StopSignal::Terminate, now + STOP_GRACE);
                }
            }
        }
        if self.service == Service::Stopping && !self.slots.iter().any(Slot::is_live) {
            self.service = Service::Stopped;
            self.actions.push(Action::Stop);
        }
    }

    fn note(&mut self, note: Note) {
        self.actions.push(Action::Note(note));
    }

    fn n_slots(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    fn degraded_error(&self) -> WireError {
        let reason =
            self.slots.iter().find_map(Slot::failure).map_or("", |(error, _)| error.message.as_str());
        WireError::new(ErrorCode::Degraded, format!("no worker can be started: {reason}"))
            .with_hint("see the log; `bitnetd restart N` tries slot N again")
            .with_retry_after_ms(30_000)
    }

    // What others ask.

    pub(crate) fn health(&self) -> Health {
        match self.service {
            Service::Running if self.slots.iter().any(Slot::is_failed) => Health::Degraded,
            Service::Running if self.model.is_some() => Health::Ready,
            Service::Running => Health::Starting,
            _ => Health::Draining,
        }
    }

    pub(crate) fn readiness(&self) -> Readiness {
        let n_slots = self.slots.len();
        let n_wanted = self.policy.n_ready_min.and_then(|min| usize::try_from(min).ok()).unwrap_or(n_slots);
        let n_wanted = n_wanted.min(n_slots);
        let n_ready = self.slots.iter().filter(|slot| slot.was_ready).count();
        if let Some(model) = self.model.as_ref().filter(|_| n_ready >= n_wanted) {
            return Readiness::Ready(model.clone());
        }
        let mut failures = self.slots.iter().filter(|slot| !slot.was_ready).filter_map(|slot| {
            let (error, exit_code) = slot.failure()?;
            Some(Readiness::Failed { slot: slot.id, error: error.clone(), exit_code: *exit_code })
        });
        // One more than can be spared.
        failures.nth(n_slots - n_wanted).unwrap_or(Readiness::Starting)
    }

    /// Slots that take jobs now.
    pub(crate) fn n_ready(&self) -> usize {
        self.slots.iter().filter(|slot| slot.is_ready()).count()
    }

    /// Jobs that may wait.
    pub(crate) fn queue_max(&self) -> u32 {
        self.policy.queue.max_jobs
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    pub(crate) fn model(&self) -> Option<&ModelSummary> {
        self.model.as_ref()
    }

    /// Jobs that have no worker now.
    pub(crate) fn n_queued(&self) -> usize {
        self.waiting.len() + self.resumed.len() + self.suspects.len()
    }
}
