//! How long a slot waits before its next process, and when it gives up.
//!
//! Pure: time comes in as a number, chance from a seeded generator.

use std::collections::VecDeque;
use std::time::Duration;

use bitnetd_config::RestartConfig;

/// A small seeded generator (SplitMix64); enough to spread restarts, not for secrets.
#[derive(Clone, Debug)]
pub(crate) struct Jitter(u64);

impl Jitter {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Uniform in 0..=`max`.
    pub(crate) fn up_to(&mut self, max: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        let scaled = (u128::from(bits) * (u128::from(max) + 1)) >> 64;
        u64::try_from(scaled).unwrap_or(max)
    }
}

/// The restarts of one slot that are still inside the window.
#[derive(Clone, Debug, Default)]
pub(crate) struct RestartHistory {
    at: VecDeque<Duration>,
}

impl RestartHistory {
    /// The wait before the next start; `None` if the slot was restarted too often and is to be given up.
    ///
    /// The wait doubles with each restart inside the window, from `backoff_min` to `backoff_max`, and is then
    /// shortened by up to a half, so that slots that died together do not start together.
    pub(crate) fn next_wait(
        &mut self,
        now: Duration,
        config: &RestartConfig,
        jitter: &mut Jitter,
    ) -> Option<Duration> {
        while self.at.front().is_some_and(|&at| at + config.window <= now) {
            self.at.pop_front();
        }
        let n_before = u32::try_from(self.at.len()).unwrap_or(u32::MAX);
        if n_before >= config.max {
            return None;
        }
        self.at.push_back(now);
        let full = config.backoff_min.saturating_mul(1 << n_before.min(20)).min(config.backoff_max);
        let half_us = u64::try_from(full.as_micros() / 2).unwrap_or(u64::MAX / 2);
        Some(full - Duration::from_micros(jitter.up_to(half_us)))
    }

    /// Forgets everything, as after an operator's restart.
    pub(crate) fn clear(&mut self) {
        self.at.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_within_bounds_and_end_after_the_limit() {
        let config = RestartConfig { max: 12, ..RestartConfig::default() };
        let (mut history, mut jitter) = (RestartHistory::default(), Jitter::new(1));
        for n in 0..12_u32 {
            let full = (config.backoff_min * 2_u32.pow(n)).min(config.backoff_max);
            let wait = history.next_wait(Duration::from_secs(1), &config, &mut jitter).unwrap();
            assert!(wait <= full && wait >= full / 2, "restart {n}: {wait:?} of {full:?}");
        }
        assert_eq!(history.next_wait(Duration::from_secs(1), &config, &mut jitter), None);
    }

    #[test]
    fn the_window_moves_on() {
        let config = RestartConfig { max: 2, window: Duration::from_secs(10), ..RestartConfig::default() };
        let (mut history, mut jitter) = (RestartHistory::default(), Jitter::new(1));
        let mut at =
            |seconds| history.next_wait(Duration::from_secs(seconds), &config, &mut jitter).is_some();
        assert_eq!([at(0), at(5), at(9), at(10), at(11), at(15)], [true, true, false, true, false, true]);
    }

    #[test]
    fn jitter_reaches_both_ends_and_repeats_from_its_seed() {
        let draw = |seed| {
            let mut jitter = Jitter::new(seed);
            (0..200).map(|_| jitter.up_to(3)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        for value in 0..=3 {
            assert!(draw(7).contains(&value));
        }
        assert!(draw(7).iter().all(|&value| value <= 3));
    }
}
