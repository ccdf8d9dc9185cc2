//! The fast image of the model: made by the first worker that gets to it, or read from disk, and mapped by all.
//!
//! The supervisor gives every worker the same anonymous memory, empty at first. Whoever holds the lock on it and finds
//! it unsealed makes the image, a little at a time beside its jobs, and seals it; a sealed memory is whole and can
//! never change again. A worker that dies in between loses the lock with its life, and the next one starts over.
//!
//! Tokens are the same with and without the image, so nobody waits for it: a worker is ready before, and takes the image up
//! when it is there.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitnetd_engine::Engine;
use bitnetd_engine::fast_image::{FastImage, FastImageBuilder, FastImageError, FastParts};
use bitnetd_engine::mapping::{LockPages, Mapping, MappingError, MappingMut, lock};
use bitnetd_proto::kept::Kept;
use bitnetd_proto::sealed::{is_sealed, try_seal};
use bitnetd_proto::worker_link::ImageState;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::kept_image::KeptReader;

/// Why there is no fast image.
#[derive(Debug, thiserror::Error)]
enum SharedImageError {
    #[error("cannot lock the shared memory")]
    Lock(#[source] Errno),
    #[error("cannot make it")]
    Make(#[from] FastImageError),
    #[error("cannot give the shared memory its size")]
    Size(#[source] io::Error),
    #[error("cannot seal the shared memory")]
    Seal(#[source] Errno),
    #[error("cannot map the shared memory")]
    Map(#[from] MappingError),
}

/// This worker's part in it.
#[derive(Debug)]
pub(crate) struct SharedImage {
    state: State,
    n_bytes: u64,
    huge_pages: HugePages,
    is_locked: bool,
    begun: Instant,
}

#[derive(Debug)]
enum State {
    /// Nobody has sealed it, as far as is known. The second file has one that was kept.
    Open(File, FastParts, Option<File>),
    /// This worker reads the one that was kept.
    Reading(File, FastParts, Box<KeptReader>),
    /// This worker is at it.
    Making(File, FastParts, Box<FastImageBuilder>),
    /// It is whole, made or read here, and not sealed yet: the kernel was busy with a page of it.
    Sealing(File, ImageState),
    /// Taken up, made here or not.
    Used(ImageState),
    /// Not wanted, or given up.
    Over,
}

/// Whether the image should lie in huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HugePages {
    /// If there are any.
    Auto,
    /// If not, somebody should know.
    On,
    Off,
}

/// What is left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Call again soon.
    Work,
    /// Another worker is at it.
    Wait,
    /// Nothing.
    Nothing,
}

impl SharedImage {
    /// An image of `n_bytes`; without parts, none. Nothing is mapped or made yet.
    pub(crate) fn new(
        (memory, kept): (OwnedFd, Option<OwnedFd>),
        (parts, n_bytes): (FastParts, u64),
        huge_pages: HugePages,
        is_locked: bool,
    ) -> Self {
        let is_any = parts.ternary || parts.head;
        let state =
            if is_any { State::Open(memory.into(), parts, kept.map(File::from)) } else { State::Over };
        Self { state, n_bytes, huge_pages, is_locked, begun: Instant::now() }
    }

    /// How far it is, for the supervisor.
    pub(crate) fn state(&self) -> ImageState {
        match &self.state {
            State::Open(..) => ImageState::Waiting,
            State::Reading(..) | State::Making(..) | State::Sealing(..) => ImageState::Making,
            State::Used(state) => *state,
            State::Over => ImageState::None,
        }
    }

    /// Bytes it takes; 0 if there is none.
    pub(crate) fn n_bytes(&self) -> u64 {
        if matches!(self.state, State::Over) { 0 } else { self.n_bytes }
    }

    /// True if it takes no more than reading a file, or sealing what is there.
    pub(crate) fn is_kept(&self) -> bool {
        matches!(self.state, State::Open(_, _, Some(_)) | State::Reading(..) | State::Sealing(..))
    }

    /// Works on it for about `time`, if there is anything to do.
    pub(crate) fn advance(&mut self, engine: &mut Engine, time: Duration) -> Left {
        let state = std::mem::replace(&mut self.state, State::Over);
        let (state, left) = match self.next(state, engine, time) {
            Ok(next) => next,
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(%error, "no fast image: decoding reads the model file as it is");
                (State::Over, Left::Nothing)
            }
        };
        self.state = state;
        left
    }

    fn next(
        &mut self,
        state: State,
        engine: &mut Engine,
        time: Duration,
    ) -> Result<(State, Left), SharedImageError> {
        match state {
            State::Used(_) | State::Over => Ok((state, Left::Nothing)),
            State::Open(file, parts, kept) => {
                if is_sealed(&file).map_err(SharedImageError::Seal)? {
                    return self.take_up(file, ImageState::Mapped, engine);
                }
                if !try_lock(&file)? {
                    return Ok((State::Open(file, parts, kept), Left::Wait));
                }
                // It may have been sealed, and unlocked, since.
                if is_sealed(&file).map_err(SharedImageError::Seal)? {
                    return self.take_up(file, ImageState::Mapped, engine);
                }
                let model = Arc::clone(engine.model());
                let n_bytes = FastImageBuilder::n_bytes(&model, parts)?;
                let kept = kept.and_then(|kept| opened(kept, n_bytes));
                // A predecessor may have died while it was writing.
                file.set_len(0)
                    .and_then(|()| file.set_len(n_bytes as u64))
                    .map_err(SharedImageError::Size)?;
                let memory = MappingMut::new(&file, n_bytes)?;
                if let Some((kept, header)) = kept {
                    let reader = KeptReader::new(kept, header, memory, self.huge_pages != HugePages::Off);
                    return Ok((State::Reading(file, parts, Box::new(reader)), Left::Work));
                }
                let mut builder = FastImageBuilder::new(model, parts, memory)?;
                if self.huge_pages == HugePages::Off {
                    builder.without_huge_pages();
                }
                Ok((State::Making(file, parts, Box::new(builder)), Left::Work))
            }
            State::Making(file, parts, mut builder) => {
                if !builder.advance(engine.kernels(), engine.pool(), time)? {
                    return Ok((State::Making(file, parts, builder), Left::Work));
                }
                self.tell(builder.huge_page_bytes(), "the fast image is made");
                drop(builder);
                self.seal(file, ImageState::Made, engine)
            }
            State::Sealing(file, origin) => self.seal(file, origin, engine),
            State::Reading(file, parts, mut reader) => match reader.advance(engine, time) {
                Ok(false) => Ok((State::Reading(file, parts, reader), Left::Work)),
                Ok(true) => {
                    self.tell(reader.huge_page_bytes(), "the fast image is read from disk");
                    drop(reader);
                    self.seal(file, ImageState::Read, engine)
                }
                Err(error) => {
                    tracing::warn!(
                        error = chain(&error),
                        "what was kept on disk is of no use: the fast image is made anew"
                    );
                    drop(reader);
                    self.next(State::Open(file, parts, None), engine, time)
                }
            },
        }
    }

    /// Seals what is whole, and takes it up. On a machine that is short of CPU time the kernel can be busy with a page for long, so it
    /// is not waited for: steps go on, and it is asked again before one of the next.
    fn seal(
        &mut self,
        file: File,
        origin: ImageState,
        engine: &mut Engine,
    ) -> Result<(State, Left), SharedImageError> {
        if try_seal(&file).map_err(SharedImageError::Seal)? {
            return self.take_up(file, origin, engine);
        }
        tracing::debug!("the kernel is busy with the fast image: it is sealed later");
        Ok((State::Sealing(file, origin), Left::Wait))
    }

    fn tell(&self, (n_bytes, n_refused): (usize, usize), what: &'static str) {
        let in_huge_pages = n_bytes - n_refused;
        let seconds = self.begun.elapsed().as_secs_f64();
        tracing::info!(n_bytes, in_huge_pages, seconds, "{what}");
        if self.huge_pages == HugePages::On && n_refused > 0 {
            tracing::warn!(n_bytes = n_refused, "not in huge pages: the system had none to give");
        }
    }

    /// From memory that is sealed. It may have other parts than this worker would have made: what it cannot use it does not read.
    fn take_up(
        &mut self,
        file: File,
        origin: ImageState,
        engine: &mut Engine,
    ) -> Result<(State, Left), SharedImageError> {
        // Made by another process, perhaps: the size is looked at before it is touched.
        self.n_bytes = (&file).seek(SeekFrom::End(0)).map_err(SharedImageError::Size)?;
        // Closing the file gives the lock back as well.
        let mapping = Mapping::from_memory(file.into(), self.n_bytes)?;
        if self.is_locked
            && let Err(error) = lock(&mapping, LockPages::Now)
        {
            tracing::warn!(%error, n_bytes = self.n_bytes, "the fast image is not locked in memory");
        }
        engine.adopt(FastImage::new(mapping, engine.model())?);
        tracing::debug!(seconds = self.begun.elapsed().as_secs_f64(), "the fast image is in use");
        Ok((State::Used(origin), Left::Nothing))
    }
}

/// A kept image with its header, if it has the size that one of this model has.
fn opened(kept: File, n_bytes: usize) -> Option<(File, Kept)> {
    let error = match Kept::open(&kept) {
        Ok(header) if header.n_bytes() == n_bytes => return Some((kept, header)),
        Ok(header) => format!("it has {} bytes, expected {n_bytes}", header.n_bytes()),
        Err(error) => chain(&error),
    };
    tracing::warn!(error, "what was kept on disk is of no use: the fast image is made anew");
    None
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Takes the lock on the whole file if nobody has it. It belongs to the process, so it excludes workers that share one
/// open file, and goes when the process does.
fn try_lock(file: &File) -> Result<bool, SharedImageError> {
    let whole = |errno| SharedImageError::Lock(errno);
    let range = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).map_err(|_| whole(Errno::EINVAL))?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(|_| whole(Errno::EINVAL))?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_SETLK(&range)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(error) => Err(whole(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use bitnetd_engine::engine::EngineOptions;
    use bitnetd_engine::gguf::Gguf;
    use bitnetd_engine::kernels::KernelSet;
    use bitnetd_engine::kv::KvType;
    use bitnetd_engine::model::Model;
    use bitnetd_engine::pool::Wait;
    use bitnetd_engine::speculation::Speculation;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn engine() -> Engine {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf");
        let gguf = Gguf::parse(Arc::new(Mapping::open(&path).unwrap())).unwrap();
        let options = EngineOptions {
            cpus: vec![None],
            wait: Wait::Hybrid,
            thread_name: "test".into(),
            kernels: KernelSet::detect(),
            n_ctx: None,
            max_batch: 1,
            prefill_chunk: 16,
            prefill_time: Duration::from_millis(300),
            speculation: Speculation::Off,
            kv_type: KvType::F16,
        };
        Engine::new(Arc::new(Model::load(Arc::new(gguf)).unwrap()), options).unwrap()
    }

    /// Somebody else's mapping keeps the kernel from sealing, as a page in use does.
    #[test]
    fn a_memory_that_is_busy_for_long_is_sealed_later() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let memory = memfd_create(c"test", flags).unwrap();
        let ours = memory.try_clone().unwrap();
        let parts = FastParts { ternary: true, head: true };
        let mut engine = engine();
        let mut image = SharedImage::new((memory, None), (parts, 0), HugePages::Off, false);
        assert_eq!(image.advance(&mut engine, Duration::ZERO), Left::Work, "it is begun");
        let mapping = MappingMut::new(&ours, 4096).unwrap();
        let mut left = Left::Work;
        while left == Left::Work {
            left = image.advance(&mut engine, Duration::from_millis(5));
        }
        for _ in 0..3 {
            assert_eq!((left, image.state()), (Left::Wait, ImageState::Making));
            left = image.advance(&mut engine, Duration::from_millis(5));
        }
        drop(mapping);
        assert_eq!(image.advance(&mut engine, Duration::from_millis(5)), Left::Nothing);
        assert_eq!(image.state(), ImageState::Made);
        assert!(is_sealed(&ours).unwrap());
    }
}
