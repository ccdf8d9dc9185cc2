//! Random histories against a small model of the world, and the rules one by one.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bitnetd_proto::event::{Done, Token};
use bitnetd_proto::event::{FinishReason, Timings, Usage};
use bitnetd_proto::request::{GenerateRequest, Prompt};
use bitnetd_proto::worker_link::{Confinement, WorkerLoad};
use proptest::prelude::*;

use super::*;

mod rules; // Each rule by an example.

/// Most jobs that any policy of these tests lets wait.
const QUEUE_MAX: usize = 6;

fn policy() -> Policy {
    policy_with(6)
}

fn policy_with(max_jobs: u32) -> Policy {
    Policy {
        queue: QueueConfig { max_jobs, max_per_client: 4, max_deaths: 3, ..QueueConfig::default() },
        restart: RestartConfig { max: 4, window: Duration::from_secs(30), ..RestartConfig::default() },
        watchdog: WatchdogConfig::default(),
        max_batch: 2,
        n_ready_min: None,
    }
}

fn summary() -> ModelSummary {
    serde_json::from_value(serde_json::json!({
        "name": "m", "architecture": "a", "n_params": 1, "n_ctx": 1, "n_vocab": 1, "n_layers": 1, "n_embd": 1,
        "isa": "scalar", "head": "f16", "image_bytes": 1, "kv_bytes": 1, "has_chat_template": false,
    }))
    .unwrap()
}

fn ready() -> WorkerSaid {
    WorkerSaid::Ready {
        version: bitnetd_proto::PROTOCOL_VERSION,
        model: Box::new(summary()),
        load_s: 0.1,
        confinement: Confinement::default(),
    }
}

fn request(max_tokens: u32) -> GenerateRequest {
    GenerateRequest { max_tokens, ..GenerateRequest::new(Prompt::Text("hello".into())) }
}

fn done() -> Done {
    Done {
        finish_reason: FinishReason::Length,
        tail: String::new(),
        usage: Usage::default(),
        timings: Timings::default(),
        model: None,
    }
}

fn exit(code: Option<i32>, signal: Option<i32>) -> WorkerExit {
    WorkerExit { code, signal, is_out_of_memory: false, last_words: None }
}

fn token(index: u32) -> Token {
    Token { index, id: 100 + index, text: "x".into(), logprobs: None }
}

/// The world outside: carries out actions, and checks everything that can be seen from there.
struct World {
    state: State,
    now: Duration,
    n_jobs: JobId,
    /// Live process of each slot: (generation, ready, jobs on board with the next index).
    processes: BTreeMap<SlotId, Process>,
    /// Jobs that are accepted and not ended: tokens delivered so far.
    open: HashMap<JobId, u32>,
    /// Which jobs were submitted as durable.
    durable: BTreeSet<JobId>,
    /// The model each of them was accepted for.
    models: HashMap<JobId, ModelId>,
    /// Reloads that are not answered yet.
    reloads: Vec<Edition>,
    n_editions: Edition,
    /// Submitted and not answered.
    asked: Option<JobId>,
    n_ended: u64,
    is_stopped: bool,
    spawned: Vec<(SlotId, Generation)>,
    notes: Vec<Note>,
}

struct Process {
    generation: Generation,
    model: ModelId,
    is_ready: bool,
    jobs: BTreeMap<JobId, (u32, u32)>, // (next index, max_tokens)
    ping: Option<u64>,
}

impl World {
    fn new(policy: Policy, n_slots: u32) -> Self {
        let mut world = Self {
            state: State::new(policy, n_slots, 1),
            now: Duration::ZERO,
            n_jobs: 0,
            processes: BTreeMap::new(),
            open: HashMap::new(),
            durable: BTreeSet::new(),
            models: HashMap::new(),
            reloads: Vec::new(),
            n_editions: 0,
            asked: None,
            n_ended: 0,
            is_stopped: false,
            spawned: Vec::new(),
            notes: Vec::new(),
        };
        world.send(Event::TimePassed);
        world
    }

    /// A world whose workers are all ready.
    fn ready(policy: Policy, n_slots: u32) -> Self {
        let mut world = Self::new(policy, n_slots);
        for slot in 0..n_slots {
            world.say_ready(slot);
        }
        world
    }

    #[track_caller]
    fn send(&mut self, event: Event) {
        for action in self.state.handle(event, self.now) {
            self.carry_out(action);
        }
        self.check();
    }

    #[track_caller]
    fn carry_out(&mut self, action: Action) {
        let is_refusal = matches!(
            action,
            Action::Refuse { .. }
                | Action::Note(Note::JobRefused { .. } | Note::ReloadFailed { .. })
                | Action::Reloaded { outcome: Err(_), .. }
        );
        assert!(!self.is_stopped || is_refusal, "{action:?} after Stop");
        match action {
            Action::Accept { job } => {
                assert_eq!(self.asked.take(), Some(job));
                self.open.insert(job, 0);
                self.models.insert(job, self.state.model_id);
            }
            Action::Refuse { job, .. } => assert_eq!(self.asked.take(), Some(job)),
            Action::DeliverToken { job, token } => {
                let n = self.open.get_mut(&job).expect("a token of a job that is not open");
                assert_eq!(token.index, *n, "gap or repetition in job {job}");
                *n += 1;
            }
            Action::End { job, .. } => {
                assert!(self.open.remove(&job).is_some(), "job {job} ended twice");
                self.n_ended += 1;
            }
            Action::Spawn { slot, generation } => {
                let of = self.state.slots.iter().find(|of| of.id == slot).expect("a process for no slot");
                let (model, jobs) = (of.model, BTreeMap::new());
                let process = Process { generation, model, is_ready: false, jobs, ping: None };
                assert!(self.processes.insert(slot, process).is_none(), "two processes in slot {slot}");
                self.spawned.push((slot, generation));
            }
            Action::CountDeath { job, deaths } => {
                assert!(self.durable.contains(&job) && deaths > 0 && self.open.contains_key(&job));
            }
            Action::SendJob { slot, generation, job, request, resume } => {
                assert_eq!(resume.len(), self.open[&job] as usize, "job {job} resumes at the wrong token");
                let process = self.processes.get_mut(&slot).expect("a job for no process");
                assert_eq!(process.generation, generation);
                assert_eq!(process.model, self.models[&job], "job {job} runs on another model");
                process.jobs.insert(job, (self.open[&job], request.max_tokens));
            }
            Action::SendCancel { slot, generation, job } => {
                let process = self.processes.get_mut(&slot).expect("a cancel for no process");
                assert_eq!(process.generation, generation);
                assert!(process.jobs.remove(&job).is_some());
            }
            Action::SendPing { slot, generation, seq } => {
                let process = self.processes.get_mut(&slot).expect("a ping for no process");
                assert_eq!(process.generation, generation);
                process.ping = Some(seq);
            }
            Action::Signal { slot, generation, .. } => {
                assert_eq!(self.processes.get(&slot).map(|process| process.generation), Some(generation));
            }
            Action::Reloaded { edition, .. } => {
                let asked = self.reloads.iter().position(|&asked| asked == edition);
                self.reloads.remove(asked.expect("a reload is answered twice"));
            }
            Action::Note(note) => self.notes.push(note),
            Action::Stop => self.is_stopped = true,
        }
    }

    #[track_caller]
    fn check(&self) {
        let state = &self.state;
        assert_eq!(self.asked, None, "a submission was not answered");
        assert_eq!(state.jobs.len(), self.open.len());
        assert!(state.n_waiting() <= QUEUE_MAX);
        assert!(state.pools.len() <= 2, "more than two models");
        assert_eq!(self.reloads.len(), usize::from(state.edition_on_trial().is_some()));
        assert_eq!(state.totals.accepted, self.n_ended + self.open.len() as u64);
        let totals = state.totals;
        assert_eq!(totals.completed + totals.failed + totals.cancelled, self.n_ended);
        let on_slots: usize = state.slots.iter().map(Slot::n_jobs).sum();
        let elsewhere: usize = state.pools.values().map(Pool::len).sum();
        assert_eq!(on_slots + elsewhere, state.jobs.len(), "a job is in two places or in none");
        for slot in &state.slots {
            assert!(slot.jobs.is_empty() || slot.is_ready(), "jobs on a slot that is not ready");
            assert!(slot.alone.is_none_or(|alone| slot.jobs.iter().eq([&alone])), "a suspect has company");
            assert_eq!(slot.is_live(), self.processes.contains_key(&slot.id), "slot {}", slot.id);
            assert!(slot.jobs.len() <= slot.max_batch as usize);
            assert!(slot.jobs.iter().all(|job| self.models[job] == slot.model));
            let n_seen = slot.seen.len();
            assert!(
                n_seen <= 2 * prefixes::REMEMBERED_MAX && (n_seen == 0 || slot.is_ready()),
                "{n_seen} seen"
            );
        }
        assert!(state.next_deadline().is_none_or(|at| at > self.now), "a deadline was not kept");
        let n_retiring = state.slots.iter().filter(|slot| slot.role == Role::Retiring).count();
        let is_at_rest = state.change.is_none() && state.pools.len() == 1;
        assert!(!is_at_rest || n_retiring == 0, "a former worker is forgotten: {state:?}");
        assert!(!self.is_stopped || (self.processes.is_empty() && self.open.is_empty()));
    }

    fn pass(&mut self, time: Duration) {
        // As the event loop does: never beyond a deadline in one step.
        let end = self.now + time;
        while let Some(at) = self.state.next_deadline().filter(|&at| at < end) {
            self.now = at;
            self.send(Event::TimePassed);
        }
        self.now = end;
        self.send(Event::TimePassed);
    }

    /// The n-th slot, of whatever edition.
    fn pick(&self, n: SlotId) -> SlotId {
        let slots = &self.state.slots;
        slots.get(n as usize % slots.len().max(1)).map_or(n, |slot| slot.id)
    }

    /// Asks for another configuration, as the event loop does.
    #[track_caller]
    fn reload(&mut self, n_workers: usize, keep: bool, new_model: bool, policy: Policy) {
        self.n_editions += 1;
        let edition = self.n_editions;
        let model = if new_model { edition } else { self.state.model_id };
        let keeps = keep && !new_model && policy.max_batch == self.state.policy.max_batch;
        let stays = |number| self.state.slot_with_number(number).filter(|_| keeps);
        let seats = (0..).take(n_workers).map(stays).collect();
        self.reloads.push(edition);
        self.send(Event::ReloadRequested { config: Box::new(NewConfig { edition, policy, model, seats }) });
    }

    fn submit(&mut self, client: u32, request: GenerateRequest) -> JobId {
        self.submit_as(Standing::Attended, client, request)
    }

    fn submit_as(&mut self, standing: Standing, client: u32, request: GenerateRequest) -> JobId {
        self.n_jobs += 1;
        let job = self.n_jobs;
        self.asked = Some(job);
        if standing != Standing::Attended {
            self.durable.insert(job);
        }
        let client = ClientId::Uid(client);
        self.send(Event::JobSubmitted { job, client, standing, request: request.into() });
        job
    }

    fn said(&mut self, slot: SlotId, message: WorkerSaid) {
        let Some(process) = self.processes.get(&slot) else { return };
        self.send(Event::WorkerSpoke { slot, generation: process.generation, message });
    }

    fn say_ready(&mut self, slot: SlotId) {
        if let Some(process) = self.processes.get_mut(&slot).filter(|process| !process.is_ready) {
            process.is_ready = true;
            self.said(slot, ready());
        }
    }

    /// The n-th job of a process gets its next token, or its end after the last.
    fn say_token(&mut self, slot: SlotId, n: usize) {
        let Some(process) = self.processes.get_mut(&slot) else { return };
        let Some((&job, (next, max_tokens))) = process.jobs.iter_mut().nth(n) else { return };
        if next < max_tokens {
            let index = *next;
            *next += 1;
            self.said(slot, WorkerSaid::Token { job, token: token(index) });
        } else {
            process.jobs.remove(&job);
            self.said(slot, WorkerSaid::Done { job, done: done() });
        }
    }

    fn say_pong(&mut self, slot: SlotId) {
        let Some(seq) = self.processes.get_mut(&slot).and_then(|process| process.ping.take()) else { return };
        self.said(slot, WorkerSaid::Pong { seq, load: WorkerLoad::default() });
    }

    fn die(&mut self, slot: SlotId, exit: WorkerExit) {
        let Some(process) = self.processes.remove(&slot) else { return };
        self.send(Event::WorkerExited { slot, generation: process.generation, exit });
    }
}

/// One random step.
#[derive(Clone, Debug)]
enum Step {
    Submit { client: u32, max_tokens: u32, priority: i8, deadline_ms: Option<u64> },
    SubmitDurable { client: u32, max_tokens: u32, deaths: u32 },
    Cancel(JobId),
    Ready(SlotId),
    Token(SlotId, usize),
    Fail(SlotId, usize),
    WrongToken(SlotId, u32),
    Pong(SlotId),
    Break(SlotId),
    Crash(SlotId),
    PermanentExit(SlotId),
    Stale(SlotId, u8),
    Pass(u64),
    Restart(SlotId),
    Reload { n_workers: usize, keep: bool, new_model: bool, max_batch: u32 },
    Drain,
    Stop,
}

fn step() -> impl Strategy<Value = Step> {
    let slot = || 0..3_u32;
    prop_oneof![
        6 => (0..3_u32, 1..4_u32, -1..2_i8, proptest::option::weighted(0.2, 1..20_000_u64)).prop_map(
            |(client, max_tokens, priority, deadline_ms)| Step::Submit { client, max_tokens, priority, deadline_ms }
        ),
        3 => (0..3_u32, 1..4_u32, 0..4_u32)
            .prop_map(|(client, max_tokens, deaths)| Step::SubmitDurable { client, max_tokens, deaths }),
        1 => (0..40_u64).prop_map(Step::Cancel),
        4 => slot().prop_map(Step::Ready),
        8 => (slot(), 0..2_usize).prop_map(|(slot, n)| Step::Token(slot, n)),
        1 => (slot(), 0..2_usize).prop_map(|(slot, n)| Step::Fail(slot, n)),
        1 => (slot(), 0..5_u32).prop_map(|(slot, index)| Step::WrongToken(slot, index)),
        4 => slot().prop_map(Step::Pong),
        1 => slot().prop_map(Step::Break),
        3 => slot().prop_map(Step::Crash),
        1 => slot().prop_map(Step::PermanentExit),
        2 => (slot(), any::<u8>()).prop_map(|(slot, what)| Step::Stale(slot, what)),
        4 => (0..15_000_u64).prop_map(Step::Pass),
        1 => slot().prop_map(Step::Restart),
        1 => (1..4_usize, any::<bool>(), any::<bool>(), 1..3_u32).prop_map(
            |(n_workers, keep, new_model, max_batch)| Step::Reload { n_workers, keep, new_model, max_batch }
        ),
        1 => Just(Step::Drain),
        1 => proptest::bool::weighted(0.3).prop_map(|is_stop| if is_stop { Step::Stop } else { Step::Pass(1) }),
    ]
}

fn take(world: &mut World, step: Step) {
    match step {
        Step::Submit { client, max_tokens, priority, deadline_ms } => {
            // Prompts with long beginnings in common.
            let prompt =
                Prompt::Text(format!("{}{client}", "system prompt ".repeat(20 * max_tokens as usize)));
            world.submit(client, GenerateRequest { priority, deadline_ms, prompt, ..request(max_tokens) });
        }
        Step::SubmitDurable { client, max_tokens, deaths } => {
            world.submit_as(Standing::Durable { deaths }, client, request(max_tokens));
        }
        Step::Cancel(job) => {
            world.send(Event::JobCancelled { job });
        }
        Step::Ready(slot) => world.say_ready(world.pick(slot)),
        Step::Token(slot, n) => world.say_token(world.pick(slot), n),
        Step::Fail(slot, n) => {
            let slot = world.pick(slot);
            let job = world.processes.get(&slot).and_then(|process| process.jobs.keys().nth(n).copied());
            if let Some(job) = job {
                let error = WireError::new(ErrorCode::ContextExceeded, "too long");
                world.processes.get_mut(&slot).unwrap().jobs.remove(&job);
                world.said(slot, WorkerSaid::Failed { job, error });
            }
        }
        Step::WrongToken(slot, index) => {
            let slot = world.pick(slot);
            let job = world.processes.get(&slot).and_then(|process| process.jobs.keys().next().copied());
            if let Some(job) = job {
                // Right by chance: then the process must know that it said it.
                if let Some((next, _)) = world.processes.get_mut(&slot).unwrap().jobs.get_mut(&job) {
                    *next += u32::from(*next == index);
                }
                world.said(slot, WorkerSaid::Token { job, token: token(index) });
            }
        }
        Step::Pong(slot) => world.say_pong(world.pick(slot)),
        Step::Break(slot) => {
            let slot = world.pick(slot);
            if let Some(generation) = world.processes.get(&slot).map(|process| process.generation) {
                world.send(Event::LinkBroke { slot, generation, reason: "garbage".into() });
            }
        }
        Step::Crash(slot) => world.die(world.pick(slot), exit(None, Some(11))),
        Step::PermanentExit(slot) => world.die(world.pick(slot), exit(Some(65), None)),
        Step::Stale(slot, what) => stale(world, world.pick(slot), what),
        Step::Pass(ms) => world.pass(Duration::from_millis(ms)),
        Step::Restart(slot) => world.send(Event::RestartRequested { slot: world.pick(slot) }),
        Step::Reload { n_workers, keep, new_model, max_batch } => {
            let max_jobs = if keep { 6 } else { 5 };
            world.reload(n_workers, keep, new_model, Policy { max_batch, ..policy_with(max_jobs) });
        }
        Step::Drain => world.send(Event::DrainRequested),
        Step::Stop => world.send(Event::StopRequested),
    }
}

/// Something from a process that is not there any more must change nothing.
fn stale(world: &mut World, slot: SlotId, what: u8) {
    let of = world.state.slots.iter().find(|of| of.id == slot);
    let Some(generation) = of.and_then(|of| of.generation.checked_sub(1)) else { return };
    let before = format!("{:?}", world.state);
    let event = match what % 4 {
        0 => Event::WorkerExited { slot, generation, exit: exit(Some(0), None) },
        1 => Event::LinkBroke { slot, generation, reason: "late".into() },
        2 => Event::WorkerSpoke { slot, generation, message: ready() },
        _ => {
            let job = world.open.keys().next().copied().unwrap_or(1);
            Event::WorkerSpoke { slot, generation, message: WorkerSaid::Token { job, token: token(0) } }
        }
    };
    world.send(event);
    let after = format!("{:?}", world.state);
    assert_eq!(before, after);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn no_history_breaks_an_invariant(steps in proptest::collection::vec(step(), 1..150)) {
        let mut world = World::new(policy(), 3);
        for step in steps {
            take(&mut world, step);
        }
        // However it went, a drain brings everything to its end.
        world.send(Event::DrainRequested);
        for _ in 0..2_000 {
            if world.is_stopped {
                break;
            }
            for slot in world.state.slot_ids() {
                world.say_ready(slot);
                world.say_pong(slot);
                world.say_token(slot, 0);
                let is_draining =
                    |of: &Slot| of.id == slot && of.state_name() == "draining";
                if world.state.slots.iter().any(is_draining) {
                    world.die(slot, exit(Some(0), None));
                }
            }
            world.pass(Duration::from_millis(100));
        }
        prop_assert!(world.is_stopped && world.open.is_empty(), "{:?}", world.state);
    }
}
