//! The environment, read in one place, and the places it leads to: sockets and configuration files.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access, geteuid};

/// Directory of the system's daemon.
const SYSTEM_DIR: &str = "/run/bitnetd";
/// Name of the socket in its directory.
const SOCKET_NAME: &str = "bitnetd.sock";
/// Directory of what the system's daemon keeps.
const SYSTEM_STATE_DIR: &str = "/var/lib/bitnetd";
/// Directory of what the system's daemon can make again.
const SYSTEM_CACHE_DIR: &str = "/var/cache/bitnetd";
/// Name of the journal in its directory.
const JOURNAL_NAME: &str = "jobs.redb";

/// What the environment says; everything that depends on it is a function of this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// Whether this process is root.
    pub is_root: bool,
    /// Whether `/run/bitnetd` exists and this process may make a socket in it.
    pub system_dir_writable: bool,
    /// Whether `/var/lib/bitnetd` exists and this process may make files in it.
    pub system_state_dir_writable: bool,
    /// Whether `/var/cache/bitnetd` exists and this process may make files in it.
    pub system_cache_dir_writable: bool,
    /// `$STATE_DIRECTORY`, the first path of it: where systemd lets a service keep things.
    pub state_directory: Option<PathBuf>,
    /// `$CACHE_DIRECTORY`, the same for what can be made again.
    pub cache_directory: Option<PathBuf>,
    /// `$XDG_RUNTIME_DIR`, if it is an absolute path to a directory that belongs to us.
    pub xdg_runtime_dir: Option<PathBuf>,
    /// `$XDG_CONFIG_HOME`, else `$HOME/.config`.
    pub config_home: Option<PathBuf>,
    /// `$XDG_STATE_HOME`, else `$HOME/.local/state`.
    pub state_home: Option<PathBuf>,
    /// `$XDG_CACHE_HOME`, else `$HOME/.cache`.
    pub cache_home: Option<PathBuf>,
    /// `$BITNETD_SOCKET`: the socket of the daemon, for clients.
    pub socket: Option<PathBuf>,
    /// `$BITNETD_CONFIG`: the configuration file.
    pub config: Option<PathBuf>,
    /// Whether `$NO_COLOR` is set to something.
    pub no_color: bool,
}

/// Why there is no place for a socket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no place for the socket: `/run/bitnetd` cannot be written, and neither XDG_RUNTIME_DIR nor HOME is set"
)]
pub struct SocketPathError;

impl Environment {
    /// Reads the environment of this process. The only place that does.
    #[must_use]
    pub fn read() -> Self {
        let home = absolute("HOME");
        let under_home = |variable: &str, below: &str| {
            absolute(variable).or_else(|| home.as_ref().map(|home| home.join(below)))
        };
        Self {
            is_root: geteuid().is_root(),
            system_dir_writable: access(SYSTEM_DIR, AccessFlags::W_OK | AccessFlags::X_OK).is_ok(),
            system_state_dir_writable: access(SYSTEM_STATE_DIR, AccessFlags::W_OK | AccessFlags::X_OK)
                .is_ok(),
            system_cache_dir_writable: access(SYSTEM_CACHE_DIR, AccessFlags::W_OK | AccessFlags::X_OK)
                .is_ok(),
            state_directory: first_path("STATE_DIRECTORY"),
            cache_directory: first_path("CACHE_DIRECTORY"),
            xdg_runtime_dir: absolute("XDG_RUNTIME_DIR").filter(|dir| belongs_to_us(dir)),
            config_home: under_home("XDG_CONFIG_HOME", ".config"),
            state_home: under_home("XDG_STATE_HOME", ".local/state"),
            cache_home: under_home("XDG_CACHE_HOME", ".cache"),
            socket: absolute("BITNETD_SOCKET"),
            config: absolute("BITNETD_CONFIG"),
            no_color: variable("NO_COLOR").is_some(),
        }
    }

    /// Where the daemon makes its socket if the configuration names none. The directory may have to be made, with
    /// mode 0700 (`/run/bitnetd`: 0755).
    ///
    /// # Errors
    /// If there is no safe place: `/tmp` is none.
    pub fn server_socket(&self) -> Result<PathBuf, SocketPathError> {
        if self.is_root || self.system_dir_writable {
            return Ok(Path::new(SYSTEM_DIR).join(SOCKET_NAME));
        }
        self.user_sockets().into_iter().next().ok_or(SocketPathError)
    }

    /// Where the daemon keeps durable jobs if the configuration does not say; `None` if there is no place. The
    /// directory may have to be made, with mode 0700.
    #[must_use]
    pub fn journal(&self) -> Option<PathBuf> {
        self.state_dir().map(|dir| dir.join(JOURNAL_NAME))
    }

    /// Where things are kept that outlive the process; `None` if there is no place. The directory may have to be made.
    #[must_use]
    pub fn state_dir(&self) -> Option<PathBuf> {
        let system =
            (self.is_root || self.system_state_dir_writable).then(|| PathBuf::from(SYSTEM_STATE_DIR));
        let user = || self.state_home.as_ref().map(|dir| dir.join("bitnetd"));
        self.state_directory.clone().or(system).or_else(user)
    }

    /// Where things are kept that can be made again; `None` if there is no place. The directory may have to be made.
    #[must_use]
    pub fn cache_dir(&self) -> Option<PathBuf> {
        let system =
            (self.is_root || self.system_cache_dir_writable).then(|| PathBuf::from(SYSTEM_CACHE_DIR));
        let user = || self.cache_home.as_ref().map(|dir| dir.join("bitnetd"));
        self.cache_directory.clone().or(system).or_else(user)
    }

    /// Where a client looks for the daemon, in this order: the first that exists counts. `given` is what the
    /// command line says, `configured` what the configuration says; each of them ends the search.
    #[must_use]
    pub fn client_sockets(&self, given: Option<&Path>, configured: Option<&Path>) -> Vec<PathBuf> {
        if let Some(path) = given.or(self.socket.as_deref()).or(configured) {
            return vec![path.to_owned()];
        }
        let mut places = vec![Path::new(SYSTEM_DIR).join(SOCKET_NAME)];
        places.extend(self.user_sockets());
        places
    }

    /// The configuration files that are looked for when the command line names none; the first that exists counts.
    /// `$BITNETD_CONFIG` ends the search.
    #[must_use]
    pub fn config_files(&self) -> Vec<PathBuf> {
        if let Some(path) = &self.config {
            return vec![path.clone()];
        }
        let system = PathBuf::from("/etc/bitnetd/bitnetd.toml");
        let user = self.config_home.as_ref().map(|dir| dir.join("bitnetd/bitnetd.toml"));
        if self.is_root { vec![system] } else { user.into_iter().chain([system]).collect() }
    }

    fn user_sockets(&self) -> Vec<PathBuf> {
        let runtime = self.xdg_runtime_dir.as_ref().map(|dir| dir.join(SOCKET_NAME));
        let state = self.state_home.as_ref().map(|dir| dir.join("bitnetd").join(SOCKET_NAME));
        runtime.into_iter().chain(state).collect()
    }
}

fn variable(name: &str) -> Option<std::ffi::OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// A variable that holds an absolute path; others are ignored, as the XDG base directory specification asks.
fn absolute(name: &str) -> Option<PathBuf> {
    variable(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// The first path of a list such as systemd's; ignored unless it is absolute.
fn first_path(name: &str) -> Option<PathBuf> {
    let list = variable(name)?;
    std::env::split_paths(&list).next().filter(|path| path.is_absolute())
}

fn belongs_to_us(dir: &Path) -> bool {
    std::fs::metadata(dir).is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == geteuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> Environment {
        Environment {
            xdg_runtime_dir: Some("/run/user/1000".into()),
            config_home: Some("/home/u/.config".into()),
            state_home: Some("/home/u/.local/state".into()),
            ..Environment::default()
        }
    }

    #[test]
    fn a_user_gets_a_private_directory() {
        assert_eq!(user().server_socket().unwrap(), Path::new("/run/user/1000/bitnetd.sock"));
        let without_runtime_dir = Environment { xdg_runtime_dir: None, ..user() };
        let path = without_runtime_dir.server_socket().unwrap();
        assert_eq!(path, Path::new("/home/u/.local/state/bitnetd/bitnetd.sock"));
        assert_eq!(Environment::default().server_socket(), Err(SocketPathError));
    }

    #[test]
    fn root_and_the_service_user_get_the_system_directory() {
        let system = Path::new("/run/bitnetd/bitnetd.sock");
        assert_eq!(Environment { is_root: true, ..user() }.server_socket().unwrap(), system);
        assert_eq!(Environment { system_dir_writable: true, ..user() }.server_socket().unwrap(), system);
    }

    #[test]
    fn the_journal_is_in_the_state_directory() {
        let named =
            Environment { state_directory: Some("/var/lib/private/b".into()), is_root: true, ..user() };
        assert_eq!(named.journal(), Some("/var/lib/private/b/jobs.redb".into()));
        let root = Environment { is_root: true, ..user() };
        let service = Environment { system_state_dir_writable: true, ..user() };
        for system in [root, service] {
            assert_eq!(system.journal(), Some("/var/lib/bitnetd/jobs.redb".into()));
        }
        assert_eq!(user().journal(), Some("/home/u/.local/state/bitnetd/jobs.redb".into()));
        assert_eq!(Environment::default().journal(), None);
    }

    #[test]
    fn what_can_be_made_again_is_in_the_cache_directory() {
        let user = Environment { cache_home: Some("/home/u/.cache".into()), ..user() };
        assert_eq!(user.cache_dir(), Some("/home/u/.cache/bitnetd".into()));
        let root = Environment { is_root: true, ..user.clone() };
        let service = Environment { system_cache_dir_writable: true, ..user.clone() };
        for system in [root, service] {
            assert_eq!(system.cache_dir(), Some("/var/cache/bitnetd".into()));
        }
        let named = Environment { cache_directory: Some("/c".into()), is_root: true, ..user };
        assert_eq!(named.cache_dir(), Some("/c".into()));
        assert_eq!(Environment::default().cache_dir(), None);
    }

    #[test]
    fn a_client_looks_where_a_daemon_may_be() {
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(
            user().client_sockets(None, None),
            paths(&[
                "/run/bitnetd/bitnetd.sock",
                "/run/user/1000/bitnetd.sock",
                "/home/u/.local/state/bitnetd/bitnetd.sock"
            ])
        );
        let (given, configured) = (Path::new("/a"), Path::new("/b"));
        assert_eq!(user().client_sockets(Some(given), Some(configured)), [given]);
        assert_eq!(user().client_sockets(None, Some(configured)), [configured]);
        let named = Environment { socket: Some("/c".into()), ..user() };
        assert_eq!(named.client_sockets(None, Some(configured)), [Path::new("/c")]);
        assert_eq!(named.client_sockets(Some(given), None), [given]);
    }

    #[test]
    fn configuration_files() {
        let files = user().config_files();
        assert_eq!(
            files,
            [Path::new("/home/u/.config/bitnetd/bitnetd.toml"), Path::new("/etc/bitnetd/bitnetd.toml")]
        );
        let root = Environment { is_root: true, ..user() };
        assert_eq!(root.config_files(), [Path::new("/etc/bitnetd/bitnetd.toml")]);
        let named = Environment { config: Some("/x.toml".into()), ..user() };
        assert_eq!(named.config_files(), [Path::new("/x.toml")]);
    }

    #[test]
    fn the_environment_of_this_process_can_be_read() {
        let environment = Environment::read();
        assert!(environment.xdg_runtime_dir.is_none_or(|dir| dir.is_absolute()));
    }
}
