//! What decoding reads instead of the file changes no token.

use bitnetd_engine::fast_image::{FastImage, FastImageError, FastParts};
use bitnetd_engine::kernels::KernelSet;
use bitnetd_engine::mapping::Mapping;
use bitnetd_engine::sampler::SamplingParams;
use bitnetd_engine::sequence::SequenceRequest;
use bitnetd_engine::{EngineEvent, StepEvents};

use crate::support::{Setting, engine, fast_image, request, run, seeded, story_model};

const PROMPT: &str = "Once upon a time there was a little dog who";

/// Kinds of requests: those whose token hangs on a few logits, and those that need them all.
fn requests(engine: &bitnetd_engine::Engine) -> Vec<SequenceRequest> {
    let plain = SamplingParams { temperature: 1.0, seed: 11, ..SamplingParams::default() };
    let params = [
        SamplingParams::default(),
        plain.clone(),
        seeded(3),
        SamplingParams { min_p: 0.1, ..plain.clone() },
        SamplingParams { repetition_penalty: 1.5, ..SamplingParams::default() },
        SamplingParams { logit_bias: vec![(300, 9.0), (301, -9.0)], ..plain.clone() },
        SamplingParams { top_p: 0.7, ..plain },
    ];
    let request = |params| SequenceRequest { n_logprobs: None, ..request(engine, PROMPT, 40, params) };
    params.into_iter().map(request).collect()
}

#[test]
fn no_token_changes_on_any_instruction_set_and_batch() {
    let model = story_model();
    let mut plain = engine(&model, &Setting::default());
    let requests = requests(&plain);
    for (id, request) in (0..).zip(&requests) {
        plain.submit(id, request.clone()).unwrap();
    }
    let expected = run(&mut plain);
    for kernels in KernelSet::all_present() {
        for (n_threads, max_batch) in [(1, 1), (2, 4)] {
            let mut fast = engine(&model, &Setting { kernels, n_threads, max_batch, ..Setting::default() });
            let image = fast_image(&fast);
            fast.adopt(image);
            for (id, request) in (0..).zip(&requests) {
                fast.submit(id, request.clone()).unwrap();
            }
            for (id, (answer, _)) in run(&mut fast) {
                assert_eq!(answer, expected[&id].0, "request {id} with {}", kernels.isa());
            }
        }
    }
}

#[test]
fn an_image_is_taken_up_in_the_middle_of_answers() {
    let model = story_model();
    let mut plain = engine(&model, &Setting::default());
    let requests = requests(&plain);
    for (id, request) in (0..).zip(&requests) {
        plain.submit(id, request.clone()).unwrap();
    }
    let expected = run(&mut plain);
    let mut tokens = vec![Vec::new(); requests.len()];
    let mut engine = engine(&model, &Setting { max_batch: requests.len(), ..Setting::default() });
    for (id, request) in (0..).zip(requests) {
        engine.submit(id, request).unwrap();
    }
    let mut events = StepEvents::new();
    while !engine.is_idle() {
        if engine.fast_image().is_none() && tokens[0].len() >= 7 {
            let image = fast_image(&engine);
            engine.adopt(image);
        }
        engine.step(&mut events);
        for (event, _) in events.drain() {
            if let EngineEvent::Token { id, token, .. } = event {
                tokens[usize::try_from(id).unwrap()].push(token);
            }
        }
    }
    assert!(engine.fast_image().is_some());
    for (id, tokens) in (0..).zip(tokens) {
        assert_eq!(tokens, expected[&id].0.tokens, "request {id}");
    }
}

#[test]
fn an_image_of_something_else_is_refused() {
    let model = story_model();
    let engine = engine(&model, &Setting::default());
    let image = fast_image(&engine);
    assert_eq!(image.parts(), FastParts { ternary: true, head: true });
    let refuse = |n_bytes: usize, parts: u8| {
        let mut bytes = vec![0; n_bytes];
        bytes[8] = parts;
        FastImage::new(Mapping::from_bytes(bytes).unwrap(), &model).unwrap_err()
    };
    let n_bytes = image.n_bytes();
    assert!(matches!(refuse(n_bytes, 3), FastImageError::Foreign));
    assert!(matches!(refuse(n_bytes - 1, 3), FastImageError::Length { .. }));
    assert!(matches!(refuse(n_bytes, 2), FastImageError::Length { .. }));
    assert!(matches!(refuse(64, 0), FastImageError::Nothing));
    let empty = FastImage::new(Mapping::from_bytes([]).unwrap(), &model);
    assert!(matches!(empty.unwrap_err(), FastImageError::Nothing));
}
