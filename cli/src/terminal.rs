//! Everything that is written to stdout and stderr. A closed pipe is never an error.

use std::io::{self, Write as _};

use crate::error::CliError;

/// Says a line to the user, on stderr.
pub(crate) fn say(line: &str) {
    ignore_closed(writeln!(io::stderr().lock(), "{line}"));
}

/// Writes data to stdout, whole, and flushes it.
pub(crate) fn put(data: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(data).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => CliError::reader_gone(),
        _ => CliError::os("write to stdout", error),
    })
}

/// Drops the result of a write whose failure nobody can be told about.
pub(crate) fn ignore_closed(result: io::Result<()>) {
    drop(result);
}
