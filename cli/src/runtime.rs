//! The async runtime of a command: one thread, the main one.
//!
//! It must be the main thread: a worker asks the kernel to be killed when the *thread* that started it ends.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

use crate::error::CliError;

/// Runs a future to its end on the main thread.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::os("start the event loop", error))?;
    runtime.block_on(future)
}

/// Runs a future until Ctrl-C; then it is dropped, and the outcome is [`CliError::interrupted`].
pub(crate) async fn unless_interrupted<T>(
    future: impl Future<Output = Result<T, CliError>>,
) -> Result<T, CliError> {
    let mut interrupt = Interrupt::listen()?;
    tokio::select! {
        outcome = future => outcome,
        () = interrupt.wait() => Err(CliError::interrupted()),
    }
}

/// Ctrl-C, or a polite request to stop.
#[derive(Debug)]
pub(crate) struct Interrupt {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Interrupt {
    /// Takes SIGINT and SIGTERM over from now on.
    pub(crate) fn listen() -> Result<Self, CliError> {
        let take = |kind| signal(kind).map_err(|error: io::Error| CliError::os("handle signals", error));
        Ok(Self { interrupt: take(SignalKind::interrupt())?, terminate: take(SignalKind::terminate())? })
    }

    /// Waits for the next signal.
    ///
    /// # Cancel safety
    /// A signal that arrives while nobody waits is seen by the next wait.
    pub(crate) async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
