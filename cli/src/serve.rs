//! `bitnetd serve`: the daemon. Reads its configuration, starts the workers, takes clients in, and ends in order.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use bitnetd_config::{Config, Confinement, Environment, Place, ServiceManager};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_supervisor::{Activation, Journal, Listener, Notifier, ScrapeListener, Service};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::batch::SplitArgs;
use crate::error::CliError;
use crate::local;
use crate::logging::{self, LogArgs};
use crate::reload::{self, ConfigReloader};
use crate::runtime::{self, Interrupt};

/// `bitnetd serve`
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
It is ready when it logs `ready to serve`. SIGTERM or Ctrl-C: takes nothing new, finishes what it has, ends; a second one: at
once. SIGHUP or `bitnetd reload`: reads the configuration again. Clients: `bitnetd generate`, `bitnetd status`, `bitnetd batch --socket …`.

Examples:
  bitnetd serve                                               the built-in model on every CPU
  bitnetd serve -m model.gguf --workers 3 --threads 4 --socket ./bitnetd.sock
  bitnetd serve -c /etc/bitnetd/bitnetd.toml                  `bitnetd config show` prints every key")]
pub(crate) struct ServeArgs {
    /// Configuration file; without it $BITNETD_CONFIG, ~/.config/bitnetd/bitnetd.toml or /etc/bitnetd/bitnetd.toml if
    /// there is one, else the defaults
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Instead of the configuration's `model.path`
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Instead of the configuration's `listen.socket`
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    split: SplitArgs,
}

/// Sent to a process that writes beyond its limit of file sizes.
const SIGXFSZ: i32 = 25;

/// Runs the command. Sets up logging itself, because the configuration has a say in it.
pub(crate) fn main(args: &ServeArgs, log: &LogArgs) -> Result<ExitCode, CliError> {
    // First of all, while the open files that systemd passes on are the only ones.
    let manager = ServiceManager::read()
        .map_err(|error| CliError::os("read what the service manager passes on", error))?;
    let activation = Activation::take(&manager.inherited)?;
    let environment = Environment::read();
    let (mut config, origin) = load(args, &environment)?;
    let level = logging::init_daemon(log, &config.log, &manager)?;
    if log.quiet || log.verbose > 0 {
        config.log.level = logging::worker_filter(log);
    }
    match origin {
        Some(path) => tracing::info!(path = %path.display(), "configuration read"),
        None => tracing::info!("no configuration file: using the defaults"),
    }
    let notifier = Notifier::new(&manager);
    let reloader = ConfigReloader::new(args.clone(), *log, environment, &config, level);
    runtime::block_on(serve(config, activation, notifier, reloader))
}

/// The place for the socket where nobody names one; its folder is made if it is not there.
fn usual_socket(environment: &Environment) -> Result<PathBuf, CliError> {
    let path = environment.server_socket().map_err(|error| {
        CliError::with_code(ExitCode::Config, error).hint("say where with --socket PATH or `listen.socket`")
    })?;
    if let Some(folder) = path.parent() {
        let mode = if environment.is_root { 0o755 } else { 0o700 };
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(folder)
            .map_err(|source| CliError::file("make the folder of the socket", folder, source))?;
    }
    Ok(path)
}

/// The configuration file with the flags on top, and where it came from.
pub(crate) fn load(
    args: &ServeArgs,
    environment: &Environment,
) -> Result<(Config, Option<PathBuf>), CliError> {
    let found =
        || environment.config_files().into_iter().find(|file| environment.config.is_some() || file.is_file());
    let origin = args.config.clone().or_else(found);
    let mut config = origin.as_deref().map(Config::load).transpose()?.unwrap_or_default();
    let absolute =
        |path: &Path| std::path::absolute(path).map_err(|source| CliError::file("find", path, source));
    if let Some(model) = &args.model {
        config.model.path = Some(absolute(model)?);
    }
    if let Some(socket) = &args.socket {
        config.listen.socket = Some(absolute(socket)?);
    }
    args.split.apply(&mut config)?;
    Ok((config, origin))
}

/// The journal of durable jobs, or why there is none. One that the configuration names must be had; the usual one may
/// belong to another daemon of this user.
fn journal(config: &Config, environment: &Environment) -> Result<Result<Journal, String>, CliError> {
    let limits = &config.queue.durable;
    let path = match &config.queue.journal {
        Place::Off => return Ok(Err("`queue.journal` is \"off\"".into())),
        Place::At(path) => return Ok(Ok(Journal::open(path, limits)?)),
        Place::Usual => environment.journal(),
    };
    let Some(path) = path else {
        return Ok(Err("there is no directory for it: STATE_DIRECTORY and HOME are not set".into()));
    };
    let made =
        path.parent().map_or(Ok(()), |folder| DirBuilder::new().recursive(true).mode(0o700).create(folder));
    let opened = match made {
        Ok(()) => Journal::open(&path, limits).map_err(CliError::from),
        Err(source) => Err(CliError::file("make the folder of the journal", &path, source)),
    };
    Ok(opened.map_err(|error| {
        tracing::error!("no durable jobs: {}", error.message());
        error.message()
    }))
}

/// The sockets that systemd passes on, else one of our own.
fn listeners(
    config: &Config,
    environment: &Environment,
    activation: &mut Activation,
) -> Result<Vec<Listener>, CliError> {
    let sockets = std::mem::take(&mut activation.sockets);
    if sockets.is_empty() {
        let socket = match &config.listen.socket {
            Some(path) => path.clone(),
            None => usual_socket(environment)?,
        };
        return Ok(vec![Listener::bind(&socket, &config.listen)?]);
    }
    let mut listeners = Vec::new();
    for (name, socket) in sockets {
        listeners.push(Listener::inherit(&name, socket, &config.listen)?);
    }
    let is_other = |path: &&PathBuf| listeners.iter().all(|listener| listener.path() != path.as_path());
    if let Some(path) = config.listen.socket.as_ref().filter(is_other) {
        tracing::warn!(path = %path.display(), "`listen.socket` is not used: the service manager passes on another");
    }
    Ok(listeners)
}

async fn serve(
    config: Config,
    mut activation: Activation,
    notifier: Notifier,
    reloader: ConfigReloader,
) -> Result<ExitCode, CliError> {
    // Before anything announces that it is ready.
    let mut interrupt = Interrupt::listen()?;
    let hangup = signal(SignalKind::hangup()).map_err(|error| CliError::os("handle signals", error))?;
    let listeners = listeners(&config, reloader.environment(), &mut activation)?;
    let socket = listeners.first().map(|listener| listener.path().to_owned()).unwrap_or_default();
    let metrics = ScrapeListener::bind(&config.listen).await?;
    let journal = journal(&config, reloader.environment())?;
    // A limit of file sizes is to be an error that is told, not a death.
    let _file_size =
        signal(SignalKind::from_raw(SIGXFSZ)).map_err(|error| CliError::os("handle signals", error))?;
    if config.engine.mlock {
        bitnetd_supervisor::allow_locked_memory();
    }
    if config.security.confinement != Confinement::Off {
        // The socket has its owner: nothing is left that needs more than a user's rights.
        bitnetd_supervisor::reduce_privileges()
            .map_err(|error| CliError::with_code(ExitCode::Permission, error))?;
    }
    let service = Service::start_under(local::service_spec(config)?, notifier, activation.stored).await?;
    match journal {
        Ok(journal) => {
            service.keep_jobs(journal).map_err(|error| CliError::os("start the journal's threads", error))?
        }
        Err(reason) => service.keep_no_jobs(reason),
    }
    service.on_reload(reloader);
    let reloading = tokio::spawn(reload::at_each_hangup(hangup, service.clone()));
    // Clients are let in at once: they can ask for the status, and their jobs wait for the workers.
    let serving: Vec<_> =
        listeners.into_iter().map(|listener| tokio::spawn(listener.serve(service.clone()))).collect();
    let scraped = metrics.map(|metrics| tokio::spawn(metrics.serve(service.clone())));
    let outcome = tokio::select! {
        outcome = live(&service, &socket) => outcome,
        () = interrupt.wait() => Ok(()),
    };
    if outcome.is_ok() {
        service.drain().await;
        tokio::select! {
            _ = service.stopped() => {}
            () = interrupt.wait() => tracing::warn!("a second signal: stopping at once"),
        }
    }
    service.stop().await;
    let code = service.stopped().await;
    reloading.abort();
    if let Some(scraped) = scraped {
        scraped.await.map_err(|error| CliError::with_code(ExitCode::Software, error))?;
    }
    for serving in serving {
        serving.await.map_err(|error| CliError::with_code(ExitCode::Software, error))?;
    }
    outcome.map(|()| code)
}

/// From the start of the first worker to the end of the service, for whatever reason it ends.
async fn live(service: &Service, socket: &Path) -> Result<(), CliError> {
    let model = service.ready().await?;
    let (socket, isa) = (socket.display(), &model.isa);
    tracing::info!(%socket, model = model.name, isa, "ready to serve");
    service.stopped().await;
    Ok(())
}
