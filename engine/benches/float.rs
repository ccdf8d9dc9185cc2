//! Float kernels and the fast head at the size of the 2B-4T model, as shares of this machine's read bandwidth.
//!
//! `cargo bench -p bitnetd-engine --bench float [-- THREADS]`
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark prints, and fails by panicking")]
#![allow(clippy::cast_precision_loss, reason = "sizes are far below 2^53")]

use std::time::Instant;

use bitnetd_engine::dense::{DenseFormat, DenseMatrix};
use bitnetd_engine::head::{FastHead, Wanted};
use bitnetd_engine::kernels::KernelSet;
use bitnetd_engine::kernels::float::{
    Activation, AttentionRow, AttentionScratch, AttentionShape, F16Layer, KV_BLOCK_LEN, KV_PAGE_TOKENS,
    KvLayer, Q8Layer, RopeStyle, RopeTable,
};
use bitnetd_engine::kernels::head::FastHeadScratch;
use bitnetd_engine::kernels::probe::read_bandwidth;
use bitnetd_engine::kernels::ternary::QuantizedRows;
use bitnetd_engine::pool::{PoolOptions, ThreadPool};
use half::f16;

const N_VOCAB: usize = 128_256;
const N_EMBD: usize = 2560;
const N_FF: usize = 6912;

fn main() {
    let threads = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect::<Vec<usize>>();
    let threads = if threads.is_empty() { vec![1, 2] } else { threads };
    for n_threads in threads {
        let pool = ThreadPool::new(PoolOptions::unpinned(n_threads)).unwrap();
        println!("{n_threads} threads, {}", KernelSet::detect().isa());
        heads(&pool);
        attention(&pool);
        elementwise(&pool);
    }
}

/// Median seconds of a few runs.
fn median(n: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut seconds: Vec<f64> = (0..n)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[n / 2]
}

fn noise_bytes(n: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252u64;
    let mut bytes = Vec::with_capacity(n + 8);
    while bytes.len() < n {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(n);
    bytes
}

/// F16 weights that are normal about, 0.02 in deviation.
fn f16_weights() -> Vec<u8> {
    let random = noise_bytes(N_VOCAB * N_EMBD * 4);
    let value = |b: &[u8; 4]| b.iter().map(|v| f32::from(*v) - 127.5).sum::<f32>() * (0.02 / 147.0);
    random.as_chunks().0.iter().flat_map(|b| f16::from_f32(value(b)).to_le_bytes()).collect()
}

fn heads(pool: &ThreadPool) {
    let kernels = KernelSet::detect();
    let weights = f16_weights();
    let bandwidth = read_bandwidth(kernels, pool, &weights) / 1e9;
    println!("  plain read: {bandwidth:.1} GB/s");
    let x: Vec<f32> = noise_bytes(8 * N_EMBD).into_iter().map(|b| (f32::from(b) - 127.5) / 73.0).collect();
    let mut out = vec![0.0; 8 * N_VOCAB];
    let report = |name: &str, n: usize, bytes: usize, seconds: f64| {
        let rate = bytes as f64 / seconds / 1e9;
        let (ms, share) = (seconds * 1e3, 100.0 * rate / bandwidth);
        println!(
            "  {name:6} n = {n}: {ms:7.2} ms, {:6.2} ms/token, {rate:5.1} GB/s, {share:3.0} % of read",
            ms / n as f64
        );
    };
    for format in [DenseFormat::F16, DenseFormat::Q8_0, DenseFormat::Q6K, DenseFormat::Q4_0] {
        // Any bytes are a matrix of these; small ones, so that scales are ordinary numbers.
        let n_bytes = format.row_bytes(N_EMBD).unwrap() * N_VOCAB;
        let data = if format == DenseFormat::F16 { weights.clone() } else { vec![0x11; n_bytes] };
        let w = DenseMatrix::new(format, &data, N_VOCAB, N_EMBD).unwrap();
        for n in [1, 8] {
            let (x, out) = (&x[..n * N_EMBD], &mut out[..n * N_VOCAB]);
            let seconds = median(5, || kernels.dense_matmul(pool, &w, x, out));
            report(format.name(), n, n_bytes, seconds);
        }
    }
    let w = DenseMatrix::new(DenseFormat::F16, &weights, N_VOCAB, N_EMBD).unwrap();
    let start = Instant::now();
    let mut image = vec![0; FastHead::n_bytes(&w).unwrap()];
    kernels.build_head_rows(pool, &w, 0..N_VOCAB, &mut image).unwrap();
    println!(
        "  screen of the head made in {:.1} s, {:.0} MB",
        start.elapsed().as_secs_f64(),
        image.len() as f64 / 1e6
    );
    let fast = FastHead::new(&image, N_VOCAB, N_EMBD).unwrap();
    let mut scratch = FastHeadScratch::new(8, N_VOCAB, N_EMBD, pool.n_threads());
    let wanted = [Wanted { n_best: 1, slack: 0.0, noise: None, rows: [&[], &[]] }; 8];
    for n in [1, 2, 4, 8] {
        let (x, out) = (&x[..n * N_EMBD], &mut out[..n * N_VOCAB]);
        let seconds =
            median(7, || kernels.fast_head(pool, (&fast, &w), (x, &wanted[..n]), &mut scratch, out));
        report("screened", n, image.len() / 2, seconds);
    }
}

/// Norms, the gated unit and rounding to int8, rotation of positions: a token alone, and a step of a prompt.
fn elementwise(pool: &ThreadPool) {
    let kernels = KernelSet::detect();
    let (n_heads, head_dim) = (20, 128);
    let mut rope = RopeTable::new(4096, head_dim, 500_000.0, None);
    rope.reach(4095);
    for n in [1, 256] {
        let noise = |len: usize| -> Vec<f32> {
            noise_bytes(n * len).into_iter().map(|b| (f32::from(b) - 127.5) / 73.0).collect()
        };
        let report = |name: &str, len: usize, seconds: f64| {
            let rate = (n * len) as f64 / seconds / 1e9;
            println!("  {name}, {n} rows: {:.2} us a row, {rate:.2} G elements/s", seconds * 1e6 / n as f64);
        };
        let (x, up, weight) = (noise(N_FF), noise(N_FF), vec![1.0; N_FF]);
        let mut acts = QuantizedRows::new(n, N_FF);
        acts.reset(n, N_EMBD);
        let norm = Some((&weight[..N_EMBD], 1e-5));
        let seconds = median(99, || kernels.norm_quantize(pool, &x[..n * N_EMBD], norm, &mut acts));
        report("RMSNorm and rounding", N_EMBD, seconds);
        acts.reset(n, N_FF);
        let (act, norm) = (Activation::ReluSquared, Some((&weight[..], 1e-5)));
        let seconds = median(99, || kernels.glu_norm_quantize(pool, act, [&x, &up], norm, &mut acts));
        report("relu^2, gate, RMSNorm and rounding", N_FF, seconds);
        let mut q = noise(n_heads * head_dim);
        let positions: Vec<u32> = (1000..).take(n).collect();
        let style = RopeStyle::Neox;
        let seconds = median(99, || kernels.rope_rows(pool, &mut q, n_heads, &rope, &positions, style));
        report("RoPE", n_heads * head_dim, seconds);
    }
}

fn attention(pool: &ThreadPool) {
    let kernels = KernelSet::detect();
    let shape = AttentionShape { n_heads: 20, n_kv_heads: 5, head_dim: 128 };
    let n_ctx = 4096;
    let slab: Vec<f16> = noise_bytes(n_ctx * shape.n_kv_heads * shape.head_dim)
        .into_iter()
        .map(|b| f16::from_f32((f32::from(b) - 127.5) / 73.0))
        .collect();
    let f16 = KvLayer::F16(F16Layer { keys: &slab, values: &slab });
    let codes: Vec<i8> = noise_bytes(slab.len()).into_iter().map(u8::cast_signed).collect();
    let scales = vec![f16::from_f32(0.01); slab.len() / KV_BLOCK_LEN];
    let q8 = KvLayer::Q8_0(Q8Layer {
        key_codes: &codes,
        key_scales: &scales,
        value_codes: &codes,
        value_scales: &scales,
    });
    let pages: Vec<u32> = (0..).take(n_ctx / KV_PAGE_TOKENS).collect();
    let mut scratch = AttentionScratch::new(pool.n_threads(), 4, n_ctx);
    let row_len = shape.n_heads * shape.head_dim;
    for (name, n, n_visible) in
        [("decode at 512", 1, 512), ("decode at 4096", 1, 4096), ("prefill of 256 at 256", 256, 256)]
    {
        let rows: Vec<AttentionRow<'_>> =
            (0..n).map(|i| AttentionRow { pages: &pages, n_visible: n_visible + i }).collect();
        let q: Vec<f32> =
            noise_bytes(n * row_len).into_iter().map(|b| (f32::from(b) - 127.5) / 73.0).collect();
        let mut out = vec![0.0; n * row_len];
        let n_positions: usize = rows.iter().map(|row| row.n_visible).sum();
        let products = 2 * n_positions * row_len;
        for (kv_name, kv) in [("f16", f16), ("q8_0", q8)] {
            let seconds = median(9, || kernels.attention(pool, shape, &q, kv, &rows, &mut scratch, &mut out));
            println!(
                "  attention, {name}, {kv_name}: {:.1} us, {:.1} G products/s",
                seconds * 1e6,
                products as f64 / seconds / 1e9
            );
        }
    }
}
