//! The rules one by one, as an operator or a client would say them.

use super::*;

fn state_names(world: &World) -> Vec<&'static str> {
    world.state.slots.iter().map(Slot::state_name).collect()
}

/// What ended the last job.
fn last_end(world: &World) -> Option<ErrorCode> {
    world
        .notes
        .iter()
        .rev()
        .find_map(|note| match note {
            Note::JobEnded { error, .. } => Some(error.as_ref().map(|error| error.code)),
            _ => None,
        })
        .flatten()
}

fn slot_of(world: &World, job: JobId) -> Option<SlotId> {
    world.processes.iter().find(|(_, process)| process.jobs.contains_key(&job)).map(|(&slot, _)| slot)
}

#[test]
fn a_job_goes_on_elsewhere_with_its_tokens_when_its_worker_dies() {
    let mut world = World::ready(policy(), 2);
    let job = world.submit(1, request(5));
    assert_eq!(slot_of(&world, job), Some(0));
    world.say_token(0, 0);
    world.say_token(0, 0);
    world.die(0, exit(None, Some(9)));
    assert_eq!(slot_of(&world, job), Some(1));
    for _ in 0..4 {
        world.say_token(1, 0);
    }
    assert!(world.open.is_empty());
    assert_eq!(
        (world.state.totals.failovers, world.state.totals.completed, world.state.totals.tokens),
        (1, 1, 5)
    );
}

#[test]
fn jobs_go_where_the_fewest_tokens_are_outstanding() {
    let mut world = World::ready(policy(), 2);
    let long = world.submit(1, request(1000));
    let short = world.submit(1, request(10));
    let next = world.submit(1, request(10));
    assert_eq!([long, short, next].map(|job| slot_of(&world, job)), [Some(0), Some(1), Some(1)]);
}

fn with_prompt(prompt: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest { prompt: Prompt::Text(prompt.into()), ..request(max_tokens) }
}

#[test]
fn a_prompt_goes_where_its_beginning_is_known() {
    let mut world = World::ready(Policy { max_batch: 8, ..policy() }, 3);
    let (fables, laws) = ("Tell a fable. ".repeat(100), "Explain a law. ".repeat(100));
    let first = [fables.clone(), laws.clone()].map(|prompt| world.submit(1, with_prompt(&prompt, 1)));
    assert_eq!(first.map(|job| slot_of(&world, job)), [Some(0), Some(1)]);
    for slot in [0, 1] {
        world.say_token(slot, 0);
        world.say_token(slot, 0);
    }
    assert!(world.open.is_empty());
    // All are idle; without knowing the beginnings both would go to slot 0.
    let law = world.submit(1, with_prompt(&format!("{laws}Of nature."), 10));
    assert_eq!(slot_of(&world, law), Some(1));
    let fable = world.submit(1, with_prompt(&format!("{fables}Of a fox."), 10));
    assert_eq!(slot_of(&world, fable), Some(0));
    let other = world.submit(1, with_prompt("Something else", 10));
    assert_eq!(slot_of(&world, other), Some(2), "the one with the least to do");
}

#[test]
fn a_worker_that_is_much_busier_does_not_get_a_prompt_for_knowing_it() {
    let mut world = World::ready(Policy { max_batch: 8, ..policy() }, 2);
    let prompt = "Tell a fable. ".repeat(100); // About 350 tokens.
    assert_eq!(world.submit(1, with_prompt(&prompt, 1)), 1);
    world.say_token(0, 0);
    world.say_token(0, 0);
    world.submit(1, request(200));
    world.submit(1, request(2));
    let busy = world.submit(1, with_prompt(&prompt, 1));
    assert_eq!(slot_of(&world, busy), Some(0), "200 tokens more than the other are fewer than the prompt's");
    world.submit(1, request(1000));
    let (n_before, n_other) = (world.processes[&0].jobs.len(), world.processes[&1].jobs.len());
    assert_eq!((n_before, n_other), (2, 2));
    let mut world = World::ready(Policy { max_batch: 8, ..policy() }, 2);
    world.submit(1, with_prompt(&prompt, 1));
    world.say_token(0, 0);
    world.say_token(0, 0);
    world.submit(1, request(900));
    let elsewhere = world.submit(1, with_prompt(&prompt, 1));
    assert_eq!(slot_of(&world, elsewhere), Some(1));
    // Now both know it.
    world.die(0, exit(None, Some(9)));
    let again = world.submit(1, with_prompt(&prompt, 1));
    assert_eq!(slot_of(&world, again), Some(1), "what a dead worker knew is gone");
}

#[test]
fn a_poison_job_is_given_up_and_its_neighbours_live() {
    let mut world = World::ready(Policy { max_batch: 4, ..policy() }, 1);
    let poison = world.submit(1, request(3));
    let neighbours = [world.submit(1, request(3)), world.submit(2, request(3))];
    let mut deaths = 0;
    for _ in 0..100 {
        world.say_ready(0);
        if world.processes.get(&0).is_some_and(|process| process.jobs.contains_key(&poison)) {
            deaths += 1;
            world.die(0, exit(None, Some(11)));
        } else {
            world.say_token(0, 0);
        }
        world.say_pong(0);
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(deaths, 3);
    assert!(world.open.is_empty());
    assert_eq!((world.state.totals.completed, world.state.totals.failed), (2, 1));
    let poisoned = world.notes.iter().any(|note| {
        matches!(note, Note::JobEnded { job, error: Some(error), .. } if *job == poison && error.code == ErrorCode::Poisoned)
    });
    assert!(poisoned && neighbours.iter().all(|job| !world.open.contains_key(job)));
}

#[test]
fn progress_between_deaths_is_not_poison() {
    let mut world =
        World::ready(Policy { restart: RestartConfig { max: 100, ..policy().restart }, ..policy() }, 1);
    world.submit(1, request(10));
    for _ in 0..10 {
        world.say_token(0, 0);
        world.die(0, exit(None, Some(9)));
        world.pass(Duration::from_secs(10));
        world.say_ready(0);
    }
    world.say_token(0, 0);
    assert_eq!((world.state.totals.completed, world.state.totals.failovers), (1, 10));
}

#[test]
fn a_hung_worker_is_killed_and_an_answering_one_is_not() {
    let mut world = World::ready(policy(), 2);
    let job = world.submit(1, request(5));
    for _ in 0..30 {
        world.say_pong(1);
        world.pass(Duration::from_millis(500));
    }
    assert_eq!(state_names(&world), ["draining", "ready"], "killed, not reaped yet");
    assert_eq!(slot_of(&world, job).unwrap(), 0, "the world still thinks so");
    assert!(
        world.processes[&1].jobs.contains_key(&job),
        "but it goes on elsewhere before the corpse is reaped"
    );
    world.die(0, exit(None, Some(9)));
    assert_eq!(
        world.state.slots[0].last_exit.as_deref(),
        Some("killed: its step loop did not answer for 10s")
    );
}

#[test]
fn a_pause_of_the_supervisor_itself_kills_nobody() {
    let mut world = World::ready(policy(), 1);
    world.now += Duration::from_secs(3600); // One jump: no event came in between.
    world.send(Event::TimePassed);
    assert_eq!(state_names(&world), ["ready"]);
    world.pass(Duration::from_secs(11));
    assert_eq!(state_names(&world), ["draining"], "silence after the pause still counts");
}

#[test]
fn a_slot_that_dies_too_often_fails_and_an_operator_can_bring_it_back() {
    let mut world = World::new(policy(), 1);
    let job = world.submit(1, request(1));
    for _ in 0..5 {
        assert_eq!(state_names(&world), ["starting"]);
        world.die(0, exit(Some(70), None));
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(state_names(&world), ["failed"]);
    assert_eq!((world.state.health(), last_end(&world)), (Health::Degraded, Some(ErrorCode::Degraded)));
    assert!(!world.open.contains_key(&job));
    world.submit(1, request(1));
    assert_eq!(world.state.totals.refused, 1);
    world.send(Event::RestartRequested { slot: 0 });
    world.say_ready(0);
    assert_eq!((state_names(&world), world.state.health()), (vec!["ready"], Health::Ready));
}

#[test]
fn permanent_exit_codes_and_lying_versions_are_not_tried_again() {
    for code in [64, 65, 66, 77, 78] {
        let mut world = World::new(policy(), 1);
        world.die(0, exit(Some(code), None));
        world.pass(Duration::from_secs(60));
        assert_eq!((state_names(&world), world.spawned.len()), (vec!["failed"], 1));
        let Readiness::Failed { exit_code, .. } = world.state.readiness() else { panic!("not failed") };
        assert_eq!(i32::from(exit_code as u8), code);
    }
    let mut world = World::new(policy(), 1);
    world.said(
        0,
        WorkerSaid::Ready {
            version: 999,
            model: Box::new(summary()),
            load_s: 0.0,
            confinement: Confinement::default(),
        },
    );
    world.die(0, exit(None, Some(9)));
    world.pass(Duration::from_secs(60));
    assert_eq!((state_names(&world), world.spawned.len()), (vec!["failed"], 1));
}

#[test]
fn a_worker_that_never_gets_ready_is_killed() {
    let mut world = World::new(policy(), 1);
    world.pass(Duration::from_secs(121));
    assert_eq!(state_names(&world), ["draining"]);
    world.die(0, exit(None, Some(9)));
    assert_eq!(state_names(&world), ["backoff"]);
}

#[test]
fn the_queue_is_bounded_for_all_and_for_each_client() {
    let mut world = World::new(policy(), 1);
    for _ in 0..4 {
        world.submit(1, request(1));
    }
    assert_eq!(world.state.totals.refused, 0);
    world.submit(1, request(1));
    assert_eq!(world.state.totals.refused, 1, "the client's share is used up");
    world.submit(2, request(1));
    world.submit(2, request(1));
    world.submit(3, request(1));
    assert_eq!((world.state.totals.refused, world.open.len()), (2, 6), "the queue is full");
    let hint = world.notes.iter().rev().find_map(|note| match note {
        Note::JobRefused { error, .. } => error.retry_after_ms,
        _ => None,
    });
    assert!(hint.is_some_and(|ms| ms >= 50), "{hint:?}");
}

#[test]
fn a_deadline_ends_a_job_wherever_it_is() {
    let mut world = World::ready(Policy { max_batch: 1, ..policy() }, 1);
    let with_deadline = || GenerateRequest { deadline_ms: Some(500), ..request(9) };
    world.submit(1, with_deadline());
    world.submit(1, with_deadline());
    world.say_token(0, 0);
    world.pass(Duration::from_millis(499));
    assert_eq!(world.open.len(), 2);
    world.pass(Duration::from_millis(1));
    assert!(world.open.is_empty() && world.processes[&0].jobs.is_empty());
    assert_eq!(last_end(&world), Some(ErrorCode::DeadlineExceeded));
}

#[test]
fn a_restart_moves_jobs_without_counting_a_death() {
    let mut world =
        World::ready(Policy { queue: QueueConfig { max_deaths: 1, ..policy().queue }, ..policy() }, 2);
    let job = world.submit(1, request(2));
    world.say_token(0, 0);
    world.send(Event::RestartRequested { slot: 0 });
    assert!(world.processes[&1].jobs.contains_key(&job));
    world.die(0, exit(None, Some(15)));
    world.say_ready(0);
    assert_eq!(state_names(&world), ["ready", "ready"]);
    world.say_token(1, 0);
    world.say_token(1, 0);
    assert_eq!(world.state.totals.completed, 1);
}

#[test]
fn a_drain_finishes_what_was_accepted_and_replaces_workers_for_it() {
    let mut world = World::ready(policy(), 1);
    world.submit(1, request(2));
    world.send(Event::DrainRequested);
    world.submit(1, request(2));
    assert_eq!(world.state.totals.refused, 1);
    world.say_token(0, 0);
    world.die(0, exit(None, Some(9)));
    world.pass(Duration::from_millis(60));
    world.say_ready(0);
    world.say_token(0, 0);
    assert!(!world.is_stopped);
    world.say_token(0, 0);
    assert_eq!(state_names(&world), ["draining"]);
    world.die(0, exit(Some(0), None));
    assert!(world.is_stopped);
    assert_eq!(world.state.totals.completed, 1);
}

#[test]
fn a_drain_ends_at_its_deadline() {
    let mut world = World::ready(policy(), 1);
    world.submit(1, request(2));
    world.send(Event::DrainRequested);
    for _ in 0..31 {
        world.say_pong(0);
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(last_end(&world), Some(ErrorCode::Draining));
    world.pass(STOP_GRACE);
    world.die(0, exit(None, Some(9)));
    assert!(world.is_stopped);
}

const DURABLE: Standing = Standing::Durable { deaths: 0 };

#[test]
fn durable_jobs_leave_places_for_those_who_wait() {
    let mut world = World::ready(Policy { max_batch: 8, ..policy() }, 2);
    let durable: Vec<JobId> = (0..20).map(|_| world.submit_as(DURABLE, 1, request(3))).collect();
    let n_on_slots = durable.iter().filter(|job| slot_of(&world, **job).is_some()).count();
    assert_eq!(n_on_slots, 8, "four on each of two workers");
    let attended = world.submit(2, request(3));
    assert!(slot_of(&world, attended).is_some());
    assert_eq!((world.state.n_queued(), world.state.pools[&0].durable.len()), (0, 12));
}

#[test]
fn attended_jobs_go_first_and_durable_ones_are_not_starved() {
    let policy = policy();
    let queue = QueueConfig { max_jobs: 1000, max_per_client: 1000, ..policy.queue.clone() };
    let mut world = World::ready(Policy { max_batch: 1, queue, ..policy }, 1);
    let first = world.submit(1, request(1));
    let durable = world.submit_as(DURABLE, 2, request(1));
    let mut order = Vec::new();
    for _ in 0..30 {
        world.submit(1, request(1));
        if let Some(&job) = world.processes[&0].jobs.keys().next() {
            order.push(job);
        }
        world.say_token(0, 0);
        world.say_token(0, 0);
    }
    assert_eq!(order[0], first);
    assert_eq!(order.iter().position(|&job| job == durable), Some(8), "{order:?}");
}

#[test]
fn a_durable_job_that_saw_deaths_before_runs_alone_and_is_given_up_at_the_limit() {
    let mut world = World::ready(Policy { max_batch: 4, ..policy() }, 1);
    let poison = world.submit_as(Standing::Durable { deaths: 2 }, 1, request(3));
    let neighbour = world.submit(1, request(3));
    assert_eq!((slot_of(&world, poison), slot_of(&world, neighbour)), (Some(0), None));
    world.die(0, exit(None, Some(6)));
    assert_eq!(last_end(&world), Some(ErrorCode::Poisoned));
    assert!(world.open.contains_key(&neighbour));
}

#[test]
fn a_drain_gives_back_durable_jobs_that_have_not_begun() {
    let mut world = World::ready(policy(), 1);
    let jobs: Vec<JobId> = (0..5).map(|_| world.submit_as(DURABLE, 1, request(3))).collect();
    world.send(Event::DrainRequested);
    let left: Vec<JobId> = jobs.iter().copied().filter(|job| world.open.contains_key(job)).collect();
    assert_eq!((left, last_end(&world)), (jobs[..2].to_vec(), Some(ErrorCode::Draining)));
}
