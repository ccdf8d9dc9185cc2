//! Promise P4: tokens and log-probabilities depend on model, prompt, parameters and seed, and on nothing else.

use bitnetd_engine::kernels::KernelSet;
use bitnetd_engine::kv::KvType;
use bitnetd_engine::sampler::SamplingParams;

use crate::support::{Answer, Setting, engine, request, run, seeded, story_model};

const PROMPTS: [&str; 4] = [
    "Once upon a time",
    "The dog was sad because he was lost. He looked for his house near the big tree, and then he saw a cat.",
    "Tom and his mom went to the park. They saw",
    "One day, a little girl named Lily found a red ball",
];

fn sampling(index: usize) -> SamplingParams {
    if index.is_multiple_of(2) { SamplingParams::default() } else { seeded(index as u64) }
}

/// Each prompt by itself, on one scalar thread.
fn calm_answers(kv_type: KvType, n_tokens: usize) -> Vec<Answer> {
    let model = story_model();
    let setting = Setting {
        kernels: KernelSet::for_isa(bitnetd_engine::kernels::Isa::Scalar).unwrap(),
        kv_type,
        ..Setting::default()
    };
    let mut engine = engine(&model, &setting);
    let alone = |(index, prompt): (usize, &&str)| {
        let request = request(&engine, prompt, n_tokens, sampling(index));
        engine.submit(1, request).unwrap();
        run(&mut engine).remove(&1).unwrap().0
    };
    PROMPTS.iter().enumerate().map(alone).collect()
}

#[test]
fn instruction_set_threads_chunks_and_neighbours_change_nothing() {
    KvType::ALL.into_iter().for_each(nothing_changes);
}

fn nothing_changes(kv_type: KvType) {
    let calm = calm_answers(kv_type, 24);
    let model = story_model();
    let default = Setting { kv_type, ..Setting::default() };
    let mut settings = Vec::new();
    for kernels in KernelSet::all_present() {
        settings.push(Setting { kernels, ..default.clone() });
    }
    for (n_threads, max_batch, prefill_chunk) in [(2, 1, 1), (3, 4, 7), (2, 3, 64), (1, 4, 3)] {
        settings.push(Setting { n_threads, max_batch, prefill_chunk, ..default.clone() });
    }
    for setting in settings {
        let mut engine = engine(&model, &setting);
        for (index, prompt) in PROMPTS.iter().enumerate() {
            let request = request(&engine, prompt, 24, sampling(index));
            engine.submit(index as u64, request).unwrap();
        }
        for (id, (answer, _)) in run(&mut engine) {
            assert_eq!(answer, calm[usize::try_from(id).unwrap()], "sequence {id} with {setting:?}");
        }
    }
}

#[test]
fn an_answer_goes_on_after_any_token_as_if_nothing_had_happened() {
    KvType::ALL.into_iter().for_each(it_goes_on);
}

fn it_goes_on(kv_type: KvType) {
    let n_tokens = 16;
    let calm = calm_answers(kv_type, n_tokens);
    let model = story_model();
    let mut engine = engine(&model, &Setting { kv_type, ..Setting::default() });
    for (index, prompt) in PROMPTS.iter().enumerate() {
        for n_done in 0..=calm[index].tokens.len() {
            let mut request = request(&engine, prompt, n_tokens, sampling(index));
            request.resume = calm[index].tokens[..n_done].to_vec();
            engine.submit(7, request).unwrap();
            let (rest, _) = run(&mut engine).remove(&7).unwrap();
            assert_eq!(rest.tokens, calm[index].tokens[n_done..], "prompt {index} after {n_done} tokens");
            assert_eq!(rest.logprob_bits, calm[index].logprob_bits[n_done..]);
            assert_eq!(rest.end, calm[index].end);
            assert!(
                calm[index].text.ends_with(&rest.text),
                "{:?} is no end of {:?}",
                rest.text,
                calm[index].text
            );
        }
    }
}
