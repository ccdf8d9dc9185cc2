//! What a batch came to: counts, times, rates.

use std::fmt;
use std::time::Duration;

use crate::answer::Answer;

/// Collects results as they come.
#[derive(Clone, Debug, Default)]
pub(crate) struct Summary {
    n_resumed: usize,
    n_failed: usize,
    seconds: Vec<f64>,
    prefill: Work,
    decode: Work,
    n_generated: u64,
}

/// Tokens, and the time that was spent on them.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    tokens: f64,
    seconds: f64,
}

impl Work {
    fn add(&mut self, tokens: u32, seconds: f64) {
        self.tokens += f64::from(tokens);
        self.seconds += seconds;
    }

    fn rate(self) -> f64 {
        if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 }
    }
}

impl Summary {
    /// Of nothing yet; `n_resumed` prompts were done by an earlier run.
    pub(crate) fn new(n_resumed: usize) -> Self {
        Self { n_resumed, ..Self::default() }
    }

    /// One more answer.
    pub(crate) fn add(&mut self, answer: &Answer) {
        self.seconds.push(answer.seconds);
        self.prefill.add(answer.prompt_tokens.saturating_sub(answer.cached_tokens), answer.prefill_seconds);
        self.decode.add(answer.tokens.saturating_sub(1), answer.decode_seconds);
        self.n_generated += u64::from(answer.tokens);
    }

    /// One more failure.
    pub(crate) fn add_failure(&mut self) {
        self.n_failed += 1;
    }

    /// How many failed.
    pub(crate) fn n_failed(&self) -> usize {
        self.n_failed
    }

    /// The closing lines; `total` is the time on the clock.
    pub(crate) fn show(&self, total: Duration) -> impl fmt::Display {
        let total_s = total.as_secs_f64();
        let n_done = self.seconds.len();
        #[expect(clippy::cast_precision_loss, reason = "shown with two decimals")]
        let (mean, together) = (
            self.seconds.iter().sum::<f64>() / n_done.max(1) as f64,
            if total_s > 0.0 { self.n_generated as f64 / total_s } else { 0.0 },
        );
        let resumed = match self.n_resumed {
            0 => String::new(),
            n => format!(", {n} from before"),
        };
        let mut text = format!("{n_done} done, {} failed{resumed} in {total_s:.2} s", self.n_failed);
        if n_done > 0 {
            let p95 = percentile(&self.seconds, 95);
            text += &format!(
                "\ntime per prompt: mean {mean:.2} s, p95 {p95:.2} s\n\
                 tokens/s: prefill {:.1} and decode {:.1} in each prompt, {together:.1} generated in all",
                self.prefill.rate(),
                self.decode.rate(),
            );
        }
        text
    }
}

/// The smallest value that at least `percent` of all values do not exceed (nearest rank); 0 of none.
pub(crate) fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use bitnetd_proto::event::FinishReason;

    use super::*;

    fn answer(seconds: f64) -> Answer {
        Answer {
            index: 0,
            prompt: String::new(),
            text: String::new(),
            tokens: 11,
            finish_reason: FinishReason::Stop,
            seconds,
            prompt_tokens: 6,
            cached_tokens: 2,
            ttft_seconds: 0.0,
            prefill_seconds: 0.5,
            decode_seconds: 2.0,
            seed: 0,
            model: None,
            token_ids: Vec::new(),
            logprobs: None,
        }
    }

    #[test]
    fn the_percentile_is_the_nearest_rank() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert!(
            [(1, 1.0), (50, 50.0), (95, 95.0), (100, 100.0)].iter().all(|&(percent, value)| percentile(
                &hundred, percent
            )
            .total_cmp(&value)
            .is_eq())
        );
        let twenty: Vec<f64> = (1..=20).map(f64::from).collect();
        assert!(percentile(&twenty, 95).total_cmp(&19.0).is_eq());
        assert!(percentile(&[7.0], 95).total_cmp(&7.0).is_eq());
        assert!(percentile(&[], 95).total_cmp(&0.0).is_eq());
    }

    #[test]
    fn the_closing_lines() {
        let mut summary = Summary::new(3);
        for seconds in [1.0, 2.0, 6.0] {
            summary.add(&answer(seconds));
        }
        summary.add_failure();
        insta::assert_snapshot!(summary.show(Duration::from_secs(4)), @r#"
        3 done, 1 failed, 3 from before in 4.00 s
        time per prompt: mean 3.00 s, p95 6.00 s
        tokens/s: prefill 8.0 and decode 5.0 in each prompt, 8.2 generated in all
        "#);
    }

    #[test]
    fn nothing_done_divides_by_nothing() {
        let summary = Summary::new(20);
        assert_eq!(
            summary.show(Duration::from_millis(5)).to_string(),
            "0 done, 0 failed, 20 from before in 0.01 s"
        );
    }
}
