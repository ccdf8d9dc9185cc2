//! Order, selection and exponentials of logits.

/// Logits in a chunk that is looked at as a whole first.
pub(super) const CHUNK: usize = 64;

/// What a logit counts as: NaN is minus infinity, plus infinity the largest number.
pub(super) fn clean(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

/// The largest logit, cleaned.
pub(super) fn maximum(logits: &[f32]) -> f32 {
    logits
        .iter()
        .fold(f32::NEG_INFINITY, |best, logit| if *logit > best { *logit } else { best })
        .min(f32::MAX)
}

/// The first of the largest logits; 0 if there is none above minus infinity.
pub(super) fn argmax(logits: &[f32]) -> u32 {
    let (mut best, mut best_id) = (f32::NEG_INFINITY, 0);
    for (first, chunk) in (0..).step_by(CHUNK).zip(logits.chunks(CHUNK)) {
        // Most chunks have none: without a branch for each logit that is soon known.
        if !chunk.iter().fold(false, |any, logit| any | (clean(*logit) > best)) {
            continue;
        }
        for (id, logit) in (first..).zip(chunk) {
            let logit = clean(*logit);
            if logit > best {
                (best, best_id) = (logit, id);
            }
        }
    }
    best_id
}

/// A logit and its token as one number: the larger, the better; of equal logits the lower token is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Candidate(u64);

impl Candidate {
    pub(super) fn new(id: u32, logit: f32) -> Self {
        let bits = (clean(logit) + 0.0).to_bits(); // Adding makes -0.0 and 0.0 equal.
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        Self(u64::from(ordered) << 32 | u64::from(!id))
    }

    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
    pub(super) fn id(self) -> u32 {
        !(self.0 as u32)
    }

    pub(super) fn logit(self) -> f32 {
        let ordered = (self.0 >> 32) as u32;
        f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
    }
}

/// Fills `best` with the `k` best candidates, best first. `maxima` is scratch.
///
/// The k-th largest of the chunks' maxima is reached by at least k logits, so that all below it are out; what is
/// left is little more than k.
pub(super) fn select_best(logits: &[f32], k: usize, best: &mut Vec<Candidate>, maxima: &mut Vec<Candidate>) {
    best.clear();
    let k = k.min(logits.len());
    if k == 0 {
        return;
    }
    maxima.clear();
    maxima.extend(logits.chunks(CHUNK).map(|chunk| Candidate::new(0, maximum(chunk))));
    let bound = if maxima.len() >= k {
        let (_, bound, _) = maxima.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        bound.logit()
    } else {
        f32::NEG_INFINITY
    };
    let candidates = (0..).zip(logits).filter(|(_, logit)| clean(**logit) >= bound);
    best.extend(candidates.map(|(id, logit)| Candidate::new(id, *logit)));
    if best.len() > k {
        best.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        best.truncate(k);
    }
    best.sort_unstable_by(|a, b| b.cmp(a));
}

/// Sum of `exp(logit - max)` over all logits, in one fixed order.
pub(super) fn sum_exp(logits: &[f32], max: f32) -> f64 {
    let mut lanes = [0.0_f64; 8];
    for chunk in logits.chunks(8) {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(exp_nonpositive(clean(*logit) - max));
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// `exp(x)` for x <= 0 within 2 units in the last place; 0 below -87. Plain operations only, hence the same bits
/// on every machine. The polynomial is that of Cephes (Moshier, 1989).
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and subtracting it rounds to an integer.
    if x < -87.0 || x.is_nan() {
        return 0.0;
    }
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + coefficient;
    }
    let mantissa = p * r * r + r + 1.0;
    // -126 <= n <= 0, so that n + 127 is the exponent of a normal number; so is the sum with 127 + 2^23, exactly, in
    // the low bits of its mantissa.
    let exponent = (n + 8_388_735.0).to_bits() << 23;
    mantissa * f32::from_bits(exponent)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        let mut worst = 0.0_f64;
        for step in 0..870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = libm::exp(f64::from(x));
            worst = worst.max((f64::from(exp_nonpositive(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.4e-7, "{worst:e}");
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!((exp_nonpositive(-87.1), exp_nonpositive(f32::NEG_INFINITY)), (0.0, 0.0));
    }

    #[test]
    fn odd_logits_have_a_place() {
        let logits = [f32::NAN, f32::NEG_INFINITY, -0.0, 0.0, -1.0];
        assert_eq!(argmax(&logits), 2);
        assert_eq!(argmax(&[f32::NAN; 3]), 0);
        assert_eq!(argmax(&[0.0, f32::MAX, f32::INFINITY]), 1);
        assert_eq!(maximum(&[f32::NAN, f32::INFINITY]), f32::MAX);
        let (mut best, mut maxima) = (Vec::new(), Vec::new());
        select_best(&logits, 9, &mut best, &mut maxima);
        assert_eq!(best.iter().map(|c| c.id()).collect::<Vec<_>>(), [2, 3, 4, 0, 1]);
        assert_eq!(best[4].logit(), f32::NEG_INFINITY);
    }

    proptest! {
        #[test]
        fn the_best_are_those_of_a_full_sort(
            mut logits in prop::collection::vec(prop_oneof![
                4 => -3.0f32..3.0, 4 => (-2i8..3).prop_map(f32::from),
                1 => prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]),
            ], 1..700),
            k in 1usize..40, peak in 0usize..700,
        ) {
            let at = peak % logits.len();
            logits[at] = 9.0;
            let mut all: Vec<Candidate> = (0..).zip(&logits).map(|(id, x)| Candidate::new(id, *x)).collect();
            all.sort_by(|a, b| b.logit().total_cmp(&a.logit()).then(a.id().cmp(&b.id())));
            all.truncate(k);
            let (mut best, mut maxima) = (Vec::new(), Vec::new());
            select_best(&logits, k, &mut best, &mut maxima);
            prop_assert_eq!(&best, &all);
            prop_assert_eq!(argmax(&logits), all[0].id());
        }
    }
}
