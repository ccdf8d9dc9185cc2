//! The fast head: a four-bit image of the output matrix that finds the tokens worth computing exactly.
//!
//! The output head is the largest matrix that a decoded token reads. Its image here is a quarter of the size of
//! F16. A product with it gives every logit approximately; the rows that matter are then computed from
//! the original matrix, to the bit what [`KernelSet::dense_matmul`] gives ([`KernelSet::fast_head`]).
//!
//! Rows are rotated before they are rounded: fixed random signs, then Hadamard transforms of `rotation_len`
//! columns. Inputs are rotated likewise, which leaves exact products as they are. After it, values of a row are
//! close to normal whatever they were (no outlier columns), so that one scale per row is nearly as good as many,
//! and the error of a logit is close to normal with standard deviation `|row error| * |x| / sqrt(n)`. That is
//! what the choice of rows rests on; the per-row factor is stored.
//!
//! Image: a 64-byte header, `n_rows` scales (f32), `n_rows` error factors (f32), zeros up to a multiple of 64,
//! `n_rows` rows of codes. In each 64 bytes of a row, low nibbles are columns 0..64 of 128 and high nibbles
//! 64..128; a code c stands for `(2 c - 15) * scale`. Little endian.

use std::sync::Mutex;

use crate::dense::DenseMatrix;
use crate::kernels::KernelSet;
use crate::mapping::Mapping;
use crate::pool::ThreadPool;

const MAGIC: [u8; 8] = *b"bndhead1";
const HEADER_BYTES: usize = 64;

/// Why bytes are no fast head, or a matrix can have none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FastHeadError {
    /// The bytes do not start as an image does.
    #[error("not a fast head of this version")]
    Header,
    /// The length is not that of the shape in the header, or given.
    #[error("a fast head of {n_rows} x {n_cols} takes {expected} bytes, found {found}")]
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
    /// The shape is empty or too large for exact integer sums.
    #[error("no fast head for {n_rows} x {n_cols}")]
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
    scales: &'a [[u8; 4]], // (n_rows): f32
    errors: &'a [[u8; 4]], // (n_rows): f32
    codes: &'a [u8],       // (n_rows, padded_len / 2)
}

impl std::fmt::Debug for FastHead<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FastHead({} x {})", self.n_rows, self.n_cols)
    }
}

/// Where the parts of an image lie.
struct Layout {
    scales: usize,
    errors: usize,
    codes: usize,
    n_bytes: usize,
}

impl Layout {
    fn new(n_rows: usize, n_cols: usize) -> Result<Self, FastHeadError> {
        // Beyond 2^19 columns a sum of codes times int8 could leave an i32.
        let is_fine = n_rows > 0 && n_cols > 0 && n_cols <= 1 << 19 && u32::try_from(n_rows).is_ok();
        if !is_fine {
            return Err(FastHeadError::Shape { n_rows, n_cols });
        }
        let layout = || {
            let errors = n_rows.checked_mul(4)?.checked_add(HEADER_BYTES)?;
            let codes = n_rows.checked_mul(4)?.checked_add(errors)?.checked_next_multiple_of(64)?;
            let n_bytes = n_rows.checked_mul(padded_len(n_cols) / 2)?.checked_add(codes)?;
            Some(Self { scales: HEADER_BYTES, errors, codes, n_bytes })
        };
        layout().ok_or(FastHeadError::Shape { n_rows, n_cols })
    }
}

impl<'a> FastHead<'a> {
    /// How many bytes the image of `w` takes.
    ///
    /// # Errors
    /// If `w` is empty or too large.
    pub fn n_bytes(w: &DenseMatrix<'_>) -> Result<usize, FastHeadError> {
        Ok(Layout::new(w.n_rows(), w.n_cols())?.n_bytes)
    }

    /// Makes the image of `w` in `image`, which has [`Self::n_bytes`].
    ///
    /// # Errors
    /// If `w` is empty, too large or not finite, or `image` has another length.
    pub fn build_into(
        w: &DenseMatrix<'_>,
        kernels: KernelSet,
        pool: &ThreadPool,
        image: &mut [u8],
    ) -> Result<(), FastHeadError> {
        let (n_rows, n_cols) = (w.n_rows(), w.n_cols());
        let layout = Layout::new(n_rows, n_cols)?;
        if image.len() != layout.n_bytes {
            let (expected, found) = (layout.n_bytes, image.len());
            return Err(FastHeadError::Length { n_rows, n_cols, expected, found });
        }
        let padded_len = padded_len(n_cols);
        let (head, codes) = image.split_at_mut(layout.codes);
        // One for each thread, which alone locks it: a row, and the first row that was not finite.
        let rows: Vec<_> = (0..pool.n_threads()).map(|_| Mutex::new((vec![0.0; padded_len], None))).collect();
        let factors = Mutex::new(vec![[0.0f32; 2]; n_rows]);
        pool.for_each_row_mut(codes, padded_len / 2, 16, &|thread, row, codes| {
            let mut own = lock(&rows[thread]);
            let (values, bad_row) = &mut *own;
            w.dequantize_row(row, &mut values[..n_cols]);
            values[n_cols..].fill(0.0);
            match kernels.quantize_head_row(values, codes) {
                Some(row_factors) => lock(&factors)[row] = row_factors,
                None => *bad_row = Some(bad_row.map_or(row, |bad: usize| bad.min(row))),
            }
        });
        if let Some(row) = rows.iter().filter_map(|own| lock(own).1).min() {
            return Err(FastHeadError::NotFinite { row });
        }
        head.fill(0);
        head[..8].copy_from_slice(&MAGIC);
        head[8..16].copy_from_slice(&(n_rows as u64).to_le_bytes());
        head[16..24].copy_from_slice(&(n_cols as u64).to_le_bytes());
        for (row, [scale, error]) in lock(&factors).iter().enumerate() {
            head[layout.scales + row * 4..][..4].copy_from_slice(&scale.to_le_bytes());
            head[layout.errors + row * 4..][..4].copy_from_slice(&error.to_le_bytes());
        }
        Ok(())
    }

    /// [`Self::build_into`] a new buffer.
    ///
    /// # Errors
    /// As [`Self::build_into`].
    pub fn build(
        w: &DenseMatrix<'_>,
        kernels: KernelSet,
        pool: &ThreadPool,
    ) -> Result<Vec<u8>, FastHeadError> {
        let mut image = vec![0; Self::n_bytes(w)?];
        Self::build_into(w, kernels, pool, &mut image)?;
        Ok(image)
    }

    /// The head whose image `image` is.
    ///
    /// # Errors
    /// If it is not an image of this version, whole and finite.
    pub fn from_bytes(image: &'a [u8]) -> Result<Self, FastHeadError> {
        let head = Self::parse(image)?;
        let is_fine = |b: &[u8; 4]| (0.0..=f32::MAX).contains(&f32::from_le_bytes(*b));
        match (0..head.n_rows).find(|row| !is_fine(&head.scales[*row]) || !is_fine(&head.errors[*row])) {
            Some(row) => Err(FastHeadError::NotFinite { row }),
            None => Ok(head),
        }
    }

    /// [`Self::from_bytes`] without the look at every number.
    fn parse(image: &'a [u8]) -> Result<Self, FastHeadError> {
        let header = image.get(..HEADER_BYTES).ok_or(FastHeadError::Header)?;
        let words = header.as_chunks::<8>().0;
        let size =
            |i: usize| usize::try_from(u64::from_le_bytes(words[i])).map_err(|_| FastHeadError::Header);
        if words[0] != MAGIC || header[24..].iter().any(|b| *b != 0) {
            return Err(FastHeadError::Header);
        }
        let (n_rows, n_cols) = (size(1)?, size(2)?);
        let layout = Layout::new(n_rows, n_cols)?;
        if image.len() != layout.n_bytes {
            let (expected, found) = (layout.n_bytes, image.len());
            return Err(FastHeadError::Length { n_rows, n_cols, expected, found });
        }
        let head = Self {
            n_rows,
            n_cols,
            scales: image[layout.scales..layout.errors].as_chunks().0,
            errors: &image[layout.errors..].as_chunks().0[..n_rows],
            codes: &image[layout.codes..],
        };
        Ok(head)
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

    /// What a code's odd integer `2 c - 15` is multiplied with.
    pub(crate) fn scale(&self, row: usize) -> f32 {
        f32::from_le_bytes(self.scales[row])
    }

    /// Of each row (f32), the standard deviation of its approximate logit divided by the norm of the input.
    pub(crate) fn errors(&self) -> &'a [[u8; 4]] {
        self.errors
    }

    /// Codes of all rows.
    pub(crate) fn codes(&self) -> &'a [u8] {
        self.codes
    }
}

/// A whole image, mapped and checked once.
#[derive(Debug)]
pub struct HeadImage(Mapping);

impl HeadImage {
    /// Checks that `image` is a fast head for `w`.
    ///
    /// # Errors
    /// If it is no image, or one of another shape.
    pub fn new(image: Mapping, w: &DenseMatrix<'_>) -> Result<Self, FastHeadError> {
        let head = FastHead::from_bytes(&image)?;
        if (head.n_rows, head.n_cols) == (w.n_rows(), w.n_cols()) {
            return Ok(Self(image));
        }
        let expected = FastHead::n_bytes(w)?;
        Err(FastHeadError::Length { n_rows: w.n_rows(), n_cols: w.n_cols(), expected, found: image.len() })
    }

    /// The head.
    #[must_use]
    #[expect(
        clippy::missing_panics_doc,
        clippy::expect_used,
        reason = "`new` parsed the same bytes, and a mapping does not change"
    )]
    pub fn view(&self) -> FastHead<'_> {
        FastHead::parse(&self.0).expect("checked when it was mapped")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Columns after padding with zeros: whole groups of 128.
pub(crate) fn padded_len(n_cols: usize) -> usize {
    n_cols.next_multiple_of(128)
}

/// Columns that are rotated together: the largest power of two that divides the padded length.
pub(crate) fn rotation_len(padded_len: usize) -> usize {
    1 << padded_len.trailing_zeros()
}
