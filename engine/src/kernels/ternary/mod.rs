//! Ternary matrices times int8 activations: the bulk of all work.
//!
//! `out[token][row] = sum over columns of weight * activation`. Sums of codes times values are integers and
//! therefore exact in any order; the float steps behind them are few and fixed:
//!
//! * one scale per tensor: `(f32(dot) - f32(sum)) / s_a * s_w`, where `dot` is over codes (weight + 1) and `sum`
//!   is that of the activations;
//! * one scale per block: `acc = fma(f32(dot_b - sum_b), d_b, acc)` block by block, then `acc / s_a`.

#![expect(
    unsafe_code,
    reason = "calls the instruction set that `KernelSet` has seen; threads share an output"
)]

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use super::KernelSet;
use crate::pool::ThreadPool;
use crate::ternary::TernaryMatrix;

mod quantize; // Activations to int8.
mod quantized_rows; // How they lie in memory.
mod scalar; // The definition of the product.

#[cfg(test)]
mod tests;

pub use quantized_rows::QuantizedRows;
use quantized_rows::{BLOCK_LINES, Line};

/// What happens to what is already in the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// It is overwritten.
    Set,
    /// The product is added to it (a residual).
    Add,
}

/// One matrix to multiply and where the product goes.
#[derive(Debug)]
pub struct MatmulJob<'a> {
    matrix: TernaryMatrix<'a>,
    out: Output<'a>,
}

impl<'a> MatmulJob<'a> {
    /// `out` is `(n_tokens, matrix.n_rows())`.
    #[must_use]
    pub fn new(matrix: TernaryMatrix<'a>, out: &'a mut [f32], store: Store) -> Self {
        let out = Output {
            base: out.as_mut_ptr(),
            len: out.len(),
            n_rows: matrix.n_rows(),
            store,
            borrowed: PhantomData,
        };
        Self { matrix, out }
    }
}

/// Matrix rows that a thread finishes together; a 512-bit register of f32.
const TILE_ROWS: usize = 16;

/// Bytes of weights in a chunk of work, about: many times the price of claiming it.
const CHUNK_BYTES: usize = 64 << 10;

/// Chunks per thread, at least, so that a thread that was held up leaves work to the others.
const CHUNKS_PER_THREAD: usize = 4;

impl KernelSet {
    /// Multiplies every job's matrix with all rows of `acts`, in one fork and join.
    ///
    /// # Panics
    /// If a matrix has other columns than `acts`, or an output is not `(acts.n_rows(), matrix.n_rows())`.
    pub fn ternary_matmul(self, pool: &ThreadPool, acts: &QuantizedRows, jobs: &mut [MatmulJob<'_>]) {
        let mut n_rows = 0;
        let mut row_bytes = 1;
        for MatmulJob { matrix, out } in &*jobs {
            assert_eq!(matrix.n_cols(), acts.n_cols(), "columns of {matrix:?} and of {acts:?}");
            assert_eq!(out.len, acts.n_rows() * matrix.n_rows(), "output of {matrix:?} times {acts:?}");
            n_rows += matrix.n_rows();
            row_bytes = row_bytes.max(matrix.row_bytes());
        }
        let even_share = n_rows / (pool.n_threads() * CHUNKS_PER_THREAD);
        let chunk_rows = even_share.clamp(1, CHUNK_BYTES / row_bytes + 1).next_multiple_of(2 * TILE_ROWS);
        let n_chunks = |job: &MatmulJob<'_>| job.matrix.n_rows().div_ceil(chunk_rows);
        // From here on the outputs are written through their pointers only, by all threads.
        let jobs = &*jobs;
        pool.for_each_chunk(jobs.iter().map(n_chunks).sum(), 1, &|_, chunks| {
            for mut chunk in chunks {
                for job in jobs {
                    if chunk < n_chunks(job) {
                        let first = chunk * chunk_rows;
                        let rows = first..job.matrix.n_rows().min(first + chunk_rows);
                        SCRATCH.with_borrow_mut(|scratch| self.matmul_rows(job, acts, rows, scratch));
                        break;
                    }
                    chunk -= n_chunks(job);
                }
            }
        });
    }

    /// Multiplies some rows of a matrix. Only one thread may have these rows.
    fn matmul_rows(
        self,
        job: &MatmulJob<'_>,
        acts: &QuantizedRows,
        rows: Range<usize>,
        scratch: &mut Scratch,
    ) {
        scalar::matmul_rows(job, acts, rows, scratch);
    }
}

thread_local! {
    /// Each thread of the pool allocates it once, the first time it multiplies.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// Room for what a thread unpacks.
#[derive(Default)]
struct Scratch {
    weights: Vec<i8>,
    scales: Vec<f32>,
    codes: Vec<Line>,
}

/// The output of a job, whose columns the threads share out among themselves.
#[derive(Debug)]
struct Output<'a> {
    base: *mut f32,
    len: usize,
    n_rows: usize, // Of the matrix; a line of the output.
    store: Store,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`, which may be sent to a thread.
unsafe impl Send for Output<'_> {}
// SAFETY: the only access is `Output::tile`, whose contract keeps the threads apart.
unsafe impl Sync for Output<'_> {}

impl Output<'_> {
    /// The places of matrix rows `rows` in the line of token `token`.
    ///
    /// # Safety
    /// No other thread uses these rows, and no earlier tile of them is still in use.
    #[expect(clippy::mut_from_ref, reason = "the threads write disjoint parts; see the contract")]
    unsafe fn tile(&self, token: usize, rows: Range<usize>) -> &mut [f32] {
        let start = token * self.n_rows + rows.start;
        let is_inside = rows.start <= rows.end && rows.end <= self.n_rows && start + rows.len() <= self.len;
        assert!(is_inside, "rows {rows:?} of token {token}");
        // SAFETY: `start <= len` was asserted above.
        let first = unsafe { self.base.add(start) };
        // SAFETY: inside the slice, as asserted above; the caller promises that nobody else uses this part.
        unsafe { std::slice::from_raw_parts_mut(first, rows.len()) }
    }

    /// Finishes the sums of one token for a tile of rows of a matrix with one scale.
    ///
    /// # Safety
    /// No other thread uses these rows.
    #[inline(always)]
    unsafe fn finish_dots(&self, rows: Range<usize>, dots: &[i32], token: TokenScale, scale: f32) {
        // SAFETY: the caller's promise; the tile is dropped before this function returns.
        let out = unsafe { self.tile(token.token, rows) };
        let value = |dot: i32| (exact_f32(dot) - token.sum) / token.scale * scale;
        match self.store {
            Store::Set => out.iter_mut().zip(dots).for_each(|(out, &dot)| *out = value(dot)),
            Store::Add => out.iter_mut().zip(dots).for_each(|(out, &dot)| *out += value(dot)),
        }
    }

    /// Finishes the sums of one token for a tile of rows of a matrix with scales in its blocks.
    ///
    /// # Safety
    /// No other thread uses these rows.
    #[inline(always)]
    unsafe fn finish_sums(&self, rows: Range<usize>, sums: &[f32], token: TokenScale) {
        // SAFETY: the caller's promise; the tile is dropped before this function returns.
        let out = unsafe { self.tile(token.token, rows) };
        match self.store {
            Store::Set => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum / token.scale),
            Store::Add => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out += sum / token.scale),
        }
    }
}

/// What a token brings to the last float steps.
#[derive(Clone, Copy)]
struct TokenScale {
    token: usize,
    sum: f32,
    scale: f32,
}

impl TokenScale {
    fn of(acts: &QuantizedRows, token: usize) -> Self {
        Self { token, sum: exact_f32(acts.sum(token)), scale: acts.scale(token) }
    }
}

/// A sum of codes times values as a float.
#[inline(always)]
#[expect(clippy::cast_precision_loss, reason = "exact below 2^24, and one defined rounding beyond")]
fn exact_f32(dot: i32) -> f32 {
    dot as f32
}
