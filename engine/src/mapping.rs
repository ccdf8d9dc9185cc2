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
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{Mmap, MmapMut};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::pool::ThreadPool;

/// The start of every mapping is a multiple of this: one cache line, one AVX-512 register.
pub const MAPPING_ALIGNMENT_BYTES: usize = 64;

/// Memory that is mapped with huge pages, where the system has them, is so in whole multiples of this.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

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
    Shared(Aligned),
    Private(Mmap),
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

    /// Maps the whole of a memfd whose size is known. The descriptor is closed; the mapping stays.
    ///
    /// # Errors
    /// The system refuses.
    pub fn from_memory(memory: OwnedFd, n_bytes: u64) -> Result<Self, MappingError> {
        Self::map_bytes(&File::from(memory), "inherited memory".to_owned(), n_bytes)
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
        Ok(Self { bytes: Bytes::Private(copy.make_read_only().map_err(map_error)?) })
    }

    fn map(file: &File, name: String) -> Result<Self, MappingError> {
        let metadata = match file.metadata() {
            Ok(metadata) => metadata,
            Err(source) => return Err(MappingError::Map { name, n_bytes: 0, source }),
        };
        if !metadata.is_file() {
            return Err(MappingError::NotAFile { name });
        }
        Self::map_bytes(file, name, metadata.len())
    }

    fn map_bytes(file: &File, name: String, n_bytes: u64) -> Result<Self, MappingError> {
        if n_bytes == 0 {
            return Ok(Self { bytes: Bytes::Static(&[]) });
        }
        let length = usize::try_from(n_bytes).unwrap_or(usize::MAX);
        match Aligned::map(file, length, ProtFlags::PROT_READ) {
            Ok(mapped) => Ok(Self { bytes: Bytes::Shared(mapped) }),
            Err(source) => Err(MappingError::Map { name, n_bytes, source }),
        }
    }
}

/// Memory that this process shares with others and writes: a memfd, from its start.
pub struct MappingMut {
    mapped: Aligned,
}

impl MappingMut {
    /// Maps the first `n_bytes` of `memory`, which has as many.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(memory: impl AsFd, n_bytes: usize) -> Result<Self, MappingError> {
        let map = Aligned::map(memory, n_bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        let error = |source| MappingError::Map {
            name: "memory to share".to_owned(),
            n_bytes: n_bytes as u64,
            source,
        };
        Ok(Self { mapped: map.map_err(error)? })
    }

    /// Asks for huge pages under the whole ones of `range`, whose content stays; gives the bytes of those that the system would
    /// not give. All threads ask, each for some: most of the time goes into clearing them, and with a virtual machine into
    /// having them at all.
    ///
    /// # Panics
    /// If `range` is not inside.
    pub fn collapse(&mut self, pool: &ThreadPool, range: Range<usize>) -> usize {
        let range =
            range.start.next_multiple_of(HUGE_PAGE_BYTES)..range.end / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        if range.is_empty() {
            return 0;
        }
        let n_refused = AtomicUsize::new(0);
        let n_pages = range.len() / HUGE_PAGE_BYTES;
        let share = n_pages.div_ceil(pool.n_threads()) * HUGE_PAGE_BYTES;
        let (whole, rest) = self[range.clone()].split_at_mut(range.len() / share * share);
        pool.for_each_row_mut(whole, share, 1, &|_, _, bytes| {
            n_refused.fetch_add(collapse(bytes), Ordering::Relaxed);
        });
        n_refused.into_inner() + collapse(rest)
    }
}

/// Asks for huge pages under `bytes`, whose content stays: whole pages. Gives the bytes of those that it did not get.
fn collapse(bytes: &mut [u8]) -> usize {
    // A page that was never touched cannot be collapsed.
    bytes.chunks_mut(HUGE_PAGE_BYTES).for_each(|page| {
        let first = std::hint::black_box(page[0]);
        page[0] = std::hint::black_box(first);
    });
    // SAFETY: the bytes are mapped and borrowed by this call alone; the advice moves pages and changes no byte.
    let result = unsafe { libc::madvise(bytes.as_mut_ptr().cast(), bytes.len(), libc::MADV_COLLAPSE) };
    if result == 0 { 0 } else { bytes.len() }
}

impl Deref for MappingMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.mapped.bytes()
    }
}

impl DerefMut for MappingMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        let Aligned { start, n_bytes, .. } = self.mapped;
        // SAFETY: mapped for writing and owned (`new`); that no other process writes meanwhile is what its lock is for.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), n_bytes) }
    }
}

impl fmt::Debug for MappingMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappingMut({} bytes)", self.len())
    }
}

/// A shared mapping of a file that starts at a multiple of [`HUGE_PAGE_BYTES`], without which the hardware cannot
/// use huge pages.
struct Aligned {
    start: NonNull<u8>,
    n_bytes: usize,
    reserved: NonNull<libc::c_void>, // Address space around it.
    n_reserved: NonZeroUsize,
}

// SAFETY: it owns its mapping, which is bound to no thread; bytes are handed out by the rules of borrowing.
unsafe impl Send for Aligned {}
// SAFETY: as above.
unsafe impl Sync for Aligned {}

impl Aligned {
    fn map(file: impl AsFd, n_bytes: usize, protection: ProtFlags) -> io::Result<Self> {
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let length = NonZeroUsize::new(n_bytes).ok_or(io::ErrorKind::InvalidInput)?;
        // Room to shift the start by up to a huge page. It costs addresses, no memory.
        let n_reserved = length.checked_add(HUGE_PAGE_BYTES).ok_or_else(too_large)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the system chooses.
        let reserved = unsafe { mmap_anonymous(None, n_reserved, ProtFlags::PROT_NONE, flags)? };
        let address = reserved.addr().checked_add(HUGE_PAGE_BYTES - 1).ok_or_else(too_large)?;
        let address = NonZeroUsize::new(address.get() / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES);
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: it replaces a part of the reservation above, which nothing else uses. That the file does not
        // change while it is mapped for reading is asked of its owner (see the module's comment).
        let mapped = unsafe { mmap(address, length, protection, flags, file, 0) };
        match mapped {
            Ok(start) => Ok(Self { start: start.cast(), n_bytes, reserved, n_reserved }),
            Err(error) => {
                // SAFETY: the reservation above, of which nothing is in use.
                let _given_back = unsafe { munmap(reserved, n_reserved.get()) };
                Err(error.into())
            }
        }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `n_bytes` are mapped from `start` until `self` is dropped.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.n_bytes) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: the whole reservation, which `self` owns; slices of it borrow `self` and are gone.
        let _given_back = unsafe { munmap(self.reserved, self.n_reserved.get()) };
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Shared(mapped) => mapped.bytes(),
            Bytes::Private(mapped) => mapped,
            Bytes::Static(bytes) => bytes,
        }
    }
}

/// When the pages of locked memory come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockPages {
    /// All of them before [`lock`] returns.
    Now,
    /// Each as it is first touched.
    WhenTouched,
}

/// Keeps the pages of `memory` in memory until it is unmapped.
///
/// # Errors
/// Beyond the limit of locked memory, or there is not so much memory.
pub fn lock<T>(memory: &[T], pages: LockPages) -> io::Result<()> {
    let flags: libc::c_uint = match pages {
        LockPages::Now => 0,
        LockPages::WhenTouched => libc::MLOCK_ONFAULT,
    };
    // Not the C library's function: without flags that makes another call, which a filter of calls would have to know.
    // SAFETY: the range is that of a live slice; locking moves pages at most and changes no byte. For a range that is not
    // mapped the call would only fail.
    let result = unsafe { libc::syscall(libc::SYS_mlock2, memory.as_ptr(), size_of_val(memory), flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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
    use crate::pool::PoolOptions;

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
    fn shared_memory_is_aligned_for_huge_pages_and_seen_by_all() {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let memory = File::from(nix::sys::memfd::memfd_create(c"test", flags).unwrap());
        let n_bytes = 2 * HUGE_PAGE_BYTES + 100;
        memory.set_len(n_bytes as u64).unwrap();
        let mut written = MappingMut::new(&memory, n_bytes).unwrap();
        assert_eq!(written.as_ptr().align_offset(HUGE_PAGE_BYTES), 0);
        written[n_bytes - 1] = 7;
        written[HUGE_PAGE_BYTES] = 9;
        // Whether there are huge pages is up to the system; the content is not.
        let pool = ThreadPool::new(PoolOptions::unpinned(3)).unwrap();
        let n_refused = written.collapse(&pool, 0..n_bytes);
        assert!(n_refused <= n_bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES);
        assert_eq!(written.collapse(&pool, 1..HUGE_PAGE_BYTES), 0, "nothing whole, nothing to do");
        let read = Mapping::from_fd(memory.into()).unwrap();
        assert_eq!(read.as_ptr().align_offset(HUGE_PAGE_BYTES), 0);
        assert_eq!((read.len(), read[n_bytes - 1], read[HUGE_PAGE_BYTES], read[0]), (n_bytes, 7, 9, 0));
    }

    #[test]
    fn empty_is_empty() {
        assert!(Mapping::from_bytes([]).unwrap().is_empty());
    }
}
