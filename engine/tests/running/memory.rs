//! A step allocates nothing unless a sequence comes or goes.

use allocation_counter::{AllocationInfo, measure};
use bitnetd_engine::kernels::KernelSet;
use bitnetd_engine::sampler::SamplingParams;
use bitnetd_engine::speculation::Speculation;
use bitnetd_engine::{Engine, StepEvents};

use crate::support::{Setting, engine, fast_image, request, seeded, story_model};

/// What steps allocate until one ends a sequence. There is one thread, so that all of it is seen.
fn allocations(engine: &mut Engine, events: &mut StepEvents, n_steps: usize) -> AllocationInfo {
    let n_before = engine.n_sequences();
    let info = measure(|| (0..n_steps).for_each(|_| engine.step(events)));
    assert_eq!(engine.n_sequences(), n_before, "too many steps: a sequence ended");
    info
}

#[test]
fn a_step_allocates_nothing() {
    let settings = KernelSet::all_present().flat_map(|kernels| {
        let of = move |speculation| [(kernels, speculation, false), (kernels, speculation, true)];
        [Speculation::Off, Speculation::Always].into_iter().flat_map(of)
    });
    let model = story_model();
    for (kernels, speculation, has_image) in settings {
        let setting = Setting { kernels, speculation, max_batch: 8, prefill_chunk: 16, ..Setting::default() };
        let mut engine = engine(&model, &setting);
        if has_image {
            let image = fast_image(&engine);
            engine.adopt(image);
        }
        let mut events = StepEvents::new();
        let mut n_prompt_tokens = 0;
        for id in 0..8 {
            let prompt = format!("{id} little dogs saw a ball. ").repeat(6);
            let sampling = match id % 3 {
                0 => SamplingParams::default(),
                1 => seeded(id),
                _ => SamplingParams { repetition_penalty: 1.1, presence_penalty: 0.1, ..seeded(id) },
            };
            let mut request = request(&engine, &prompt, 150, sampling);
            request.n_logprobs = None; // What is reported of them belongs to the caller.
            request.ignore_eos = true;
            request.stop = vec!["never to be seen".into()];
            n_prompt_tokens += request.prompt.len() as u64;
            engine.submit(id, request).unwrap();
        }
        let first = measure(|| engine.step(&mut events));
        assert!(first.count_total > 0, "the measurement sees nothing");
        // When a prompt has been read its pages are made known, and the thread's own memory grows in the first steps.
        while engine.stats().prefill_tokens < n_prompt_tokens {
            engine.step(&mut events);
        }
        (0..2).for_each(|_| engine.step(&mut events));
        let generating = allocations(&mut engine, &mut events, 6);
        let isa = kernels.isa();
        assert_eq!(generating.count_total, 0, "{generating:?}: {isa}, {speculation:?}, image {has_image}");
    }
}

#[test]
fn reading_a_prompt_allocates_nothing_after_its_first_step() {
    let model = story_model();
    let mut engine = engine(&model, &Setting { prefill_chunk: 8, ..Setting::default() });
    let mut events = StepEvents::new();
    let long = request(&engine, &"Tom had a red ball. ".repeat(30), 4, SamplingParams::default());
    assert!(long.prompt.len() > 100, "{} tokens", long.prompt.len());
    engine.submit(1, long).unwrap();
    (0..2).for_each(|_| engine.step(&mut events));
    let reading = allocations(&mut engine, &mut events, 8);
    assert_eq!(reading.count_total, 0, "{reading:?}");
    assert_eq!(engine.stats().decode_tokens, 0);
}
