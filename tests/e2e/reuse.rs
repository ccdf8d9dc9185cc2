//! What was read or said before saves work and changes nothing: cached prefixes, and guesses from the text so far.

use bitnetd_proto::client::{Client, GenerationEvent};
use bitnetd_proto::event::Done;
use bitnetd_proto::request::{GenerateRequest, Prompt};

use crate::support::{Daemon, Folder, generate, random_request, wait_for};

/// Runs a job to its end.
fn finish(client: &mut Client, prompt: &str) -> Done {
    let request = GenerateRequest { max_tokens: 3, ..GenerateRequest::new(Prompt::Text(prompt.into())) };
    let mut done = None;
    for event in client.generate(&request).unwrap() {
        if let GenerationEvent::Done(end) = event.unwrap() {
            done = Some(end);
        }
    }
    done.unwrap()
}

/// Two long beginnings that have nothing in common, new ones for each attempt.
fn beginnings(attempt: usize) -> [String; 2] {
    ["The little cat ran to the red house. ", "A big bird sat on the old tree and sang. "]
        .map(|sentence| format!("Story {attempt}. {}", sentence.repeat(9)))
}

#[test]
fn a_prompt_goes_to_the_worker_that_has_read_its_beginning() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let mut attempt = 0;
    // Two at once go to different workers, unless the first is over before the second comes.
    let (texts, slots) = wait_for("two jobs are on different workers", || {
        attempt += 1;
        let texts = beginnings(attempt);
        let both = texts.clone().map(|text| {
            let mut client = daemon.connect().unwrap();
            std::thread::spawn(move || finish(&mut client, &text))
        });
        let dones = both.map(|job| job.join().unwrap());
        assert!(dones.iter().all(|done| done.usage.prompt_tokens > 64), "too short for a page: {dones:?}");
        let slots = dones.map(|done| done.timings.slot);
        (slots[0] != slots[1]).then_some((texts, slots))
    });
    let mut client = daemon.connect().unwrap();
    // In either order, and more than once: without a preference all of these would go to slot 0, which is idle.
    for which in [1, 0, 0, 1, 1] {
        let done = finish(&mut client, &format!("{}The", texts[which]));
        assert_eq!(done.timings.slot, slots[which], "{done:?}");
        assert!(done.usage.cached_tokens >= 32, "{done:?}");
    }
    wait_for("the workers tell what they found in their caches", || {
        let cached: u64 = daemon.status().unwrap().slots.iter().map(|slot| slot.load.cached_tokens).sum();
        (cached >= 5 * 32).then_some(())
    });
}

#[test]
fn speculation_changes_no_answer_of_a_daemon() {
    let folder = Folder::new();
    let mut answers = Vec::new();
    for speculation in ["auto", "off"] {
        folder.write("c.toml", format!("[engine]\nspeculation = \"{speculation}\"\n"));
        let daemon = Daemon::start(&folder, "-c c.toml --workers 1 --threads 1");
        let mut client = daemon.connect().unwrap();
        let texts: Vec<String> = (0..4)
            .map(|seed| {
                let prompt = "The cat sat on the mat. The dog sat on the mat. ".repeat(3);
                let mut request = random_request(&prompt, seed, 80);
                request.sampling.temperature = if seed < 2 { 0.0 } else { 0.3 };
                generate(&mut client, &request).unwrap()
            })
            .collect();
        answers.push(texts);
        drop(client);
        drop(daemon);
    }
    assert_eq!(answers[0], answers[1]);
}
