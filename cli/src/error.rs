//! How a subcommand fails: a text, perhaps a next step, and the exit code. Every mapping to a code is here.
//!
//! Printed as `error: what: because`, then `hint: next step`; that layout is stable, tests hold it.

use std::fmt::Display;
use std::io;
use std::path::Path;

use bitnetd_config::LoadError;
use bitnetd_placement::PlanError;
use bitnetd_proto::client::ClientError;
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_supervisor::{ActivationError, JournalError, ListenError, ScrapeError, StartError};

use crate::terminal;

/// An error and its causes in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A failure on its way to `main`.
#[derive(Debug)]
pub(crate) struct CliError {
    code: ExitCode,
    error: anyhow::Error,
    hint: Option<String>,
}

impl CliError {
    /// A failure with a code and a text of its own.
    pub(crate) fn new(code: ExitCode, message: impl Display) -> Self {
        Self { code, error: anyhow::anyhow!("{message}"), hint: None }
    }

    /// The command line asks for something that cannot be.
    pub(crate) fn usage(message: impl Display) -> Self {
        Self::new(ExitCode::Usage, message)
    }

    /// A library's error with the code that it means.
    pub(crate) fn with_code(code: ExitCode, error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self { code, error: anyhow::Error::new(error), hint: None }
    }

    /// A file could not be opened, read or written. `action` is a verb phrase such as `read`.
    pub(crate) fn file(action: &str, path: &Path, source: io::Error) -> Self {
        let code = match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::IsADirectory => ExitCode::NoInput,
            io::ErrorKind::PermissionDenied => ExitCode::Permission,
            io::ErrorKind::InvalidData => ExitCode::Data,
            _ => ExitCode::Os,
        };
        let error = anyhow::Error::new(source).context(format!("cannot {action} `{}`", path.display()));
        Self { code, error, hint: None }
    }

    /// The operating system refused something that is not a file.
    pub(crate) fn os(action: &str, source: io::Error) -> Self {
        Self {
            code: ExitCode::Os,
            error: anyhow::Error::new(source).context(format!("cannot {action}")),
            hint: None,
        }
    }

    /// Whoever read our stdout went away (`| head`): nothing is wrong, there is only nothing left to do.
    pub(crate) fn reader_gone() -> Self {
        Self::new(ExitCode::Ok, "the reader of stdout went away")
    }

    /// The user pressed Ctrl-C.
    pub(crate) fn interrupted() -> Self {
        Self::new(ExitCode::Interrupted, "interrupted")
    }

    /// The same failure with a next step, unless it has one.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The same failure, said to be in some place such as a line of a file.
    pub(crate) fn within(self, place: impl Display + Send + Sync + 'static) -> Self {
        Self { error: self.error.context(place), ..self }
    }

    /// The same failure with another code.
    pub(crate) fn with_exit_code(self, code: ExitCode) -> Self {
        Self { code, ..self }
    }

    /// What a peer said, if it was one that failed.
    pub(crate) fn wire(&self) -> Option<&WireError> {
        self.error.downcast_ref()
    }

    /// What is wrong and why, in one line, without the hint.
    pub(crate) fn message(&self) -> String {
        format!("{:#}", self.error)
    }

    /// The same for a client of ours: what a peer said, else the reasons in one line.
    pub(crate) fn to_wire(&self) -> WireError {
        let own = || WireError::new(ErrorCode::InvalidRequest, self.message());
        let error = self.wire().cloned().unwrap_or_else(own);
        match &self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }

    /// The code to exit with.
    pub(crate) fn exit_code(&self) -> ExitCode {
        self.code
    }

    /// Says it on stderr. A reader that went away and Ctrl-C need no words.
    pub(crate) fn print(&self) {
        if matches!(self.code, ExitCode::Ok | ExitCode::Interrupted) {
            return;
        }
        terminal::say(&self.to_string());
    }
}

impl From<ActivationError> for CliError {
    fn from(error: ActivationError) -> Self {
        let hint = error.hint();
        Self::with_code(error.exit_code(), error).hint(hint)
    }
}

impl Display for CliError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "error: {}", self.message())?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<WireError> for CliError {
    fn from(error: WireError) -> Self {
        let code = match error.code {
            ErrorCode::InvalidRequest => ExitCode::Usage,
            ErrorCode::EmptyPrompt | ErrorCode::ContextExceeded => ExitCode::Data,
            ErrorCode::PermissionDenied => ExitCode::Permission,
            ErrorCode::Overloaded | ErrorCode::Draining => ExitCode::Temporary,
            ErrorCode::JournalUnavailable => ExitCode::Os,
            ErrorCode::UnsupportedVersion | ErrorCode::Degraded => ExitCode::Unavailable,
            ErrorCode::Internal | ErrorCode::BadMessage | ErrorCode::FrameTooLarge => ExitCode::Software,
            ErrorCode::NotFound
            | ErrorCode::DeadlineExceeded
            | ErrorCode::Poisoned
            | ErrorCode::Cancelled => ExitCode::Failure,
        };
        let hint = error.hint.clone(); // Printed as ours.
        Self { code, error: anyhow::Error::new(error), hint }
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let code = match &error {
            ClientError::Refused(wire) => return wire.clone().into(),
            ClientError::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ExitCode::Permission
            }
            ClientError::Connect { .. } | ClientError::Link(_) | ClientError::Closed => ExitCode::Unavailable,
            ClientError::Unexpected(_) => ExitCode::Software,
        };
        Self::with_code(code, error)
    }
}

impl From<StartError> for CliError {
    fn from(error: StartError) -> Self {
        let hint = match &error {
            StartError::Worker { error, .. } => error.hint.clone(),
            StartError::Model(_) => {
                Some("-m takes a GGUF file; without it the built-in model runs".to_owned())
            }
            StartError::NoWorkers | StartError::Stopped => None,
        };
        Self { hint, ..Self::with_code(error.exit_code(), error) }
    }
}

impl From<JournalError> for CliError {
    fn from(error: JournalError) -> Self {
        let hint = error.hint();
        Self::with_code(error.exit_code(), error).hint(hint)
    }
}

impl From<ListenError> for CliError {
    fn from(error: ListenError) -> Self {
        let hint = error.hint();
        Self::with_code(error.exit_code(), error).hint(hint)
    }
}

impl From<ScrapeError> for CliError {
    fn from(error: ScrapeError) -> Self {
        match error {
            ScrapeError::Unix(error) => error.into(),
            ScrapeError::Tcp { ref source, .. } => {
                let code = match source.kind() {
                    io::ErrorKind::AddrInUse => ExitCode::Temporary,
                    io::ErrorKind::PermissionDenied => ExitCode::Permission,
                    _ => ExitCode::Config,
                };
                Self::with_code(code, error).hint("choose another `listen.metrics`")
            }
        }
    }
}

impl From<PlanError> for CliError {
    fn from(error: PlanError) -> Self {
        Self::with_code(ExitCode::Config, error)
            .hint("`bitnetd topology` shows the CPUs and why each can be used")
    }
}

impl From<LoadError> for CliError {
    fn from(error: LoadError) -> Self {
        let code = match &error {
            LoadError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => ExitCode::NoInput,
            LoadError::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ExitCode::Permission
            }
            LoadError::Read { .. }
            | LoadError::TooLarge { .. }
            | LoadError::NotUtf8 { .. }
            | LoadError::Invalid(_) => ExitCode::Config,
        };
        Self::with_code(code, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_names_it_the_reason_and_the_next_step() {
        let error = CliError::file("read", Path::new("a.gguf"), io::Error::from(io::ErrorKind::NotFound))
            .hint("look again");
        assert_eq!(error.exit_code(), ExitCode::NoInput);
        assert_eq!(error.to_string(), "error: cannot read `a.gguf`: entity not found\nhint: look again");
    }

    #[test]
    fn the_hint_of_a_peer_is_kept() {
        let wire = WireError::new(ErrorCode::Overloaded, "the queue is full (512 jobs)").with_hint("wait");
        let error = CliError::from(wire).hint("another");
        assert_eq!(error.exit_code(), ExitCode::Temporary);
        assert_eq!(error.to_string(), "error: the queue is full (512 jobs)\nhint: wait");
    }
}
