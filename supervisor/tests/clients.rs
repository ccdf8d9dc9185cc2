//! Clients over the socket: good, bad and slow ones, side by side.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use bitnetd_config::ListenConfig;
use bitnetd_proto::client::{Client, ClientError, GenerationEvent};
use bitnetd_proto::client_link::{ClientMessage, ServerMessage};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::frame::{encode_frame, read_frame, write_frame};
use bitnetd_proto::handshake::client_hello;
use bitnetd_proto::request::GenerateRequest;
use bitnetd_supervisor::{Listener, Service};
use tokio::task::{JoinHandle, spawn_blocking};

use crate::support::{Fixture, LONG, end, expected_ids, request, wait_for};

struct Server {
    _fixture: Fixture,
    service: Service,
    path: PathBuf,
    serving: JoinHandle<()>,
}

impl Server {
    async fn start(fixture: Fixture) -> Self {
        let service = fixture.ready().await;
        let path = fixture.folder.path().join("b.sock");
        let listener = Listener::bind(&path, &ListenConfig::default()).unwrap();
        let serving = tokio::spawn(listener.serve(service.clone()));
        Self { _fixture: fixture, service, path, serving }
    }

    /// Runs blocking client code beside the service.
    async fn with<T: Send + 'static>(&self, client: impl FnOnce(&Path) -> T + Send + 'static) -> T {
        let path = self.path.clone();
        spawn_blocking(move || client(&path)).await.unwrap()
    }

    async fn end(self) {
        end(self.service).await;
        self.serving.await.unwrap();
    }
}

fn generate(path: &Path, request: &GenerateRequest) -> Result<Vec<u32>, ClientError> {
    let mut client = Client::connect(path, "test", LONG)?;
    let mut ids = Vec::new();
    for event in client.generate(request)? {
        match event? {
            GenerationEvent::Token(token) => ids.push(token.id),
            GenerationEvent::Done(done) => {
                assert_eq!(done.usage.completion_tokens as usize, ids.len());
                return Ok(ids);
            }
        }
    }
    unreachable!("the iterator ends with an end")
}

/// Shakes hands, and gives the bare stream.
fn greet(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    write_frame(&stream, &client_hello("bare")).unwrap();
    assert!(matches!(read_frame(&stream).unwrap(), Some(ServerMessage::Welcome { .. })));
    stream
}

/// The error that the server says before it closes.
#[track_caller]
fn last_words(stream: UnixStream) -> WireError {
    let Some(ServerMessage::Error { id: None, error }) = read_frame(&stream).unwrap() else {
        panic!("no error")
    };
    let mut rest = Vec::new();
    // A reset is a close as well: not all that we sent was read.
    let _reset = (&stream).read_to_end(&mut rest);
    assert!(rest.is_empty(), "more after the error: {rest:?}");
    error
}

#[tokio::test]
async fn eight_clients_stream_at_once() {
    let server = Server::start(Fixture::new(2, &["pace_ms=1"])).await;
    let clients: Vec<_> = (0..8)
        .map(|seed| {
            let path = server.path.clone();
            spawn_blocking(move || generate(&path, &request(40, seed)).unwrap())
        })
        .collect();
    for (seed, client) in (0..).zip(clients) {
        assert_eq!(client.await.unwrap(), expected_ids(seed, 0..40));
    }
    server.end().await;
}

#[tokio::test]
async fn questions_between_jobs_are_answered() {
    let server = Server::start(Fixture::new(2, &[])).await;
    server
        .with(|path| {
            let mut client = Client::connect(path, "test", LONG).unwrap();
            assert_eq!(client.pid(), std::process::id());
            assert!(client.server().starts_with("bitnetd/"));
            drop(client.generate(&request(5, 1)).unwrap()); // Given up at once; what it still says is passed over.
            assert_eq!(client.status().unwrap().slots.len(), 2);
            client.restart(1).unwrap();
            let not_found = client.restart(7).unwrap_err();
            assert_eq!(not_found.wire().unwrap().code, ErrorCode::NotFound);
            let cannot = client.reload().unwrap_err();
            assert_eq!(cannot.wire().unwrap().code, ErrorCode::InvalidRequest);
            let refused = client.generate(&request(0, 0)).unwrap_err();
            assert_eq!(refused.wire().unwrap().code, ErrorCode::InvalidRequest);
            let n = client
                .generate(&request(5, 1))
                .unwrap()
                .filter(|event| matches!(event, Ok(GenerationEvent::Token(_))));
            assert_eq!(n.count(), 5);
        })
        .await;
    server.end().await;
}

#[tokio::test]
async fn a_cancelled_job_ends_with_that_word() {
    let server = Server::start(Fixture::new(1, &["pace_ms=1"])).await;
    server
        .with(|path| {
            let mut client = Client::connect(path, "test", LONG).unwrap();
            let mut generation = client.generate(&request(100_000, 1)).unwrap();
            generation.next().unwrap().unwrap();
            generation.cancel().unwrap();
            let end = generation.find_map(Result::err).unwrap();
            assert!(end.is_cancelled(), "{end}");
            drop(generation);
            assert_eq!(client.status().unwrap().slots[0].jobs, 0);
        })
        .await;
    server.end().await;
}

#[tokio::test]
async fn a_client_that_goes_away_takes_its_jobs_with_it() {
    let server = Server::start(Fixture::new(1, &["pace_ms=1"])).await;
    server
        .with(|path| {
            let mut client = Client::connect(path, "test", LONG).unwrap();
            let mut generation = client.generate(&request(100_000, 1)).unwrap();
            generation.next().unwrap().unwrap();
            std::mem::forget(generation); // No polite cancel.
        })
        .await;
    wait_for("the job to be cancelled", async || {
        let status = server.service.status().await;
        (status.slots[0].jobs == 0 && status.totals.cancelled == 1).then_some(())
    })
    .await;
    server.end().await;
}

/// Sends `bytes` after the greeting, while another client streams undisturbed.
async fn misbehave(bytes: Vec<u8>, expected: ErrorCode) {
    let server = Server::start(Fixture::new(1, &["pace_ms=1"])).await;
    let path = server.path.clone();
    let other = spawn_blocking(move || generate(&path, &request(100, 9)).unwrap());
    let error = server
        .with(move |path| {
            let stream = greet(path);
            (&stream).write_all(&bytes).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            last_words(stream)
        })
        .await;
    assert_eq!(error.code, expected, "{error}");
    assert_eq!(other.await.unwrap(), expected_ids(9, 0..100));
    server.end().await;
}

#[tokio::test]
async fn garbage_is_answered_and_closed() {
    misbehave(b"\x03\0\0\0\xff\xff\xff".to_vec(), ErrorCode::BadMessage).await;
}

#[tokio::test]
async fn another_protocol_is_answered_and_closed() {
    misbehave(b"GET / HTTP/1.1\r\n\r\n".to_vec(), ErrorCode::FrameTooLarge).await;
}

#[tokio::test]
async fn half_a_frame_is_answered_and_closed() {
    let frame = encode_frame(&ClientMessage::Status).unwrap();
    misbehave(frame[..frame.len() - 1].to_vec(), ErrorCode::BadMessage).await;
}

#[tokio::test]
async fn a_huge_length_is_answered_and_closed() {
    misbehave(u32::MAX.to_le_bytes().to_vec(), ErrorCode::FrameTooLarge).await;
}

#[tokio::test]
async fn a_second_hello_is_answered_and_closed() {
    misbehave(encode_frame(&client_hello("again")).unwrap(), ErrorCode::BadMessage).await;
}

#[tokio::test]
async fn other_versions_and_other_first_messages_are_refused() {
    let server = Server::start(Fixture::new(1, &[])).await;
    let first = |message: ClientMessage| {
        server.with(move |path| {
            let stream = UnixStream::connect(path).unwrap();
            write_frame(&stream, &message).unwrap();
            last_words(stream).code
        })
    };
    let hello = ClientMessage::Hello { version: 999, client: "test".into() };
    assert_eq!(first(hello).await, ErrorCode::UnsupportedVersion);
    assert_eq!(first(ClientMessage::Status).await, ErrorCode::BadMessage);
    server.end().await;
}

#[tokio::test]
async fn an_id_in_use_is_refused_without_harm_to_the_job() {
    let server = Server::start(Fixture::new(1, &["pace_ms=1"])).await;
    server
        .with(|path| {
            let stream = greet(path);
            let generate = ClientMessage::Generate { id: 1, request: Box::new(request(50, 3)) };
            write_frame(&stream, &generate).unwrap();
            write_frame(&stream, &generate).unwrap();
            let (mut n_tokens, mut n_refused) = (0, 0);
            loop {
                match read_frame(&stream).unwrap().unwrap() {
                    ServerMessage::Accepted { .. } => {}
                    ServerMessage::Token { id: 1, .. } => n_tokens += 1,
                    ServerMessage::Error { id: None, error } => {
                        assert_eq!(error.code, ErrorCode::InvalidRequest);
                        n_refused += 1;
                    }
                    ServerMessage::Done { id: 1, .. } => break,
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!((n_tokens, n_refused), (50, 1));
        })
        .await;
    server.end().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_its_job_and_holds_nobody_back() {
    let mut fixture = Fixture::new(1, &[]);
    fixture.config.engine.max_batch = 4;
    let server = Server::start(fixture).await;
    let deaf = server
        .with(|path| {
            let stream = greet(path);
            let generate = ClientMessage::Generate { id: 1, request: Box::new(request(100_000, 3)) };
            write_frame(&stream, &generate).unwrap();
            stream
        })
        .await;
    let ids = server.with(|path| generate(path, &request(200, 9)).unwrap()).await;
    assert_eq!(ids, expected_ids(9, 0..200));
    wait_for("the job to be given up", async || {
        (server.service.status().await.totals.cancelled == 1).then_some(())
    })
    .await;
    let last = server
        .with(move |_| {
            let mut last = None;
            while let Ok(Some(message)) = read_frame::<ServerMessage>(&deaf) {
                last = Some(message);
            }
            last
        })
        .await;
    // What had been written is there; then the connection ends, never with a `done`.
    assert!(!matches!(last, Some(ServerMessage::Done { .. }) | None), "{last:?}");
    server.end().await;
}
