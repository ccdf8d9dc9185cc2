//! The journal of systemd, in its own protocol: each event is an entry with its fields.
//!
//! Not the crate `tracing-journald`, because its socket waits: a journal that hangs (a full disk, a stopped process) would
//! hang the supervisor, which waits for nobody. Here an entry that finds no room is counted, and the count is told when
//! there is room again. One that cannot be sent at all goes to stderr.

use std::fmt::Debug;
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Of the value of a field, this much is sent. With the 32 fields that an event may have, an entry fits in one message.
const VALUE_BYTES_MAX: usize = 4 << 10;

/// What entries are known by, as `journalctl -t` selects them.
const IDENTIFIER: &str = "bitnetd";

/// Sends events to the journal.
#[derive(Debug)]
pub(crate) struct JournalLayer {
    socket: UnixDatagram,
    path: PathBuf,
    /// Entries that found no room since the last one that did.
    n_lost: AtomicU64,
}

impl JournalLayer {
    /// Makes sure that somebody listens at `path`.
    pub(crate) fn connect(path: &Path) -> io::Result<Self> {
        UnixDatagram::unbound()?.connect(path)?;
        // Not connected for good: the journal may be restarted.
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: path.to_owned(), n_lost: AtomicU64::new(0) })
    }

    fn send(&self, entry: &Entry) {
        let n_lost = self.n_lost.swap(0, Ordering::Relaxed);
        if n_lost > 0 {
            let mut lost = Entry::new(&Level::WARN);
            lost.put("MESSAGE", &format!("{n_lost} entries are missing: the journal took no more"));
            lost.put("N_LOST", &n_lost.to_string());
            if self.socket.send_to(&lost.bytes, &self.path).is_err() {
                self.n_lost.fetch_add(n_lost, Ordering::Relaxed);
            }
        }
        match self.socket.send_to(&entry.bytes, &self.path) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.n_lost.fetch_add(1, Ordering::Relaxed);
            }
            // Nobody is left to be told if this fails, too.
            Err(error) => drop(writeln!(io::stderr(), "{} (not in the journal: {error})", entry.message())),
        }
    }
}

impl<S: Subscriber> Layer<S> for JournalLayer {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let mut entry = Entry::new(event.metadata().level());
        entry.put_origin(event.metadata());
        event.record(&mut entry);
        entry.end();
        self.send(&entry);
    }
}

/// One entry, as it goes over the socket.
#[derive(Debug, Default)]
struct Entry {
    bytes: Vec<u8>,
    message: String,
    /// The other fields in words, for who reads the message alone.
    words: String,
}

impl Entry {
    fn new(level: &Level) -> Self {
        let mut entry = Self::default();
        let priority = match *level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            _ => "7",
        };
        entry.put("PRIORITY", priority);
        entry.put("SYSLOG_IDENTIFIER", IDENTIFIER);
        entry
    }

    fn put_origin(&mut self, metadata: &Metadata<'_>) {
        self.put("TARGET", metadata.target());
        if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
            self.put("CODE_FILE", file);
            self.put("CODE_LINE", &line.to_string());
        }
    }

    /// What a person reads: the message, and the fields after it.
    fn message(&self) -> String {
        format!("{}{}", self.message, self.words)
    }

    fn end(&mut self) {
        let message = self.message();
        self.put("MESSAGE", &message);
    }

    /// Adds a field. A value of several lines is told by its length, others by their end.
    fn put(&mut self, name: &str, value: &str) {
        let value = &value[..value.floor_char_boundary(VALUE_BYTES_MAX)];
        self.bytes.extend_from_slice(name.as_bytes());
        if value.contains('\n') {
            self.bytes.push(b'\n');
            self.bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            self.bytes.push(b'=');
        }
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(b'\n');
    }

    fn record(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
            return;
        }
        self.put(&name_of(field.name()), value);
        self.words.push_str(&format!(" {}={value}", field.name()));
    }
}

/// The journal's names are capital letters, digits and underscores. Those of our events are few, and none is a name that
/// the journal gives a meaning to.
fn name_of(field: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    field.trim_start_matches(|c: char| !c.is_ascii_alphabetic()).chars().map(allowed).collect()
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn entry(message: &str) -> Entry {
        let mut entry = Entry::new(&Level::INFO);
        entry.put("MESSAGE", message);
        entry
    }

    #[test]
    fn values_are_told_by_their_end_or_their_length_and_cut() {
        let mut entry = Entry::default();
        entry.put("A", "one");
        entry.put("B", "t\nwo");
        assert_eq!(entry.bytes, b"A=one\nB\n\x04\0\0\0\0\0\0\0t\nwo\n");
        let mut entry = Entry::default();
        entry.put("A", &"é".repeat(VALUE_BYTES_MAX));
        assert_eq!(entry.bytes.len(), "A=\n".len() + VALUE_BYTES_MAX);
        let mut entry = Entry::default();
        entry.put("A", &format!("x{}", "é".repeat(VALUE_BYTES_MAX)));
        assert_eq!(entry.bytes.len(), "A=\n".len() + VALUE_BYTES_MAX - 1);
    }

    #[test]
    fn names_are_the_journals() {
        for (field, name) in [("job", "JOB"), ("load_s", "LOAD_S"), ("_pid", "PID"), ("a.b-c", "A_B_C")] {
            assert_eq!(name_of(field), name);
        }
    }

    #[test]
    fn a_journal_that_takes_no_more_holds_nobody_and_hears_of_it_later() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        assert_eq!(JournalLayer::connect(&path).unwrap_err().kind(), ErrorKind::NotFound);
        let journal = UnixDatagram::bind(&path).unwrap();
        let layer = JournalLayer::connect(&path).unwrap();
        let mut n_sent = 0;
        while layer.n_lost.load(Ordering::Relaxed) < 3 {
            assert!(n_sent < 1_000_000, "there is room for {n_sent} entries that nobody reads");
            layer.send(&entry("one of many"));
            n_sent += 1;
        }
        let n_lost = layer.n_lost.load(Ordering::Relaxed);
        journal.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let hear = || {
            let mut bytes = [0; 1024];
            let n_bytes = journal.recv(&mut bytes).ok()?;
            Some(String::from_utf8(bytes[..n_bytes].to_vec()).unwrap())
        };
        while hear().is_some() {}
        layer.send(&entry("again"));
        let lost = format!(
            "PRIORITY=4\nSYSLOG_IDENTIFIER=bitnetd\nMESSAGE={n_lost} entries are missing: the journal took no more\nN_LOST={n_lost}\n"
        );
        assert_eq!(hear(), Some(lost));
        assert_eq!(hear().as_deref(), Some("PRIORITY=6\nSYSLOG_IDENTIFIER=bitnetd\nMESSAGE=again\n"));
        assert_eq!(layer.n_lost.load(Ordering::Relaxed), 0);
    }
}
