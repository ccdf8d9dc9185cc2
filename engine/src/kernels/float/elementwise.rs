//! RMSNorm, gated activations, residual additions and f16 stores: one row at a time.
#![expect(clippy::cast_precision_loss, reason = "row lengths are far below 2^24")]

use half::f16;

use super::lanes::{Lanes, LanesTask, dot, padded};
use crate::kernels::KernelSet;
use crate::pool::ThreadPool;

/// The activation of the gate in a feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// max(x, 0)^2 (`bitnet-b1.58`, `bitnet-25`).
    ReluSquared,
    /// x / (1 + e^-x) (`bitnet`, `llama`).
    Silu,
}

impl KernelSet {
    /// RMSNorm: `out = (x * r) * weight` with `r = 1 / sqrt(sum(x^2) / n + eps)`.
    ///
    /// # Panics
    /// If lengths differ.
    pub fn rms_norm_row(self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == weight.len() && x.len() == out.len(), "lengths of an RMSNorm");
        self.on_lanes(RmsNorm { x, weight, eps, out });
    }

    /// [`Self::rms_norm_row`] of each row of `x` (n, cols), rows in parallel.
    ///
    /// # Panics
    /// If `x` is not whole rows of the weight's length or `out` not of its size.
    pub fn rms_norm_rows(self, pool: &ThreadPool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let n_cols = weight.len();
        assert!(x.len() == out.len() && x.len().is_multiple_of(n_cols), "lengths of RMSNorms");
        pool.for_each_row_mut(out, n_cols, 1, &|_, row, out| {
            self.rms_norm_row(&x[row * n_cols..][..n_cols], weight, eps, out);
        });
    }

    /// `out = act(gate) * up`.
    ///
    /// # Panics
    /// If lengths differ.
    pub fn glu_row(self, act: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && gate.len() == out.len(), "lengths of a gated activation");
        self.on_lanes(Glu { act, gate, up, out });
    }

    /// `x = x + y`.
    ///
    /// # Panics
    /// If lengths differ.
    pub fn add_row(self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "lengths of a sum");
        self.on_lanes(Add { x, y });
    }

    /// Rounds to f16 (nearest even; beyond its range to infinity).
    ///
    /// # Panics
    /// If lengths differ.
    pub fn store_f16_row(self, src: &[f32], dst: &mut [f16]) {
        assert_eq!(src.len(), dst.len(), "lengths of an f16 store");
        self.on_lanes(StoreF16 { src, dst });
    }
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl LanesTask for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let mean = dot(lanes, self.x, self.x) / self.x.len() as f32;
        let r = 1.0 / (mean + self.eps).sqrt();
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = (x * r) * weight;
        }
    }
}

struct Glu<'a> {
    act: Activation,
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl LanesTask for Glu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.act {
            Activation::ReluSquared => {
                for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
                    // Written so that NaN stays.
                    let positive = if *gate <= 0.0 { 0.0 } else { *gate };
                    *out = (positive * positive) * up;
                }
            }
            Activation::Silu => {
                // First e^-gate to `out`, in vectors, then the divisions.
                let minus = lanes.splat(-1.0);
                let (gate, gate_rest) = self.gate.as_chunks::<16>();
                let (out, out_rest) = self.out.as_chunks_mut::<16>();
                for (out, gate) in out.iter_mut().zip(gate) {
                    lanes.store(lanes.exp(lanes.mul(lanes.load(gate), minus)), out);
                }
                if !gate_rest.is_empty() {
                    let mut last = padded(gate_rest, 0.0);
                    lanes.store(lanes.exp(lanes.mul(lanes.load(&last), minus)), &mut last);
                    out_rest.copy_from_slice(&last[..out_rest.len()]);
                }
                for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
                    *out = (gate / (1.0 + *out)) * up;
                }
            }
        }
    }
}

struct Add<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
}

impl LanesTask for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) {
        for (x, y) in self.x.iter_mut().zip(self.y) {
            *x += y;
        }
    }
}

struct StoreF16<'a> {
    src: &'a [f32],
    dst: &'a mut [f16],
}

impl LanesTask for StoreF16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (src, src_rest) = self.src.as_chunks::<16>();
        let (dst, dst_rest) = self.dst.as_chunks_mut::<16>();
        for (dst, src) in dst.iter_mut().zip(src) {
            lanes.store_f16(lanes.load(src), dst);
        }
        let mut last = [f16::ZERO; 16];
        lanes.store_f16(lanes.load(&padded(src_rest, 0.0)), &mut last);
        dst_rest.copy_from_slice(&last[..dst_rest.len()]);
    }
}
