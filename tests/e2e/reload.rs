//! `bitnetd reload` and SIGHUP: the whole new configuration, or the old one stays; clients notice nothing.

use std::fs;
use std::thread::{self, ScopedJoinHandle};

use bitnetd_proto::client::ClientError;
use nix::sys::signal::Signal;

use crate::support::{Daemon, Folder, PROMPTS, generate, random_request, wait_for};

/// Waits until there are so many slots, all ready, and nobody of a former split is left.
#[track_caller]
fn wait_for_split(daemon: &Daemon, n_workers: usize) {
    wait_for("the new split", || {
        let slots = daemon.status()?.slots;
        (slots.len() == n_workers && slots.iter().all(|slot| slot.state == "ready")).then_some(())
    });
}

/// Asks eight clients for long answers, waits until they stream, does something, and gives all texts.
fn answers_around(daemon: &Daemon, n_tokens: u32, during: impl FnOnce()) -> Vec<String> {
    thread::scope(|scope| {
        let clients: Vec<ScopedJoinHandle<'_, Result<String, ClientError>>> = (0..8)
            .map(|number| {
                let request = random_request(PROMPTS[number], number as u64, n_tokens);
                scope.spawn(move || generate(&mut daemon.connect().unwrap(), &request))
            })
            .collect();
        let before = daemon.status().unwrap().totals;
        wait_for("the clients stream", || {
            let totals = daemon.status()?.totals;
            (totals.accepted >= 8 && totals.tokens > before.tokens + 8).then_some(())
        });
        during();
        clients.into_iter().map(|client| client.join().unwrap().unwrap()).collect()
    })
}

fn calm(daemon: &Daemon, n_tokens: u32) -> Vec<String> {
    let ask = |number: usize| {
        let request = random_request(PROMPTS[number], number as u64, n_tokens);
        generate(&mut daemon.connect().unwrap(), &request).unwrap()
    };
    (0..8).map(ask).collect()
}

#[test]
fn a_new_split_under_load_changes_no_text() {
    let folder = Folder::new();
    folder.write("d.toml", "[split]\nworkers = 2\nthreads = 1\n");
    let daemon = Daemon::start(&folder, "-c %/d.toml");
    let expected = calm(&daemon, 150);
    let texts = answers_around(&daemon, 150, || {
        folder.write("d.toml", "[split]\nworkers = 1\nthreads = 2\n");
        folder.run("reload --socket %/bitnetd.sock").ok();
    });
    assert_eq!(texts, expected);
    wait_for_split(&daemon, 1);
    let texts = answers_around(&daemon, 150, || {
        folder.write("d.toml", "[split]\nworkers = 2\nthreads = 1\n[log]\nlevel = \"debug\"\n");
        daemon.signal(Signal::SIGHUP);
        wait_for_split(&daemon, 2);
    });
    assert_eq!(texts, expected);
    let totals = daemon.status().unwrap().totals;
    assert_eq!((totals.failed, totals.cancelled), (0, 0));
    let log = daemon.log(&folder);
    assert!(log.contains("a new configuration holds") && log.contains("job done job="), "{log}");
}

/// Two models that say different things.
fn two_models(folder: &Folder) {
    for seed in [1, 2] {
        folder.run(&format!("model synth tiny %/{seed}.gguf --seed {seed}")).ok();
    }
}

#[test]
fn a_new_model_under_load_is_for_new_jobs_only() {
    let folder = Folder::new();
    two_models(&folder);
    folder.write(
        "d.toml",
        "model.path = \"1.gguf\"\nsplit = { workers = 2, threads = 1 }\nengine.max_batch = 2\n",
    );
    let daemon = Daemon::start(&folder, "-c %/d.toml");
    // Twice as many jobs as there are places: half of them wait when the model changes.
    let first = calm(&daemon, 100);
    let mut after = Vec::new();
    let texts = answers_around(&daemon, 100, || {
        let text = fs::read_to_string(folder.path("d.toml")).unwrap();
        folder.write("d.toml", text.replace("1.gguf", "2.gguf"));
        folder.run("reload --socket %/bitnetd.sock").ok();
        after.push(generate(&mut daemon.connect().unwrap(), &random_request(PROMPTS[0], 0, 100)).unwrap());
    });
    assert_eq!(texts, first, "accepted before the change");
    wait_for_split(&daemon, 2);
    let second = calm(&daemon, 100);
    assert_eq!(after[0], second[0], "accepted after the change");
    assert_ne!(first, second, "the models say the same, and this test nothing");
}

#[test]
fn whatever_is_wrong_keeps_the_old_configuration() {
    let folder = Folder::new();
    two_models(&folder);
    let good = "model.path = \"1.gguf\"\nsplit = { workers = 2, threads = 1 }\n";
    folder.write("d.toml", good);
    let daemon = Daemon::start(&folder, "-c %/d.toml");
    let workers = daemon.workers();
    let bytes = fs::read(folder.path("2.gguf")).unwrap();
    folder.write("cut.gguf", &bytes[..bytes.len() / 2]);
    let cases = [
        ("model = \"1.gguf\"", "expected a table"),
        ("model.path = \"1.gguf\"\nsplit = { workers = 200, threads = 1 }\n", "200"),
        ("model.path = \"none.gguf\"\nsplit = { workers = 1, threads = 1 }\n", "none.gguf"),
        ("model.path = \"cut.gguf\"\nsplit = { workers = 1, threads = 1 }\n", "cut.gguf"),
        (
            "listen.max_connections = 7\nlog.format = \"json\"\n",
            "`listen.max_connections`, `log.format` cannot change",
        ),
    ];
    // What the log says of each; problems are on lines of their own.
    let refusals = || -> Vec<String> {
        let log = daemon.log(&folder);
        log.split("not reloaded, the old configuration stays").skip(1).map(str::to_owned).collect()
    };
    let n_cases = cases.len();
    for (idx, (text, part)) in cases.into_iter().enumerate() {
        folder.write("d.toml", text);
        let refused = folder.run("reload --socket %/bitnetd.sock");
        assert!(
            refused.code.is_some_and(|code| code > 0) && refused.stderr.contains(part),
            "{text}\n{refused:?}"
        );
        // Whoever reads the log later sees it once.
        let logged = wait_for("the log says it", || Some(refusals()).filter(|lines| lines.len() > idx));
        assert!(logged.len() == idx + 1 && logged[idx].contains(part), "{part}: {logged:?}");
    }
    // By signal nobody waits for the answer; the log has it.
    daemon.signal(Signal::SIGHUP);
    wait_for("the log says it", || (refusals().len() == n_cases + 1).then_some(()));
    assert_eq!(daemon.workers(), workers, "a worker was touched");
    folder.write("d.toml", good.replace("1.gguf", "2.gguf"));
    folder.run("reload --socket %/bitnetd.sock").ok();
    wait_for_split(&daemon, 2);
    assert_ne!(daemon.workers(), workers);
}

#[test]
fn reloads_that_come_together_take_turns() {
    let folder = Folder::new();
    folder.write("d.toml", "[split]\nworkers = 2\nthreads = 1\n");
    let daemon = Daemon::start(&folder, "-c %/d.toml");
    folder.write("d.toml", "[split]\nworkers = 1\nthreads = 2\n");
    thread::scope(|scope| {
        let (daemon, ask) = (&daemon, || daemon.connect().unwrap().reload());
        let asked: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        daemon.signal(Signal::SIGHUP);
        for reload in asked {
            // One comes to hold; the others find it holding, or its workers still on their way.
            let outcome = reload.join().unwrap();
            let error = outcome.as_ref().err().and_then(ClientError::wire);
            assert!(outcome.is_ok() || error.is_some_and(|error| error.code.is_retryable()), "{outcome:?}");
        }
    });
    wait_for_split(&daemon, 1);
}
