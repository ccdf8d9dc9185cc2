//! The first messages of both links: who is there, and does it speak this version?

use crate::PROTOCOL_VERSION;
use crate::client_link::{ClientMessage, ServerMessage};
use crate::error::{ErrorCode, WireError};
use crate::limits::PEER_NAME_BYTES_MAX;
use crate::worker_link::{FromWorker, ModelSummary, ToWorker, WorkerSetup};

/// Refuses any version but ours. `peer` names the other side in the message.
///
/// # Errors
/// [`ErrorCode::UnsupportedVersion`].
pub fn check_version(peer: &str, version: u32) -> Result<(), WireError> {
    if version == PROTOCOL_VERSION {
        return Ok(());
    }
    Err(WireError::new(
        ErrorCode::UnsupportedVersion,
        format!("{peer} speaks protocol version {version}, this side speaks {PROTOCOL_VERSION}"),
    )
    .with_hint("use the same release of bitnetd on both sides"))
}

/// The first message of a client.
#[must_use]
pub fn client_hello(client: &str) -> ClientMessage {
    ClientMessage::Hello { version: PROTOCOL_VERSION, client: client.into() }
}

/// Checks the first message of a client; gives its name.
///
/// # Errors
/// [`ErrorCode::BadMessage`] if it is another message or the name is too long, [`ErrorCode::UnsupportedVersion`].
pub fn check_client_hello(message: ClientMessage) -> Result<String, WireError> {
    let ClientMessage::Hello { version, client } = message else {
        return Err(WireError::new(ErrorCode::BadMessage, "the first message must be `hello`"));
    };
    check_version("the client", version)?;
    if client.len() > PEER_NAME_BYTES_MAX {
        let text = format!("client name of {} bytes, the limit is {PEER_NAME_BYTES_MAX}", client.len());
        return Err(WireError::new(ErrorCode::BadMessage, text));
    }
    Ok(client)
}

/// Checks the supervisor's answer; gives its name and pid.
///
/// # Errors
/// The supervisor's own error if it refused, [`ErrorCode::BadMessage`], [`ErrorCode::UnsupportedVersion`].
pub fn check_welcome(message: ServerMessage) -> Result<(String, u32), WireError> {
    match message {
        ServerMessage::Welcome { version, server, pid } => {
            check_version("the server", version)?;
            Ok((server, pid))
        }
        ServerMessage::Error { error, .. } => Err(error),
        _ => Err(WireError::new(ErrorCode::BadMessage, "the server's first message must be `welcome`")),
    }
}

/// Checks a worker's first message from the supervisor; gives its set-up.
///
/// # Errors
/// [`ErrorCode::BadMessage`] if it is another message, [`ErrorCode::UnsupportedVersion`].
pub fn check_worker_hello(message: ToWorker) -> Result<WorkerSetup, WireError> {
    let ToWorker::Hello { version, setup } = message else {
        return Err(WireError::new(ErrorCode::BadMessage, "the first message to a worker must be `hello`"));
    };
    check_version("the supervisor", version)?;
    Ok(*setup)
}

/// Checks a worker's first message; gives what it serves and its load time in seconds.
///
/// # Errors
/// The worker's own error if it cannot start, [`ErrorCode::BadMessage`], [`ErrorCode::UnsupportedVersion`].
pub fn check_worker_ready(message: FromWorker) -> Result<(ModelSummary, f64), WireError> {
    match message {
        FromWorker::Ready { version, model, load_s, .. } => {
            check_version("the worker", version)?;
            Ok((*model, load_s))
        }
        FromWorker::StartFailed { error, .. } => Err(error),
        _ => Err(WireError::new(ErrorCode::BadMessage, "a worker's first message must be `ready`")),
    }
}
