//! Which rows are computed exactly.
#![expect(
    clippy::inline_always,
    reason = "tasks must be compiled into the function of their instruction set"
)]
#![expect(clippy::cast_possible_truncation, reason = "a head has at most 2^32 rows (`FastHead`)")]

use super::screen::Input;
use crate::head::FastHead;
use crate::kernels::KernelSet;
use crate::kernels::float::lanes::{Lanes, LanesTask, padded};

/// A row is computed exactly if it could be the largest when every approximate logit may be this many standard
/// deviations off. For normal errors that fails about once in 10^15 logits.
const N_DEVIATIONS: f32 = 8.0;

/// At least one row in this many is computed exactly: the approximately largest.
pub(super) const SETTLED_SHARE: usize = 64;

/// At least this many rows are computed exactly, as far as there are so many.
const N_SETTLED_MIN: usize = 256;

impl KernelSet {
    /// Lists the rows to compute exactly, in increasing order.
    pub(super) fn select_rows(
        self,
        fast: &FastHead<'_>,
        input: &Input,
        logits: &[f32],
        candidates: &mut Vec<u32>,
    ) {
        candidates.clear();
        if input.is_finite {
            self.on_lanes(Select { fast, input, logits, candidates });
        } else {
            candidates.extend(0..logits.len() as u32);
        }
    }
}

struct Select<'a> {
    fast: &'a FastHead<'a>,
    input: &'a Input,
    logits: &'a [f32],
    candidates: &'a mut Vec<u32>,
}

impl LanesTask for Select<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) {
        let logits = self.logits;
        let threshold =
            threshold(logits, (logits.len() / SETTLED_SHARE).max(N_SETTLED_MIN).min(logits.len()));
        let margin = self.input.norm * N_DEVIATIONS;
        let errors = self.fast.errors();
        // Every row's upper bound is compared with the largest lower bound.
        let n_vectors = logits.len().div_ceil(16);
        let mut floors = [f32::NEG_INFINITY; 16];
        for i in 0..n_vectors {
            let (logits, errors) = vector(logits, errors, i);
            for j in 0..16 {
                let low = logits[j] - errors[j] * margin;
                floors[j] = if low > floors[j] { low } else { floors[j] };
            }
        }
        let floor = largest(&floors);
        for i in 0..n_vectors {
            let (vector, errors) = vector(logits, errors, i);
            let mut is_kept = [false; 16];
            for j in 0..16 {
                is_kept[j] = (vector[j] >= threshold) | (vector[j] + errors[j] * margin >= floor);
            }
            if is_kept != [false; 16] {
                let rows = (i * 16..logits.len()).zip(is_kept).filter(|(_, is_kept)| *is_kept);
                self.candidates.extend(rows.map(|(row, _)| row as u32));
            }
        }
    }
}

/// Logits and error factors `16 * i..16 * i + 16`. Past the end, logits are minus infinity.
#[inline(always)]
fn vector(logits: &[f32], errors: &[[u8; 4]], i: usize) -> ([f32; 16], [f32; 16]) {
    let logits = padded(&logits[i * 16..], f32::NEG_INFINITY);
    let bytes = padded(&errors[i * 16..], [0; 4]);
    let mut errors = [0.0; 16];
    for j in 0..16 {
        errors[j] = f32::from_le_bytes(bytes[j]);
    }
    (logits, errors)
}

/// A value that at least `n_wanted` of the logits reach, and not many more: found by bisection.
#[inline(always)]
fn threshold(logits: &[f32], n_wanted: usize) -> f32 {
    let (vectors, rest) = logits.as_chunks::<16>();
    let (mut highs, mut lows) = ([logits[0]; 16], [logits[0]; 16]);
    for v in vectors {
        for j in 0..16 {
            highs[j] = if v[j] > highs[j] { v[j] } else { highs[j] };
            lows[j] = if v[j] < lows[j] { v[j] } else { lows[j] };
        }
    }
    for (j, v) in rest.iter().enumerate() {
        highs[j] = highs[j].max(*v);
        lows[j] = lows[j].min(*v);
    }
    let (mut low, mut high) = (-largest(&lows.map(|v| -v)), largest(&highs));
    for _ in 0..24 {
        let middle = low + 0.5 * (high - low);
        let mut counts = [0u32; 16];
        for v in vectors {
            for j in 0..16 {
                counts[j] += u32::from(v[j] >= middle);
            }
        }
        let count = counts.iter().sum::<u32>() as usize + rest.iter().filter(|v| **v >= middle).count();
        if count < n_wanted {
            high = middle;
        } else {
            low = middle;
            if count <= n_wanted + n_wanted / 4 {
                break;
            }
        }
    }
    low
}

#[inline(always)]
fn largest(lanes: &[f32; 16]) -> f32 {
    lanes.iter().fold(lanes[0], |m, v| if *v > m { *v } else { m })
}
