//! What SIGHUP and `bitnetd reload` do to a daemon: the whole new configuration, or the old one stays.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bitnetd_config::{Config, Environment};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_supervisor::{Reloader, Service, ServiceSpec};
use tokio::signal::unix::Signal;
use tokio::time::sleep;

use crate::error::CliError;
use crate::local;
use crate::logging::{self, LevelHandle, LogArgs};
use crate::serve::{self, ServeArgs};

/// Wait before a reload that came too early is tried again, unless the service says another time.
const RETRY_WAIT: Duration = Duration::from_secs(1);

/// Reads the file of `serve` again, with the flags of `serve` on top, as at its start.
pub(crate) struct ConfigReloader {
    args: ServeArgs,
    log: LogArgs,
    environment: Environment,
    /// The configuration that holds.
    present: Mutex<Config>,
    level: LevelHandle,
}

impl ConfigReloader {
    pub(crate) fn new(
        args: ServeArgs,
        log: LogArgs,
        environment: Environment,
        present: &Config,
        level: LevelHandle,
    ) -> Self {
        Self { args, log, environment, present: Mutex::new(present.clone()), level }
    }

    /// What the environment said at the start.
    pub(crate) fn environment(&self) -> &Environment {
        &self.environment
    }

    fn read_spec(&self) -> Result<ServiceSpec, CliError> {
        let (mut config, _) = serve::load(&self.args, &self.environment)?;
        if self.log.quiet || self.log.verbose > 0 {
            config.log.level = logging::worker_filter(&self.log);
        }
        let present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        let fixed = present.changes_that_need_restart(&config);
        let fixed: Vec<String> = fixed.map(|key| format!("`{}.{}`", key.section, key.name)).collect();
        if !fixed.is_empty() {
            let text = format!("{} cannot change while the daemon runs", fixed.join(", "));
            return Err(CliError::from(WireError::new(ErrorCode::InvalidRequest, text))
                .hint("put it back, or stop the daemon and start it again"));
        }
        local::service_spec(config)
    }
}

impl Reloader for ConfigReloader {
    fn read(&self) -> Result<ServiceSpec, WireError> {
        self.read_spec().map_err(|error| error.to_wire())
    }

    fn taken_over(&self, config: &Config) {
        self.level.set(&config.log.level);
        *self.present.lock().unwrap_or_else(PoisonError::into_inner) = config.clone();
    }
}

/// Reloads at each SIGHUP. One that comes while the service cannot take it yet is tried again until it can.
pub(crate) async fn at_each_hangup(mut hangup: Signal, service: Service) {
    while hangup.recv().await.is_some() {
        tracing::info!("SIGHUP: reading the configuration again");
        loop {
            let Err(error) = service.reload().await else { break };
            if error.code != ErrorCode::Overloaded {
                break; // It is in the log.
            }
            tracing::warn!("not reloaded yet: {error}");
            sleep(error.retry_after_ms.map_or(RETRY_WAIT, Duration::from_millis)).await;
        }
    }
}
