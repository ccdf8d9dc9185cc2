//! Guesses change nothing but the time: every answer is that of an engine that never guesses, to the bit.

use bitnetd_engine::kernels::KernelSet;
use bitnetd_engine::sampler::SamplingParams;
use bitnetd_engine::sequence::SequenceRequest;
use bitnetd_engine::speculation::Speculation;
use bitnetd_engine::{Engine, EngineStats};

use crate::support::{Answer, Setting, engine, request, run, seeded, story_model};

/// Prompts that repeat themselves, so that there is much to guess, with every kind of sampling.
fn requests(engine: &Engine) -> Vec<SequenceRequest> {
    let samplings = [
        SamplingParams::default(),
        seeded(3),
        SamplingParams { repetition_penalty: 1.05, frequency_penalty: 0.05, ..SamplingParams::default() },
        SamplingParams { temperature: 0.4, logit_bias: vec![(300, 2.0)], ..seeded(4) },
        SamplingParams::default(),
    ];
    let texts = [
        "Tom said: one two three four. Tom said: one two three four. Tom said: one",
        "The cat sat. The cat sat. The cat sat. The cat sat. The cat sat. The",
        "a b c d e f g a b c d e f g a b c",
        "Lily had a red ball. Lily had a red ball. Lily had a",
        "Once upon a time",
    ];
    let mut all: Vec<SequenceRequest> = texts
        .into_iter()
        .zip(samplings)
        .map(|(text, sampling)| SequenceRequest {
            n_logprobs: Some(3),
            ignore_eos: true,
            ..request(engine, text, 70, sampling)
        })
        .collect();
    all[1].ignore_eos = false;
    all[4].max_tokens = 100_000; // To the end of the context window.
    all
}

fn answers(setting: &Setting, stop: &[String]) -> (Vec<Answer>, EngineStats) {
    let mut engine = engine(&story_model(), setting);
    for (id, mut request) in (0..).zip(requests(&engine)) {
        request.stop = stop.to_vec();
        engine.submit(id, request).unwrap();
    }
    let answers = run(&mut engine).into_values().map(|(answer, _)| answer).collect();
    (answers, engine.stats())
}

#[test]
fn answers_are_those_without_guesses() {
    let calm = Setting { speculation: Speculation::Off, max_batch: 1, ..Setting::default() };
    let (expected, stats) = answers(&calm, &[]);
    assert_eq!(stats.guessed_tokens, 0);
    let always = Setting { speculation: Speculation::Always, ..calm.clone() };
    let mut settings: Vec<Setting> =
        KernelSet::all_present().map(|kernels| Setting { kernels, ..always.clone() }).collect();
    settings.push(Setting { max_batch: 4, n_threads: 2, ..always.clone() });
    settings.push(Setting { max_batch: 5, n_threads: 3, prefill_chunk: 1, ..always.clone() });
    settings.push(Setting { speculation: Speculation::Auto, max_batch: 3, ..always });
    for setting in settings {
        let (answers, stats) = answers(&setting, &[]);
        assert_eq!(answers, expected, "{setting:?}");
        if setting.speculation == Speculation::Always {
            let (n, n_right) = (stats.guessed_tokens, stats.right_guesses);
            assert!(n_right > 50 && n > n_right, "{n_right} of {n} guesses were right with {setting:?}");
        }
    }
}

#[test]
fn a_stop_string_ends_an_answer_in_the_middle_of_right_guesses() {
    let calm = Setting { speculation: Speculation::Off, max_batch: 1, ..Setting::default() };
    let (long, _) = answers(&calm, &[]);
    // Every answer is cut at a text of its own, late enough that guesses are right by then.
    let stop: Vec<String> = long
        .iter()
        .map(|answer| {
            let begin = answer.text.char_indices().nth(60).map_or(0, |(at, _)| at);
            answer.text[begin..].chars().take(9).collect()
        })
        .collect();
    let (expected, _) = answers(&calm, &stop);
    assert!(expected.iter().zip(&long).all(|(short, long)| short.text.len() < long.text.len()));
    let (found, stats) = answers(&Setting { speculation: Speculation::Always, max_batch: 5, ..calm }, &stop);
    assert_eq!(found, expected);
    assert!(stats.right_guesses > 0);
}

#[test]
fn an_answer_with_guesses_goes_on_after_any_token() {
    let model = story_model();
    let mut engine = engine(&model, &Setting { speculation: Speculation::Always, ..Setting::default() });
    let calm = Setting { speculation: Speculation::Off, max_batch: 1, ..Setting::default() };
    let (expected, _) = answers(&calm, &[]);
    for (index, request) in requests(&engine).into_iter().enumerate().take(2) {
        for n_done in (0..expected[index].tokens.len()).step_by(7) {
            let resume = expected[index].tokens[..n_done].to_vec();
            engine.submit(7, SequenceRequest { resume, ..request.clone() }).unwrap();
            let (rest, _) = run(&mut engine).remove(&7).unwrap();
            assert_eq!(rest.tokens, expected[index].tokens[n_done..], "prompt {index} after {n_done} tokens");
            assert_eq!(rest.logprob_bits, expected[index].logprob_bits[n_done..]);
            assert_eq!(rest.end, expected[index].end);
        }
    }
}
