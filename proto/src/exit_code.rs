//! Exit codes of every bitnetd process, from `sysexits.h` where it has one.

use serde::{Deserialize, Serialize};

/// Why a process ended. Supervisors (ours and systemd) decide by it whether to restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum ExitCode {
    /// Everything asked for was done; a daemon drained.
    Ok = 0,
    /// The work was understood and failed (a job failed, a service is degraded).
    Failure = 1,
    /// The command line is wrong (`EX_USAGE`); do not restart.
    Usage = 64,
    /// Input data is wrong: a model file that is cut, foreign or lying (`EX_DATAERR`); do not restart.
    Data = 65,
    /// A named input does not exist or cannot be read (`EX_NOINPUT`); do not restart.
    NoInput = 66,
    /// The daemon is not there or refuses (`EX_UNAVAILABLE`).
    Unavailable = 69,
    /// A bug in bitnetd (`EX_SOFTWARE`).
    Software = 70,
    /// The operating system refused something, such as a thread or memory (`EX_OSERR`).
    Os = 71,
    /// Try again later: overloaded, or a socket is in use (`EX_TEMPFAIL`).
    Temporary = 75,
    /// Permission denied (`EX_NOPERM`).
    Permission = 77,
    /// The configuration is wrong (`EX_CONFIG`); do not restart.
    Config = 78,
    /// Stopped by SIGINT at the user's wish (128 + 2).
    Interrupted = 130,
}

impl ExitCode {
    /// Every code, for tables in help and tests.
    pub const ALL: [ExitCode; 12] = [
        Self::Ok,
        Self::Failure,
        Self::Usage,
        Self::Data,
        Self::NoInput,
        Self::Unavailable,
        Self::Software,
        Self::Os,
        Self::Temporary,
        Self::Permission,
        Self::Config,
        Self::Interrupted,
    ];

    /// The code a process exited with, if it is one of ours.
    #[must_use]
    pub fn from_raw(raw: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|code| i32::from(*code as u8) == raw)
    }

    /// True if starting the same thing again cannot help.
    #[must_use]
    pub fn is_permanent(self) -> bool {
        matches!(self, Self::Usage | Self::Data | Self::NoInput | Self::Permission | Self::Config)
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}
