//! Who won, by how much, and whether the difference is more than noise.

use serde::Serialize;

use super::sweep::{Sweep, median};
use super::trial::Measurement;

/// The outcome for one workload, or for all of them together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Verdict {
    /// Index of the split that won.
    pub(super) winner: usize,
    /// The split that came closest.
    pub(super) second: Option<usize>,
    /// How many times as fast the winner is as the second: median of the rounds.
    pub(super) ratio: f64,
    /// The smallest and the largest such ratio in one round.
    pub(super) ratio_range: (f64, f64),
    /// Whether the winner was faster in every round, and there were enough of them.
    pub(super) is_clear: bool,
}

/// Rounds that both have to share before a difference counts.
const N_ROUNDS_CLEAR: usize = 3;
/// A lead that needs but two rounds: what is so far behind is measured no more.
const RATIO_PLAIN: f64 = 1.2;
/// A smaller difference is none, however often it is seen.
const RATIO_MIN: f64 = 1.01;

impl Verdict {
    /// By one number of workload `workload`.
    pub(super) fn of(
        sweep: &Sweep,
        n_candidates: usize,
        workload: usize,
        value: fn(&Measurement) -> f64,
    ) -> Option<Self> {
        Self::by(n_candidates, |candidate| sweep.values(candidate, workload, value))
    }

    /// By all `n_workloads` workloads: the geometric mean of the rates of a round.
    pub(super) fn overall(sweep: &Sweep, n_candidates: usize) -> Option<Self> {
        Self::by(n_candidates, |candidate| {
            let mean = |round: &Vec<Measurement>| {
                let logs: f64 = round.iter().map(|measurement| measurement.whole.ln()).sum();
                (logs / round.len().max(1) as f64).exp()
            };
            sweep.rounds(candidate).iter().map(mean).collect()
        })
    }

    /// `values` gives one number for each round of a split.
    fn by(n_candidates: usize, values: impl Fn(usize) -> Vec<f64>) -> Option<Self> {
        let all: Vec<Vec<f64>> = (0..n_candidates).map(values).collect();
        let mut ranked: Vec<usize> = (0..n_candidates).filter(|&idx| !all[idx].is_empty()).collect();
        ranked.sort_by(|&a, &b| median(&all[b]).total_cmp(&median(&all[a])));
        let winner = *ranked.first()?;
        let second = ranked.get(1).copied();
        let ratios: Vec<f64> = second.map_or_else(Vec::new, |second| {
            all[winner].iter().zip(&all[second]).map(|(a, b)| a / b.max(f64::MIN_POSITIVE)).collect()
        });
        let ratio = if ratios.is_empty() { 1.0 } else { median(&ratios) };
        let lowest = ratios.iter().copied().fold(ratio, f64::min);
        let highest = ratios.iter().copied().fold(ratio, f64::max);
        let is_steady = ratios.len() >= N_ROUNDS_CLEAR && lowest > 1.0 && ratio >= RATIO_MIN;
        let is_clear = is_steady || (ratios.len() > 1 && lowest >= RATIO_PLAIN);
        Some(Self { winner, second, ratio, ratio_range: (lowest, highest), is_clear })
    }

    /// In words; `name` names a split.
    pub(super) fn words(&self, name: impl Fn(usize) -> String) -> String {
        let Some(second) = self.second else {
            return format!("{} is the only split there is", name(self.winner));
        };
        let (winner, second) = (name(self.winner), name(second));
        let percent = (self.ratio - 1.0) * 100.0;
        let (low, high) = ((self.ratio_range.0 - 1.0) * 100.0, (self.ratio_range.1 - 1.0) * 100.0);
        if self.is_clear {
            format!("{winner} wins, {percent:.1} % ahead of {second} (rounds: {low:+.1} to {high:+.1} %)")
        } else {
            format!(
                "{winner} and {second} are equal within the noise ({percent:+.1} %, rounds: {low:+.1} to {high:+.1} %)"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::workload::Workload;
    use super::*;

    fn sweep(rates: &[&[f64]]) -> Sweep {
        let mut sweep = Sweep::new(rates.len(), 9);
        for (candidate, rounds) in rates.iter().enumerate() {
            for &together in *rounds {
                let measurement = Measurement {
                    load: Workload::Small.load(2, 4096, false),
                    prefill: 0.0,
                    decode: 0.0,
                    decode_bytes_per_s: 0.0,
                    whole: together,
                    p50_s: 0.0,
                    p95_s: 0.0,
                    ttft_p95_s: 0.0,
                };
                sweep.add(candidate, vec![measurement]);
            }
        }
        sweep
    }

    fn words(rates: &[&[f64]]) -> String {
        let sweep = sweep(rates);
        Verdict::overall(&sweep, rates.len()).unwrap().words(|idx| format!("split {idx}"))
    }

    #[test]
    fn a_clear_winner_is_named_with_its_lead() {
        assert_eq!(
            words(&[&[10.0, 10.0, 10.0], &[12.0, 12.5, 11.0], &[5.0, 5.0]]),
            "split 1 wins, 20.0 % ahead of split 0 (rounds: +10.0 to +25.0 %)"
        );
    }

    #[test]
    fn a_difference_that_changes_sign_is_noise() {
        assert_eq!(
            words(&[&[10.0, 10.0, 10.0], &[10.2, 9.9, 10.1]]),
            "split 1 and split 0 are equal within the noise (+1.0 %, rounds: -1.0 to +2.0 %)"
        );
    }

    #[test]
    fn two_rounds_prove_little() {
        assert!(words(&[&[10.0, 10.0], &[11.0, 11.0]]).contains("within the noise"));
        assert!(words(&[&[10.0, 10.0], &[20.0, 20.0]]).contains("wins"), "unless they are plain");
    }

    #[test]
    fn one_split_wins_against_nobody() {
        assert_eq!(words(&[&[10.0]]), "split 0 is the only split there is");
        assert_eq!(Verdict::overall(&sweep(&[]), 0), None);
    }
}
