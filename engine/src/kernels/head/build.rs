//! The image of a head, some rows at a time.
#![expect(unsafe_code, reason = "threads write disjoint rows of several arrays")]

use std::ops::Range;
use std::sync::Mutex;

use crate::dense::DenseMatrix;
use crate::head::{FastHead, FastHeadError, HeadLayout, padded_len};
use crate::kernels::KernelSet;
use crate::kernels::float::shared_out::SharedOut;
use crate::pool::ThreadPool;

/// Rows in a chunk of work.
const CHUNK_ROWS: usize = 16;

impl KernelSet {
    /// Makes rows `rows` of the image of `w` in `image`, which has [`FastHead::n_bytes`].
    ///
    /// # Errors
    /// If `w` is empty, too large or not finite in these rows, or `image` has another length.
    pub fn build_head_rows(
        self,
        pool: &ThreadPool,
        w: &DenseMatrix<'_>,
        rows: Range<usize>,
        image: &mut [u8],
    ) -> Result<(), FastHeadError> {
        let (n_rows, n_cols) = (w.n_rows(), w.n_cols());
        let layout = HeadLayout::new(n_rows, n_cols)?;
        FastHead::new(image, n_rows, n_cols)?;
        let (padded_len, row_bytes) = (padded_len(n_cols), layout.row_bytes);
        let image = SharedOut::new(image);
        // One for each thread, which alone locks it: a row, and the first row that was not finite.
        let own: Vec<_> = (0..pool.n_threads()).map(|_| Mutex::new((vec![0.0; padded_len], None))).collect();
        pool.for_each_chunk(rows.len(), CHUNK_ROWS, &|thread, items| {
            let mut own = lock(&own[thread]);
            let (values, bad_row) = &mut *own;
            for row in items.map(|item| rows.start + item) {
                w.dequantize_row(row, &mut values[..n_cols]);
                values[n_cols..].fill(0.0);
                // SAFETY: each row comes up once, and its two halves lie apart.
                let first = unsafe { image.part(layout.halves[0] + row * row_bytes, row_bytes) };
                // SAFETY: as above.
                let second = unsafe { image.part(layout.halves[1] + row * row_bytes, row_bytes) };
                let Some(factors) = self.quantize_head_row(values, [first, second]) else {
                    *bad_row = Some(bad_row.map_or(row, |bad: usize| bad.min(row)));
                    continue;
                };
                for (at, factor) in layout.factors.into_iter().zip(factors) {
                    // SAFETY: each row has a place of its own in each array.
                    unsafe { image.part(at + row * 4, 4) }.copy_from_slice(&factor.to_le_bytes());
                }
            }
        });
        match own.iter().filter_map(|own| lock(own).1).min() {
            Some(row) => Err(FastHeadError::NotFinite { row }),
            None => Ok(()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
