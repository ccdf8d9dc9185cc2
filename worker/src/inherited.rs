//! The open files that come with the process: the link to the supervisor, the model, the memory for its head,
//! and a pipe for last words.
#![expect(unsafe_code, reason = "an inherited file descriptor is known by its number only")]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use bitnetd_proto::worker_link::{
    WORKER_COPY_FD, WORKER_HEAD_FD, WORKER_IMAGE_FD, WORKER_KEPT_FD, WORKER_LAST_WORDS_FD, WORKER_LINK_FD,
};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockaddrLike, UnixAddr, getpeername};

/// Why the process cannot be a worker.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InheritError {
    #[error("file descriptor {fd} is not open ({source})")]
    NotOpen { fd: RawFd, source: nix::Error },
    #[error("file descriptor {fd} is not a connected Unix socket")]
    NotASocket { fd: RawFd },
}

/// What the supervisor gives to a worker.
#[derive(Debug)]
pub(crate) struct Inherited {
    /// The socket to the supervisor.
    pub(crate) link: UnixStream,
    /// The model, read-only.
    pub(crate) image: OwnedFd,
    /// Memory for the fast head: empty, or filled and sealed.
    pub(crate) head: OwnedFd,
    /// Memory for the node's copy of the model: empty, or filled and sealed.
    pub(crate) copy: Option<OwnedFd>,
    /// A file with the fast image that an earlier process kept.
    pub(crate) kept: Option<OwnedFd>,
    /// A pipe to the supervisor, for the name of a denied system call.
    pub(crate) last_words: OwnedFd,
}

/// Takes ownership of the descriptors. Call it once, before anything else is opened.
pub(crate) fn take() -> Result<Inherited, InheritError> {
    let link = take_fd(WORKER_LINK_FD)?;
    let image = take_fd(WORKER_IMAGE_FD)?;
    let head = take_fd(WORKER_HEAD_FD)?;
    let last_words = take_fd(WORKER_LAST_WORDS_FD)?;
    // Not every worker has these; nothing else is open yet that could have their numbers.
    let copy = take_fd(WORKER_COPY_FD).ok();
    let kept = take_fd(WORKER_KEPT_FD).ok();
    let is_unix = getpeername::<UnixAddr>(std::os::fd::AsRawFd::as_raw_fd(&link))
        .is_ok_and(|peer| peer.family() == Some(AddressFamily::Unix));
    if !is_unix {
        return Err(InheritError::NotASocket { fd: WORKER_LINK_FD });
    }
    Ok(Inherited { link: UnixStream::from(link), image, head, copy, kept, last_words })
}

fn take_fd(fd: RawFd) -> Result<OwnedFd, InheritError> {
    // SAFETY: the borrow ends with this call; a number that is no open file only makes `fcntl` fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    // Nothing this process may start later should inherit it again; the call also proves that it is open.
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|source| InheritError::NotOpen { fd, source })?;
    // SAFETY: it is open (checked above), and nothing else in this process owns it: the supervisor put it at this
    // number for us, and `run` calls this once, first.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
