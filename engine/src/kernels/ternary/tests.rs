//! Every path against plain arithmetic over the unpacked weights, bit for bit.

use proptest::prelude::*;

use super::*;
use crate::pool::PoolOptions;
use crate::ternary::TernaryFormat;
use crate::ternary::tests::pack_tensor;

/// One product: a matrix and its activations.
#[derive(Clone, Debug)]
struct Case {
    format: TernaryFormat,
    n_rows: usize,
    n_cols: usize,
    n_tokens: usize,
    n_threads: usize,
    is_extreme: bool,
    store: Store,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let shape = (0..3_usize, 1..70_usize, 1..12_usize, prop_oneof![3 => 1..10_usize, 1 => 10..40_usize]);
    let how = (1..=3_usize, any::<bool>(), any::<bool>(), any::<u64>());
    (shape, how).prop_map(|((format, n_rows, n_blocks, n_tokens), (n_threads, is_extreme, adds, seed))| {
        let format = TernaryFormat::ALL[format];
        let n_cols = n_blocks * format.block_cols();
        let store = if adds { Store::Add } else { Store::Set };
        Case { format, n_rows, n_cols, n_tokens, n_threads, is_extreme, store, seed }
    })
}

/// A small generator of test data (xorshift64*).
struct Random(u64);

impl Random {
    fn byte(&mut self) -> u8 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()[7]
    }

    fn weight(&mut self, is_extreme: bool) -> i8 {
        if is_extreme { 1 } else { (self.byte() % 3).cast_signed() - 1 }
    }

    fn value(&mut self, is_extreme: bool) -> i8 {
        if is_extreme { [-128, 127][usize::from(self.byte() > 250)] } else { self.byte().cast_signed() }
    }
}

/// Multiplies by the book, straight from the columns.
fn expected(matrix: &TernaryMatrix<'_>, acts: &QuantizedRows, before: &[f32], store: Store) -> Vec<f32> {
    let block_cols = matrix.format().block_cols();
    let (mut weights, mut scales) = (vec![0; matrix.n_cols()], vec![0.0; matrix.n_cols() / block_cols]);
    let mut out = before.to_vec();
    for row in 0..matrix.n_rows() {
        matrix.unpack_row(row, &mut weights, &mut scales);
        for token in 0..acts.n_rows() {
            let value = |col: usize| i32::from(acts.value(token, col));
            let (scale, sum) = (acts.scale(token), acts.sum(token));
            let y = if matrix.format() == TernaryFormat::I2S {
                let dot: i32 = weights.iter().enumerate().map(|(c, &w)| (i32::from(w) + 1) * value(c)).sum();
                (exact_f32(dot) - exact_f32(sum)) / scale * matrix.scale()
            } else {
                let blocks = weights.chunks_exact(block_cols).zip(&scales).enumerate();
                let acc = blocks.fold(0.0, |acc, (b, (weights, scale))| {
                    let products =
                        weights.iter().zip(b * block_cols..).map(|(&w, c)| i32::from(w) * value(c));
                    exact_f32(products.sum()).mul_add(*scale, acc)
                });
                acc / scale
            };
            let out = &mut out[token * matrix.n_rows() + row];
            *out = if store == Store::Add { *out + y } else { y };
        }
    }
    out
}

fn random_acts(random: &mut Random, case: &Case) -> QuantizedRows {
    let mut acts = QuantizedRows::new(case.n_tokens, case.n_cols);
    acts.reset(case.n_tokens, case.n_cols);
    for token in 0..case.n_tokens {
        let values: Vec<i8> = (0..case.n_cols).map(|_| random.value(case.is_extreme)).collect();
        acts.set_row(token, &values, 0.5 + f32::from(random.byte()));
    }
    acts
}

#[track_caller]
fn assert_same(actual: &[f32], expected: &[f32], context: &str) {
    let differs = |(a, e): (&f32, &f32)| a.to_bits() != e.to_bits();
    if let Some(i) = actual.iter().zip(expected).position(differs) {
        panic!("{context}: value {i} is {} and not {}", actual[i], expected[i]);
    }
}

fn check(case: &Case) {
    let mut random = Random(case.seed | 1);
    // Extreme sums are those of both signs.
    let sign = if case.is_extreme && case.seed.is_multiple_of(2) { -1 } else { 1 };
    let weights: Vec<i8> =
        (0..case.n_rows * case.n_cols).map(|_| sign * random.weight(case.is_extreme)).collect();
    let scale = |block: usize| [0.37, 1.25, -0.002, 3.1][block % 4];
    let data = pack_tensor(case.format, &weights, case.n_cols, &scale);
    let matrix = TernaryMatrix::new(case.format, &data, case.n_rows, case.n_cols).unwrap();
    let acts = random_acts(&mut random, case);
    let before: Vec<f32> =
        (0..case.n_rows * case.n_tokens).map(|_| f32::from(random.byte()) * 0.1 - 12.0).collect();
    let expected = expected(&matrix, &acts, &before, case.store);
    let pool = ThreadPool::new(PoolOptions::unpinned(case.n_threads)).unwrap();
    for kernels in KernelSet::all_present() {
        // Two jobs over the same input, as gate and up are.
        let (mut first, mut second) = (before.clone(), before.clone());
        let mut jobs =
            [MatmulJob::new(matrix, &mut first, case.store), MatmulJob::new(matrix, &mut second, case.store)];
        kernels.ternary_matmul(&pool, &acts, &mut jobs);
        let context = format!("{} {case:?}", kernels.isa());
        assert_same(&first, &expected, &context);
        assert_same(&second, &expected, &context);
    }
    if case.format == TernaryFormat::I2S {
        check_lookup(case, &pool, matrix, &acts, (&before, &expected));
        check_columns(case, &pool, matrix, &acts);
    }
}

/// The same by tables.
fn check_lookup(
    case: &Case,
    pool: &ThreadPool,
    matrix: TernaryMatrix<'_>,
    acts: &QuantizedRows,
    (before, expected): (&[f32], &[f32]),
) {
    let mut packed = vec![0xff; LookupMatrix::bytes_of(case.n_rows, case.n_cols)];
    for (item, packed) in packed.chunks_mut(STRIP_BYTES).enumerate() {
        assert!(LookupMatrix::pack_strip(&matrix, item, packed));
    }
    let lookup = LookupMatrix::new(&packed, case.n_rows, case.n_cols);
    for kernels in KernelSet::all_present() {
        let context = format!("by tables, {} {case:?}", kernels.isa());
        let (mut first, mut second) = (before.to_vec(), before.to_vec());
        let job = |out| MatmulJob::new(matrix, out, case.store).with_lookup(lookup);
        kernels.ternary_matmul(pool, acts, &mut [job(&mut first), job(&mut second)]);
        assert_same(&first, expected, &context);
        assert_same(&second, expected, &context);
    }
}

/// The same by columns: with the activations of the case, and with most of them zero.
fn check_columns(case: &Case, pool: &ThreadPool, matrix: TernaryMatrix<'_>, acts: &QuantizedRows) {
    let mut packed = vec![0xff; case.n_cols * ColumnMatrix::column_bytes_of(case.n_rows)];
    for (unit, packed) in packed.chunks_mut(128 * ColumnMatrix::column_bytes_of(case.n_rows)).enumerate() {
        assert!(ColumnMatrix::pack_unit(&matrix, unit, packed));
    }
    let columns = ColumnMatrix::new(&packed, case.n_rows, case.n_cols);
    let mut random = Random(case.seed | 1);
    for keep in [256, 80, 1, 0] {
        let mut sparse = QuantizedRows::new(case.n_tokens, case.n_cols);
        sparse.reset(case.n_tokens, case.n_cols);
        for token in 0..case.n_tokens {
            let mut value = |col| if u16::from(random.byte()) < keep { acts.value(token, col) } else { 0 };
            let values: Vec<i8> = (0..case.n_cols).map(&mut value).collect();
            sparse.set_row(token, &values, acts.scale(token));
        }
        let before = vec![0.25; case.n_rows * case.n_tokens];
        let expected = expected(&matrix, &sparse, &before, case.store);
        for kernels in KernelSet::all_present() {
            let mut out = before.clone();
            let job = MatmulJob::new(matrix, &mut out, case.store);
            let left_out = kernels.ternary_sparse(pool, &sparse, job, columns);
            assert_same(&out, &expected, &format!("by columns, {keep} of 256, {} {case:?}", kernels.isa()));
            let by_columns = columns.filter(|_| kernels.reads_image() && case.n_tokens == 1);
            let n_zeros = (0..case.n_cols).filter(|col| sparse.value(0, *col) == 0).count();
            assert_eq!(left_out, by_columns.map_or(0, |columns| n_zeros * columns.column_bytes()));
        }
    }
}

proptest! {
    #[test]
    fn every_isa_multiplies_by_the_book(case in case()) {
        check(&case);
    }
}

#[test]
fn sums_of_wide_extreme_rows_do_not_overflow() {
    for format in TernaryFormat::ALL {
        for (n_tokens, seed) in [(1, 3), (1, 4), (2, 3), (7, 4), (20, 3)] {
            let n_cols = 64 * 256;
            let (n_rows, n_threads) = (17, 2);
            check(&Case {
                format,
                n_rows,
                n_cols,
                n_tokens,
                n_threads,
                is_extreme: true,
                store: Store::Set,
                seed,
            });
        }
    }
}

#[test]
fn tall_matrices_with_few_tokens() {
    for (n_rows, n_threads, n_tokens) in
        [(600, 1, 1), (600, 3, 1), (257, 1, 1), (385, 2, 4), (600, 3, 7), (129, 1, 8)]
    {
        check(&Case {
            format: TernaryFormat::I2S,
            n_rows,
            n_cols: 11 * 128,
            n_tokens,
            n_threads,
            is_extreme: false,
            store: Store::Set,
            seed: 5,
        });
    }
}

#[test]
fn many_tokens_and_threads() {
    for (n_rows, n_cols, n_threads, n_tokens) in [
        (700, 384, 3, 33),
        (300, 1408, 2, 9),
        (130, 256, 1, 100),
        (1000, 128, 2, 71),
        (9, 640, 4, 48),
        (513, 1152, 1, 32),
        (290, 512, 5, 75),
    ] {
        for is_extreme in [false, true] {
            let (format, store) = (TernaryFormat::I2S, Store::Add);
            check(&Case { format, n_rows, n_cols, n_tokens, n_threads, is_extreme, store, seed: 7 });
        }
    }
}

/// A file may have them, though no weight is 2: then it counts as that.
#[test]
fn codes_of_three_count_as_two() {
    let mut random = Random(11);
    let (n_rows, n_cols) = (37, 384);
    let mut data = pack_tensor(TernaryFormat::I2S, &vec![0; n_rows * n_cols], n_cols, &|_| 1.25);
    data[..n_rows * n_cols / 4].iter_mut().for_each(|byte| *byte = random.byte());
    let matrix = TernaryMatrix::new(TernaryFormat::I2S, &data, n_rows, n_cols).unwrap();
    for n_tokens in [1, 5, 12, 40] {
        let (format, n_threads, is_extreme, store, seed) = (TernaryFormat::I2S, 2, false, Store::Set, 3);
        let case = Case { format, n_rows, n_cols, n_tokens, n_threads, is_extreme, store, seed };
        let acts = random_acts(&mut random, &case);
        let mut out = vec![0.0; n_rows * n_tokens];
        let expected = expected(&matrix, &acts, &out, Store::Set);
        let pool = ThreadPool::new(PoolOptions::unpinned(n_threads)).unwrap();
        for kernels in KernelSet::all_present() {
            out.fill(0.0);
            kernels.ternary_matmul(&pool, &acts, &mut [MatmulJob::new(matrix, &mut out, Store::Set)]);
            assert_same(&out, &expected, &format!("{} {case:?}", kernels.isa()));
        }
    }
}

#[test]
#[should_panic(expected = "columns of")]
fn a_matrix_of_other_columns_is_refused() {
    let data = pack_tensor(TernaryFormat::I2S, &[0; 256], 256, &|_| 1.0);
    let matrix = TernaryMatrix::new(TernaryFormat::I2S, &data, 1, 256).unwrap();
    let mut acts = QuantizedRows::new(1, 256);
    acts.reset(1, 128);
    let pool = ThreadPool::new(PoolOptions::unpinned(1)).unwrap();
    let mut out = [0.0];
    KernelSet::detect().ternary_matmul(&pool, &acts, &mut [MatmulJob::new(matrix, &mut out, Store::Set)]);
}
