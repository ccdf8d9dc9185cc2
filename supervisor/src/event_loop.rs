//! The one task that owns the state: it hears events and commands, and carries out actions.
//!
//! It never waits for a peer. Orders to a worker and events to a client go into bounded channels with `try_send`;
//! a worker that does not read is killed, a client that does not read loses its jobs.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use bitnetd_proto::PROTOCOL_VERSION;
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::frame::encode_frame;
use bitnetd_proto::request::GenerateRequest;
use bitnetd_proto::status::{JournalReport, StatusReport};
use bitnetd_proto::worker_link::ToWorker;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use crate::child::{SpawnSpec, spawn};
use crate::editions::Editions;
use crate::image::ModelImage;
use crate::kept_image::Keeper;
use crate::link::WorkerLink;
use crate::log;
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::node_copy::NodeCopies;
use crate::notify::{Herald, Notifier};
use crate::own_cpus;
use crate::report;
use crate::service::{JobEvent, ServiceSpec};
use crate::shelf::Shelf;
use crate::state::{
    Action, ClientId, Edition, Event, Generation, JobId, Note, Policy, Readiness, SlotId, Standing, State,
    StopSignal, WorkerSaid, slot_number,
};

/// Events of all workers that wait for the loop, at most; their tasks wait beyond.
const EVENTS_MAX: usize = 1024;

/// What the rest of the program wants.
#[derive(Debug)]
pub(crate) enum Command {
    Submit {
        new: Submission,
        sink: JobSink,
        reply: oneshot::Sender<Result<(JobId, u64), WireError>>,
    },
    Cancel {
        job: JobId,
    },
    Status {
        reply: oneshot::Sender<StatusReport>,
    },
    /// With the journal's part of the status, which the asker has.
    Metrics {
        journal: Option<JournalReport>,
        reply: oneshot::Sender<String>,
    },
    Restart {
        number: u32,
        reply: oneshot::Sender<Result<(), WireError>>,
    },
    Reload {
        spec: Box<ServiceSpec>,
        reply: oneshot::Sender<Result<(), WireError>>,
    },
    Drain,
    Stop,
}

/// A job that somebody asks for.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) client: ClientId,
    pub(crate) standing: Standing,
    pub(crate) request: Box<GenerateRequest>,
}

/// How the service ended.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) exit_code: ExitCode,
    pub(crate) report: StatusReport,
}

/// Where a job's events go.
#[derive(Clone, Debug)]
pub(crate) struct JobSink {
    pub(crate) events: mpsc::Sender<(JobId, JobEvent)>,
    /// Told when the channel was full and events were lost.
    pub(crate) overrun: Arc<Notify>,
}

/// The task.
#[derive(Debug)]
pub(crate) struct EventLoop {
    state: State,
    editions: Editions,
    /// Reloads that are under way.
    reloads: HashMap<Edition, oneshot::Sender<Result<(), WireError>>>,
    herald: Herald,
    shelf: Shelf,
    keeper: Keeper,
    metrics: Metrics,
    monitor: Monitor,
    started: Instant,
    links: HashMap<SlotId, WorkerLink>,
    sinks: HashMap<JobId, JobSink>,
    /// The submission that is being decided: its answer is an action of the same event.
    answer: Option<(JobId, Result<(), WireError>)>,
    /// Consequences of actions that are events themselves.
    pending: VecDeque<Event>,
    last_job: JobId,
    seeds: RandomState,
    readiness: watch::Sender<Readiness>,
    /// Cloned into the task of each worker.
    events: mpsc::Sender<Event>,
    events_in: mpsc::Receiver<Event>,
    is_stopped: bool,
}

impl EventLoop {
    pub(crate) fn new(
        spec: ServiceSpec,
        (image, copies): (ModelImage, NodeCopies),
        notifier: Notifier,
        shelf: Shelf,
        readiness: watch::Sender<Readiness>,
    ) -> Self {
        let policy = Policy::new(&spec.config);
        let n_slots = u32::try_from(spec.plan.workers.len()).unwrap_or(u32::MAX);
        let seeds = RandomState::new();
        let (events, events_in) = mpsc::channel(EVENTS_MAX);
        Self {
            state: State::new(policy, n_slots, seeds.hash_one("restart jitter")),
            editions: Editions::new(spec, image, copies),
            reloads: HashMap::new(),
            herald: Herald::new(notifier),
            shelf,
            keeper: Keeper::default(),
            metrics: Metrics::default(),
            monitor: Monitor::new(),
            started: Instant::now(),
            links: HashMap::new(),
            sinks: HashMap::new(),
            answer: None,
            pending: VecDeque::new(),
            last_job: 0,
            seeds,
            readiness,
            events,
            events_in,
            is_stopped: false,
        }
    }

    /// Runs until every worker is reaped.
    pub(crate) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        ended: watch::Sender<Option<Ended>>,
    ) {
        self.step(Event::TimePassed);
        let mut has_owner = true;
        while !self.is_stopped {
            self.herald.look(&self.state, self.now());
            self.shelf.look(self.editions.present(), self.now());
            let images = self.state.slots().iter().map(|slot| slot.load.image);
            self.keeper.look(self.editions.present(), images, self.now());
            self.monitor.look(self.state.slots().iter().filter_map(|slot| slot.pid), self.now());
            let far = Duration::from_secs(24 * 3600);
            let deadlines = [
                self.state.next_deadline(),
                self.herald.next_due(),
                self.shelf.next_due(),
                self.keeper.next_due(),
                self.monitor.next_due(),
            ];
            let next = deadlines.into_iter().flatten().min().unwrap_or_else(|| self.now() + far);
            let deadline = self.started + next;
            tokio::select! {
                Some(event) = self.events_in.recv() => self.step(event),
                command = commands.recv(), if has_owner => match command {
                    Some(command) => self.obey(command),
                    None => {
                        has_owner = false;
                        self.step(Event::StopRequested);
                    }
                },
                Some(reading) = self.monitor.finished() => self.monitor.take(reading),
                () = sleep_until(deadline) => self.step(Event::TimePassed),
            }
        }
        own_cpus::keep_to(&[]);
        // What is still in the channel gets an answer by the drop of its sender.
        let report = self.status();
        ended.send_replace(Some(Ended { exit_code: ExitCode::Ok, report }));
    }

    fn status(&self) -> StatusReport {
        let report = report::status(&self.state, &self.editions, &self.monitor, self.now());
        StatusReport { kept_image: self.keeper.report(), ..report }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { new, sink, reply } => {
                let answer = self.submit(new, sink);
                if let Err(Ok((job, _))) = reply.send(answer) {
                    self.step(Event::JobCancelled { job });
                }
            }
            Command::Cancel { job } => self.step(Event::JobCancelled { job }),
            Command::Status { reply } => {
                let report = self.status();
                let _gone = reply.send(report);
            }
            Command::Metrics { journal, reply } => {
                let report = self.status();
                let _gone = reply.send(self.metrics.render(&report::with_journal(report, journal)));
            }
            Command::Restart { number, reply } => {
                let answer = self.restart(number);
                let _gone = reply.send(answer);
            }
            Command::Reload { spec, reply } => self.reload(*spec, reply),
            Command::Drain => self.step(Event::DrainRequested),
            Command::Stop => self.step(Event::StopRequested),
        }
    }

    fn submit(&mut self, new: Submission, sink: JobSink) -> Result<(JobId, u64), WireError> {
        let Submission { client, standing, mut request } = new;
        self.last_job += 1;
        let job = self.last_job;
        // Below 2^53, so that a client in any language can hold it exactly.
        let seed = *request.sampling.seed.get_or_insert_with(|| self.seeds.hash_one(job) >> 11);
        self.sinks.insert(job, sink);
        self.answer = None;
        self.step(Event::JobSubmitted { job, client, standing, request: Arc::new(*request) });
        match self.answer.take().filter(|(of, _)| *of == job).map(|(_, answer)| answer) {
            Some(Ok(())) => Ok((job, seed)),
            Some(Err(error)) => {
                self.sinks.remove(&job);
                Err(error)
            }
            None => Err(WireError::new(ErrorCode::Internal, "a submission was not decided")),
        }
    }

    fn restart(&mut self, number: u32) -> Result<(), WireError> {
        if let Some(slot) = self.state.slot_with_number(number) {
            self.step(Event::RestartRequested { slot });
            return Ok(());
        }
        let last = self.editions.present().spec.plan.workers.len().saturating_sub(1);
        Err(WireError::new(ErrorCode::NotFound, format!("there is no slot {number}"))
            .with_hint(format!("slots are 0 to {last}")))
    }

    fn reload(&mut self, spec: ServiceSpec, reply: oneshot::Sender<Result<(), WireError>>) {
        match self.editions.prepare(spec, &self.state) {
            Ok(config) => {
                self.reloads.insert(config.edition, reply);
                self.step(Event::ReloadRequested { config: Box::new(config) });
            }
            Err(error) => {
                let _gone = reply.send(Err(error));
            }
        }
    }

    fn reloaded(&mut self, edition: Edition, outcome: Result<(), WireError>) {
        if outcome.is_ok() {
            self.editions.take_over(edition);
            own_cpus::keep_to(&self.editions.present().spec.plan.supervisor_cpus);
        }
        if let Some(reply) = self.reloads.remove(&edition) {
            let _gone = reply.send(outcome);
        }
    }

    /// One event and everything that follows from it at once.
    fn step(&mut self, event: Event) {
        let mut next = Some(event);
        while let Some(event) = next {
            let now = self.now();
            if let Event::WorkerExited { slot, generation, .. } = &event
                && self.links.get(slot).is_some_and(|link| link.generation == *generation)
            {
                self.links.remove(slot);
            }
            for action in self.state.handle(event, now) {
                self.carry_out(action);
            }
            next = self.pending.pop_front();
        }
        self.editions.forget_unused(&self.state);
        self.publish_readiness();
    }

    fn publish_readiness(&self) {
        if matches!(*self.readiness.borrow(), Readiness::Starting) {
            let readiness = self.state.readiness();
            if !matches!(readiness, Readiness::Starting) {
                self.readiness.send_replace(readiness);
            }
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Accept { job } => self.answer = Some((job, Ok(()))),
            Action::Refuse { job, error } => self.answer = Some((job, Err(error))),
            Action::DeliverToken { job, token } => self.deliver(job, JobEvent::Token(token)),
            Action::CountDeath { job, deaths } => self.deliver(job, JobEvent::WorkerDied { deaths }),
            Action::End { job, outcome } => {
                let event = match outcome {
                    Ok(done) => JobEvent::Done(done),
                    Err(error) => JobEvent::Failed(error),
                };
                self.deliver(job, event);
                self.sinks.remove(&job);
            }
            Action::Spawn { slot, generation } => self.spawn(slot, generation),
            Action::SendJob { slot, generation, job, request, resume } => {
                let request = Box::new(Arc::unwrap_or_clone(request));
                self.order(slot, generation, &ToWorker::Job { job, request, resume });
            }
            Action::SendCancel { slot, generation, job } => {
                self.order(slot, generation, &ToWorker::Cancel { job });
            }
            Action::SendPing { slot, generation, seq } => {
                self.order(slot, generation, &ToWorker::Ping { seq })
            }
            Action::Signal { slot, generation, signal } => self.signal(slot, generation, signal),
            Action::Reloaded { edition, outcome } => self.reloaded(edition, outcome),
            Action::Note(note) => self.note(&note),
            Action::Stop => self.is_stopped = true,
        }
    }

    fn deliver(&mut self, job: JobId, event: JobEvent) {
        let Some(sink) = self.sinks.get(&job) else { return };
        match sink.events.try_send((job, event)) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                sink.overrun.notify_one();
                self.forget_reader(job);
            }
            Err(mpsc::error::TrySendError::Closed(_)) => self.forget_reader(job),
        }
    }

    /// The job's reader is gone or too slow; a no-op in the state if the job has just ended.
    fn forget_reader(&mut self, job: JobId) {
        self.sinks.remove(&job);
        self.pending.push_back(Event::JobCancelled { job });
    }

    fn spawn(&mut self, slot: SlotId, generation: Generation) {
        let Some((edition, placement)) = self.editions.of_slot(slot) else {
            return; // Each slot of the state is a worker of the plan of its edition.
        };
        let spec = SpawnSpec {
            program: &edition.spec.worker_program,
            args: &edition.spec.worker_args,
            image: &edition.image,
            copy: placement.copy_node.and_then(|node| edition.copies.get(&node)).map(Arc::as_ref),
            placement,
            numa: edition.spec.config.affinity.numa,
            nice: edition.spec.config.engine.nice,
            scheduler: edition.spec.config.engine.scheduler,
            is_locked: edition.spec.config.engine.mlock,
        };
        match spawn(&spec) {
            Ok((child, stream)) => {
                let pid = child.pid();
                self.metrics.worker_started();
                tracing::info!(
                    slot = slot_number(slot),
                    generation,
                    pid,
                    cpus = report::cpu_list(&placement.cpus),
                    "worker started"
                );
                let setup = report::worker_setup(slot_number(slot), &edition.spec, placement);
                self.links
                    .insert(slot, WorkerLink::start(slot, generation, child, stream, self.events.clone()));
                self.pending.push_back(Event::WorkerSpawned { slot, generation, pid });
                self.order(
                    slot,
                    generation,
                    &ToWorker::Hello { version: PROTOCOL_VERSION, setup: Box::new(setup) },
                );
            }
            Err(error) => {
                tracing::error!(slot = slot_number(slot), generation, %error, "worker not started");
                let (error, exit_code) = error.to_wire();
                self.pending.push_back(Event::WorkerSpawnFailed { slot, generation, error, exit_code });
            }
        }
    }

    fn order(&mut self, slot: SlotId, generation: Generation, message: &ToWorker) {
        let Some(link) = self.links.get(&slot).filter(|link| link.generation == generation) else { return };
        let frame = match encode_frame(message) {
            Ok(frame) => frame,
            Err(error) => {
                // Only a job can be too large, and admission sees to it that none is.
                tracing::error!(slot = slot_number(slot), %error, "order not sent");
                if let ToWorker::Job { job, .. } = message {
                    let (job, error) = (*job, WireError::new(ErrorCode::Internal, error.to_string()));
                    let message = WorkerSaid::Failed { job, error };
                    self.pending.push_back(Event::WorkerSpoke { slot, generation, message });
                }
                return;
            }
        };
        if let Err(mpsc::error::TrySendError::Full(_)) = link.outbox.try_send(frame) {
            let reason = "it does not read its link".into();
            self.pending.push_back(Event::LinkBroke { slot, generation, reason });
        }
    }

    fn signal(&mut self, slot: SlotId, generation: Generation, signal: StopSignal) {
        if signal == StopSignal::Terminate {
            self.order(slot, generation, &ToWorker::Drain);
        }
        if let Some(link) = self.links.get(&slot).filter(|link| link.generation == generation) {
            link.group.signal(signal);
        }
    }

    fn note(&self, note: &Note) {
        self.metrics.note(note);
        log::write(note);
    }
}
