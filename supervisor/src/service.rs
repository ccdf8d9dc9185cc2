//! The face of the supervisor to the rest of the program: start it, give it jobs, operate it.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use bitnetd_config::{Config, ListenConfig};
use bitnetd_placement::Plan;
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::event::{Done, Token};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::request::GenerateRequest;
use bitnetd_proto::status::{JournalReport, StatusReport};
use bitnetd_proto::worker_link::ModelSummary;
use tokio::sync::{Mutex, Notify, mpsc, oneshot, watch};
use tokio::task::spawn_blocking;

use crate::durable::{Durable, Workers};
use crate::event_loop::{Command, Ended, EventLoop, JobSink, Submission};
use crate::image::{ImageError, ModelImage, ModelSource};
use crate::journal::Journal;
use crate::kept_image;
use crate::node_copy::{self, NodeCopies};
use crate::notify::Notifier;
use crate::own_cpus;
use crate::report;
use crate::shelf::Shelf;
use crate::state::{ClientId, JobId, Readiness, Standing};

/// Commands that wait for the event loop, at most; callers wait beyond.
const COMMANDS_MAX: usize = 256;
/// Events of one job, or of all jobs of one connection, that wait to be read, at most. A reader that falls further
/// behind loses its jobs; nobody waits for it.
pub(crate) const UNREAD_EVENTS_MAX: usize = 4096;

/// Everything needed to run workers.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// The validated configuration.
    pub config: Config,
    /// Which worker gets which CPUs.
    pub plan: Plan,
    /// The model.
    pub model: ModelSource,
    /// The directory in which fast images are kept for later processes, if they are.
    pub image_cache: Option<PathBuf>,
    /// The program that is started as a worker, usually this one.
    pub worker_program: PathBuf,
    /// Its arguments.
    pub worker_args: Vec<OsString>,
    /// Bytes that the model and all workers may take together, if that is known.
    pub memory_bytes: Option<u64>,
}

/// Why the service did not come up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The model cannot be opened.
    #[error(transparent)]
    Model(ImageError),
    /// The plan has no worker.
    #[error("the plan has no worker")]
    NoWorkers,
    /// A worker cannot start, and trying again will not help.
    #[error("{error}")]
    Worker {
        /// Its slot.
        slot: u32,
        /// What it said, or how it ended.
        error: WireError,
        /// The code it ended with.
        exit_code: ExitCode,
    },
    /// The service was stopped before it was ready.
    #[error("the service was stopped before it was ready")]
    Stopped,
}

impl StartError {
    /// How the program should end.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Model(error) => error.exit_code(),
            Self::NoWorkers => ExitCode::Config,
            Self::Worker { exit_code, .. } => *exit_code,
            Self::Stopped => ExitCode::Interrupted,
        }
    }
}

/// Reads the configuration again, and hears whether it came to hold.
pub trait Reloader: Send + Sync {
    /// The whole new configuration, checked. May block: it has a thread to itself.
    ///
    /// # Errors
    /// Whatever is wrong with it; then nothing changes.
    fn read(&self) -> Result<ServiceSpec, WireError>;

    /// This configuration holds from now on.
    fn taken_over(&self, config: &Config);
}

/// What a service knows of reloads.
#[derive(Default)]
struct Reloads {
    reloader: OnceLock<Arc<dyn Reloader>>,
    /// One at a time; the next one reads the file when it is its turn.
    turn: Mutex<()>,
}

/// A running service. Cheap to clone; when the last clone and the last [`Job`] are gone, the workers are killed.
#[derive(Clone)]
pub struct Service {
    /// To the event loop.
    commands: mpsc::Sender<Command>,
    readiness: watch::Receiver<Readiness>,
    ended: watch::Receiver<Option<Ended>>,
    /// True from the moment on that no new job is taken.
    ending: Arc<watch::Sender<bool>>,
    reloads: Arc<Reloads>,
    notifier: Notifier,
    /// Durable jobs, if there are any.
    durable: Arc<OnceLock<Result<Durable, String>>>,
    /// Durable jobs that are given to the workers at a time.
    n_durable_places: Arc<AtomicUsize>,
    /// `[listen]` of the last reload, whose allow-lists hold for new clients; `None`: as each listener was made.
    listen: Arc<watch::Sender<Option<Arc<ListenConfig>>>>,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("ended", &self.ended.borrow().is_some()).finish_non_exhaustive()
    }
}

impl Service {
    /// Opens the model and starts every worker. Does not wait until they are ready.
    ///
    /// Call it on a current-thread runtime on the main thread: a worker dies with the thread that started it.
    ///
    /// # Errors
    /// [`StartError::Model`], [`StartError::NoWorkers`].
    pub async fn start(spec: ServiceSpec) -> Result<Self, StartError> {
        Self::start_under(spec, Notifier::default(), Vec::new()).await
    }

    /// The same, with a service manager that is told how it goes, and what it kept from an earlier life.
    ///
    /// # Errors
    /// [`StartError::Model`], [`StartError::NoWorkers`].
    pub async fn start_under(
        spec: ServiceSpec,
        notifier: Notifier,
        stored: Vec<(String, OwnedFd)>,
    ) -> Result<Self, StartError> {
        if spec.plan.workers.is_empty() {
            return Err(StartError::NoWorkers);
        }
        let mut image = ModelImage::open(&spec.model).map_err(StartError::Model)?;
        let mut copies = node_copy::for_plan(&spec.plan, &NodeCopies::new()).map_err(StartError::Model)?;
        let shelf = Shelf::open(notifier.clone(), stored, &spec.config, (&mut image, &mut copies));
        image.set_kept(kept_image::find(spec.image_cache.as_deref(), &spec.config, &image));
        let n_durable_places = Arc::new(AtomicUsize::new(durable_places(&spec)));
        own_cpus::keep_to(&spec.plan.supervisor_cpus);
        let (commands, commands_in) = mpsc::channel(COMMANDS_MAX);
        let (readiness_out, readiness) = watch::channel(Readiness::Starting);
        let (ended_out, ended) = watch::channel(None);
        tokio::spawn(
            EventLoop::new(spec, (image, copies), notifier.clone(), shelf, readiness_out)
                .run(commands_in, ended_out),
        );
        let ending = Arc::new(watch::channel(false).0);
        let (reloads, durable) = (Arc::default(), Arc::default());
        let listen = Arc::new(watch::channel(None).0);
        Ok(Self { commands, readiness, ended, ending, reloads, notifier, durable, n_durable_places, listen })
    }

    /// Takes a journal into service: its jobs go on, and clients may submit more. The first call counts.
    ///
    /// # Errors
    /// If its threads cannot be started.
    pub fn keep_jobs(&self, journal: Journal) -> io::Result<()> {
        let workers = Workers {
            commands: self.commands.downgrade(),
            ended: self.ended.clone(),
            n_places: self.n_durable_places.clone(),
        };
        let _already = self.durable.set(Ok(Durable::start(journal, workers)?));
        Ok(())
    }

    /// Says why there is no journal, for clients who want one.
    pub fn keep_no_jobs(&self, reason: impl Into<String>) {
        let _already = self.durable.set(Err(reason.into()));
    }

    /// The durable jobs.
    pub(crate) fn durable(&self) -> Result<&Durable, WireError> {
        let reason = match self.durable.get() {
            Some(Ok(durable)) => return Ok(durable),
            Some(Err(reason)) => reason.as_str(),
            None => "it was started without a journal",
        };
        let text = format!("this daemon keeps no durable jobs: {reason}");
        Err(WireError::new(ErrorCode::JournalUnavailable, text)
            .with_hint("`queue.journal` in its configuration says where it may keep them"))
    }

    /// Waits until every slot (or `service.ready_workers` of them) has been ready once.
    ///
    /// # Errors
    /// [`StartError::Worker`] if a slot is given up before that, [`StartError::Stopped`].
    pub async fn ready(&self) -> Result<ModelSummary, StartError> {
        let mut readiness = self.readiness.clone();
        let decided = readiness.wait_for(|readiness| !matches!(readiness, Readiness::Starting)).await;
        match decided.as_deref() {
            Ok(Readiness::Ready(model)) => Ok(model.clone()),
            Ok(Readiness::Failed { slot, error, exit_code }) => {
                Err(StartError::Worker { slot: *slot, error: error.clone(), exit_code: *exit_code })
            }
            Ok(Readiness::Starting) | Err(_) => Err(StartError::Stopped),
        }
    }

    /// Asks for a job.
    ///
    /// # Errors
    /// If it is refused: an invalid request, overload, a draining or degraded service.
    pub async fn submit(&self, client: ClientId, request: GenerateRequest) -> Result<Job, WireError> {
        let standing = Standing::Attended;
        let new = Submission { client, standing, request: Box::new(request) };
        Self::submit_with(self.commands.clone(), new).await
    }

    /// Asks the event loop behind `commands` for a job.
    pub(crate) async fn submit_with(
        commands: mpsc::Sender<Command>,
        new: Submission,
    ) -> Result<Job, WireError> {
        let (events_in, events) = mpsc::channel(UNREAD_EVENTS_MAX);
        let sink = JobSink { events: events_in, overrun: Arc::new(Notify::new()) };
        let (job, seed) = ask(&commands, |reply| Command::Submit { new, sink, reply }).await??;
        Ok(Job { job, seed, events, commands, is_over: false })
    }

    /// Asks for a job whose events go into a channel that may serve several.
    pub(crate) async fn submit_to(&self, new: Submission, sink: JobSink) -> Result<(JobId, u64), WireError> {
        self.ask(|reply| Command::Submit { new, sink, reply }).await?
    }

    /// Gives a job up. Its last event says so.
    pub(crate) async fn cancel(&self, job: JobId) {
        let _stopped = self.commands.send(Command::Cancel { job }).await;
    }

    /// How the service is; after its end, how it was then.
    pub async fn status(&self) -> StatusReport {
        let mut ended = self.ended.clone();
        let report = match self.ask(|reply| Command::Status { reply }).await {
            Ok(report) => report,
            Err(_) => match ended.wait_for(Option::is_some).await.as_deref() {
                Ok(Some(ended)) => ended.report.clone(),
                _ => report::nothing(), // The event loop is gone without a word: the runtime was shut down.
            },
        };
        report::with_journal(report, self.journal_report())
    }

    fn journal_report(&self) -> Option<JournalReport> {
        self.durable().ok().map(Durable::report)
    }

    /// What was counted and measured since the start, as OpenMetrics text.
    ///
    /// # Errors
    /// If the service has stopped.
    pub async fn metrics(&self) -> Result<String, WireError> {
        let journal = self.journal_report();
        self.ask(|reply| Command::Metrics { journal, reply }).await
    }

    /// Replaces the worker of one slot; its jobs go on elsewhere. Also brings back a slot that was given up.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`] if there is no such slot.
    pub async fn restart(&self, slot: u32) -> Result<(), WireError> {
        self.ask(|reply| Command::Restart { number: slot, reply }).await?
    }

    /// Begins to stop: no new jobs, the accepted ones are finished (within the configured time), then the workers
    /// are stopped. [`Self::stopped`] waits for the end.
    pub async fn drain(&self) {
        self.ending.send_replace(true);
        self.refuse_durable();
        let _stopped = self.commands.send(Command::Drain).await;
    }

    /// Stops now: jobs fail, workers are killed. [`Self::stopped`] waits until they are reaped.
    pub async fn stop(&self) {
        self.ending.send_replace(true);
        self.refuse_durable();
        let _stopped = self.commands.send(Command::Stop).await;
    }

    /// Waits until no new job is taken any more.
    pub(crate) async fn ending(&self) {
        let mut ending = self.ending.subscribe();
        let mut ended = self.ended.clone();
        tokio::select! {
            _ = ending.wait_for(|is_ending| *is_ending) => {}
            _ = ended.wait_for(Option::is_some) => {}
        }
    }

    fn refuse_durable(&self) {
        if let Ok(durable) = self.durable() {
            durable.refuse_more();
        }
    }

    /// Waits until every worker is reaped, and the journal is closed.
    pub async fn stopped(&self) -> ExitCode {
        let mut ended = self.ended.clone();
        let exit_code = match ended.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(ended)) => ended.exit_code,
            _ => ExitCode::Software, // The event loop is gone without a word: the runtime was shut down.
        };
        if let Ok(durable) = self.durable() {
            durable.closed().await;
        }
        exit_code
    }

    /// Says where a reload gets its configuration from. The first call counts.
    pub fn on_reload(&self, reloader: impl Reloader + 'static) {
        let _already = self.reloads.reloader.set(Arc::new(reloader));
    }

    /// Reads the configuration again and changes over to it: whole, or not at all. No job is lost.
    ///
    /// Answers when the first worker of the new configuration is ready and it holds (the other workers are replaced
    /// one by one after that), or when it is clear that the old one stays. A reload while another one is under way
    /// waits its turn. That it is refused is logged.
    ///
    /// # Errors
    /// What is wrong with the new configuration; [`ErrorCode::Overloaded`] while jobs of a former model still run.
    pub async fn reload(&self) -> Result<(), WireError> {
        let Some(reloader) = self.reloads.reloader.get().cloned() else {
            let text = "this service cannot reload its configuration";
            return Err(WireError::new(ErrorCode::InvalidRequest, text));
        };
        let _turn = self.reloads.turn.lock().await;
        // A service that is not up yet says so when it is, and nothing else before.
        let is_up = matches!(*self.readiness.borrow(), Readiness::Ready(_));
        if is_up {
            self.notifier.reloading();
        }
        let outcome = self.reload_from(reloader).await;
        if is_up {
            self.notifier.reloaded();
        }
        // Also if a client asked, who is told: the log should not end with the question.
        if let Err(error) = &outcome
            && error.code != ErrorCode::Overloaded
        {
            let (code, hint) = (error.code, error.hint.as_deref());
            tracing::error!(?code, hint, "not reloaded, the old configuration stays: {error}");
        }
        outcome
    }

    async fn reload_from(&self, reloader: Arc<dyn Reloader>) -> Result<(), WireError> {
        let read = {
            let reloader = reloader.clone();
            spawn_blocking(move || reloader.read()).await
        };
        let spec = read.map_err(|error| WireError::new(ErrorCode::Internal, error.to_string()))??;
        let config = spec.config.clone();
        self.reload_to(spec).await?;
        reloader.taken_over(&config);
        Ok(())
    }

    /// Changes over to this configuration, as [`Self::reload`] does.
    ///
    /// # Errors
    /// As [`Self::reload`].
    pub async fn reload_to(&self, spec: ServiceSpec) -> Result<(), WireError> {
        if spec.plan.workers.is_empty() {
            return Err(WireError::new(ErrorCode::InvalidRequest, "the plan has no worker"));
        }
        let n_places = durable_places(&spec);
        let listen = Arc::new(spec.config.listen.clone());
        self.ask(|reply| Command::Reload { spec: Box::new(spec), reply }).await??;
        self.n_durable_places.store(n_places, Ordering::Relaxed);
        self.listen.send_replace(Some(listen));
        Ok(())
    }

    /// `[listen]` of the last reload, if there was one.
    pub(crate) fn reloaded_listen(&self) -> Option<Arc<ListenConfig>> {
        self.listen.borrow().clone()
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, WireError> {
        ask(&self.commands, question).await
    }
}

async fn ask<T>(
    commands: &mpsc::Sender<Command>,
    question: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Result<T, WireError> {
    let gone = || WireError::new(ErrorCode::Draining, "the service has stopped");
    let (reply, answer) = oneshot::channel();
    commands.send(question(reply)).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())
}

/// One more than fit on the workers for each of them, so that the next is there when a place comes free.
fn durable_places(spec: &ServiceSpec) -> usize {
    let per_worker = spec.config.queue.durable.per_worker.min(spec.config.engine.max_batch);
    spec.plan.workers.len() * (per_worker as usize + 1)
}

/// A job that was accepted. Dropping it before its end cancels it.
#[derive(Debug)]
pub struct Job {
    /// The service's name of the job, as in its logs.
    pub job: u64,
    /// The seed in use.
    pub seed: u64,
    events: mpsc::Receiver<(JobId, JobEvent)>,
    commands: mpsc::Sender<Command>,
    is_over: bool,
}

/// What comes back for a job.
#[derive(Clone, Debug, PartialEq)]
pub enum JobEvent {
    /// One more token.
    Token(Token),
    /// A worker died with it on board, the n-th in a row. Only said of durable jobs.
    WorkerDied {
        /// Deaths since its last token.
        deaths: u32,
    },
    /// It ended well; nothing follows.
    Done(Done),
    /// It failed; nothing follows.
    Failed(WireError),
}

impl Job {
    /// The next event; `None` after the last.
    ///
    /// # Cancel safety
    /// Nothing is lost if it is dropped before it is done.
    pub async fn next(&mut self) -> Option<JobEvent> {
        if self.is_over {
            return None;
        }
        let event = match self.events.recv().await {
            Some((_, event)) => event,
            None => JobEvent::Failed(overrun_error()),
        };
        self.is_over = matches!(event, JobEvent::Done(_) | JobEvent::Failed(_));
        Some(event)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.is_over {
            // If the event loop is too busy to hear it now, it notices at the job's next event.
            let _full = self.commands.try_send(Command::Cancel { job: self.job });
        }
    }
}

/// The end of a job whose reader fell too far behind (or whose service vanished).
pub(crate) fn overrun_error() -> WireError {
    let text = format!("the job was given up: its reader fell {UNREAD_EVENTS_MAX} events behind");
    WireError::new(ErrorCode::Cancelled, text)
}
