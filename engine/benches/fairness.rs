//! Chunks taken one by one against an even split, with a thread that is slower than the others.
//!
//! `cargo bench -p bitnetd-engine --bench fairness [-- CPU CPU …]`; without CPUs 0 and 1. Slower in two ways: its thread does
//! everything twice, as on an efficiency core; or a thread that spins shares its CPU, as a busy neighbour does. The work is reading weights that fit the caches, cut into as many chunks as a matrix
//! of the 2B-4T model.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark prints, and fails by panicking")]
#![allow(clippy::cast_precision_loss, reason = "sizes are far below 2^53")]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bitnetd_engine::kernels::KernelSet;
use bitnetd_engine::pool::{PoolOptions, ThreadPool, Wait};

/// Chunks of one region, and rows in each.
const N_CHUNKS: usize = 108;
const ROW: usize = 2560;
/// Rows of a region: a short one is one matrix of a decode step, a long one a matrix of a prefill step.
const REGIONS: [(&str, usize); 2] = [("short regions", 600), ("long regions", 12_000)];
const N_ROUNDS: usize = 15;

fn main() {
    let cpus: Vec<u32> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let cpus = if cpus.is_empty() { vec![0, 1] } else { cpus };
    let options = PoolOptions {
        cpus: cpus.iter().copied().map(Some).collect(),
        wait: Wait::Hybrid,
        name: "fair".into(),
    };
    let pool = ThreadPool::new(options).unwrap();
    let last = cpus.len() - 1;
    for (name, n_rows) in REGIONS {
        show(name, "all CPUs alike", compare(&pool, n_rows, |_| 1));
        show(
            name,
            "last CPU half as fast",
            compare(&pool, n_rows, |thread| if thread == last { 2 } else { 1 }),
        );
        show(name, "last CPU shared", with_hog(cpus[last], || compare(&pool, n_rows, |_| 1)));
    }
    let n = cpus.len() as f64;
    println!("the most there is to gain with {n} CPUs, one at half speed: {:.2}", (n - 0.5) / (n * 0.5));
}

fn show(region: &str, machine: &str, (even, chunks): (f64, f64)) {
    println!("{region}, {machine:<22} even {even:8.1} us, chunks {chunks:8.1} us, gain {:.2}", even / chunks);
}

/// Mean microseconds of a region, medians of rounds that alternate: even split, chunks.
fn compare(pool: &ThreadPool, n_rows: usize, slowness: impl Fn(usize) -> usize + Sync) -> (f64, f64) {
    let (kernels, x, w) = (KernelSet::detect(), vec![1.5_f32; ROW], vec![0.5_f32; ROW]);
    let work = |n: usize| {
        let mut out = vec![0.0; ROW];
        for _ in 0..n {
            kernels.rms_norm_row(black_box(&x), &w, 1e-5, &mut out);
        }
        black_box(&out);
    };
    let n_threads = pool.n_threads();
    let n_regions = 60_000 / n_rows.max(20);
    let mut times = (Vec::new(), Vec::new());
    for _ in 0..N_ROUNDS {
        times.0.push(time(n_regions, || {
            pool.run(&|thread| {
                let n = n_rows * (thread + 1) / n_threads - n_rows * thread / n_threads;
                work(n * slowness(thread));
            });
        }));
        let chunk = n_rows.div_ceil(N_CHUNKS);
        times.1.push(time(n_regions, || {
            pool.for_each_chunk(n_rows, chunk, &|thread, rows| work(rows.len() * slowness(thread)));
        }));
    }
    (median(times.0), median(times.1))
}

fn time(n_regions: usize, region: impl Fn()) -> f64 {
    let start = Instant::now();
    for _ in 0..n_regions {
        region();
    }
    start.elapsed().as_secs_f64() * 1e6 / n_regions as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Does something while a thread spins on `cpu`.
fn with_hog<T>(cpu: u32, f: impl FnOnce() -> T) -> T {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A pool pins the thread that makes it.
            let options = PoolOptions { cpus: vec![Some(cpu)], wait: Wait::Spin, name: "hog".into() };
            let _pinned = ThreadPool::new(options).unwrap();
            while !is_over.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let result = f();
        is_over.store(true, Ordering::Relaxed);
        result
    })
}
