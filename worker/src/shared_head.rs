//! The fast head: made by the first worker that gets to it, mapped by all.
//!
//! The supervisor gives every worker the same anonymous memory, empty at first. Whoever holds the lock on it and finds
//! it unsealed makes the head, writes it and seals it; a sealed memory is whole and can never change again. A worker that
//! dies in between loses the lock with its life, and the next one starts over.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;

use bitnetd_engine::dense::DenseMatrix;
use bitnetd_engine::head::{FastHead, FastHeadError, HeadImage};
use bitnetd_engine::kernels::KernelSet;
use bitnetd_engine::mapping::{Mapping, MappingError};
use bitnetd_engine::pool::ThreadPool;
use bitnetd_proto::sealed::{is_sealed, seal};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Why there is no fast head.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SharedHeadError {
    #[error("cannot lock the memory of the head")]
    Lock(#[source] nix::Error),
    #[error("cannot make the head")]
    Make(#[source] FastHeadError),
    #[error("cannot write the head")]
    Write(#[source] io::Error),
    #[error("cannot seal the memory of the head")]
    Seal(#[source] nix::Error),
    #[error("cannot map the head")]
    Map(#[source] MappingError),
    #[error("another worker made a head that is none")]
    Foreign(#[source] FastHeadError),
}

/// Maps the head in `memory`, after making it if nobody has.
pub(crate) fn open(
    memory: OwnedFd,
    matrix: &DenseMatrix<'_>,
    kernels: KernelSet,
    pool: &ThreadPool,
) -> Result<HeadImage, SharedHeadError> {
    let mut file = File::from(memory);
    lock(&file, libc::F_WRLCK).map_err(SharedHeadError::Lock)?;
    if !is_sealed(&file).map_err(SharedHeadError::Seal)? {
        let image = FastHead::build(matrix, kernels, pool).map_err(SharedHeadError::Make)?;
        // A predecessor may have died while it was writing.
        let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&image));
        written.map_err(SharedHeadError::Write)?;
        seal(&file).map_err(SharedHeadError::Seal)?;
    }
    lock(&file, libc::F_UNLCK).map_err(SharedHeadError::Lock)?;
    let mapping = Mapping::from_fd(file.into()).map_err(SharedHeadError::Map)?;
    HeadImage::new(mapping, matrix).map_err(SharedHeadError::Foreign)
}

/// Takes or gives back the lock on the whole file. It belongs to the process, so it excludes workers that share one
/// open file, and goes when the process does.
fn lock(file: &File, kind: i32) -> Result<(), nix::Error> {
    let range = libc::flock {
        l_type: i16::try_from(kind).map_err(|_| nix::Error::EINVAL)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(|_| nix::Error::EINVAL)?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_SETLKW(&range)).map(drop)
}

#[cfg(test)]
mod tests {
    use bitnetd_engine::dense::DenseFormat;
    use bitnetd_engine::pool::PoolOptions;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn the_head_is_made_once_and_cannot_be_changed() {
        let weights: Vec<u8> =
            (0..512 * 128_u32).flat_map(|i| ((i % 97) as f32 - 48.0).to_le_bytes()).collect();
        let matrix = DenseMatrix::new(DenseFormat::F32, &weights, 512, 128).unwrap();
        let pool = ThreadPool::new(PoolOptions::unpinned(1)).unwrap();
        let memory = memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let mut writer = File::from(memory.try_clone().unwrap());
        writer.write_all(b"what a worker that died has left").unwrap();
        let first = open(memory.try_clone().unwrap(), &matrix, KernelSet::detect(), &pool).unwrap();
        assert_eq!(first.view().n_rows(), 512);
        assert!(writer.write_all(b"x").is_err() && writer.set_len(0).is_err(), "it is sealed");
        open(memory.try_clone().unwrap(), &matrix, KernelSet::detect(), &pool).unwrap();
        let other = DenseMatrix::new(DenseFormat::F32, &weights, 256, 256).unwrap();
        let refused = open(memory, &other, KernelSet::detect(), &pool).unwrap_err();
        assert!(matches!(refused, SharedHeadError::Foreign(_)), "{refused}");
    }
}
