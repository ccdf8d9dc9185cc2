//! The model image that every worker inherits: a file, or sealed memory for the built-in model.
//!
//! Opened once, before the first worker, so that a file that is replaced on disk changes nothing for a running
//! service. The supervisor never reads a byte of it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use bitnetd_config::{Choice as _, Config};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::sealed::{self, is_sealed};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{fstat, stat};

use crate::files::FileState;

/// Where the model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A GGUF file.
    File(PathBuf),
    /// The bytes of the model that is part of the program.
    BuiltIn(&'static [u8]),
}

impl ModelSource {
    /// What messages call it.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::BuiltIn(_) => "built-in".into(),
        }
    }
}

/// Why a model could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is not there, or may not be read.
    #[error("cannot open model `{path}`")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It is a directory or the like.
    #[error("model `{path}` is not a regular file")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// It has no bytes.
    #[error("model `{path}` is empty")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The built-in model could not be copied to sealed memory.
    #[error("cannot put the built-in model into sealed memory")]
    Memory(#[source] io::Error),
}

impl ImageError {
    /// What a client is told whose reload it stopped.
    pub(crate) fn to_wire(&self) -> WireError {
        let cause = std::error::Error::source(self).map_or_else(String::new, |cause| format!(": {cause}"));
        WireError::new(ErrorCode::InvalidRequest, format!("{self}{cause}"))
    }

    /// How the program should end.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Open { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ExitCode::Permission
            }
            Self::Open { .. } | Self::NotAFile { .. } => ExitCode::NoInput,
            Self::Empty { .. } => ExitCode::Data,
            Self::Memory(_) => ExitCode::Os,
        }
    }
}

/// What all workers share: an open model, and memory for the fast image that the first of them makes.
#[derive(Debug)]
pub(crate) struct ModelImage {
    model: OwnedFd,
    head: OwnedFd,
    /// A file with the fast image that an earlier process kept.
    kept: Option<OwnedFd>,
    is_built_in: bool,
}

impl ModelImage {
    pub(crate) fn open(source: &ModelSource) -> Result<Self, ImageError> {
        let model = Self::open_model(source)?;
        // Empty until a worker has filled and sealed it; the supervisor does no model arithmetic.
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let head = memfd_create(c"bitnetd-head", flags).map_err(|error| ImageError::Memory(error.into()))?;
        Ok(Self { model, head, kept: None, is_built_in: matches!(source, ModelSource::BuiltIn(_)) })
    }

    /// True if both are the very same file and it was not written to in between. Memory is never the same.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        let state = |image: &Self| fstat(&image.model).map(|stat| FileState::from(&stat));
        state(self).is_ok_and(|ours| state(other) == Ok(ours))
    }

    /// The model's bytes, read-only.
    pub(crate) fn model(&self) -> BorrowedFd<'_> {
        self.model.as_fd()
    }

    /// True if the model is part of the program.
    pub(crate) fn is_built_in(&self) -> bool {
        self.is_built_in
    }

    /// Takes memory that was filled and sealed in an earlier life of the service.
    pub(crate) fn set_head(&mut self, head: OwnedFd) {
        self.head = head;
    }

    /// Takes a file with the fast image of this model.
    pub(crate) fn set_kept(&mut self, kept: Option<OwnedFd>) {
        self.kept = kept;
    }

    /// The file with its fast image, if an earlier process kept one.
    pub(crate) fn kept(&self) -> Option<BorrowedFd<'_>> {
        self.kept.as_ref().map(AsFd::as_fd)
    }

    /// The memory of the fast image.
    pub(crate) fn head(&self) -> BorrowedFd<'_> {
        self.head.as_fd()
    }

    fn open_model(source: &ModelSource) -> Result<OwnedFd, ImageError> {
        match source {
            ModelSource::File(path) => {
                let open = |source| ImageError::Open { path: path.clone(), source };
                let kind = std::fs::metadata(path).map_err(open)?.file_type();
                // Opening a FIFO would wait for a writer.
                if kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_dir() {
                    return Err(ImageError::NotAFile { path: path.clone() });
                }
                let file = File::open(path).map_err(open)?;
                let metadata = file.metadata().map_err(open)?;
                if !metadata.is_file() {
                    return Err(ImageError::NotAFile { path: path.clone() });
                }
                if metadata.len() == 0 {
                    return Err(ImageError::Empty { path: path.clone() });
                }
                Ok(file.into())
            }
            ModelSource::BuiltIn(bytes) => sealed_memory(bytes).map_err(ImageError::Memory),
        }
    }
}

/// What a fast image was made of: the model's file, how it is read, and the program, each in the state it is in now.
pub(crate) fn made_of(config: &Config, image: &ModelImage) -> Option<String> {
    // The built-in model is in memory, new in each process, and part of the program.
    let model = if image.is_built_in() {
        "built-in".into()
    } else {
        FileState::from(&fstat(image.model()).ok()?).to_string()
    };
    let program = FileState::from(&stat("/proc/self/exe").ok()?);
    // Which parts the first worker makes also follows from the instruction set.
    Some(format!("{}.{}.{model}.{program}", config.model.head.name(), config.engine.isa))
}

/// Full, and nobody can change it any more.
pub(crate) fn is_whole(memory: &impl AsFd) -> bool {
    is_sealed(memory) == Ok(true) && fstat(memory).is_ok_and(|stat| stat.st_size > 0)
}

/// A descriptor of memory that nobody can change any more, opened read-only.
fn sealed_memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create(c"bitnetd-model", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    sealed::seal(&file)?;
    let mut path = OsString::from("/proc/self/fd/");
    path.push(file.as_raw_fd().to_string());
    // Without /proc the writable descriptor does as well: the seals hold.
    Ok(File::open(path).unwrap_or(file).into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_built_in_model_is_sealed_and_whole() {
        let image = ModelImage::open(&ModelSource::BuiltIn(b"GGUF and so on")).unwrap();
        let mut file = File::from(image.model().try_clone_to_owned().unwrap());
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "GGUF and so on");
        assert!(file.write_all(b"x").is_err() && file.set_len(3).is_err());
    }

    #[test]
    fn each_bad_file_has_its_exit_code() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty.gguf");
        std::fs::write(&empty, b"").unwrap();
        let cases = [
            (folder.path().join("none.gguf"), ExitCode::NoInput),
            (folder.path().to_owned(), ExitCode::NoInput),
            (PathBuf::from("/dev/null"), ExitCode::NoInput),
            (empty, ExitCode::Data),
        ];
        for (path, exit_code) in cases {
            let error = ModelImage::open(&ModelSource::File(path)).unwrap_err();
            assert_eq!(error.exit_code(), exit_code, "{error}");
        }
    }
}
