//! One frame: what there is to see, in whatever room there is.
//!
//! From the top: the service in two lines, cores, workers, jobs, keys. Where there are more rows than lines, the last line
//! says how many are missing.

use std::time::Duration;

use bitnetd_proto::status::{CpuReport, Health, JobReport, SlotReport, StatusReport};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::cores;
use super::palette::Palette;
use super::tables::{self, Table};
use crate::control::{format_age, format_count, health_name, percent};

/// Beyond this width workers and jobs stand side by side.
const SIDE_BY_SIDE: u16 = 170;
/// A title, a header and three rows: no table gets less.
const TABLE_LINES_MIN: u16 = 5;

/// Which table the keys move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Focus {
    Workers,
    #[default]
    Jobs,
}

/// What is shown.
#[derive(Debug)]
pub(super) struct View<'a> {
    /// The last that the daemon said.
    pub report: Option<&'a StatusReport>,
    /// What is wrong with the connection, and since when.
    pub trouble: Option<(&'a str, Duration)>,
    pub focus: Focus,
    /// First rows of the two tables.
    pub first_worker: usize,
    pub first_job: usize,
    /// Time between two looks; `None` where there are no keys to name.
    pub interval: Option<Duration>,
    pub palette: Palette,
}

/// Lines that would show everything.
pub(super) fn ideal_height(report: &StatusReport, width: u16) -> u16 {
    let cores = cores::n_lines_wanted(report.cpus.len(), usize::from(width)).min(24) + 1;
    let (workers, jobs) = (report.slots.len() + 2, report.jobs.len().max(1) + 2);
    let tables = if width >= SIDE_BY_SIDE { workers.max(jobs) } else { workers + jobs };
    u16::try_from(3 + cores + tables + usize::from(report.n_jobs_beyond > 0)).unwrap_or(u16::MAX)
}

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, view: &View<'_>) {
    let keys = u16::from(view.interval.is_some());
    let rows = [Constraint::Length(2), Constraint::Min(0), Constraint::Length(keys)];
    let [head, body, foot] = Layout::vertical(rows).areas(frame.area());
    frame.render_widget(Paragraph::new(header(view)), head);
    match view.report {
        Some(report) => draw_body(frame, body, report, view),
        None => frame.render_widget(Paragraph::new(Line::styled("no answer yet", view.palette.dim())), body),
    }
    if let Some(interval) = view.interval {
        frame.render_widget(Paragraph::new(keys_line(interval, view.palette)), foot);
    }
}

fn draw_body(frame: &mut Frame<'_>, area: Rect, report: &StatusReport, view: &View<'_>) {
    let wanted = cores::n_lines_wanted(report.cpus.len(), usize::from(area.width));
    // At most a third for the cores, and never so much that a table has no room.
    let n_tables = if area.width >= SIDE_BY_SIDE { 1 } else { 2 };
    let room = area.height.saturating_sub(TABLE_LINES_MIN * n_tables + 1);
    let n_rows = usize::from(room.min((area.height / 3).max(3)).max(1)).min(wanted);
    let lines = cores::lines(&report.cpus, usize::from(area.width), n_rows, view.palette);
    let cores_height = u16::try_from(lines.len() + 1).unwrap_or(u16::MAX).min(area.height);
    let [cores_area, rest] =
        Layout::vertical([Constraint::Length(cores_height), Constraint::Min(0)]).areas(area);
    let mut shown = vec![title("Cores", &cores_title(&report.cpus), area.width, view.palette.title())];
    shown.extend(lines);
    frame.render_widget(Paragraph::new(shown), cores_area);

    let workers = tables::workers(report, view.palette, rest.width >= SIDE_BY_SIDE);
    let jobs = tables::jobs(report, view.palette);
    let (workers_area, jobs_area) = if rest.width >= SIDE_BY_SIDE {
        let sides = [Constraint::Length(workers.width()), Constraint::Length(3), Constraint::Min(0)];
        let [left, _, right] = Layout::horizontal(sides).areas(rest);
        (left, right)
    } else {
        // Half for each, and what one does not need for the other.
        let wanted = |table: &Table| u16::try_from(table.n_rows().max(1) + 2).unwrap_or(u16::MAX);
        let left = rest.height.saturating_sub(wanted(&jobs)).max(rest.height / 2);
        let height = wanted(&workers).min(left);
        let parts = [Constraint::Length(height), Constraint::Min(0)];
        let [above, below] = Layout::vertical(parts).areas(rest);
        (above, below)
    };
    let is_interactive = view.interval.is_some();
    let style = |focus| {
        if is_interactive && view.focus == focus { view.palette.focused() } else { view.palette.title() }
    };
    draw_table(frame, workers_area, &workers, view.first_worker, style(Focus::Workers), view.palette);
    draw_table(frame, jobs_area, &jobs, view.first_job, style(Focus::Jobs), view.palette);
}

fn draw_table(
    frame: &mut Frame<'_>,
    area: Rect,
    table: &Table,
    first: usize,
    style: Style,
    palette: Palette,
) {
    let room = usize::from(area.height).saturating_sub(2);
    let mut shown = vec![title(table.name, &table.note, area.width, style), table.header(palette)];
    shown.extend(table.rows(first, room, palette));
    frame.render_widget(Paragraph::new(shown), area);
}

/// `── Cores ── 87% busy ─────`
fn title(name: &str, note: &str, width: u16, style: Style) -> Line<'static> {
    let name = format!(" {name} ");
    let note = if note.is_empty() { String::new() } else { format!(" {note} ") };
    let len = 2 + name.chars().count() + 1 + note.chars().count();
    let rest = usize::from(width).saturating_sub(len);
    Line::from(vec![
        Span::raw("──"),
        Span::styled(name, style),
        Span::raw("─"),
        Span::raw(note),
        Span::raw("─".repeat(rest)),
    ])
}

fn cores_title(cpus: &[CpuReport]) -> String {
    let n_owned = cpus.iter().filter(|cpu| cpu.slot.is_some()).count();
    let others = match cpus.len() - n_owned {
        0 => String::new(),
        n => format!(", {n} of nobody's"),
    };
    let stolen: Vec<f64> = cpus.iter().filter_map(|cpu| cpu.stolen).collect();
    #[expect(clippy::cast_precision_loss, reason = "a number of CPUs")]
    let stolen = stolen.iter().sum::<f64>() / stolen.len().max(1) as f64;
    let stolen = if stolen >= 0.01 { format!(", {} stolen", percent(Some(stolen))) } else { String::new() };
    format!("{n_owned} of workers{others}, {} busy{stolen}", percent(cores::mean_busy(cpus)))
}

fn header(view: &View<'_>) -> Vec<Line<'static>> {
    let palette = view.palette;
    let mut first = vec![Span::styled("bitnetd ", palette.title())];
    if let Some((trouble, since)) = view.trouble {
        let since = format_age(since);
        first.push(Span::styled(format!("NO ANSWER for {since}: {trouble}; trying again"), palette.bad()));
        let last = view.report.map_or("", |_| "what follows was so when it last answered");
        return vec![Line::from(first), Line::styled(last, palette.passing())];
    }
    let Some(report) = view.report else {
        return vec![Line::from(first)];
    };
    let style = match report.health {
        Health::Ready => palette.good(),
        Health::Starting | Health::Draining => palette.passing(),
        Health::Degraded => palette.bad(),
    };
    first.push(Span::styled(health_name(report.health), style));
    let up = format_age(Duration::try_from_secs_f64(report.uptime_s).unwrap_or_default());
    first.push(Span::raw(format!(", up {up}, pid {}", report.pid)));
    if let Some(model) = &report.model {
        let (name, size) = (&model.name, format_count(model.n_params));
        first.push(Span::raw(format!("; {name}, {size}, context {}, {}", model.n_ctx, model.isa)));
    }
    vec![Line::from(first), Line::from(counts(report))]
}

fn counts(report: &StatusReport) -> String {
    let totals = &report.totals;
    let sum = |rate: fn(&SlotReport) -> Option<f64>| report.slots.iter().filter_map(rate).sum::<f64>();
    let durable = report.journal.as_ref().map_or_else(String::new, |of| format!(", {} durable", of.queued));
    format!(
        "decode {}/s, prefill {}/s; {} of {} waiting{durable}; {} done, {} failed, {} refused",
        tables::short(sum(|slot| slot.decode_per_s)),
        tables::short(sum(|slot| slot.prefill_per_s)),
        report.queued,
        report.queue_max,
        totals.completed,
        totals.failed,
        totals.refused,
    )
}

fn keys_line(interval: Duration, palette: Palette) -> Line<'static> {
    let every = interval.as_secs_f64();
    Line::styled(
        format!("q quit   Tab workers or jobs   ↑ ↓ PgUp PgDn Home End scroll   every {every} s"),
        palette.dim(),
    )
}

/// A job's progress in words, for the table.
pub(super) fn tokens_of(job: &JobReport) -> String {
    format!("{}/{}", job.tokens, job.tokens_max)
}
