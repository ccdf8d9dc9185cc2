//! The state machine: slots, jobs, admission, routing, fail-over. `(state, event, now) -> actions`, nothing else.
//!
//! It reads no clock, owns no descriptor and talks to nobody, so that any history can be replayed in a test.
//! `event_loop.rs` carries the actions out and turns what happens into events. Time is the distance from the
//! supervisor's start.
//!
//! Invariants, held by the property test in `state/tests.rs` after every event:
//! * a slot has at most one live process; what an older generation says changes nothing;
//! * a job is in one place (one of the two waiting lines, to be resumed, suspect, or on one slot of its model) and ends
//!   exactly once;
//! * the client gets tokens 0, 1, 2 … of each job, without gap or repetition;
//! * no more jobs wait than the configuration allows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bitnetd_config::{Config, QueueConfig, RestartConfig, WatchdogConfig};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::status::{Health, Totals};
use bitnetd_proto::worker_link::ModelSummary;

mod events; // The closed enums: what happened, what to do.
mod jobs; // Admission, routing, tokens, fail-over, the end.
mod prefixes; // Which worker has seen which beginnings of prompts.
mod queue; // Who waits, in which order.
mod reload; // From one configuration to the next.
mod slots; // One process after the other in each slot.
#[cfg(test)]
mod tests;

pub use events::ClientId;
pub(crate) use events::{
    Action, Cause, Edition, Event, Generation, JobId, ModelId, NewConfig, Note, SlotId, Standing, StopSignal,
    WorkerExit, WorkerSaid, slot_edition, slot_number,
};
use jobs::{JobRecord, NewJob};
use queue::Pool;
pub(crate) use queue::WaitQueue;
use reload::Change;
pub(crate) use slots::Slot;
use slots::{Role, Then};

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

impl Policy {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            queue: config.queue.clone(),
            restart: config.restart.clone(),
            watchdog: config.watchdog.clone(),
            max_batch: config.engine.max_batch,
            n_ready_min: config.service.ready_workers,
        }
    }
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
    /// Jobs without a worker, by the model they were accepted for: the present one, and perhaps a former one.
    pools: BTreeMap<ModelId, Pool>,
    /// The model that new jobs get.
    model_id: ModelId,
    /// A reload that is under way.
    change: Option<Change>,
    deadlines: BTreeSet<(Duration, JobId)>,
    jitter: Jitter,
    totals: Totals,
    model: Option<ModelSummary>,
    /// Moving average of the time a job spends on a worker, for the retry hint.
    job_seconds: f64,
    /// When the last event came, to notice that the supervisor itself was stopped.
    last_now: Duration,
    /// When the present event came.
    now: Duration,
    actions: Vec<Action>,
}

impl State {
    /// `n_slots` empty slots. The first event makes them start.
    pub(crate) fn new(policy: Policy, n_slots: u32, seed: u64) -> Self {
        Self {
            service: Service::Running,
            slots: (0..n_slots).map(|number| Slot::new(number, 0, Role::Serving, policy.max_batch)).collect(),
            jobs: BTreeMap::new(),
            policy,
            pools: BTreeMap::from([(0, Pool::default())]),
            model_id: 0,
            change: None,
            deadlines: BTreeSet::new(),
            jitter: Jitter::new(seed),
            totals: Totals::default(),
            model: None,
            job_seconds: 1.0,
            last_now: Duration::ZERO,
            now: Duration::ZERO,
            actions: Vec::new(),
        }
    }

    /// Takes in what happened at `now` and gives what to do, in order.
    pub(crate) fn handle(&mut self, event: Event, now: Duration) -> Vec<Action> {
        self.now = now;
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
                    self.kill(slot, Cause::LinkBroke, reason, Then::Backoff);
                }
            }
            Event::WorkerExited { slot, generation, exit } => {
                if self.current(slot, generation).is_some() {
                    self.process_is_gone(slot, Some(exit), now);
                }
            }
            Event::RestartRequested { slot } => self.restart_slot(slot, now),
            Event::ReloadRequested { config } => self.reload(*config, now),
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
        self.slots.iter_mut().find(|of| of.id == slot)
    }

    fn drain(&mut self, now: Duration) {
        if self.service == Service::Running {
            self.service = Service::Draining { until: now + self.policy.restart.drain_timeout };
            self.abandon_change();
            // What has not begun goes on after the next start.
            while let Some(job) = self.pools.values_mut().find_map(|pool| pool.durable.pop()) {
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
        self.abandon_change();
        self.end_all(&WireError::new(ErrorCode::Draining, "the service is stopping"));
        for slot in self.slot_ids() {
            self.stop_slot(slot, Cause::Stop, StopSignal::Kill, Duration::ZERO);
        }
    }

    /// Brings everything that depends on several slots or jobs up to date.
    fn settle(&mut self, now: Duration) {
        self.settle_change(now);
        self.end_hopeless();
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
                for slot in self.slot_ids() {
                    self.stop_slot(slot, Cause::Stop, StopSignal::Terminate, now + STOP_GRACE);
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

    fn slot_ids(&self) -> Vec<SlotId> {
        self.slots.iter().map(|slot| slot.id).collect()
    }

    /// The slots of the present configuration.
    fn serving(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| slot.role == Role::Serving)
    }

    fn degraded_error(&self, model: ModelId) -> WireError {
        let mut slots = self.slots.iter().filter(|slot| slot.model == model);
        let reason = slots.find_map(Slot::failure).map_or("", |(error, _)| error.message.as_str());
        WireError::new(ErrorCode::Degraded, format!("no worker can be started: {reason}"))
            .with_hint("see the log; `bitnetd restart N` tries slot N again")
            .with_retry_after_ms(30_000)
    }

    // What others ask.

    pub(crate) fn health(&self) -> Health {
        match self.service {
            Service::Running if self.serving().any(Slot::is_failed) => Health::Degraded,
            Service::Running if self.model.is_some() => Health::Ready,
            Service::Running => Health::Starting,
            _ => Health::Draining,
        }
    }

    pub(crate) fn readiness(&self) -> Readiness {
        let slots: Vec<&Slot> = self.serving().collect();
        let n_slots = slots.len();
        let n_wanted = self.policy.n_ready_min.and_then(|min| usize::try_from(min).ok()).unwrap_or(n_slots);
        let n_wanted = n_wanted.min(n_slots);
        let n_ready = slots.iter().filter(|slot| slot.was_ready).count();
        if let Some(model) = self.model.as_ref().filter(|_| n_ready >= n_wanted) {
            return Readiness::Ready(model.clone());
        }
        let mut failures = slots.iter().filter(|slot| !slot.was_ready).filter_map(|slot| {
            let (error, exit_code) = slot.failure()?;
            Some(Readiness::Failed {
                slot: slot_number(slot.id),
                error: error.clone(),
                exit_code: *exit_code,
            })
        });
        // One more than can be spared.
        failures.nth(n_slots - n_wanted).unwrap_or(Readiness::Starting)
    }

    /// Slots that take jobs now.
    pub(crate) fn n_ready(&self) -> usize {
        self.serving().filter(|slot| slot.is_ready()).count()
    }

    /// How long the accepted jobs have when the service stops.
    pub(crate) fn drain_timeout(&self) -> Duration {
        self.policy.restart.drain_timeout
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
        self.pools.values().map(Pool::n_urgent).sum()
    }

    /// The edition of a reload that is not decided yet.
    pub(crate) fn edition_on_trial(&self) -> Option<Edition> {
        self.change.as_ref().and_then(Change::edition_on_trial)
    }

    /// The slot of the present configuration that people know by this number.
    pub(crate) fn slot_with_number(&self, number: u32) -> Option<SlotId> {
        self.serving().map(|slot| slot.id).find(|&slot| slot_number(slot) == number)
    }
}
