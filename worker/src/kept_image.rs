//! The fast image that an earlier process kept on disk, read back a few megabytes at a time, by all threads.

use std::fs::File;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bitnetd_engine::Engine;
use bitnetd_engine::fast_image::{FastImage, FastImageError};
use bitnetd_engine::mapping::MappingMut;
use bitnetd_proto::kept::{Kept, KeptError, PIECE_BYTES};

/// Pieces that are read between two looks at the clock; huge pages are asked for as much memory at once.
const STEP_PIECES: usize = 16;

/// Why it is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("it cannot be read")]
    Kept(#[from] KeptError),
    #[error("it is none of this model")]
    Image(#[from] FastImageError),
}

/// An image on its way into memory.
#[derive(Debug)]
pub(crate) struct KeptReader {
    file: File,
    header: Kept,
    memory: MappingMut,
    wants_huge_pages: bool,
    n_refused: usize,
    n_read: usize,
}

impl KeptReader {
    /// From a file with this header into `memory`, which has the size of its content.
    pub(crate) fn new(file: File, header: Kept, memory: MappingMut, wants_huge_pages: bool) -> Self {
        Self { file, header, memory, wants_huge_pages, n_refused: 0, n_read: 0 }
    }

    /// Bytes of the image, and how many of them the system would not put into huge pages.
    pub(crate) fn huge_page_bytes(&self) -> (usize, usize) {
        (self.memory.len(), self.n_refused)
    }

    /// Reads for about `time`. True if it is whole.
    pub(crate) fn advance(&mut self, engine: &Engine, time: Duration) -> Result<bool, ReadError> {
        let until = Instant::now() + time;
        while self.n_read < self.memory.len() {
            let is_first = self.n_read == 0;
            self.read_step(engine)?;
            if is_first {
                FastImage::check(&self.memory[..self.n_read], self.memory.len(), engine.model())?;
            }
            if Instant::now() >= until {
                break;
            }
        }
        Ok(self.n_read == self.memory.len())
    }

    fn read_step(&mut self, engine: &Engine) -> Result<(), KeptError> {
        let range = self.n_read..self.memory.len().min(self.n_read + STEP_PIECES * PIECE_BYTES);
        self.n_refused += if self.wants_huge_pages {
            self.memory.collapse(engine.pool(), range.clone())
        } else {
            range.len()
        };
        let first = range.start / PIECE_BYTES;
        let bytes = &mut self.memory[range.clone()];
        self.header.read(&self.file, first, bytes)?;
        let failed = Mutex::new(None);
        let pieces: Vec<&[u8]> = bytes.chunks(PIECE_BYTES).collect();
        engine.pool().for_each_chunk(pieces.len(), 1, &|_, numbers| {
            for number in numbers {
                if let Err(error) = self.header.check(first + number, pieces[number])
                    && let Ok(mut failed) = failed.lock()
                {
                    *failed = Some(error);
                }
            }
        });
        if let Ok(Some(error)) = failed.into_inner() {
            return Err(error);
        }
        self.n_read = range.end;
        Ok(())
    }
}
