//! The screen of the output head: a four-bit image that finds the tokens worth computing exactly.
//!
//! The output head is the largest matrix that a decoded token reads. Its image here comes in two halves of two bits a
//! weight. The first half of every row is read and gives its logit within bounds; rows that could still matter are
//! looked at more closely with the second half, and what is left is computed from the original matrix, to the
//! bit what [`KernelSet::dense_matmul`](crate::kernels::KernelSet::dense_matmul) gives
//! ([`KernelSet::fast_head`](crate::kernels::KernelSet::fast_head)).
//!
//! Rows are rotated before they are rounded: fixed random signs, then Hadamard transforms of `rotation_len`
//! columns. Inputs are rotated likewise, which leaves exact products as they are. After it, values of a row are
//! close to normal whatever they were (no outlier columns), so that one scale per row is nearly as good as many,
//! and the error of a logit is close to normal with standard deviation `|row error| * |x| / sqrt(n)`. That is
//! what the choice of rows rests on; the per-row factors are stored.
//!
//! Image: four arrays of `n_rows` f32 (scale and error factor with the first half, then with both), then the first
//! halves of all rows, then the second halves; each array starts at a multiple of 64 bytes. A code c of 0 to 15 stands
//! for `2 c - 15` steps; the first half is `c / 4`, the second `c % 4`. In each 64 bytes of a half, bits `2 k` and
//! `2 k + 1` of byte p are column `64 k + p` of 256. Little endian.

use std::ops::{Range, RangeInclusive};

use crate::dense::DenseMatrix;
use crate::noise::{NOISE_LANES, Noise};

/// Columns of heads that have a screen. Errors of rows of a few columns are not close to normal after the rotation either; and
/// beyond 2^19 columns a sum of codes times int8 could leave an i32.
const COLS: RangeInclusive<usize> = 64..=1 << 19;

/// Why there is no screen of a head.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FastHeadError {
    /// The length is not that of the shape.
    #[error("the screen of a head of {n_rows} x {n_cols} takes {expected} bytes, found {found}")]
    Length {
        /// Rows.
        n_rows: usize,
        /// Columns.
        n_cols: usize,
        /// Bytes it takes.
        expected: usize,
        /// Bytes found.
        found: usize,
    },
    /// The shape is empty, too large for exact integer sums, or of too few columns for errors that are close to normal.
    #[error("no screen for a head of {n_rows} x {n_cols}")]
    Shape {
        /// Rows.
        n_rows: usize,
        /// Columns.
        n_cols: usize,
    },
    /// A scale or error factor is no finite non-negative number, or a weight of the matrix not finite.
    #[error("row {row} of the head is not finite")]
    NotFinite {
        /// The row.
        row: usize,
    },
}

/// A borrowed image. It may lie in memory that several processes map.
#[derive(Clone, Copy)]
pub struct FastHead<'a> {
    n_rows: usize,
    n_cols: usize,
    factors: [&'a [[u8; 4]]; 4], // (n_rows) each: f32
    halves: [&'a [u8]; 2],       // (n_rows, padded_len / 4) each
}

impl std::fmt::Debug for FastHead<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FastHead({} x {})", self.n_rows, self.n_cols)
    }
}

/// Where the parts of an image lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeadLayout {
    pub(crate) n_rows: usize,
    pub(crate) n_cols: usize,
    /// Scales and errors of the first half, and of both.
    pub(crate) factors: [usize; 4],
    pub(crate) halves: [usize; 2],
    pub(crate) row_bytes: usize, // Of a half.
    pub(crate) n_bytes: usize,
}

impl HeadLayout {
    pub(crate) fn new(n_rows: usize, n_cols: usize) -> Result<Self, FastHeadError> {
        let is_fine = n_rows > 0 && COLS.contains(&n_cols) && u32::try_from(n_rows).is_ok();
        let row_bytes = padded_len(n_cols) / 4;
        let layout = || {
            let array = n_rows.checked_mul(4)?.checked_next_multiple_of(64)?;
            let half = n_rows.checked_mul(row_bytes)?;
            let codes = array.checked_mul(4)?;
            let n_bytes = half.checked_mul(2)?.checked_add(codes)?;
            let factors = std::array::from_fn(|i| i * array);
            Some(Self { n_rows, n_cols, factors, halves: [codes, codes + half], row_bytes, n_bytes })
        };
        is_fine.then(layout).flatten().ok_or(FastHeadError::Shape { n_rows, n_cols })
    }

    fn factors(&self, i: usize) -> Range<usize> {
        self.factors[i]..self.factors[i] + self.n_rows * 4
    }
}

impl<'a> FastHead<'a> {
    /// How many bytes the image of `w` takes.
    ///
    /// # Errors
    /// If `w` is empty or too large.
    pub fn n_bytes(w: &DenseMatrix<'_>) -> Result<usize, FastHeadError> {
        Ok(HeadLayout::new(w.n_rows(), w.n_cols())?.n_bytes)
    }

    /// The image in `bytes`, without a look at every number.
    ///
    /// # Errors
    /// If the length is not that of the shape.
    pub fn new(bytes: &'a [u8], n_rows: usize, n_cols: usize) -> Result<Self, FastHeadError> {
        let layout = HeadLayout::new(n_rows, n_cols)?;
        if bytes.len() != layout.n_bytes {
            let (expected, found) = (layout.n_bytes, bytes.len());
            return Err(FastHeadError::Length { n_rows, n_cols, expected, found });
        }
        let [first, second] = layout.halves;
        Ok(Self {
            n_rows,
            n_cols,
            factors: std::array::from_fn(|i| bytes[layout.factors(i)].as_chunks().0),
            halves: [&bytes[first..second], &bytes[second..]],
        })
    }

    /// Looks at every scale and error factor.
    ///
    /// # Errors
    /// The first row that has one that is not finite, or negative.
    pub fn check(&self) -> Result<(), FastHeadError> {
        let is_fine = |b: &[u8; 4]| (0.0..=f32::MAX).contains(&f32::from_le_bytes(*b));
        let bad_row = |factors: &[[u8; 4]]| factors.iter().position(|factor| !is_fine(factor));
        match self.factors.iter().filter_map(|factors| bad_row(factors)).min() {
            Some(row) => Err(FastHeadError::NotFinite { row }),
            None => Ok(()),
        }
    }

    /// Outputs.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Inputs.
    #[must_use]
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// With the first half, or with both (f32 each): value of an odd step, and standard deviation of an approximate logit
    /// divided by the norm of the input.
    #[inline(always)]
    pub(crate) fn factors_of(&self, has_both: bool, rows: Range<usize>) -> [&'a [[u8; 4]]; 2] {
        let first = if has_both { 2 } else { 0 };
        [&self.factors[first][rows.clone()], &self.factors[first + 1][rows]]
    }

    /// Codes of a half of all rows.
    #[inline(always)]
    pub(crate) fn half(&self, i: usize) -> &'a [u8] {
        self.halves[i]
    }
}

/// Which logits of an input row must be exact: those of all rows whose score can be among the best.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// How many of the best scores.
    pub n_best: usize,
    /// And those so far below them at most.
    pub slack: f32,
    /// Scores are logits divided by this temperature, plus the noise; without noise, the logits themselves.
    pub noise: Option<(Noise, f32)>,
    /// And these rows, whatever their scores.
    pub rows: [&'a [u32]; 2],
}

impl Wanted<'_> {
    /// The score of a row.
    #[inline(always)]
    #[must_use]
    pub fn score(&self, row: u32, logit: f32) -> f32 {
        match self.noise {
            Some((noise, temperature)) => logit / temperature + noise.of(row),
            None => logit,
        }
    }

    /// Of the rows from `first`.
    #[inline(always)]
    pub(crate) fn noise_of_block(&self, first: u32) -> Option<([f32; NOISE_LANES], f32)> {
        self.noise.map(|(noise, temperature)| (noise.of_many(first), temperature))
    }
}

/// Columns after padding with zeros: whole groups of 256.
pub(crate) fn padded_len(n_cols: usize) -> usize {
    n_cols.next_multiple_of(256)
}

/// Columns that are rotated together: the largest power of two that divides the padded length.
pub(crate) fn rotation_len(padded_len: usize) -> usize {
    1 << padded_len.trailing_zeros()
}
