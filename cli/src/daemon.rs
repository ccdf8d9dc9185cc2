//! A running daemon, seen through its socket: where it is, and one job on it.

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bitnetd_config::{Config, Environment};
use bitnetd_proto::client::{Client, ClientError, Generation, GenerationEvent};
use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::request::GenerateRequest;
use clap::Args;
use tokio::sync::mpsc;

use crate::answer::{AnswerEvent, Source};
use crate::error::CliError;

/// How long the daemon may take to answer (not to generate).
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The same for a job, whose socket may be waiting for the next life of a service that finishes its work first.
const JOB_ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// A job that came just as the service was told to end is offered again so often: systemd may be restarting it.
const OFFERS_MAX: u32 = 3;
/// Wait between two offers, at most.
const OFFER_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Events that may wait for a slow reader of stdout.
const EVENT_QUEUE_LEN_MAX: usize = 64;

/// Where the daemon is.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Daemon")]
pub(crate) struct SocketArgs {
    /// The daemon's socket. Else $BITNETD_SOCKET, else the configuration's, else /run/bitnetd/bitnetd.sock, else
    /// $XDG_RUNTIME_DIR/bitnetd.sock
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

impl SocketArgs {
    /// Connects to the daemon.
    pub(crate) fn connect(&self) -> Result<Client, CliError> {
        connect(&self.find()?)
    }

    /// The socket to use: the first place where one is, else the first place (for the error).
    pub(crate) fn find(&self) -> Result<PathBuf, CliError> {
        let environment = Environment::read();
        let configured = match (&self.socket, &environment.socket) {
            (None, None) => configured_socket(&environment)?,
            _ => None,
        };
        let places = environment.client_sockets(self.socket.as_deref(), configured.as_deref());
        let found = places.iter().find(|place| is_socket(place)).or(places.first());
        found
            .cloned()
            .ok_or_else(|| CliError::new(ExitCode::Unavailable, "there is no place to look for a socket"))
    }
}

fn configured_socket(environment: &Environment) -> Result<Option<PathBuf>, CliError> {
    let file = environment.config_files().into_iter().find(|file| file.is_file());
    Ok(file.map(|file| Config::load(&file)).transpose()?.and_then(|config| config.listen.socket))
}

fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Connects to the daemon at `socket`.
pub(crate) fn connect(socket: &Path) -> Result<Client, CliError> {
    connect_within(socket, ANSWER_TIMEOUT)
}

/// Connects to the daemon at `socket`; what is wrong is left to the caller.
pub(crate) fn connect_once(socket: &Path, timeout: Duration) -> Result<Client, ClientError> {
    let name = concat!("bitnetd-cli/", env!("CARGO_PKG_VERSION"));
    Client::connect(socket, name, timeout)
}

fn connect_within(socket: &Path, timeout: Duration) -> Result<Client, CliError> {
    connect_once(socket, timeout).map_err(|error| {
        let hint = match &error {
            ClientError::Connect { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                    Some("start the daemon with `bitnetd serve`, or say where it is with --socket PATH")
                }
                std::io::ErrorKind::PermissionDenied => {
                    Some("the socket's mode and group (`ls -l`) say who may connect")
                }
                _ => None,
            },
            _ => None,
        };
        let error = CliError::from(error);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    })
}

/// A job on a daemon. A thread reads the connection; dropping this closes it, which cancels the job.
#[derive(Debug)]
pub(crate) struct DaemonJob {
    events: mpsc::Receiver<Result<AnswerEvent, CliError>>,
}

impl DaemonJob {
    /// Connects and asks for a generation.
    pub(crate) fn start(socket: PathBuf, request: GenerateRequest) -> Result<Self, CliError> {
        let (sender, events) = mpsc::channel(EVENT_QUEUE_LEN_MAX);
        let follow = move || {
            let outcome = offer(&socket, &request, &sender);
            if let Err(error) = outcome {
                // Nobody waits any more if this fails.
                drop(sender.blocking_send(Err(error)));
            }
        };
        std::thread::Builder::new()
            .name("daemon".into())
            .spawn(follow)
            .map_err(|error| CliError::os("start a thread", error))?;
        Ok(Self { events })
    }
}

/// Has the job done. One that was refused because the service is ending was not begun, and is offered again: under a
/// socket of systemd the next process takes it.
fn offer(
    socket: &Path,
    request: &GenerateRequest,
    sender: &mpsc::Sender<Result<AnswerEvent, CliError>>,
) -> Result<(), CliError> {
    let mut n_offers = 1;
    let mut refusal: Option<CliError> = None;
    loop {
        let mut client = match connect_within(socket, JOB_ANSWER_TIMEOUT) {
            Ok(client) => client,
            Err(error) => return Err(refusal.unwrap_or(error)),
        };
        match client.generate(request) {
            Ok(generation) => return follow(generation, sender),
            Err(error) if n_offers < OFFERS_MAX && is_ending(&error) => {
                let pause = match &error {
                    ClientError::Refused(error) => error.retry_after_ms.map(Duration::from_millis),
                    _ => None,
                };
                refusal = Some(error.into());
                std::thread::park_timeout(pause.unwrap_or_default().min(OFFER_PAUSE_MAX));
                n_offers += 1;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether a service that was ending is why a job was not taken.
fn is_ending(error: &ClientError) -> bool {
    match error {
        ClientError::Refused(error) => error.code == ErrorCode::Draining,
        ClientError::Closed => true,
        _ => false,
    }
}

/// Passes events on until the job ends or nobody wants them.
fn follow(
    mut generation: Generation<'_>,
    sender: &mpsc::Sender<Result<AnswerEvent, CliError>>,
) -> Result<(), CliError> {
    let mut is_wanted = sender.blocking_send(Ok(AnswerEvent::Accepted { seed: generation.seed() })).is_ok();
    while is_wanted && let Some(event) = generation.next() {
        let event = match event? {
            GenerationEvent::Token(token) => AnswerEvent::Token(token),
            GenerationEvent::Done(done) => AnswerEvent::Done(done),
        };
        is_wanted = sender.blocking_send(Ok(event)).is_ok();
    }
    Ok(())
}

impl Source for DaemonJob {
    async fn next(&mut self) -> Result<AnswerEvent, CliError> {
        self.events.recv().await.unwrap_or_else(|| Err(ClientError::Closed.into()))
    }
}
