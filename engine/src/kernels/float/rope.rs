//! Rotary position embedding.
//!
//! Angles and their sines are computed once, in f64 with `libm`, so that they are the same on every machine; for each
//! position when it first comes up, so that a long context window costs time and memory only where it is used.
#![expect(clippy::cast_precision_loss, reason = "positions and dimensions are far below 2^53")]
#![expect(clippy::cast_possible_truncation, reason = "f64 sines are rounded to f32 on purpose")]

use super::lanes::{Lanes, LanesTask};
use crate::kernels::KernelSet;
use crate::pool::ThreadPool;

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// i and i + `n_rot` / 2.
    Neox,
    /// 2 i and 2 i + 1.
    Norm,
}

/// Cosines and sines of the positions of the context window that came up so far.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Vec<f32>,         // (n_ready, n_rot / 2), with room for (n_ctx, n_rot / 2)
    sin: Vec<f32>,         // As cos.
    frequencies: Vec<f64>, // (n_rot / 2)
    n_ctx: usize,
}

impl RopeTable {
    /// Angles `position * base^(-2 i / n_rot) / freq_factors[i]`.
    ///
    /// # Panics
    /// If `n_rot` is zero or odd, or there are not `n_rot / 2` factors.
    #[must_use]
    pub fn new(n_ctx: usize, n_rot: usize, base: f32, freq_factors: Option<&[f32]>) -> Self {
        assert!(n_rot > 0 && n_rot.is_multiple_of(2), "RoPE rotates pairs, not {n_rot} elements");
        let n_half = n_rot / 2;
        if let Some(factors) = freq_factors {
            assert_eq!(factors.len(), n_half, "RoPE frequency factors");
        }
        let frequencies: Vec<f64> = (0..n_half)
            .map(|i| {
                let frequency = libm::pow(f64::from(base), -2.0 * i as f64 / n_rot as f64);
                frequency / freq_factors.map_or(1.0, |factors| f64::from(factors[i]))
            })
            .collect();
        let room = || Vec::with_capacity(n_ctx * n_half);
        Self { cos: room(), sin: room(), frequencies, n_ctx }
    }

    /// Makes the table reach up to `position`; nothing is allocated.
    ///
    /// # Panics
    /// If it is outside the context window.
    pub fn reach(&mut self, position: usize) {
        assert!(position < self.n_ctx, "position {position} of {}", self.n_ctx);
        for position in self.n_ready()..=position {
            for frequency in &self.frequencies {
                let (sin, cos) = libm::sincos(position as f64 * frequency);
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// How many elements of a head are rotated.
    #[must_use]
    pub fn n_rot(&self) -> usize {
        self.n_half() * 2
    }

    /// How many positions there can be.
    #[must_use]
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    fn n_half(&self) -> usize {
        self.frequencies.len()
    }

    fn n_ready(&self) -> usize {
        self.cos.len() / self.n_half()
    }
}

impl KernelSet {
    /// Rotates the first `n_rot` elements of every head of `x` (n, heads, head_dim) by its row's position:
    /// `a, b = fma(-b, sin, a * cos), fma(a, sin, b * cos)`.
    ///
    /// # Panics
    /// If `x` is not `positions.len()` rows of `heads` equal heads of at least `n_rot` elements, or a position
    /// was not reached.
    #[expect(clippy::too_many_arguments, reason = "the operands of one operation")]
    pub fn rope_rows(
        self,
        pool: &ThreadPool,
        x: &mut [f32],
        heads: usize,
        table: &RopeTable,
        positions: &[u32],
        style: RopeStyle,
    ) {
        let n_rows = positions.len();
        if n_rows == 0 {
            return assert!(x.is_empty(), "no positions for rows to rotate");
        }
        assert!(
            heads > 0 && x.len().is_multiple_of(n_rows * heads),
            "{} in {n_rows} x {heads} heads",
            x.len()
        );
        let row_len = x.len() / n_rows;
        let head_dim = row_len / heads;
        let n_half = table.n_half();
        assert!(
            head_dim >= table.n_rot(),
            "a head of {head_dim} has no {} elements to rotate",
            table.n_rot()
        );
        // A row is a few microseconds: short enough that a join costs more than it saves.
        let rows_per_chunk = if n_rows < 4 { n_rows } else { 4 };
        pool.for_each_row_mut(x, row_len, rows_per_chunk, &|_, row, x| {
            let position = positions[row] as usize;
            let cos = &table.cos[position * n_half..][..n_half];
            let sin = &table.sin[position * n_half..][..n_half];
            self.on_lanes(Rope { x, head_dim, cos, sin, style });
        });
    }
}

struct Rope<'a> {
    x: &'a mut [f32], // (heads, head_dim)
    head_dim: usize,
    cos: &'a [f32], // (n_rot / 2)
    sin: &'a [f32], // (n_rot / 2)
    style: RopeStyle,
}

impl LanesTask for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) {
        let n_half = self.cos.len();
        for head in self.x.chunks_exact_mut(self.head_dim) {
            match self.style {
                RopeStyle::Neox => {
                    let (first, second) = head[..2 * n_half].split_at_mut(n_half);
                    let pairs = first.iter_mut().zip(second);
                    for ((a, b), (cos, sin)) in pairs.zip(self.cos.iter().zip(self.sin)) {
                        (*a, *b) = ((-*b).mul_add(*sin, *a * cos), a.mul_add(*sin, *b * cos));
                    }
                }
                RopeStyle::Norm => {
                    let pairs = head[..2 * n_half].as_chunks_mut::<2>().0;
                    for ([a, b], (cos, sin)) in pairs.iter_mut().zip(self.cos.iter().zip(self.sin)) {
                        (*a, *b) = ((-*b).mul_add(*sin, *a * cos), a.mul_add(*sin, *b * cos));
                    }
                }
            }
        }
    }
}
