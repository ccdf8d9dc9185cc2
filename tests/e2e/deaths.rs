//! Promise P3: workers are killed while they work, and no client sees it. And nobody survives the supervisor.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;

use crate::support::{Daemon, Folder, PROMPTS, generate, is_alive, random_request, send, wait_for};

/// A supervisor that never gives a slot up.
const PATIENT: &str = "[split]\nworkers = 2\nthreads = 1\n[restart]\nmax = 1000\nbackoff_min = \"1ms\"\n\
                       backoff_max = \"2ms\"\n[queue]\nmax_deaths = 100\n";

#[test]
fn killed_workers_are_not_seen_by_any_client() {
    let folder = Folder::new();
    folder.write("patient.toml", PATIENT);
    let daemon = Daemon::start(&folder, "-c patient.toml");
    let request = |number: usize| random_request(PROMPTS[number], number as u64, 120);
    let calm: Vec<String> =
        (0..8).map(|number| generate(&mut daemon.connect().unwrap(), &request(number)).unwrap()).collect();

    let is_enough = AtomicBool::new(false);
    let n_answers: usize = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|number| {
                let (daemon, calm, is_enough) = (&daemon, &calm, &is_enough);
                scope.spawn(move || {
                    let mut n_answers = 0;
                    while !is_enough.load(Ordering::Relaxed) {
                        let text = generate(&mut daemon.connect().unwrap(), &request(number));
                        assert_eq!(text.as_ref().ok(), Some(&calm[number]), "{text:?}");
                        n_answers += 1;
                    }
                    n_answers
                })
            })
            .collect();
        // Kill whoever has jobs, until jobs have moved in the middle several times.
        let outcome = std::panic::catch_unwind(|| {
            wait_for("ten jobs have moved", || {
                let report = daemon.status()?;
                let busy = report.slots.iter().find(|slot| slot.state == "ready" && slot.jobs > 0)?;
                send(busy.pid?, Signal::SIGKILL);
                (report.totals.failovers >= 10 && report.totals.restarts >= 5).then_some(())
            });
        });
        is_enough.store(true, Ordering::Relaxed);
        let n_answers = clients.into_iter().map(|client| client.join().unwrap()).sum();
        outcome.unwrap();
        n_answers
    });
    assert!(n_answers >= 8);
    let report = daemon.status().unwrap();
    assert_eq!((report.totals.failed, report.totals.cancelled), (0, 0), "{report:?}");
}

#[test]
fn a_hung_worker_is_replaced_and_its_job_goes_on() {
    let folder = Folder::new();
    folder.write("watch.toml", format!("{PATIENT}[watchdog]\ninterval = \"100ms\"\ntimeout = \"1s\"\n"));
    let daemon = Daemon::start(&folder, "-c watch.toml");
    let request = random_request("Once", 9, 60);
    let calm = generate(&mut daemon.connect().unwrap(), &request).unwrap();
    let workers = daemon.workers();
    workers.iter().for_each(|pid| send(*pid, Signal::SIGSTOP));
    assert_eq!(generate(&mut daemon.connect().unwrap(), &request).unwrap(), calm);
    wait_for("the hung ones are gone", || workers.iter().all(|pid| !is_alive(*pid)).then_some(()));
}

#[test]
fn no_worker_survives_a_killed_supervisor() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let workers = daemon.workers();
    assert_eq!(workers.len(), 2);
    send(workers[0], Signal::SIGSTOP); // Not even one that cannot notice.
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.wait(), None);
    wait_for("the workers are gone", || workers.iter().all(|pid| !is_alive(*pid)).then_some(()));
}

#[test]
fn the_socket_of_a_killed_supervisor_is_taken_over() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    assert!(daemon.socket.exists());
    let next = Daemon::start(&folder, "--workers 1 --threads 1");
    assert!(!generate(&mut next.connect().unwrap(), &random_request("Once", 1, 5)).unwrap().is_empty());
}
