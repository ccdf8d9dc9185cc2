//! A sealed memory kept in a file: what one process wrote, a later one reads back whole or not at all.
//!
//! Layout: [`HEADER_BYTES`] (magic, length of the content, CRC-32 of the rest of the header, CRC-32 of each piece of
//! [`PIECE_BYTES`], zeros), then the content. The header is written last, so that a file that was cut short has none. Checksums
//! (CRC-32 of IEEE 802.3) tell damage; who may write the file is the business of its directory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// Content that has a checksum of its own.
pub const PIECE_BYTES: usize = 4 << 20;

/// Where the content begins.
pub const HEADER_BYTES: usize = 64 << 10;

const MAGIC: [u8; 8] = *b"bndkept1";
const FIXED_BYTES: usize = 20;
const PIECES_MAX: usize = (HEADER_BYTES - FIXED_BYTES) / 4;

/// Why a file cannot be read back.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// It is of another kind or version, or was not written to its end.
    #[error("it is no kept memory, or was not written to its end")]
    Foreign,
    /// A piece is not what was written.
    #[error("bytes {} to {} are damaged", .0.start, .0.end)]
    Damaged(Range<usize>),
    /// It cannot be written: there is a limit to its length.
    #[error("{0} bytes are more than {max} that a kept file holds", max = PIECES_MAX * PIECE_BYTES)]
    TooLong(usize),
    /// The system refuses.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What is in a file, and the checksums of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    n_bytes: usize,
    checksums: Vec<u32>,
}

impl Kept {
    /// Reads the header of `file`.
    ///
    /// # Errors
    /// [`KeptError::Foreign`], or the system refuses.
    pub fn open(file: &File) -> Result<Self, KeptError> {
        let mut header = vec![0; HEADER_BYTES];
        match file.read_exact_at(&mut header, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(KeptError::Foreign),
            other => other?,
        }
        Self::decode(&header).ok_or(KeptError::Foreign)
    }

    fn decode(header: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
        let n_bytes = u64::from_le_bytes(header.get(8..16)?.try_into().ok()?);
        let n_bytes = usize::try_from(n_bytes).ok().filter(|n| *n <= PIECES_MAX * PIECE_BYTES)?;
        let n_pieces = n_bytes.div_ceil(PIECE_BYTES);
        let table = header.get(FIXED_BYTES..FIXED_BYTES + 4 * n_pieces)?;
        let is_whole = header.starts_with(&MAGIC) && u32_at(16) == Some(crc32fast::hash(table));
        let checksums = (0..n_pieces).map(|piece| u32_at(FIXED_BYTES + 4 * piece)).collect::<Option<_>>()?;
        is_whole.then_some(Self { n_bytes, checksums })
    }

    fn encode(&self) -> Vec<u8> {
        let table: Vec<u8> = self.checksums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        let mut header = MAGIC.to_vec();
        header.extend((self.n_bytes as u64).to_le_bytes());
        header.extend(crc32fast::hash(&table).to_le_bytes());
        header.extend(table);
        header.resize(HEADER_BYTES, 0);
        header
    }

    /// Length of the content.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Fills `bytes` from piece number `first` on, unchecked. In one go: a system reads ahead for who reads in sequence.
    ///
    /// # Errors
    /// [`KeptError::Damaged`] if there is not so much, or the system refuses.
    pub fn read(&self, file: &File, first: usize, bytes: &mut [u8]) -> Result<(), KeptError> {
        let start = first * PIECE_BYTES;
        match file.read_exact_at(bytes, (HEADER_BYTES + start) as u64) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(KeptError::Damaged(start..start + bytes.len()))
            }
            other => Ok(other?),
        }
    }

    /// Looks whether `bytes` are piece number `piece`.
    ///
    /// # Errors
    /// [`KeptError::Damaged`].
    pub fn check(&self, piece: usize, bytes: &[u8]) -> Result<(), KeptError> {
        let start = piece * PIECE_BYTES;
        let range = start..self.n_bytes.min(start + PIECE_BYTES);
        let is_right =
            bytes.len() == range.len() && self.checksums.get(piece) == Some(&crc32fast::hash(bytes));
        if is_right { Ok(()) } else { Err(KeptError::Damaged(range)) }
    }

    /// Writes all of `memory` to `file`, which is empty.
    ///
    /// # Errors
    /// [`KeptError::TooLong`], or the system refuses, such as for want of space.
    pub fn write(memory: &File, file: &File) -> Result<Self, KeptError> {
        let n_bytes = usize::try_from(memory.metadata()?.len()).unwrap_or(usize::MAX);
        if n_bytes > PIECES_MAX * PIECE_BYTES {
            return Err(KeptError::TooLong(n_bytes));
        }
        let mut kept = Self { n_bytes, checksums: Vec::new() };
        let mut piece = vec![0; PIECE_BYTES.min(n_bytes)];
        for start in (0..n_bytes).step_by(PIECE_BYTES) {
            let piece = &mut piece[..PIECE_BYTES.min(n_bytes - start)];
            memory.read_exact_at(piece, start as u64)?;
            kept.checksums.push(crc32fast::hash(piece));
            file.write_all_at(piece, (HEADER_BYTES + start) as u64)?;
        }
        file.write_all_at(&kept.encode(), 0)?;
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn read(file: &File) -> Result<Vec<u8>, KeptError> {
        let kept = Kept::open(file)?;
        let mut bytes = vec![0; kept.n_bytes()];
        kept.read(file, 0, &mut bytes)?;
        for (piece, bytes) in bytes.chunks(PIECE_BYTES).enumerate() {
            kept.check(piece, bytes)?;
        }
        Ok(bytes)
    }

    #[test]
    fn what_was_written_is_read_back() {
        for n_bytes in [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 77] {
            let content: Vec<u8> = (0_u8..251).cycle().take(n_bytes).collect();
            let file = file_of(&[]);
            let kept = Kept::write(&file_of(&content), &file).unwrap();
            assert_eq!(Kept::open(&file).unwrap(), kept);
            assert!(read(&file).unwrap() == content, "{n_bytes} bytes");
        }
    }

    #[test]
    fn a_changed_bit_and_a_cut_are_noticed_wherever_they_are() {
        let content = vec![7; PIECE_BYTES + 1000];
        let file = file_of(&[]);
        Kept::write(&file_of(&content), &file).unwrap();
        let mut byte = [0];
        for at in [0, 9, 17, FIXED_BYTES, FIXED_BYTES + 5, HEADER_BYTES, HEADER_BYTES + content.len() - 1] {
            file.read_exact_at(&mut byte, at as u64).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at as u64).unwrap();
            assert!(matches!(read(&file), Err(KeptError::Foreign | KeptError::Damaged(_))), "byte {at}");
            file.write_all_at(&byte, at as u64).unwrap();
        }
        assert!(read(&file).is_ok());
        for n_bytes in [HEADER_BYTES + content.len() - 1, HEADER_BYTES, HEADER_BYTES - 1, 3, 0] {
            file.set_len(n_bytes as u64).unwrap();
            assert!(matches!(read(&file), Err(KeptError::Foreign | KeptError::Damaged(_))), "{n_bytes} left");
        }
    }

    #[test]
    fn a_file_without_its_header_is_foreign() {
        // As a writer leaves it that was stopped before its end.
        let file = file_of(&[0; HEADER_BYTES]);
        file.write_all_at(&[1; 100], HEADER_BYTES as u64).unwrap();
        assert!(matches!(Kept::open(&file), Err(KeptError::Foreign)));
    }
}
