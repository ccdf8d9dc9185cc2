//! `bitnetd batch`: many prompts, several at a time, results as they finish, resumable.

pub(crate) mod input; // Lines to requests.
mod output; // The results file.
mod summary; // What it came to.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bitnetd_config::{Choice as _, Config, Profile, QueueConfig, SplitConfig};
use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::exit_code::ExitCode;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::{JoinSet, LocalSet};

use crate::answer::{self, Answer, Collector};
use crate::batch::input::{Format, Item};
use crate::batch::output::Results;
use crate::batch::summary::Summary;
pub(crate) use crate::batch::summary::percentile;
use crate::daemon::{self, DaemonJob};
use crate::error::CliError;
use crate::local::{Local, ModelArgs};
use crate::logging::{self, LogArgs};
use crate::request_args::GenerationArgs;
use crate::run::parse_count;
use crate::runtime;
use crate::stats::Baseline;
use crate::terminal::{self, Printer};

/// `bitnetd batch`
#[derive(Debug, Args)]
#[command(after_help = "\
Input: a text file with one prompt a line, or JSONL with objects such as
  {\"prompt\": \"Once upon a time\", \"max_tokens\": 64, \"seed\": 7}
  {\"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}], \"temperature\": 0.8}
What a line leaves out is taken from the flags.

Output (-o): one JSON object a line, written as soon as it is ready; `index` is the number of the prompt from 0.
Started again with the same input and flags, a batch goes on where it stopped; what failed is tried again.

Exit code: 0 if every prompt has an answer, 1 if some failed.

Examples:
  bitnetd batch prompts.txt -o answers.jsonl
  bitnetd batch prompts.jsonl -o answers.jsonl -m model.gguf --workers 3 --threads 4
  bitnetd batch prompts.txt -o answers.jsonl --socket /run/bitnetd/bitnetd.sock")]
pub(crate) struct BatchArgs {
    /// File with the prompts; `-` is stdin
    #[arg(value_name = "FILE")]
    input: PathBuf,
    /// How to read it; without it: jsonl if the name ends so, else txt
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// Write results to this file as JSONL; go on where it stops if it exists
    #[arg(short, long, value_name = "OUT.jsonl", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Print results as JSONL instead of for people
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Say at the end what each core and thread did, on stderr (with --json as one JSON object)
    #[arg(long, help_heading = "Output", conflicts_with = "socket")]
    stats: bool,
    /// Prompts worked on at a time; without it, as many as all workers take together (8 with --socket)
    #[arg(short = 'P', long, value_name = "N", value_parser = parse_count)]
    parallel: Option<usize>,
    #[command(flatten)]
    generation: GenerationArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    split: SplitArgs,
    /// Let a running daemon do the work instead of workers of our own
    #[arg(
        long,
        value_name = "PATH",
        help_heading = "Daemon",
        conflicts_with_all = ["model", "ctx_size", "batch_size", "isa", "profile", "workers", "threads"]
    )]
    socket: Option<PathBuf>,
}

/// How the CPUs are divided among workers.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Split")]
pub(crate) struct SplitArgs {
    /// How to divide the CPUs among workers
    #[arg(long, value_name = "PROFILE", value_parser = profiles(), conflicts_with = "workers")]
    profile: Option<Profile>,
    /// Worker processes; without --threads the CPUs are shared out among them
    #[arg(long, value_name = "N", value_parser = parse_count)]
    workers: Option<usize>,
    /// Compute threads in each worker, one pinned to each CPU
    #[arg(short, long, value_name = "N", value_parser = parse_count, conflicts_with = "profile")]
    threads: Option<usize>,
}

fn profiles() -> impl clap::builder::TypedValueParser<Value = Profile> {
    PossibleValuesParser::new(Profile::CHOICES.iter().map(|(name, _)| *name))
        .map(|name| Profile::from_name(&name).unwrap_or_default())
}

impl SplitArgs {
    /// Writes what the flags say into a configuration.
    pub(crate) fn apply(&self, config: &mut Config) -> Result<(), CliError> {
        let split = match (self.profile, self.workers, self.threads) {
            (Some(profile), _, _) => SplitConfig::Profile(profile),
            (None, None, None) => return Ok(()),
            (None, workers, Some(threads)) => SplitConfig::Counts { workers: workers.unwrap_or(1), threads },
            (None, Some(workers), None) => {
                let all = crate::local::plan(config)?;
                let n_cpus: usize = all.workers.iter().map(|worker| worker.cpus.len()).sum();
                SplitConfig::Counts { workers, threads: (n_cpus / workers).max(1) }
            }
        };
        config.split = split;
        Ok(())
    }
}

/// Who does the work.
#[derive(Clone, Debug)]
enum Backend {
    Local(Rc<Local>),
    Daemon(PathBuf),
}

impl Backend {
    /// One answer. Waits and asks again where the daemon has no room just now.
    async fn answer(&self, item: &Item) -> Result<Answer, CliError> {
        loop {
            let collector = Collector::new(item.index, item.prompt.clone(), item.request.logprobs.is_some());
            let ignore_text = async |_: &str| Ok(());
            let outcome = match self {
                Self::Local(local) => {
                    collector.collect(&mut local.start(item.request.clone()).await?, ignore_text).await
                }
                Self::Daemon(socket) => {
                    let mut job = DaemonJob::start(socket.clone(), item.request.clone())?;
                    collector.collect(&mut job, ignore_text).await
                }
            };
            match outcome.as_ref().err().and_then(CliError::wire) {
                Some(error) if error.code == ErrorCode::Overloaded => {
                    let wait_ms = error.retry_after_ms.unwrap_or(RETRY_MS).clamp(1, RETRY_MS_MAX);
                    tokio::time::sleep(Duration::from_millis(wait_ms)).await;
                }
                _ => return outcome,
            }
        }
    }
}

/// Time before a refused job is offered again, where the daemon names none.
const RETRY_MS: u64 = 250;
/// Longest such time.
const RETRY_MS_MAX: u64 = 10_000;

/// Runs the command.
pub(crate) fn main(args: &BatchArgs, log: &LogArgs) -> Result<ExitCode, CliError> {
    let items = input::read_file(&args.input, args.format, &args.generation)?;
    let results = args.output.as_deref().map(|path| Results::open(path, &items)).transpose()?;
    let is_done = |index| results.as_ref().is_some_and(|results| results.is_done(index));
    let n_resumed = results.as_ref().map_or(0, Results::n_done);
    let todo: Vec<Item> = items.iter().filter(|item| !is_done(item.index)).cloned().collect();
    let batch = Batch {
        as_json: args.json,
        quiet: log.quiet,
        bar: progress_bar(items.len(), n_resumed, log.quiet),
        summary: Summary::new(n_resumed),
        results,
    };
    runtime::block_on(async {
        if todo.is_empty() {
            return batch.finish(Duration::ZERO);
        }
        if let Some(socket) = &args.socket {
            daemon::connect(socket)?; // Nobody there is one failure, not one for each prompt.
            let n_together = args.parallel.unwrap_or(DAEMON_PARALLEL);
            return runtime::unless_interrupted(batch.work(
                Backend::Daemon(socket.clone()),
                todo,
                n_together,
            ))
            .await;
        }
        let mut config = Config::default();
        args.model.apply(&mut config)?;
        args.split.apply(&mut config)?;
        let max_batch = config.engine.max_batch;
        config.log.level = logging::worker_filter(log);
        // We bound what is in flight ourselves, one job for each place.
        // Nobody reads along, token by token.
        config.engine.prefill_time = Duration::from_secs(1);
        config.queue = QueueConfig { max_jobs: 8192, max_per_client: 8192, ..config.queue };
        Local::with(config, async |local| {
            if !batch.quiet {
                batch.bar.suspend(|| terminal::say(&format!("[{}]", local.describe())));
            }
            let n_together = args.parallel.unwrap_or_else(|| local.n_together(max_batch));
            let baseline = if args.stats { Some(Baseline::take(&local).await) } else { None };
            let local = Rc::new(local);
            let outcome = batch.work(Backend::Local(local.clone()), todo, n_together).await?;
            if let Some(baseline) = baseline {
                let stats = baseline.finish(&local).await;
                let shown = if args.json { answer::json_line(&stats)? } else { stats.table() };
                terminal::say(shown.trim_end());
            }
            Ok(outcome)
        })
        .await
    })
}

/// Jobs on a daemon at a time; it shares its workers with others.
const DAEMON_PARALLEL: usize = 8;

fn progress_bar(n_items: usize, n_done: usize, quiet: bool) -> ProgressBar {
    let target = if !quiet && std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let style =
        ProgressStyle::with_template("{bar:32} {pos}/{len} prompts, {elapsed} gone, {eta} to go{msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(n_items as u64), target).with_style(style);
    bar.with_position(n_done as u64)
}

/// A batch at work.
#[derive(Debug)]
struct Batch {
    as_json: bool,
    quiet: bool,
    bar: ProgressBar,
    summary: Summary,
    results: Option<Results>,
}

impl Batch {
    /// Does all of `todo`, `n_together` at a time; results in the order in which they finish.
    async fn work(
        mut self,
        backend: Backend,
        todo: Vec<Item>,
        n_together: usize,
    ) -> Result<ExitCode, CliError> {
        let start = Instant::now();
        let printer = Printer::start(self.bar.clone())?;
        let mut waiting = todo.into_iter();
        let tasks = LocalSet::new();
        let outcome: Result<(), CliError> = tasks
            .run_until(async {
                let mut running = JoinSet::new();
                loop {
                    while running.len() < n_together
                        && let Some(item) = waiting.next()
                    {
                        let backend = backend.clone();
                        running.spawn_local(async move {
                            let outcome = backend.answer(&item).await;
                            (item, outcome)
                        });
                    }
                    let Some(finished) = running.join_next().await else { return Ok(()) };
                    let (item, outcome) =
                        finished.map_err(|error| CliError::with_code(ExitCode::Software, error))?;
                    self.take(&item, outcome, &printer).await?;
                }
            })
            .await;
        self.unless_written(printer.finish().await)?;
        outcome?;
        self.finish(start.elapsed())
    }

    /// Writes, prints and counts one result. Only a failure that is not this prompt's own ends the batch.
    async fn take(
        &mut self,
        item: &Item,
        outcome: Result<Answer, CliError>,
        printer: &Printer,
    ) -> Result<(), CliError> {
        let outcome = match outcome {
            Err(error) if error.wire().is_none_or(|wire| wire.code.is_retryable()) => {
                return Err(error.hint("start the same batch again to go on where it stopped"));
            }
            Ok(answer) => Ok(answer),
            Err(error) => Err(error.message()),
        };
        let line = output::line(item, outcome.as_ref().map_err(String::as_str))?;
        if let Some(results) = &mut self.results {
            results.append(&line)?;
        }
        match &outcome {
            Ok(answer) => self.summary.add(answer),
            Err(message) => {
                self.summary.add_failure();
                let said = format!("prompt {} failed: {message}", item.index);
                self.bar.suspend(|| terminal::say(&said));
            }
        }
        self.bar.inc(1);
        let shown = match outcome {
            _ if self.as_json => line,
            Ok(answer) if !self.quiet || self.results.is_none() => {
                format!("[{}] {}\n{}\n\n", answer.index, answer.prompt, answer.text)
            }
            _ => return Ok(()),
        };
        self.unless_written(printer.put(shown).await)
    }

    /// A reader of stdout that went away ends a batch only if nothing else takes the results.
    fn unless_written(&self, printed: Result<(), CliError>) -> Result<(), CliError> {
        match printed {
            Err(error) if error.exit_code() == ExitCode::Ok && self.results.is_some() => Ok(()),
            printed => printed,
        }
    }

    /// Says what it came to.
    fn finish(self, total: Duration) -> Result<ExitCode, CliError> {
        if let Some(results) = &self.results {
            results.sync()?;
        }
        self.bar.finish_and_clear();
        if !self.quiet {
            terminal::say(&self.summary.show(total).to_string());
        }
        Ok(if self.summary.n_failed() > 0 { ExitCode::Failure } else { ExitCode::Ok })
    }
}
