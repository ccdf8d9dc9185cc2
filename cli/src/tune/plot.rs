//! The outcome as a picture: for each kind of work a bar for each split, with the range of its rounds.

use bitnetd_proto::exit_code::ExitCode;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::report::{Report, WorkloadReport};
use crate::error::CliError;

/// Width of the picture.
const WIDTH: u32 = 1100;
/// Panels beside each other.
const COLUMNS: usize = 2;
/// Height of a bar with its space.
const BAR: u32 = 34;
/// Height of a panel without its bars.
const FRAME: u32 = 110;
/// Height of the title.
const TITLE: u32 = 56;
/// The best split, those within the noise of it, the others; told apart by those who see few colours, too.
const BEST: RGBColor = RGBColor(0, 114, 178);
const OTHER: RGBColor = RGBColor(170, 190, 205);

type Area<'a, 'b> = &'a DrawingArea<SVGBackend<'b>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// The picture as the text of an SVG file.
pub(super) fn draw(report: &Report) -> Result<String, CliError> {
    let n_rows = report.workloads.len().div_ceil(COLUMNS).max(1);
    let panel = FRAME + BAR * u32::try_from(report.splits.len()).unwrap_or(1);
    let height = TITLE + panel * u32::try_from(n_rows).unwrap_or(1);
    let mut svg = String::new();
    let drawn = (|| {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let (title, panels) = area.split_vertically(TITLE);
        let place = &report.place;
        let heading = format!("{} on {}, CPUs {}", place.model, place.processor, place.cpus);
        title.draw_text(&heading, &("sans-serif", 19).into_text_style(&title), (16, 10))?;
        title.draw_text(&report.evidence(), &("sans-serif", 14).into_text_style(&title), (16, 34))?;
        for (workload, area) in report.workloads.iter().zip(panels.split_evenly((n_rows, COLUMNS))) {
            bars(&area, report, workload)?;
        }
        area.present()
    })();
    drawn.map_err(|error| CliError::new(ExitCode::Software, format!("cannot draw: {error}")))?;
    Ok(svg)
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "small counts"
)]
fn bars(area: Area<'_, '_>, report: &Report, workload: &WorkloadReport) -> Drawn {
    let n = workload.rows.len();
    let most = workload.rows.iter().map(|row| row.whole_range.1).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}: {}", workload.workload.name(), workload.load), ("sans-serif", 16))
        .margin(14)
        .x_label_area_size(34)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..most * 1.25, (n as f64)..0.0)?;
    // The first split is at the top; its name stands beside the middle of its bar.
    let name = |y: &f64| {
        let is_middle = (y.fract() - 0.5).abs() < 1e-6;
        report
            .splits
            .get(*y as usize)
            .filter(|_| is_middle)
            .map_or_else(String::new, |split| split.name.clone())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(WHITE)
        .x_labels(6)
        .y_labels(2 * n + 1)
        .y_label_formatter(&name)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .x_desc("tokens/s generated in all, whole work (line: slowest to fastest round)")
        .label_style(("sans-serif", 13))
        .draw()?;
    for (idx, row) in workload.rows.iter().enumerate() {
        let y = idx as f64;
        let colour = if idx == workload.whole.winner { BEST } else { OTHER };
        let (rate, (low, high)) = (row.whole_tokens_per_s, row.whole_range);
        let text = format!("{rate:.1}, p95 {:.2} s", row.p95_s);
        chart.draw_series([Rectangle::new([(0.0, y + 0.2), (rate, y + 0.8)], colour.filled())])?;
        chart.draw_series([PathElement::new([(low, y + 0.5), (high, y + 0.5)], BLACK.stroke_width(2))])?;
        chart.draw_series([Text::new(text, (high + most * 0.01, y + 0.34), ("sans-serif", 13))])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_names_every_split_and_every_kind_of_work() {
        let svg = draw(&super::super::report::tests::report()).unwrap();
        for words in
            ["large: 1 x (512", "small: ", "1x2", "2x1", "tokens/s generated in all", "within the noise"]
        {
            assert!(svg.contains(words), "no `{words}` in {svg}");
        }
    }
}
