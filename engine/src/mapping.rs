//! Read-only bytes of a model: a mapped file, a mapped descriptor, or bytes the program carries.
//!
//! Mapped files are shared: all processes that map the same file or memfd use the same pages (promise P2).
//!
//! What a mapping cannot protect against: a file that is cut by somebody while it is mapped gives SIGBUS on the
//! next touch of a lost page, and one that is overwritten in place changes under the reader. Replace a model
//! file by renaming a new one over it; a memfd can be sealed.
#![expect(unsafe_code, reason = "a file mapping is only as immutable as the file, which no type can promise")]

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut, MmapOptions};

/// The start of every mapping is a multiple of this: one cache line, one AVX-512 register.
pub const MAPPING_ALIGNMENT_BYTES: usize = 64;

/// Why bytes could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The file could not be opened.
    #[error("cannot open `{}`", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("`{name}` is not a regular file")]
    NotAFile {
        /// The path, or what stands for a descriptor.
        name: String,
    },
    /// The system refused the mapping.
    #[error("cannot map `{name}` ({n_bytes} bytes) into memory")]
    Map {
        /// The path, or what stands for a descriptor or for bytes.
        name: String,
        /// How much was to be mapped.
        n_bytes: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Read-only bytes that start at a multiple of [`MAPPING_ALIGNMENT_BYTES`].
pub struct Mapping {
    bytes: Bytes,
}

enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl Mapping {
    /// Maps the regular file at `path`.
    ///
    /// # Errors
    /// The file cannot be opened or mapped, or is not a regular file.
    pub fn open(path: &Path) -> Result<Self, MappingError> {
        let open_error = |source| MappingError::Open { path: path.to_owned(), source };
        // Asked before it is opened: opening a pipe waits for its other end.
        let metadata = std::fs::metadata(path).map_err(open_error)?;
        let name = path.display().to_string();
        if !metadata.is_file() {
            return Err(MappingError::NotAFile { name });
        }
        Self::map(&File::open(path).map_err(open_error)?, name)
    }

    /// Maps the whole of an open file or memfd. The descriptor is closed; the mapping stays.
    ///
    /// # Errors
    /// The descriptor is not that of a regular file or memfd, or cannot be mapped.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, MappingError> {
        Self::map(&File::from(fd), "inherited descriptor".to_owned())
    }

    /// Bytes that live as long as the program. They are copied only if they do not start on a boundary.
    ///
    /// # Errors
    /// No memory for the copy.
    pub fn from_static(bytes: &'static [u8]) -> Result<Self, MappingError> {
        if bytes.as_ptr().align_offset(MAPPING_ALIGNMENT_BYTES) == 0 {
            return Ok(Self { bytes: Bytes::Static(bytes) });
        }
        Self::from_bytes(bytes)
    }

    /// A private copy of `bytes`.
    ///
    /// # Errors
    /// No memory for the copy.
    pub fn from_bytes(bytes: impl AsRef<[u8]>) -> Result<Self, MappingError> {
        let bytes = bytes.as_ref();
        if bytes.is_empty() {
            return Ok(Self { bytes: Bytes::Static(&[]) });
        }
        let map_error = |source| MappingError::Map {
            name: "bytes in memory".to_owned(),
            n_bytes: bytes.len() as u64,
            source,
        };
        let mut copy = MmapMut::map_anon(bytes.len()).map_err(map_error)?;
        copy.copy_from_slice(bytes);
        Ok(Self { bytes: Bytes::Mapped(copy.make_read_only().map_err(map_error)?) })
    }

    fn map(file: &File, name: String) -> Result<Self, MappingError> {
        let metadata = match file.metadata() {
            Ok(metadata) => metadata,
            Err(source) => return Err(MappingError::Map { name, n_bytes: 0, source }),
        };
        if !metadata.is_file() {
            return Err(MappingError::NotAFile { name });
        }
        if metadata.len() == 0 {
            return Ok(Self { bytes: Bytes::Static(&[]) });
        }
        // SAFETY: the mapping is read-only and this type hands out shared slices only. That the file does not
        // change while it is mapped is asked of its owner (see the module's comment).
        match unsafe { MmapOptions::new().map(file) } {
            Ok(mapped) => Ok(Self { bytes: Bytes::Mapped(mapped) }),
            Err(source) => Err(MappingError::Map { name, n_bytes: metadata.len(), source }),
        }
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(mapped) => mapped,
            Bytes::Static(bytes) => bytes,
        }
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn file_descriptor_and_bytes_give_the_same_aligned_bytes() {
        let path = std::env::temp_dir().join(format!("bitnetd-mapping-{}", std::process::id()));
        let bytes: Vec<u8> = (0..=255).cycle().take(10_001).collect();
        File::create(&path).unwrap().write_all(&bytes).unwrap();
        let opened = Mapping::open(&path).unwrap();
        let inherited = Mapping::from_fd(File::open(&path).unwrap().into()).unwrap();
        std::fs::remove_file(&path).unwrap();
        for mapping in [opened, inherited, Mapping::from_bytes(&bytes).unwrap()] {
            assert_eq!(&mapping[..], &bytes[..]);
            assert_eq!(mapping.as_ptr().align_offset(MAPPING_ALIGNMENT_BYTES), 0);
        }
    }

    #[test]
    fn static_bytes_are_aligned_whatever_their_start() {
        static BYTES: [u8; 300] = [7; 300];
        for start in 0..65 {
            let mapping = Mapping::from_static(&BYTES[start..]).unwrap();
            assert_eq!(&mapping[..], &BYTES[start..]);
            assert_eq!(mapping.as_ptr().align_offset(MAPPING_ALIGNMENT_BYTES), 0);
        }
    }

    #[test]
    fn directories_and_devices_are_refused_by_name() {
        let directory = Mapping::open(Path::new("/")).unwrap_err();
        assert_eq!(directory.to_string(), "`/` is not a regular file");
        let device = Mapping::open(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(device.to_string(), "`/dev/zero` is not a regular file");
        let missing = Mapping::open(Path::new("/nowhere/model.gguf")).unwrap_err();
        assert_eq!(missing.to_string(), "cannot open `/nowhere/model.gguf`");
    }

    #[test]
    fn empty_is_empty() {
        assert!(Mapping::from_bytes([]).unwrap().is_empty());
    }
}
