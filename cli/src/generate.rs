//! `bitnetd generate`: one answer from the daemon, streamed to stdout.

use bitnetd_proto::exit_code::ExitCode;
use clap::Args;

use crate::answer::{self, Collector};
use crate::daemon::{DaemonJob, SocketArgs};
use crate::error::CliError;
use crate::request_args::{GenerationArgs, PromptArgs};
use crate::runtime;

/// `bitnetd generate`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnetd generate -p \"Once upon a time\"
  bitnetd generate -p \"Once upon a time\" --temp 0.8 --seed 7 --json | jq .text
  bitnetd generate -f - < prompt.txt > answer.txt")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    /// Print one JSON object at the end instead of the text as it comes
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Go before jobs with a lower number (-128 to 127)
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

/// Runs the command.
pub(crate) fn main(args: &GenerateArgs) -> Result<ExitCode, CliError> {
    let prompt = args.prompt.read()?;
    let mut request = args.generation.request(prompt.clone())?;
    request.priority = args.priority;
    let collector = Collector::new(0, prompt, request.logprobs.is_some());
    let socket = args.socket.find()?;
    runtime::block_on(runtime::unless_interrupted(async {
        let mut job = DaemonJob::start(socket, request)?;
        answer::print(&mut job, collector, args.json).await?;
        Ok(ExitCode::Ok)
    }))
}
