//! A copy of the model in the memory of a node: made by the first worker there, mapped by all workers of the node.
//!
//! The pages lie where the memory of the worker that writes them is bound, which is why the supervisor gives a copy
//! only to workers that are bound to one node. A worker that finds another one at it waits: it needs the model to start.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::time::Instant;

use bitnetd_engine::mapping::{Mapping, MappingError};
use bitnetd_proto::sealed::{is_sealed, seal};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeCopyError {
    #[error("the supervisor gave no memory for it")]
    NoMemory,
    #[error("cannot lock its memory")]
    Lock(#[source] Errno),
    #[error("cannot write it")]
    Write(#[source] io::Error),
    #[error("cannot seal it")]
    Seal(#[source] Errno),
    #[error("cannot map it")]
    Map(#[source] MappingError),
}

/// Maps the copy of `model` in `memory`, after making it if nobody has.
pub(crate) fn open(memory: OwnedFd, model: &Mapping) -> Result<Mapping, NodeCopyError> {
    let mut file = File::from(memory);
    wait_for_lock(&file).map_err(NodeCopyError::Lock)?;
    if !is_sealed(&file).map_err(NodeCopyError::Seal)? {
        let begun = Instant::now();
        // A predecessor may have died while it was writing.
        let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(model));
        written.map_err(NodeCopyError::Write)?;
        seal(&file).map_err(NodeCopyError::Seal)?;
        let seconds = begun.elapsed().as_secs_f64();
        tracing::info!(n_bytes = model.len(), seconds, "the node's copy of the model is made");
    }
    // Closing the file gives the lock back as well.
    Mapping::from_memory(file.into(), model.len() as u64).map_err(NodeCopyError::Map)
}

/// Takes the lock on the whole file. It belongs to the process, so it excludes workers that share one open file, and goes
/// when the process does.
fn wait_for_lock(file: &File) -> Result<(), Errno> {
    let range = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).map_err(|_| Errno::EINVAL)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(|_| Errno::EINVAL)?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_SETLKW(&range)).map(drop)
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn a_copy_is_made_once_and_cannot_be_changed() {
        let model = Mapping::from_static(b"the bytes of a model").unwrap();
        let memory = memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let mut writer = File::from(memory.try_clone().unwrap());
        writer.write_all(b"what a worker that died has left behind, which is longer").unwrap();
        assert_eq!(&*open(memory.try_clone().unwrap(), &model).unwrap(), &*model);
        assert!(writer.write_all(b"x").is_err() && writer.set_len(0).is_err(), "it is sealed");
        let another = Mapping::from_static(b"not the bytes of it!").unwrap();
        assert_eq!(&*open(memory, &another).unwrap(), &*model, "what is there is not made again");
    }
}
