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
use std::ops::Range;

use super::{Isa, KernelSet};
use crate::pool::ThreadPool;
use crate::ternary::{TernaryFormat, TernaryMatrix};

#[cfg(target_arch = "aarch64")]
mod aarch64; // Advanced SIMD, with and without `sdot`.
#[cfg(target_arch = "x86_64")]
mod avx2; // AVX2 and AVX-VNNI.
#[cfg(target_arch = "x86_64")]
mod avx512; // AVX-512 VNNI.
mod columns; // By columns, for one token with many zeros.
mod lookup; // Indices of tables of sums, for a few tokens.
mod output; // Where products go, and the last float steps.
mod packed; // Rows of two-bit codes, as the fast paths read them.
mod quantize; // Activations to int8.
mod quantized_rows; // How they lie in memory.
mod scalar; // The definition of the product.
#[cfg(target_arch = "x86_64")]
mod sparse; // What is left of one token without its zeros.
mod tables; // Many tokens, by tables of sums.

#[cfg(test)]
mod tests;

pub use columns::ColumnMatrix;
pub(crate) use columns::UNIT_COLS;
pub use lookup::LookupMatrix;
pub(crate) use lookup::STRIP_BYTES;
use output::{Output, TokenScale, exact_f32};
use packed::{PackedRows, RowsJob, repack};
pub use quantize::Norm;
pub use quantized_rows::QuantizedRows;
use quantized_rows::{BLOCK_LINES, Line};
#[cfg(target_arch = "x86_64")]
use sparse::{ColumnsJob, NON_ZERO, NonZero};
pub use tables::BLOCK_TOKENS;

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
    lookup: Option<LookupMatrix<'a>>, // Of the same shape.
    out: Output<'a>,
}

impl<'a> MatmulJob<'a> {
    /// `out` is `(n_tokens, matrix.n_rows())`.
    #[must_use]
    pub fn new(matrix: TernaryMatrix<'a>, out: &'a mut [f32], store: Store) -> Self {
        Self { matrix, lookup: None, out: Output::new(out, matrix.n_rows(), store) }
    }

    /// The same weights as indices of tables, if they are there: read instead for a few tokens, and for a part of the rows
    /// for many, where [`KernelSet::reads_image`].
    ///
    /// # Panics
    /// If the shape is another one.
    #[must_use]
    pub fn with_lookup(mut self, lookup: Option<LookupMatrix<'a>>) -> Self {
        let shape = (self.matrix.n_rows(), self.matrix.n_cols());
        let is_same = lookup.is_none_or(|lookup| (lookup.n_rows(), lookup.n_cols()) == shape);
        assert!(is_same, "{lookup:?} for {shape:?}");
        self.lookup = lookup;
        self
    }
}

/// Matrix rows that a thread finishes together; a 512-bit register of f32.
const TILE_ROWS: usize = 16;

/// Rows of `TQ1_0` that are brought into two-bit codes at once.
const REPACKED_ROWS: usize = 2 * TILE_ROWS;

/// With more tokens the AVX-512 path wants 32 rows at a time.
const FEW_TOKENS: usize = 8;

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
        for MatmulJob { matrix, out, .. } in &*jobs {
            assert_eq!(matrix.n_cols(), acts.n_cols(), "columns of {matrix:?} and of {acts:?}");
            assert_eq!(out.len(), acts.n_rows() * matrix.n_rows(), "output of {matrix:?} times {acts:?}");
            n_rows += matrix.n_rows();
            row_bytes = row_bytes.max(matrix.row_bytes());
        }
        #[cfg(target_arch = "x86_64")]
        if self.reads_image_for(acts.n_rows()) && jobs.iter().all(|job| job.lookup.is_some()) {
            return self.ternary_lookup(pool, acts, jobs);
        }
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Avx512Vnni && avx512::mixed::suits(acts, jobs) {
            // SAFETY: `isa` is `Avx512Vnni` only if `for_isa` saw AVX-512 F, BW, VL and VNNI on this CPU.
            return unsafe { avx512::mixed::matmul(pool, acts, jobs) };
        }
        if tables::suits(self.isa, acts, jobs) {
            return tables::matmul(self.isa, pool, acts, jobs);
        }
        let even_share = n_rows / (pool.n_threads() * CHUNKS_PER_THREAD);
        // Few tokens are done quickly: small matrices must still give every thread something.
        let granularity = if acts.n_rows() <= FEW_TOKENS { TILE_ROWS } else { 2 * TILE_ROWS };
        let chunk_rows = even_share.clamp(1, CHUNK_BYTES / row_bytes + 1).next_multiple_of(granularity);
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

    /// The same by tables.
    #[cfg(target_arch = "x86_64")]
    fn ternary_lookup(self, pool: &ThreadPool, acts: &QuantizedRows, jobs: &[MatmulJob<'_>]) {
        let n_groups = jobs.iter().filter_map(|job| job.lookup).map(|matrix| matrix.n_groups()).sum();
        pool.for_each_chunk(n_groups, avx512::lookup::piece(pool.n_threads(), n_groups), &|_, groups| {
            SCRATCH.with_borrow_mut(|scratch| {
                // SAFETY: `isa` is `Avx512Vnni` only if `for_isa` saw AVX-512 F, BW, VL and VNNI on this CPU.
                unsafe { avx512::lookup::matmul(jobs, acts, groups, &mut scratch.lookup) };
            });
        });
    }

    /// Whether one token, or a few, are multiplied with other forms of the weights where they are there.
    #[must_use]
    pub fn reads_image(self) -> bool {
        self.isa == Isa::Avx512Vnni
    }

    /// Whether so many are.
    #[must_use]
    pub fn reads_image_for(self, n_tokens: usize) -> bool {
        self.reads_image() && n_tokens <= FEW_TOKENS
    }

    /// Multiplies one token, many of whose activations are zero, with the same weights by columns, where
    /// [`Self::reads_image`]; otherwise as [`Self::ternary_matmul`]. Returns how many bytes of weights need not be read.
    ///
    /// # Panics
    /// As [`Self::ternary_matmul`], and if `columns` has another shape.
    pub fn ternary_sparse(
        self,
        pool: &ThreadPool,
        acts: &QuantizedRows,
        job: MatmulJob<'_>,
        #[cfg_attr(
            not(target_arch = "x86_64"),
            expect(unused_variables, reason = "no other instruction set has this product")
        )]
        columns: Option<ColumnMatrix<'_>>,
    ) -> usize {
        #[cfg(target_arch = "x86_64")]
        if let (1, true, Some(matrix)) = (acts.n_rows(), self.reads_image(), columns) {
            let shape = (job.matrix.n_rows(), job.matrix.n_cols());
            assert_eq!((matrix.n_rows(), matrix.n_cols()), shape, "shape of {matrix:?}");
            assert_eq!(matrix.n_cols(), acts.n_cols(), "columns of {matrix:?} and of {acts:?}");
            assert_eq!(job.out.len(), matrix.n_rows(), "output of {matrix:?} times {acts:?}");
            let (token, scale, out) = (TokenScale::of(acts, 0), job.matrix.scale(), &job.out);
            let job = ColumnsJob { matrix, token, scale, out };
            let n_lines = matrix.column_bytes() / columns::LINE_BYTES;
            // Long pieces of columns where the threads can have equal shares of them.
            let is_even = n_lines.is_multiple_of(pool.n_threads());
            let chunk_lines =
                if is_even { avx512::columns::LINES_MAX.min(n_lines / pool.n_threads()) } else { 1 };
            let find = |_| {
                NON_ZERO.with_borrow_mut(|nonzero| {
                    // SAFETY: `isa` is `Avx512Vnni` only if `for_isa` saw AVX-512 F, BW, VL and VNNI on this CPU.
                    unsafe { avx512::columns::find(acts, nonzero) };
                });
            };
            pool.for_each_chunk_after(&find, n_lines, chunk_lines, &|_, lines| {
                NON_ZERO.with_borrow(|nonzero| {
                    // SAFETY: as above.
                    unsafe { avx512::columns::matmul(&job, nonzero, lines) };
                });
            });
            let n_zeros = acts.n_cols() - NON_ZERO.with_borrow(NonZero::len);
            return n_zeros * matrix.column_bytes();
        }
        self.ternary_matmul(pool, acts, &mut [job]);
        0
    }

    /// Multiplies some rows of a matrix. Only one thread may have these rows.
    fn matmul_rows(
        self,
        job: &MatmulJob<'_>,
        acts: &QuantizedRows,
        rows: Range<usize>,
        scratch: &mut Scratch,
    ) {
        if self.isa == Isa::Scalar {
            return scalar::matmul_rows(job, acts, rows, scratch);
        }
        let MatmulJob { matrix, out, .. } = job;
        if matrix.format() != TernaryFormat::Tq1_0 {
            let packed = PackedRows::of(matrix, rows.clone());
            let job = RowsJob { rows: packed, first_row: rows.start, matrix, out };
            return self.matmul_packed(&job, acts, &mut scratch.panel);
        }
        for first_row in rows.clone().step_by(REPACKED_ROWS) {
            let rows = first_row..rows.end.min(first_row + REPACKED_ROWS);
            let packed = repack(self.isa, matrix, rows.clone(), &mut scratch.packed);
            let job = RowsJob { rows: packed, first_row, matrix, out };
            self.matmul_packed(&job, acts, &mut scratch.panel);
        }
    }

    /// Multiplies rows of two-bit codes.
    fn matmul_packed(self, job: &RowsJob<'_>, acts: &QuantizedRows, panel: &mut Vec<Line>) {
        let is_reversed = job.matrix.format() != TernaryFormat::I2S;
        match (self.isa, is_reversed) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is `Avx2` only if `for_isa` saw AVX2, FMA and F16C on this CPU.
            (Isa::Avx2, false) => unsafe { avx2::matmul::<false>(job, acts, panel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Avx2, true) => unsafe { avx2::matmul::<true>(job, acts, panel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is `AvxVnni` only if `for_isa` saw AVX2, FMA and F16C on this CPU, and AVX-VNNI as asked.
            (Isa::AvxVnni, false) if self.has_vex_vnni => unsafe {
                avx2::matmul_vex::<false>(job, acts, panel)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::AvxVnni, true) if self.has_vex_vnni => unsafe {
                avx2::matmul_vex::<true>(job, acts, panel)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: without AVX-VNNI, `isa` is `AvxVnni` only if `for_isa` saw AVX-512 F, VL and VNNI as well.
            (Isa::AvxVnni, false) => unsafe { avx2::matmul_evex::<false>(job, acts, panel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::AvxVnni, true) => unsafe { avx2::matmul_evex::<true>(job, acts, panel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is `Avx512Vnni` only if `for_isa` saw AVX-512 F, BW, VL and VNNI on this CPU.
            (Isa::Avx512Vnni, false) => unsafe { avx512::matmul::<false>(job, acts, panel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Avx512Vnni, true) => unsafe { avx512::matmul::<true>(job, acts, panel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: `isa` is `Neon` only if `for_isa` saw Advanced SIMD on this CPU.
            (Isa::Neon, false) => unsafe { aarch64::matmul_neon::<false>(job, acts, panel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            (Isa::Neon, true) => unsafe { aarch64::matmul_neon::<true>(job, acts, panel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: `isa` is `NeonDotprod` only if `for_isa` saw Advanced SIMD and `sdot` on this CPU.
            (Isa::NeonDotprod, false) => unsafe { aarch64::matmul_dotprod::<false>(job, acts, panel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            (Isa::NeonDotprod, true) => unsafe { aarch64::matmul_dotprod::<true>(job, acts, panel) },
            _ => unreachable!("`for_isa` gives no {}", self.isa),
        }
    }
}

thread_local! {
    /// Each thread of the pool allocates it once, the first time it multiplies.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// Room for what a thread unpacks.
#[derive(Default)]
struct Scratch {
    weights: Vec<i8>, // One row, by the scalar path.
    scales: Vec<f32>, // One row, by the scalar path.
    codes: Vec<Line>, // One row in kernel order, by the scalar path.
    packed: Vec<u8>,  // (REPACKED_ROWS, n_blocks, 64)
    panel: Vec<Line>, // As the instruction set likes it.
    #[cfg(target_arch = "x86_64")]
    lookup: avx512::lookup::Scratch,
    #[cfg(target_arch = "x86_64")]
    mixed: avx512::mixed::Scratch,
    tables: tables::Scratch,
}
