//! Jobs: admission, routing, tokens, fail-over, and the one end that each has.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::event::{Done, Token};
use bitnetd_proto::request::{GenerateRequest, Prompt};
use bitnetd_proto::status::JobReport;

use super::events::{Action, Cause, ClientId, JobId, ModelId, Note, SlotId, Standing, slot_number};
use super::prefixes::Prefixes;
use super::queue::Pool;
use super::slots::{Role, Then};
use super::{Service, Slot, State};
use crate::meter::Meter;

/// A job that dies with its worker this many times `queue.max_deaths` is given up even if it makes progress in
/// between, so that one that costs a worker for each token does not go on for long.
const DEATHS_IN_ALL_FACTOR: u32 = 16;

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In `Pool::waiting`, or in `Pool::durable`.
    Waiting,
    /// In `Pool::resumed`.
    Resumed,
    /// In `Pool::suspects`.
    Suspect,
    /// In `Slot::jobs`.
    OnSlot(SlotId),
}

/// A job that is asked for.
#[derive(Debug)]
pub(super) struct NewJob {
    pub(super) job: JobId,
    pub(super) client: ClientId,
    pub(super) standing: Standing,
    pub(super) request: Arc<GenerateRequest>,
}

/// An accepted job.
#[derive(Debug)]
pub(super) struct JobRecord {
    pub(super) client: ClientId,
    /// The model it was accepted for, and the only one that it ever runs on.
    pub(super) model: ModelId,
    pub(super) request: Arc<GenerateRequest>,
    pub(super) is_durable: bool,
    pub(super) place: Place,
    /// Ids of the tokens the client has; what a new worker resumes after.
    pub(super) delivered: Vec<u32>,
    /// Worker deaths with this job on board since its last token.
    deaths_in_row: u32,
    deaths: u32,
    dispatches: u32,
    /// No token has come since it was given to its present worker: the prompt is still to be paid for.
    is_prefilling: bool,
    /// Tokens of the prompt that its present worker most likely had already.
    cached_tokens_guess: u64,
    accepted_at: Duration,
    first_dispatch_at: Option<Duration>,
    first_token_at: Option<Duration>,
    last_token_at: Option<Duration>,
    pace: Meter,
    deadline: Option<Duration>,
}

impl Standing {
    fn is_durable(self) -> bool {
        self != Self::Attended
    }

    fn deaths(self) -> u32 {
        match self {
            Self::Attended => 0,
            Self::Durable { deaths } => deaths,
        }
    }
}

impl JobRecord {
    fn priority(&self) -> Reverse<i8> {
        Reverse(self.request.priority)
    }

    /// Tokens of work that are still to be done, roughly.
    fn outstanding_tokens(&self) -> u64 {
        let delivered = self.delivered.len() as u64;
        let to_come = u64::from(self.request.max_tokens).saturating_sub(delivered);
        if self.is_prefilling {
            let prompt = prompt_tokens_guess(&self.request.prompt);
            to_come + delivered + prompt.saturating_sub(self.cached_tokens_guess)
        } else {
            to_come
        }
    }

    /// For `status`.
    fn report(&self, job: JobId, now: Duration) -> JobReport {
        let (slot, phase) = match self.place {
            Place::Waiting => (None, "waiting"),
            Place::Resumed => (None, "moving"),
            Place::Suspect => (None, "suspect"),
            Place::OnSlot(slot) if self.is_prefilling => (Some(slot_number(slot)), "prefill"),
            Place::OnSlot(slot) => (Some(slot_number(slot)), "decode"),
        };
        JobReport {
            job,
            slot,
            phase: phase.into(),
            is_durable: self.is_durable,
            tokens: u32::try_from(self.delivered.len()).unwrap_or(u32::MAX),
            tokens_max: self.request.max_tokens,
            tokens_per_s: self.pace.rate(now),
            age_s: now.saturating_sub(self.accepted_at).as_secs_f64(),
        }
    }

    /// Fills in what only the supervisor knows.
    fn complete(&self, mut done: Done, slot: SlotId, now: Duration) -> Done {
        let since_accepted = |at: Duration| at.saturating_sub(self.accepted_at).as_secs_f64();
        let timings = &mut done.timings;
        timings.queue_s = self.first_dispatch_at.map_or(0.0, since_accepted);
        timings.ttft_s = self.first_token_at.map_or(0.0, since_accepted);
        timings.total_s = since_accepted(now);
        timings.slot = slot_number(slot);
        timings.failovers = self.dispatches.saturating_sub(1);
        if timings.failovers > 0
            && let (Some(first), Some(last)) = (self.first_token_at, self.last_token_at)
        {
            // The last worker saw only its own part.
            timings.decode_s = last.saturating_sub(first).as_secs_f64();
        }
        done.usage.completion_tokens = u32::try_from(self.delivered.len()).unwrap_or(u32::MAX);
        done
    }
}

/// The supervisor does not tokenise; four bytes a token is near enough to compare workers.
fn prompt_tokens_guess(prompt: &Prompt) -> u64 {
    let bytes = |text: &str| text.len() as u64 / 4 + 1;
    match prompt {
        Prompt::Text(text) => bytes(text),
        Prompt::Chat(messages) => messages.iter().map(|message| bytes(&message.content) + 4).sum(),
        Prompt::Tokens(ids) => ids.len() as u64,
    }
}

impl State {
    pub(super) fn submit(&mut self, new: NewJob, now: Duration) {
        let NewJob { job, client, standing, request } = new;
        if let Err(error) = self.admit(&client, standing, &request) {
            self.totals.refused += 1;
            self.note(Note::JobRefused { client, error: error.clone() });
            self.actions.push(Action::Refuse { job, error });
            return;
        }
        self.totals.accepted += 1;
        let deadline = request.deadline_ms.map(|ms| now + Duration::from_millis(ms));
        if let Some(at) = deadline {
            self.deadlines.insert((at, job));
        }
        let model = self.model_id;
        let place = self.first_place(job, &client, standing, request.priority);
        let deaths = standing.deaths();
        let record = JobRecord {
            client,
            model,
            request,
            is_durable: standing.is_durable(),
            place,
            delivered: Vec::new(),
            deaths_in_row: deaths,
            deaths,
            dispatches: 0,
            is_prefilling: true,
            cached_tokens_guess: 0,
            accepted_at: now,
            first_dispatch_at: None,
            first_token_at: None,
            last_token_at: None,
            pace: Meter::default(),
            deadline,
        };
        self.jobs.insert(job, record);
        self.actions.push(Action::Accept { job });
    }

    /// Where a new job waits. A durable one that was on board of deaths before is a suspect from the start.
    fn first_place(&mut self, job: JobId, client: &ClientId, standing: Standing, priority: i8) -> Place {
        if standing.deaths() > 0 && self.is_suspect(standing.deaths()) {
            self.pools.entry(self.model_id).or_default().suspects.push_back(job);
            return Place::Suspect;
        }
        let pool = self.pools.entry(self.model_id).or_default();
        let line = if standing.is_durable() { &mut pool.durable } else { &mut pool.waiting };
        line.push(client.clone(), priority, job);
        Place::Waiting
    }

    /// One more death, and the job is given up.
    fn is_suspect(&self, deaths_in_row: u32) -> bool {
        deaths_in_row > 0 && deaths_in_row + 1 >= self.policy.queue.max_deaths.max(1)
    }

    fn admit(
        &self,
        client: &ClientId,
        standing: Standing,
        request: &GenerateRequest,
    ) -> Result<(), WireError> {
        if self.service != Service::Running {
            return Err(WireError::new(ErrorCode::Draining, "the service is stopping and takes no new jobs")
                .with_retry_after_ms(1000));
        }
        if self.is_hopeless(self.model_id) {
            return Err(self.degraded_error(self.model_id));
        }
        request.validate()?;
        if standing.is_durable() {
            return Ok(());
        }
        let max_jobs = self.policy.queue.max_jobs as usize;
        if self.n_waiting() >= max_jobs {
            return Err(WireError::new(
                ErrorCode::Overloaded,
                format!("{max_jobs} jobs are waiting already"),
            )
            .with_retry_after_ms(self.retry_after_ms()));
        }
        let max_per_client = self.policy.queue.max_per_client as usize;
        let n_of_client: usize = self.pools.values().map(|pool| pool.waiting.len_of(client)).sum();
        if n_of_client >= max_per_client {
            let text = format!("{max_per_client} jobs of this client are waiting already");
            return Err(
                WireError::new(ErrorCode::Overloaded, text).with_retry_after_ms(self.retry_after_ms())
            );
        }
        Ok(())
    }

    /// When a place in the queue should be free: half of what waits, at the pace of the last jobs.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "the value is clamped to a small positive range first"
    )]
    fn retry_after_ms(&self) -> u64 {
        let n_ready = self.slots.iter().filter(|slot| slot.is_ready()).count().max(1);
        let at_once = (n_ready * self.policy.max_batch.max(1) as usize) as f64;
        let rounds = (self.n_waiting() as f64 / 2.0 / at_once).max(0.25);
        (rounds * self.job_seconds * 1000.0).clamp(50.0, 60_000.0) as u64
    }

    /// Some jobs, those on workers first, and how many there are beyond them.
    pub(crate) fn job_reports(&self, n_max: usize, now: Duration) -> (Vec<JobReport>, u64) {
        let is_on_slot = |record: &JobRecord| matches!(record.place, Place::OnSlot(_));
        let (running, rest): (Vec<_>, Vec<_>) = self.jobs.iter().partition(|(_, record)| is_on_slot(record));
        let chosen = running.iter().chain(&rest).take(n_max);
        let reports = chosen.map(|&(&job, record)| record.report(job, now)).collect();
        (reports, self.jobs.len().saturating_sub(n_max) as u64)
    }

    /// Jobs that wait for their first worker.
    pub(super) fn n_waiting(&self) -> usize {
        self.pools.values().map(|pool| pool.waiting.len()).sum()
    }

    /// Gives waiting jobs to ready workers.
    pub(super) fn dispatch(&mut self, now: Duration) {
        let models: Vec<ModelId> = self.pools.keys().copied().collect();
        for model in models {
            self.dispatch_model(model, now);
        }
    }

    fn dispatch_model(&mut self, model: ModelId, now: Duration) {
        let held = self.dispatch_suspects(model, now);
        let anywhere = |_: &Slot| true;
        while self.has_room((model, held), anywhere) {
            let Some(pool) = self.pools.get_mut(&model) else { return };
            if let Some((_, job)) = pool.resumed.pop_first() {
                self.place_best(job, (model, held), anywhere, now);
            } else if pool.durable_has_its_turn() && self.dispatch_durable(model, held, now) {
                self.pools.entry(model).or_default().n_overtaken = 0;
            } else if let Some(job) = self.pools.get_mut(&model).and_then(Pool::pop_waiting) {
                self.place_best(job, (model, held), anywhere, now);
            } else {
                return;
            }
        }
    }

    /// Gives one durable job to the worker with the least to do, among those that have room for one more of them.
    fn dispatch_durable(&mut self, model: ModelId, held: Option<SlotId>, now: Duration) -> bool {
        let n_max = self.policy.queue.durable.per_worker.clamp(1, self.policy.max_batch.max(1)) as usize;
        let is_durable = |job: &JobId| self.jobs.get(job).is_some_and(|record| record.is_durable);
        let is_full = |slot: &Slot| slot.jobs.iter().filter(|job| is_durable(job)).count() >= n_max;
        let full: BTreeSet<SlotId> =
            self.slots.iter().filter(|slot| is_full(slot)).map(|slot| slot.id).collect();
        let has_room = |slot: &Slot| !full.contains(&slot.id);
        if !self.has_room((model, held), has_room) {
            return false;
        }
        let Some(job) = self.pools.get_mut(&model).and_then(|pool| pool.durable.pop()) else { return false };
        self.place_best(job, (model, held), has_room, now);
        true
    }

    /// Suspects run alone. While one waits, the emptiest worker gets nothing new, until it is empty.
    fn dispatch_suspects(&mut self, model: ModelId, now: Duration) -> Option<SlotId> {
        while let Some(&job) = self.pools.get(&model)?.suspects.front() {
            let free = self.slots.iter().filter(|slot| slot.takes_jobs(model) && slot.alone.is_none());
            let slot = free.min_by_key(|slot| (slot.jobs.len(), slot.id))?;
            let (id, is_empty) = (slot.id, slot.jobs.is_empty());
            if !is_empty {
                return Some(id);
            }
            self.pools.get_mut(&model)?.suspects.pop_front();
            self.place(job, id, now);
            if let Some(slot) = self.slot_mut(id) {
                slot.alone = Some(job);
            }
        }
        None
    }

    /// The slots that can take a job of a model now.
    fn open_slots(
        &self,
        (model, held): (ModelId, Option<SlotId>),
        may: impl Fn(&Slot) -> bool,
    ) -> impl Iterator<Item = &Slot> {
        self.slots
            .iter()
            .filter(move |slot| slot.takes_jobs(model) && slot.alone.is_none() && Some(slot.id) != held)
            .filter(move |slot| slot.jobs.len() < slot.max_batch.max(1) as usize && may(slot))
    }

    fn has_room(&self, among: (ModelId, Option<SlotId>), may: impl Fn(&Slot) -> bool) -> bool {
        self.open_slots(among, may).next().is_some()
    }

    /// Gives a job to the worker that would then have the least to do. What a worker has read before is no work, so
    /// that a prompt goes to who knows the longest part of it, unless that one is busier by more than it saves.
    fn place_best(
        &mut self,
        job: JobId,
        among: (ModelId, Option<SlotId>),
        may: impl Fn(&Slot) -> bool,
        now: Duration,
    ) {
        let Some(record) = self.jobs.get(&job) else { return };
        let prompt_tokens = prompt_tokens_guess(&record.request.prompt);
        // With one worker there is nothing to choose.
        let prefixes =
            if self.slots.len() > 1 { Prefixes::of(&record.request.prompt) } else { Prefixes::default() };
        let cost = |slot: &Slot| {
            let cached = slot.seen.n_tokens(&prefixes).min(prompt_tokens);
            let work = self.outstanding_tokens(slot) + prompt_tokens - cached;
            // What goes to a worker that is to be replaced has to move soon.
            (slot.role == Role::Retiring, work, Reverse(cached), slot.id)
        };
        let best = self.open_slots(among, may).map(cost).min();
        let Some((_, _, Reverse(cached), slot)) = best else { return };
        if let Some(record) = self.jobs.get_mut(&job) {
            record.cached_tokens_guess = cached;
        }
        self.place(job, slot, now);
        if let Some(of) = self.slot_mut(slot) {
            of.seen.remember(&prefixes);
        }
    }

    fn outstanding_tokens(&self, slot: &Slot) -> u64 {
        slot.jobs.iter().filter_map(|job| self.jobs.get(job)).map(JobRecord::outstanding_tokens).sum()
    }

    fn place(&mut self, job: JobId, slot: SlotId, now: Duration) {
        let Some(record) = self.jobs.get_mut(&job) else { return };
        record.place = Place::OnSlot(slot);
        record.is_prefilling = true;
        record.dispatches += 1;
        let waited = record.first_dispatch_at.is_none().then(|| now.saturating_sub(record.accepted_at));
        record.first_dispatch_at.get_or_insert(now);
        if record.dispatches > 1 {
            self.totals.failovers += 1;
        }
        let (request, resume) = (record.request.clone(), record.delivered.clone());
        let Some(of) = self.slot_mut(slot) else { return };
        of.jobs.insert(job);
        let generation = of.generation;
        self.note(Note::JobDispatched { job, slot, resumed_at: resume.len(), waited });
        self.actions.push(Action::SendJob { slot, generation, job, request, resume });
    }

    /// The job, if it is on that slot now; a worker may still speak of one that was taken from it.
    fn on_slot(&mut self, job: JobId, slot: SlotId) -> Option<&mut JobRecord> {
        self.jobs.get_mut(&job).filter(|record| record.place == Place::OnSlot(slot))
    }

    pub(super) fn token_came(&mut self, slot: SlotId, job: JobId, token: Token, now: Duration) {
        let Some(record) = self.on_slot(job, slot) else { return };
        let expected = record.delivered.len();
        if usize::try_from(token.index) != Ok(expected) || expected >= record.request.max_tokens as usize {
            let reason = format!("it sent token {} of job {job} instead of {expected}", token.index);
            self.kill(slot, Cause::Misbehaved, reason, Then::Backoff);
            return;
        }
        record.delivered.push(token.id);
        record.deaths_in_row = 0;
        let was_prefilling = std::mem::replace(&mut record.is_prefilling, false);
        let is_first = record.first_token_at.is_none();
        let came = Note::TokenCame {
            is_first,
            is_first_after_move: !is_first && was_prefilling,
            after: now.saturating_sub(record.last_token_at.unwrap_or(record.accepted_at)),
        };
        record.first_token_at.get_or_insert(now);
        record.last_token_at = Some(now);
        record.pace.count(record.delivered.len() as u64, now);
        self.totals.tokens += 1;
        self.note(came);
        if let Some(of) = self.slot_mut(slot).filter(|of| of.alone == Some(job)) {
            of.alone = None;
        }
        self.actions.push(Action::DeliverToken { job, token });
    }

    pub(super) fn job_done(&mut self, slot: SlotId, job: JobId, done: Done, now: Duration) {
        let Some(record) = self.on_slot(job, slot) else { return };
        let mut done = record.complete(done, slot, now);
        let on_worker = now.saturating_sub(record.first_dispatch_at.unwrap_or(now)).as_secs_f64();
        self.job_seconds = 0.9 * self.job_seconds + 0.1 * on_worker;
        self.totals.completed += 1;
        done.model = self.slot_mut(slot).and_then(|of| of.model_name.clone());
        self.end(job, Ok(done));
    }

    pub(super) fn job_failed(&mut self, slot: SlotId, job: JobId, error: WireError, _now: Duration) {
        if self.on_slot(job, slot).is_some() {
            self.totals.failed += 1;
            self.end(job, Err(error));
        }
    }

    /// Takes every job from a slot whose process is lost. Returns how many there were.
    pub(super) fn abandon_jobs(&mut self, slot: SlotId, is_death: bool) -> usize {
        let Some(of) = self.slot_mut(slot) else { return 0 };
        let jobs = std::mem::take(&mut of.jobs);
        of.alone = None;
        of.seen.clear();
        for &job in &jobs {
            self.abandon(job, slot, is_death);
        }
        jobs.len()
    }

    fn abandon(&mut self, job: JobId, slot: SlotId, is_death: bool) {
        let max_deaths = self.policy.queue.max_deaths.max(1);
        let Some(record) = self.jobs.get_mut(&job) else { return };
        if is_death {
            record.deaths += 1;
            record.deaths_in_row += 1;
        }
        let (in_row, deaths, n_delivered) = (record.deaths_in_row, record.deaths, record.delivered.len());
        if in_row >= max_deaths || deaths >= max_deaths.saturating_mul(DEATHS_IN_ALL_FACTOR) {
            let text = format!("{deaths} workers died with this job on board; it is given up");
            self.totals.failed += 1;
            self.end(job, Err(WireError::new(ErrorCode::Poisoned, text)));
            return;
        }
        if is_death && record.is_durable {
            self.actions.push(Action::CountDeath { job, deaths: in_row });
        }
        let pool = self.pools.entry(record.model).or_default();
        if in_row > 0 && in_row + 1 >= max_deaths {
            record.place = Place::Suspect;
            pool.suspects.push_back(job);
        } else {
            record.place = Place::Resumed;
            pool.resumed.insert((record.priority(), job));
        }
        self.note(Note::JobFailedOver { job, slot, n_delivered });
    }

    /// Ends a job from this side: cancelled, too late, or nowhere to run.
    pub(super) fn give_up(&mut self, job: JobId, error: WireError) {
        let Some(record) = self.jobs.get(&job) else { return };
        if error.code == ErrorCode::Cancelled {
            self.totals.cancelled += 1;
        } else {
            self.totals.failed += 1;
        }
        if let Place::OnSlot(slot) = record.place
            && let Some(of) = self.slot_mut(slot)
        {
            let generation = of.generation;
            self.actions.push(Action::SendCancel { slot, generation, job });
        }
        self.end(job, Err(error));
    }

    pub(super) fn end_all(&mut self, error: &WireError) {
        let jobs: Vec<JobId> = self.jobs.keys().copied().collect();
        for job in jobs {
            self.give_up(job, error.clone());
        }
    }

    /// True if no worker of that model is there, or will be without an operator.
    pub(super) fn is_hopeless(&self, model: ModelId) -> bool {
        let mut slots =
            self.slots.iter().filter(|slot| slot.model == model && slot.role != Role::Trial).peekable();
        slots.peek().is_some() && slots.all(Slot::is_failed) && !self.has_slots_to_come(model)
    }

    /// Ends the jobs that nobody can ever work on.
    pub(super) fn end_hopeless(&mut self) {
        let models: Vec<ModelId> = self.pools.keys().copied().collect();
        for model in models {
            if !self.is_hopeless(model) {
                continue;
            }
            let error = self.degraded_error(model);
            let jobs: Vec<JobId> =
                self.jobs.iter().filter(|(_, record)| record.model == model).map(|(&job, _)| job).collect();
            for job in jobs {
                self.give_up(job, error.clone());
            }
        }
    }

    pub(super) fn expire_jobs(&mut self, now: Duration) {
        while let Some(&(at, job)) = self.deadlines.first().filter(|(at, _)| *at <= now) {
            self.deadlines.remove(&(at, job));
            let text = "the job's deadline passed before it ended";
            self.give_up(job, WireError::new(ErrorCode::DeadlineExceeded, text));
        }
    }

    /// Forgets a job and tells its client. The only way out of `jobs`.
    fn end(&mut self, job: JobId, outcome: Result<Done, WireError>) {
        let Some(record) = self.jobs.remove(&job) else { return };
        let pool = self.pools.entry(record.model).or_default();
        match record.place {
            Place::Waiting => {
                let line = if record.is_durable { &mut pool.durable } else { &mut pool.waiting };
                line.remove(&record.client, record.request.priority, job);
            }
            Place::Resumed => {
                pool.resumed.remove(&(record.priority(), job));
            }
            Place::Suspect => pool.suspects.retain(|&suspect| suspect != job),
            Place::OnSlot(slot) => {
                if let Some(of) = self.slot_mut(slot) {
                    of.jobs.remove(&job);
                    of.alone = of.alone.filter(|&alone| alone != job);
                }
            }
        }
        if let Some(at) = record.deadline {
            self.deadlines.remove(&(at, job));
        }
        self.note(Note::JobEnded {
            job,
            error: outcome.as_ref().err().cloned(),
            n_tokens: record.delivered.len(),
            after: self.now.saturating_sub(record.accepted_at),
        });
        self.actions.push(Action::End { job, outcome });
    }
}
