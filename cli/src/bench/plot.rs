//! The report as an SVG picture: rates as lines, bounds as thin lines above them.

use bitnetd_proto::exit_code::ExitCode;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::{Rate, Report};
use crate::error::CliError;

/// Of the picture.
const SIZE: (u32, u32) = (1100, 460);
/// One for each number of threads, repeated if there are more; told apart by those who see few colours, too.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(120, 94, 20),
];

/// A line of points with a name.
struct Series {
    name: String,
    colour: RGBColor,
    points: Vec<(f64, f64)>,
    is_bound: bool,
}

/// The picture as the text of an SVG file.
pub(super) fn draw(report: &Report) -> Result<String, CliError> {
    let mut svg = String::new();
    let drawn = (|| {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let (left, right) = area.split_horizontally(SIZE.0 / 2);
        let prompt = format!("Reading a prompt of {} tokens", report.prompt_tokens);
        chart(&left, &prompt, "compute threads", &prefill(report))?;
        let answers = format!("Generating {} tokens each", report.answer_tokens);
        chart(&right, &answers, "answers together", &decode(report))?;
        area.present()
    })();
    drawn.map_err(|error| CliError::new(ExitCode::Software, format!("cannot draw: {error}")))?;
    Ok(svg)
}

#[expect(clippy::cast_precision_loss, reason = "small counts")]
fn point(x: usize, y: f64) -> (f64, f64) {
    (x as f64, y)
}

fn prefill(report: &Report) -> Vec<Series> {
    let line = |name: &str, is_bound: bool, value: fn(&Rate) -> f64| Series {
        name: name.into(),
        colour: COLOURS[0],
        points: report.prefill.iter().map(|rate| point(rate.threads, value(rate))).collect(),
        is_bound,
    };
    vec![
        line("measured", false, |rate| rate.tokens_per_s),
        line("bound", true, |rate| rate.bound_tokens_per_s),
    ]
}

fn decode(report: &Report) -> Vec<Series> {
    let mut all = Vec::new();
    for (bounds, colour) in report.bounds.iter().zip(COLOURS.into_iter().cycle()) {
        let threads = bounds.threads;
        let of = |value: fn(&Rate) -> f64| {
            let rates = report.decode.iter().filter(|rate| rate.threads == threads);
            rates.map(|rate| point(rate.sequences, value(rate))).collect()
        };
        let name = if threads == 1 { "1 thread".into() } else { format!("{threads} threads") };
        all.push(Series {
            name: format!("{name}, bound"),
            colour,
            points: of(|r| r.bound_tokens_per_s),
            is_bound: true,
        });
        all.push(Series { name, colour, points: of(|rate| rate.tokens_per_s), is_bound: false });
    }
    all
}

type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

fn chart(area: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, x_name: &str, all: &[Series]) -> Drawn {
    let points = || all.iter().flat_map(|series| &series.points);
    let x_max = points().map(|(x, _)| *x).fold(1.0, f64::max);
    let y_max = points().map(|(_, y)| *y).fold(1.0, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(58)
        .build_cartesian_2d(0.0..x_max + 0.5, 0.0..y_max)?;
    chart
        .configure_mesh()
        .light_line_style(RGBColor(240, 240, 240))
        .x_labels(9)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .x_desc(x_name)
        .y_desc("tokens/s in all")
        .label_style(("sans-serif", 13))
        .draw()?;
    for series in all {
        let (colour, width) = (series.colour, if series.is_bound { 1 } else { 3 });
        let style = ShapeStyle { color: colour.to_rgba(), filled: true, stroke_width: width };
        let points = series.points.iter().copied();
        if series.is_bound {
            chart.draw_series(DashedLineSeries::new(points, 6, 4, style))?
        } else {
            chart.draw_series(LineSeries::new(points, style).point_size(4))?
        }
        .label(series.name.clone())
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 13))
        .background_style(WHITE.mix(0.8))
        .border_style(RGBColor(200, 200, 200))
        .draw()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_names_every_line() {
        let svg = draw(&super::super::table::tests::report()).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for words in
            ["1 thread, bound", "2 threads", "answers together", "compute threads", "tokens/s in all"]
        {
            assert!(svg.contains(words), "no `{words}` in {svg}");
        }
    }
}
