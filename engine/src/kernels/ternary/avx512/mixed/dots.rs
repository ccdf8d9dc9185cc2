//! The rows that are multiplied.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::super::packed::{PackedRows, RowsJob};
use super::super::super::quantized_rows::Line;
use super::super::super::{TILE_ROWS, TokenScale};
use super::super::finish_dots;
use super::super::panel::{PANEL_ROWS, reserve, unpack};
use super::adds::Adds;
use super::step::{self, DotSteps, TILES};
use super::values::{BLOCK_GROUPS, GROUP_TOKENS, LAST_TOKENS, Values};
use super::{BLOCK_TOKENS, Unit};

/// Multiplies some rows, and does what it can of `adds` meanwhile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn multiply(
    unit: &Unit<'_, '_>,
    rows: Range<usize>,
    values: &Values,
    panels: &mut Vec<Line>,
    adds: &mut Adds<'_>,
) {
    for (job, rows) in unit.pieces(rows) {
        let packed = PackedRows::of(&job.matrix, rows.clone());
        let job = RowsJob { rows: packed, first_row: rows.start, matrix: &job.matrix, out: &job.out };
        multiply_rows(unit, &job, values, panels, adds);
    }
}

/// The same for rows of one matrix.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply_rows(
    unit: &Unit<'_, '_>,
    job: &RowsJob<'_>,
    values: &Values,
    panels: &mut Vec<Line>,
    adds: &mut Adds<'_>,
) {
    let (n_panels, panel_lines) = reserve(job, panels);
    for first_row in (0..job.rows.n_rows()).step_by(n_panels * PANEL_ROWS) {
        let first_rows = (first_row..job.rows.n_rows()).step_by(PANEL_ROWS).take(n_panels);
        for (first_row, panel) in first_rows.clone().zip(panels.chunks_exact_mut(panel_lines)) {
            unpack::<false>(job.rows, first_row, panel);
        }
        for place in
            (0..values.n_blocks()).flat_map(|block| (0..BLOCK_GROUPS).map(move |group| (block, group)))
        {
            for panel in first_rows.clone().zip(panels.chunks_exact(panel_lines)) {
                if place.1 + 1 < BLOCK_GROUPS {
                    multiply_group::<GROUP_TOKENS>(unit, job, panel, values, place, adds);
                } else {
                    multiply_group::<LAST_TOKENS>(unit, job, panel, values, place, adds);
                }
            }
        }
    }
}

/// Multiplies a panel with a group of tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply_group<const T: usize>(
    unit: &Unit<'_, '_>,
    job: &RowsJob<'_>,
    (first_row, panel): (usize, &[Line]),
    values: &Values,
    (block, group): (usize, usize),
    adds: &mut Adds<'_>,
) {
    let first_token = block * BLOCK_TOKENS + group * GROUP_TOKENS;
    let n_tokens = values.n_tokens().saturating_sub(first_token).min(T);
    if n_tokens == 0 {
        return;
    }
    let n_tiles = (job.rows.n_rows() - first_row).div_ceil(TILE_ROWS).min(TILES);
    for token in 0..n_tokens {
        for tile in 0..n_tiles {
            let scale = TokenScale::of(unit.acts, unit.tokens.start + first_token + token);
            // SAFETY: only this thread has these tokens of these rows, and nothing else of them is in use.
            let out = unsafe { job.tile(first_row + tile * TILE_ROWS, scale) };
            // What is written in the end is fetched meanwhile.
            _mm_prefetch::<_MM_HINT_T1>(out.as_ptr().cast());
        }
    }
    let mut steps = DotSteps { panel: panel.as_chunks().0, values: values.group::<T>(block, group) };
    let mut dots = [[_mm512_setzero_si512(); TILES]; T];
    while !steps.panel.is_empty() {
        let n = adds.n_ready().min(steps.panel.len());
        if n == 0 {
            step::dots(&mut dots, &steps);
            break;
        }
        let (now, later) = steps.split_at(n);
        adds.with_steps(&mut dots, &now);
        steps = later;
    }
    for (token, dots) in dots.iter().enumerate().take(n_tokens) {
        let scale = TokenScale::of(unit.acts, unit.tokens.start + first_token + token);
        for (tile, dots) in dots.iter().enumerate().take(n_tiles) {
            // SAFETY: only this thread has these tokens of these rows.
            unsafe { finish_dots(job, first_row + tile * TILE_ROWS, *dots, scale) };
        }
    }
}
