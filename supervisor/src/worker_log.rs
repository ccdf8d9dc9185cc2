//! What a worker writes to its stderr, told again as ours: it has no log of its own.
//!
//! Its own lines are JSON objects; anything else comes from a runtime that panics or from the sandbox. Nothing in it is
//! believed: lines are cut, characters that a terminal would obey are replaced, slot and pid are those we know. A worker
//! that writes too fast is made to wait, by not being read.

use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::{Duration, Instant, sleep_until};

/// Of a line, this much is told.
const LINE_BYTES_MAX: usize = 8 << 10;
/// Lines of one worker in one [`WINDOW`]; the next is read when the window is over.
const LINES_IN_WINDOW_MAX: u32 = 100;
const WINDOW: Duration = Duration::from_secs(1);

/// Tells everything that the worker of a slot writes, until it is gone.
pub(crate) async fn follow(slot: u32, pid: u32, mut stderr: impl AsyncRead + Unpin) {
    let mut lines = Lines::default();
    let mut buffer = vec![0; 4 << 10];
    let (mut begun, mut n_lines, mut was_slowed) = (Instant::now(), 0, false);
    while let Ok(n_bytes @ 1..) = stderr.read(&mut buffer).await {
        for line in lines.push(&buffer[..n_bytes]) {
            if n_lines == LINES_IN_WINDOW_MAX {
                if Instant::now() < begun + WINDOW && !was_slowed {
                    was_slowed = true;
                    tracing::warn!(slot, pid, "worker writes to its log too fast, and has to wait");
                }
                sleep_until(begun + WINDOW).await;
                (begun, n_lines) = (Instant::now(), 0);
            }
            n_lines += 1;
            tell(slot, pid, &line);
        }
    }
    if let Some(rest) = lines.rest() {
        tell(slot, pid, &rest);
    }
}

/// Bytes cut into lines.
#[derive(Debug, Default)]
struct Lines {
    /// The line that has not ended yet, up to its limit.
    begun: Vec<u8>,
}

impl Lines {
    /// The lines that these bytes end.
    fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut ended = Vec::new();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, is_end) = part.strip_suffix(b"\n").map_or((part, false), |text| (text, true));
            let room = LINE_BYTES_MAX - self.begun.len();
            self.begun.extend_from_slice(&text[..text.len().min(room)]);
            if is_end {
                ended.extend(self.rest());
            }
        }
        ended
    }

    /// What has no end.
    fn rest(&mut self) -> Option<String> {
        let line = String::from_utf8_lossy(&self.begun).into_owned();
        self.begun.clear();
        (!line.is_empty()).then_some(line)
    }
}

/// A line as `tracing-subscriber` writes it.
#[derive(Debug, Deserialize)]
struct Event {
    level: String,
    fields: Map<String, Value>,
}

/// A line in our own words.
#[derive(Debug, PartialEq)]
struct Said {
    level: tracing::Level,
    job: Option<u64>,
    text: String,
}

fn read(line: &str) -> Option<Said> {
    let Event { level, mut fields } = serde_json::from_str(line).ok()?;
    let message = fields.remove("message");
    fields.remove("slot"); // We know better.
    let job = fields.remove("job").and_then(|job| job.as_u64());
    let words = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut text = message.as_ref().map(words).unwrap_or_default();
    for (name, value) in &fields {
        text.push_str(&format!(" {name}={}", words(value)));
    }
    Some(Said { level: level.parse().ok()?, job, text })
}

fn tell(slot: u32, pid: u32, line: &str) {
    let Some(Said { level, job, text }) = read(line) else {
        // A target of its own: whoever wants no log still wants to know why something died.
        tracing::warn!(target: "bitnetd_worker::stderr", slot, pid, "{}", harmless(line));
        return;
    };
    let text = harmless(&text);
    match level {
        tracing::Level::ERROR => tracing::error!(target: "bitnetd_worker", slot, pid, job, "{text}"),
        tracing::Level::WARN => tracing::warn!(target: "bitnetd_worker", slot, pid, job, "{text}"),
        tracing::Level::INFO => tracing::info!(target: "bitnetd_worker", slot, pid, job, "{text}"),
        tracing::Level::DEBUG => tracing::debug!(target: "bitnetd_worker", slot, pid, job, "{text}"),
        tracing::Level::TRACE => tracing::trace!(target: "bitnetd_worker", slot, pid, job, "{text}"),
    }
}

/// Without anything that moves a cursor or begins another line.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_put_together_and_cut() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"one\ntw"), ["one"]);
        assert_eq!(lines.push(b"o\n\n\xFFx\nrest"), ["two", "\u{FFFD}x"]);
        assert_eq!(lines.rest().as_deref(), Some("rest"));
        for n_bytes in [LINE_BYTES_MAX, LINE_BYTES_MAX + 1, 5 * LINE_BYTES_MAX] {
            let mut ended = Vec::new();
            for part in vec![b'a'; n_bytes].chunks(1000) {
                ended.extend(lines.push(part));
                assert!(lines.begun.len() <= LINE_BYTES_MAX);
            }
            ended.extend(lines.push(b"\nnext\n"));
            assert_eq!(ended, ["a".repeat(LINE_BYTES_MAX), "next".into()], "{n_bytes}");
        }
    }

    #[test]
    fn lines_of_ours_keep_level_job_and_fields() {
        let line = r#"{"level":"DEBUG","fields":{"message":"cancelled","job":7,"was_on_board":true,"slot":9,"why":"x"},"target":"bitnetd_worker::step_loop"}"#;
        let text = "cancelled was_on_board=true why=x".into();
        assert_eq!(read(line), Some(Said { level: tracing::Level::DEBUG, job: Some(7), text }));
    }

    #[test]
    fn what_is_not_ours_is_told_as_it_is_and_harmless() {
        let level = r#"{"level":"LOUD","fields":{}}"#;
        for line in
            ["thread 'main' panicked", "{", "7", "[[[[", "{\"level\":\"INFO\"}", level, &"[".repeat(5000)]
        {
            assert_eq!(read(line), None, "{line}");
        }
        assert_eq!(harmless("a\u{1B}[2Jb\rc\td"), "a\u{FFFD}[2Jb\u{FFFD}c\u{FFFD}d");
    }

    #[tokio::test]
    async fn a_flood_is_slowed_down() {
        let flood = "x\n".repeat(LINES_IN_WINDOW_MAX as usize + 1);
        let begun = Instant::now();
        follow(0, 1, flood.as_bytes()).await;
        assert!(begun.elapsed() >= WINDOW);
    }
}
