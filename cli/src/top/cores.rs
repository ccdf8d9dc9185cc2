//! The cores of a machine in as many rows as there are: as bars, as figures, or as one letter each.

use std::collections::BTreeMap;

use bitnetd_proto::status::CpuReport;
use ratatui::style::Style;
use ratatui::text::{Line, Span};

use super::palette::Palette;
use crate::control::percent;

/// Eighths of a letter, from none to all.
const EIGHTHS: [&str; 9] = [" ", "▏", "▎", "▍", "▌", "▋", "▊", "▉", "█"];
/// The same upright; a core that does nothing is still to be seen.
const LEVELS: [&str; 9] = ["·", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
/// Narrowest and widest cell with a bar.
const BAR_CELL: (usize, usize) = (22, 50);
/// A cell with two figures: `191  87%`.
const FIGURE_CELL: usize = 10;
/// Room for `128-191 ` before a row of letters.
const LABEL: usize = 9;

/// All cores in at most `n_rows` lines of `width` columns, if that can be.
pub(super) fn lines(cpus: &[CpuReport], width: usize, n_rows: usize, palette: Palette) -> Vec<Line<'static>> {
    if cpus.is_empty() {
        return vec![Line::styled("not known yet", palette.dim())];
    }
    let n_columns = |cell: usize| (width / cell).max(1);
    let n_needed = cpus.len().div_ceil(n_rows.max(1)); // Columns, at least.
    if n_needed <= n_columns(BAR_CELL.0) {
        let cell = (width / n_needed).clamp(BAR_CELL.0, BAR_CELL.1).min(width);
        return grid(cpus, n_columns(cell), |cpu| bar_cell(cpu, cell, palette));
    }
    if n_needed <= n_columns(FIGURE_CELL) {
        return grid(cpus, n_columns(FIGURE_CELL), |cpu| figure_cell(cpu, palette));
    }
    letters(cpus, width, palette)
}

/// How many lines are good to have: one for each core up to eight, and no more than needed for bars beyond.
pub(super) fn n_lines_wanted(n_cpus: usize, width: usize) -> usize {
    n_cpus.div_ceil((width / BAR_CELL.0).max(1)).max(n_cpus.min(4)).max(1)
}

/// Cells one below the other, then the next column.
fn grid(
    cpus: &[CpuReport],
    n_columns: usize,
    cell: impl Fn(&CpuReport) -> Vec<Span<'static>>,
) -> Vec<Line<'static>> {
    let n_rows = cpus.len().div_ceil(n_columns);
    let row = |row: usize| cpus.iter().skip(row).step_by(n_rows).flat_map(&cell).collect::<Vec<_>>();
    (0..n_rows).map(|number| Line::from(row(number))).collect()
}

/// `  3 ████████▌    87% w0`
fn bar_cell(cpu: &CpuReport, width: usize, palette: Palette) -> Vec<Span<'static>> {
    let owner = cpu.slot.map_or_else(String::new, |slot| format!("w{slot}"));
    let bar_len = width.saturating_sub(4 + 5 + 1 + 4 + 1);
    let style = style(cpu, palette);
    let (bar, stolen) = bar(cpu, bar_len);
    let rest = bar_len - bar.chars().count() - stolen.chars().count();
    vec![
        Span::raw(format!("{:>3} ", cpu.cpu)),
        Span::styled(bar, style),
        Span::styled(stolen, palette.bad()),
        Span::raw(" ".repeat(rest)),
        Span::raw(format!("{:>5} ", percent(cpu.busy))),
        Span::styled(format!("{owner:<4} "), style),
    ]
}

/// What is busy, and what the hypervisor took.
fn bar(cpu: &CpuReport, len: usize) -> (String, String) {
    let eighths = |share: f64| scaled(share, len * 8);
    let busy = eighths(cpu.busy.unwrap_or(0.0));
    let bar = EIGHTHS[8].repeat(busy / 8) + if busy % 8 == 0 { "" } else { EIGHTHS[busy % 8] };
    let left = len - bar.chars().count();
    (bar, "░".repeat((eighths(cpu.stolen.unwrap_or(0.0)) / 8).min(left)))
}

fn figure_cell(cpu: &CpuReport, palette: Palette) -> Vec<Span<'static>> {
    vec![
        Span::styled(format!("{:>3}", cpu.cpu), palette.dim()),
        Span::styled(format!(" {:>4}  ", percent(cpu.busy)), style(cpu, palette)),
    ]
}

/// Rows of a power of two of letters, so that numbers are found.
fn letters(cpus: &[CpuReport], width: usize, palette: Palette) -> Vec<Line<'static>> {
    let room = width.saturating_sub(LABEL).max(1);
    let per_row = 1 << room.ilog2();
    let row = |cpus: &[CpuReport]| {
        let (first, last) = (cpus.first().map_or(0, |of| of.cpu), cpus.last().map_or(0, |of| of.cpu));
        let label = Span::styled(format!("{:>7}  ", format!("{first}-{last}")), palette.dim());
        let letter = |cpu: &CpuReport| {
            let level = cpu.busy.map_or("?", |busy| LEVELS[scaled(busy, 8)]);
            Span::styled(level, style(cpu, palette))
        };
        Line::from(std::iter::once(label).chain(cpus.iter().map(letter)).collect::<Vec<_>>())
    };
    cpus.chunks(per_row).map(row).collect()
}

fn style(cpu: &CpuReport, palette: Palette) -> Style {
    cpu.slot.map_or_else(|| palette.dim(), |slot| palette.worker(slot))
}

/// A share of so many parts, rounded; something is never shown as nothing.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "between 0 and a number of columns"
)]
fn scaled(share: f64, n_parts: usize) -> usize {
    let parts = (share.clamp(0.0, 1.0) * n_parts as f64).round() as usize;
    if share > 0.005 { parts.max(1).min(n_parts) } else { parts }
}

/// Mean of what is known of the cores of workers.
pub(super) fn mean_busy(cpus: &[CpuReport]) -> Option<f64> {
    let busy: Vec<f64> = cpus.iter().filter(|cpu| cpu.slot.is_some()).filter_map(|cpu| cpu.busy).collect();
    #[expect(clippy::cast_precision_loss, reason = "a number of CPUs")]
    (!busy.is_empty()).then(|| busy.iter().sum::<f64>() / busy.len() as f64)
}

/// Busy cores of each worker in the mean.
pub(super) fn busy_of_workers(cpus: &[CpuReport]) -> BTreeMap<u32, f64> {
    let slots: std::collections::BTreeSet<u32> = cpus.iter().filter_map(|cpu| cpu.slot).collect();
    let of = |slot: u32| {
        let own: Vec<CpuReport> = cpus.iter().filter(|cpu| cpu.slot == Some(slot)).cloned().collect();
        Some((slot, mean_busy(&own)?))
    };
    slots.into_iter().filter_map(of).collect()
}

/// The colour of the first piece of a line that begins with a letter.
#[cfg(test)]
fn colour_of(line: &Line<'_>, letter: char) -> Option<ratatui::style::Color> {
    line.spans.iter().find(|span| span.content.starts_with(letter)).and_then(|span| span.style.fg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(n: u32) -> Vec<CpuReport> {
        let cpu = |cpu: u32| CpuReport {
            cpu,
            slot: (cpu < n / 2).then_some(cpu / 4),
            busy: Some(f64::from(cpu % 9) / 8.0),
            stolen: Some(0.0),
        };
        (0..n).map(cpu).collect()
    }

    fn shown(lines: &[Line<'_>]) -> String {
        lines.iter().map(|line| format!("{}\n", line.to_string().trim_end())).collect()
    }

    #[test]
    fn few_cores_are_bars_and_many_are_letters() {
        let palette = Palette::new(true);
        let wide = lines(&cpus(3), 60, 4, palette);
        insta::assert_snapshot!("bars", shown(&wide));
        let figures = lines(&cpus(16), 50, 4, palette);
        insta::assert_snapshot!("figures", shown(&figures));
        let letters = lines(&cpus(192), 80, 6, palette);
        insta::assert_snapshot!("letters", shown(&letters));
    }

    #[test]
    fn no_width_and_no_number_of_cores_is_too_much() {
        for n in [1, 2, 7, 64, 192, 1024] {
            for width in [1, 5, 22, 80, 200] {
                for n_rows in [1, 2, 8] {
                    let lines = lines(&cpus(n), width, n_rows, Palette::new(false));
                    assert!(!lines.is_empty(), "{n} {width} {n_rows}");
                }
            }
        }
    }

    #[test]
    fn workers_have_colours_unless_nobody_wants_them() {
        let coloured = lines(&cpus(16), 80, 8, Palette::new(true));
        assert_eq!(
            colour_of(&coloured[1], '█').or(colour_of(&coloured[1], '▏')),
            Palette::new(true).worker(0).fg
        );
        let plain = lines(&cpus(16), 80, 8, Palette::new(false));
        assert!(plain.iter().flat_map(|line| &line.spans).all(|span| span.style.fg.is_none()));
    }

    #[test]
    fn what_the_hypervisor_took_is_beside_what_was_busy() {
        let cpu = CpuReport { cpu: 0, slot: None, busy: Some(0.5), stolen: Some(0.25) };
        assert_eq!(bar(&cpu, 8), ("████".to_owned(), "░░".to_owned()));
        let all = CpuReport { busy: Some(1.0), stolen: Some(1.0), ..cpu };
        assert_eq!(bar(&all, 8), ("████████".to_owned(), String::new()));
    }
}
