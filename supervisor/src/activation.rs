//! Open files that the service manager passed on: listening sockets, and what an earlier life of the service stored.
#![expect(unsafe_code, reason = "an inherited file descriptor is known by its number only")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use bitnetd_config::InheritedFd;
use bitnetd_proto::exit_code::ExitCode;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};
use nix::sys::stat::{SFlag, fstat};

/// The first number that a service manager uses; those below are stdin, stdout and stderr.
const FIRST_FD: i32 = 3;

/// Set by the first `take`: a number can be owned once.
static IS_TAKEN: AtomicBool = AtomicBool::new(false);

/// Why what was passed on cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// The environment promises a file that is not open.
    #[error("the service manager passed `{name}` as descriptor {number}, which is not open")]
    NotOpen {
        /// Its number.
        number: i32,
        /// Its name.
        name: String,
        /// What the system says.
        #[source]
        source: Errno,
    },
    /// A socket of another kind.
    #[error("socket `{name}` of the service manager is not a listening Unix stream socket")]
    NotAListener {
        /// Its name.
        name: String,
    },
}

impl ActivationError {
    /// How the program should end.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::Config
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotOpen { .. } => "LISTEN_FDS is set by something that is no service manager",
            Self::NotAListener { .. } => "the socket unit needs `ListenStream=` with a path",
        }
    }
}

/// What the service manager passed on.
#[derive(Debug, Default)]
pub struct Activation {
    /// Sockets to serve, with their names.
    pub sockets: Vec<(String, UnixListener)>,
    /// Files that an earlier life of the service stored, with their names.
    pub stored: Vec<(String, OwnedFd)>,
}

impl Activation {
    /// Takes ownership of what was passed on. Only the first call of a process gets anything; make it before anything
    /// else is opened.
    ///
    /// # Errors
    /// [`ActivationError`]
    pub fn take(inherited: &[InheritedFd]) -> Result<Self, ActivationError> {
        let mut taken = Self::default();
        if IS_TAKEN.swap(true, Ordering::AcqRel) {
            return Ok(taken);
        }
        let mut last = FIRST_FD - 1;
        for InheritedFd { number, name } in inherited {
            // Ascending numbers: none is taken twice.
            if *number <= last {
                return Err(ActivationError::NotOpen {
                    number: *number,
                    name: name.clone(),
                    source: Errno::EBADF,
                });
            }
            last = *number;
            taken.sort_in(take_fd(*number, name)?, name)?;
        }
        Ok(taken)
    }

    fn sort_in(&mut self, file: OwnedFd, name: &str) -> Result<(), ActivationError> {
        let kind = fstat(&file).map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
        match kind {
            Ok(SFlag::S_IFSOCK) if is_unix_listener(&file) => {
                self.sockets.push((name.to_owned(), UnixListener::from(file)));
            }
            Ok(SFlag::S_IFSOCK) => return Err(ActivationError::NotAListener { name: name.to_owned() }),
            Ok(SFlag::S_IFREG) => self.stored.push((name.to_owned(), file)),
            _ => tracing::warn!(name, "a file of the service manager is none of ours, and closed"),
        }
        Ok(())
    }
}

fn is_unix_listener(file: &OwnedFd) -> bool {
    getsockname::<UnixAddr>(file.as_raw_fd()).is_ok()
        && getsockopt(file, sockopt::SockType) == Ok(SockType::Stream)
        && getsockopt(file, sockopt::AcceptConn) == Ok(true)
}

fn take_fd(number: i32, name: &str) -> Result<OwnedFd, ActivationError> {
    // SAFETY: the borrow ends with this call; a number that is no open file only makes `fcntl` fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|source| ActivationError::NotOpen {
        number,
        name: name.to_owned(),
        source,
    })?;
    // SAFETY: it is open (checked above). Nothing else owns it: the service manager put it at this number for us,
    // `IS_TAKEN` lets one call through, and that one takes each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
