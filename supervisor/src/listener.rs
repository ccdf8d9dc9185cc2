//! The Unix socket that clients connect to: taken over only if it is dead, given back only if it is ours.
//!
//! A socket that the service manager passed on is only borrowed: its file stays, and so does its queue of clients, who
//! are served by the next life of the service.
//!
//! A lock file beside the socket decides between two supervisors, also while one of them is starting; a connect
//! probe decides about anything else that may listen there. The lock file stays: removing it would let two
//! processes hold "the" lock.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bitnetd_config::ListenConfig;
use bitnetd_proto::exit_code::ExitCode;
use interprocess::local_socket::{GenericFilePath, Listener as LocalListener, ListenerOptions, ToFsName};
use interprocess::os::unix::local_socket::ListenerOptionsExt;
use nix::fcntl::Flock;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Group, Uid, User, chown};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::connection;
use crate::files::{self, LockError};
use crate::service::Service;

/// Connections that are being refused at once, at most; more are closed without a word.
const REFUSALS_MAX: usize = 64;
/// Descriptors that connections may not use up: workers, their start, refusals, logs.
const DESCRIPTORS_RESERVED: usize = 512;
/// Wait after `accept` failed for lack of descriptors or memory.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process serves it.
    #[error("socket `{path}` is in use by another process")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The folder or the file may not be written.
    #[error("socket `{path}` may not be created here")]
    NotPermitted {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The folder is not there.
    #[error("the folder of socket `{path}` does not exist")]
    NoFolder {
        /// The socket.
        path: PathBuf,
    },
    /// `listen.owner` or `listen.group` is nobody.
    #[error("there is no {kind} `{name}`")]
    NoSuchPrincipal {
        /// `user` or `group`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The socket may not be given away.
    #[error("socket `{path}` cannot be given to its owner or group")]
    Owner {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Something else has that name.
    #[error("`{path}` is there and is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Anything else, such as a path that is too long.
    #[error("cannot listen on socket `{path}`: {source}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

impl ListenError {
    fn new(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::InUse { path },
            io::ErrorKind::NotFound => Self::NoFolder { path },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotPermitted { path, source }
            }
            _ => Self::Bind { path, source },
        }
    }

    /// How the program should end.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::InUse { .. } => ExitCode::Temporary,
            Self::NotPermitted { .. } | Self::Owner { .. } => ExitCode::Permission,
            Self::NoFolder { .. }
            | Self::NotASocket { .. }
            | Self::NoSuchPrincipal { .. }
            | Self::Bind { .. } => ExitCode::Config,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::InUse { .. } => {
                "a bitnetd is running there: use it, stop it, or choose another `listen.socket`"
            }
            Self::NotPermitted { .. } => "choose a `listen.socket` that this user may create",
            Self::NoFolder { .. } => "create the folder, or choose another `listen.socket`",
            Self::NotASocket { .. } => "remove the file, or choose another `listen.socket`",
            Self::NoSuchPrincipal { .. } => "`listen.owner` and `listen.group` take a name or a number",
            Self::Owner { .. } => {
                "only root may give a socket to another user; to a group, whoever is a member of it"
            }
            Self::Bind { .. } => "choose another `listen.socket` (at most 107 bytes long)",
        }
    }
}

/// A socket that is ours.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    config: ListenConfig,
    /// `None`: the socket file belongs to the service manager.
    own: Option<SocketFile>,
}

/// A socket file that is ours to remove.
#[derive(Debug)]
struct SocketFile {
    /// Device and inode, to know it again.
    identity: (u64, u64),
    /// Held until after the file is gone.
    _lock: Flock<File>,
}

impl Listener {
    /// Takes `path`. A socket that nobody serves any more is replaced, one that is served never.
    ///
    /// # Errors
    /// [`ListenError`]; nothing was changed then.
    pub fn bind(path: &Path, config: &ListenConfig) -> Result<Self, ListenError> {
        let failed = |source| ListenError::new(path, source);
        let (owner, group) = (owner(config)?, group(config)?);
        let lock = lock_beside(path)?;
        remove_if_dead(path)?;
        let name = path.to_fs_name::<GenericFilePath>().map_err(failed)?;
        // The mode holds from the moment the file appears (the umask may have made it stricter until it is set again);
        // a group that is not ours gets its bits when it is the owner of them.
        let is_given_away = owner.is_some() || group.is_some();
        let first_mode = if is_given_away { 0o600 } else { config.mode };
        let LocalListener::UdSocket(socket) = ListenerOptions::new()
            .name(name)
            .mode(first_mode)
            .reclaim_name(false)
            .create_sync()
            .map_err(failed)?;
        let socket = StdUnixListener::from(OwnedFd::from(socket));
        socket.set_nonblocking(true).map_err(failed)?;
        let socket = UnixListener::from_std(socket).map_err(failed)?;
        if is_given_away {
            chown(path, owner, group)
                .map_err(|error| ListenError::Owner { path: path.to_owned(), source: error.into() })?;
        }
        std::fs::set_permissions(path, Permissions::from_mode(config.mode)).map_err(failed)?;
        let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
        let identity = (metadata.dev(), metadata.ino());
        tracing::info!(socket = %path.display(), mode = format!("{:04o}", config.mode), "listening");
        let own = Some(SocketFile { identity, _lock: lock });
        Ok(Self { socket, path: path.to_owned(), config: config.clone(), own })
    }

    /// Serves a socket that the service manager has made. Its file, mode and owner are the manager's affair.
    ///
    /// # Errors
    /// [`ListenError::Bind`]
    pub fn inherit(name: &str, socket: StdUnixListener, config: &ListenConfig) -> Result<Self, ListenError> {
        let address = socket.local_addr().ok();
        let path = address.as_ref().and_then(|address| address.as_pathname()).unwrap_or(Path::new(name));
        let path = path.to_owned();
        let failed = |source| ListenError::new(&path, source);
        socket.set_nonblocking(true).map_err(failed)?;
        let socket = UnixListener::from_std(socket).map_err(failed)?;
        tracing::info!(socket = %path.display(), name, "listening on a socket of the service manager");
        Ok(Self { socket, path, config: config.clone(), own: None })
    }

    /// The next connection, for a server of another kind.
    pub(crate) async fn accept_one(&self) -> io::Result<UnixStream> {
        Ok(self.socket.accept().await?.0)
    }

    /// The path it listens on.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves clients until the service has stopped, then removes the socket if it is ours.
    ///
    /// Clients who come while an own socket's service drains are told so. Those on the manager's socket wait for the
    /// next life of the service.
    pub async fn serve(self, service: Service) {
        let config = Arc::new(self.config.clone());
        let max_connections = connections_with_room(self.config.max_connections as usize);
        let places = Arc::new(Semaphore::new(max_connections));
        let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
        let is_ours = self.own.is_some();
        let stopped = async {
            if is_ours {
                service.stopped().await;
            } else {
                service.ending().await;
            }
        };
        let mut stopped = std::pin::pin!(stopped);
        let mut is_short = false;
        loop {
            let accepted = tokio::select! {
                accepted = self.socket.accept() => accepted,
                () = &mut stopped => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => {
                    if std::mem::take(&mut is_short) {
                        tracing::info!("connections are accepted again");
                    }
                    stream
                }
                Err(error) => {
                    if !is_about_one_peer(&error) {
                        // Those who come wait in the backlog. Once is enough to say so.
                        if !std::mem::replace(&mut is_short, true) {
                            tracing::error!(%error, "cannot accept connections for now");
                        }
                        sleep(ACCEPT_PAUSE).await;
                    }
                    continue;
                }
            };
            if let Ok(place) = places.clone().try_acquire_owned() {
                // Who may come in is asked when they come: a reload may have changed the lists.
                let config = service.reloaded_listen().unwrap_or_else(|| config.clone());
                let service = service.clone();
                tokio::spawn(async move {
                    connection::serve(stream, service, &config).await;
                    drop(place);
                });
            } else if let Ok(place) = refusals.clone().try_acquire_owned() {
                tokio::spawn(async move {
                    refuse_for_number(stream, max_connections).await;
                    drop(place);
                });
            }
        }
        if !is_ours {
            service.stopped().await;
        }
        // Connections still have to pass on the last events of their jobs.
        let all = u32::try_from(max_connections).unwrap_or(u32::MAX);
        let _ended = tokio::time::timeout(connection::CLOSE_TIMEOUT, places.acquire_many(all)).await;
    }
}

/// The user that the socket is for, if another than ours.
fn owner(config: &ListenConfig) -> Result<Option<Uid>, ListenError> {
    let find = |name: &String| match name.parse() {
        Ok(uid) => Ok(Uid::from_raw(uid)),
        Err(_) => User::from_name(name)
            .ok()
            .flatten()
            .map(|user| user.uid)
            .ok_or_else(|| ListenError::NoSuchPrincipal { kind: "user", name: name.clone() }),
    };
    config.owner.as_ref().map(find).transpose()
}

/// The group that the socket is for, if another than ours.
fn group(config: &ListenConfig) -> Result<Option<Gid>, ListenError> {
    let find = |name: &String| match name.parse() {
        Ok(gid) => Ok(Gid::from_raw(gid)),
        Err(_) => Group::from_name(name)
            .ok()
            .flatten()
            .map(|group| group.gid)
            .ok_or_else(|| ListenError::NoSuchPrincipal { kind: "group", name: name.clone() }),
    };
    config.group.as_ref().map(find).transpose()
}

/// Raises the limit of open descriptors as far as it may go, and keeps enough of them for workers: a crowd of
/// clients must not make a restart fail.
fn connections_with_room(wanted: usize) -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return wanted };
    let limit = if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft };
    let room = usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(DESCRIPTORS_RESERVED).max(1);
    if room < wanted {
        tracing::warn!(wanted, room, limit, "fewer connections than configured: too few file descriptors");
    }
    wanted.min(room).min(Semaphore::MAX_PERMITS)
}

async fn refuse_for_number(stream: UnixStream, max_connections: usize) {
    tracing::warn!(max_connections, "connection refused: too many");
    connection::refuse_for_number(stream, max_connections).await;
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(own) = &self.own else { return };
        let is_ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == own.identity);
        if is_ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "socket not removed");
        }
    }
}

fn is_about_one_peer(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
}

fn lock_beside(path: &Path) -> Result<Flock<File>, ListenError> {
    files::lock_beside(path).map_err(|error| match error {
        LockError::InUse => ListenError::InUse { path: path.to_owned() },
        LockError::Io(source) => ListenError::new(path, source),
    })
}

/// Only called under the lock: no other supervisor is between its probe and its bind.
fn remove_if_dead(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::new(path, source);
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    match StdUnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(socket = %path.display(), "taking over a socket that nobody serves");
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(failed(error)),
        // Connected, or a full backlog: somebody lives there.
        Ok(_) | Err(_) => Err(ListenError::InUse { path: path.to_owned() }),
    }
}
