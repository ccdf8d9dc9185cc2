//! How fast a counter grows: its mean rate over about a second.

use std::time::Duration;

/// A rate is a mean over at least this long,
const WINDOW: Duration = Duration::from_secs(1);
/// or, as long as there is no other, this long.
const FIRST_WINDOW: Duration = Duration::from_millis(200);

/// One counter.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Meter {
    /// When the present window began, and what the counter said.
    base: Option<(Duration, u64)>,
    total: u64,
    /// Rate in the window before.
    rate: Option<f64>,
}

impl Meter {
    /// The counter says `total` now.
    pub(crate) fn count(&mut self, total: u64, now: Duration) {
        match self.base {
            Some((since, from)) if total >= from => {
                if now.saturating_sub(since) >= WINDOW {
                    self.rate = rate(total - from, now.saturating_sub(since));
                    self.base = Some((now, total));
                }
            }
            // The first word, or a counter that began again.
            _ => *self = Self { base: Some((now, total)), ..Self::default() },
        }
        self.total = total;
    }

    /// Counts for each second; `None` if that is not known yet. A counter that stands still goes to 0.
    pub(crate) fn rate(&self, now: Duration) -> Option<f64> {
        let (since, from) = self.base?;
        let age = now.saturating_sub(since);
        let is_enough = age >= WINDOW || (self.rate.is_none() && age >= FIRST_WINDOW);
        if is_enough { rate(self.total - from, age) } else { self.rate }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn rate(n: u64, time: Duration) -> Option<f64> {
    (!time.is_zero()).then(|| n as f64 / time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_rate_is_a_mean_over_a_second_and_fades_when_nothing_comes() {
        let mut meter = Meter::default();
        assert_eq!(meter.rate(MS(0)), None);
        meter.count(10, MS(0));
        assert_eq!(meter.rate(MS(100)), None, "too early to say");
        for step in 1..=10 {
            meter.count(10 + step * 4, MS(step * 100));
        }
        assert_eq!(meter.rate(MS(1000)), Some(40.0));
        meter.count(51, MS(1100));
        assert_eq!(meter.rate(MS(1500)), Some(40.0), "of the whole window before");
        assert_eq!(meter.rate(MS(3000)), Some(0.5), "one in two seconds");
        assert_eq!(meter.rate(MS(101_000)), Some(0.01));
    }

    #[test]
    fn a_counter_that_begins_again_begins_a_window() {
        let mut meter = Meter::default();
        meter.count(1000, MS(0));
        meter.count(2000, MS(1000));
        meter.count(5, MS(1500));
        assert_eq!(meter.rate(MS(1600)), None);
        meter.count(25, MS(1700));
        assert_eq!(meter.rate(MS(1700)), Some(100.0), "the first window may be short");
    }
}
