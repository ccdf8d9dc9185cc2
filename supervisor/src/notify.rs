//! What the service manager is told: readiness, a line on how it goes, life signs. Silent where there is none.
//!
//! [`Notifier`] sends, [`Herald`] decides what and when; it is driven by the event loop itself, so that a loop that hangs
//! falls silent and is restarted by the manager's watchdog. Sending never waits: a message that does not fit into the
//! manager's queue is dropped and, where it matters, said again.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use bitnetd_config::ServiceManager;
use bitnetd_proto::status::Health;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use sd_notify::NotifyState;

use crate::state::{Readiness, State};

/// The line on how it goes changes at most this often, unless it is about health.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// While workers load, at the start or for a reload, the manager is asked again and again for this much more time …
const LOAD_EXTENSION: Duration = Duration::from_secs(30);
/// … this often. The waits of the workers themselves are limited by the configuration, and so is their number.
const LOAD_EXTENSION_INTERVAL: Duration = Duration::from_secs(5);
/// The way out, after the last job: workers are stopped, clients hear the last of it.
const STOP_RESERVE: Duration = Duration::from_secs(15);

/// The way to the service manager. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Notifier {
    /// `None`: nobody listens.
    socket: Option<Arc<UnixDatagram>>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Connects to the manager if there is one. If that fails nothing depends on it: it is logged.
    #[must_use]
    pub fn new(manager: &ServiceManager) -> Self {
        let Some(name) = &manager.notify_socket else { return Self::default() };
        match connect(name) {
            Ok(socket) => Self { socket: Some(Arc::new(socket)), watchdog: manager.watchdog },
            Err(error) => {
                tracing::warn!(socket = %name.display(), %error, "the service manager cannot be told anything");
                Self::default()
            }
        }
    }

    /// True if somebody listens.
    #[must_use]
    pub fn is_heard(&self) -> bool {
        self.socket.is_some()
    }

    /// A reload begins. [`Self::reloaded`] ends it, whatever came of it.
    pub fn reloading(&self) {
        // `Type=notify-reload` insists on the time.
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            self.send(&[NotifyState::Reloading, now]);
        }
    }

    /// A reload is over.
    pub fn reloaded(&self) {
        self.send(&[NotifyState::Ready]);
    }

    /// Has the manager keep an open file for the next life of the service.
    pub(crate) fn store(&self, name: &str, file: BorrowedFd<'_>) -> bool {
        self.transmit(&format!("FDSTORE=1\nFDNAME={name}"), &[file])
    }

    /// Has the manager close what it keeps under a name.
    pub(crate) fn forget(&self, name: &str) -> bool {
        self.transmit(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    fn send(&self, states: &[NotifyState<'_>]) -> bool {
        let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
        self.transmit(&lines.join("\n"), &[])
    }

    /// One message; `false` if it was not taken.
    fn transmit(&self, message: &str, files: &[BorrowedFd<'_>]) -> bool {
        let Some(socket) = &self.socket else { return false };
        let numbers: Vec<i32> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if files.is_empty() { &[] } else { rights.as_slice() };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        match sendmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &[IoSlice::new(message.as_bytes())],
            control,
            flags,
            None,
        ) {
            Ok(_) => true,
            Err(error) => {
                tracing::debug!(%error, message, "the service manager did not take a message");
                false
            }
        }
    }
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// What was said, and when it is time to say something again.
#[derive(Debug)]
pub(crate) struct Herald {
    notifier: Notifier,
    was_ready: bool,
    was_reloading: bool,
    was_stopping: bool,
    status: String,
    /// What `status` was about.
    seen: Option<(Health, usize)>,
    status_at: Duration,
    extend_at: Duration,
    feed_at: Duration,
}

impl Herald {
    pub(crate) fn new(notifier: Notifier) -> Self {
        Self {
            notifier,
            was_ready: false,
            was_reloading: false,
            was_stopping: false,
            status: String::new(),
            seen: None,
            status_at: Duration::ZERO,
            extend_at: Duration::ZERO,
            feed_at: Duration::ZERO,
        }
    }

    /// When to look again at the latest.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        if !self.notifier.is_heard() {
            return None;
        }
        let feed = self.notifier.watchdog.map(|_| self.feed_at);
        let is_loading = !self.was_stopping && (!self.was_ready || self.was_reloading);
        let extend = is_loading.then_some(self.extend_at);
        [Some(self.status_at), feed, extend].into_iter().flatten().min()
    }

    /// Says what is due. Called by the event loop each time round.
    pub(crate) fn look(&mut self, state: &State, now: Duration) {
        if !self.notifier.is_heard() {
            return;
        }
        if let Some(period) = self.notifier.watchdog
            && self.feed_at <= now
        {
            self.notifier.send(&[NotifyState::Watchdog]);
            self.feed_at = now + period / 3;
        }
        let is_stopping = state.health() == Health::Draining;
        if is_stopping && !self.was_stopping {
            let time = NotifyState::ExtendTimeoutUsec(micros(state.drain_timeout() + STOP_RESERVE));
            self.was_stopping = self.notifier.send(&[NotifyState::Stopping, time]);
        }
        // The first worker of a new configuration loads, too, and `systemctl reload` waits for it.
        let is_reloading = !is_stopping && state.edition_on_trial().is_some();
        if is_reloading && !self.was_reloading {
            self.extend_at = now;
        }
        self.was_reloading = is_reloading;
        if !self.was_ready && !is_stopping {
            self.look_at_start(state, now);
        } else if is_reloading {
            self.ask_for_time(now);
        }
        self.tell_status(state, now);
    }

    fn look_at_start(&mut self, state: &State, now: Duration) {
        match state.readiness() {
            Readiness::Ready(_) => {
                let status = status_line(state);
                let pid = NotifyState::MainPid(std::process::id());
                self.was_ready = self.notifier.send(&[NotifyState::Ready, pid, NotifyState::Status(&status)]);
                self.status = status;
                self.extend_at = now + STATUS_INTERVAL; // Tried again then if it was not taken.
            }
            Readiness::Starting => self.ask_for_time(now),
            // The process is about to end, and its exit code says why.
            Readiness::Failed { .. } => self.extend_at = now + LOAD_EXTENSION_INTERVAL,
        }
    }

    /// Asks for more time to load, if that is due.
    fn ask_for_time(&mut self, now: Duration) {
        if self.extend_at <= now {
            self.notifier.send(&[NotifyState::ExtendTimeoutUsec(micros(LOAD_EXTENSION))]);
            self.extend_at = now + LOAD_EXTENSION_INTERVAL;
        }
    }

    fn tell_status(&mut self, state: &State, now: Duration) {
        let about = Some((state.health(), state.n_ready()));
        if now < self.status_at && about == self.seen {
            return;
        }
        self.seen = about;
        self.status_at = now + STATUS_INTERVAL;
        let status = status_line(state);
        if status != self.status && self.notifier.send(&[NotifyState::Status(&status)]) {
            self.status = status;
        }
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// What `systemctl status` shows.
fn status_line(state: &State) -> String {
    let health = match state.health() {
        Health::Starting => "starting",
        Health::Ready => "ready",
        Health::Degraded => "degraded",
        Health::Draining => "draining",
    };
    let n_running: usize = state.slots().iter().map(|slot| slot.n_jobs()).sum();
    format!(
        "{health}: {} of {} workers ready, {n_running} jobs running, {} of {} waiting",
        state.n_ready(),
        state.slots().len(),
        state.n_queued(),
        state.queue_max(),
    )
}
