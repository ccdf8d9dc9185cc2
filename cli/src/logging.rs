//! Where log lines go: to stderr, coloured only on a terminal and without `NO_COLOR`.

use std::io::{self, IsTerminal as _};

use bitnetd_config::{LogConfig, LogFormat};
use bitnetd_proto::exit_code::ExitCode;
use clap::{ArgAction, Args};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::error::CliError;

/// How much is said, for every subcommand.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct LogArgs {
    /// Say more on stderr: -v lifecycle, -vv each request, -vvv everything
    #[arg(short, long, action = ArgAction::Count, global = true, conflicts_with = "quiet", help_heading = "Output")]
    pub verbose: u8,
    /// Say nothing on stderr but errors
    #[arg(short, long, global = true, help_heading = "Output")]
    pub quiet: bool,
}

/// Starts logging for a command that a person waits for: our own warnings, unless asked for more or less. What the
/// supervisor and the workers have to say comes back as the command's error then.
pub(crate) fn init(args: &LogArgs) {
    let filter = EnvFilter::default().add_directive(level(args, LevelFilter::WARN).into());
    let silent = ["bitnetd_supervisor=off", "bitnetd_worker=off"].into_iter().filter(|_| args.verbose == 0);
    let filter = silent.filter_map(|directive| directive.parse().ok()).fold(filter, EnvFilter::add_directive);
    install(filter, LogFormat::Text);
}

/// Starts logging in a worker, as its supervisor says.
pub(crate) fn init_worker(filter: &str) {
    // A supervisor of ours has checked it.
    install(EnvFilter::builder().parse_lossy(filter), LogFormat::Text);
}

/// What workers that this command starts are to say.
pub(crate) fn worker_filter(args: &LogArgs) -> String {
    if args.verbose == 0 { "off".to_owned() } else { level(args, LevelFilter::WARN).to_string() }
}

/// Starts logging for the daemon: as the configuration says, unless a flag asks for more or less.
pub(crate) fn init_daemon(args: &LogArgs, config: &LogConfig) -> Result<(), CliError> {
    let filter = if args.quiet || args.verbose > 0 {
        EnvFilter::default().add_directive(level(args, LevelFilter::INFO).into())
    } else {
        EnvFilter::builder()
            .parse(&config.level)
            .map_err(|error| CliError::with_code(ExitCode::Config, error))?
    };
    install(filter, config.format);
    Ok(())
}

fn level(args: &LogArgs, usual: LevelFilter) -> LevelFilter {
    match (args.quiet, args.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => usual,
        (false, 1) => LevelFilter::INFO.max(usual),
        (false, 2) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    }
}

fn install(filter: EnvFilter, format: LogFormat) {
    let builder = tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(filter);
    match format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text if io::stderr().is_terminal() => builder.init(), // Honours NO_COLOR.
        LogFormat::Text => builder.with_ansi(false).init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_only_move_the_level_their_way() {
        let with = |verbose, quiet| LogArgs { verbose, quiet };
        assert_eq!(level(&with(0, false), LevelFilter::WARN), LevelFilter::WARN);
        assert_eq!(level(&with(1, false), LevelFilter::WARN), LevelFilter::INFO);
        assert_eq!(level(&with(1, false), LevelFilter::DEBUG), LevelFilter::DEBUG);
        assert_eq!(level(&with(9, false), LevelFilter::WARN), LevelFilter::TRACE);
        assert_eq!(level(&with(0, true), LevelFilter::INFO), LevelFilter::ERROR);
    }
}
