//! The fast head: images, bit-identity, and what it promises about the logits.

use proptest::prelude::*;

use super::*;
use crate::dense::{DenseFormat, quantize_row};
use crate::head::FastHeadError;
use crate::noise::Noise;
use crate::pool::PoolOptions;
use crate::sampler::{Sampler, SamplerScratch, SamplingParams};

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

/// The image of a head.
fn image_of(set: KernelSet, pool: &ThreadPool, w: &DenseMatrix<'_>) -> Vec<u8> {
    let mut image = vec![0; FastHead::n_bytes(w).unwrap()];
    // In two steps, as it is made.
    let middle = w.n_rows() / 3;
    set.build_head_rows(pool, w, 0..middle, &mut image).unwrap();
    set.build_head_rows(pool, w, middle..w.n_rows(), &mut image).unwrap();
    image
}

const BEST: Wanted<'static> = Wanted { n_best: 1, slack: 0.0, noise: None, rows: [&[], &[]] };

fn fast_logits(
    set: KernelSet,
    pool: &ThreadPool,
    image: &[u8],
    w: &DenseMatrix<'_>,
    x: &[f32],
    wanted: &[Wanted<'_>],
) -> Vec<f32> {
    let fast = FastHead::new(image, w.n_rows(), w.n_cols()).unwrap();
    fast.check().unwrap();
    let mut scratch = FastHeadScratch::new(wanted.len(), w.n_rows(), w.n_cols(), pool.n_threads());
    let mut logits = vec![f32::NAN; wanted.len() * w.n_rows()];
    set.fast_head(pool, (&fast, w), (x, wanted), &mut scratch, &mut logits);
    logits
}

fn exact_logits(set: KernelSet, pool: &ThreadPool, w: &DenseMatrix<'_>, x: &[f32]) -> Vec<f32> {
    let mut exact = vec![0.0; x.len() / w.n_cols() * w.n_rows()];
    set.dense_matmul(pool, w, x, &mut exact);
    exact
}

/// What different requests want.
fn some_wishes(n: usize, seed: u64) -> Vec<Wanted<'static>> {
    let noisy = |temperature| Some((Noise::new(seed, 9), temperature));
    let all = [
        BEST,
        Wanted { n_best: 3, rows: [&[0], &[7, 2]], ..BEST },
        Wanted { noise: noisy(1.0), ..BEST },
        Wanted { slack: 2.5, ..BEST },
        Wanted { noise: noisy(0.1), n_best: 2, ..BEST },
        Wanted { n_best: 40, ..BEST },
    ];
    (0..n).map(|i| all[(i + (seed % 6) as usize) % 6]).collect()
}

/// Every logit is exact or minus infinity, and the exact ones are those that are wanted, at least. Returns how many
/// are exact.
#[track_caller]
fn assert_wanted_are_exact(logits: &[f32], exact: &[f32], wanted: &Wanted<'_>) -> usize {
    let score = |row: usize| wanted.score(u32::try_from(row).unwrap(), exact[row]);
    let mut scores: Vec<f32> = (0..exact.len()).map(score).collect();
    scores.sort_by(|a, b| b.total_cmp(a));
    let floor = scores.get(wanted.n_best - 1).map_or(f32::NEG_INFINITY, |score| score - wanted.slack);
    let mut n_exact = 0;
    for (row, (logit, exact)) in logits.iter().zip(exact).enumerate() {
        let is_exact = logit.to_bits() == exact.to_bits();
        assert!(is_exact || *logit == f32::NEG_INFINITY, "row {row}: {logit} for {exact}");
        let by_name = wanted.rows.iter().any(|rows| rows.contains(&u32::try_from(row).unwrap()));
        assert!(is_exact || (score(row) < floor && !by_name), "row {row} of score {} is wanted", score(row));
        n_exact += usize::from(is_exact);
    }
    n_exact
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
        n_rows in 1usize..600, n_cols in 64usize..300, n in 1usize..11, seed: u64,
    ) {
        let (values, x) = (noise(seed, n_rows * n_cols), noise(!seed, n * n_cols));
        let bytes = bytes_of(DenseFormat::F16, &values, n_cols);
        let w = DenseMatrix::new(DenseFormat::F16, &bytes, n_rows, n_cols).unwrap();
        let wanted = some_wishes(n, seed);
        let (one, three) = (pool(1), pool(3));
        let mut sets = KernelSet::all_present();
        let scalar = sets.next().unwrap();
        let image = image_of(scalar, &one, &w);
        let expected = fast_logits(scalar, &one, &image, &w, &x, &wanted);
        let exact = exact_logits(scalar, &one, &w, &x);
        for ((logits, exact), wanted) in expected.chunks(n_rows).zip(exact.chunks(n_rows)).zip(&wanted) {
            assert_wanted_are_exact(logits, exact, wanted);
        }
        for set in sets.chain([scalar]) {
            prop_assert!(image_of(set, &three, &w) == image, "{set:?}");
            let logits = fast_logits(set, &three, &image, &w, &x, &wanted);
            prop_assert_eq!(bits(&logits), bits(&expected), "{:?}", set);
            let each = x.chunks(n_cols).zip(wanted.chunks(1)).zip(expected.chunks(n_rows));
            for ((x, wanted), expected) in each {
                let alone = fast_logits(set, &one, &image, &w, x, wanted);
                prop_assert_eq!(bits(&alone), bits(expected), "{:?} alone", set);
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
fn what_is_wanted_is_exact_and_little_else_is_read() {
    let (n_rows, n_cols, n) = (4099, 640, 12);
    let set = KernelSet::detect();
    let pool = pool(2);
    for (name, values) in [("normal", noise(5, n_rows * n_cols)), ("hard", hard_head(n_rows, n_cols))] {
        for format in [DenseFormat::F16, DenseFormat::Q8_0] {
            let bytes = bytes_of(format, &values, n_cols);
            let w = DenseMatrix::new(format, &bytes, n_rows, n_cols).unwrap();
            let image = image_of(set, &pool, &w);
            let mut x = noise(6, n * n_cols);
            // One input points where a row points; one is a single spike.
            x[..n_cols].copy_from_slice(&values[77 * n_cols..][..n_cols]);
            x[n_cols..2 * n_cols].fill(0.0);
            x[n_cols + 5] = 3.0;
            let exact = exact_logits(set, &pool, &w, &x);
            let wanted = some_wishes(n, 0);
            let logits = fast_logits(set, &pool, &image, &w, &x, &wanted);
            for (i, (logits, exact)) in logits.chunks(n_rows).zip(exact.chunks(n_rows)).enumerate() {
                let n_exact = assert_wanted_are_exact(logits, exact, &wanted[i]);
                let is_greedy = wanted[i].n_best == 1 && wanted[i].noise.is_none() && wanted[i].slack == 0.0;
                assert!(
                    !is_greedy || n_exact <= n_rows / 16,
                    "{name} {i}: {n_exact} exact are no fewer bytes"
                );
            }
        }
    }
}

/// What `Sampler` is promised: it cannot tell the two heads apart.
#[test]
fn every_request_gets_the_token_of_the_exact_head() {
    let (n_rows, n_cols, n) = (3000, 256, 24);
    let (set, pool) = (KernelSet::detect(), pool(2));
    let bytes = bytes_of(DenseFormat::F16, &noise(3, n_rows * n_cols), n_cols);
    let w = DenseMatrix::new(DenseFormat::F16, &bytes, n_rows, n_cols).unwrap();
    let image = image_of(set, &pool, &w);
    let mut x = noise(4, n * n_cols);
    x.iter_mut().for_each(|v| *v *= 0.2); // Logits of a few units, as models have them.
    let exact = exact_logits(set, &pool, &w, &x);
    let base = SamplingParams { temperature: 1.0, seed: 5, ..SamplingParams::default() };
    let all = [
        SamplingParams { temperature: 0.0, ..base.clone() },
        base.clone(),
        SamplingParams { temperature: 0.3, ..base.clone() },
        SamplingParams { top_k: 40, top_p: 0.9, ..base.clone() },
        SamplingParams { min_p: 0.05, ..base.clone() },
        SamplingParams { repetition_penalty: 1.3, presence_penalty: 0.5, ..base.clone() },
        SamplingParams { temperature: 0.0, repetition_penalty: 2.0, ..base.clone() },
        SamplingParams { logit_bias: vec![(5, 4.0), (9, f32::NEG_INFINITY)], top_k: 5, ..base.clone() },
    ];
    let mut scratch = SamplerScratch::default();
    for params in all {
        let sampler = Sampler::new(params.clone(), n_rows).unwrap();
        for (i, (x, exact)) in x.chunks(n_cols).zip(exact.chunks(n_rows)).enumerate() {
            let best = u32::try_from(argmax(exact)).unwrap();
            let history = [best, 17, best];
            let wanted = sampler.wanted(&history, i as u64).unwrap();
            let logits = fast_logits(set, &pool, &image, &w, x, &[wanted]);
            let mut token = |logits| sampler.sample(logits, &history, i as u64, None, &mut scratch).id;
            assert_eq!(token(&logits), token(exact), "{params:?}");
        }
    }
    let nucleus = SamplingParams { top_p: 0.9, ..base };
    assert!(Sampler::new(nucleus, n_rows).unwrap().wanted(&[], 0).is_none(), "it needs all logits");
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
        let image = image_of(set, &pool, &w);
        let fast = FastHead::new(&image, n_rows, n_cols).unwrap();
        let x = noise(9, n * n_cols);
        let exact = exact_logits(set, &pool, &w, &x);
        let mut screen = Screen::new(n, n_rows, n_cols);
        let mut bounds = vec![0.0; n * n_rows];
        set.screen(&pool, &fast, (&x, &vec![BEST; n]), &mut screen, &mut bounds);
        for has_both in [false, true] {
            let (mut sum, mut largest) = (0.0f64, 0.0f64);
            for (i, exact) in exact.iter().enumerate() {
                let (screened, row) = (screen.of(i / n_rows, n_rows), i % n_rows);
                let codes = &fast.half(1)[row * 128..][..128];
                let second = scalar::sums([codes], [screened.codes])[0][0];
                let second = has_both.then_some(second);
                let [a, deviation] = screened.input.approximate(&fast, row, screened.sums[row], second);
                let z = f64::from((a - exact) / deviation);
                sum += z * z;
                largest = largest.max(z.abs());
            }
            let spread = (sum / f64::from(u32::try_from(exact.len()).unwrap())).sqrt();
            assert!(
                (0.8..1.05).contains(&spread),
                "{name} {has_both}: deviation is {spread} of what was stored"
            );
            assert!(
                largest < 6.0,
                "{name} {has_both}: an error of {largest} deviations in {} logits",
                exact.len()
            );
        }
    }
}

#[test]
fn an_input_without_a_norm_is_computed_exactly() {
    let (n_rows, n_cols) = (300, 200);
    let bytes = bytes_of(DenseFormat::F16, &noise(1, n_rows * n_cols), n_cols);
    let w = DenseMatrix::new(DenseFormat::F16, &bytes, n_rows, n_cols).unwrap();
    let pool = pool(2);
    for set in KernelSet::all_present() {
        let image = image_of(set, &pool, &w);
        for special in [f32::NAN, f32::INFINITY, 1e30, 1e-44, 0.0] {
            let mut x = vec![0.0; n_cols];
            x[7] = special;
            let exact = exact_logits(set, &pool, &w, &x);
            let logits = fast_logits(set, &pool, &image, &w, &x, &[BEST]);
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
    let image = image_of(set, &pool, &w);
    let wanted = Wanted { rows: [&[0, 1], &[2, 9_999]], ..BEST };
    let logits = fast_logits(set, &pool, &image, &w, &noise(2, 100), &[wanted]);
    assert!(logits[..3].iter().all(|v| *v == 0.0));
    let mut bytes = bytes;
    for row in [31, 17] {
        bytes[row * 400..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    }
    let w = DenseMatrix::new(DenseFormat::F32, &bytes, 40, 100).unwrap();
    let mut image = image;
    let error = set.build_head_rows(&pool, &w, 0..40, &mut image).unwrap_err();
    assert_eq!(error, FastHeadError::NotFinite { row: 17 });
}

#[test]
fn bytes_that_are_no_image_are_refused() {
    let (set, pool) = (KernelSet::detect(), pool(1));
    let bytes = bytes_of(DenseFormat::F16, &noise(1, 40 * 100), 100);
    let w = DenseMatrix::new(DenseFormat::F16, &bytes, 40, 100).unwrap();
    let mut image = image_of(set, &pool, &w);
    assert!(FastHead::new(&image[1..], 40, 100).is_err() && FastHead::new(&image, 41, 100).is_err());
    assert!(set.build_head_rows(&pool, &w, 0..1, &mut image[1..]).is_err());
    assert!(matches!(FastHead::new(&image, 0, 100), Err(FastHeadError::Shape { .. })));
    assert!(matches!(FastHead::new(&image, 40, 63), Err(FastHeadError::Shape { .. })));
    assert!(matches!(FastHead::new(&image, usize::MAX, 1 << 20), Err(FastHeadError::Shape { .. })));
    image[4 * 5 + 3] = 0xff;
    assert_eq!(FastHead::new(&image, 40, 100).unwrap().check(), Err(FastHeadError::NotFinite { row: 5 }));
}
