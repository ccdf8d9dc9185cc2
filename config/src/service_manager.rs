//! What the service manager (systemd) says to this process in its environment: where to report, how often, which open
//! files came along, and whether its journal listens to stderr.
//!
//! `sd-notify` knows the variables; this is the only place that asks it to read them.

use std::ffi::OsString;
use std::time::Duration;

use nix::sys::stat::fstat;

/// The variables that are meant for this process and not for its children.
pub const SERVICE_MANAGER_VARIABLES: [&str; 9] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDNAMES",
    "FDSTORE",
    "JOURNAL_STREAM",
];

/// An open file that came with the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InheritedFd {
    /// Its number.
    pub number: i32,
    /// The name that the unit (`FileDescriptorName=`) or an earlier process (`FDNAME=`) gave it.
    pub name: String,
}

/// What the service manager says; nothing where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceManager {
    /// `$NOTIFY_SOCKET`: a path, or `@` and an abstract name.
    pub notify_socket: Option<OsString>,
    /// `$WATCHDOG_USEC`: it restarts a service that has not spoken for this long.
    pub watchdog: Option<Duration>,
    /// `$LISTEN_FDS` and `$LISTEN_FDNAMES`: sockets, and what is kept for us between two lives.
    pub inherited: Vec<InheritedFd>,
    /// `$JOURNAL_STREAM`: device and inode of the stream that leads to the journal.
    pub journal_stream: Option<(u64, u64)>,
}

impl ServiceManager {
    /// Reads the environment of this process. Inherited files are marked so that no child inherits them again.
    ///
    /// # Errors
    /// If the variables contradict each other, or name files that are not open.
    pub fn read() -> Result<Self, std::io::Error> {
        let inherited = sd_notify::listen_fds_with_names()?;
        Ok(Self {
            notify_socket: std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()),
            watchdog: sd_notify::watchdog_enabled().filter(|time| !time.is_zero()),
            inherited: inherited.map(|(number, name)| InheritedFd { number, name }).collect(),
            journal_stream: std::env::var_os("JOURNAL_STREAM").and_then(|text| stream(text.to_str()?)),
        })
    }

    /// Whether what is written to stderr arrives in the journal. The variable alone does not tell: it is inherited by
    /// processes whose stderr leads elsewhere.
    #[must_use]
    pub fn is_stderr_the_journal(&self) -> bool {
        let stderr = fstat(std::io::stderr()).ok().map(|stat| (stat.st_dev, stat.st_ino));
        self.journal_stream.is_some() && self.journal_stream == stderr
    }
}

/// `DEVICE:INODE`, decimal.
fn stream(text: &str) -> Option<(u64, u64)> {
    let (device, inode) = text.split_once(':')?;
    Some((device.parse().ok()?, inode.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_two_numbers() {
        assert_eq!(stream("9:28405"), Some((9, 28_405)));
        for wrong in ["", "9", "9:", ":5", "9:5:6", "a:b", "9:-1"] {
            assert_eq!(stream(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn only_the_very_stream_is_the_journal() {
        let stderr = fstat(std::io::stderr()).unwrap();
        let with = |journal_stream| ServiceManager { journal_stream, ..ServiceManager::default() };
        assert!(with(Some((stderr.st_dev, stderr.st_ino))).is_stderr_the_journal());
        assert!(!with(Some((stderr.st_dev, stderr.st_ino + 1))).is_stderr_the_journal());
        assert!(!with(None).is_stderr_the_journal());
    }

    #[test]
    fn a_process_that_nobody_manages_hears_nothing() {
        // The test runner has none of the variables, or they are for another process.
        assert_eq!(ServiceManager::read().unwrap().inherited, []);
    }
}
