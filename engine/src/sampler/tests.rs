//! The sampler against its definition, its distribution and odd input.

use proptest::prelude::*;

use super::*;

fn sampler(params: SamplingParams) -> Sampler {
    Sampler::new(params, 1000).unwrap()
}

fn warm() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: 42, ..SamplingParams::default() }
}

fn sample(params: &SamplingParams, logits: &[f32], history: &[u32], position: u64) -> u32 {
    sampler(params.clone()).sample(logits, history, position, None, &mut SamplerScratch::default()).id
}

/// Pearson's statistic of 20,000 draws at positions 0.. against `expected` probabilities.
fn chi_square(params: &SamplingParams, logits: &[f32], expected: &[f64]) -> f64 {
    let n = 20_000;
    let (sampler, mut scratch) = (sampler(params.clone()), SamplerScratch::default());
    let mut counts = vec![0.0; logits.len()];
    for position in 0..n {
        counts[sampler.sample(logits, &[], position, None, &mut scratch).id as usize] += 1.0;
    }
    let mut statistic = 0.0;
    for (count, p) in counts.iter().zip(expected) {
        if *p == 0.0 {
            assert_eq!(*count, 0.0, "{counts:?}");
        } else {
            statistic += (count - p * n as f64).powi(2) / (p * n as f64);
        }
    }
    statistic
}

fn softmax(logits: &[f32], keep: impl Fn(usize) -> bool, temperature: f64) -> Vec<f64> {
    let weight = |(idx, x): (usize, &f32)| if keep(idx) { (f64::from(*x) / temperature).exp() } else { 0.0 };
    let weights: Vec<f64> = logits.iter().enumerate().map(weight).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [0.0, 1.0, 2.0, -1.0, 0.5, f32::NEG_INFINITY, 1.5, f32::NAN, -3.0, 2.0];
    let valid = |idx| idx != 5 && idx != 7;
    // 99.99 % of right samplers stay below 34 with at most 9 degrees of freedom; the seeds are fixed.
    for seed in 0..4 {
        for temperature in [0.5, 1.0, 2.0] {
            let params = SamplingParams { temperature, seed, ..warm() };
            let expected = softmax(&logits, valid, f64::from(temperature));
            assert!(chi_square(&params, &logits, &expected) < 34.0);
            let params = SamplingParams { top_k: 3, ..params };
            let expected = softmax(&logits, |idx| [2, 9, 6].contains(&idx), f64::from(temperature));
            assert!(chi_square(&params, &logits, &expected) < 34.0);
        }
        // Probabilities, best first: 0.287 (2), 0.287 (9), 0.174 (6), 0.106 (1), 0.064 (4), 0.039 (0), ...
        let params = SamplingParams { top_p: 0.8, temperature: 2.0, seed, ..warm() };
        let expected = softmax(&logits, |idx| [2, 9, 6, 1].contains(&idx), 2.0);
        assert!(chi_square(&params, &logits, &expected) < 34.0);
        // A share of 0.3 is a distance of 1.2.
        let params = SamplingParams { min_p: 0.3, seed, ..warm() };
        let expected = softmax(&logits, |idx| [2, 9, 6, 1].contains(&idx), 1.0);
        assert!(chi_square(&params, &logits, &expected) < 34.0);
    }
}

#[test]
fn greedy_takes_the_first_of_the_best() {
    let logits = [1.0, 3.0, f32::NAN, 3.0];
    assert_eq!(sample(&SamplingParams::default(), &logits, &[], 0), 1);
    assert_eq!(sample(&SamplingParams { top_k: 1, ..warm() }, &logits, &[], 5), 1);
    assert_eq!(sample(&SamplingParams { top_p: 0.0, ..warm() }, &logits, &[], 5), 1);
    assert_eq!(
        sample(&SamplingParams { min_p: 1.0, temperature: 9.0, top_k: 1, ..warm() }, &logits, &[], 5),
        1
    );
    assert_eq!(sample(&SamplingParams { temperature: 1e-30, ..warm() }, &[1.0, 2.0, 1.9], &[], 5), 1);
}

#[test]
fn logits_of_nothing_give_token_0() {
    for logits in [[f32::NAN; 4], [f32::NEG_INFINITY; 4]] {
        for params in [SamplingParams::default(), warm(), SamplingParams { top_k: 2, top_p: 0.5, ..warm() }] {
            let found = sampler(params).sample(&logits, &[], 0, Some(2), &mut SamplerScratch::default());
            assert_eq!(found.id, 0);
            let logprobs = found.logprobs.unwrap();
            assert_eq!((logprobs.logprob, logprobs.top[0]), (LOGPROB_MIN, (0, LOGPROB_MIN)));
        }
    }
    assert_eq!(sample(&warm(), &[0.0, f32::INFINITY, 1.0], &[], 0), 1);
}

#[test]
fn penalties_and_bias_move_logits_as_written() {
    let adjusted = |params: SamplingParams, history: &[u32]| {
        let (mut logits, mut recent) = (Vec::new(), Vec::new());
        sampler(params).adjust(&[2.0, -2.0, 1.0, f32::NEG_INFINITY], history, &mut logits, &mut recent);
        logits
    };
    let none = f32::NEG_INFINITY;
    let repetition = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
    assert_eq!(adjusted(repetition.clone(), &[0, 1, 1, 3]), [1.0, -4.0, 1.0, none]);
    assert_eq!(
        adjusted(SamplingParams { penalty_last_n: 2, ..repetition.clone() }, &[0, 2, 1]),
        [2.0, -4.0, 0.5, none]
    );
    assert_eq!(
        adjusted(SamplingParams { penalty_last_n: 0, ..repetition }, &[0, 2, 1]),
        [2.0, -2.0, 1.0, none]
    );
    let counted =
        SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..SamplingParams::default() };
    assert_eq!(adjusted(counted, &[0, 1, 1, 900]), [1.25, -3.0, 1.0, none]);
    let bias = SamplingParams { logit_bias: vec![(2, 5.0), (0, none)], ..SamplingParams::default() };
    assert_eq!(adjusted(bias.clone(), &[]), [none, -2.0, 6.0, none]);
    assert_eq!(sample(&bias, &[2.0, -2.0, 1.0, none], &[], 0), 2);
}

#[test]
fn logprobs_are_of_the_unmodified_distribution() {
    let logits = [1.0, 3.0, 2.0, f32::NEG_INFINITY];
    let params = SamplingParams { logit_bias: vec![(1, f32::NEG_INFINITY)], top_k: 1, ..warm() };
    let found = sampler(params).sample(&logits, &[2], 0, Some(9), &mut SamplerScratch::default());
    assert_eq!(found.id, 2);
    let expected = softmax(&logits, |_| true, 1.0);
    let logprobs = found.logprobs.unwrap();
    assert!((f64::from(logprobs.logprob) - expected[2].ln()).abs() < 1e-6);
    assert_eq!(logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2, 0, 3]);
    assert!((f64::from(logprobs.top[0].1) - expected[1].ln()).abs() < 1e-6);
    assert_eq!(logprobs.top[3].1, LOGPROB_MIN);
}

#[test]
fn parameters_out_of_range_are_refused() {
    let refuse = |params| Sampler::new(params, 10).unwrap_err().to_string();
    let base = SamplingParams::default;
    assert_eq!(
        refuse(SamplingParams { temperature: -1.0, ..base() }),
        "`temperature` is -1, but must be at least 0"
    );
    assert_eq!(refuse(SamplingParams { top_p: f32::NAN, ..base() }), "`top_p` is NaN, but must be 0 to 1");
    assert_eq!(refuse(SamplingParams { min_p: 1.5, ..base() }), "`min_p` is 1.5, but must be 0 to 1");
    assert!(refuse(SamplingParams { repetition_penalty: 0.0, ..base() }).contains("above 0"));
    assert!(refuse(SamplingParams { logit_bias: vec![(1, f32::NAN)], ..base() }).contains("logit_bias"));
    let bias = SamplingParams { logit_bias: vec![(10, 1.0)], ..base() };
    assert_eq!(refuse(bias), "`logit_bias` names token 10, but there are 10 tokens");
}

/// The sampler as it is defined: sort everything, then cut.
fn sample_by_definition(params: &SamplingParams, logits: &[f32], position: u64) -> u32 {
    let max = maximum(logits);
    if max == f32::NEG_INFINITY {
        return 0;
    }
    let mut kept: Vec<(u32, f32)> = (0..).zip(logits.iter().map(|x| clean(*x))).collect();
    let cuts = params.top_k > 0 || params.top_p < 1.0;
    if cuts {
        kept.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    }
    let weight = |x: f32| f64::from(exp_nonpositive(x - max));
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let total = match params.top_k {
            0 => sum_exp(logits, max),
            _ => kept.iter().map(|(_, x)| weight(*x)).sum(),
        };
        let mut sum = 0.0;
        let wanted = f64::from(params.top_p) * total;
        let reached = kept.iter().position(|(_, x)| {
            sum += weight(*x);
            sum >= wanted
        });
        kept.truncate(reached.map_or(kept.len(), |idx| idx + 1));
    }
    let distance = sampler(params.clone()).min_p_distance;
    kept.retain(|(_, x)| *x >= max + distance);
    let noise = Noise::new(params.seed, position);
    let score = |(id, x): &(u32, f32)| x / params.temperature + noise.of(*id);
    let best = kept.iter().map(score).fold(f32::NEG_INFINITY, f32::max);
    kept.iter().filter(|token| score(token) == best).map(|(id, _)| *id).min().unwrap()
}

proptest! {
    #[test]
    fn the_first_of_the_largest_is_found_wherever_it_is(
        picks in prop::collection::vec((0usize..300, any::<f32>()), 0..12), n in 0usize..300, rest in prop_oneof![
            Just(f32::NEG_INFINITY), Just(f32::NAN), Just(-1.0f32),
        ],
    ) {
        let mut logits = vec![rest; n];
        picks.iter().filter(|(place, _)| *place < n).for_each(|(place, logit)| logits[*place] = *logit);
        let clean = |logit: f32| if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) };
        let largest = logits.iter().map(|logit| clean(*logit)).fold(f32::NEG_INFINITY, f32::max);
        let first = logits.iter().position(|logit| largest > f32::NEG_INFINITY && clean(*logit) == largest);
        prop_assert_eq!(select::argmax(&logits) as usize, first.unwrap_or(0));
    }

    #[test]
    fn the_fast_way_is_the_defined_way(
        logits in prop::collection::vec(prop_oneof![
            8 => -8.0f32..8.0, 2 => (-2i8..3).prop_map(f32::from),
            1 => prop::sample::select(vec![f32::NAN, f32::NEG_INFINITY, 8.0]),
        ], 1..900),
        top_k in prop_oneof![Just(0u32), 1u32..50, Just(5000)],
        top_p in prop_oneof![Just(1.0f32), 0.0f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0],
        temperature in prop_oneof![Just(1.0f32), 0.05f32..3.0],
        seed: u64, position: u64,
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, seed, ..SamplingParams::default() };
        let mut scratch = SamplerScratch::default();
        let sampler = sampler(params.clone());
        let found = sampler.sample(&logits, &[], position, Some(3), &mut scratch);
        prop_assert_eq!(found.id, sample_by_definition(&params, &logits, position));
        // What is left in the scratch memory does not matter.
        let again = sampler.sample(&logits, &[], position, Some(3), &mut scratch);
        prop_assert_eq!(again, found);
    }
}
