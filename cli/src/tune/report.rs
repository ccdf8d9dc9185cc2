//! The outcome of a sweep: medians, ranges and verdicts, as data and as text.

use std::fmt;

use bitnetd_placement::Candidate;
use serde::Serialize;

use super::journal::Place;
use super::sweep::{Sweep, median};
use super::trial::{Bench, Measurement};
use super::verdict::Verdict;
use super::workload::Workload;
use crate::bench::bounds::Bounds;

/// Everything that was found out; what `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) place: Place,
    pub(super) bounds: Bounds,
    pub(super) splits: Vec<Winner>,
    pub(super) workloads: Vec<WorkloadReport>,
    /// All workloads together, each with the same weight.
    pub(super) overall: Verdict,
}

/// A split by its numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Winner {
    pub(super) name: String,
    pub(super) workers: usize,
    pub(super) threads: usize,
    pub(super) is_performance_only: bool,
}

/// The outcome for one kind of work.
#[derive(Clone, Debug, Serialize)]
pub(super) struct WorkloadReport {
    pub(super) workload: Workload,
    /// In numbers.
    pub(super) load: String,
    /// One for each split, in their order.
    pub(super) rows: Vec<Row>,
    pub(super) prefill: Verdict,
    pub(super) decode: Verdict,
    pub(super) whole: Verdict,
}

/// One split in one kind of work: medians of the rounds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) n_rounds: usize,
    pub(super) prefill_tokens_per_s: f64,
    pub(super) decode_tokens_per_s: f64,
    pub(super) decode_bytes_per_s: f64,
    /// Of what the CPUs can read together.
    pub(super) share_of_read_bound: f64,
    pub(super) whole_tokens_per_s: f64,
    /// Slowest and fastest round of the same.
    pub(super) whole_range: (f64, f64),
    pub(super) p50_s: f64,
    pub(super) p95_s: f64,
    pub(super) ttft_p95_s: f64,
}

impl Report {
    /// `None` if nothing was measured.
    pub(super) fn new(
        place: Place,
        candidates: &[Candidate],
        bench: &Bench,
        sweep: &Sweep,
        bounds: Bounds,
    ) -> Option<Self> {
        let n = candidates.len();
        let report_of = |(idx, &workload): (usize, &Workload)| {
            Some(WorkloadReport {
                workload,
                load: sweep.first(idx)?.load.words(),
                rows: (0..n).map(|split| Row::new(sweep, split, idx, &bounds)).collect(),
                prefill: Verdict::of(sweep, n, idx, |m| m.prefill)?,
                decode: Verdict::of(sweep, n, idx, |m| m.decode)?,
                whole: Verdict::of(sweep, n, idx, |m| m.whole)?,
            })
        };
        let splits = candidates.iter().map(|split| Winner {
            name: split.to_string(),
            workers: split.workers,
            threads: split.threads,
            is_performance_only: split.is_performance_only,
        });
        Some(Self {
            place,
            bounds,
            splits: splits.collect(),
            workloads: bench.workloads.iter().enumerate().map(report_of).collect::<Option<_>>()?,
            overall: Verdict::overall(sweep, n)?,
        })
    }

    /// The split to take. Of two that are equal within the noise, the one with fewer workers: it needs less memory.
    pub(super) fn winner(&self) -> &Winner {
        let first = &self.splits[self.overall.winner];
        match self.overall.second.and_then(|second| self.splits.get(second)) {
            Some(second) if !self.overall.is_clear && second.workers < first.workers => second,
            _ => first,
        }
    }

    /// In one sentence.
    pub(super) fn evidence(&self) -> String {
        let words = self.overall.words(|idx| self.name(idx));
        let Winner { name, .. } = self.winner();
        if *name == self.name(self.overall.winner) {
            return words + ".";
        }
        format!("{words}; {name} has fewer workers and needs less memory.")
    }

    fn name(&self, split: usize) -> String {
        self.splits.get(split).map_or_else(String::new, |split| split.name.clone())
    }
}

impl Row {
    fn new(sweep: &Sweep, split: usize, workload: usize, bounds: &Bounds) -> Self {
        let of = |value: fn(&Measurement) -> f64| median(&sweep.values(split, workload, value));
        let whole = sweep.values(split, workload, |m| m.whole);
        let decode_bytes_per_s = of(|m| m.decode_bytes_per_s);
        Self {
            n_rounds: whole.len(),
            prefill_tokens_per_s: of(|m| m.prefill),
            decode_tokens_per_s: of(|m| m.decode),
            decode_bytes_per_s,
            share_of_read_bound: decode_bytes_per_s / bounds.read_bytes_per_s.max(1.0),
            whole_tokens_per_s: median(&whole),
            whole_range: (
                whole.iter().copied().reduce(f64::min).unwrap_or(0.0),
                whole.iter().copied().reduce(f64::max).unwrap_or(0.0),
            ),
            p50_s: of(|m| m.p50_s),
            p95_s: of(|m| m.p95_s),
            ttft_p95_s: of(|m| m.ttft_p95_s),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { processor, cpus, model, .. } = &self.place;
        let read = self.bounds.read_bytes_per_s / 1e9;
        writeln!(f, "{processor}, CPUs {cpus}, {model}; all CPUs together read {read:.1} GB/s")?;
        for report in &self.workloads {
            writeln!(f, "\n{}: {}", report.workload.name(), report.load)?;
            writeln!(f, "         tokens/s in all                                seconds for each job")?;
            writeln!(
                f,
                "split    prompts   answers   GB/s  bound     whole       p50      p95    first  rounds"
            )?;
            for (row, split) in report.rows.iter().zip(&self.splits) {
                writeln!(
                    f,
                    "{:<8}{:>8.1}  {:>8.1}  {:>5.1}  {:>3.0} %  {:>8.1}   {:>7.3}  {:>7.3}  {:>7.3}  {:>6}",
                    split.name,
                    row.prefill_tokens_per_s,
                    row.decode_tokens_per_s,
                    row.decode_bytes_per_s / 1e9,
                    row.share_of_read_bound * 100.0,
                    row.whole_tokens_per_s,
                    row.p50_s,
                    row.p95_s,
                    row.ttft_p95_s,
                    row.n_rounds,
                )?;
            }
            let name = |idx| self.name(idx);
            writeln!(f, "  prompts: {}", report.prefill.words(name))?;
            writeln!(f, "  answers: {}", report.decode.words(name))?;
            writeln!(f, "  whole:   {}", report.whole.words(name))?;
        }
        if self.workloads.len() > 1 {
            writeln!(f, "\nAll kinds of work, equally: {}", self.evidence())?;
        }
        let Winner { name, workers, threads, .. } = self.winner();
        writeln!(f, "\nTake {name}:\n  [split]\n  workers = {workers}\n  threads = {threads}")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A report with two splits in two kinds of work.
    pub(in crate::tune) fn report() -> Report {
        let split = |workers, threads| Winner {
            name: format!("{workers}x{threads}"),
            workers,
            threads,
            is_performance_only: false,
        };
        let verdict = |winner: usize, ratio: f64, is_clear| Verdict {
            winner,
            second: Some(1 - winner),
            ratio,
            ratio_range: (ratio - 0.02, ratio + 0.02),
            is_clear,
        };
        let row = |rate: f64| Row {
            n_rounds: 3,
            prefill_tokens_per_s: 4.0 * rate,
            decode_tokens_per_s: rate,
            decode_bytes_per_s: 0.7e9 * rate,
            share_of_read_bound: 0.7e9 * rate / 28e9,
            whole_tokens_per_s: rate / 2.0,
            whole_range: (rate * 0.48, rate * 0.51),
            p50_s: 20.0 / rate,
            p95_s: 30.0 / rate,
            ttft_p95_s: 5.0 / rate,
        };
        let workload = |workload: Workload, rates: [f64; 2]| WorkloadReport {
            workload,
            load: workload.load(2, 4096, false).words(),
            rows: rates.map(row).into(),
            prefill: verdict(0, 1.3, true),
            decode: verdict(0, 1.3, true),
            whole: verdict(0, 1.3, true),
        };
        Report {
            place: Place {
                processor: "Some Processor".into(),
                cpus: "0-1".into(),
                model: "model.gguf".into(),
                model_bytes: 1_000_000,
            },
            bounds: Bounds { threads: 2, read_bytes_per_s: 28e9, macs_per_s: 460e9, moved: 0.0 },
            splits: vec![split(1, 2), split(2, 1)],
            workloads: vec![workload(Workload::Large, [37.0, 19.0]), workload(Workload::Small, [90.0, 92.0])],
            overall: verdict(1, 1.01, false),
        }
    }

    #[test]
    fn the_report_as_text() {
        insta::assert_snapshot!(report());
    }

    #[test]
    fn of_two_equal_splits_the_one_with_fewer_workers_is_taken() {
        let mut report = report();
        assert_eq!(report.winner().name, "1x2");
        report.overall.is_clear = true;
        assert_eq!(report.winner().name, "2x1");
    }
}
