//! Speculation by prompt lookup: what followed the last tokens when they stood there before may follow them again.
//!
//! Guesses are checked as further rows of a step, which costs little while a step is bound by reading weights. A
//! guess is right if it is the very token that would be sampled, so an answer never depends on it (promise P4): random
//! numbers are keyed by position, and logits do not depend on the rows beside them.
//!
//! Whether checking pays is learnt: how long steps of so many rows take here, and how often guesses after a match of
//! such a length are right in this sequence. The latter is counted for guesses that were not checked, too: the next
//! token tells for free. So text that never repeats itself costs a search and nothing else.

/// When guesses are checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// Never.
    Off,
    /// Where it is expected to pay.
    #[default]
    Auto,
    /// Whenever there are any: what is left to chance otherwise can be tested.
    Always,
}

/// Guesses checked in one step, those of all sequences together.
pub(crate) const GUESSES_MAX: usize = 7;

/// Rows in a step that only generates, guesses among them, for up to `max_batch` sequences. Beside many sequences there
/// are fewer guesses: the more rows, the more a further one costs, and each takes the memory of its logits.
pub(crate) fn decode_rows_max(max_batch: usize) -> usize {
    max_batch.max(1 + GUESSES_MAX)
}

/// The shortest repetition that is trusted to go on.
const MATCH_MIN: usize = 2;
/// Longer repetitions are not told apart.
const MATCH_MAX: usize = 8;
/// How much the last outcome counts.
const LEARNING_RATE: f32 = 0.25;
/// Expected gain in speed below which nothing is risked.
const GAIN_MIN: f32 = 1.05;
/// A time that was measured this many steps ago may no longer be true.
const STALE_STEPS: u64 = 2000;
/// What a row is thought to add to a step as long as it is not known.
const ROW_SHARE: f32 = 0.1;

/// The guesses of one sequence.
#[derive(Debug)]
pub(crate) struct Guesser {
    guesses: Vec<u32>,           // What comes next, perhaps; at most GUESSES_MAX.
    match_len: usize,            // How many tokens they follow.
    confidence: [f32; 3],        // By length of the match: chance that the next guess is right.
    pub(crate) n_checked: usize, // Of the guesses, those that are rows of this step.
}

impl Guesser {
    pub(crate) fn new() -> Self {
        let guesses = Vec::with_capacity(GUESSES_MAX);
        Self { guesses, match_len: 0, confidence: [0.2, 0.3, 0.5], n_checked: 0 }
    }

    /// Forgets the last guesses and makes up to `n_max` new ones.
    pub(crate) fn guess(&mut self, history: &[u32], n_max: usize) {
        self.clear();
        let n_max = n_max.min(GUESSES_MAX);
        if n_max == 0 {
            return;
        }
        let Some((next, match_len)) = longest_match(history) else { return };
        self.match_len = match_len;
        for index in 0..n_max {
            // Where what followed runs into the end of the text, it goes on with itself.
            let token = match history.get(next + index) {
                Some(token) => *token,
                None => self.guesses[next + index - history.len()],
            };
            self.guesses.push(token);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.guesses.clear();
        self.n_checked = 0;
    }

    /// The guesses that are checked in this step.
    pub(crate) fn checked(&self) -> &[u32] {
        &self.guesses[..self.n_checked]
    }

    /// Checks as many guesses as there is room for beside `n_rows`.
    pub(crate) fn choose_all(&mut self, costs: &StepCosts, n_rows: usize) -> usize {
        self.n_checked = costs.n_rows_max().saturating_sub(n_rows).min(self.guesses.len());
        n_rows + self.n_checked
    }

    /// Decides how many guesses are checked in a step that has `n_rows` rows so far and is expected to give
    /// `n_tokens` tokens. Gives what it has then.
    pub(crate) fn choose(&mut self, costs: &StepCosts, (n_rows, n_tokens): (usize, f32)) -> (usize, f32) {
        let n_left = (costs.n_rows_max().saturating_sub(n_rows)).min(self.guesses.len());
        let Some(seconds) = costs.estimate(n_rows) else { return (n_rows, n_tokens) };
        let chance = self.confidence[class(self.match_len)];
        let mut best = (GAIN_MIN * n_tokens / seconds, 0, n_tokens);
        let (mut expected, mut all_right) = (n_tokens, 1.0);
        for n in 1..=n_left {
            all_right *= chance;
            expected += all_right;
            let Some(seconds) = costs.estimate(n_rows + n) else { break };
            if expected / seconds > best.0 {
                best = (expected / seconds, n, expected);
            }
        }
        self.n_checked = best.1;
        (n_rows + best.1, best.2)
    }

    /// Learns that `token` came at place `index` of the guesses. True if that was a right guess which was checked,
    /// so that there are logits after it.
    pub(crate) fn learn(&mut self, index: usize, token: u32) -> bool {
        let Some(guess) = self.guesses.get(index) else { return false };
        let is_right = *guess == token;
        let confidence = &mut self.confidence[class(self.match_len)];
        *confidence += LEARNING_RATE * (f32::from(u8::from(is_right)) - *confidence);
        is_right && index < self.n_checked
    }
}

/// Which confidence belongs to a match.
fn class(match_len: usize) -> usize {
    match match_len {
        0..=2 => 0,
        3..=4 => 1,
        _ => 2,
    }
}

/// What follows the longest earlier occurrence of the last tokens (of equally long ones, the latest), as an index,
/// and how many tokens are the same.
fn longest_match(history: &[u32]) -> Option<(usize, usize)> {
    let (last, before) = history.split_last()?;
    let mut best: Option<(usize, usize)> = None;
    for next in (MATCH_MIN..=before.len()).rev() {
        if before[next - 1] != *last {
            continue;
        }
        let same = before[..next].iter().rev().zip(history.iter().rev());
        let len = same.take(MATCH_MAX).take_while(|(a, b)| a == b).count();
        if len >= MATCH_MIN && best.is_none_or(|(_, longest)| len > longest) {
            best = Some((next, len));
            if len == MATCH_MAX {
                break;
            }
        }
    }
    best
}

/// How long steps take that only generate, by their number of rows.
#[derive(Debug)]
pub(crate) struct StepCosts {
    by_rows: Vec<Option<Measured>>, // Index: rows.
    n_steps: u64,
}

#[derive(Clone, Copy, Debug)]
struct Measured {
    seconds: f32,
    at_step: u64,
}

impl StepCosts {
    /// For up to `max_batch` sequences.
    pub(crate) fn new(max_batch: usize) -> Self {
        Self { by_rows: vec![None; decode_rows_max(max_batch) + 1], n_steps: 0 }
    }

    fn n_rows_max(&self) -> usize {
        self.by_rows.len() - 1
    }

    pub(crate) fn observe(&mut self, n_rows: usize, seconds: f32) {
        self.n_steps += 1;
        let at_step = self.n_steps;
        if let Some(entry) = self.by_rows.get_mut(n_rows) {
            // One step that was held up by something else must not count for much.
            let seconds = entry
                .map_or(seconds, |old| old.seconds + 0.2 * (seconds.min(2.0 * old.seconds) - old.seconds));
            *entry = Some(Measured { seconds, at_step });
        }
    }

    /// Seconds of a step with so many rows; `None` as long as nothing is known.
    fn estimate(&self, n_rows: usize) -> Option<f32> {
        let is_fresh = |measured: &Measured| self.n_steps - measured.at_step < STALE_STEPS;
        let known =
            |n: usize| self.by_rows.get(n).copied().flatten().filter(is_fresh).map(|known| known.seconds);
        if let Some(seconds) = known(n_rows) {
            return Some(seconds);
        }
        let (below, seconds) = (0..n_rows).rev().find_map(|n| Some((n, known(n)?)))?;
        #[expect(clippy::cast_precision_loss, reason = "a few rows")]
        let guess = seconds * (1.0 + ROW_SHARE * (n_rows - below) as f32);
        let above = (n_rows + 1..self.by_rows.len()).find_map(known);
        Some(above.map_or(guess, |above| guess.min(above.max(seconds))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_longest_match_wins_and_of_equal_ones_the_latest() {
        assert_eq!(longest_match(&[]), None);
        assert_eq!(longest_match(&[1, 1]), None, "one token is no repetition");
        assert_eq!(longest_match(&[1, 2, 9, 1, 2]), Some((2, 2)));
        assert_eq!(longest_match(&[3, 1, 2, 8, 1, 2, 9, 3, 1, 2]), Some((3, 3)));
        assert_eq!(longest_match(&[1, 2, 8, 1, 2, 9, 1, 2]), Some((5, 2)));
    }

    #[test]
    fn a_loop_goes_on_for_ever() {
        let mut guesser = Guesser::new();
        guesser.guess(&[7, 1, 2, 3, 1, 2, 3, 1, 2], 99);
        assert_eq!(guesser.guesses, [3, 1, 2, 3, 1, 2, 3]);
    }

    #[test]
    fn what_was_right_is_checked_and_what_was_wrong_is_not() {
        let mut costs = StepCosts::new(1);
        let mut guesser = Guesser::new();
        let text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2];
        guesser.guess(&text, 7);
        assert_eq!(guesser.choose(&costs, (1, 1.0)), (1, 1.0), "nothing is known of the time");
        costs.observe(1, 0.02);
        for _ in 0..20 {
            assert!(!guesser.learn(0, 3), "it was not checked");
        }
        let (n_rows, n_tokens) = guesser.choose(&costs, (1, 1.0));
        assert_eq!((n_rows, guesser.checked()), (8, &[3, 4, 5, 6, 7, 8, 1][..]));
        assert!(n_tokens > 6.0, "{n_tokens}");
        assert!(guesser.learn(0, 3) && guesser.learn(1, 4) && !guesser.learn(2, 99));
        // Steps that grow with their rows leave nothing to win.
        for n_rows in 1..=8_u8 {
            costs.observe(n_rows.into(), 0.02 * f32::from(n_rows));
        }
        assert_eq!(guesser.choose(&costs, (1, 1.0)).0, 1);
        for _ in 0..20 {
            guesser.learn(0, 99);
        }
        let mut cheap = StepCosts::new(1);
        cheap.observe(1, 0.02);
        assert_eq!(guesser.choose(&cheap, (1, 1.0)).0, 1);
    }

    #[test]
    fn a_held_up_step_is_forgotten() {
        let mut costs = StepCosts::new(2);
        costs.observe(3, 0.01);
        costs.observe(3, 5.0);
        assert!(costs.estimate(3).unwrap() < 0.0125);
        assert_eq!(costs.estimate(2), None, "fewer rows may be anything");
        for _ in 0..STALE_STEPS {
            costs.observe(1, 0.01);
        }
        assert!(costs.estimate(3).unwrap() > 0.0115, "only the guess is left");
    }

    proptest! {
        /// The search is that of the definition.
        #[test]
        fn a_match_is_a_match(history in prop::collection::vec(0_u32..4, 0..60)) {
            let len_at = |next: usize| {
                (1..=next.min(MATCH_MAX)).take_while(|n| history[next - n] == history[history.len() - n]).count()
            };
            let ends = MATCH_MIN..history.len().max(MATCH_MIN);
            let expected = ends.map(|next| (len_at(next), next)).filter(|(len, _)| *len >= MATCH_MIN).max();
            prop_assert_eq!(longest_match(&history), expected.map(|(len, next)| (next, len)));
        }
    }
}
