//! A service inside this process, for `run` and `batch`: the daemon's supervisor without its socket.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bitnetd_config::{Config, Environment, ISAS, Place, SPECULATIONS, SplitConfig};
use bitnetd_placement::{Limits, Machine, Plan, PlanError};
use bitnetd_proto::request::GenerateRequest;
use bitnetd_proto::status::StatusReport;
use bitnetd_proto::worker_link::{ModelSummary, WorkerLoad};
use bitnetd_supervisor::{ClientId, Job, JobEvent, ModelSource, Service, ServiceSpec};
use clap::Args;
use clap::builder::PossibleValuesParser;

use crate::answer::{AnswerEvent, Source};
use crate::error::CliError;
use crate::{runtime, tune};

/// The model that is part of the binary; `models/README.md` is its card.
static BUILT_IN_MODEL: &[u8] = include_bytes!("../../models/story.gguf");

/// The supervisor's own process image: it is the same program as ours even if the file was replaced meanwhile.
const WORKER_PROGRAM: &str = "/proc/self/exe";

/// Which model, and how a worker computes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// GGUF file with a BitNet model; without it, the small built-in one that tells stories
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Context window in tokens; without it, the model's own
    #[arg(short, long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(16..=1 << 20))]
    ctx_size: Option<u32>,
    /// Prompt tokens computed in one step
    #[arg(short, long, value_name = "TOKENS", default_value = "256", value_parser = clap::value_parser!(u32).range(1..=8192))]
    batch_size: u32,
    /// Instruction set of the kernels; the answer is the same with each
    #[arg(long, value_name = "NAME", default_value = "auto", value_parser = PossibleValuesParser::new(ISAS))]
    isa: String,
    /// Guess tokens from the text so far and check several in one step, where it pays [default: auto]; the answer is the
    /// same
    #[arg(long, value_name = "WHEN", value_parser = PossibleValuesParser::new(SPECULATIONS))]
    pub speculation: Option<String>,
}

impl ModelArgs {
    /// Writes what the flags say into a configuration.
    pub(crate) fn apply(&self, config: &mut Config) -> Result<(), CliError> {
        if let Some(path) = &self.model {
            let absolute =
                std::path::absolute(path).map_err(|source| CliError::file("find", path, source))?;
            config.model.path = Some(absolute);
        }
        config.engine.ctx = self.ctx_size;
        config.engine.prefill_chunk = self.batch_size;
        config.engine.isa.clone_from(&self.isa);
        if let Some(speculation) = &self.speculation {
            config.engine.speculation.clone_from(speculation);
        }
        Ok(())
    }
}

/// What a configuration and this machine come to.
pub(crate) fn plan(config: &Config) -> Result<Plan, CliError> {
    // The supervisor may be keeping to a part of the mask that was given to this process.
    let limits = Limits { affinity: bitnetd_supervisor::given_affinity() };
    Ok(plan_for(&Machine::read(Path::new("/"), &limits), config)?)
}

/// The same for any machine: `profile = "auto"` means what `tune` found best, where it was asked.
pub(crate) fn plan_for(machine: &Machine, config: &Config) -> Result<Plan, PlanError> {
    match tune::tuned_split(machine, config) {
        Some((size, affinity, evidence)) => {
            bitnetd_placement::plan_as_measured(machine, size, &affinity, &evidence)
        }
        None => bitnetd_placement::plan(machine, &config.split, &config.affinity),
    }
}

/// Everything the supervisor needs, from a configuration.
pub(crate) fn service_spec(config: Config) -> Result<ServiceSpec, CliError> {
    let model = match &config.model.path {
        Some(path) => ModelSource::File(path.clone()),
        None => ModelSource::BuiltIn(BUILT_IN_MODEL),
    };
    let plan = plan(&config)?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    for reason in &plan.reasons {
        tracing::info!("{reason}");
    }
    Ok(ServiceSpec {
        plan,
        model,
        image_cache: image_cache(&config),
        worker_program: WORKER_PROGRAM.into(),
        memory_bytes: memory_bytes(&config),
        worker_args: vec!["worker".into(), "--log-filter".into(), config.log.level.clone().into()],
        config,
    })
}

/// Where fast images are kept.
fn image_cache(config: &Config) -> Option<PathBuf> {
    match &config.model.image_cache {
        Place::Usual => Environment::read().cache_dir(),
        Place::Off => None,
        Place::At(dir) => Some(dir.clone()),
    }
}

/// What workers may take: as configured, else what there was when it was first asked for, so that a service that starts
/// its workers anew does not count its own as somebody else's.
fn memory_bytes(config: &Config) -> Option<u64> {
    static AVAILABLE: OnceLock<Option<u64>> = OnceLock::new();
    match config.engine.memory_mib {
        Some(mib) => Some(u64::from(mib) << 20),
        None => *AVAILABLE.get_or_init(|| bitnetd_placement::memory::available_bytes(Path::new("/"))),
    }
}

/// A service of our own, and what it serves.
#[derive(Clone, Debug)]
pub(crate) struct Local {
    service: Service,
    /// The model, as a worker read it.
    pub model: ModelSummary,
    /// What runs where.
    pub plan: Plan,
}

impl Local {
    /// Starts a service, does the work with it, and stops it, whatever comes of the work. Ctrl-C ends the work.
    pub(crate) async fn with<T>(
        config: Config,
        work: impl AsyncFnOnce(Local) -> Result<T, CliError>,
    ) -> Result<T, CliError> {
        let spec = service_spec(config)?;
        let plan = spec.plan.clone();
        let service = Service::start(spec).await?;
        let outcome = runtime::unless_interrupted(async {
            let model = service.ready().await?;
            work(Local { service: service.clone(), model, plan }).await
        })
        .await;
        match &outcome {
            Ok(_) => service.drain().await, // Nothing is left to do: the workers end by themselves.
            Err(_) => service.stop().await,
        }
        service.stopped().await;
        outcome
    }

    /// Hands a job to it.
    pub(crate) async fn start(&self, request: GenerateRequest) -> Result<LocalJob, CliError> {
        let job = self.service.submit(ClientId::InProcess, request).await?;
        Ok(LocalJob { is_new: true, job })
    }

    /// How the service is.
    pub(crate) async fn status(&self) -> StatusReport {
        self.service.status().await
    }

    /// What every worker said last about itself.
    pub(crate) async fn loads(&self) -> Vec<WorkerLoad> {
        self.service.status().await.slots.iter().map(|slot| slot.load).collect()
    }

    /// `2 workers x 4 threads on CPUs 0-7, avx2`
    pub(crate) fn describe(&self) -> String {
        let n_workers = self.plan.workers.len();
        let threads: Vec<usize> = self.plan.workers.iter().map(|worker| worker.cpus.len()).collect();
        let mut cpus: Vec<u32> = self.plan.workers.iter().flat_map(|worker| worker.cpus.clone()).collect();
        cpus.sort_unstable();
        let plural =
            |count: usize, noun: &str| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
        let threads = match (threads.iter().min(), threads.iter().max()) {
            (Some(min), Some(max)) if min < max => format!("{min} to {max} threads"),
            (_, max) => plural(max.copied().unwrap_or(0), "thread"),
        };
        format!(
            "{}, {} x {threads} on CPUs {}, {}",
            self.model.name,
            plural(n_workers, "worker"),
            bitnetd_config::cpu_list::format(&cpus),
            self.model.isa
        )
    }

    /// Jobs that are worked on together in all workers.
    pub(crate) fn n_together(&self, max_batch: u32) -> usize {
        self.plan.workers.len() * max_batch as usize
    }
}

/// One job on it. Dropping this cancels the job.
#[derive(Debug)]
pub(crate) struct LocalJob {
    is_new: bool,
    job: Job,
}

impl Source for LocalJob {
    async fn next(&mut self) -> Result<AnswerEvent, CliError> {
        if std::mem::take(&mut self.is_new) {
            return Ok(AnswerEvent::Accepted { seed: self.job.seed });
        }
        let event = loop {
            match self.job.next().await {
                Some(JobEvent::WorkerDied { .. }) => {} // Put right without us.
                event => break event,
            }
        };
        match event {
            Some(JobEvent::WorkerDied { .. }) | None => Err(CliError::new(
                bitnetd_proto::exit_code::ExitCode::Software,
                "the job ended without a word",
            )),
            Some(JobEvent::Token(token)) => Ok(AnswerEvent::Token(token)),
            Some(JobEvent::Done(done)) => Ok(AnswerEvent::Done(done)),
            Some(JobEvent::Failed(error)) => Err(error.into()),
        }
    }
}

/// The split for `run`: one worker with every CPU, or with so many threads.
pub(crate) fn one_worker(threads: Option<usize>) -> SplitConfig {
    match threads {
        Some(threads) => SplitConfig::Counts { workers: 1, threads },
        None => SplitConfig::Profile(bitnetd_config::Profile::MaxThroughput),
    }
}
