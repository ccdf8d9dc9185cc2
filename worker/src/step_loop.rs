//! Commands in, steps, events out: what a worker does all day.
//!
//! Between two steps every command that has come is carried out, so a cancel or a ping waits for one step at most;
//! with no sequence on board the loop sleeps until a command comes.

use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use bitnetd_engine::chat::{ChatError, ChatTemplate};
use bitnetd_engine::{Engine, StepEvents};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::frame::FrameError;
use bitnetd_proto::worker_link::{FromWorker, ToWorker, WorkerLoad, WorkerMemory};

use crate::job;
use crate::link::{Command, Link};
use crate::shared_image::{Left, SharedImage};

/// How long the fast image of the model is worked on before commands are looked at again.
const IMAGE_SLICE: Duration = Duration::from_millis(5);

/// The longest slice between two steps.
const IMAGE_SLICE_MAX: Duration = Duration::from_millis(40);

/// For each step so far a slice between two steps may be so much longer: the more was asked for, the more is to come.
const IMAGE_SLICE_PER_STEP: Duration = Duration::from_micros(64);

/// How long an image is read from disk before a step: the longest time, mostly enough for all of it (0.1 s from the page cache,
/// some 0.5 s from a fast disk), is granted before the first step; then as long as the step before took, at least this.
const KEPT_SLICE: Range<Duration> = Duration::from_millis(100)..Duration::from_secs(1);

/// Steps before the fast image takes time from those to come. So many lose about what it costs to make, since each reads the weights
/// once: who stops before them has lost nothing by it, and who goes on at most twice what it costs (as with skis, rented or bought).
const IMAGE_STEPS_MIN: u64 = 96;

/// How often a worker without anything to do looks whether another one has made the fast image.
const IMAGE_PATIENCE: Duration = Duration::from_millis(20);

/// The loop and what it works with.
pub(crate) struct StepLoop {
    engine: Engine,
    template: Result<Option<ChatTemplate>, ChatError>,
    fast_image: SharedImage,
    link: Link,
    is_draining: bool,
    /// How long the last step took.
    last_step: Option<Duration>,
    memory: Option<WorkerMemory>,
    /// For tests of the watchdog.
    hang_after: Option<u64>,
}

/// How long a slice between two steps is after so many.
fn slice_after(n_steps: u64) -> Duration {
    let n_steps = u32::try_from(n_steps).unwrap_or(u32::MAX);
    (IMAGE_SLICE + IMAGE_SLICE_PER_STEP.saturating_mul(n_steps)).min(IMAGE_SLICE_MAX)
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
        fast_image: SharedImage,
        link: Link,
        hang_after: Option<u64>,
    ) -> Self {
        Self {
            engine,
            template,
            fast_image,
            link,
            is_draining: false,
            last_step: None,
            memory: None,
            hang_after,
        }
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
            if let Some(slice) = self.image_slice() {
                self.fast_image.advance(&mut self.engine, slice);
            }
            let begun = Instant::now();
            self.engine.step(&mut events);
            self.last_step = Some(begun.elapsed());
            self.report(&mut events)?;
            while self.hang_after.is_some_and(|n_tokens| self.engine.stats().decode_tokens >= n_tokens) {
                std::hint::spin_loop();
            }
        }
    }

    /// How long to work on the fast image before a step.
    fn image_slice(&self) -> Option<Duration> {
        let n_steps = self.engine.stats().steps;
        if self.fast_image.is_kept() {
            return Some(
                self.last_step.map_or(KEPT_SLICE.end, |step| step.clamp(KEPT_SLICE.start, KEPT_SLICE.end)),
            );
        }
        (n_steps >= IMAGE_STEPS_MIN).then(|| slice_after(n_steps))
    }

    /// Carries out every command that is there; waits for one if there is nothing else to do.
    fn take_commands(&mut self, commands: &Receiver<Command>) -> Result<Next, FrameError> {
        loop {
            match self.next_command(commands) {
                Ok(Command::Message(message)) => self.obey(*message)?,
                Ok(Command::Memory(memory)) => self.memory = Some(memory),
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

    /// The next command; waits for it if there is nothing else to do.
    fn next_command(&mut self, commands: &Receiver<Command>) -> Result<Command, TryRecvError> {
        let mut command = commands.try_recv();
        while matches!(command, Err(TryRecvError::Empty)) && self.engine.is_idle() && !self.is_draining {
            command = match self.fast_image.advance(&mut self.engine, IMAGE_SLICE) {
                Left::Work => commands.try_recv(),
                Left::Wait => commands.recv_timeout(IMAGE_PATIENCE).map_err(|error| match error {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                }),
                Left::Nothing => commands.recv().map_err(|_| TryRecvError::Disconnected),
            };
        }
        command
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
            image: self.fast_image.state(),
            image_bytes: self.fast_image.n_bytes(),
            step_bytes: if stats.step_bytes > 0 { stats.step_bytes } else { self.engine.cost().bytes },
            memory: self.memory,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_grow_with_what_was_asked_for_and_stay_short() {
        assert!(slice_after(IMAGE_STEPS_MIN) < Duration::from_millis(12));
        assert_eq!(slice_after(250), Duration::from_millis(21));
        assert_eq!([slice_after(1_000), slice_after(u64::MAX)], [IMAGE_SLICE_MAX; 2]);
    }
}
