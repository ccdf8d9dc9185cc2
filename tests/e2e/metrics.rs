//! Metrics: what `bitnetd metrics` prints and what a scraper fetches, read by a parser of the format.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use openmetrics_parser::openmetrics::parse_openmetrics;

use crate::support::{Daemon, Folder, generate, random_request, send, wait_for};

/// Every sample of a text by its whole name, labels included. Fails if it is not OpenMetrics.
#[track_caller]
fn samples(text: &str) -> BTreeMap<String, f64> {
    let exposition = parse_openmetrics(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert!(exposition.families.len() > 15, "{text}");
    for family in exposition.families.values() {
        assert!(!family.help.is_empty(), "{} says nothing", family.family_name);
    }
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let split =
        |line: &str| line.rsplit_once(' ').map(|(name, value)| (name.to_owned(), value.parse().unwrap()));
    lines.map(|line| split(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

/// The address that the daemon has logged.
fn address(daemon: &Daemon, folder: &Folder) -> String {
    wait_for("the address is in the log", || {
        let log = daemon.log(folder);
        let url =
            log.split_whitespace().find(|word| word.starts_with("http://") && word.ends_with("/metrics"))?;
        Some(url.to_owned())
    })
}

#[test]
fn a_scrape_counts_what_happened() {
    let folder = Folder::new();
    folder.write(
        "d.toml",
        "split = { workers = 2, threads = 1 }\nlisten.metrics = \"127.0.0.1:0\"\nrestart.backoff_min = \"1ms\"\n",
    );
    let daemon = Daemon::start(&folder, "-c %/d.toml");
    let url = address(&daemon, &folder);
    for seed in 0..3 {
        generate(&mut daemon.connect().unwrap(), &random_request("Once", seed, 20)).unwrap();
    }
    let refused = folder.run("generate --socket %/bitnetd.sock -p Once -n 100 --temp -1");
    assert_ne!(refused.code, Some(0));
    send(daemon.workers()[1], Signal::SIGKILL);
    wait_for("the replacement", || {
        let slots = daemon.status()?.slots;
        (slots[1].restarts == 1 && slots[1].state == "ready").then_some(())
    });
    let mut response = ureq::get(&url).call().unwrap();
    let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    let scraped = samples(&response.body_mut().read_to_string().unwrap());
    let printed = samples(&folder.run("metrics --socket %/bitnetd.sock").ok());
    for (name, expected) in [
        ("bitnetd_jobs_ended_total{outcome=\"done\"}", 3.0),
        ("bitnetd_tokens_generated_total", 60.0),
        ("bitnetd_time_to_first_token_seconds_count", 3.0),
        ("bitnetd_inter_token_seconds_count", 57.0),
        ("bitnetd_queue_wait_seconds_count", 3.0),
        ("bitnetd_worker_starts_total", 3.0),
        ("bitnetd_worker_restarts_total{cause=\"signalled\"}", 1.0),
        ("bitnetd_worker_exits_total{cause=\"signalled\"}", 1.0),
        ("bitnetd_slots{state=\"ready\"}", 2.0),
        ("bitnetd_health{state=\"ready\"}", 1.0),
        ("bitnetd_health{state=\"degraded\"}", 0.0),
        ("bitnetd_jobs_queued", 0.0),
        ("bitnetd_durable_jobs{state=\"queued\"}", 0.0),
        ("bitnetd_durable_jobs{state=\"running\"}", 0.0),
        ("bitnetd_durable_jobs{state=\"ended\"}", 0.0),
    ] {
        assert_eq!((scraped.get(name), printed.get(name)), (Some(&expected), Some(&expected)), "{name}");
    }
    let not_there = ureq::get(&url.replace("/metrics", "/")).call().unwrap_err();
    assert!(matches!(not_there, ureq::Error::StatusCode(404)), "{not_there}");
    let not_that = ureq::post(&url).send("x").unwrap_err();
    assert!(matches!(not_that, ureq::Error::StatusCode(405)), "{not_that}");
}

#[test]
fn a_slow_or_rude_scraper_disturbs_nobody() {
    let folder = Folder::new();
    folder.write("d.toml", "split = { workers = 1, threads = 1 }\nlisten.metrics = \"127.0.0.1:0\"\n");
    let mut daemon = Daemon::start(&folder, "-c %/d.toml");
    let url = address(&daemon, &folder);
    let host = url.trim_start_matches("http://").trim_end_matches("/metrics").to_owned();
    // Half a request each, as many as there are places: they are not served, and cannot hold the places for long.
    let silent: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = TcpStream::connect(&host).unwrap();
            stream.write_all(b"GET /metr").unwrap();
            stream
        })
        .collect();
    let mut huge = TcpStream::connect(&host).unwrap();
    let _closed = huge.write_all(&vec![b'x'; 1 << 20]); // It may be cut off on the way.
    let text = generate(&mut daemon.connect().unwrap(), &random_request("Once", 1, 20)).unwrap();
    assert!(!text.is_empty());
    wait_for("places are given back", || ureq::get(&url).call().ok());
    drop(silent);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log(&folder));
}

#[test]
fn metrics_on_a_unix_socket_have_its_mode() {
    let folder = Folder::new();
    folder.write(
        "d.toml",
        "split = { workers = 1, threads = 1 }\nlisten = { metrics = \"./m.sock\", mode = \"0600\" }\n",
    );
    let mut daemon = Daemon::start(&folder, "-c %/d.toml");
    let path = folder.path("m.sock");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    samples(body);
    folder.run("drain --socket %/bitnetd.sock").ok();
    assert_eq!(daemon.wait(), Some(0));
    assert!(!Path::new(&path).exists(), "the socket is still there");
}

#[test]
fn every_metric_is_documented() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    let text = folder.run("metrics --socket %/bitnetd.sock").ok();
    let names: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md")).unwrap();
    let missing: Vec<&&str> = names.iter().filter(|name| !page.contains(&format!("`{name}"))).collect();
    assert!(missing.is_empty(), "docs/metrics.md does not say what these mean: {missing:?}");
    drop(daemon);
}
