//! The task of one worker process: its frames become events, its orders become frames, its log ours, its end is reaped.
//!
//! The last event it sends for its generation is `WorkerExited`, after everything the worker wrote before it died.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bitnetd_proto::frame::FrameDecoder;
use bitnetd_proto::worker_link::FromWorker;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::child::{Child, ProcessGroup};
use crate::state::{Event, Generation, SlotId, WorkerSaid, slot_number};
use crate::worker_log;

/// Orders that wait for a worker to read them, at most. It reads all the time; more than this means that it hangs.
const OUTBOX_FRAMES_MAX: usize = 1024;
/// A closed link is nearly always followed by the exit that explains it.
const EXIT_GRACE: Duration = Duration::from_secs(1);

/// The event loop's end of a worker.
#[derive(Debug)]
pub(crate) struct WorkerLink {
    pub(crate) generation: Generation,
    pub(crate) group: Arc<ProcessGroup>,
    /// Frames for the worker; the other end is the task that writes them.
    pub(crate) outbox: mpsc::Sender<Vec<u8>>,
}

impl WorkerLink {
    /// Starts the task.
    pub(crate) fn start(
        slot: SlotId,
        generation: Generation,
        child: Child,
        stream: UnixStream,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let (outbox, frames) = mpsc::channel(OUTBOX_FRAMES_MAX);
        let group = child.group();
        tokio::spawn(run(slot, generation, child, stream, frames, events));
        Self { generation, group, outbox }
    }
}

async fn run(
    slot: SlotId,
    generation: Generation,
    mut child: Child,
    stream: UnixStream,
    frames: mpsc::Receiver<Vec<u8>>,
    events: mpsc::Sender<Event>,
) {
    let stderr = child.take_stderr();
    let log = stderr.map(|stderr| tokio::spawn(worker_log::follow(slot_number(slot), child.pid(), stderr)));
    let (reader, writer) = stream.into_split();
    let mut reading = pin!(read(slot, generation, reader, events.clone()));
    let mut writing = pin!(write(writer, frames));
    let (mut is_reading, mut is_writing) = (true, true);
    let exit = loop {
        tokio::select! {
            exit = child.wait() => break exit,
            reason = &mut reading, if is_reading => {
                is_reading = false;
                if let Ok(exit) = timeout(EXIT_GRACE, child.wait()).await {
                    break exit;
                }
                report(&events, Event::LinkBroke { slot, generation, reason }).await;
            }
            () = &mut writing, if is_writing => is_writing = false,
        }
    };
    if is_reading {
        // What it wrote before it died counts. A grandchild that holds the link open must not hold us.
        let _rest = timeout(EXIT_GRACE, reading).await;
    }
    if let Some(mut log) = log {
        // The log says why before it says that.
        if timeout(EXIT_GRACE, &mut log).await.is_err() {
            log.abort();
        }
    }
    report(&events, Event::WorkerExited { slot, generation, exit }).await;
}

/// If the event loop is gone, nobody needs to know any more.
async fn report(events: &mpsc::Sender<Event>, event: Event) {
    let _gone = events.send(event).await;
}

/// Reads until the link ends or breaks; gives the reason.
async fn read(
    slot: SlotId,
    generation: Generation,
    mut reader: OwnedReadHalf,
    events: mpsc::Sender<Event>,
) -> String {
    let mut decoder = FrameDecoder::default();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let bytes = match reader.read(&mut buffer).await {
            Ok(0) => return "it closed its link".into(),
            Ok(n) => &buffer[..n],
            Err(error) => return format!("its link failed: {error}"),
        };
        decoder.push(bytes);
        loop {
            match decoder.next_message::<FromWorker>() {
                Ok(Some(message)) => {
                    let event = Event::WorkerSpoke { slot, generation, message: heard(message) };
                    report(&events, event).await;
                }
                Ok(None) => break,
                Err(error) => {
                    // A peer that writes garbage will not exit by itself: say so at once.
                    let reason = format!("its link carries garbage: {error}");
                    report(&events, Event::LinkBroke { slot, generation, reason: reason.clone() }).await;
                    return reason;
                }
            }
        }
    }
}

fn heard(message: FromWorker) -> WorkerSaid {
    match message {
        FromWorker::Ready { version, model, load_s, confinement } => {
            WorkerSaid::Ready { version, model, load_s, confinement }
        }
        FromWorker::StartFailed { error, exit_code } => WorkerSaid::StartFailed { error, exit_code },
        FromWorker::Token { job, token } => WorkerSaid::Token { job, token },
        FromWorker::Done { job, done } => WorkerSaid::Done { job, done },
        FromWorker::Failed { job, error } => WorkerSaid::Failed { job, error },
        FromWorker::Pong { seq, load } => WorkerSaid::Pong { seq, load },
    }
}

/// Writes until there is nothing more to say or the link is gone (which `read` notices too).
async fn write(mut writer: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        if writer.write_all(&frame).await.is_err() {
            return;
        }
    }
}
