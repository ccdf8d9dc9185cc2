//! Which split is measured next, and when enough is known. Pure: it is told what was measured.
//!
//! Splits are measured in turn, round after round, so that whatever else the machine does hits all of them alike.
//! After [`N_ROUNDS_MIN`] rounds those that are far behind in every workload are left out.

use super::trial::Measurement;

/// Rounds that every split gets.
pub(super) const N_ROUNDS_MIN: usize = 2;
/// A split is left out if its median is below this share of the best one's in every workload.
const HOPELESS: f64 = 0.8;
/// The medians are stable if the best split's rates lie this close together (interquartile range by median) …
const STABLE: f64 = 0.04;
/// … after this many rounds.
const N_ROUNDS_STABLE: usize = 3;

/// What was measured: for each split, for each round, one measurement of each workload.
#[derive(Clone, Debug, Default)]
pub(super) struct Sweep {
    rounds: Vec<Vec<Vec<Measurement>>>,
    n_rounds_max: usize,
    is_over: bool,
}

impl Sweep {
    /// Of so many splits.
    pub(super) fn new(n_candidates: usize, n_rounds_max: usize) -> Self {
        Self { rounds: vec![Vec::new(); n_candidates], n_rounds_max: n_rounds_max.max(1), is_over: false }
    }

    /// The split to measure next, and for which round; `None` when enough is known.
    pub(super) fn next(&self) -> Option<(usize, usize)> {
        if self.is_over {
            return None;
        }
        let running = || (0..self.rounds.len()).filter(|&candidate| self.is_running(candidate));
        let round = running().map(|candidate| self.rounds[candidate].len()).min()?;
        if round >= self.n_rounds_max
            || (running().count() < 2 && round >= N_ROUNDS_STABLE)
            || self.is_stable(round)
        {
            return None;
        }
        // Each round begins with another split, so that none is always the first.
        let n = self.rounds.len();
        let order = (0..n).map(|idx| (idx + round) % n);
        let next = order.into_iter().find(|&idx| self.is_running(idx) && self.rounds[idx].len() == round)?;
        Some((next, round))
    }

    /// Takes what was measured.
    pub(super) fn add(&mut self, candidate: usize, measurements: Vec<Measurement>) {
        self.rounds[candidate].push(measurements);
    }

    /// Ends the sweep, because the time is up.
    pub(super) fn stop(&mut self) {
        self.is_over = true;
    }

    /// Rounds of one split.
    pub(super) fn rounds(&self, candidate: usize) -> &[Vec<Measurement>] {
        &self.rounds[candidate]
    }

    /// Trials still to come at most.
    pub(super) fn n_left(&self) -> usize {
        if self.next().is_none() {
            return 0;
        }
        (0..self.rounds.len())
            .filter(|&candidate| self.is_running(candidate))
            .map(|candidate| self.n_rounds_max.saturating_sub(self.rounds[candidate].len()))
            .sum()
    }

    /// One number of every round of a split in workload `workload`.
    pub(super) fn values(
        &self,
        candidate: usize,
        workload: usize,
        value: impl Fn(&Measurement) -> f64,
    ) -> Vec<f64> {
        self.rounds[candidate].iter().filter_map(|round| round.get(workload)).map(value).collect()
    }

    /// The first measurement there is of a workload.
    pub(super) fn first(&self, workload: usize) -> Option<&Measurement> {
        self.rounds.iter().flatten().find_map(|round| round.get(workload))
    }

    fn n_workloads(&self) -> usize {
        self.rounds.iter().flatten().map(Vec::len).max().unwrap_or(0)
    }

    fn best_median(&self, workload: usize) -> f64 {
        let median_of = |candidate| median(&self.values(candidate, workload, |m| m.whole));
        (0..self.rounds.len()).map(median_of).fold(0.0, f64::max)
    }

    /// Whether a split is still in the race.
    fn is_running(&self, candidate: usize) -> bool {
        let n_workloads = self.n_workloads();
        self.rounds[candidate].len() < N_ROUNDS_MIN
            || self.rounds.iter().any(|rounds| rounds.is_empty())
            || (0..n_workloads).any(|workload| {
                median(&self.values(candidate, workload, |m| m.whole))
                    >= HOPELESS * self.best_median(workload)
            })
    }

    /// Whether the best split of every workload has been measured often enough to be sure of its median.
    fn is_stable(&self, n_rounds: usize) -> bool {
        n_rounds >= N_ROUNDS_STABLE
            && (0..self.n_workloads()).all(|workload| {
                let best = (0..self.rounds.len())
                    .map(|candidate| self.values(candidate, workload, |m| m.whole))
                    .max_by(|a, b| median(a).total_cmp(&median(b)));
                best.is_some_and(|values| spread(&values) <= STABLE)
            })
    }
}

/// The middle value; of an even number, the mean of both. 0 of none.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.get(sorted.len().wrapping_sub(1) / 2), sorted.get(sorted.len() / 2)) {
        (Some(low), Some(high)) => f64::midpoint(*low, *high),
        _ => 0.0,
    }
}

/// Interquartile range by median, rounded outwards: of three values it is their range.
fn spread(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    let at = |idx: usize| sorted.get(idx).copied().unwrap_or(0.0);
    (at((last * 3).div_ceil(4)) - at(last / 4)) / median(values).max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::super::workload::Workload;
    use super::*;

    pub(crate) fn measured(together: f64) -> Vec<Measurement> {
        vec![Measurement {
            load: Workload::Small.load(2, 4096, false),
            prefill: together,
            decode: together,
            decode_bytes_per_s: 0.0,
            whole: together,
            p50_s: 1.0 / together,
            p95_s: 1.0 / together,
            ttft_p95_s: 1.0 / together,
        }]
    }

    /// Runs a sweep over splits of these speeds; returns the order in which they were measured.
    fn order(speeds: &[f64], n_rounds_max: usize, noise: impl Fn(usize) -> f64) -> Vec<usize> {
        let mut sweep = Sweep::new(speeds.len(), n_rounds_max);
        let mut order = Vec::new();
        while let Some((candidate, _)) = sweep.next() {
            sweep.add(candidate, measured(speeds[candidate] * noise(order.len())));
            order.push(candidate);
            assert!(order.len() < 1000, "a sweep ends");
        }
        order
    }

    #[test]
    fn splits_are_measured_in_turn_and_each_round_begins_with_another() {
        assert_eq!(order(&[10.0, 9.9, 9.8], 9, |_| 1.0), [0, 1, 2, 1, 2, 0, 2, 0, 1]);
    }

    #[test]
    fn the_hopeless_are_left_out_after_two_rounds() {
        let order = order(&[10.0, 2.0, 9.8], 9, |_| 1.0);
        assert_eq!(order.iter().filter(|&&candidate| candidate == 1).count(), N_ROUNDS_MIN);
        assert_eq!(order.iter().filter(|&&candidate| candidate == 0).count(), N_ROUNDS_STABLE);
    }

    #[test]
    fn noise_is_measured_longer_but_not_for_ever() {
        let noisy = |idx: usize| if (idx / 3).is_multiple_of(2) { 1.0 } else { 0.85 };
        let n = order(&[10.0, 9.9, 9.8], 7, noisy).len();
        assert!(n > 9 && n <= 21, "{n}");
    }

    #[test]
    fn one_split_alone_is_measured_and_done() {
        assert_eq!(order(&[10.0], 9, |_| 1.0).len(), N_ROUNDS_STABLE);
    }

    #[test]
    fn medians() {
        assert!(median(&[]).total_cmp(&0.0).is_eq());
        assert!(median(&[3.0, 1.0, 2.0]).total_cmp(&2.0).is_eq());
        assert!(median(&[4.0, 1.0, 2.0, 3.0]).total_cmp(&2.5).is_eq());
    }
}
