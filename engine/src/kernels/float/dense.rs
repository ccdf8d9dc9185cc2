//! Products with a dense matrix: the output head, and the projections of models that are not ternary.

use std::ops::Range;

use super::dense_rows::{self, RowReader};
use super::lanes::{Lanes, LanesTask, padded};
use super::shared_out::SharedOut;
use crate::dense::{DenseFormat, DenseMatrix, dequantize_row};
use crate::kernels::KernelSet;
use crate::pool::ThreadPool;

impl KernelSet {
    /// `out[t][r] = dot(row r of w, x[t])` for every row of `x` (n, cols): values are dequantised exactly and
    /// summed in the one order of float reductions.
    ///
    /// # Panics
    /// If `x` is not whole rows of `n_cols` or `out` not (n, `n_rows`).
    pub fn dense_matmul(self, pool: &ThreadPool, w: &DenseMatrix<'_>, x: &[f32], out: &mut [f32]) {
        let n = check_shape(w, x);
        assert_eq!(out.len(), n * w.n_rows(), "output of {w:?} times {n} rows");
        let (out, n_rows) = (SharedOut::new(out), w.n_rows());
        pool.for_each_chunk(n_rows, rows_per_chunk(n_rows, pool.n_threads()), &|_, rows| {
            let rows = DenseRows { w: *w, rows, x, out: &out, stride: n_rows };
            self.on_lanes(rows);
        });
    }

    /// `out[offset + r] = dot(row r of w, x)` for the given rows, to the bit as [`Self::dense_matmul`] gives it.
    ///
    /// # Panics
    /// If there is no such row, `x` is not `n_cols` long, or `out` too short.
    ///
    /// # Safety
    /// Nobody else uses these elements of `out` meanwhile.
    #[expect(unsafe_code, reason = "writes to a shared output")]
    pub(crate) unsafe fn dense_gather(
        self,
        w: &DenseMatrix<'_>,
        rows: &[u32],
        x: &[f32],
        (out, offset): (&SharedOut<'_, f32>, usize),
    ) {
        assert_eq!(check_shape(w, x), 1, "one row of inputs");
        let whole = DenseRows { w: *w, rows: 0..w.n_rows(), x, out, stride: 0 };
        self.on_lanes(DenseGather { whole, rows, offset });
    }
}

/// The number of input rows.
fn check_shape(w: &DenseMatrix<'_>, x: &[f32]) -> usize {
    assert!(x.len().is_multiple_of(w.n_cols()), "{} inputs for {w:?}", x.len());
    x.len() / w.n_cols()
}

/// Enough chunks that no thread waits long for the last one, and enough rows in one to be worth claiming.
fn rows_per_chunk(n_rows: usize, n_threads: usize) -> usize {
    (n_rows / (n_threads * 8)).clamp(8, 128).next_multiple_of(4)
}

struct DenseRows<'a> {
    w: DenseMatrix<'a>,
    rows: Range<usize>,
    x: &'a [f32],                // (n, cols)
    out: &'a SharedOut<'a, f32>, // (n, stride)
    stride: usize,
}

impl LanesTask for DenseRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.w.format() {
            DenseFormat::F32 => self.of::<L, dense_rows::F32>(lanes),
            DenseFormat::F16 => self.of::<L, dense_rows::F16>(lanes),
            DenseFormat::Bf16 => self.of::<L, dense_rows::Bf16>(lanes),
            DenseFormat::Q8_0 => self.of::<L, dense_rows::Q8_0>(lanes),
            DenseFormat::Q6K => self.of::<L, dense_rows::Q6K>(lanes),
            DenseFormat::Q4_0 => self.of::<L, dense_rows::Q4_0>(lanes),
        }
    }
}

impl DenseRows<'_> {
    /// Four rows at a time, over four tokens at a time where registers allow, so that a row is dequantised
    /// once for several tokens and no chain of additions waits for itself.
    #[inline(always)]
    fn of<L: Lanes, F: RowReader>(&self, lanes: L) {
        let n = self.x.len() / self.w.n_cols();
        let mut row = self.rows.start;
        while n == 1 && L::IS_WIDE && F::ROWS_ALONE >= 8 && row + 8 <= self.rows.end {
            self.tile::<L, F, 8, 1>(lanes, row, 0);
            row += 8;
        }
        while n == 1 && F::ROWS_ALONE >= 4 && row + 4 <= self.rows.end {
            self.tile::<L, F, 4, 1>(lanes, row, 0);
            row += 4;
        }
        while n > 1 && row + 4 <= self.rows.end {
            let mut token = 0;
            if L::IS_WIDE {
                while token + 4 <= n {
                    self.tile::<L, F, 4, 4>(lanes, row, token);
                    token += 4;
                }
            } else {
                while token + 2 <= n {
                    self.tile::<L, F, 2, 2>(lanes, row, token);
                    self.tile::<L, F, 2, 2>(lanes, row + 2, token);
                    token += 2;
                }
            }
            for token in token..n {
                self.tile::<L, F, 4, 1>(lanes, row, token);
            }
            row += 4;
        }
        for row in row..self.rows.end {
            for token in 0..n {
                self.tile::<L, F, 1, 1>(lanes, row, token);
            }
        }
    }

    /// `R` rows from `row` times `T` tokens from `token`.
    #[inline(always)]
    fn tile<L: Lanes, F: RowReader, const R: usize, const T: usize>(
        &self,
        lanes: L,
        row: usize,
        token: usize,
    ) {
        // Loops go by index: iterators that yield vectors are not always inlined, and then pass them in memory.
        let sums = self.sums::<L, F, R, T>(
            lanes,
            [0, R.max(2)].map(|ahead| std::array::from_fn(|r| row + ahead + r)),
            token,
        );
        for (t, sums) in sums.iter().enumerate() {
            self.put((token + t) * self.stride + row, sums);
        }
    }

    #[inline(always)]
    fn sums<L: Lanes, F: RowReader, const R: usize, const T: usize>(
        &self,
        lanes: L,
        [now, next]: [[usize; R]; 2],
        token: usize,
    ) -> [[f32; R]; T] {
        let n_cols = self.w.n_cols();
        let n_pairs = n_cols / 32;
        let rows = now.map(|row| self.w.row(row));
        // Rows are short: hardware finds out about each one late.
        let next = next.map(|row| self.w.row(row.min(self.w.n_rows() - 1)));
        let step = self.w.row_bytes() / n_pairs.max(1);
        let mut xs = [&[0.0f32][..]; T];
        for (t, x) in xs.iter_mut().enumerate() {
            *x = &self.x[(token + t) * n_cols..][..n_cols];
        }
        let mut acc = [[lanes.splat(0.0); T]; R];
        // Formats with blocks of several pairs have whole blocks only.
        for block in 0..n_pairs / F::BLOCK_PAIRS {
            let mut blocks = [F::block(lanes, rows[0], block); R];
            for r in 1..R {
                blocks[r] = F::block(lanes, rows[r], block);
            }
            for pair in 0..F::BLOCK_PAIRS {
                let pair = block * F::BLOCK_PAIRS + pair;
                let mut x_pair = [[lanes.splat(0.0); 2]; T];
                for t in 0..T {
                    let x = xs[t][pair * 32..][..32].as_chunks::<16>().0;
                    x_pair[t] = [lanes.load(&x[0]), lanes.load(&x[1])];
                }
                for r in 0..R {
                    if pair % F::LINE_PAIRS == 0 {
                        lanes.prefetch(next[r], pair * step);
                    }
                    let [a, b] = F::pair(lanes, rows[r], &blocks[r], pair);
                    for t in 0..T {
                        acc[r][t] = lanes.fma(b, x_pair[t][1], lanes.fma(a, x_pair[t][0], acc[r][t]));
                    }
                }
            }
        }
        if n_pairs * 32 < n_cols {
            for r in 0..R {
                self.tail(lanes, rows[r], xs, &mut acc[r]);
            }
        }
        let mut sums = [[0.0; R]; T];
        for r in 0..R {
            for t in 0..T {
                sums[t][r] = lanes.sum(acc[r][t]);
            }
        }
        sums
    }

    /// The columns after the last whole thirty-two, which only unblocked formats have.
    #[inline(always)]
    fn tail<L: Lanes, const T: usize>(&self, lanes: L, row: &[u8], xs: [&[f32]; T], acc: &mut [L::V; T]) {
        let done = self.w.n_cols() / 32 * 32;
        let n_rest = self.w.n_cols() - done;
        let mut values = [0.0; 32];
        dequantize_row(self.w.format(), &row[done * self.w.format().block_bytes()..], &mut values[..n_rest]);
        for (i, w) in values[..n_rest].chunks(16).enumerate() {
            let w = lanes.load(&padded(w, 0.0));
            for t in 0..T {
                let x = lanes.load(&padded(&xs[t][done + i * 16..], 0.0));
                acc[t] = lanes.fma(w, x, acc[t]);
            }
        }
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "threads write disjoint parts of the output")]
    fn put(&self, at: usize, sums: &[f32]) {
        // SAFETY: rows of a chunk belong to one task, so that no other writes these columns.
        unsafe { self.out.part(at, sums.len()) }.copy_from_slice(sums);
    }
}

struct DenseGather<'a> {
    whole: DenseRows<'a>,
    rows: &'a [u32],
    offset: usize,
}

impl LanesTask for DenseGather<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.whole.w.format() {
            DenseFormat::F32 => self.of::<L, dense_rows::F32>(lanes),
            DenseFormat::F16 => self.of::<L, dense_rows::F16>(lanes),
            DenseFormat::Bf16 => self.of::<L, dense_rows::Bf16>(lanes),
            DenseFormat::Q8_0 => self.of::<L, dense_rows::Q8_0>(lanes),
            DenseFormat::Q6K => self.of::<L, dense_rows::Q6K>(lanes),
            DenseFormat::Q4_0 => self.of::<L, dense_rows::Q4_0>(lanes),
        }
    }
}

impl DenseGather<'_> {
    /// Four rows at a time, so that memory fetches four at a time.
    #[inline(always)]
    fn of<L: Lanes, F: RowReader>(&self, lanes: L) {
        let (fours, rest) = self.rows.as_chunks::<4>();
        let idx = |rows: &[u32; 4]| rows.map(|row| row as usize);
        for (i, rows) in fours.iter().enumerate() {
            let next = fours.get(i + 1).unwrap_or(rows);
            let [sums] = self.whole.sums::<L, F, 4, 1>(lanes, [idx(rows), idx(next)], 0);
            for (row, sum) in rows.iter().zip(sums) {
                self.whole.put(self.offset + *row as usize, &[sum]);
            }
        }
        for row in rest {
            let row = *row as usize;
            let [sum] = self.whole.sums::<L, F, 1, 1>(lanes, [[row], [row]], 0);
            self.whole.put(self.offset + row, &sum);
        }
    }
}
