//! Ternary products at the shapes of BitNet b1.58 2B-4T, beside what the machine allows.
//!
//! `cargo bench -p bitnetd-engine --bench ternary`. Divan, because it is small, builds fast and counts bytes and
//! products by itself. First come the bounds: decode (1 token) is to be compared with the read bandwidth, prefill
//! (512 tokens) with the integer peak; with 8 tokens both are near. Bytes are those of the weights, items are
//! multiply-accumulates. Weights are read from more copies than a cache holds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark that cannot start has nothing to say"
)]
#![allow(clippy::print_stdout, reason = "a benchmark prints what it measures")]
#![allow(missing_docs, reason = "divan generates public items")]

use std::cell::Cell;

use bitnetd_engine::kernels::ternary::{ColumnMatrix, LookupMatrix, MatmulJob, QuantizedRows, Store};
use bitnetd_engine::kernels::{Isa, KernelSet, probe};
use bitnetd_engine::pool::{PoolOptions, ThreadPool, Wait};
use bitnetd_engine::ternary::{TernaryFormat, TernaryMatrix, i2_s_trailer};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};

/// Weights to read from: more than the last level of cache.
const WEIGHTS_BYTES: usize = 512 << 20;

/// Rows and columns of the matrices of one layer.
const SHAPES: [(usize, usize); 4] = [(2560, 2560), (640, 2560), (6912, 2560), (2560, 6912)];

const THREADS: [usize; 2] = [1, 2];

fn main() {
    let bytes = vec![0x24; WEIGHTS_BYTES];
    for kernels in KernelSet::all_present() {
        for n_threads in THREADS {
            let pool = pool(n_threads);
            let read = probe::read_bandwidth(kernels, &pool, &bytes) / 1e9;
            let multiply = probe::integer_peak(kernels, &pool) / 1e9;
            let isa = kernels.isa();
            println!("{isa}, {n_threads} threads: reads {read:.1} GB/s, multiplies {multiply:.0} G/s");
        }
    }
    drop(bytes);
    divan::main();
}

#[divan::bench(args = SHAPES, consts = THREADS)]
fn i2_s_decode<const N_THREADS: usize>(bencher: Bencher<'_, '_>, shape: (usize, usize)) {
    matmul(bencher, TernaryFormat::I2S, shape, 1, N_THREADS);
}

/// The same products by tables, where the instruction set has them; otherwise from the file.
#[divan::bench(args = SHAPES, consts = THREADS)]
fn lookup_decode<const N_THREADS: usize>(bencher: Bencher<'_, '_>, shape: (usize, usize)) {
    with_lookup::<N_THREADS>(bencher, shape, 1);
}

/// Products and tables at once.
#[divan::bench(args = SHAPES, consts = THREADS, sample_count = 20)]
fn lookup_prefill<const N_THREADS: usize>(bencher: Bencher<'_, '_>, shape: (usize, usize)) {
    with_lookup::<N_THREADS>(bencher, shape, 512);
}

/// The down projection by columns, of which a third counts (bytes and products are those of all), where the
/// instruction set has them; otherwise from the file.
#[divan::bench(consts = THREADS)]
fn columns_decode<const N_THREADS: usize>(bencher: Bencher<'_, '_>) {
    let (n_rows, n_cols) = (2560, 6912);
    let (kernels, pool) = (KernelSet::detect(), pool(N_THREADS));
    let n_bytes = n_cols * ColumnMatrix::column_bytes_of(n_rows);
    let weights = vec![0x24; WEIGHTS_BYTES / n_bytes * n_bytes];
    let mut next = weights.chunks_exact(n_bytes).cycle();
    let file = i2_s_file(n_rows, n_cols);
    let matrix = TernaryMatrix::new(TernaryFormat::I2S, &file, n_rows, n_cols).unwrap();
    let mut acts = QuantizedRows::new(1, n_cols);
    acts.reset(1, n_cols);
    let values: Vec<i8> = [5, 0, 0].into_iter().cycle().take(n_cols).collect();
    acts.set_row(0, &values, 1.0);
    let mut out = vec![0.0; n_rows];
    bencher.counter(BytesCount::new(n_bytes)).counter(ItemsCount::new(n_rows * n_cols)).bench_local(|| {
        let columns = ColumnMatrix::new(next.next().unwrap(), n_rows, n_cols);
        let job = MatmulJob::new(matrix, &mut out, Store::Set);
        kernels.ternary_sparse(&pool, &acts, job, columns)
    });
}

/// A matrix as files have it.
fn i2_s_file(n_rows: usize, n_cols: usize) -> Vec<u8> {
    let mut file = vec![0x24; TernaryFormat::I2S.n_bytes(n_rows, n_cols).unwrap()];
    let at = file.len() - i2_s_trailer(1.0).len();
    file[at..].copy_from_slice(&i2_s_trailer(1.0));
    file
}

fn with_lookup<const N_THREADS: usize>(
    bencher: Bencher<'_, '_>,
    (n_rows, n_cols): (usize, usize),
    n_tokens: usize,
) {
    let (kernels, pool) = (KernelSet::detect(), pool(N_THREADS));
    let n_bytes = LookupMatrix::bytes_of(n_rows, n_cols);
    let weights = vec![0x24; WEIGHTS_BYTES / n_bytes * n_bytes];
    let mut next = weights.chunks_exact(n_bytes).cycle();
    let file = i2_s_file(n_rows, n_cols);
    let matrix = TernaryMatrix::new(TernaryFormat::I2S, &file, n_rows, n_cols).unwrap();
    let mut acts = QuantizedRows::new(n_tokens, n_cols);
    acts.reset(n_tokens, n_cols);
    (0..n_tokens).for_each(|token| acts.set_row(token, &vec![3; n_cols], 1.0));
    let mut out = vec![0.0; n_tokens * n_rows];
    let items = ItemsCount::new(n_rows * n_cols * n_tokens);
    bencher.counter(BytesCount::new(n_bytes)).counter(items).bench_local(|| {
        let lookup = LookupMatrix::new(next.next().unwrap(), n_rows, n_cols);
        let job = MatmulJob::new(matrix, &mut out, Store::Set).with_lookup(lookup);
        kernels.ternary_matmul(&pool, &acts, &mut [job]);
    });
}

#[divan::bench(args = SHAPES, consts = THREADS)]
fn i2_s_eight_tokens<const N_THREADS: usize>(bencher: Bencher<'_, '_>, shape: (usize, usize)) {
    matmul(bencher, TernaryFormat::I2S, shape, 8, N_THREADS);
}

#[divan::bench(args = SHAPES, consts = THREADS, sample_count = 20)]
fn i2_s_prefill<const N_THREADS: usize>(bencher: Bencher<'_, '_>, shape: (usize, usize)) {
    matmul(bencher, TernaryFormat::I2S, shape, 512, N_THREADS);
}

#[divan::bench(args = [TernaryFormat::Tq2_0, TernaryFormat::Tq1_0], consts = THREADS)]
fn block_scales_decode<const N_THREADS: usize>(bencher: Bencher<'_, '_>, format: TernaryFormat) {
    matmul(bencher, format, (6912, 2560), 1, N_THREADS);
}

#[divan::bench(args = [TernaryFormat::Tq2_0, TernaryFormat::Tq1_0], consts = THREADS, sample_count = 20)]
fn block_scales_prefill<const N_THREADS: usize>(bencher: Bencher<'_, '_>, format: TernaryFormat) {
    matmul(bencher, format, (6912, 2560), 512, N_THREADS);
}

/// Every instruction set but the best one, which is what the others measure; one thread.
#[divan::bench(args = narrower_sets(), sample_count = 20)]
fn narrower_decode(bencher: Bencher<'_, '_>, isa: Isa) {
    matmul_with(bencher, isa, TernaryFormat::I2S, (6912, 2560), [1, 1]);
}

#[divan::bench(args = narrower_sets(), sample_count = 10)]
fn narrower_prefill(bencher: Bencher<'_, '_>, isa: Isa) {
    matmul_with(bencher, isa, TernaryFormat::I2S, (6912, 2560), [64, 1]);
}

fn narrower_sets() -> Vec<Isa> {
    let is_vector = |isa: &Isa| ![Isa::Scalar, KernelSet::detect().isa()].contains(isa);
    KernelSet::all_present().map(KernelSet::isa).filter(is_vector).collect()
}

/// What handing a task to every thread and waiting for them costs.
#[divan::bench(args = THREADS)]
fn fork_and_join(bencher: Bencher<'_, '_>, n_threads: usize) {
    let pool = pool(n_threads);
    bencher.bench_local(|| pool.run(&|_| {}));
}

fn matmul(
    bencher: Bencher<'_, '_>,
    format: TernaryFormat,
    shape: (usize, usize),
    n_tokens: usize,
    n_threads: usize,
) {
    matmul_with(bencher, KernelSet::detect().isa(), format, shape, [n_tokens, n_threads]);
}

fn matmul_with(
    bencher: Bencher<'_, '_>,
    isa: Isa,
    format: TernaryFormat,
    (n_rows, n_cols): (usize, usize),
    [n_tokens, n_threads]: [usize; 2],
) {
    let (kernels, pool) =
        (KernelSet::for_isa(isa).expect("an instruction set that was found"), pool(n_threads));
    let n_bytes = format.n_bytes(n_rows, n_cols).unwrap();
    let mut weights = vec![0x24; WEIGHTS_BYTES / n_bytes * n_bytes];
    for matrix in weights.chunks_exact_mut(n_bytes) {
        let trailer = i2_s_trailer(1.0);
        matrix[n_bytes - trailer.len()..].copy_from_slice(&trailer);
    }
    let matrices: Vec<TernaryMatrix<'_>> = weights
        .chunks_exact(n_bytes)
        .map(|data| TernaryMatrix::new(format, data, n_rows, n_cols).unwrap())
        .collect();
    let mut acts = QuantizedRows::new(n_tokens, n_cols);
    acts.reset(n_tokens, n_cols);
    let values: Vec<i8> = (i8::MIN..=i8::MAX).cycle().take(n_cols).collect();
    (0..n_tokens).for_each(|token| acts.set_row(token, &values, 1.0));
    let mut out = vec![0.0; n_tokens * n_rows];
    let next = Cell::new(0);
    bencher
        .counter(BytesCount::new(n_bytes))
        .counter(ItemsCount::new(n_rows * n_cols * n_tokens))
        .bench_local(|| {
            next.set((next.get() + 1) % matrices.len());
            let job = MatmulJob::new(matrices[next.get()], &mut out, Store::Set);
            kernels.ternary_matmul(&pool, &acts, &mut [job]);
        });
}

/// Pinned, as a worker's is.
fn pool(n_threads: usize) -> ThreadPool {
    let cpus = (0..).take(n_threads).map(Some).collect();
    ThreadPool::new(PoolOptions { cpus, wait: Wait::Hybrid, name: "bench".to_owned() }).unwrap()
}
