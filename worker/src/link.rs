//! Frames in, frames out: the worker's end of the socket to the supervisor.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bitnetd_proto::frame::{FrameError, encode_frame, read_frame};
use bitnetd_proto::worker_link::{FromWorker, ToWorker, WorkerMemory};

use crate::own_memory::OwnMemory;

/// Messages that may wait between the reader and the step loop. Past that the socket fills up, which is the
/// supervisor's to notice: it never gives a worker more jobs than fit.
const COMMANDS_MAX: usize = 256;

/// The link, before and while serving.
#[derive(Debug)]
pub(crate) struct Link {
    stream: UnixStream,
    outgoing: Vec<u8>, // Whole frames that wait for the next flush.
}

/// What the reader thread has for the step loop.
#[derive(Debug)]
pub(crate) enum Command {
    /// The supervisor says something.
    Message(Box<ToWorker>),
    /// What the process has in memory now.
    Memory(WorkerMemory),
    /// The supervisor is gone, or talks nonsense; there is no reason to go on.
    Closed(Option<FrameError>),
}

impl Link {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, outgoing: Vec::new() }
    }

    /// Waits for one message; `None` at a clean end.
    pub(crate) fn receive(&mut self) -> Result<Option<ToWorker>, FrameError> {
        read_frame(&self.stream)
    }

    /// Sends a message now.
    pub(crate) fn send(&mut self, message: &FromWorker) -> Result<(), FrameError> {
        self.queue(message)?;
        self.flush()
    }

    /// Adds a message to those that the next [`Link::flush`] sends together.
    pub(crate) fn queue(&mut self, message: &FromWorker) -> Result<(), FrameError> {
        self.outgoing.extend(encode_frame(message)?);
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), FrameError> {
        self.stream.write_all(&self.outgoing).map_err(FrameError::Io)?;
        self.outgoing.clear();
        Ok(())
    }

    /// Starts the reader thread, and waits until it has set itself up. It ends with the link. With a ping comes, now and
    /// then, what the process has in memory.
    pub(crate) fn commands(&self, own_memory: OwnMemory) -> io::Result<Receiver<Command>> {
        let stream = self.stream.try_clone()?;
        let (sender, receiver) = sync_channel(COMMANDS_MAX);
        // A thread that is still being made needs system calls that the sandbox is about to forbid.
        let (started, is_started) = sync_channel(1);
        let body = move || {
            // The one who started it waits.
            let _heard = started.send(());
            read_all(stream, own_memory, &sender);
        };
        std::thread::Builder::new().name("bnd-link".into()).spawn(body)?;
        // It can only fail if the thread died, which the step loop will see.
        let _started = is_started.recv();
        Ok(receiver)
    }
}

fn read_all(stream: UnixStream, mut own_memory: OwnMemory, commands: &SyncSender<Command>) {
    loop {
        let command = match read_frame(&stream) {
            Ok(Some(message)) => Command::Message(Box::new(message)),
            Ok(None) => Command::Closed(None),
            Err(error) => Command::Closed(Some(error)),
        };
        let is_last = matches!(command, Command::Closed(_));
        let is_ping =
            matches!(&command, Command::Message(message) if matches!(**message, ToWorker::Ping { .. }));
        // The other end of the channel goes away only when the process ends.
        if commands.send(command).is_err() || is_last {
            return;
        }
        if is_ping
            && let Some(memory) = own_memory.read_if_due()
            && commands.send(Command::Memory(memory)).is_err()
        {
            return;
        }
    }
}
