//! Where log lines go: to stderr, coloured only on a terminal and without `NO_COLOR`, or to the journal.

use std::io::{self, IsTerminal as _};

use bitnetd_config::{LogConfig, LogFormat, ServiceManager};
use bitnetd_proto::exit_code::ExitCode;
use clap::{ArgAction, Args};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, reload};

use crate::error::CliError;
use crate::journald::JournalLayer;

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
    // Last words of a runtime that panics are no log.
    let silent = ["bitnetd_supervisor=off", "bitnetd_worker=off", "bitnetd_worker::stderr=warn"];
    let silent = silent.into_iter().filter(|_| args.verbose == 0);
    let filter = silent.filter_map(|directive| directive.parse().ok()).fold(filter, EnvFilter::add_directive);
    install(filter, Form::Text);
}

/// Starts logging in a worker, as its supervisor says, and in the form that it reads. It knows the time.
pub(crate) fn init_worker(filter: &str) {
    // A supervisor of ours has checked the filter.
    let filter = EnvFilter::builder().parse_lossy(filter);
    tracing_subscriber::fmt().with_writer(io::stderr).json().without_time().with_env_filter(filter).init();
}

/// What workers that this command starts are to say.
pub(crate) fn worker_filter(args: &LogArgs) -> String {
    if args.verbose == 0 { "off".to_owned() } else { level(args, LevelFilter::WARN).to_string() }
}

/// Starts logging for the daemon: as the configuration says, unless a flag asks for more or less.
pub(crate) fn init_daemon(
    args: &LogArgs,
    config: &LogConfig,
    manager: &ServiceManager,
) -> Result<LevelHandle, CliError> {
    let is_fixed = args.quiet || args.verbose > 0;
    let filter = if is_fixed {
        EnvFilter::default().add_directive(level(args, LevelFilter::INFO).into())
    } else {
        EnvFilter::builder()
            .parse(&config.level)
            .map_err(|error| CliError::with_code(ExitCode::Config, error))?
    };
    let is_journal = match config.format {
        LogFormat::Auto => manager.is_stderr_the_journal(),
        format => format == LogFormat::Journald,
    };
    let journal = is_journal.then(|| JournalLayer::connect(&config.journal_socket));
    let (form, error) = match (journal, config.format) {
        (Some(Ok(journal)), _) => (Form::Journal(journal), None),
        (Some(Err(error)), _) => (Form::Text, Some(error)),
        (None, LogFormat::Json) => (Form::Json, None),
        (None, _) => (Form::Text, None),
    };
    let handle = install(filter, form);
    if let Some(error) = error {
        let socket = config.journal_socket.display();
        tracing::warn!(%socket, %error, "the journal does not listen: the log is text on stderr");
    }
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

/// How and where events are written.
enum Form {
    Text,
    Json,
    Journal(JournalLayer),
}

fn install(filter: EnvFilter, form: Form) -> LevelHandle {
    let builder = tracing_subscriber::fmt().with_writer(io::stderr);
    let change: ChangeFilter = match form {
        Form::Journal(journal) => {
            let (filter, handle) = reload::Layer::new(filter);
            tracing_subscriber::registry().with(filter).with(journal).init();
            Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string()))
        }
        Form::Json => {
            let builder = builder.json().with_env_filter(filter).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string()))
        }
        Form::Text => {
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
