//! Commands in, steps, events out: what a worker does all day.
//!
//! Between two steps every command that has come is carried out, so a cancel or a ping waits for one step at most;
//! with no sequence on board the loop sleeps until a command comes.

use std::sync::mpsc::{Receiver, TryRecvError};

use bitnetd_engine::chat::{ChatError, ChatTemplate};
use bitnetd_engine::{Engine, StepEvents};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::frame::FrameError;
use bitnetd_proto::worker_link::{FromWorker, ToWorker, WorkerLoad};

use crate::job;
use crate::link::{Command, Link};

/// The loop and what it works with.
pub(crate) struct StepLoop {
    engine: Engine,
    template: Result<Option<ChatTemplate>, ChatError>,
    link: Link,
    is_draining: bool,
    /// For tests of the watchdog.
    hang_after: Option<u64>,
}

/// Whether to go on.
enum Next {
    Continue,
    Exit(ExitCode),
}

impl StepLoop {
    pub(crate) fn new(
        engine: Engine,
        template: Result<Option<ChatTemplate>, ChatError>,
        link: Link,
        hang_after: Option<u64>,
    ) -> Self {
        Self { engine, template, link, is_draining: false, hang_after }
    }

    /// Serves until the link closes or a drain is done.
    pub(crate) fn run(mut self, commands: &Receiver<Command>) -> ExitCode {
        match self.serve(commands) {
            Ok(exit_code) => exit_code,
            // The supervisor is gone: whatever was on board goes on in the workers of the next one.
            Err(error) => {
                tracing::debug!(%error, "the link broke");
                ExitCode::Ok
            }
        }
    }

    fn serve(&mut self, commands: &Receiver<Command>) -> Result<ExitCode, FrameError> {
        let mut events = StepEvents::new();
        loop {
            if let Next::Exit(exit_code) = self.take_commands(commands)? {
                return Ok(exit_code);
            }
            if self.engine.is_idle() {
                if self.is_draining {
                    return Ok(ExitCode::Ok);
                }
                continue;
            }
            self.engine.step(&mut events);
            self.report(&mut events)?;
            while self.hang_after.is_some_and(|n_tokens| self.engine.stats().decode_tokens >= n_tokens) {
                std::hint::spin_loop();
            }
        }
    }

    /// Carries out every command that is there; waits for one if there is nothing else to do.
    fn take_commands(&mut self, commands: &Receiver<Command>) -> Result<Next, FrameError> {
        loop {
            let command = if self.engine.is_idle() && !self.is_draining {
                commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                commands.try_recv()
            };
            match command {
                Ok(Command::Message(message)) => self.obey(*message)?,
                Err(TryRecvError::Empty) => return Ok(Next::Continue),
                Ok(Command::Closed(None)) | Err(TryRecvError::Disconnected) => {
                    return Ok(Next::Exit(ExitCode::Ok));
                }
                Ok(Command::Closed(Some(error))) => {
                    tracing::error!(%error, "the supervisor sent something that is no message");
                    return Ok(Next::Exit(ExitCode::Software));
                }
            }
        }
    }

    fn obey(&mut self, message: ToWorker) -> Result<(), FrameError> {
        match message {
            ToWorker::Job { job, request, resume } => {
                let taken = job::to_sequence(*request, resume, self.engine.tokenizer(), &self.template)
                    .and_then(|sequence| {
                        self.engine.submit(job, sequence).map_err(|error| job::to_error(&error))
                    });
                if let Err(error) = taken {
                    self.link.send(&FromWorker::Failed { job, error })?;
                }
            }
            ToWorker::Cancel { job } => {
                let was_on_board = self.engine.cancel(job);
                tracing::debug!(job, was_on_board, "cancelled");
            }
            ToWorker::Ping { seq } => self.link.send(&FromWorker::Pong { seq, load: self.load() })?,
            ToWorker::Drain => self.is_draining = true,
            ToWorker::Hello { .. } => tracing::warn!("a second handshake is ignored"),
        }
        Ok(())
    }

    fn report(&mut self, events: &mut StepEvents) -> Result<(), FrameError> {
        for (event, text) in events.drain() {
            let message = job::to_message(event, text, self.engine.tokenizer());
            self.link.queue(&message)?;
        }
        self.link.flush()
    }

    fn load(&self) -> WorkerLoad {
        let stats = self.engine.stats();
        WorkerLoad {
            steps: stats.steps,
            sequences: u32::try_from(self.engine.n_sequences()).unwrap_or(u32::MAX),
            prefill_tokens: stats.prefill_tokens,
            decode_tokens: stats.decode_tokens,
            prefill_s: stats.prefill.as_secs_f64(),
            decode_s: stats.decode.as_secs_f64(),
            kv_tokens: self.engine.n_kv_tokens() as u64,
            kv_tokens_max: self.engine.kv().shape().n_tokens() as u64,
            cached_tokens: stats.cached_tokens,
            guessed_tokens: stats.guessed_tokens,
            right_guesses: stats.right_guesses,
        }
    }
}
