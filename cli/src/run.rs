//! `bitnetd run`: one answer with every core, streamed to stdout. Needs no daemon, and no model file.

use std::io::IsTerminal as _;

use bitnetd_config::{Config, QueueConfig};
use bitnetd_proto::exit_code::ExitCode;
use clap::Args;
use serde::Serialize;

use crate::answer::{self, Answer, Collector};
use crate::error::CliError;
use crate::local::{self, Local, LocalJob, ModelArgs};
use crate::logging::{self, LogArgs};
use crate::request_args::{GenerationArgs, PromptArgs};
use crate::runtime;
use crate::stats::{Baseline, Stats};
use crate::terminal;

/// `bitnetd run`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnetd run -p \"Once upon a time\"                     a story from the built-in model
  bitnetd run -p \"Once upon a time\" --temp 0.8 -s 7     another one; seed 7 always gives it
  bitnetd run -m model.gguf --chat -p \"Who are you?\"    a chat model
  bitnetd run -m model.gguf -f prompt.txt -n 512 --json | jq .text
  bitnetd run -m model.gguf -f - -q < prompt.txt > answer.txt")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    /// Print one JSON object at the end instead of the text as it comes
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Say at the end what each core and thread did (on stderr; with --json as `stats`)
    #[arg(long, help_heading = "Output")]
    stats: bool,
    #[command(flatten)]
    generation: GenerationArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// Compute threads, one pinned to each CPU; without it, every usable CPU gets one
    #[arg(short, long, value_name = "N", value_parser = parse_count, help_heading = "Model")]
    threads: Option<usize>,
}

/// A number of workers or threads.
pub(crate) fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(count @ 1..=8192) => Ok(count),
        _ => Err("expected a number from 1 to 8192".to_owned()),
    }
}

/// Runs the command.
pub(crate) fn main(args: &RunArgs, log: &LogArgs) -> Result<ExitCode, CliError> {
    let prompt = args.prompt.read()?;
    let request = args.generation.request(prompt.clone())?;
    let collector = Collector::new(0, prompt.clone(), request.logprobs.is_some());
    let mut config = Config {
        split: local::one_worker(args.threads),
        queue: QueueConfig { max_jobs: 1, max_per_client: 1, ..QueueConfig::default() },
        ..Config::default()
    };
    config.engine.max_batch = 1;
    config.log.level = logging::worker_filter(log);
    args.model.apply(&mut config)?;
    runtime::block_on(Local::with(config, async |local| {
        if !log.quiet && !args.json && !args.generation.is_chat() && is_seen_by_a_person() {
            terminal::echo_prompt(&prompt);
        }
        let baseline = if args.stats { Some(Baseline::take(&local).await) } else { None };
        let mut job = local.start(request).await?;
        let answer = if let Some(baseline) = baseline {
            with_stats(&local, baseline, &mut job, collector, args.json).await?
        } else {
            answer::print(&mut job, collector, args.json).await?
        };
        if !log.quiet {
            terminal::say(&closing_line(&local, &answer));
        }
        Ok(ExitCode::Ok)
    }))
}

/// The answer with `--json` and what the cores did, in one object.
#[derive(Debug, Serialize)]
struct AnswerWithStats<'a> {
    #[serde(flatten)]
    answer: &'a Answer,
    stats: &'a Stats,
}

/// Prints the answer, and what the cores did for it.
async fn with_stats(
    local: &Local,
    baseline: Baseline,
    job: &mut LocalJob,
    collector: Collector,
    as_json: bool,
) -> Result<Answer, CliError> {
    if !as_json {
        let answer = answer::print(job, collector, false).await?;
        terminal::say(&baseline.finish(local).await.table());
        return Ok(answer);
    }
    let answer = collector.collect(job, async |_| Ok(())).await?;
    let stats = &baseline.finish(local).await;
    terminal::put(answer::json_line(&AnswerWithStats { answer: &answer, stats })?.as_bytes())?;
    Ok(answer)
}

/// Whether text and talk meet on one screen.
fn is_seen_by_a_person() -> bool {
    std::io::stdout().is_terminal() && std::io::stderr().is_terminal()
}

fn closing_line(local: &Local, answer: &Answer) -> String {
    let rate = |rate: Option<f64>| rate.map_or_else(String::new, |rate| format!(" ({rate:.1}/s)"));
    format!(
        "[{}; prompt {} tokens{}, answer {} tokens{}, first after {:.2} s; seed {}]",
        local.describe(),
        answer.prompt_tokens,
        rate(answer.prefill_rate()),
        answer.tokens,
        rate(answer.decode_rate()),
        answer.ttft_seconds,
        answer.seed
    )
}
