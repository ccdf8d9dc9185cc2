//! `bitnetd serve`: many clients at once, CPUs kept apart, one copy of the model, an orderly end, rude clients.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use bitnetd_config::cpu_list;
use bitnetd_proto::status::Health;
use nix::sys::signal::Signal;

use crate::support::{Daemon, Folder, PROMPTS, field, generate, is_alive, random_request, wait_for};

#[test]
fn eight_clients_are_served_at_once_and_get_what_run_gives() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let flags = "-n 48 --temp 0.8 -s 21 -q";
    let clients: Vec<_> = PROMPTS[..8]
        .iter()
        .map(|prompt| {
            let mut command = folder.command(&format!("generate --socket %/bitnetd.sock {flags}"));
            command.args(["-p", prompt]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (client, prompt) in clients.into_iter().zip(PROMPTS) {
        let answer = folder.finished(client).ok();
        assert_eq!(answer, folder.run_prompt(&format!("run {flags}"), prompt).ok(), "{prompt}");
    }
    let report = daemon.status().unwrap();
    assert_eq!((report.totals.completed, report.totals.failed), (8, 0));
    // Workers say what they did with every heartbeat. Which one had how much is a matter of who came when.
    wait_for("the workers tell what they did", || {
        let slots = daemon.status().unwrap().slots;
        let n_decoded: u64 = slots.iter().map(|slot| slot.load.decode_tokens).sum();
        (n_decoded >= report.totals.tokens).then_some(())
    });
}

#[test]
fn workers_own_disjoint_cpus_and_every_compute_thread_has_one() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let mut owned = BTreeSet::new();
    for slot in daemon.status().unwrap().slots {
        let pid = slot.pid.unwrap();
        let cpus = cpu_list::parse(&field(format!("/proc/{pid}/status"), "Cpus_allowed_list")).unwrap();
        assert_eq!(cpus, cpu_list::parse(&slot.cpus).unwrap());
        assert_eq!(cpus.len(), 1);
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        assert_eq!(name.trim_end(), format!("bnd-w{}-t0", slot.slot), "what `top` and `ps` show");
        for cpu in cpus {
            assert!(owned.insert(cpu), "CPU {cpu} belongs to two workers");
        }
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let allowed = field(task.unwrap().path().join("status"), "Cpus_allowed_list");
            assert_eq!(allowed, slot.cpus);
        }
    }
}

/// Kilobytes of one kind in the mappings of a process whose name holds `name`, as `smaps` counts them.
fn mapped_kb(pid: u32, name: &str, kind: &str) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let (mut is_ours, mut total) = (false, 0);
    for line in smaps.lines() {
        if line.split_whitespace().next().is_some_and(|word| word.contains('-') && !word.ends_with(':')) {
            is_ours = line.contains(name);
        } else if is_ours && let Some(value) = line.strip_prefix(kind).and_then(|rest| rest.strip_prefix(':'))
        {
            total += value.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    total
}

#[test]
fn every_compute_thread_has_the_priority_that_the_configuration_says() {
    let folder = Folder::new();
    folder.write(
        "bitnetd.toml",
        "[engine]\nnice = 7\nscheduler = \"batch\"\n[split]\nworkers = 1\nthreads = 2\n",
    );
    let daemon = Daemon::start(&folder, "-c bitnetd.toml");
    let pid = daemon.status().unwrap().slots[0].pid.unwrap();
    let tasks: Vec<_> =
        fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path()).collect();
    assert!(tasks.len() >= 2, "{tasks:?}");
    for task in tasks {
        // proc(5): after the name in parentheses come the state (3), and later niceness (19) and policy (41).
        let stat = fs::read_to_string(task.join("stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        assert_eq!((fields[19 - 3], fields[41 - 3]), ("7", "3"), "niceness and SCHED_BATCH in {stat}");
    }
}

#[test]
fn two_workers_share_one_copy_of_the_model() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    for prompt in PROMPTS {
        // Both have read every weight then.
        generate(&mut daemon.connect().unwrap(), &random_request(prompt, 1, 8)).unwrap();
    }
    let image_kb = daemon.status().unwrap().model.unwrap().image_bytes.div_ceil(1024);
    let workers = daemon.workers();
    let kb = |kind| workers.iter().map(|pid| mapped_kb(*pid, "bitnetd-model", kind)).collect::<Vec<_>>();
    let (resident, shares) = (kb("Rss"), kb("Pss"));
    assert!(resident.iter().all(|kb| *kb > image_kb / 4), "{resident:?} of {image_kb} kB");
    assert!(
        shares.iter().sum::<u64>() <= image_kb + 8,
        "{shares:?} of {image_kb} kB: there is more than one copy"
    );
}

/// Promise P2 with everything that decoding reads instead of the file; and the tokens are the same.
#[test]
fn the_fast_image_is_made_once_and_changes_no_token() {
    let folder = Folder::new();
    let answers = |daemon: &Daemon| {
        let requests = PROMPTS.iter().map(|prompt| random_request(prompt, 5, 40));
        requests.map(|r| generate(&mut daemon.connect().unwrap(), &r).unwrap()).collect::<Vec<_>>()
    };
    folder.write("file.toml", "[model]\nhead = \"file\"\n");
    let plain = Daemon::start(&folder, "-c file.toml --workers 1 --threads 1");
    let expected = answers(&plain);
    drop(plain);
    folder.write("fast.toml", "[model]\nhead = \"fast\"\n[engine]\nhuge_pages = \"on\"\n");
    let daemon = Daemon::start(&folder, "-c fast.toml --workers 2 --threads 1");
    let kb = |pid: &u32, kind| mapped_kb(*pid, "bitnetd-head", kind);
    wait_for("both workers have it", || {
        let has_it = |pid: &u32| !maps_writable(*pid, "bitnetd-head") && kb(pid, "Size") > 0;
        daemon.workers().iter().all(has_it).then_some(())
    });
    assert_eq!(answers(&daemon), expected);
    let workers = daemon.workers();
    let size_kb = kb(&workers[0], "Size");
    let shares: Vec<u64> = workers.iter().map(|pid| kb(pid, "Pss")).collect();
    assert!(size_kb > 100 && shares.iter().sum::<u64>() <= size_kb + 8, "{shares:?} of {size_kb} kB");
    // Who comes later finds it there.
    crate::support::send(workers[0], Signal::SIGKILL);
    wait_for("the replacement has it", || {
        let now = daemon.workers();
        let is_new = now.len() == 2 && !now.contains(&workers[0]);
        (is_new && now.iter().all(|pid| kb(pid, "Size") == size_kb)).then_some(())
    });
    assert_eq!(answers(&daemon), expected);
}

/// Whether a process maps something whose name holds `name` for writing.
fn maps_writable(pid: u32, name: &str) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines().any(|line| line.contains(name) && line.contains(" rw-s "))
}

#[test]
fn sigterm_finishes_what_was_accepted() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let workers = daemon.workers();
    let answers = std::thread::scope(|scope| {
        let clients: Vec<_> = PROMPTS
            .iter()
            .map(|prompt| {
                let mut client = daemon.connect().unwrap();
                scope.spawn(move || generate(&mut client, &random_request(prompt, 4, 100)))
            })
            .collect();
        wait_for("all jobs are accepted", || {
            daemon.status().filter(|report| report.totals.accepted == PROMPTS.len() as u64)
        });
        daemon.signal(Signal::SIGTERM);
        clients.into_iter().map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log(&folder));
    for answer in answers {
        assert!(answer.as_ref().is_ok_and(|text| !text.is_empty()), "{answer:?}");
    }
    assert!(workers.into_iter().all(|pid| !is_alive(pid)));
    assert!(!daemon.socket.exists(), "the socket is still there");
}

#[test]
fn a_second_sigterm_does_not_wait_for_jobs() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    let worker = daemon.workers()[0];
    crate::support::send(worker, Signal::SIGSTOP); // Its job cannot end.
    let mut client = daemon.connect().unwrap();
    let request = random_request("Once", 1, 100);
    let _job = client.generate(&request).unwrap();
    daemon.signal(Signal::SIGTERM);
    wait_for("it drains", || daemon.log(&folder).contains("draining").then_some(()));
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    assert!(!is_alive(worker));
}

#[test]
fn drain_and_restart_by_command() {
    let folder = Folder::new();
    let mut daemon = Daemon::start(&folder, "--workers 2 --threads 1");
    let before = daemon.workers();
    folder.run("restart 1 --socket %/bitnetd.sock").ok();
    wait_for("a new worker in slot 1", || {
        let report = daemon.status()?;
        let is_new =
            report.slots[1].pid.is_some_and(|pid| pid != before[1]) && report.slots[1].state == "ready";
        (is_new && report.slots[0].pid == Some(before[0])).then_some(())
    });
    let missing = folder.run("restart 7 --socket %/bitnetd.sock");
    assert_eq!(missing.code, Some(1), "{missing:?}");
    let table = folder.run("status --socket %/bitnetd.sock").ok();
    assert!(table.starts_with("health   ready"), "{table}");
    let json = folder.run("status --json --socket %/bitnetd.sock").json();
    assert_eq!(json["slots"].as_array().unwrap().len(), 2);
    folder.run("drain --socket %/bitnetd.sock").ok();
    assert_eq!(daemon.wait(), Some(0));
}

#[test]
fn rude_clients_disturb_nobody() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    let calm = generate(&mut daemon.connect().unwrap(), &random_request("Once", 2, 20)).unwrap();
    let rude: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        &[0xff; 64],               // A frame of four gigabytes.
        &[5, 0, 0, 0, b'{', b'"'], // Half a frame, then nothing.
        &[2, 0, 0, 0, b'{', b'}'], // No message.
        &[0, 0, 0, 0],             // An empty frame.
        b"\x04\0\0\0nullnullnull",
    ];
    for bytes in rude {
        let mut stream = UnixStream::connect(&daemon.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // It says what is wrong, or just closes; it does not hang.
        match stream.read_to_end(&mut answer) {
            Ok(_) => {
                assert!(answer.is_empty() || String::from_utf8_lossy(&answer).contains("error"), "{answer:?}")
            }
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
    }
    let again = generate(&mut daemon.connect().unwrap(), &random_request("Once", 2, 20)).unwrap();
    assert_eq!(again, calm);
    let report = daemon.status().unwrap();
    assert_eq!((report.health, report.totals.restarts), (Health::Ready, 0));
}

#[test]
fn a_client_that_goes_away_cancels_its_job() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    crate::support::send(daemon.workers()[0], Signal::SIGSTOP); // The job cannot end by itself.
    let mut client = daemon.connect().unwrap();
    std::mem::forget(client.generate(&random_request("Once", 1, 200)).unwrap()); // No polite cancel.
    drop(client);
    wait_for("the job is cancelled", || (daemon.status()?.totals.cancelled == 1).then_some(()));
}

/// The affinity masks of all threads of a process, and their names.
fn masks(pid: u32) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path());
    // A thread may end while we look.
    let status = |path: std::path::PathBuf| fs::read_to_string(path.join("status")).ok();
    let value = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap();
        line.to_owned()
    };
    tasks.filter_map(status).map(|text| (value(&text, "Name"), value(&text, "Cpus_allowed_list"))).collect()
}

#[test]
fn the_supervisor_keeps_to_reserved_cpus_and_workers_to_the_others() {
    let given = field("/proc/self/status", "Cpus_allowed_list");
    let [first, second, ..] = cpu_list::parse(&given).unwrap()[..] else {
        panic!("one CPU cannot be divided")
    };
    let folder = Folder::new();
    let configure = |reserve: &str, cpu: u32| {
        let text = format!("[affinity]\nreserve = \"{reserve}\"\n[[split.worker]]\ncpus = \"{cpu}\"\n");
        folder.write("d.toml", text);
    };
    configure(&first.to_string(), second);
    let daemon = Daemon::start(&folder, "-c %/d.toml");
    let supervisor = daemon.status().unwrap().pid;
    let check = |of_supervisor: &str, of_worker: u32| {
        wait_for("the worker moved", || {
            let slots = daemon.status()?.slots;
            (slots.len() == 1 && slots[0].cpus == of_worker.to_string()).then_some(())
        });
        // Threads that come later (a client's, the journal's) inherit it.
        generate(&mut daemon.connect().unwrap(), &random_request(PROMPTS[0], 1, 4)).unwrap();
        for (thread, mask) in masks(supervisor) {
            assert_eq!(mask, of_supervisor, "thread {thread} of the supervisor");
        }
        for (thread, mask) in daemon.workers().into_iter().flat_map(masks) {
            assert_eq!(mask, of_worker.to_string(), "thread {thread} of the worker");
        }
    };
    check(&first.to_string(), second);
    // The new plan is made from the mask that the daemon was started with, not from what it keeps to.
    configure(&second.to_string(), first);
    folder.run("reload --socket %/bitnetd.sock").ok();
    check(&second.to_string(), first);
    configure("", second);
    folder.run("reload --socket %/bitnetd.sock").ok();
    check(&given, second);
}
