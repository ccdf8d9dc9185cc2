//! The report as text: what the machine can do, then each rate as a share of that.

use std::fmt::Write as _;

use super::{BoundBy, Rate, Report};

/// A machine that changed by more was disturbed.
const MOVED_MAX: f64 = 0.1;

/// The whole report.
pub(super) fn text(report: &Report) -> String {
    let mut out = String::new();
    match write(report, &mut out) {
        Ok(()) => out,
        Err(std::fmt::Error) => unreachable!("a string takes everything"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with a few digits")]
fn write(report: &Report, out: &mut String) -> std::fmt::Result {
    writeln!(out, "{}, head {}, {}", report.model, report.head, report.isa)?;
    writeln!(
        out,
        "a step that generates reads {:.0} MB of weights; a token takes {:.2} G multiplications, and {:.2} G in the head if it is generated\n",
        report.step_bytes as f64 / 1e6,
        report.token_macs as f64 / 1e9,
        report.head_macs as f64 / 1e9
    )?;
    writeln!(out, "The machine\n{:>7}  {:>10}  {:>10}", "threads", "read GB/s", "int8 GMAC/s")?;
    for bounds in &report.bounds {
        let (read, multiply) = (bounds.read_bytes_per_s / 1e9, bounds.macs_per_s / 1e9);
        writeln!(out, "{:>7}  {read:>10.1}  {multiply:>10.0}", bounds.threads)?;
    }
    let moved = report.bounds.iter().map(|bounds| bounds.moved).fold(0.0, f64::max);
    if moved > MOVED_MAX {
        writeln!(
            out,
            "it was not steady: {:.0} % between before and after; shares are of the better of both",
            moved * 100.0
        )?;
    }
    let times = if report.repeats == 1 { "once".into() } else { format!("median of {}", report.repeats) };
    writeln!(out, "\nReading a prompt of {} tokens ({times})", report.prompt_tokens)?;
    writeln!(out, "{:>7}  {:>10}  {:>10}  {:>6}  bound by", "threads", "tokens/s", "bound", "share")?;
    for rate in &report.prefill {
        writeln!(out, "{:>7}  {}", rate.threads, rest(rate))?;
    }
    writeln!(out, "\nGenerating {} tokens each ({times})", report.answer_tokens)?;
    writeln!(
        out,
        "{:>7}  {:>8}  {:>10}  {:>10}  {:>6}  bound by",
        "threads", "together", "tokens/s", "bound", "share"
    )?;
    for rate in &report.decode {
        writeln!(out, "{:>7}  {:>8}  {}", rate.threads, rate.sequences, rest(rate))?;
    }
    Ok(())
}

fn rest(rate: &Rate) -> String {
    let by = match rate.bound_by {
        BoundBy::Reading => "reading",
        BoundBy::Multiplying => "multiplying",
    };
    let Rate { tokens_per_s, bound_tokens_per_s, share_of_bound, .. } = rate;
    format!("{tokens_per_s:>10.1}  {bound_tokens_per_s:>10.1}  {:>4.0} %  {by}", share_of_bound * 100.0)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::bounds::Bounds;
    use super::*;

    pub(in crate::bench) fn report() -> Report {
        let rate = |threads, sequences, tokens_per_s, bound, bound_by| Rate {
            threads,
            sequences,
            tokens_per_s,
            runs: vec![tokens_per_s],
            bound_tokens_per_s: bound,
            bound_by,
            share_of_bound: tokens_per_s / bound,
        };
        Report {
            program: "bitnetd 0.1.0",
            model: "2b-4t".into(),
            head: "F16".into(),
            isa: "avx512-vnni".into(),
            step_bytes: 1_178_000_000,
            token_macs: 2_084_000_000,
            head_macs: 328_000_000,
            prompt_tokens: 512,
            answer_tokens: 64,
            repeats: 3,
            bounds: vec![
                Bounds { threads: 1, read_bytes_per_s: 15e9, macs_per_s: 361e9, moved: 0.02 },
                Bounds { threads: 2, read_bytes_per_s: 29.04e9, macs_per_s: 701e9, moved: 0.31 },
            ],
            prefill: vec![
                rate(1, 1, 100.0, 173.2, BoundBy::Multiplying),
                rate(2, 1, 190.5, 336.4, BoundBy::Multiplying),
            ],
            decode: vec![
                rate(1, 1, 11.0, 12.7, BoundBy::Reading),
                rate(2, 1, 21.0, 24.65, BoundBy::Reading),
                rate(2, 8, 150.0, 197.0, BoundBy::Reading),
            ],
        }
    }

    #[test]
    fn every_rate_stands_beside_its_bound() {
        insta::assert_snapshot!(text(&report()));
    }
}
