//! `bitnetd bench`: how fast this machine answers, by threads and by sequences together, and how near that is to
//! what the machine can do at all.
//!
//! Everything is measured through the same supervisor and workers that serve, from outside: what a client gets. The
//! bounds are measured beside it, by programs that only read or only multiply.

pub(crate) mod bounds; // What the machine can do at best.
mod measure; // One set-up after the other.
mod plot; // The result as a picture.
mod table; // The result as text.

use std::path::PathBuf;

use bitnetd_config::{Choice as _, Config, HeadChoice, QueueConfig, SplitConfig};
use bitnetd_proto::exit_code::ExitCode;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use serde::Serialize;

use crate::answer::json_line;
use crate::error::CliError;
use crate::local::{self, ModelArgs};
use crate::logging::{self, LogArgs};
use crate::run::parse_count;
use crate::{picture, runtime, terminal};
use bounds::Bounds;
use measure::Setup;

/// `bitnetd bench`
#[derive(Debug, Args)]
#[command(after_help = "\
Prompts are random tokens; speculation is off unless --speculation says otherwise. Rates are medians. A bound is what the machine can do at
most: prompts are bound by multiplying, one answer by reading the weights once for each token, several answers
together by whichever takes longer. Let nothing else run meanwhile.

Examples:
  bitnetd bench --quick                     the built-in model, a few seconds (it fits in the caches: reading is no bound)
  bitnetd bench -m model.gguf               every number of threads, 1 to 8 answers together
  bitnetd bench -m model.gguf -t 1,2 --sequences 1,8 --json
  bitnetd bench -m model.gguf --plot bench.svg")]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Type of the output head, as `model.head` in the configuration
    #[arg(long, value_name = "HEAD", help_heading = "Model", value_parser = heads())]
    head: Option<HeadChoice>,
    /// Numbers of compute threads; without it 1, 2, 4 … and every usable CPU
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', value_parser = parse_count)]
    threads: Vec<usize>,
    /// Numbers of answers generated together
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = parse_count, default_values_t = [1, 2, 4, 8])]
    sequences: Vec<usize>,
    /// Tokens of the prompt whose reading is measured
    #[arg(short, long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    prompt_tokens: u32,
    /// Tokens of each answer
    #[arg(short = 'n', long = "n-predict", value_name = "TOKENS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(4..=4096))]
    n_predict: u32,
    /// How often each is measured; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    repeat: u16,
    /// Once each, with prompts of 128 and answers of 16 tokens
    #[arg(long, conflicts_with_all = ["prompt_tokens", "n_predict", "repeat"])]
    quick: bool,
    /// Print one JSON object
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Draw the rates and their bounds into a file, too: SVG or PNG by its name
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    plot: Option<PathBuf>,
}

/// Reads `--head`.
pub(crate) fn heads() -> impl clap::builder::TypedValueParser<Value = HeadChoice> {
    PossibleValuesParser::new(HeadChoice::CHOICES.iter().map(|(name, _)| *name))
        .map(|name| HeadChoice::from_name(&name).unwrap_or_default())
}

/// Everything that was measured; what `--json` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The program and its version.
    program: &'static str,
    /// Name of the model.
    model: String,
    /// Type of its head.
    head: String,
    /// Instruction set.
    isa: String,
    /// Bytes of weights that a step reads which generates: with the first number of answers together.
    step_bytes: u64,
    /// Multiplications of a prompt token, in the layers.
    token_macs: u64,
    /// Multiplications of the head for a generated token.
    head_macs: u64,
    /// Tokens of the measured prompt.
    prompt_tokens: u32,
    /// Tokens of each measured answer.
    answer_tokens: u32,
    /// How often each was measured.
    repeats: u16,
    /// What the machine can do at best, by threads.
    bounds: Vec<Bounds>,
    /// Reading a prompt.
    prefill: Vec<Rate>,
    /// Generating.
    decode: Vec<Rate>,
}

/// One rate beside its bound.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Rate {
    /// Compute threads.
    threads: usize,
    /// Sequences together.
    sequences: usize,
    /// In all, median.
    tokens_per_s: f64,
    /// What was measured, in the order it was.
    runs: Vec<f64>,
    /// What the machine could do at most.
    bound_tokens_per_s: f64,
    /// What the bound comes from.
    bound_by: BoundBy,
    /// The one divided by the other.
    share_of_bound: f64,
}

/// What limits a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BoundBy {
    /// Bytes of weights.
    Reading,
    /// Integer multiplications.
    Multiplying,
}

/// Runs `bitnetd bench`.
pub(crate) fn main(args: &BenchArgs, log: &LogArgs) -> Result<ExitCode, CliError> {
    if let Some(path) = &args.plot {
        picture::check_name(path)?;
    }
    let threads = threads(args)?;
    let setup = Setup {
        sequences: args.sequences.clone(),
        prompt_tokens: if args.quick { 128 } else { args.prompt_tokens },
        answer_tokens: if args.quick { 16 } else { args.n_predict },
        repeats: if args.quick { 1 } else { args.repeat },
    };
    let mut report = None;
    for threads in threads {
        let config = config(args, log, threads, &setup)?;
        let place = local::plan(&config)?;
        let cpus = place.workers.first().map(|worker| worker.cpus.clone()).unwrap_or_default();
        let isa = config.engine.isa.clone();
        let bounds = || bounds::measure(&isa, &cpus);
        let note = |what: &str| say(log, &format!("{threads} threads: {what} …"));
        runtime::block_on(measure::run(config, bounds, &setup, &mut report, note))?;
    }
    let report = report.ok_or_else(|| CliError::usage("there is nothing to measure"))?;
    if let Some(path) = &args.plot {
        picture::write(path, &plot::draw(&report)?)?;
    }
    let text = if args.json { json_line(&report)? } else { table::text(&report) };
    terminal::put(text.as_bytes())?;
    Ok(ExitCode::Ok)
}

fn say(log: &LogArgs, line: &str) {
    if !log.quiet {
        terminal::say(line);
    }
}

/// The numbers of threads to measure with.
fn threads(args: &BenchArgs) -> Result<Vec<usize>, CliError> {
    if !args.threads.is_empty() {
        return Ok(args.threads.clone());
    }
    let all = local::plan(&Config { split: local::one_worker(None), ..Config::default() })?;
    let n_cpus = all.workers.first().map_or(1, |worker| worker.cpus.len());
    let mut threads: Vec<usize> =
        std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|n| *n < n_cpus).collect();
    threads.push(n_cpus);
    Ok(threads)
}

/// One worker with so many threads, and room for what is measured.
fn config(args: &BenchArgs, log: &LogArgs, threads: usize, setup: &Setup) -> Result<Config, CliError> {
    let most = setup.sequences.iter().copied().max().unwrap_or(1);
    let most = u32::try_from(most).map_err(|error| CliError::usage(format!("--sequences: {error}")))?;
    let mut config = Config {
        split: SplitConfig::Counts { workers: 1, threads },
        queue: QueueConfig { max_jobs: most, max_per_client: most, ..QueueConfig::default() },
        ..Config::default()
    };
    config.engine.speculation = "off".into(); // Unless it is asked for: text that repeats itself is no measure.
    args.model.apply(&mut config)?;
    config.engine.max_batch = most;
    config.model.head = args.head.unwrap_or_default();
    config.log.level = logging::worker_filter(log);
    Ok(config)
}
