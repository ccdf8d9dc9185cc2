//! What the service manager (systemd) says to this process in its environment: where to report, how often, and which
//! open files came along.
//!
//! `sd-notify` knows the variables; this is the only place that asks it to read them.

use std::ffi::OsString;
use std::time::Duration;

/// The variables that are meant for this process and not for its children.
pub const SERVICE_MANAGER_VARIABLES: [&str; 8] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDNAMES",
    "FDSTORE",
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
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_nobody_manages_hears_nothing() {
        // The test runner has none of the variables, or they are for another process.
        assert_eq!(ServiceManager::read().unwrap().inherited, []);
    }
}
