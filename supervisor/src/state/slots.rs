//! Slots: one process after the other, how each is watched, and what follows when it ends.

use std::collections::BTreeSet;
use std::time::Duration;

use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::handshake::check_version;
use bitnetd_proto::worker_link::{Confinement, WorkerLoad};

use super::events::{
    Action, Cause, Generation, JobId, ModelId, Note, SlotId, StopSignal, WorkerExit, WorkerSaid, slot_number,
};
use super::prefixes::SeenPrefixes;
use super::{Policy, Service, State};
use crate::backoff::RestartHistory;
use crate::meter::Meter;

/// Where a slot is. `Starting`, `Ready` and `Stopping` have a process, the others have none.
///
/// ```text
/// Backoff --wait over--> Starting --ready--> Ready
///    ^                      |                  |
///    |      died, broke, too slow, hung: killed|
///    +---- reaped --- Stopping <---------------+
///    |                   |
///    |                   +-- told to stop --> Stopped
///    +-- too often, or a permanent exit code --> Failed
/// ```
#[derive(Clone, Debug, PartialEq)]
enum Phase {
    /// There is a process (or is about to be); it has not said that it is ready. Ends by `until`.
    Starting { until: Duration },
    /// It takes jobs and answers pings.
    Ready { watch: Watch },
    /// It was told to end. It has no jobs any more, and nothing it says counts. Killed at `kill_at`.
    Stopping { then: Then, kill_at: Option<Duration> },
    /// Waits to be started.
    Backoff { until: Duration },
    /// Given up until an operator restarts it.
    Failed { error: WireError, exit_code: ExitCode },
    /// The service is stopping, or has stopped.
    Stopped,
}

/// What follows when a stopping process is reaped.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Then {
    /// Another one after a wait; it counts as a restart.
    Backoff,
    /// Another one at once, at an operator's wish.
    Restart,
    /// None: starting again cannot help.
    Fail { error: WireError, exit_code: ExitCode },
    /// None: the service stops.
    Stop,
}

/// What a slot is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It belongs to the present configuration.
    Serving,
    /// The first worker of a new configuration: what becomes of it decides whether that one comes to hold.
    Trial,
    /// It belongs to a former configuration: replaced soon, or finishing the jobs of a former model.
    Retiring,
    /// It is told to end, and forgotten when it has.
    Leaving,
}

/// The watchdog of one ready worker.
#[derive(Clone, Debug, PartialEq)]
struct Watch {
    seq: u64,
    /// When the unanswered ping was sent.
    asked_at: Option<Duration>,
    ask_at: Duration,
}

/// One slot.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) id: SlotId,
    pub(super) role: Role,
    /// The model that its processes load.
    pub(super) model: ModelId,
    /// Jobs that its processes work on together, at most.
    pub(super) max_batch: u32,
    phase: Phase,
    /// Processes so far.
    pub(super) generation: Generation,
    pub(crate) pid: Option<u32>,
    /// Jobs on board; only a `Ready` slot has any.
    pub(super) jobs: BTreeSet<JobId>,
    /// A suspect job that has this worker to itself.
    pub(super) alone: Option<JobId>,
    /// What its process has read; empty if there is none.
    pub(super) seen: SeenPrefixes,
    pub(crate) restarts: u64,
    history: RestartHistory,
    /// Why the process said it cannot start.
    pub(super) start_failure: Option<(WireError, ExitCode)>,
    /// A process of this slot has been ready.
    pub(super) was_ready: bool,
    pub(crate) load: WorkerLoad,
    /// When the live process said that, if it has.
    load_at: Option<Duration>,
    prefill: Meter,
    decode: Meter,
    /// What the live process calls its model.
    pub(super) model_name: Option<String>,
    /// What holds the live process in, once it is ready.
    pub(crate) confinement: Option<Confinement>,
    pub(crate) last_exit: Option<String>,
    /// Why we ended it, if we did: to count, and in words if there are any.
    ended_for: Option<(Cause, Option<String>)>,
}

impl Slot {
    pub(super) fn new(id: SlotId, model: ModelId, role: Role, max_batch: u32) -> Self {
        Self {
            id,
            role,
            model,
            max_batch,
            phase: Phase::Backoff { until: Duration::ZERO },
            generation: 0,
            pid: None,
            jobs: BTreeSet::new(),
            alone: None,
            seen: SeenPrefixes::default(),
            restarts: 0,
            history: RestartHistory::default(),
            start_failure: None,
            was_ready: false,
            load: WorkerLoad::default(),
            load_at: None,
            prefill: Meter::default(),
            decode: Meter::default(),
            model_name: None,
            confinement: None,
            last_exit: None,
            ended_for: None,
        }
    }

    /// True if there is a process, or one is being made.
    pub(super) fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Starting { .. } | Phase::Ready { .. } | Phase::Stopping { .. })
    }

    /// True if what the process says counts.
    pub(super) fn is_serving(&self) -> bool {
        matches!(self.phase, Phase::Starting { .. } | Phase::Ready { .. })
    }

    pub(super) fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready { .. })
    }

    /// True if it can be given jobs of that model.
    pub(super) fn takes_jobs(&self, model: ModelId) -> bool {
        self.is_ready() && self.model == model && matches!(self.role, Role::Serving | Role::Retiring)
    }

    /// True if it has a ready worker, or will not have one by itself.
    pub(super) fn is_settled(&self) -> bool {
        self.was_ready || self.is_failed()
    }

    pub(super) fn has_stopped(&self) -> bool {
        self.phase == Phase::Stopped
    }

    pub(super) fn is_failed(&self) -> bool {
        matches!(self.phase, Phase::Failed { .. })
    }

    pub(super) fn failure(&self) -> Option<(&WireError, &ExitCode)> {
        match &self.phase {
            Phase::Failed { error, exit_code } => Some((error, exit_code)),
            _ => None,
        }
    }

    pub(crate) fn n_jobs(&self) -> usize {
        self.jobs.len()
    }

    /// The word `bitnetd status` shows.
    pub(crate) fn state_name(&self) -> &'static str {
        match self.phase {
            Phase::Ready { .. } if self.role == Role::Retiring => "retiring",
            Phase::Starting { .. } => "starting",
            Phase::Ready { .. } => "ready",
            Phase::Stopping { .. } => "draining",
            Phase::Backoff { .. } => "backoff",
            Phase::Failed { .. } => "failed",
            Phase::Stopped => "stopped",
        }
    }

    pub(super) fn next_deadline(&self, policy: &Policy) -> Option<Duration> {
        match &self.phase {
            Phase::Starting { until } | Phase::Backoff { until } => Some(*until),
            Phase::Ready { watch } => {
                Some(watch.asked_at.map_or(watch.ask_at, |asked_at| asked_at + policy.watchdog.timeout))
            }
            Phase::Stopping { kill_at, .. } => *kill_at,
            Phase::Failed { .. } | Phase::Stopped => None,
        }
    }

    pub(super) fn owes_answer(&self) -> bool {
        matches!(&self.phase, Phase::Ready { watch } if watch.asked_at.is_some())
    }

    pub(super) fn forgive_pause(&mut self, now: Duration) {
        if let Phase::Ready { watch } = &mut self.phase
            && watch.asked_at.is_some()
        {
            watch.asked_at = Some(now);
        }
    }

    /// Prompt tokens and generated tokens in a second, lately.
    pub(crate) fn rates(&self) -> (Option<f64>, Option<f64>) {
        // Between two pongs nothing is known.
        let at = self.load_at.unwrap_or_default();
        (self.prefill.rate(at), self.decode.rate(at))
    }

    /// Since the live process said what it does.
    pub(crate) fn load_age(&self, now: Duration) -> Option<Duration> {
        self.load_at.map(|at| now.saturating_sub(at))
    }

    fn pong(&mut self, seq: u64, load: WorkerLoad, now: Duration, policy: &Policy) {
        self.load = load;
        self.load_at = Some(now);
        self.prefill.count(load.prefill_tokens, now);
        self.decode.count(load.decode_tokens, now);
        if let Phase::Ready { watch } = &mut self.phase
            && watch.seq == seq
            && let Some(asked_at) = watch.asked_at.take()
        {
            watch.ask_at = now.max(asked_at + policy.watchdog.interval);
        }
    }
}

impl State {
    /// A message of the process that lives in `slot`.
    pub(super) fn worker_spoke(&mut self, slot: SlotId, message: WorkerSaid, now: Duration) {
        let Some(of) = self.slot_mut(slot).filter(|of| of.is_serving()) else { return };
        let is_ready = of.is_ready();
        match message {
            WorkerSaid::Ready { version, model, load_s, confinement } if !is_ready => {
                if let Err(error) = check_version("the worker", version) {
                    let reason = error.message.clone();
                    self.kill(
                        slot,
                        Cause::Misbehaved,
                        reason,
                        Then::Fail { error, exit_code: ExitCode::Software },
                    );
                    return;
                }
                of.phase = Phase::Ready { watch: Watch { seq: 0, asked_at: None, ask_at: now } };
                of.was_ready = true;
                of.confinement = Some(confinement);
                of.model_name = Some(model.name.clone());
                let (role, of_model, pid) = (of.role, of.model, of.pid);
                self.note(Note::WorkerReady { slot, pid, load_s, confinement });
                if role == Role::Trial {
                    self.commit_change(now);
                }
                if of_model == self.model_id {
                    self.model = Some(*model);
                }
            }
            WorkerSaid::StartFailed { error, exit_code } if !is_ready => {
                of.start_failure = Some((error, exit_code));
            }
            WorkerSaid::Token { job, token } if is_ready => self.token_came(slot, job, token, now),
            WorkerSaid::Done { job, done } if is_ready => self.job_done(slot, job, done, now),
            WorkerSaid::Failed { job, error } if is_ready => self.job_failed(slot, job, error, now),
            WorkerSaid::Pong { seq, load } if is_ready => {
                let policy = self.policy.clone();
                if let Some(of) = self.slot_mut(slot) {
                    of.pong(seq, load, now, &policy);
                }
            }
            _ => {
                let reason = "it sent a message that does not fit its state".into();
                self.kill(slot, Cause::Misbehaved, reason, Then::Backoff);
            }
        }
    }

    /// Kills a serving process; its jobs go on elsewhere.
    pub(super) fn kill(&mut self, slot: SlotId, cause: Cause, reason: String, then: Then) {
        let n_jobs = self.abandon_jobs(slot, true);
        let Some(of) = self.slot_mut(slot) else { return };
        of.phase = Phase::Stopping { then, kill_at: None };
        of.ended_for = Some((cause, Some(reason.clone())));
        let (generation, pid) = (of.generation, of.pid);
        self.note(Note::WorkerKilled { slot, pid, cause, reason, n_jobs });
        self.actions.push(Action::Signal { slot, generation, signal: StopSignal::Kill });
    }

    /// There is no process in `slot` any more (`exit`: how it ended, if there ever was one).
    pub(super) fn process_is_gone(&mut self, slot: SlotId, exit: Option<WorkerExit>, now: Duration) {
        let n_jobs = self.abandon_jobs(slot, true);
        let is_stopping = self.service == Service::Stopping;
        let Some(of) = self.slot_mut(slot) else { return };
        let ended_for = of.ended_for.take();
        let start_failure = of.start_failure.take();
        let pid = of.pid.take();
        let cause = match (&ended_for, &exit) {
            (_, Some(exit)) if exit.is_out_of_memory => Cause::OutOfMemory,
            (Some((cause, _)), _) => *cause,
            (None, _) if start_failure.is_some() => Cause::StartFailed,
            (None, Some(WorkerExit { code: None, .. })) => Cause::Signalled,
            (None, _) => Cause::Exited,
        };
        let reason = ended_for.and_then(|(_, reason)| reason);
        of.load = WorkerLoad::default();
        of.load_at = None;
        (of.prefill, of.decode) = (Meter::default(), Meter::default());
        of.confinement = None;
        of.model_name = None;
        of.last_exit = match (&exit, &reason, &start_failure) {
            (_, Some(reason), _) => Some(format!("killed: {reason}")),
            (_, None, Some((error, _))) => Some(error.message.clone()),
            (Some(exit), None, None) => Some(exit.to_string()),
            (None, None, None) => None,
        };
        let then = match std::mem::replace(&mut of.phase, Phase::Stopped) {
            Phase::Stopping { then, .. } => then,
            _ => after_own_end(slot, exit.as_ref(), start_failure.clone()),
        };
        let (role, how) = (of.role, of.last_exit.clone().unwrap_or_default());
        if let Some(exit) = exit {
            self.note(Note::WorkerExited { slot, pid, exit, cause, n_jobs });
        }
        if role == Role::Trial {
            self.trial_failed(slot, then, start_failure, &how);
            return;
        }
        match then {
            _ if is_stopping => {}
            Then::Stop => {}
            Then::Restart => {
                self.note(Note::RestartScheduled { slot, cause, wait: Duration::ZERO });
                self.spawn(slot, now);
            }
            Then::Fail { error, exit_code } => self.fail_slot(slot, error, exit_code),
            Then::Backoff => self.schedule_restart(slot, cause, now),
        }
    }

    fn schedule_restart(&mut self, slot: SlotId, cause: Cause, now: Duration) {
        let config = self.policy.restart.clone();
        let Self { slots, jitter, .. } = self;
        let Some(of) = slots.iter_mut().find(|of| of.id == slot) else { return };
        if let Some(wait) = of.history.next_wait(now, &config, jitter) {
            of.phase = Phase::Backoff { until: now + wait };
            self.note(Note::RestartScheduled { slot, cause, wait });
            return;
        }
        let last = of.last_exit.clone().unwrap_or_default();
        let slot_number = slot_number(slot);
        let text = format!(
            "the worker of slot {slot_number} was restarted {} times in {:?}; the last one: {last}",
            config.max, config.window
        );
        let error = WireError::new(ErrorCode::Degraded, text)
            .with_hint(format!("see the log; `bitnetd restart {slot_number}` tries again"));
        self.fail_slot(slot, error, ExitCode::Software);
    }

    fn fail_slot(&mut self, slot: SlotId, error: WireError, exit_code: ExitCode) {
        if let Some(of) = self.slot_mut(slot) {
            of.phase = Phase::Failed { error: error.clone(), exit_code };
        }
        self.note(Note::SlotFailed { slot, error });
    }

    pub(super) fn spawn(&mut self, slot: SlotId, now: Duration) {
        let until = now + self.policy.restart.start_timeout;
        let Some(of) = self.slot_mut(slot) else { return };
        of.phase = Phase::Starting { until };
        of.generation += 1;
        let generation = of.generation;
        if generation > 1 {
            of.restarts += 1;
            self.totals.restarts += 1;
        }
        self.actions.push(Action::Spawn { slot, generation });
    }

    /// An operator wants a fresh process. Jobs on board go on elsewhere and do not count it as a death.
    pub(super) fn restart_slot(&mut self, slot: SlotId, now: Duration) {
        let is_serving = self.serving().any(|of| of.id == slot);
        if !is_serving || matches!(self.service, Service::Stopping | Service::Stopped) {
            return;
        }
        self.abandon_jobs(slot, false);
        let Some(of) = self.slot_mut(slot) else { return };
        of.history.clear();
        let generation = of.generation;
        match &mut of.phase {
            Phase::Starting { .. } | Phase::Ready { .. } => {
                of.phase = Phase::Stopping { then: Then::Restart, kill_at: Some(now + super::STOP_GRACE) };
                of.ended_for = Some((Cause::Operator, Some("restarted by an operator".into())));
                let signal = StopSignal::Terminate;
                self.actions.push(Action::Signal { slot, generation, signal });
            }
            Phase::Stopping { then, .. } => *then = Then::Restart,
            Phase::Backoff { .. } | Phase::Failed { .. } | Phase::Stopped => self.spawn(slot, now),
        }
    }

    /// Ends the process of a slot for good. No job is on board.
    pub(super) fn stop_slot(&mut self, slot: SlotId, cause: Cause, signal: StopSignal, kill_at: Duration) {
        let Some(of) = self.slot_mut(slot) else { return };
        of.seen.clear();
        if !of.is_live() {
            of.phase = Phase::Stopped;
            return;
        }
        let kill_at = (signal == StopSignal::Terminate).then_some(kill_at);
        of.ended_for.get_or_insert((cause, None));
        of.phase = Phase::Stopping { then: Then::Stop, kill_at };
        let generation = of.generation;
        self.actions.push(Action::Signal { slot, generation, signal });
    }

    /// Does what is due in each slot: start, ping, kill.
    pub(super) fn tick_slots(&mut self, now: Duration) {
        for slot in self.slot_ids() {
            self.tick_slot(slot, now);
        }
    }

    fn tick_slot(&mut self, slot: SlotId, now: Duration) {
        let watchdog = self.policy.watchdog.clone();
        let start_timeout = self.policy.restart.start_timeout;
        let Some(of) = self.slot_mut(slot) else { return };
        let generation = of.generation;
        match &mut of.phase {
            Phase::Backoff { until } if *until <= now => self.spawn(slot, now),
            Phase::Starting { until } if *until <= now => {
                let cause = Cause::StartTimeout;
                self.kill(slot, cause, format!("not ready after {start_timeout:?}"), Then::Backoff);
            }
            Phase::Ready { watch } => match watch.asked_at {
                Some(asked_at) if asked_at + watchdog.timeout <= now => {
                    let reason = format!("its step loop did not answer for {:?}", watchdog.timeout);
                    self.kill(slot, Cause::Watchdog, reason, Then::Backoff);
                }
                None if watch.ask_at <= now => {
                    watch.seq += 1;
                    watch.asked_at = Some(now);
                    let seq = watch.seq;
                    self.actions.push(Action::SendPing { slot, generation, seq });
                }
                _ => {}
            },
            Phase::Stopping { kill_at, .. } if kill_at.is_some_and(|at| at <= now) => {
                *kill_at = None;
                self.actions.push(Action::Signal { slot, generation, signal: StopSignal::Kill });
            }
            _ => {}
        }
    }
}

/// What follows when a process ended without being told to.
fn after_own_end(
    slot: SlotId,
    exit: Option<&WorkerExit>,
    start_failure: Option<(WireError, ExitCode)>,
) -> Then {
    let known = exit.and_then(WorkerExit::exit_code);
    match (start_failure, known) {
        (Some((error, exit_code)), _) if exit_code.is_permanent() => Then::Fail { error, exit_code },
        (_, Some(exit_code)) if exit_code.is_permanent() => {
            let how = exit.map_or_else(String::new, ToString::to_string);
            let slot = slot_number(slot);
            let text = format!("the worker of slot {slot} {how}, which starting again cannot help");
            Then::Fail { error: WireError::new(ErrorCode::Degraded, text), exit_code }
        }
        _ => Then::Backoff,
    }
}
