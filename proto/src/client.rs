//! The small blocking client behind `bitnetd generate`, `status` and the like.
//!
//! One generation at a time over one connection; a program that wants many opens several, or speaks
//! [`crate::client_link`] itself. Closing the connection cancels what runs on it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use interprocess::ConnectWaitMode;
use interprocess::local_socket::{ConnectOptions, GenericFilePath, Stream, ToFsName, traits::Stream as _};

use crate::client_link::{ClientMessage, ServerMessage};
use crate::error::{ErrorCode, WireError};
use crate::event::{Done, Token};
use crate::frame::{FrameError, read_frame, write_frame};
use crate::handshake::{check_welcome, client_hello};
use crate::request::GenerateRequest;
use crate::status::StatusReport;

mod jobs; // Durable jobs.

pub use jobs::{JobFilter, Submission, Submitted};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers at the socket.
    #[error("cannot connect to `{path}`")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or the server did not answer in time.
    #[error("the connection to the server failed")]
    Link(#[source] FrameError),
    /// The server went away in the middle.
    #[error("the server closed the connection")]
    Closed,
    /// The server answered something that does not fit the question.
    #[error("the server sent an unexpected message: {0}")]
    Unexpected(String),
    /// The server refused, or the job failed.
    #[error("{0}")]
    Refused(WireError),
}

impl From<WireError> for ClientError {
    fn from(error: WireError) -> Self {
        Self::Refused(error)
    }
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    timeout: Duration,
    server: String,
    pid: u32,
    next_id: u64,
}

impl Client {
    /// Connects and shakes hands. `timeout` bounds this and every later answer, but not the wait for tokens.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if nobody is there, [`ClientError::Refused`] if the server does not want us.
    pub fn connect(path: &Path, name: &str, timeout: Duration) -> Result<Self, ClientError> {
        let at_path = |source| ClientError::Connect { path: path.to_owned(), source };
        let socket = path.to_fs_name::<GenericFilePath>().map_err(at_path)?;
        let stream = ConnectOptions::new()
            .name(socket)
            .wait_mode(ConnectWaitMode::Timeout(timeout))
            .connect_sync()
            .map_err(at_path)?;
        let mut client = Self { stream, timeout, server: String::new(), pid: 0, next_id: 0 };
        client.set_read_timeout(Some(timeout))?;
        client
            .stream
            .set_send_timeout(Some(timeout))
            .map_err(|source| ClientError::Link(FrameError::Io(source)))?;
        let sent = client.send(&client_hello(name));
        // A server that refuses at once may have closed before our greeting; its reason is still there to read.
        match client.receive() {
            Ok(answer) => (client.server, client.pid) = check_welcome(answer)?,
            Err(error) => return Err(sent.err().unwrap_or(error)),
        }
        Ok(client)
    }

    /// Name and version of the server.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Pid of the supervisor.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Starts a generation; the result is an iterator over what comes back.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the server does not accept the job.
    pub fn generate(&mut self, request: &GenerateRequest) -> Result<Generation<'_>, ClientError> {
        self.next_id += 1;
        let id = self.next_id;
        self.send(&ClientMessage::Generate { id, request: Box::new(request.clone()) })?;
        loop {
            match self.receive()? {
                ServerMessage::Accepted { id: of, job, seed } if of == id => {
                    self.set_read_timeout(None)?;
                    return Ok(Generation { client: self, id, job, seed, is_over: false });
                }
                ServerMessage::Error { id: None, error } => return Err(error.into()),
                ServerMessage::Error { id: Some(of), error } if of == id => return Err(error.into()),
                message if is_about_an_earlier_job(&message, id) => {}
                message => return Err(unexpected(&message)),
            }
        }
    }

    /// Asks how the service is.
    ///
    /// # Errors
    /// If the connection fails or the server refuses.
    pub fn status(&mut self) -> Result<StatusReport, ClientError> {
        match self.ask(&ClientMessage::Status)? {
            ServerMessage::Status { report } => Ok(*report),
            message => Err(unexpected(&message)),
        }
    }

    /// Asks the service to take no new jobs, finish the accepted ones and exit.
    ///
    /// # Errors
    /// If the connection fails or the server refuses.
    pub fn drain(&mut self) -> Result<(), ClientError> {
        self.order(&ClientMessage::Drain)
    }

    /// Asks for a new worker process in one slot.
    ///
    /// # Errors
    /// If the connection fails or there is no such slot.
    pub fn restart(&mut self, slot: u32) -> Result<(), ClientError> {
        self.order(&ClientMessage::Restart { slot })
    }

    /// What the service has counted and measured, as OpenMetrics text.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn metrics(&mut self) -> Result<String, ClientError> {
        match self.ask(&ClientMessage::Metrics)? {
            ServerMessage::Metrics { text } => Ok(text),
            message => Err(unexpected(&message)),
        }
    }

    /// Asks the service to read its configuration again.
    ///
    /// # Errors
    /// If the connection fails or the new configuration is refused.
    pub fn reload(&mut self) -> Result<(), ClientError> {
        // It takes as long as a worker's start, which the server bounds.
        self.set_read_timeout(None)?;
        self.order(&ClientMessage::Reload)
    }

    fn order(&mut self, message: &ClientMessage) -> Result<(), ClientError> {
        match self.ask(message)? {
            ServerMessage::Ok => Ok(()),
            message => Err(unexpected(&message)),
        }
    }

    /// One question, one answer; what is left of earlier jobs is passed over.
    fn ask(&mut self, message: &ClientMessage) -> Result<ServerMessage, ClientError> {
        self.send(message)?;
        loop {
            match self.receive()? {
                ServerMessage::Error { id: None, error } => return Err(error.into()),
                answer if is_about_an_earlier_job(&answer, u64::MAX) => {}
                answer => return Ok(answer),
            }
        }
    }

    fn send(&mut self, message: &ClientMessage) -> Result<(), ClientError> {
        write_frame(&self.stream, message).map_err(ClientError::Link)
    }

    fn receive(&mut self) -> Result<ServerMessage, ClientError> {
        read_frame(&self.stream).map_err(ClientError::Link)?.ok_or(ClientError::Closed)
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) -> Result<(), ClientError> {
        self.stream.set_recv_timeout(timeout).map_err(|source| ClientError::Link(FrameError::Io(source)))
    }
}

/// A job's messages that nobody waits for any more, because its [`Generation`] was dropped.
fn is_about_an_earlier_job(message: &ServerMessage, current: u64) -> bool {
    match message {
        ServerMessage::Accepted { id, .. }
        | ServerMessage::Token { id, .. }
        | ServerMessage::Done { id, .. }
        | ServerMessage::Submitted { id, .. }
        | ServerMessage::Jobs { id, .. }
        | ServerMessage::Result { id, .. }
        | ServerMessage::Job { id, .. }
        | ServerMessage::Error { id: Some(id), .. } => *id != current,
        _ => false,
    }
}

fn unexpected(message: &ServerMessage) -> ClientError {
    let mut shown = format!("{message:?}");
    if let Some((end, _)) = shown.char_indices().nth(120) {
        shown.truncate(end);
    }
    ClientError::Unexpected(shown)
}

/// What comes back for a job.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerationEvent {
    /// One more token.
    Token(Token),
    /// It ended well; nothing follows.
    Done(Done),
}

/// A running job. Dropping it before its end cancels it.
#[derive(Debug)]
pub struct Generation<'a> {
    client: &'a mut Client,
    id: u64,
    job: u64,
    seed: u64,
    is_over: bool,
}

impl Generation<'_> {
    /// The server's name of the job, as in its logs.
    #[must_use]
    pub fn job(&self) -> u64 {
        self.job
    }

    /// The seed in use; with it the same request gives the same answer.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Asks to give the job up; the iterator then ends with [`ErrorCode::Cancelled`], or with the job's own end
    /// if that came first.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn cancel(&mut self) -> Result<(), ClientError> {
        if self.is_over {
            return Ok(());
        }
        self.client.send(&ClientMessage::Cancel { id: self.id })
    }

    fn receive_event(&mut self) -> Result<GenerationEvent, ClientError> {
        loop {
            match self.client.receive()? {
                ServerMessage::Token { id, token } if id == self.id => {
                    return Ok(GenerationEvent::Token(token));
                }
                ServerMessage::Done { id, done } if id == self.id => return Ok(GenerationEvent::Done(done)),
                ServerMessage::Error { id: None, error } => return Err(error.into()),
                ServerMessage::Error { id: Some(id), error } if id == self.id => return Err(error.into()),
                message if is_about_an_earlier_job(&message, self.id) => {}
                message => return Err(unexpected(&message)),
            }
        }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<GenerationEvent, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let event = self.receive_event();
        self.is_over = !matches!(event, Ok(GenerationEvent::Token(_)));
        Some(event)
    }
}

impl Drop for Generation<'_> {
    fn drop(&mut self) {
        // A connection that fails here fails again, visibly, at its next use.
        let _sent = self.cancel();
        let timeout = self.client.timeout;
        let _set = self.client.set_read_timeout(Some(timeout));
    }
}

impl ClientError {
    /// The server's error, if it was one.
    #[must_use]
    pub fn wire(&self) -> Option<&WireError> {
        match self {
            Self::Refused(error) => Some(error),
            _ => None,
        }
    }

    /// True if the job was given up at our own wish.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.wire().is_some_and(|error| error.code == ErrorCode::Cancelled)
    }
}
