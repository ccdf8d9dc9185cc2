//! Activations as products want them: four columns of some tokens side by side.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::super::quantized_rows::Line;
use super::super::super::{QuantizedRows, TILE_ROWS};
use super::super::{load_line, panel::transposed};
use super::BLOCK_TOKENS;

/// Tokens of a group: a panel's rows times so many are accumulators that registers hold.
pub(super) const GROUP_TOKENS: usize = 11;

/// Groups of a block. The last has a token less.
pub(super) const BLOCK_GROUPS: usize = 3;

/// Tokens of the last group of a block.
pub(super) const LAST_TOKENS: usize = BLOCK_TOKENS - (BLOCK_GROUPS - 1) * GROUP_TOKENS;

/// Steps of four columns in a line of values.
const LINE_STEPS: usize = 16;

/// The values of some tokens.
#[derive(Default)]
pub(super) struct Values {
    lines: Vec<Line>, // (blocks, groups, steps, tokens of the group) of four values, and room for a register
    n_tokens: usize,
    n_steps: usize,
}

impl Values {
    /// Takes over the values of some tokens. In the last block there are zeros past the last.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn pack(&mut self, acts: &QuantizedRows, tokens: Range<usize>) {
        self.n_tokens = tokens.len();
        let n_lines = acts.n_blocks() * super::super::BLOCK_LINES;
        self.n_steps = n_lines * LINE_STEPS;
        let n_needed = self.n_blocks() * BLOCK_TOKENS * n_lines + 1;
        if self.lines.len() < n_needed {
            self.lines.resize(n_needed, Line([0; 64]));
        }
        for block in 0..self.n_blocks() {
            for group in 0..BLOCK_GROUPS {
                let first = tokens.start + block * BLOCK_TOKENS + group * GROUP_TOKENS;
                let n = width(group);
                let out = self.lines.as_mut_ptr().cast::<i32>().wrapping_add(self.start(block, group));
                for line in 0..n_lines {
                    let mut rows = [_mm512_setzero_si512(); 16];
                    for (token, row) in (first..tokens.end).zip(&mut rows[..n]) {
                        // SAFETY: each token has `n_lines` lines.
                        *row = unsafe { load_line(acts.lines(token), line) };
                    }
                    for (step, four) in transposed(rows).into_iter().enumerate() {
                        let place = out.wrapping_add((line * LINE_STEPS + step) * n);
                        // SAFETY: in what `resize` made, which has a line more. What is written too much is written
                        // again by those that follow.
                        unsafe { _mm512_storeu_si512(place.cast(), four) };
                    }
                }
            }
        }
    }

    /// Number of tokens.
    pub(super) fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Blocks of tokens.
    pub(super) fn n_blocks(&self) -> usize {
        self.n_tokens.div_ceil(BLOCK_TOKENS)
    }

    /// Groups that have tokens.
    pub(super) fn n_groups(&self) -> usize {
        let rest = self.n_tokens % BLOCK_TOKENS;
        self.n_tokens / BLOCK_TOKENS * BLOCK_GROUPS + rest.div_ceil(GROUP_TOKENS)
    }

    /// Steps of four columns.
    pub(super) fn n_steps(&self) -> usize {
        self.n_steps
    }

    /// Where a group starts, in fours.
    fn start(&self, block: usize, group: usize) -> usize {
        (block * BLOCK_TOKENS + group * GROUP_TOKENS) * self.n_steps
    }

    /// The values of a group, which has `T` tokens, for each step.
    pub(super) fn group<const T: usize>(&self, block: usize, group: usize) -> &[[i32; T]] {
        assert!(T == width(group) && block < self.n_blocks(), "group {group} of block {block}");
        // SAFETY: any bytes are integers, and lines are aligned to more.
        let (_, fours, _) = unsafe { self.lines.align_to::<i32>() };
        &fours[self.start(block, group)..].as_chunks().0[..self.n_steps]
    }

    /// The values of a step for each token of a block; past the last step zeros.
    #[inline(always)]
    pub(super) fn step(&self, block: usize, step: usize) -> [i32; BLOCK_TOKENS] {
        let mut fours = [0; BLOCK_TOKENS];
        if step < self.n_steps {
            let (first, rest) = fours.split_at_mut(GROUP_TOKENS);
            let (second, third) = rest.split_at_mut(GROUP_TOKENS);
            first.copy_from_slice(&self.group::<GROUP_TOKENS>(block, 0)[step]);
            second.copy_from_slice(&self.group::<GROUP_TOKENS>(block, 1)[step]);
            third.copy_from_slice(&self.group::<LAST_TOKENS>(block, 2)[step]);
        }
        fours
    }
}

/// Tokens of a group of a block.
fn width(group: usize) -> usize {
    if group + 1 < BLOCK_GROUPS { GROUP_TOKENS } else { LAST_TOKENS }
}

const _: () = assert!(LINE_STEPS == TILE_ROWS && GROUP_TOKENS <= TILE_ROWS);
