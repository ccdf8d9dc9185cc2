//! A position in the file that cannot leave it: the only place that turns lengths from the file into slices.

use std::ops::Range;

use super::GgufError;

/// Reads forward through `bytes`.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize, // Invariant: at <= bytes.len().
}

/// The file ends before what is read.
#[derive(Debug)]
pub(super) struct Cut {
    offset: u64,
    needed: u64,
    available: u64,
}

impl Cut {
    /// Names what was being read.
    pub(super) fn inside(self, what: impl Into<String>) -> GgufError {
        let Self { offset, needed, available } = self;
        GgufError::Cut { what: what.into(), offset, needed, available }
    }
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next `n` bytes, as a range of the file.
    pub(super) fn take(&mut self, n: u64) -> Result<Range<usize>, Cut> {
        let cut = Cut { offset: self.at as u64, needed: n, available: self.left() };
        let Ok(n) = usize::try_from(n) else { return Err(cut) };
        if n > self.bytes.len() - self.at {
            return Err(cut);
        }
        let start = self.at;
        self.at += n;
        Ok(start..self.at)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Cut> {
        let range = self.take(N as u64)?;
        let mut array = [0; N];
        array.copy_from_slice(&self.bytes[range]);
        Ok(array)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Cut> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Cut> {
        self.array().map(u64::from_le_bytes)
    }
}
