//! `bitnetd submit`: durable jobs, one or many.

use std::path::PathBuf;

use bitnetd_proto::client::{Submission, Submitted};
use bitnetd_proto::durable::validate_durable;
use bitnetd_proto::error::WireError;
use bitnetd_proto::exit_code::ExitCode;
use clap::Args;
use serde::Serialize;

use crate::answer::json_line;
use crate::batch::input::{self, Format};
use crate::daemon::SocketArgs;
use crate::error::CliError;
use crate::request_args::{GenerationArgs, PromptArgs};
use crate::terminal;

/// `bitnetd submit`
#[derive(Debug, Args)]
#[command(after_help = "\
Prints the number of each job. When it is printed, the job is on disk: it will be done, also if the daemon, its workers or
the machine are killed. `bitnetd wait NUMBER` prints its answer.

With --id, submitting again what may have been submitted before doubles nothing: the same jobs come back.

Examples:
  bitnetd submit -p \"Once upon a time\" -n 64
  bitnetd wait $(bitnetd submit -p \"Once upon a time\")
  bitnetd submit prompts.jsonl --id monday                 one job for each line, as for `bitnetd batch`
  bitnetd submit - --format jsonl < prompts.jsonl")]
pub(crate) struct SubmitArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    /// File with many prompts, one a line (text or JSONL, as for `batch`); `-` is stdin
    #[arg(value_name = "FILE", group = "prompt_source")]
    many: Option<PathBuf>,
    /// How to read FILE; without it: jsonl if the name ends so, else txt
    #[arg(long, value_enum, value_name = "FORMAT", requires = "many")]
    format: Option<Format>,
    /// Your own name for the job (for those of a FILE: KEY/0, KEY/1 …); the same name is the same job
    #[arg(long = "id", value_name = "KEY")]
    key: Option<String>,
    /// Print one JSON object for each job
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Go before durable jobs with a lower number (-128 to 127)
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true,
        help_heading = "Daemon"
    )]
    priority: i8,
    #[command(flatten)]
    generation: GenerationArgs,
    #[command(flatten)]
    socket: SocketArgs,
}

/// What `--json` prints of a job.
#[derive(Debug, Serialize)]
struct Line {
    /// Number of the prompt, from 0.
    index: usize,
    job: u64,
    seed: u64,
    is_new: bool,
}

/// Runs the command.
pub(crate) fn main(args: &SubmitArgs) -> Result<ExitCode, CliError> {
    let submissions = submissions(args)?;
    let n_jobs = submissions.len();
    let mut client = args.socket.connect()?;
    let (mut n_submitted, mut failure) = (0_usize, None);
    client
        .submit_many(submissions, |index, outcome| {
            let printed = match outcome {
                Ok(submitted) => print(args, index, &submitted),
                Err(error) => Err(refusal(args, error, index, n_jobs)),
            };
            match printed {
                Ok(()) => n_submitted += 1,
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
            failure.is_none()
        })
        .map_err(|error| CliError::from(error).hint(again(args)))?;
    match failure {
        Some(error) if n_jobs > 1 => {
            Err(error.within(format!("{n_submitted} of {n_jobs} jobs are submitted")))
        }
        Some(error) => Err(error),
        None => Ok(ExitCode::Ok),
    }
}

fn submissions(args: &SubmitArgs) -> Result<Vec<Submission>, CliError> {
    let mut submissions = match &args.many {
        None => {
            let request = args.generation.request(args.prompt.read()?)?;
            vec![Submission { key: args.key.clone(), request }]
        }
        Some(path) => {
            let items = input::read_file(path, args.format, &args.generation)?;
            let key = |index: usize| args.key.as_ref().map(|key| format!("{key}/{index}"));
            items.into_iter().map(|item| Submission { key: key(item.index), request: item.request }).collect()
        }
    };
    for (index, submission) in submissions.iter_mut().enumerate() {
        if args.priority != 0 {
            submission.request.priority = args.priority;
        }
        validate_durable(&submission.request, submission.key.as_deref())
            .map_err(|error| within_many(args, CliError::from(error), index))?;
    }
    Ok(submissions)
}

fn print(args: &SubmitArgs, index: usize, submitted: &Submitted) -> Result<(), CliError> {
    let Submitted { job, seed, is_new } = *submitted;
    let shown = if args.json { json_line(&Line { index, job, seed, is_new })? } else { format!("{job}\n") };
    terminal::put(shown.as_bytes())
}

fn refusal(args: &SubmitArgs, error: WireError, index: usize, n_jobs: usize) -> CliError {
    let is_retryable = error.code.is_retryable();
    let error = within_many(args, CliError::from(error), index);
    if is_retryable && n_jobs > 1 { error.hint(again(args)) } else { error }
}

fn within_many(args: &SubmitArgs, error: CliError, index: usize) -> CliError {
    if args.many.is_some() { error.within(format!("prompt {index}")) } else { error }
}

fn again(args: &SubmitArgs) -> &'static str {
    if args.key.is_some() {
        "submit the same again with the same --id: nothing is doubled"
    } else {
        "`bitnetd jobs` shows what was submitted; with --id the same can be submitted again without doubling"
    }
}
