//! A ternary matrix as indices of tables: what up to eight tokens read of it, and a part of the rows with many.
//!
//! Three weights have 27 values, and what they add to the sum of a row is one of 27 numbers that are the same for all
//! rows: a table of 32 sums of 16 bits, one register. So a weight is not unpacked and multiplied; three of them are an
//! index, and one instruction looks up 32 rows at once. Not a format of files: matrices are packed from `I2_S` once,
//! into memory that workers share.
//!
//! Columns are counted in the order in which activations lie in memory ([`super::quantized_rows`]), 48 to a strip; past the
//! last there are codes 0 and no activations. An index is `c0 + 3 c1 + 9 c2` with the codes (weight + 1) of three columns, 5
//! bits. The 16 indices of a row in a strip are five words of 16 bits (1.67 bits a weight): three from the lowest bit on in each, and bit `i`
//! of the last one in bit 15 of word `i`.
//!
//! ```text
//! [chunk of 5 strips][group of 128 rows][strip][word of 5][row], u16
//! ```
//!
//! The last chunk has fewer strips. Rows past the last have indices 0. A chunk is what sums of 16 bits hold: 240 columns.

use super::quantized_rows::{BLOCK_COLS, BLOCK_LINES};
use crate::ternary::{TernaryFormat, TernaryMatrix};

/// Rows of a group: four registers of 16-bit lanes.
pub(super) const GROUP_ROWS: usize = 128;

/// Columns of an index.
pub(super) const INDEX_COLS: usize = 3;

/// Indices of a row in a strip.
pub(super) const STRIP_INDICES: usize = 16;

/// Columns of a strip.
pub(super) const STRIP_COLS: usize = STRIP_INDICES * INDEX_COLS;

/// Words of a row in a strip.
pub(super) const STRIP_WORDS: usize = 5;

/// Strips whose sums are sums of 16 bits.
pub(super) const CHUNK_STRIPS: usize = 5;

/// Activations may be -128.
const _: () = assert!(CHUNK_STRIPS * STRIP_COLS * 128 <= i16::MAX as usize);

/// Places of a line of activations, and bytes of a block of `I2_S`.
const LINE_PLACES: usize = 64;

/// 64 bytes, a register.
pub(super) type Register = [u8; 64];

/// Registers of a word of a group.
pub(super) const WORD_REGISTERS: usize = GROUP_ROWS * size_of::<u16>() / size_of::<Register>();

/// Bytes of a strip of a group.
pub(crate) const STRIP_BYTES: usize = STRIP_WORDS * WORD_REGISTERS * size_of::<Register>();

/// More columns could overflow the sums.
const COLS_MAX: usize = 1 << 20;

/// A matrix as indices.
#[derive(Clone, Copy)]
pub struct LookupMatrix<'a> {
    bytes: &'a [u8],
    n_rows: usize,
    n_cols: usize,
}

impl std::fmt::Debug for LookupMatrix<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LookupMatrix({} x {})", self.n_rows, self.n_cols)
    }
}

impl<'a> LookupMatrix<'a> {
    /// Bytes of a matrix, a whole number of strips.
    #[must_use]
    pub fn bytes_of(n_rows: usize, n_cols: usize) -> usize {
        n_rows.div_ceil(GROUP_ROWS) * n_strips(n_cols) * STRIP_BYTES
    }

    /// The matrix in `bytes`, if they are as many as it takes, and its sums cannot overflow.
    #[must_use]
    pub fn new(bytes: &'a [u8], n_rows: usize, n_cols: usize) -> Option<Self> {
        let is_whole = Self::bytes_of(n_rows, n_cols) == bytes.len();
        (is_whole && n_cols <= COLS_MAX).then_some(Self { bytes, n_rows, n_cols })
    }

    /// Number of outputs.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Number of inputs.
    #[must_use]
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Groups of rows.
    pub(super) fn n_groups(&self) -> usize {
        self.n_rows.div_ceil(GROUP_ROWS)
    }

    /// Chunks of columns.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "no other instruction set has this product")
    )]
    pub(super) fn n_chunks(&self) -> usize {
        n_strips(self.n_cols).div_ceil(CHUNK_STRIPS)
    }

    /// The strips of a chunk in a group of rows.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "no other instruction set has this product")
    )]
    #[inline]
    pub(super) fn run(&self, chunk: usize, group: usize) -> &'a [[u8; STRIP_BYTES]] {
        let strips = self.bytes.as_chunks().0;
        let first = chunk * CHUNK_STRIPS;
        let n = CHUNK_STRIPS.min(n_strips(self.n_cols) - first);
        &strips[first * self.n_groups() + group * n..][..n]
    }

    /// Packs strip `item` of an `I2_S` matrix, counted as they lie in memory. False if a code is 3, which is no weight.
    ///
    /// # Panics
    /// If the matrix is not `I2_S`, has no such strip, or `packed` is not of its length.
    #[must_use]
    pub fn pack_strip(matrix: &TernaryMatrix<'_>, item: usize, packed: &mut [u8]) -> bool {
        assert_eq!(matrix.format(), TernaryFormat::I2S, "format of what is packed");
        assert_eq!(packed.len(), STRIP_BYTES, "bytes of a strip");
        let (n_groups, n_strips) = (matrix.n_rows().div_ceil(GROUP_ROWS), n_strips(matrix.n_cols()));
        assert!(item < n_groups * n_strips, "strip {item} of {matrix:?}");
        let first = item / (CHUNK_STRIPS * n_groups) * CHUNK_STRIPS;
        let n = CHUNK_STRIPS.min(n_strips - first);
        let in_chunk = item - first * n_groups;
        let (group, strip) = (in_chunk / n, first + in_chunk % n);
        packed.fill(0);
        let mut is_valid = true;
        let rows = group * GROUP_ROWS..matrix.n_rows().min((group + 1) * GROUP_ROWS);
        for (i, row) in rows.enumerate() {
            let blocks = &matrix.blocks()[row * matrix.row_bytes()..][..matrix.row_bytes()];
            let codes = codes_of(blocks, strip);
            // A code 3 has both bits set.
            is_valid &= codes.iter().fold(0, |both, code| both | (code & (code >> 1))) == 0;
            for (word, value) in words_of(&codes).into_iter().enumerate() {
                let place = (word * GROUP_ROWS + i) * size_of::<u16>();
                packed[place..place + size_of::<u16>()].copy_from_slice(&value.to_le_bytes());
            }
        }
        is_valid
    }
}

/// Strips of so many columns, which the activations have in whole blocks.
fn n_strips(n_cols: usize) -> usize {
    n_cols.next_multiple_of(BLOCK_COLS).div_ceil(STRIP_COLS)
}

/// The codes of a row at the places of a strip; 0 where there are none.
fn codes_of(blocks: &[u8], strip: usize) -> [u8; STRIP_COLS] {
    let first = strip * STRIP_COLS;
    // A strip touches two lines at most.
    let mut codes = [0; 2 * LINE_PLACES];
    for (line, codes) in (first / LINE_PLACES..).zip(codes.as_chunks_mut().0) {
        let bytes = &blocks[blocks.len().min(line / BLOCK_LINES * LINE_PLACES)..];
        // The last block may be a half, and there may be none.
        let mut whole = [0; LINE_PLACES];
        let bytes = bytes.first_chunk().unwrap_or_else(|| {
            whole[..bytes.len()].copy_from_slice(bytes);
            &whole
        });
        // Shifts by constants are vector instructions.
        match line % BLOCK_LINES {
            0 => shift::<6>(bytes, codes),
            1 => shift::<4>(bytes, codes),
            2 => shift::<2>(bytes, codes),
            _ => shift::<0>(bytes, codes),
        }
    }
    let mut own = [0; STRIP_COLS];
    own.copy_from_slice(&codes[first % LINE_PLACES..][..STRIP_COLS]);
    own
}

#[inline(always)]
fn shift<const SHIFT: u32>(bytes: &[u8; LINE_PLACES], codes: &mut [u8; LINE_PLACES]) {
    for (code, byte) in codes.iter_mut().zip(bytes) {
        *code = byte >> SHIFT & 3;
    }
}

/// Sixteen indices in five words.
fn words_of(codes: &[u8; STRIP_COLS]) -> [u16; STRIP_WORDS] {
    let mut indices = [0; STRIP_INDICES];
    for (index, codes) in indices.iter_mut().zip(codes.as_chunks::<INDEX_COLS>().0) {
        *index = u16::from(codes[0] + 3 * codes[1] + 9 * codes[2]) & 31;
    }
    let last = indices[STRIP_INDICES - 1];
    let mut words = [0; STRIP_WORDS];
    for (i, (word, three)) in words.iter_mut().zip(indices.as_chunks::<3>().0).enumerate() {
        *word = three[0] | three[1] << 5 | three[2] << 10 | (last >> i & 1) << 15;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ternary::i2_s_trailer;

    #[test]
    fn indices_lie_where_the_layout_says_and_a_code_three_is_found() {
        // 129 rows of 384 columns: two groups, of 512 places 11 strips, three chunks.
        let mut data = vec![0x55; 129 * 96];
        data[96] = 0x98; // Row 1, places 0, 64, 128 and 192 have codes 2, 1, 2 and 0.
        data.extend(i2_s_trailer(1.0));
        let matrix = TernaryMatrix::new(TernaryFormat::I2S, &data, 129, 384).unwrap();
        assert_eq!(LookupMatrix::bytes_of(129, 384), 2 * 11 * STRIP_BYTES);
        let mut packed = vec![0xff; 2 * 11 * STRIP_BYTES];
        for (item, packed) in packed.chunks_exact_mut(STRIP_BYTES).enumerate() {
            assert!(LookupMatrix::pack_strip(&matrix, item, packed), "strip {item}");
        }
        let lookup = LookupMatrix::new(&packed, 129, 384).unwrap();
        assert_eq!((lookup.n_groups(), lookup.n_chunks()), (2, 3));
        assert_eq!([0, 1, 2].map(|chunk| lookup.run(chunk, 1).len()), [5, 5, 1]);
        let word = |group: usize, strip: usize, word: usize, row: usize| {
            let place = (word * GROUP_ROWS + row) * 2;
            let strips = lookup.run(strip / CHUNK_STRIPS, group);
            u16::from_le_bytes(*strips[strip % CHUNK_STRIPS][place..].first_chunk().unwrap())
        };
        // Index 13 throughout; its bits, the lowest first, are the highest ones of the five words.
        let plain = 13 | 13 << 5 | 13 << 10;
        let tops = [1 << 15, 0, 1 << 15, 1 << 15, 0];
        for (i, top) in tops.into_iter().enumerate() {
            assert_eq!([word(0, 0, i, 0), word(1, 0, i, 0)], [plain | top; 2], "word {i}");
        }
        assert_eq!(word(0, 0, 0, 1), (plain | 1 << 15) + 1, "place 0 has code 2");
        // Index 42, the second of word 3 of strip 2, has places 126 to 128.
        assert_eq!(word(0, 2, 3, 1) >> 5 & 31, 13 + 9, "place 128 has code 2");
        assert_eq!(word(1, 0, 0, 1), 0, "no such row");
        data[128 * 96 + 3] = 0x30;
        let matrix = TernaryMatrix::new(TernaryFormat::I2S, &data, 129, 384).unwrap();
        // Group 1 lies behind the five strips of group 0.
        let invalid: Vec<usize> = (0..22)
            .filter(|item| !LookupMatrix::pack_strip(&matrix, *item, &mut packed[..STRIP_BYTES]))
            .collect();
        assert_eq!(invalid, [6], "the code of place 67, in strip 1 of group 1");
        assert!(LookupMatrix::new(&packed[1..], 129, 384).is_none());
    }
}
