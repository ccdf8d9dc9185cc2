//! Who is at the other end of a client's socket, by the kernel's word.
#![expect(unsafe_code, reason = "SO_PEERGROUPS, a list of any length, has no safe form")]

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;
use tokio::net::UnixStream;

/// A process as it was when it connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Its supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) pid: Option<i32>,
}

impl Peer {
    pub(crate) fn of(stream: &UnixStream) -> io::Result<Self> {
        let peer = stream.peer_cred()?;
        let groups = groups(stream.as_raw_fd()).unwrap_or_else(|error| {
            // A kernel before 4.13: the primary group still counts.
            tracing::debug!(%error, "the peer's further groups are not known");
            Vec::new()
        });
        Ok(Self { uid: peer.uid(), gid: peer.gid(), groups, pid: peer.pid() })
    }
}

fn groups(socket: libc::c_int) -> Result<Vec<u32>, Errno> {
    let mut groups = vec![0; 64];
    loop {
        let mut n_bytes =
            libc::socklen_t::try_from(size_of_val(&groups[..])).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: the buffer has `n_bytes` bytes and lives through the call, which writes at most so many; any bytes
        // are valid numbers.
        let result = unsafe {
            libc::getsockopt(
                socket,
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut n_bytes,
            )
        };
        let n_groups = n_bytes as usize / size_of::<u32>();
        match Errno::result(result) {
            Ok(_) => {
                groups.truncate(n_groups);
                return Ok(groups);
            }
            // The kernel says how many there are, which is at most 65536.
            Err(Errno::ERANGE) if n_groups > groups.len() => groups.resize(n_groups, 0),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn our_own_other_end_is_us() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let mut peer = Peer::of(&stream).unwrap();
        let mut groups: Vec<u32> =
            nix::unistd::getgroups().unwrap().into_iter().map(|gid| gid.as_raw()).collect();
        groups.sort_unstable();
        peer.groups.sort_unstable();
        assert_eq!(peer.groups, groups);
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(peer.gid, nix::unistd::getegid().as_raw());
    }
}
