//! Where products go, and the float steps that turn sums into outputs.

#![expect(unsafe_code, reason = "threads write disjoint columns of one output")]

use std::marker::PhantomData;
use std::ops::Range;

use super::{QuantizedRows, Store};

/// The output of a job, whose columns the threads share out among themselves.
#[derive(Debug)]
pub(super) struct Output<'a> {
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

impl<'a> Output<'a> {
    /// `out` is `(n_tokens, n_rows)`.
    pub(super) fn new(out: &'a mut [f32], n_rows: usize, store: Store) -> Self {
        Self { base: out.as_mut_ptr(), len: out.len(), n_rows, store, borrowed: PhantomData }
    }

    /// What happens to what is already there.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn store(&self) -> Store {
        self.store
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The places of matrix rows `rows` in the line of token `token`.
    ///
    /// # Safety
    /// No other thread uses these rows, and no earlier tile of them is still in use.
    #[expect(clippy::mut_from_ref, reason = "the threads write disjoint parts; see the contract")]
    #[inline(always)]
    pub(super) unsafe fn tile(&self, token: usize, rows: Range<usize>) -> &mut [f32] {
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
    pub(super) unsafe fn finish_dots<const N: usize>(
        &self,
        rows: Range<usize>,
        dots: &[i32; N],
        token: TokenScale,
        scale: f32,
    ) {
        // SAFETY: the caller's promise; the tile is dropped before this function returns.
        let out = unsafe { self.tile(token.token, rows) };
        self.put(out, &finished(*dots, token, scale));
    }

    /// Finishes the sums of one token for a tile of rows of a matrix with scales in its blocks.
    ///
    /// # Safety
    /// No other thread uses these rows.
    #[inline(always)]
    pub(super) unsafe fn finish_sums<const N: usize>(
        &self,
        rows: Range<usize>,
        sums: &[f32; N],
        token: TokenScale,
    ) {
        // SAFETY: the caller's promise; the tile is dropped before this function returns.
        let out = unsafe { self.tile(token.token, rows) };
        let mut values = *sums;
        values.iter_mut().for_each(|value| *value /= token.scale);
        self.put(out, &values);
    }

    /// Stores the values of one token for a tile of rows.
    ///
    /// # Safety
    /// No other thread uses these rows of this token.
    #[inline(always)]
    pub(super) unsafe fn store_tile<const N: usize>(
        &self,
        token: usize,
        rows: Range<usize>,
        values: &[f32; N],
    ) {
        // SAFETY: the caller's promise; the tile is dropped before this function returns.
        let out = unsafe { self.tile(token, rows) };
        self.put(out, values);
    }

    /// Stores as many of `values` as there are places.
    #[inline(always)]
    fn put<const N: usize>(&self, out: &mut [f32], values: &[f32; N]) {
        match (<&mut [f32; N]>::try_from(&mut *out), self.store) {
            // All of them, in vectors.
            (Ok(out), Store::Set) => *out = *values,
            (Ok(out), Store::Add) => out.iter_mut().zip(values).for_each(|(out, value)| *out += value),
            (Err(_), Store::Set) => out.iter_mut().zip(values).for_each(|(out, value)| *out = *value),
            (Err(_), Store::Add) => out.iter_mut().zip(values).for_each(|(out, value)| *out += value),
        }
    }
}

/// What sums of one token and a matrix with one scale come to.
#[inline(always)]
pub(super) fn finished<const N: usize>(dots: [i32; N], token: TokenScale, scale: f32) -> [f32; N] {
    let mut values = [0.0; N];
    for (value, dot) in values.iter_mut().zip(dots) {
        *value = (exact_f32(dot) - token.sum) / token.scale * scale;
    }
    values
}

/// What a token brings to the last float steps.
#[derive(Clone, Copy)]
pub(super) struct TokenScale {
    pub(super) token: usize,
    pub(super) sum: f32,
    pub(super) scale: f32,
}

impl TokenScale {
    pub(super) fn of(acts: &QuantizedRows, token: usize) -> Self {
        Self { token, sum: exact_f32(acts.sum(token)), scale: acts.scale(token) }
    }
}

/// A sum of codes times values as a float.
#[inline(always)]
#[expect(clippy::cast_precision_loss, reason = "exact below 2^24, and one defined rounding beyond")]
pub(super) fn exact_f32(dot: i32) -> f32 {
    dot as f32
}
