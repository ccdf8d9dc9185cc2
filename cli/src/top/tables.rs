//! Workers and jobs as rows of cells.

use std::time::Duration;

use bitnetd_proto::status::{JobReport, SlotReport, StatusReport};
use ratatui::style::Style;
use ratatui::text::Line;

use super::cores;
use super::draw::tokens_of;
use super::palette::Palette;
use crate::control::{format_age, percent};

/// A table of words; what is a number stands on the right.
#[derive(Debug)]
pub(super) struct Table {
    pub name: &'static str,
    /// Beside the name.
    pub note: String,
    columns: Vec<Column>,
    rows: Vec<(Vec<String>, Style)>,
    /// Rows that there are beyond these.
    n_beyond: u64,
}

#[derive(Clone, Copy, Debug)]
struct Column {
    title: &'static str,
    width: usize,
    is_number: bool,
}

const fn word(title: &'static str, width: usize) -> Column {
    Column { title, width, is_number: false }
}

const fn number(title: &'static str, width: usize) -> Column {
    Column { title, width, is_number: true }
}

const WORKERS: [Column; 12] = [
    number("W", 3),
    word("STATE", 8),
    number("PID", 7),
    word("CPUS", 9),
    number("JOBS", 4),
    number("PREFILL", 7),
    number("DECODE", 6),
    number("CPU", 4),
    number("WAIT", 4),
    number("KV", 4),
    number("PSS", 6),
    number("REST", 4),
];
/// Beside those where there is room.
const WORKERS_MORE: [Column; 2] = [number("MIGR", 6), word("LAST EXIT", 24)];

const JOBS: [Column; 8] = [
    number("JOB", 8),
    number("W", 3),
    word("PHASE", 8),
    number("TOKENS", 13),
    word("", 16),
    number("RATE", 8),
    number("AGE", 8),
    word("", 7),
];

/// The workers; with `is_wide` more about each.
pub(super) fn workers(report: &StatusReport, palette: Palette, is_wide: bool) -> Table {
    let busy = cores::busy_of_workers(&report.cpus);
    let row = |slot: &SlotReport| {
        let style = match slot.state.as_str() {
            "failed" => palette.bad(),
            "ready" => palette.worker(slot.slot),
            _ => palette.passing(),
        };
        // Where there is no process its cores do something else.
        let busy = slot.pid.and_then(|_| busy.get(&slot.slot).copied());
        let mut cells = worker_cells(slot, busy);
        if is_wide {
            let migrations: Option<u64> = slot.threads.iter().map(|thread| thread.migrations).sum();
            cells.push(migrations.map_or_else(dash, |n| n.to_string()));
            cells.push(slot.last_exit.clone().unwrap_or_else(dash));
        }
        (cells, style)
    };
    let more: &[Column] = if is_wide { &WORKERS_MORE } else { &[] };
    let n_ready = report.slots.iter().filter(|slot| slot.state == "ready").count();
    let totals = &report.totals;
    Table {
        name: "Workers",
        note: format!(
            "{n_ready} of {} ready, {} restarts, {} jobs moved; tokens/s",
            report.slots.len(),
            totals.restarts,
            totals.failovers
        ),
        columns: WORKERS.iter().chain(more).copied().collect(),
        rows: report.slots.iter().map(row).collect(),
        n_beyond: 0,
    }
}

fn worker_cells(slot: &SlotReport, busy: Option<f64>) -> Vec<String> {
    let load = &slot.load;
    #[expect(clippy::cast_precision_loss, reason = "shown as a percentage")]
    let kv = (load.kv_tokens_max > 0).then(|| load.kv_tokens as f64 / load.kv_tokens_max as f64);
    vec![
        slot.slot.to_string(),
        slot.state.clone(),
        slot.pid.map_or_else(dash, |pid| pid.to_string()),
        slot.cpus.clone(),
        slot.jobs.to_string(),
        slot.prefill_per_s.map_or_else(dash, short),
        slot.decode_per_s.map_or_else(dash, short),
        percent(slot.running_share().or(busy)),
        percent(slot.waiting_share()),
        percent(kv),
        memory(slot),
        slot.restarts.to_string(),
    ]
}

/// The share of a worker in what it has in memory; `~` before what counts shared pages in full.
pub(crate) fn memory(slot: &SlotReport) -> String {
    match (slot.load.memory, slot.resident_bytes) {
        (Some(memory), _) => bytes(memory.pss_bytes),
        (None, Some(resident)) => format!("~{}", bytes(resident)),
        (None, None) => dash(),
    }
}

/// The jobs.
pub(super) fn jobs(report: &StatusReport, palette: Palette) -> Table {
    let row = |job: &JobReport| {
        let style = match (job.slot, job.phase.as_str()) {
            (_, "suspect" | "moving") => palette.passing(),
            (Some(slot), _) => palette.worker(slot),
            (None, _) => palette.dim(),
        };
        let cells = vec![
            job.job.to_string(),
            job.slot.map_or_else(dash, |slot| slot.to_string()),
            job.phase.clone(),
            tokens_of(job),
            progress(job),
            job.tokens_per_s.map_or_else(dash, |rate| format!("{rate:.1}/s")),
            format_age(Duration::try_from_secs_f64(job.age_s).unwrap_or_default()),
            if job.is_durable { "durable".into() } else { String::new() },
        ];
        (cells, style)
    };
    let n_running = report.jobs.iter().filter(|job| job.slot.is_some()).count();
    Table {
        name: "Jobs",
        note: format!("{n_running} running, {} waiting", report.queued),
        columns: JOBS.to_vec(),
        rows: report.jobs.iter().map(row).collect(),
        n_beyond: report.n_jobs_beyond,
    }
}

/// `#######         `: of the most tokens that it may have.
fn progress(job: &JobReport) -> String {
    const LEN: usize = 16;
    let n = (job.tokens as usize * LEN).checked_div(job.tokens_max as usize).unwrap_or(0).min(LEN);
    format!("{}{}", "━".repeat(n), "·".repeat(LEN - n))
}

impl Table {
    pub(super) fn n_rows(&self) -> usize {
        self.rows.len() + usize::from(self.n_beyond > 0)
    }

    /// Columns of text.
    pub(super) fn width(&self) -> u16 {
        let width = self.columns.iter().map(|column| column.width + 1).sum::<usize>();
        u16::try_from(width).unwrap_or(u16::MAX)
    }

    pub(super) fn header(&self, palette: Palette) -> Line<'static> {
        let titles: Vec<String> = self.columns.iter().map(|column| column.title.to_owned()).collect();
        Line::styled(self.line(&titles), palette.dim())
    }

    /// Rows from `first` on, in at most `room` lines; the last says what is missing.
    pub(super) fn rows(&self, first: usize, room: usize, palette: Palette) -> Vec<Line<'static>> {
        if self.rows.is_empty() {
            return vec![Line::styled("  none", palette.dim())];
        }
        let first = first.min(self.first_max(room));
        let is_cut = self.rows.len() - first > room || self.n_beyond > 0;
        let n_shown = (self.rows.len() - first).min(if is_cut { room.saturating_sub(1) } else { room });
        let show = |(cells, style): &(Vec<String>, Style)| Line::styled(self.line(cells), *style);
        let mut lines: Vec<Line<'static>> = self.rows.iter().skip(first).take(n_shown).map(show).collect();
        let n_more = (self.rows.len() - first - n_shown) as u64 + self.n_beyond;
        if n_more > 0 {
            let above = if first > 0 { format!(", {first} above") } else { String::new() };
            lines.push(Line::styled(format!("  … and {n_more} more{above}"), palette.dim()));
        }
        lines
    }

    /// The last first row that makes sense: the end of the table is seen then.
    pub(super) fn first_max(&self, room: usize) -> usize {
        self.rows.len().saturating_sub(room.saturating_sub(usize::from(self.n_beyond > 0)).max(1))
    }

    fn line(&self, cells: &[String]) -> String {
        let cell = |(column, cell): (&Column, &String)| {
            let Column { width, is_number, .. } = *column;
            let len = cell.chars().count();
            if len > width && !is_number {
                let kept: String = cell.chars().take(width - 1).collect();
                format!("{kept}…")
            } else if is_number {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            }
        };
        let cells: Vec<String> = self.columns.iter().zip(cells).map(cell).collect();
        cells.join(" ").trim_end().to_owned()
    }
}

fn dash() -> String {
    "-".to_owned()
}

/// A rate in at most six letters.
pub(super) fn short(rate: f64) -> String {
    if rate >= 1000.0 { format!("{rate:.0}") } else { format!("{rate:.1}") }
}

/// `812M`, `1.2G`.
#[expect(clippy::cast_precision_loss, reason = "shown with two figures")]
fn bytes(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib >= 1000.0 { format!("{:.1}G", mib / 1024.0) } else { format!("{mib:.0}M") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(n_rows: usize, n_beyond: u64) -> Table {
        let rows = (0..n_rows).map(|row| (vec![row.to_string()], Style::new())).collect();
        Table { name: "Rows", note: String::new(), columns: vec![number("N", 3)], rows, n_beyond }
    }

    fn shown(table: &Table, first: usize, room: usize) -> Vec<String> {
        let lines = table.rows(first, room, Palette::new(false));
        lines.iter().map(|line| line.to_string().trim().to_owned()).collect()
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        assert_eq!(shown(&table(3, 0), 0, 3), ["0", "1", "2"]);
        assert_eq!(shown(&table(5, 0), 0, 3), ["0", "1", "… and 3 more"]);
        assert_eq!(shown(&table(5, 0), 1, 3), ["1", "2", "… and 2 more, 1 above"]);
        assert_eq!(shown(&table(5, 0), 9, 3), ["2", "3", "4"], "the end is the end");
        assert_eq!(shown(&table(3, 7), 0, 3), ["0", "1", "… and 8 more"]);
        assert_eq!(shown(&table(3, 7), 9, 3), ["1", "2", "… and 7 more, 1 above"]);
        assert_eq!(shown(&table(0, 0), 0, 3), ["none"]);
    }

    #[test]
    fn figures_are_short() {
        assert_eq!([bytes(0), bytes(812 << 20), bytes(1234 << 20)], ["0M", "812M", "1.2G"]);
        assert_eq!([short(0.04), short(999.94), short(12_345.6)], ["0.0", "999.9", "12346"]);
    }
}
