//! Sealed memory: what the supervisor and its workers hand each other by descriptor and nobody can change any more.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

/// How often the kernel is asked again, and how long after each time: it waits about 150 ms by itself.
const ATTEMPTS: u32 = 40;
const PAUSE: Duration = Duration::from_millis(50);

/// Seals the memory file `memory` (memfd_create(2)) for good: its bytes and its size can never change again.
///
/// The kernel refuses with `EBUSY` as long as anything holds one of its pages for a moment, such as another CPU's list of
/// pages just written or the compaction of memory; that passes, so it is asked again for some seconds.
///
/// # Errors
///
/// What fcntl(2) says: `EINVAL` for what is no memory file, `EPERM` for one that may not be sealed or is open read-only,
/// `EBUSY` if it stays mapped for writing.
pub fn seal(memory: impl AsFd) -> Result<(), Errno> {
    while_busy(PAUSE, || seal_once(&memory))
}

/// The same, but the kernel is asked once. False if it is busy: somebody who has other things to do asks again later.
///
/// # Errors
///
/// As [`seal`], but for `EBUSY`.
pub fn try_seal(memory: impl AsFd) -> Result<bool, Errno> {
    match seal_once(memory) {
        Ok(()) => Ok(true),
        Err(Errno::EBUSY) => Ok(false),
        Err(error) => Err(error),
    }
}

fn seal_once(memory: impl AsFd) -> Result<(), Errno> {
    fcntl(memory, FcntlArg::F_ADD_SEALS(all())).map(drop)
}

fn while_busy(pause: Duration, mut attempt: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    for _ in 1..ATTEMPTS {
        match attempt() {
            Err(Errno::EBUSY) => std::thread::sleep(pause),
            other => return other,
        }
    }
    attempt()
}

/// Whether `memory` is sealed for good.
///
/// # Errors
///
/// What fcntl(2) says: `EINVAL` for what is no memory file.
pub fn is_sealed(memory: impl AsFd) -> Result<bool, Errno> {
    let seals = fcntl(&memory, FcntlArg::F_GET_SEALS)?;
    Ok(SealFlag::from_bits_truncate(seals).contains(all()))
}

fn all() -> SealFlag {
    SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn memory() -> File {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create(c"test", flags).unwrap());
        file.write_all(b"some bytes").unwrap();
        file
    }

    #[test]
    fn what_is_sealed_can_not_be_changed() {
        let mut file = memory();
        assert!(!is_sealed(&file).unwrap());
        assert_eq!(try_seal(&file), Ok(true));
        assert!(is_sealed(&file).unwrap());
        assert!(file.write_all(b"more").is_err() && file.set_len(1).is_err());
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let file = File::open("/proc/self/exe").unwrap();
        assert!(seal(&file).is_err());
        assert!(try_seal(&file).is_err());
        assert!(is_sealed(&file).is_err());
    }

    #[test]
    fn a_page_in_use_is_waited_for_but_not_for_ever() {
        let mut calls = 0;
        let mut ends_after = |n: u32| {
            calls = 0;
            let result = while_busy(Duration::ZERO, || {
                calls += 1;
                if calls < n { Err(Errno::EBUSY) } else { Ok(()) }
            });
            (result, calls)
        };
        assert_eq!(ends_after(1), (Ok(()), 1));
        assert_eq!(ends_after(5), (Ok(()), 5));
        assert_eq!(ends_after(u32::MAX), (Err(Errno::EBUSY), ATTEMPTS));
    }
}
