//! Many clients, while random workers are killed, crashed and stopped: nothing lost, nothing doubled, nothing changed.

use std::time::Duration;

use bitnetd_config::ListenConfig;
use bitnetd_proto::client::{Client, GenerationEvent};
use bitnetd_supervisor::{Listener, Service};
use nix::sys::signal::Signal;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::support::{Fixture, LONG, end, expected_ids, request, signal};

const N_CLIENTS: u64 = 32;
const JOBS_PER_CLIENT: u64 = 8;
const N_TOKENS: u32 = 80;

/// Hurts a random worker from time to time, for ever; how often and how is the same in each run.
async fn hurt_workers(service: Service) {
    let mut random = 12_345_u64;
    loop {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        sleep(Duration::from_millis(50 + (random >> 33) % 100)).await;
        let pids: Vec<u32> = service.status().await.slots.iter().filter_map(|slot| slot.pid).collect();
        let victim = usize::try_from(random >> 40).unwrap() % pids.len().max(1);
        let how =
            [Signal::SIGKILL, Signal::SIGSEGV, Signal::SIGSTOP][usize::try_from(random >> 50).unwrap() % 3];
        if let Some(&pid) = pids.get(victim) {
            signal(pid, how);
        }
    }
}

#[tokio::test]
async fn no_job_is_lost_doubled_or_changed() {
    let mut fixture = Fixture::new(3, &["pace_ms=1"]);
    // On a starved machine a worker may be hurt again before its first token, more often than a poison job may.
    fixture.config.queue.max_deaths = 20;
    fixture.config.watchdog.interval = Duration::from_millis(100);
    fixture.config.watchdog.timeout = Duration::from_millis(1000);
    let service = fixture.ready().await;
    let path = fixture.folder.path().join("b.sock");
    let serving =
        tokio::spawn(Listener::bind(&path, &ListenConfig::default()).unwrap().serve(service.clone()));
    let hurting = tokio::spawn(hurt_workers(service.clone()));
    let clients: Vec<_> = (0..N_CLIENTS)
        .map(|client| {
            let path = path.clone();
            spawn_blocking(move || {
                let mut connection = Client::connect(&path, "chaos", LONG).unwrap();
                for seed in client * JOBS_PER_CLIENT..(client + 1) * JOBS_PER_CLIENT {
                    let mut ids = Vec::new();
                    for event in connection.generate(&request(N_TOKENS, seed)).unwrap() {
                        match event.unwrap() {
                            GenerationEvent::Token(token) => {
                                assert_eq!(token.index as usize, ids.len());
                                ids.push(token.id);
                            }
                            GenerationEvent::Done(done) => assert_eq!(done.usage.completion_tokens, N_TOKENS),
                        }
                    }
                    assert_eq!(ids, expected_ids(seed, 0..N_TOKENS), "seed {seed}");
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    hurting.abort();
    let totals = service.status().await.totals;
    assert_eq!((totals.completed, totals.failed, totals.cancelled), (N_CLIENTS * JOBS_PER_CLIENT, 0, 0));
    assert!(totals.failovers > 0, "nothing was hurt: {totals:?}");
    end(service).await;
    serving.await.unwrap();
}
