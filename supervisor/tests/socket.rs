//! Taking and giving back the socket, and who may connect.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use bitnetd_config::ListenConfig;
use bitnetd_proto::client::{Client, ClientError};
use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_supervisor::{ListenError, Listener};
use tokio::task::spawn_blocking;

use crate::support::{FAKE_WORKER, Fixture, LONG, end, request, wait_for};

fn bind(path: &Path) -> Result<Listener, ListenError> {
    Listener::bind(path, &ListenConfig::default())
}

/// Binds a path that was bound until a moment ago. A worker that another test of this process is just starting holds
/// copies of our descriptors, lock and listener among them, until its exec.
async fn bind_again(path: &Path, config: &ListenConfig) -> Listener {
    let bound = async || match Listener::bind(path, config) {
        Ok(listener) => Some(listener),
        Err(ListenError::InUse { .. }) => None,
        Err(other) => panic!("{other}"),
    };
    wait_for("a dead socket is taken over", bound).await
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b.sock");
    (folder, path)
}

#[tokio::test]
async fn the_socket_has_its_mode_and_is_removed_at_the_end() {
    let (_folder, path) = folder();
    for mode in [0o600, 0o660, 0o666] {
        let listener = bind_again(&path, &ListenConfig { mode, ..ListenConfig::default() }).await;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
        drop(listener);
        assert!(!path.exists());
    }
}

#[tokio::test]
async fn a_live_socket_is_never_taken() {
    let (_folder, path) = folder();
    let ours = bind(&path).unwrap();
    let error = bind(&path).unwrap_err();
    assert!(matches!(error, ListenError::InUse { .. }), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Temporary);
    drop(ours);
    // Someone who knows nothing of lock files.
    let theirs = UnixListener::bind(&path).unwrap();
    assert!(matches!(bind(&path), Err(ListenError::InUse { .. })));
    assert!(path.exists());
    drop(theirs);
    drop(bind_again(&path, &ListenConfig::default()).await);
}

#[tokio::test]
async fn what_is_not_ours_is_not_removed() {
    let (_folder, path) = folder();
    let listener = bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let theirs = UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists(), "the other's socket was removed");
    drop(theirs);
}

#[tokio::test]
async fn bad_places_are_named() {
    let (folder, path) = folder();
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(bind(&path), Err(ListenError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    assert!(matches!(bind(&folder.path().join("no/b.sock")), Err(ListenError::NoFolder { .. })));
    let too_long = folder.path().join("x".repeat(150));
    let error = bind(&too_long).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Config, "{error}");
}

#[tokio::test]
async fn a_peer_that_is_not_on_the_list_is_told_so() {
    let fixture = Fixture::new(1, &[]);
    let service = fixture.ready().await;
    let path = fixture.folder.path().join("b.sock");
    let config = ListenConfig { allow_uids: vec![4_000_000], ..ListenConfig::default() };
    let serving = tokio::spawn(Listener::bind(&path, &config).unwrap().serve(service.clone()));
    let socket = path.clone();
    let refused = spawn_blocking(move || Client::connect(&socket, "test", LONG)).await.unwrap().unwrap_err();
    match &refused {
        ClientError::Refused(error) => assert_eq!(error.code, ErrorCode::PermissionDenied, "{error}"),
        other => panic!("{other:?}"),
    }
    end(service).await;
    serving.await.unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn connections_are_limited_and_places_are_given_back() {
    let fixture = Fixture::new(1, &[]);
    let service = fixture.ready().await;
    let path = fixture.folder.path().join("b.sock");
    let config = ListenConfig { max_connections: 2, ..ListenConfig::default() };
    let serving = tokio::spawn(Listener::bind(&path, &config).unwrap().serve(service.clone()));
    spawn_blocking(move || {
        let connect = || Client::connect(&path, "test", LONG);
        let (first, _second) = (connect().unwrap(), connect().unwrap());
        match connect() {
            Err(ClientError::Refused(error)) => assert_eq!(error.code, ErrorCode::Overloaded, "{error}"),
            other => panic!("{other:?}"),
        }
        drop(first);
        let end = std::time::Instant::now() + LONG;
        while connect().is_err() {
            assert!(std::time::Instant::now() < end, "the place was not given back");
            std::thread::yield_now();
        }
    })
    .await
    .unwrap();
    end(service).await;
    serving.await.unwrap();
}

#[tokio::test]
async fn a_peer_that_is_on_the_list_by_uid_or_by_gid_is_let_in() {
    let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    for (allow_uids, allow_gids) in [(vec![4_000_000, uid], vec![]), (vec![4_000_000], vec![gid])] {
        let fixture = Fixture::new(1, &[]);
        let service = fixture.ready().await;
        let path = fixture.folder.path().join("b.sock");
        let config = ListenConfig { allow_uids, allow_gids, ..ListenConfig::default() };
        let serving = tokio::spawn(Listener::bind(&path, &config).unwrap().serve(service.clone()));
        let connected = spawn_blocking(move || Client::connect(&path, "test", LONG).map(drop)).await.unwrap();
        assert!(connected.is_ok(), "{connected:?}");
        end(service).await;
        serving.await.unwrap();
    }
}

/// A supervisor that may open so few files that hardly a client fits beside its workers.
#[tokio::test]
async fn with_few_descriptors_clients_are_refused_with_a_word_and_the_service_lives() {
    let fixture = Fixture::new(1, &[]);
    let socket = fixture.folder.path().join("b.sock");
    let script = format!("ulimit -n 64 && exec {FAKE_WORKER} serve {} 1", socket.display());
    let mut supervisor = std::process::Command::new("sh").args(["-c", &script]).spawn().unwrap();
    let path = socket.clone();
    let first = wait_for("the supervisor", async || Client::connect(&path, "test", LONG).ok()).await;
    spawn_blocking(move || {
        let mut first = first;
        for _ in 0..100 {
            match Client::connect(&socket, "test", LONG) {
                Err(ClientError::Refused(error)) => assert_eq!(error.code, ErrorCode::Overloaded, "{error}"),
                other => panic!("{other:?}"),
            }
        }
        let n_tokens = first.generate(&request(50, 1)).unwrap().filter(|event| event.is_ok()).count();
        assert_eq!(n_tokens, 51, "fifty tokens and the end");
        drop(first);
        let end = std::time::Instant::now() + LONG;
        let mut last = loop {
            match Client::connect(&socket, "test", LONG) {
                Ok(client) => break client,
                Err(error) => assert!(std::time::Instant::now() < end, "{error}"),
            }
        };
        last.drain().unwrap();
    })
    .await
    .unwrap();
    assert!(supervisor.wait().unwrap().success());
}
