//! From one configuration to the next: whole, or not at all.
//!
//! ```text
//! ReloadRequested --> a trial worker of the new configuration --ready--> the new configuration holds
//!                           |                                              |  the other new workers start, one by one
//!                           +-- cannot start, dies, too late:              v
//!                               nothing has changed                     former workers leave
//! ```
//!
//! Slots whose worker would be the same go on untouched. A former worker of the *same* model leaves when a new one
//! has become ready; its jobs move there with the tokens that their clients have. A former worker of *another*
//! model leaves when no job of that model is left: a job runs on the model that it was accepted for, to its end,
//! also if it still waited when the model changed, and also if its worker dies meanwhile.

use std::collections::VecDeque;
use std::time::Duration;

use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;

use super::events::{Action, Cause, Edition, ModelId, NewConfig, Note, SlotId, StopSignal, slot_id};
use super::slots::{Role, Slot, Then};
use super::{STOP_GRACE, Service, State};

/// When to ask again after a reload was refused because another one is under way.
const RETRY_AFTER_MS: u64 = 1000;

/// A reload that is under way.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// The first new worker has to show that the configuration works.
    Trial { slot: SlotId, config: Box<NewConfig> },
    /// The new configuration holds; these of its workers have not been started yet.
    Rolling { edition: Edition, model: ModelId, to_start: VecDeque<u16> },
}

impl State {
    pub(super) fn reload(&mut self, config: NewConfig, now: Duration) {
        let edition = config.edition;
        if let Err(error) = self.admit_change(&config) {
            self.note(Note::ReloadFailed { edition, error: error.clone() });
            self.actions.push(Action::Reloaded { edition, outcome: Err(error) });
            return;
        }
        let first_new = config.seats.iter().position(Option::is_none).and_then(|n| u16::try_from(n).ok());
        let Some(number) = first_new else {
            self.take_over(&config, None, now);
            return;
        };
        let slot = slot_id(edition, number);
        self.slots.push(Slot::new(slot, config.model, Role::Trial, config.policy.max_batch));
        self.change = Some(Change::Trial { slot, config: Box::new(config) });
        self.spawn(slot, now);
    }

    fn admit_change(&self, config: &NewConfig) -> Result<(), WireError> {
        if self.service != Service::Running {
            return Err(WireError::new(ErrorCode::Draining, "the service is stopping"));
        }
        let busy = |text: String| {
            Err(WireError::new(ErrorCode::Overloaded, text).with_retry_after_ms(RETRY_AFTER_MS))
        };
        if self.change.is_some() {
            return busy("another reload is under way".into());
        }
        // Two models in memory are enough.
        let n_former = self.jobs.values().filter(|job| job.model != self.model_id).count();
        if config.model != self.model_id && self.pools.len() > 1 {
            return busy(format!("{n_former} jobs of the former model have not ended yet"));
        }
        Ok(())
    }

    /// The trial worker is ready.
    pub(super) fn commit_change(&mut self, now: Duration) {
        match self.change.take() {
            Some(Change::Trial { slot, config }) => self.take_over(&config, Some(slot), now),
            other => self.change = other,
        }
    }

    /// From now on the new configuration holds.
    fn take_over(&mut self, config: &NewConfig, trial: Option<SlotId>, now: Duration) {
        let NewConfig { edition, policy, model, seats } = config;
        let is_new_model = *model != self.model_id;
        for slot in &mut self.slots {
            slot.role = match slot.role {
                Role::Trial if Some(slot.id) == trial => Role::Serving,
                Role::Serving if !seats.contains(&Some(slot.id)) => Role::Retiring,
                role => role,
            };
        }
        self.policy = policy.clone();
        self.model_id = *model;
        self.pools.entry(*model).or_default();
        let new = (0..).zip(seats).filter(|(_, seat)| seat.is_none()).map(|(number, _)| number);
        let to_start = new.skip(usize::from(trial.is_some())).collect();
        let n_kept = seats.iter().flatten().count();
        self.note(Note::Reloaded { edition: *edition, n_kept, n_new: seats.len() - n_kept, is_new_model });
        self.change = Some(Change::Rolling { edition: *edition, model: *model, to_start });
        self.actions.push(Action::Reloaded { edition: *edition, outcome: Ok(()) });
        // A reload also brings back slots that were given up.
        let failed: Vec<SlotId> =
            self.serving().filter(|slot| slot.is_failed()).map(|slot| slot.id).collect();
        for slot in failed {
            self.restart_slot(slot, now);
        }
    }

    /// The trial worker is gone before it was ready: nothing has changed.
    pub(super) fn trial_failed(
        &mut self,
        slot: SlotId,
        then: Then,
        start_failure: Option<(WireError, ExitCode)>,
        how: &str,
    ) {
        self.slots.retain(|of| of.id != slot);
        let Some(Change::Trial { config, .. }) = self.change.take_if(|change| change.is_trial(slot)) else {
            return; // Given up meanwhile; that was the answer.
        };
        let error = match (start_failure, then) {
            (Some((error, _)), _) | (None, Then::Fail { error, .. }) => error,
            _ => WireError::new(
                ErrorCode::Degraded,
                format!("the first worker of the new configuration {how}"),
            ),
        };
        self.refuse_change(config.edition, error);
    }

    fn refuse_change(&mut self, edition: Edition, error: WireError) {
        self.note(Note::ReloadFailed { edition, error: error.clone() });
        self.actions.push(Action::Reloaded { edition, outcome: Err(error) });
    }

    /// The service is stopping: no worker is started for a new configuration any more.
    pub(super) fn abandon_change(&mut self) {
        if let Some(Change::Trial { slot, config }) = self.change.take() {
            if let Some(of) = self.slot_mut(slot) {
                of.role = Role::Leaving;
            }
            self.stop_slot(slot, Cause::Stop, StopSignal::Kill, Duration::ZERO);
            self.refuse_change(
                config.edition,
                WireError::new(ErrorCode::Draining, "the service is stopping"),
            );
        }
    }

    /// True if workers of that model are still to be started by a reload.
    pub(super) fn has_slots_to_come(&self, model: ModelId) -> bool {
        matches!(&self.change, Some(Change::Rolling { model: of, to_start, .. }) if *of == model && !to_start.is_empty())
    }

    /// Starts new workers one by one, and lets former ones go.
    pub(super) fn settle_change(&mut self, now: Duration) {
        self.start_next(now);
        self.retire_same_model(now);
        self.retire_former_model(now);
        self.slots.retain(|slot| slot.role != Role::Leaving || !slot.has_stopped());
    }

    fn start_next(&mut self, now: Duration) {
        let is_settled = self.serving().all(Slot::is_settled);
        let Some(Change::Rolling { edition, model, to_start }) = &mut self.change else { return };
        if !is_settled {
            return;
        }
        let Some(number) = to_start.pop_front() else {
            self.change = None;
            return;
        };
        let (slot, model) = (slot_id(*edition, number), *model);
        self.slots.push(Slot::new(slot, model, Role::Serving, self.policy.max_batch));
        self.spawn(slot, now);
    }

    /// As many former workers go as new ones have come; all, when the last has.
    fn retire_same_model(&mut self, now: Duration) {
        let n_to_come = match &self.change {
            Some(Change::Rolling { to_start, .. }) => {
                to_start.len() + self.serving().filter(|slot| !slot.is_settled()).count()
            }
            Some(Change::Trial { .. }) => return,
            None => 0,
        };
        let of_same = |slot: &&Slot| slot.role == Role::Retiring && slot.model == self.model_id;
        let former: Vec<SlotId> = self.slots.iter().filter(of_same).map(|slot| slot.id).collect();
        for &slot in former.iter().take(former.len().saturating_sub(n_to_come)) {
            self.retire(slot, now);
        }
    }

    /// Former workers of another model stay as long as it has jobs for them.
    fn retire_former_model(&mut self, now: Duration) {
        let model_id = self.model_id;
        let idle: Vec<SlotId> = self
            .slots
            .iter()
            .filter(|slot| slot.role == Role::Retiring && slot.model != model_id && slot.jobs.is_empty())
            .filter(|slot| self.pools.get(&slot.model).is_none_or(|pool| pool.len() == 0))
            .map(|slot| slot.id)
            .collect();
        for slot in idle {
            self.retire(slot, now);
        }
        let jobs = &self.jobs;
        self.pools.retain(|&model, _| model == model_id || jobs.values().any(|job| job.model == model));
    }

    fn retire(&mut self, slot: SlotId, now: Duration) {
        let n_jobs = self.abandon_jobs(slot, false);
        if let Some(of) = self.slot_mut(slot) {
            of.role = Role::Leaving;
        }
        self.note(Note::WorkerRetired { slot, n_jobs });
        self.stop_slot(slot, Cause::Reload, StopSignal::Terminate, now + STOP_GRACE);
    }
}

impl Change {
    pub(super) fn edition_on_trial(&self) -> Option<Edition> {
        match self {
            Self::Trial { config, .. } => Some(config.edition),
            Self::Rolling { .. } => None,
        }
    }

    fn is_trial(&self, of: SlotId) -> bool {
        matches!(self, Self::Trial { slot, .. } if *slot == of)
    }
}
