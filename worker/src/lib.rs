//! The worker process: one model, one set of CPUs, one link to the supervisor.
//!
//! It inherits everything it needs (the link, the model image and the memory of its head as open files, its CPU
//! affinity and memory policy from before `exec`), says [`FromWorker::Ready`] when it can take jobs, and serves until the link closes or it is
//! told to drain. It opens no file and no socket of its own.
//!
//! Threads: the main thread is compute thread 0 and runs the step loop; a reader thread turns frames into commands.
//! Events are written by the step loop itself: the supervisor always reads.

mod budget; // Whether it fits in memory.
mod inherited; // The open files that come with the process.
mod job; // Between the wire's words and the engine's.
mod kept_image; // What an earlier process left on disk, read back.
mod link; // Frames in, frames out.
mod locked_memory; // What stays in memory, whatever else wants it.
mod node_copy; // A copy of the model in the memory of a node.
mod own_memory; // What the kernel counts of us, and tells nobody else.
pub mod sandbox; // What the process gives up, in two steps.
mod shared_image; // What decoding reads: made by the first worker, mapped by all.
mod startup; // From a handshake to an engine.
mod step_loop; // Commands in, steps, events out.

use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::worker_link::FromWorker;

use crate::inherited::Inherited;
use crate::link::Link;
use crate::own_memory::OwnMemory;
use crate::sandbox::Sandbox;
use crate::startup::{Memories, StartError, Started};
use crate::step_loop::StepLoop;

/// Runs a worker to its end. For tests: with `hang_after` its step loop hangs when it has generated so many tokens.
#[must_use]
pub fn run(hang_after: Option<u64>) -> ExitCode {
    let Inherited { link, image, head, copy, kept, last_words } = match inherited::take() {
        Ok(inherited) => inherited,
        Err(error) => {
            tracing::error!(%error, "this is an internal command of bitnetd; it is started by the supervisor only");
            return ExitCode::Usage;
        }
    };
    let mut link = Link::new(link);
    let started = startup::handshake(&mut link).and_then(|setup| {
        let own_memory = OwnMemory::open();
        // Nothing of the model is read before this, and there is no second thread yet.
        let sandbox = Sandbox::enter(&setup.confinement, last_words)?;
        let started = startup::start(&setup, Memories { image, copy, head, kept })?;
        let commands = link.commands(own_memory).map_err(StartError::Reader)?;
        // Every thread is there, everything is mapped: no prompt was seen yet.
        // The fast image is made beside the jobs; there is no other file to write to.
        let confinement = sandbox.close(started.fast_image.n_bytes())?;
        startup::say_ready(&started, confinement, &mut link)?;
        Ok((started, commands))
    });
    match started {
        Ok((Started { engine, template, fast_image, .. }, commands)) => {
            StepLoop::new(engine, template, fast_image, link, hang_after).run(&commands)
        }
        // The supervisor went away before it had said anything: nobody is there to be told.
        Err(StartError::LinkClosed) => ExitCode::Ok,
        Err(error) => {
            let exit_code = error.exit_code();
            let wire = error.to_wire();
            tracing::error!(error = %wire.message, "cannot start");
            // If the link is gone too, the exit code still tells.
            if let Err(error) = link.send(&FromWorker::StartFailed { error: wire, exit_code }) {
                tracing::debug!(%error, "nobody is listening");
            }
            exit_code
        }
    }
}
