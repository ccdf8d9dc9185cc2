//! Weights as indices of tables: a byte for four columns of a row, a word for a batch of 32.
//!
//! A byte of `I2_S` holds the codes of four columns, 32 apart, at two bits each; its index is the number whose digits to
//! the base 3 they are. Words of the same batch of neighbouring rows lie side by side.

use super::{BATCH_COLS, transposed};

/// Bytes of a row that are brought into codes at once.
pub(super) const LINE_BYTES: usize = 64;

/// Words of them.
pub(super) const LINE_WORDS: usize = LINE_BYTES / size_of::<u64>();

/// Columns of them.
pub(super) const LINE_COLS: usize = LINE_WORDS * BATCH_COLS;

/// Rows whose words of a batch fill a cache line.
const TILE_ROWS: usize = 64 / size_of::<u64>();

/// The weights of some rows at some columns.
#[derive(Default)]
pub(super) struct Codes {
    words: Vec<u64>, // (LINE_WORDS, stride)
    stride: usize,
}

impl Codes {
    /// Makes room for so many rows.
    pub(super) fn reset(&mut self, n_rows: usize) {
        // An odd number of cache lines: the batches must not all fall on the same places of a cache.
        self.stride = n_rows.next_multiple_of(2 * TILE_ROWS) + TILE_ROWS;
        if self.words.len() < LINE_WORDS * self.stride {
            self.words.resize(LINE_WORDS * self.stride, 0);
        }
    }

    /// The words of a batch, for some rows.
    #[inline(always)]
    pub(super) fn batch(&self, batch: usize, n_rows: usize) -> &[u64] {
        &self.words[batch * self.stride..][..n_rows]
    }

    /// Brings what `bytes`, rows of `row_bytes`, have from byte `start` on into codes, from row `first` on. Weights that
    /// are none of -1, 0, 1 become 1 and are told to `more`: row and column.
    #[inline(always)]
    pub(super) fn fill(
        &mut self,
        (bytes, row_bytes): (&[u8], usize),
        start: usize,
        first: usize,
        mut more: impl FnMut(usize, usize),
    ) {
        let n_words = (row_bytes - start).min(LINE_BYTES) / size_of::<u64>();
        let mut seen = [0; TILE_ROWS];
        let tiles = bytes.chunks_exact(TILE_ROWS * row_bytes);
        let n_tiles = if n_words == LINE_WORDS { tiles.len() } else { 0 };
        for (first, rows) in (first..).step_by(TILE_ROWS).zip(tiles.take(n_tiles)) {
            let mut lines = [[0; LINE_WORDS]; TILE_ROWS];
            for (line, bytes) in lines.iter_mut().zip(rows.chunks_exact(row_bytes)) {
                let bytes: &[u8; LINE_BYTES] = bytes[start..].first_chunk().unwrap_or(&[0; LINE_BYTES]);
                for (word, bytes) in line.iter_mut().zip(bytes.as_chunks().0) {
                    *word = u64::from_le_bytes(*bytes);
                }
            }
            for (word, mut words) in transposed(&lines).into_iter().enumerate() {
                for (word, seen) in words.iter_mut().zip(&mut seen) {
                    *seen |= threes(*word);
                    *word = indices(*word);
                }
                if let Some(place) = self.words[word * self.stride + first..].first_chunk_mut() {
                    *place = words;
                }
            }
        }
        let rest = bytes[n_tiles * TILE_ROWS * row_bytes..].chunks_exact(row_bytes);
        for (row, bytes) in (first + n_tiles * TILE_ROWS..).zip(rest) {
            for (word, bytes) in bytes[start..].as_chunks().0.iter().take(n_words).enumerate() {
                let codes = u64::from_le_bytes(*bytes);
                seen[0] |= threes(codes);
                self.words[word * self.stride + row] = indices(codes);
            }
        }
        if seen.iter().any(|seen| *seen != 0) {
            self.repair((bytes, row_bytes), start, first, &mut more);
        }
    }

    /// Does what [`Self::fill`] does with codes of 3.
    #[cold]
    fn repair(
        &mut self,
        (bytes, row_bytes): (&[u8], usize),
        start: usize,
        first: usize,
        more: &mut dyn FnMut(usize, usize),
    ) {
        for (row, bytes) in (first..).zip(bytes.chunks_exact(row_bytes)) {
            for (word, bytes) in bytes[start..].as_chunks().0.iter().take(LINE_WORDS).enumerate() {
                let codes = u64::from_le_bytes(*bytes);
                let threes = threes(codes);
                self.words[word * self.stride + row] = indices(codes - threes);
                for bit in (0..u64::BITS as usize).step_by(2).filter(|bit| threes >> bit & 1 != 0) {
                    let (byte, digit) = (start + word * size_of::<u64>() + bit / 8, 3 - bit % 8 / 2);
                    more(row, byte / 32 * 128 + 32 * digit + byte % 32);
                }
            }
        }
    }
}

/// The lower bits of codes that are 3.
#[inline(always)]
fn threes(codes: u64) -> u64 {
    codes & (codes >> 1) & 0x5555_5555_5555_5555
}

/// Of eight bytes of four codes, eight numbers with the codes as digits to the base 3, the lowest bits lowest.
#[inline(always)]
fn indices(codes: u64) -> u64 {
    const PAIRS: u64 = 0x3333_3333_3333_3333;
    const QUADS: u64 = 0x0f0f_0f0f_0f0f_0f0f;
    let high = (codes >> 2) & PAIRS;
    let pairs = (codes & PAIRS) + high + (high << 1); // At most 8, with a code 3 at most 12, in each half of a byte.
    let high = (pairs >> 4) & QUADS;
    (pairs & QUADS) + high + (high << 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_has_the_codes_as_digits() {
        for (codes, index) in
            [(0b00_00_00_00, 0), (0b10_10_10_10, 80), (0b01_00_10_01, 34), (0b00_01_00_00, 9)]
        {
            assert_eq!(indices(codes << 56 | codes), index << 56 | index);
        }
    }
}
