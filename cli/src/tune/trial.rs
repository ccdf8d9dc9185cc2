//! One split at work: a service is started with it, each workload is done once, and times are taken.

use std::time::{Duration, Instant};

use bitnetd_config::{Config, QueueConfig};
use bitnetd_placement::Candidate;
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::request::GenerateRequest;
use bitnetd_proto::worker_link::{ImageState, WorkerLoad};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::workload::{Load, Workload, request};
use crate::answer::{Answer, Collector};
use crate::error::CliError;
use crate::local::Local;

/// What one split came to in one workload, once.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measurement {
    /// The work, in numbers.
    pub(crate) load: Load,
    /// Tokens/s of prompts alone, all jobs together.
    pub(crate) prefill: f64,
    /// Tokens/s generated with next to no prompt, all jobs together.
    pub(crate) decode: f64,
    /// Bytes/s of weights that decoding read, all workers together.
    pub(crate) decode_bytes_per_s: f64,
    /// Tokens/s generated while the whole workload was done.
    pub(crate) whole: f64,
    /// Median time of a job in seconds.
    pub(crate) p50_s: f64,
    /// Time in which 95 % of the jobs ended, in seconds.
    pub(crate) p95_s: f64,
    /// The same to the first token.
    pub(crate) ttft_p95_s: f64,
}

/// What all trials have in common.
#[derive(Clone, Debug)]
pub(crate) struct Bench {
    /// Everything but the split.
    pub(crate) config: Config,
    /// The work.
    pub(crate) workloads: Vec<Workload>,
    /// CPUs that there are to use.
    pub(crate) n_cpus: usize,
    /// Smaller loads.
    pub(crate) is_quick: bool,
}

/// Time that a trial waits for the workers to say how many steps they took.
const REPORT_DEADLINE: Duration = Duration::from_secs(5);
/// Time that a trial waits for the fast image of a large model; on one slow thread it takes a minute.
const IMAGE_DEADLINE: Duration = Duration::from_secs(300);
/// How often workers are asked for it.
const PING_INTERVAL: Duration = Duration::from_millis(50);

impl Bench {
    /// Runs every workload on `candidate`; `round` makes the prompts new ones.
    pub(crate) async fn run(
        &self,
        candidate: &Candidate,
        round: usize,
    ) -> Result<Vec<Measurement>, CliError> {
        let mut config = self.config.clone();
        config.split = candidate.split();
        config.affinity = candidate.affinity(&config.affinity);
        config.queue = QueueConfig { max_jobs: 8192, max_per_client: 8192, ..config.queue };
        config.engine.speculation = "off".into(); // Answers to random prompts are easier to guess than real ones.
        config.watchdog.interval = config.watchdog.interval.min(PING_INTERVAL);
        Local::with(config, async |local| {
            let n_ctx = local.model.n_ctx;
            let mut trial = Trial { local, number: (round as u64) << 32, n_generated: 0 };
            trial.warm_up(candidate.workers).await?;
            let mut measurements = Vec::new();
            for &workload in &self.workloads {
                let load = workload.load(self.n_cpus, n_ctx, self.is_quick);
                measurements.push(trial.measure(load).await?);
            }
            Ok(measurements)
        })
        .await
    }
}

/// A service under test.
struct Trial {
    local: Local,
    /// Prompts made so far.
    number: u64,
    /// Tokens generated so far.
    n_generated: u64,
}

/// Jobs done, and the time it took.
struct Pass {
    answers: Vec<Answer>,
    /// From the moment each was asked for, waiting for a place included.
    latencies_s: Vec<f64>,
    wall_s: f64,
}

impl Pass {
    /// `count` of all answers for each second.
    fn rate(&self, count: impl Fn(&Answer) -> u32) -> f64 {
        let sum: f64 = self.answers.iter().map(|answer| f64::from(count(answer))).sum();
        sum / self.wall_s.max(f64::MIN_POSITIVE)
    }

    /// What `percent` of the jobs took at most.
    fn latency_s(&self, percent: usize) -> f64 {
        crate::batch::percentile(&self.latencies_s, percent)
    }

    /// What `percent` of the first tokens took at most.
    fn ttft_s(&self, percent: usize) -> f64 {
        let values: Vec<f64> = self.answers.iter().map(|answer| answer.ttft_seconds).collect();
        crate::batch::percentile(&values, percent)
    }
}

impl Trial {
    /// Faults the weights in and lets every worker of `n_workers` work once.
    async fn warm_up(&mut self, n_workers: usize) -> Result<(), CliError> {
        let load = Load { n_jobs: 2 * n_workers, n_together: 2 * n_workers, n_prompt: 8, n_generated: 2 };
        self.pass(load).await?;
        self.image_is_there().await
    }

    /// Waits until no worker is busy with the fast image of the model any more: it would be measured as slowness.
    async fn image_is_there(&self) -> Result<(), CliError> {
        let deadline = Instant::now() + IMAGE_DEADLINE;
        loop {
            let loads = self.loads().await;
            let is_under_way =
                |load: &WorkerLoad| matches!(load.image, ImageState::Waiting | ImageState::Making);
            if !loads.iter().any(is_under_way) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let text = format!("the fast image of the model was not made within {IMAGE_DEADLINE:?}");
                return Err(CliError::new(ExitCode::Temporary, text)
                    .hint("`model.head = \"file\"` in the configuration does without"));
            }
            tokio::time::sleep(PING_INTERVAL).await;
        }
    }

    async fn measure(&mut self, load: Load) -> Result<Measurement, CliError> {
        let prefill = self.pass(load.prefill()).await?;
        let bytes_before = self.bytes_read().await;
        let decode = self.pass(load.decode()).await?;
        let bytes = self.bytes_read().await - bytes_before;
        let whole = self.pass(load).await?;
        Ok(Measurement {
            load,
            prefill: prefill.rate(|answer| answer.prompt_tokens),
            decode: decode.rate(|answer| answer.tokens),
            decode_bytes_per_s: bytes / decode.wall_s.max(f64::MIN_POSITIVE),
            whole: whole.rate(|answer| answer.tokens),
            p50_s: whole.latency_s(50),
            p95_s: whole.latency_s(95),
            ttft_p95_s: whole.ttft_s(95),
        })
    }

    /// Does jobs, so many at a time.
    async fn pass(&mut self, load: Load) -> Result<Pass, CliError> {
        let n_vocab = self.local.model.n_vocab;
        let requests: Vec<GenerateRequest> = (0..load.n_jobs)
            .map(|_| {
                self.number += 1;
                request(load, n_vocab, self.number)
            })
            .collect();
        let mut waiting = requests.into_iter();
        let mut running = JoinSet::new();
        let (mut answers, mut latencies_s) = (Vec::new(), Vec::new());
        let start = Instant::now();
        loop {
            while running.len() < load.n_together
                && let Some(request) = waiting.next()
            {
                let local = self.local.clone();
                running.spawn_local(async move {
                    let begun = Instant::now();
                    let mut job = local.start(request).await?;
                    let collector = Collector::new(0, String::new(), false);
                    let answer = collector.collect(&mut job, async |_: &str| Ok(())).await?;
                    Ok::<_, CliError>((answer, begun.elapsed().as_secs_f64()))
                });
            }
            let Some(ended) = running.join_next().await else { break };
            let (answer, latency_s) =
                ended.map_err(|error| CliError::with_code(ExitCode::Software, error))??;
            self.n_generated += u64::from(answer.tokens);
            answers.push(answer);
            latencies_s.push(latency_s);
        }
        Ok(Pass { answers, latencies_s, wall_s: start.elapsed().as_secs_f64() })
    }

    /// Bytes of weights that all workers have read in all their steps.
    async fn bytes_read(&self) -> f64 {
        let bytes = |load: &WorkerLoad| load.steps as f64 * load.step_bytes as f64;
        self.loads().await.iter().map(bytes).sum()
    }

    /// What the workers say about themselves. Waits until they have told of every token.
    async fn loads(&self) -> Vec<WorkerLoad> {
        let deadline = Instant::now() + REPORT_DEADLINE;
        loop {
            let loads = self.local.loads().await;
            let n_told: u64 = loads.iter().map(|load| load.decode_tokens).sum();
            if n_told >= self.n_generated || Instant::now() > deadline {
                return loads;
            }
            tokio::time::sleep(PING_INTERVAL).await;
        }
    }
}
