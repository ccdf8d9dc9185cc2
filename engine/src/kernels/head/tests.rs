//! The fast head: images, bit-identity, and what it promises about the logits.

use proptest::prelude::*;

use super::select::SETTLED_SHARE;
use super::*;
use crate::dense::{DenseFormat, quantize_row};
use crate::head::FastHeadError;
use crate::pool::PoolOptions;

fn pool(n_threads: usize) -> ThreadPool {
    ThreadPool::new(PoolOptions::unpinned(n_threads)).unwrap()
}

/// About normal.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f32::from(u16::try_from(state >> 48).unwrap()) / 32768.0 - 1.0
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

fn bytes_of(format: DenseFormat, values: &[f32], n_cols: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    values.chunks(n_cols).for_each(|row| quantize_row(format, row, &mut bytes).unwrap());
    bytes
}

fn fast_logits(set: KernelSet, pool: &ThreadPool, image: &[u8], w: &DenseMatrix<'_>, x: &[f32]) -> Vec<f32> {
    let fast = FastHead::from_bytes(image).unwrap();
    let n = x.len() / w.n_cols();
    let mut scratch = FastHeadScratch::new(n, w.n_rows(), w.n_cols());
    let mut logits = vec![f32::NAN; n * w.n_rows()];
    set.fast_head(pool, (&fast, w), x, &mut scratch, &mut logits);
    logits
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

fn argmax(v: &[f32]) -> usize {
    (0..v.len()).fold(0, |best, i| if v[i] > v[best] { i } else { best })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn logits_depend_on_weights_and_input_alone(
        n_rows in 1usize..600, n_cols in 1usize..300, n in 1usize..7, seed: u64,
    ) {
        let (values, x) = (noise(seed, n_rows * n_cols), noise(!seed, n * n_cols));
        let bytes = bytes_of(DenseFormat::F16, &values, n_cols);
        let w = DenseMatrix::new(DenseFormat::F16, &bytes, n_rows, n_cols).unwrap();
        let (one, three) = (pool(1), pool(3));
        let mut sets = KernelSet::all_present();
        let scalar = sets.next().unwrap();
        let image = FastHead::build(&w, scalar, &one).unwrap();
        let expected = fast_logits(scalar, &one, &image, &w, &x);
        for set in sets.chain([scalar]) {
            prop_assert!(FastHead::build(&w, set, &three).unwrap() == image, "{set:?}");
            prop_assert_eq!(bits(&fast_logits(set, &three, &image, &w, &x)), bits(&expected), "{:?}", set);
            for (x, expected) in x.chunks(n_cols).zip(expected.chunks(n_rows)) {
                prop_assert_eq!(bits(&fast_logits(set, &one, &image, &w, x)), bits(expected), "{:?} alone", set);
            }
        }
    }
}

/// A head with what is hard for few bits: a few columns fifty times as large, rows of very different size.
fn hard_head(n_rows: usize, n_cols: usize) -> Vec<f32> {
    let mut values = noise(17, n_rows * n_cols);
    for (row, values) in values.chunks_mut(n_cols).enumerate() {
        values[3] *= 50.0;
        values[n_cols / 2] = values[n_cols / 2] * 20.0 + 10.0;
        let size = [0.1, 1.0, 0.5, 2.0][row % 4];
        values.iter_mut().for_each(|v| *v *= size);
    }
    values
}

#[test]
fn the_largest_logits_are_exact() {
    let (n_rows, n_cols, n) = (4099, 640, 12);
    let set = KernelSet::detect();
    let pool = pool(2);
    for (name, values) in [("normal", noise(5, n_rows * n_cols)), ("hard", hard_head(n_rows, n_cols))] {
        for format in [DenseFormat::F16, DenseFormat::Q8_0] {
            let bytes = bytes_of(format, &values, n_cols);
            let w = DenseMatrix::new(format, &bytes, n_rows, n_cols).unwrap();
            let image = FastHead::build(&w, set, &pool).unwrap();
            let mut x = noise(6, n * n_cols);
            // One input points where a row points; one is a single spike.
            x[..n_cols].copy_from_slice(&values[77 * n_cols..][..n_cols]);
            x[n_cols..2 * n_cols].fill(0.0);
            x[n_cols + 5] = 3.0;
            let mut exact = vec![0.0; n * n_rows];
            set.dense_matmul(&pool, &w, &x, &mut exact);
            let logits = fast_logits(set, &pool, &image, &w, &x);
            for (i, (logits, exact)) in logits.chunks(n_rows).zip(exact.chunks(n_rows)).enumerate() {
                assert_eq!(argmax(logits), argmax(exact), "{name} {i}");
                let n_exact = logits.iter().zip(exact).filter(|(a, b)| a.to_bits() == b.to_bits()).count();
                assert!(n_exact >= 256.max(n_rows / SETTLED_SHARE), "{name} {i}: {n_exact} exact");
                assert!(n_exact <= n_rows / 4, "{name} {i}: {n_exact} exact are no fewer bytes");
            }
        }
    }
}

/// The promise of `N_DEVIATIONS`: errors are normal, of the deviation that the image says.
#[test]
fn errors_are_as_the_image_says() {
    let (n_rows, n_cols, n) = (2048, 512, 16);
    let set = KernelSet::detect();
    let pool = pool(2);
    for (name, values) in [("normal", noise(8, n_rows * n_cols)), ("hard", hard_head(n_rows, n_cols))] {
        let bytes = bytes_of(DenseFormat::F16, &values, n_cols);
        let w = DenseMatrix::new(DenseFormat::F16, &bytes, n_rows, n_cols).unwrap();
        let image = FastHead::build(&w, set, &pool).unwrap();
        let fast = FastHead::from_bytes(&image).unwrap();
        let x = noise(9, n * n_cols);
        let (mut exact, mut approximate) = (vec![0.0; n * n_rows], vec![0.0; n * n_rows]);
        set.dense_matmul(&pool, &w, &x, &mut exact);
        let mut screen = Screen::new(n, n_cols);
        let inputs = set.screen(&pool, &fast, &x, &mut screen, &mut approximate);
        let (mut sum, mut largest) = (0.0f64, 0.0f64);
        for (i, (a, e)) in approximate.iter().zip(&exact).enumerate() {
            let deviation = f32::from_le_bytes(fast.errors()[i % n_rows]) * inputs[i / n_rows].norm;
            let z = f64::from((a - e) / deviation);
            sum += z * z;
            largest = largest.max(z.abs());
        }
        let spread = (sum / f64::from(u32::try_from(exact.len()).unwrap())).sqrt();
        assert!((0.8..1.05).contains(&spread), "{name}: deviation is {spread} of what was stored");
        assert!(largest < 6.0, "{name}: an error of {largest} deviations in {} logits", exact.len());
    }
}

#[test]
fn an_input_without_a_norm_is_computed_exactly() {
    let (n_rows, n_cols) = (300, 200);
    let bytes = bytes_of(DenseFormat::F16, &noise(1, n_rows * n_cols), n_cols);
    let w = DenseMatrix::new(DenseFormat::F16, &bytes, n_rows, n_cols).unwrap();
    let pool = pool(2);
    for set in KernelSet::all_present() {
        let image = FastHead::build(&w, set, &pool).unwrap();
        for special in [f32::NAN, f32::INFINITY, 1e30, 1e-44, 0.0] {
            let mut x = vec![0.0; n_cols];
            x[7] = special;
            let mut exact = vec![0.0; n_rows];
            set.dense_matmul(&pool, &w, &x, &mut exact);
            let logits = fast_logits(set, &pool, &image, &w, &x);
            for (a, b) in logits.iter().zip(&exact) {
                assert!(a == b || (a.is_nan() && b.is_nan()), "{set:?} {special}: {a} for {b}");
            }
        }
    }
}

#[test]
fn zero_rows_and_bad_weights() {
    let (set, pool) = (KernelSet::detect(), pool(2));
    let mut values = noise(1, 40 * 100);
    values[..300].fill(0.0);
    let bytes = bytes_of(DenseFormat::F32, &values, 100);
    let w = DenseMatrix::new(DenseFormat::F32, &bytes, 40, 100).unwrap();
    let image = FastHead::build(&w, set, &pool).unwrap();
    assert!(fast_logits(set, &pool, &image, &w, &noise(2, 100))[..3].iter().all(|v| *v == 0.0));
    let mut bytes = bytes;
    for row in [31, 17] {
        bytes[row * 400..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    }
    let w = DenseMatrix::new(DenseFormat::F32, &bytes, 40, 100).unwrap();
    assert_eq!(FastHead::build(&w, set, &pool).unwrap_err(), FastHeadError::NotFinite { row: 17 });
}

#[test]
fn bytes_that_are_no_image_are_refused() {
    let (set, pool) = (KernelSet::detect(), pool(1));
    let bytes = bytes_of(DenseFormat::F16, &noise(1, 40 * 100), 100);
    let w = DenseMatrix::new(DenseFormat::F16, &bytes, 40, 100).unwrap();
    let image = FastHead::build(&w, set, &pool).unwrap();
    assert_eq!(image.len(), FastHead::n_bytes(&w).unwrap());
    assert!(FastHead::build_into(&w, set, &pool, &mut vec![0; image.len() - 1]).is_err());
    for len in [0, 63, 64, image.len() - 1] {
        assert!(FastHead::from_bytes(&image[..len]).is_err(), "{len}");
    }
    let spoilt = |at: usize, value: u8| {
        let mut image = image.clone();
        image[at] = value;
        FastHead::from_bytes(&image).map(|_| ())
    };
    assert_eq!(spoilt(0, 0), Err(FastHeadError::Header));
    assert_eq!(spoilt(40, 1), Err(FastHeadError::Header));
    assert!(matches!(spoilt(8, 41), Err(FastHeadError::Length { n_rows: 41, .. })));
    assert!(matches!(spoilt(15, 0xff), Err(FastHeadError::Shape { .. })));
    assert!(matches!(spoilt(23, 0xff), Err(FastHeadError::Shape { .. })));
    assert_eq!(spoilt(64 + 4 * 5 + 3, 0xff), Err(FastHeadError::NotFinite { row: 5 }));
}
