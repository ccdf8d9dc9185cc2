//! What the journal of systemd hears from the real binary. A stand-in takes the entries; the real one is in
//! `tests/guest/systemd.sh`.

use std::collections::HashMap;
use std::fs;
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::{Receiver, channel};

use nix::sys::signal::Signal;

use crate::support::{DEADLINE, Daemon, Folder, generate, random_request, send, wait_for};

/// Listens where the journal would, all the time: an entry that finds no room is not sent again.
struct Journal {
    socket: UnixDatagram,
    entries: Receiver<Entry>,
}

type Entry = HashMap<String, String>;

impl Journal {
    fn new(folder: &Folder) -> Self {
        let socket = UnixDatagram::bind(folder.path("journal")).unwrap();
        let (sender, entries) = channel();
        let listening = socket.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 20];
            while let Ok(n @ 1..) = listening.recv(&mut bytes)
                && sender.send(read(&bytes[..n])).is_ok()
            {}
        });
        Self { socket, entries }
    }

    /// The next entry.
    #[track_caller]
    fn hear(&self) -> Entry {
        self.entries.recv_timeout(DEADLINE).expect("the daemon says something in time")
    }

    /// The next entry with such a message.
    #[track_caller]
    fn hear_of(&self, beginning: &str) -> Entry {
        loop {
            let entry = self.hear();
            if entry["MESSAGE"].starts_with(beginning) {
                return entry;
            }
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _ended = self.socket.shutdown(Shutdown::Both);
    }
}

/// Takes an entry apart, as the journal does.
fn read(mut bytes: &[u8]) -> Entry {
    let mut entry = Entry::new();
    while !bytes.is_empty() {
        let end = bytes.iter().position(|byte| *byte == b'\n').expect("each field ends");
        let line = std::str::from_utf8(&bytes[..end]).unwrap();
        bytes = &bytes[end + 1..];
        let (name, value) = line.split_once('=').unwrap_or_else(|| {
            let (length, rest) = bytes.split_at(8);
            let length = usize::try_from(u64::from_le_bytes(length.try_into().unwrap())).unwrap();
            assert_eq!(rest[length], b'\n');
            bytes = &rest[length + 1..];
            (line, std::str::from_utf8(&rest[..length]).unwrap())
        });
        assert!(name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'), "{name}");
        assert_eq!(entry.insert(name.into(), value.into()), None, "{name} comes twice");
    }
    entry
}

#[track_caller]
fn assert_has(entry: &Entry, fields: &[(&str, &str)]) {
    for (name, value) in fields {
        assert_eq!(entry.get(*name).map(String::as_str), Some(*value), "{name} of {entry:?}");
    }
}

fn start(folder: &Folder, log: &str) -> Daemon {
    folder.write(
        "b.toml",
        format!("[split]\nworkers = 2\nthreads = 1\n[log]\njournal_socket = \"journal\"\n{log}\n"),
    );
    Daemon::start(folder, "-c b.toml")
}

#[test]
fn entries_have_the_fields_of_events_from_the_supervisor_and_its_workers() {
    let folder = Folder::new();
    let journal = Journal::new(&folder);
    let daemon = start(&folder, "format = \"journald\"\nlevel = \"debug\"");
    let mut entries = Vec::new();
    while entries.iter().filter(|entry: &&Entry| entry["MESSAGE"].starts_with("worker ready")).count() < 2 {
        entries.push(journal.hear());
    }
    let with =
        |message: &'static str| entries.iter().filter(move |entry| entry["MESSAGE"].starts_with(message));
    for entry in &entries {
        assert_has(entry, &[("SYSLOG_IDENTIFIER", "bitnetd")]);
        assert!(["3", "4", "6", "7"].contains(&entry["PRIORITY"].as_str()), "{entry:?}");
        assert!(entry.contains_key("CODE_FILE") && entry.contains_key("TARGET"), "{entry:?}");
    }
    let report = daemon.status().unwrap();
    for slot in &report.slots {
        let (number, pid) = (slot.slot.to_string(), slot.pid.unwrap().to_string());
        let of_slot = [("SLOT", number.as_str()), ("PID", pid.as_str()), ("PRIORITY", "6")];
        let ready = with("worker ready").find(|entry| entry["SLOT"] == number).expect("ready");
        assert_has(ready, &of_slot);
        assert_eq!(ready["TARGET"], "bitnetd_supervisor::log");
        // A worker has no socket: the supervisor tells what it says.
        let loaded = with("loaded ").find(|entry| entry["SLOT"] == number).expect("a worker's own words");
        assert_has(loaded, &of_slot);
        assert_has(loaded, &[("TARGET", "bitnetd_worker")]);
        assert!(loaded["MESSAGE"].contains(" isa="), "{loaded:?}");
    }

    generate(&mut daemon.connect().unwrap(), &random_request("Once", 1, 5)).unwrap();
    let given = journal.hear_of("job given to a worker");
    assert_has(&given, &[("PRIORITY", "7"), ("TARGET", "bitnetd_supervisor::log")]);
    assert_has(&journal.hear_of("job done"), &[("JOB", &given["JOB"]), ("N_TOKENS", "5")]);
    let (victim, slot) = (report.slots[1].pid.unwrap(), report.slots[1].slot.to_string());
    send(victim, Signal::SIGKILL);
    let killed = journal.hear_of("worker killed by signal 9");
    let victim = victim.to_string();
    let fields = [
        ("PRIORITY", "4"),
        ("SLOT", slot.as_str()),
        ("PID", victim.as_str()),
        ("SIGNAL", "9"),
        ("CAUSE", "signalled"),
    ];
    assert_has(&killed, &fields);
    assert_eq!(daemon.log(&folder), "", "stderr has nothing of it");
}

#[test]
fn a_journal_that_stops_listening_holds_nobody_and_may_come_back() {
    let folder = Folder::new();
    let journal = UnixDatagram::bind(folder.path("journal")).unwrap();
    let daemon = start(&folder, "format = \"journald\"\nlevel = \"trace\"");
    // Full, for nobody reads: what follows is refused a place. Jobs are done all the same.
    for seed in 0..40 {
        generate(&mut daemon.connect().unwrap(), &random_request("Once", seed, 5)).unwrap();
    }
    // Gone: stderr is told.
    drop(journal);
    fs::remove_file(folder.path("journal")).unwrap();
    generate(&mut daemon.connect().unwrap(), &random_request("Once", 1, 5)).unwrap();
    wait_for("stderr is told", || daemon.log(&folder).contains("(not in the journal: ").then_some(()));
    // Back.
    let journal = Journal::new(&folder);
    generate(&mut daemon.connect().unwrap(), &random_request("Once", 1, 5)).unwrap();
    journal.hear_of("job done");
}

#[test]
fn without_a_journal_the_log_is_text_and_says_why() {
    let folder = Folder::new();
    let daemon = start(&folder, "format = \"journald\"");
    let log = daemon.log(&folder);
    assert!(
        log.contains("WARN") && log.contains("the journal does not listen: the log is text on stderr"),
        "{log}"
    );
    assert!(log.contains(folder.path("journal").to_str().unwrap()) && log.contains("worker ready"), "{log}");
}

#[test]
fn auto_is_the_journal_where_stderr_leads_to_it_and_text_elsewhere() {
    let folder = Folder::new();
    let journal = Journal::new(&folder);
    folder.write("b.toml", "[split]\nworkers = 1\nthreads = 1\n[log]\njournal_socket = \"journal\"\n");
    let serve = |stream: (u64, u64)| {
        let log = fs::File::create(folder.path("log")).unwrap();
        let mut command = folder.command("serve -c b.toml --socket %/bitnetd.sock");
        command.stderr(log).env("JOURNAL_STREAM", format!("{}:{}", stream.0, stream.1));
        Daemon::adopt(&folder, command)
    };
    fs::write(folder.path("log"), "").unwrap();
    let metadata = fs::metadata(folder.path("log")).unwrap();
    // The same file, emptied: its inode stays.
    let daemon = serve((metadata.dev(), metadata.ino()));
    journal.hear_of("worker ready");
    assert_eq!(daemon.log(&folder), "");
    let pid = daemon.workers()[0];
    let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    assert!(!environment.contains("JOURNAL_STREAM"), "a worker's stderr is no journal");
    drop(daemon);

    while journal.entries.try_recv().is_ok() {}
    let daemon = serve((metadata.dev(), metadata.ino() + 1));
    assert!(daemon.log(&folder).contains("worker ready"), "{}", daemon.log(&folder));
    assert!(journal.entries.try_recv().is_err(), "the journal heard something");
}
