//! Sequences come, wait, are cancelled and end; their memory comes back.

use std::sync::Arc;
use std::time::Duration;

use bitnetd_engine::SubmitError;
use bitnetd_engine::convert::synth::{SynthOptions, synth};
use bitnetd_engine::gguf::Gguf;
use bitnetd_engine::inspect::ModelShape;
use bitnetd_engine::kernels::float::KV_PAGE_TOKENS;
use bitnetd_engine::mapping::Mapping;
use bitnetd_engine::model::{Architecture, Model};
use bitnetd_engine::sampler::SamplingParams;
use bitnetd_engine::sequence::FinishReason;
use bitnetd_engine::speculation::Speculation;

use crate::support::{Setting, engine, request, run, story_model};

#[test]
fn what_can_never_run_is_refused() {
    let model = story_model();
    let mut engine = engine(&model, &Setting::default());
    let mut bad = request(&engine, "x", 4, SamplingParams::default());
    bad.prompt.clear();
    assert_eq!(engine.submit(1, bad.clone()), Err(SubmitError::EmptyPrompt));
    bad.prompt = vec![5; engine.n_ctx()];
    assert_eq!(engine.submit(1, bad.clone()), Err(SubmitError::ContextExceeded { prompt: 256, n_ctx: 256 }));
    bad.prompt = vec![0, 4096];
    assert_eq!(engine.submit(1, bad), Err(SubmitError::UnknownToken { token: 4096, n_vocab: 4096 }));
    let good = request(&engine, "x", 4, SamplingParams::default());
    engine.submit(1, good.clone()).unwrap();
    assert_eq!(engine.submit(1, good), Err(SubmitError::DuplicateId(1)));
    assert_eq!(engine.n_sequences(), 1);
}

#[test]
fn the_context_window_ends_an_answer() {
    let model = story_model();
    let mut engine = engine(&model, &Setting::default());
    let mut request = request(&engine, "Once", 10_000, SamplingParams::default());
    request.ignore_eos = true;
    request.prompt = [request.prompt, vec![300; 250]].concat();
    let room = engine.n_ctx() - request.prompt.len();
    engine.submit(3, request).unwrap();
    let (answer, _) = run(&mut engine).remove(&3).unwrap();
    assert_eq!(answer.end, Some((FinishReason::Length, room)));
}

#[test]
fn a_stop_string_ends_an_answer_and_is_not_part_of_it() {
    let model = story_model();
    let mut engine = engine(&model, &Setting::default());
    let plain = request(&engine, "Once upon a time", 60, SamplingParams::default());
    engine.submit(1, plain.clone()).unwrap();
    let (calm, _) = run(&mut engine).remove(&1).unwrap();
    let middle = calm.text.char_indices().nth(40).unwrap().0;
    let stop = &calm.text[middle..middle + 9];
    let stopped = bitnetd_engine::sequence::SequenceRequest { stop: vec![stop.to_owned()], ..plain };
    engine.submit(1, stopped).unwrap();
    let (answer, _) = run(&mut engine).remove(&1).unwrap();
    assert_eq!(answer.end.unwrap().0, FinishReason::Stop);
    assert_eq!(answer.text, calm.text[..calm.text.find(stop).unwrap()]);
}

#[test]
fn more_sequences_than_fit_take_turns_and_cancelled_ones_give_their_pages_back() {
    let model = story_model();
    let mut engine = engine(&model, &Setting { max_batch: 2, ..Setting::default() });
    let n_free = engine.n_pages_available();
    for id in 0..5 {
        let request = request(&engine, "Tom had a ball", 20, SamplingParams::default());
        engine.submit(id, request).unwrap();
    }
    let mut events = bitnetd_engine::StepEvents::new();
    engine.step(&mut events);
    assert!(engine.cancel(0), "a running one");
    assert!(engine.cancel(4), "a waiting one");
    assert!(!engine.cancel(4), "only once");
    let answers = run(&mut engine);
    assert_eq!(answers.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(answers[&2].0, answers[&3].0);
    assert!(
        answers[&2].0.text.ends_with(&answers[&1].0.text),
        "its first token may be among the first events"
    );
    assert_eq!(engine.n_pages_available(), n_free);
}

#[test]
fn a_prompt_that_comes_again_is_read_from_the_cache_and_answers_the_same() {
    let model = story_model();
    let mut engine = engine(&model, &Setting::default());
    let text = "Tom and his mom went to the park. They saw a big tree. ".repeat(4);
    let request = request(&engine, &text, 12, SamplingParams::default());
    assert!(request.prompt.len() > 40, "long enough for a page");
    engine.submit(1, request.clone()).unwrap();
    let (first, summary) = run(&mut engine).remove(&1).unwrap();
    assert_eq!(summary.n_cached, 0);
    engine.submit(2, request).unwrap();
    let (second, summary) = run(&mut engine).remove(&2).unwrap();
    assert!(summary.n_cached >= 32, "{summary:?}");
    assert_eq!(second, first);
}

#[test]
fn prompts_that_push_each_other_out_of_the_cache_answer_as_if_alone() {
    const N_JOBS: u64 = 60;
    let model = story_model();
    let texts =
        ["The cat ran. ", "A big bird sat. ", "Tom had a ball. ", "Mom was sad. ", "It was a sunny day. "]
            .map(|sentence| sentence.repeat(30));
    let setting = Setting { max_batch: 2, ..Setting::default() };
    let calm = texts.clone().map(|text| {
        let mut engine = engine(&model, &setting);
        let request = request(&engine, &text, 6, SamplingParams::default());
        engine.submit(0, request).unwrap();
        run(&mut engine).remove(&0).unwrap().0
    });
    let mut engine = engine(&model, &setting);
    let n_pages = engine.n_pages_available();
    let requests = texts.map(|text| request(&engine, &text, 6, SamplingParams::default()));
    let n_full: usize = requests.iter().map(|request| request.prompt.len() / KV_PAGE_TOKENS).sum();
    assert!(n_full > n_pages, "{n_full} pages of prompts have room in {n_pages}");
    // Each three times in a row, and again when all others have been there.
    let which = |id: u64| usize::try_from(id / 3 % 5).unwrap();
    for id in 0..N_JOBS {
        engine.submit(id, requests[which(id)].clone()).unwrap();
    }
    let answers = run(&mut engine);
    let (mut n_hits, mut n_evicted) = (0, 0);
    for (id, (answer, summary)) in &answers {
        assert_eq!(answer, &calm[which(*id)], "job {id}, {} tokens from the cache", summary.n_cached);
        let comes_again_late = *id >= 3 * 5 && id % 3 == 0;
        n_hits += u32::from(summary.n_cached > 0);
        n_evicted += u32::from(comes_again_late && summary.n_cached + KV_PAGE_TOKENS < summary.n_prompt);
    }
    assert_eq!(answers.len() as u64, N_JOBS);
    assert!(
        n_hits >= 5 && n_evicted >= 5,
        "{n_hits} found something, {n_evicted} missed what had been there"
    );
    assert_eq!(engine.n_pages_available(), n_pages);
}

#[test]
fn an_answer_gets_a_token_in_every_step_beside_a_prompt_that_is_cut_to_the_time_of_a_step() {
    let model = story_model();
    // No step is as short as that, so each may take one token of the prompt, on any machine.
    let setting = Setting {
        prefill_time: Duration::from_nanos(1),
        speculation: Speculation::Off,
        ..Setting::default()
    };
    let mut engine = engine(&model, &setting);
    let mut answer = request(&engine, "Once upon a time", 200, SamplingParams::default());
    answer.ignore_eos = true;
    engine.submit(1, answer).unwrap();
    let mut events = bitnetd_engine::StepEvents::new();
    while engine.stats().decode_tokens == 0 {
        engine.step(&mut events);
    }
    let mut long = request(&engine, "x", 1, SamplingParams::default());
    long.prompt = (300..400).collect();
    engine.submit(2, long).unwrap();
    for step in 0..100 {
        let before = engine.stats();
        events.drain().for_each(drop);
        engine.step(&mut events);
        let after = engine.stats();
        assert_eq!(after.prefill_tokens - before.prefill_tokens, 1, "step {step}");
        let n_tokens = events
            .drain()
            .filter(|(event, _)| matches!(event, bitnetd_engine::EngineEvent::Token { id: 1, .. }))
            .count();
        assert_eq!(n_tokens, 1, "step {step}");
    }
    let before = engine.stats();
    engine.step(&mut events);
    assert_eq!(engine.stats().prefill_tokens, before.prefill_tokens, "the prompt has been read");
}

#[test]
fn a_model_of_every_architecture_runs() {
    let folder = tempfile::tempdir().unwrap();
    for architecture in Architecture::ALL {
        let path = folder.path().join(architecture.name());
        let shape = ModelShape { architecture, ..ModelShape::tiny() };
        let options = SynthOptions { shape, name: "test".to_owned(), seed: 3 };
        synth(&path, &options, &mut |_| {}).unwrap();
        let gguf = Gguf::parse(Arc::new(Mapping::open(&path).unwrap())).unwrap();
        let model = Arc::new(Model::load(Arc::new(gguf)).unwrap());
        let mut engine = engine(&model, &Setting::default());
        let mut request = request(&engine, "hello", 6, SamplingParams::default());
        request.ignore_eos = true;
        engine.submit(1, request).unwrap();
        let (answer, _) = run(&mut engine).remove(&1).unwrap();
        assert_eq!(answer.tokens.len(), 6, "{}", architecture.name());
    }
}

#[test]
fn a_long_prompt_does_not_hold_up_a_short_one_nor_the_other_way_round() {
    let model = story_model();
    let mut engine = engine(&model, &Setting { max_batch: 4, prefill_chunk: 8, ..Setting::default() });
    let mut long = request(&engine, "x", 30, SamplingParams::default());
    long.prompt = (300..500).collect();
    long.ignore_eos = true;
    engine.submit(0, long).unwrap();
    let mut events = bitnetd_engine::StepEvents::new();
    engine.step(&mut events);
    let mut first_tokens = Vec::new();
    for step in 1..200_u64 {
        // Short prompts come all the time.
        if engine.n_sequences() < 4 {
            let mut short = request(&engine, "x", 3, SamplingParams::default());
            let start = 600 + 20 * u32::try_from(step).unwrap();
            short.prompt = (start..start + 6).collect();
            short.ignore_eos = true;
            engine.submit(step, short).unwrap();
        }
        engine.step(&mut events);
        for (event, _) in events.drain() {
            if let bitnetd_engine::EngineEvent::Token { id, index: 0, .. } = event {
                first_tokens.push((id, step));
            }
        }
        if first_tokens.iter().any(|(id, _)| *id == 0) {
            break;
        }
    }
    let of_long = first_tokens.iter().find(|(id, _)| *id == 0).expect("the long prompt starved").1;
    assert!(of_long <= 200 / 4 + 2, "half of 8 tokens a step are its own: {of_long} steps");
    let n_before = first_tokens.iter().filter(|(_, step)| *step < of_long).count();
    assert!(n_before > 10, "{first_tokens:?}");
    let longest_wait = first_tokens.iter().filter(|(id, _)| *id > 0).map(|(id, step)| step - id).max();
    assert!(longest_wait.unwrap() <= 6, "{first_tokens:?}");
}
