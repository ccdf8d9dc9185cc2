//! The `bitnetd` binary: parses the command line, runs one subcommand, turns its outcome into an exit code.
//!
//! The only crate that prints: data goes to stdout, talk to stderr. A subcommand is one module with an `Args`
//! struct and a `main`; to add one, add the module, a variant of [`Command`] and a line in [`dispatch`].

#![forbid(unsafe_code)]

mod answer; // One answer as it arrives.
mod batch; // Many answers.
mod bench; // How fast, and how near to the machine's limit.
mod config_cmd; // `config check|show`.
mod control; // `status`, `metrics`, `drain`, `restart`, `reload`.
mod daemon; // A running daemon, through its socket.
mod error; // Outcome -> message, hint and exit code, in one place.
mod generate;
mod jobs; // `jobs`, `wait`, `result`, `cancel`.
mod journald; // The journal, in its own protocol.
mod local; // A service in this process.
mod logging;
mod manual; // `completions` and `man`.
mod model; // `model info|verify|convert|synth`.
mod picture; // Pictures and other files, written whole.
mod reload; // What SIGHUP and `reload` do to the daemon.
mod request_args; // The flags that say what to generate.
mod run;
mod runtime; // The event loop, and Ctrl-C.
mod serve;
mod stats; // What the cores did meanwhile, for `run` and `batch`.
mod submit;
mod terminal; // Everything that is written to stdout and stderr.
mod top; // The daemon at work, on the whole screen.
mod topology; // `topology`: the machine and the plan.
mod tune; // Which split is best.

use bitnetd_proto::exit_code::ExitCode;
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::error::CliError;

fn main() -> std::process::ExitCode {
    let code = match Cli::try_parse() {
        Ok(cli) => match dispatch(cli) {
            Ok(code) => code,
            Err(error) => {
                error.print();
                error.exit_code()
            }
        },
        Err(error) => {
            let is_answer = !error.use_stderr(); // `--help` and `--version` arrive as errors, too.
            terminal::ignore_closed(error.print());
            if is_answer { ExitCode::Ok } else { ExitCode::Usage }
        }
    };
    code.into()
}

/// Runs BitNet (ternary, 1.58-bit) language models on every core of a machine.
#[derive(Debug, Parser)]
#[command(name = "bitnetd", version, about, long_about = None, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    log: logging::LogArgs,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  bitnetd run -p \"Once upon a time\"               a story; no model and no set-up needed
  bitnetd run -m model.gguf --chat -p \"Hello\"     your own model
  bitnetd batch prompts.txt -o answers.jsonl      many prompts
  bitnetd serve &                                 the daemon; then:
  bitnetd generate -p \"Once upon a time\"
  bitnetd submit -p \"Once upon a time\"            a job that survives everything; then:
  bitnetd wait 1
  bitnetd status
`bitnetd COMMAND --help` says more.

Exit codes: 0 ok, 1 failed, 64 wrong command line, 65 bad data, 66 no such input, 69 no daemon,
70 bug, 71 operating system, 75 try again later, 77 not permitted, 78 bad configuration,
130 interrupted.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Get one answer with every core, streamed to stdout; needs no daemon and no model file
    Run(Box<run::RunArgs>),
    /// Answer many prompts, several at a time; goes on where it stopped
    Batch(Box<batch::BatchArgs>),
    /// Run the daemon: workers, their supervisor, and a socket for clients
    Serve(serve::ServeArgs),
    /// Get one answer from the daemon, streamed to stdout
    Generate(Box<generate::GenerateArgs>),
    /// Give the daemon jobs that survive everything; prints their numbers
    Submit(Box<submit::SubmitArgs>),
    /// List durable jobs, the newest first
    Jobs(jobs::JobsArgs),
    /// Wait until durable jobs have ended, and print their answers
    Wait(jobs::WaitArgs),
    /// Print the answer of a durable job
    Result(jobs::ResultArgs),
    /// Give durable jobs up
    Cancel(jobs::CancelArgs),
    /// Show how the daemon is: health, model, workers, counters
    Status(control::StatusArgs),
    /// Watch the daemon at work: cores, workers, jobs, on the whole screen
    Top(top::TopArgs),
    /// Print what the daemon has counted and measured, as Prometheus reads it
    Metrics(control::MetricsArgs),
    /// Let the daemon finish what it has accepted, then end
    Drain(control::DrainArgs),
    /// Replace the worker process of one slot; its jobs go on elsewhere
    Restart(control::RestartArgs),
    /// Let the daemon read its configuration again; it changes over without losing a job, or stays as it is
    Reload(control::ReloadArgs),
    /// Look at model files, check them, make them
    Model(model::ModelArgs),
    /// What the supervisor starts; not for people
    #[command(hide = true)]
    Worker {
        /// Filter of its log
        #[arg(long, default_value = "warn")]
        log_filter: String,
        /// For tests: the step loop never returns from the step in which it has generated so many tokens
        #[arg(long, value_name = "TOKENS")]
        hang_after: Option<u64>,
    },
    /// Show the machine, which worker gets what of it, and why
    Topology(topology::TopologyArgs),
    /// Measure how fast this machine answers, and how near that is to its limit
    Bench(bench::BenchArgs),
    /// Measure which split of the CPUs is best, and write it down
    Tune(tune::TuneArgs),
    /// Check the configuration, or print the effective one
    Config(config_cmd::ConfigArgs),
    /// Print a completion script for a shell
    Completions(manual::CompletionsArgs),
    /// Print the manual page (troff), or write one page for each subcommand to a folder
    Man(manual::ManArgs),
}

fn dispatch(cli: Cli) -> Result<ExitCode, CliError> {
    match &cli.command {
        Command::Serve(_) => {} // Its configuration has a say.
        Command::Worker { log_filter, .. } => logging::init_worker(log_filter),
        _ => logging::init(&cli.log),
    }
    match cli.command {
        Command::Run(args) => run::main(&args, &cli.log),
        Command::Batch(args) => batch::main(&args, &cli.log),
        Command::Serve(args) => serve::main(&args, &cli.log),
        Command::Generate(args) => generate::main(&args),
        Command::Submit(args) => submit::main(&args),
        Command::Jobs(args) => jobs::jobs(&args),
        Command::Wait(args) => jobs::wait(&args),
        Command::Result(args) => jobs::result(&args),
        Command::Cancel(args) => jobs::cancel(&args),
        Command::Status(args) => control::status(&args),
        Command::Top(args) => top::main(&args),
        Command::Metrics(args) => control::metrics(&args),
        Command::Drain(args) => control::drain(&args),
        Command::Restart(args) => control::restart(&args),
        Command::Reload(args) => control::reload(&args),
        Command::Worker { hang_after, .. } => Ok(bitnetd_worker::run(hang_after)),
        Command::Topology(args) => topology::main(&args),
        Command::Bench(args) => bench::main(&args, &cli.log),
        Command::Tune(args) => tune::main(&args, &cli.log),
        Command::Config(args) => config_cmd::main(&args),
        Command::Completions(args) => manual::completions(&args, Cli::command()),
        Command::Man(args) => manual::man(&args, Cli::command()),
        Command::Model(args) => model::main(&args, &cli.log),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_definition_is_sound() {
        Cli::command().debug_assert();
    }
}
