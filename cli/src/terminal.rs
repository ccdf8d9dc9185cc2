//! Everything that is written to stdout and stderr. A closed pipe is never an error.

use std::io::{self, Write as _};

use bitnetd_proto::limits::MAX_TOKENS_MAX;
use indicatif::ProgressBar;
use tokio::sync::{mpsc, oneshot};

use crate::error::CliError;

/// Says a line to the user, on stderr.
pub(crate) fn say(line: &str) {
    ignore_closed(writeln!(io::stderr().lock(), "{line}"));
}

/// Shows the prompt in front of its continuation, for a person who sees stdout and stderr on one screen.
pub(crate) fn echo_prompt(prompt: &str) {
    let mut stderr = io::stderr().lock();
    ignore_closed(write!(stderr, "{prompt}").and_then(|()| stderr.flush()));
}

/// Writes data to stdout, whole, and flushes it.
pub(crate) fn put(data: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(data).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => CliError::reader_gone(),
        _ => CliError::os("write to stdout", error),
    })
}

/// Rows in columns as wide as their widest cell; some columns may be left out.
pub(crate) fn columns<const N: usize>(rows: &[[String; N]], is_hidden: impl Fn(usize) -> bool) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let shown: Vec<(usize, usize)> =
        (0..N).filter(|column| !is_hidden(*column)).map(|column| (column, width(column))).collect();
    let mut text = String::new();
    for row in rows {
        let cells = shown.iter().map(|(column, width)| format!("{:<width$}", row[*column]));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Writes to stdout from a thread of its own, in order.
///
/// A reader that is slow (a pager) then holds back only its own stream, not the supervision of workers that runs on
/// the main thread.
#[derive(Debug)]
pub(crate) struct Printer {
    texts: mpsc::Sender<String>,
    outcome: oneshot::Receiver<Result<(), CliError>>,
}

/// Pieces of text that may wait for a slow reader: an answer fits, so that a pager never holds up a job.
const PRINTER_QUEUE_LEN_MAX: usize = MAX_TOKENS_MAX as usize;

impl Printer {
    /// Starts the thread; a progress bar is taken off the screen for each write.
    pub(crate) fn start(bar: ProgressBar) -> Result<Self, CliError> {
        let (texts, mut queue) = mpsc::channel::<String>(PRINTER_QUEUE_LEN_MAX);
        let (tell, outcome) = oneshot::channel();
        let print_all = move || {
            let mut result = Ok(());
            while let (Ok(()), Some(text)) = (&result, queue.blocking_recv()) {
                result = bar.suspend(|| put(text.as_bytes()));
            }
            drop(queue); // From here on `put` fails.
            drop(tell.send(result));
        };
        std::thread::Builder::new()
            .name("stdout".into())
            .spawn(print_all)
            .map_err(|error| CliError::os("start a thread", error))?;
        Ok(Self { texts, outcome })
    }

    /// Hands a text over; waits while too many are waiting. Fails if stdout is closed: `finish` tells why.
    pub(crate) async fn put(&self, text: String) -> Result<(), CliError> {
        self.texts.send(text).await.map_err(|_| CliError::reader_gone())
    }

    /// Waits until everything is written.
    pub(crate) async fn finish(self) -> Result<(), CliError> {
        drop(self.texts);
        self.outcome.await.unwrap_or_else(|_| Err(CliError::reader_gone()))
    }
}

/// Drops the result of a write whose failure nobody can be told about.
pub(crate) fn ignore_closed(result: io::Result<()>) {
    drop(result);
}
