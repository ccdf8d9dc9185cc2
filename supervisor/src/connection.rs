//! One client: handshake, then questions and jobs until either side is done.
//!
//! Everything about a connection is bounded: the time to its first message, the time of a frame that has begun,
//! the bytes and the events that wait for it. Whatever it sends, nobody else notices.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bitnetd_config::ListenConfig;
use bitnetd_proto::PROTOCOL_VERSION;
use bitnetd_proto::client_link::{ClientMessage, ServerMessage};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::frame::{FrameDecoder, FrameError, encode_frame};
use bitnetd_proto::handshake::check_client_hello;
use bitnetd_proto::limits::REQUEST_FRAME_BYTES_MAX;
use bitnetd_proto::request::GenerateRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use self::questions::Questions;
use crate::event_loop::{JobSink, Submission};
use crate::peer::Peer;
use crate::report::SERVER;
use crate::service::{JobEvent, Service, UNREAD_EVENTS_MAX, overrun_error};
use crate::state::{ClientId, JobId, Standing};

/// A client says hello within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A frame is complete this long after its first byte.
const FRAME_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection that is being closed has this long to take its last messages.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Beyond this many unwritten bytes nothing more is read from the client or taken from its jobs.
const OUTBOX_BYTES_MAX: usize = 256 << 10;

mod questions; // About durable jobs.

/// Why a connection ends.
enum End {
    /// The client closed it, or it broke: there is nobody to tell.
    Gone,
    /// The client is told why.
    Because(WireError),
    /// The service has stopped, and everything was said.
    Stopped,
}

/// Serves one client to its end.
pub(crate) async fn serve(stream: UnixStream, service: Service, config: &ListenConfig) {
    let peer = match Peer::of(&stream) {
        Ok(peer) => peer,
        Err(error) => {
            tracing::warn!(%error, "connection without credentials closed");
            return;
        }
    };
    let (reader, writer) = stream.into_split();
    let (events_in, events) = mpsc::channel(UNREAD_EVENTS_MAX);
    let mut connection = Connection {
        reader,
        writer,
        decoder: FrameDecoder::new(REQUEST_FRAME_BYTES_MAX),
        frame_began: None,
        outbox: Vec::new(),
        client: ClientId::Uid(peer.uid),
        jobs: HashMap::new(),
        ids: HashMap::new(),
        sink: JobSink { events: events_in, overrun: Arc::new(Notify::new()) },
        events,
        reload: None,
        questions: Questions::default(),
        service,
    };
    let end = match check_peer(&peer, config) {
        Ok(()) => connection.run(peer.pid).await,
        Err(error) => End::Because(error),
    };
    if let End::Because(error) = &end {
        tracing::info!(uid = peer.uid, pid = peer.pid, code = ?error.code, "connection closed: {error}");
    }
    connection.finish(end).await;
}

/// Tells a client that there are too many connections.
pub(crate) async fn refuse_for_number(mut stream: UnixStream, max_connections: usize) {
    let error =
        WireError::new(ErrorCode::Overloaded, format!("{max_connections} connections are open already"))
            .with_retry_after_ms(500);
    if let Ok(frame) = encode_frame(&ServerMessage::Error { id: None, error }) {
        let _late = timeout(CLOSE_TIMEOUT, stream.write_all(&frame)).await;
    }
}

/// Both lists empty: whoever the socket's mode let in. Else one of them must name the peer.
fn check_peer(peer: &Peer, config: &ListenConfig) -> Result<(), WireError> {
    let is_open = config.allow_uids.is_empty() && config.allow_gids.is_empty();
    let is_in_group = || peer.groups.iter().chain([&peer.gid]).any(|gid| config.allow_gids.contains(gid));
    if is_open || config.allow_uids.contains(&peer.uid) || is_in_group() {
        return Ok(());
    }
    let text = format!("uid {} (gid {}) may not use this socket", peer.uid, peer.gid);
    Err(WireError::new(ErrorCode::PermissionDenied, text)
        .with_hint("`listen.allow_uids` and `listen.allow_gids` say who may"))
}

struct Connection {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    decoder: FrameDecoder,
    /// When the first byte of an incomplete frame came.
    frame_began: Option<Instant>,
    /// Bytes that are still to be written.
    outbox: Vec<u8>,
    client: ClientId,
    /// Running jobs by the client's name, and the other way round.
    jobs: HashMap<u64, JobId>,
    ids: HashMap<JobId, u64>,
    sink: JobSink,
    events: mpsc::Receiver<(JobId, JobEvent)>,
    /// A reload that this client asked for and that is not decided yet.
    reload: Option<oneshot::Receiver<Result<(), WireError>>>,
    /// About durable jobs.
    questions: Questions,
    service: Service,
}

impl Connection {
    async fn run(&mut self, pid: Option<i32>) -> End {
        match timeout(HELLO_TIMEOUT, self.next_message()).await {
            Ok(Ok(message)) => match check_client_hello(message) {
                Ok(name) => tracing::debug!(client = ?self.client, pid, name, "client connected"),
                Err(error) => return End::Because(error),
            },
            Ok(Err(end)) => return end,
            Err(_) => {
                let text = format!("no `hello` within {HELLO_TIMEOUT:?}");
                return End::Because(WireError::new(ErrorCode::BadMessage, text));
            }
        }
        let pid = std::process::id();
        self.say(&ServerMessage::Welcome { version: PROTOCOL_VERSION, server: SERVER.into(), pid });
        match self.converse().await {
            Ok(()) => End::Stopped,
            Err(end) => end,
        }
    }

    /// The first message, with nothing else going on.
    async fn next_message(&mut self) -> Result<ClientMessage, End> {
        let mut buffer = vec![0; 4 << 10];
        loop {
            if let Some(message) = self.decoder.next_message().map_err(refused)? {
                return Ok(message);
            }
            let n = self.reader.read(&mut buffer).await.map_err(|_| End::Gone)?;
            if n == 0 {
                return Err(self.decoder.cut().map_or(End::Gone, refused));
            }
            self.decoder.push(&buffer[..n]);
        }
    }

    async fn converse(&mut self) -> Result<(), End> {
        let service = self.service.clone();
        let mut stopped = std::pin::pin!(service.stopped());
        let overrun = self.sink.overrun.clone();
        // Small: each of thousands of idle connections has one.
        let mut buffer = vec![0; 4 << 10];
        // What came together with `hello`.
        self.hear_all().await?;
        loop {
            let has_room = self.outbox.len() < OUTBOX_BYTES_MAX;
            let frame_ends = self.frame_began.map(|began| began + FRAME_TIMEOUT);
            tokio::select! {
                read = self.reader.read(&mut buffer), if has_room => {
                    match read {
                        Err(_) => return Err(End::Gone),
                        Ok(0) => return Err(self.decoder.cut().map_or(End::Gone, refused)),
                        Ok(n) => self.decoder.push(&buffer[..n]),
                    }
                    self.hear_all().await?;
                }
                written = self.writer.write(&self.outbox), if !self.outbox.is_empty() => {
                    let n = written.map_err(|_| End::Gone)?;
                    self.outbox.drain(..n);
                }
                event = self.events.recv(), if has_room => {
                    if let Some((job, event)) = event {
                        self.pass_on(job, event);
                    }
                }
                decided = decided(&mut self.reload) => {
                    self.reload = None;
                    self.say_outcome(decided);
                }
                Some(answer) = self.questions.next(), if has_room => self.say(&answer),
                () = overrun.notified() => return Err(End::Because(overrun_error())),
                () = sleep_until(frame_ends.unwrap_or_else(Instant::now)), if frame_ends.is_some() => {
                    let text = format!("a frame was not complete within {FRAME_TIMEOUT:?}");
                    return Err(End::Because(WireError::new(ErrorCode::BadMessage, text)));
                }
                _ = &mut stopped => return Ok(()),
            }
        }
    }

    async fn hear_all(&mut self) -> Result<(), End> {
        while let Some(message) = self.decoder.next_message().map_err(refused)? {
            self.frame_began = None;
            self.hear(message).await?;
        }
        if self.decoder.is_empty() {
            self.frame_began = None;
        } else {
            self.frame_began.get_or_insert_with(Instant::now);
        }
        Ok(())
    }

    async fn hear(&mut self, message: ClientMessage) -> Result<(), End> {
        let answer = match message {
            ClientMessage::Hello { .. } => {
                let error = WireError::new(ErrorCode::BadMessage, "`hello` is only the first message");
                return Err(End::Because(error));
            }
            ClientMessage::Generate { id, request } => {
                self.generate(id, *request).await;
                return Ok(());
            }
            ClientMessage::Cancel { id } => {
                if let Some(&job) = self.jobs.get(&id) {
                    self.service.cancel(job).await;
                }
                return Ok(());
            }
            message @ (ClientMessage::Submit { id, .. }
            | ClientMessage::Jobs { id, .. }
            | ClientMessage::Result { id, .. }
            | ClientMessage::Wait { id, .. }
            | ClientMessage::CancelJob { id, .. }) => {
                self.ask(id, message);
                return Ok(());
            }
            ClientMessage::Status => {
                self.say(&ServerMessage::Status { report: Box::new(self.service.status().await) });
                return Ok(());
            }
            ClientMessage::Metrics => {
                let answer = match self.service.metrics().await {
                    Ok(text) => ServerMessage::Metrics { text },
                    Err(error) => ServerMessage::Error { id: None, error },
                };
                self.say(&answer);
                return Ok(());
            }
            ClientMessage::Drain => {
                tracing::info!(client = ?self.client, "drain asked for");
                self.service.drain().await;
                Ok(())
            }
            ClientMessage::Restart { slot } => {
                tracing::info!(client = ?self.client, slot, "restart asked for");
                self.service.restart(slot).await
            }
            ClientMessage::Reload => {
                tracing::info!(client = ?self.client, "reload asked for");
                self.begin_reload();
                return Ok(());
            }
        };
        self.say_outcome(answer);
        Ok(())
    }

    fn say_outcome(&mut self, outcome: Result<(), WireError>) {
        self.say(&match outcome {
            Ok(()) => ServerMessage::Ok,
            Err(error) => ServerMessage::Error { id: None, error },
        });
    }

    /// The answer comes when the reload is decided, which takes a worker's start; the client's jobs go on meanwhile.
    fn begin_reload(&mut self) {
        if self.reload.is_some() {
            let text = "this connection waits for a reload already";
            let error = WireError::new(ErrorCode::Overloaded, text).with_retry_after_ms(1000);
            self.say(&ServerMessage::Error { id: None, error });
            return;
        }
        let (sender, reload) = oneshot::channel();
        let service = self.service.clone();
        tokio::spawn(async move {
            let _gone = sender.send(service.reload().await);
        });
        self.reload = Some(reload);
    }

    fn ask(&mut self, id: u64, message: ClientMessage) {
        if self.jobs.contains_key(&id) || self.questions.contains(id) {
            // Without the id, as below.
            let error = WireError::new(ErrorCode::InvalidRequest, format!("id {id} is in use"));
            self.say(&ServerMessage::Error { id: None, error });
            return;
        }
        let durable = self.service.durable().cloned();
        let asked = durable.and_then(|durable| self.questions.ask(id, message, durable, self.client.clone()));
        if let Err(error) = asked {
            self.say(&ServerMessage::Error { id: Some(id), error });
        }
    }

    async fn generate(&mut self, id: u64, request: GenerateRequest) {
        if self.jobs.contains_key(&id) || self.questions.contains(id) {
            // Without the id: with it, the answer would end the job that runs under it.
            let error = WireError::new(ErrorCode::InvalidRequest, format!("id {id} is in use"));
            self.say(&ServerMessage::Error { id: None, error });
            return;
        }
        let (client, standing) = (self.client.clone(), Standing::Attended);
        let new = Submission { client, standing, request: Box::new(request) };
        match self.service.submit_to(new, self.sink.clone()).await {
            Ok((job, seed)) => {
                self.jobs.insert(id, job);
                self.ids.insert(job, id);
                self.say(&ServerMessage::Accepted { id, job, seed });
            }
            Err(error) => self.say(&ServerMessage::Error { id: Some(id), error }),
        }
    }

    fn pass_on(&mut self, job: JobId, event: JobEvent) {
        let Some(&id) = self.ids.get(&job) else { return };
        if matches!(event, JobEvent::Done(_) | JobEvent::Failed(_)) {
            self.ids.remove(&job);
            self.jobs.remove(&id);
        }
        self.say(&match event {
            JobEvent::Token(token) => ServerMessage::Token { id, token },
            JobEvent::WorkerDied { .. } => return, // Its client need not know.
            JobEvent::Done(done) => ServerMessage::Done { id, done },
            JobEvent::Failed(error) => ServerMessage::Error { id: Some(id), error },
        });
    }

    fn say(&mut self, message: &ServerMessage) {
        match encode_frame(message) {
            Ok(frame) => self.outbox.extend_from_slice(&frame),
            Err(error) => tracing::error!(%error, "message to a client not sent"),
        }
    }

    /// Cancels what still runs, and says the last words.
    async fn finish(mut self, end: End) {
        for &job in self.ids.keys() {
            self.service.cancel(job).await;
        }
        match end {
            End::Gone => return,
            End::Because(error) => self.say(&ServerMessage::Error { id: None, error }),
            End::Stopped => {
                while let Ok((job, event)) = self.events.try_recv() {
                    self.pass_on(job, event);
                }
                let answers = async {
                    while let Some(answer) = self.questions.next().await {
                        let frame = encode_frame(&answer);
                        self.outbox.extend_from_slice(frame.as_deref().unwrap_or_default());
                    }
                };
                let _late = timeout(CLOSE_TIMEOUT / 2, answers).await;
            }
        }
        let _late = timeout(CLOSE_TIMEOUT, self.writer.write_all(&self.outbox)).await;
    }
}

/// Waits for the outcome of a reload; for ever if there is none.
async fn decided(reload: &mut Option<oneshot::Receiver<Result<(), WireError>>>) -> Result<(), WireError> {
    match reload {
        Some(reload) => reload
            .await
            .unwrap_or_else(|_| Err(WireError::new(ErrorCode::Draining, "the service has stopped"))),
        None => std::future::pending().await,
    }
}

fn refused(error: FrameError) -> End {
    End::Because(error.to_wire())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_list_lets_a_peer_in_and_empty_lists_everybody() {
        let config = |uids: &[u32], gids: &[u32]| ListenConfig {
            allow_uids: uids.to_vec(),
            allow_gids: gids.to_vec(),
            ..ListenConfig::default()
        };
        let peer = Peer { uid: 1000, gid: 100, groups: vec![4, 27], pid: None };
        let allowed = |uids: &[u32], gids: &[u32]| check_peer(&peer, &config(uids, gids)).is_ok();
        assert!(allowed(&[], &[]) && allowed(&[1000], &[]) && allowed(&[], &[100]) && allowed(&[1], &[100]));
        assert!(allowed(&[], &[27]) && allowed(&[1], &[4, 5]));
        assert!(!allowed(&[1], &[]) && !allowed(&[], &[1000]) && !allowed(&[1, 2], &[1, 2]));
    }
}
