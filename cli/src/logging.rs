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
pub(crate) fn init_daemon(args: &LogArgs, config: &LogConfig) -> Result<LevelHandle, CliError> {
    let is_fixed = args.quiet || args.verbose > 0;
    let filter = if is_fixed {
        EnvFilter::default().add_directive(level(args, LevelFilter::INFO).into())
    } else {
        EnvFilter::builder()
            .parse(&config.level)
            .map_err(|error| CliError::with_code(ExitCode::Config, error))?
    };
    let handle = install(filter, config.format);
    Ok(if is_fixed { LevelHandle(None) } else { handle })
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

/// Puts another filter in place.
type ChangeFilter = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

/// Changes how much is said while the daemon runs.
pub(crate) struct LevelHandle(Option<ChangeFilter>);

impl LevelHandle {
    /// Takes the level of a new configuration over, unless a flag has fixed it.
    pub(crate) fn set(&self, level: &str) {
        let Some(change) = &self.0 else { return };
        let parsed = EnvFilter::builder().parse(level).map_err(|error| error.to_string());
        if let Err(error) = parsed.and_then(change) {
            tracing::error!(level, error, "the log keeps its level");
        }
    }
}

fn install(filter: EnvFilter, format: LogFormat) -> LevelHandle {
    let builder = tracing_subscriber::fmt().with_writer(io::stderr);
    let change: ChangeFilter = match format {
        LogFormat::Json => {
            let builder = builder.json().with_env_filter(filter).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string()))
        }
        LogFormat::Text => {
            // On a terminal the builder itself honours NO_COLOR.
            let builder = if io::stderr().is_terminal() { builder } else { builder.with_ansi(false) };
            let builder = builder.with_env_filter(filter).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string()))
        }
    };
    LevelHandle(Some(change))
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
