//! `bitnetd top`: the daemon at work, on the whole screen, until somebody presses `q`.
//!
//! The main thread draws and hears keys and signals; another one asks the daemon. Nothing here knows more than
//! `bitnetd status --json` prints.

mod cores; // Every core in as many rows as there are.
mod draw; // One frame.
mod palette; // Colours, or none.
mod tables; // Workers and jobs in rows.
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use bitnetd_config::Environment;
use bitnetd_proto::client::{Client, ClientError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::status::StatusReport;
use clap::Args;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::{DefaultTerminal, Terminal};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::daemon::{self, SocketArgs};
use crate::error::{CliError, chain};
use crate::terminal;
use draw::{Focus, View};
use palette::Palette;

pub(crate) use tables::memory;

/// How long the daemon may take to answer before the screen says so.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How often signals and answers are looked for while no key is pressed.
const TICK: Duration = Duration::from_millis(100);
/// Width of a frame that nobody's screen bounds.
const TEXT_WIDTH: u16 = 80;
/// Longest frame as text.
const TEXT_HEIGHT_MAX: u16 = 2000;
/// Rows that PgUp and PgDn move.
const PAGE: usize = 10;

/// `bitnetd top`
#[derive(Debug, Args)]
#[command(after_help = "\
Cores have the colour of the worker that owns them (NO_COLOR: none); `░` is what the hypervisor took. For each worker:
tokens/s of prompts and of answers, CPU (busy share of its threads), WAIT (share of the time in which they could have run
and had no CPU), KV (of its cache), PSS (its share of what is in memory; `~`: shared pages in full), REST (restarts).

Keys: q, Esc or Ctrl-C quit; Tab chooses the table that the arrows, PgUp, PgDn, Home and End scroll.")]
pub(crate) struct TopArgs {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,
    /// Print one frame as plain text and end; needs no terminal
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    socket: SocketArgs,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected seconds from 0.1 to 3600".to_owned()),
    }
}

/// Runs the command.
pub(crate) fn main(args: &TopArgs) -> Result<ExitCode, CliError> {
    if args.once {
        let report = args.socket.connect()?.status()?;
        let width = io::stdout().is_terminal().then(|| ratatui::crossterm::terminal::size().ok()).flatten();
        let width = width.map_or(TEXT_WIDTH, |(width, _)| width.max(TEXT_WIDTH));
        let height = draw::ideal_height(&report, width).min(TEXT_HEIGHT_MAX);
        terminal::put(as_text(&plain(&report), width, height)?.as_bytes())?;
        return Ok(ExitCode::Ok);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(CliError::new(ExitCode::Usage, "`top` needs a terminal")
            .hint("--once prints one frame as text; `bitnetd status --json` has everything"));
    }
    // If nobody is there now, that is an error like any other; later on it is something to show.
    let socket = args.socket.find()?;
    drop(daemon::connect(&socket)?);
    let is_told_to_end = Arc::new(AtomicBool::new(false));
    // Not SIGHUP: it says that the terminal is gone, so there is nothing to put back, and its default is to end.
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register(signal, is_told_to_end.clone())
            .map_err(|error| CliError::os("handle signals", error))?;
    }
    let looks = watch(socket, args.interval)?;
    let mut screen = Screen::new(args.interval, Palette::new(!Environment::read().no_color));
    // Also puts the terminal back if this process panics.
    let mut terminal = ratatui::try_init().map_err(|error| CliError::os("take over the terminal", error))?;
    let outcome = screen.run(&mut terminal, &looks, &is_told_to_end);
    let restored = ratatui::try_restore();
    outcome.and(restored).map_err(|error| CliError::os("draw on the terminal", error))?;
    Ok(ExitCode::Ok)
}

/// A frame without colours and keys.
fn plain(report: &StatusReport) -> View<'_> {
    View {
        report: Some(report),
        trouble: None,
        focus: Focus::default(),
        first_worker: 0,
        first_job: 0,
        interval: None,
        palette: Palette::new(false),
    }
}

/// A frame as lines of text.
fn as_text(view: &View<'_>, width: u16, height: u16) -> Result<String, CliError> {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
    let Ok(_frame) = terminal.draw(|frame| draw::draw(frame, view));
    let cells = terminal.backend().buffer().content();
    let line = |cells: &[ratatui::buffer::Cell]| {
        let text: String = cells.iter().map(ratatui::buffer::Cell::symbol).collect();
        format!("{}\n", text.trim_end())
    };
    Ok(cells.chunks(usize::from(width.max(1))).map(line).collect())
}

/// What came of asking the daemon.
type Look = Result<Box<StatusReport>, String>;

/// Asks the daemon again and again, from a thread of its own; connects anew when it went away.
fn watch(socket: PathBuf, interval: Duration) -> Result<Receiver<Look>, CliError> {
    // One that waits is enough: whoever draws wants the newest.
    let (sender, looks) = sync_channel(1);
    let ask = move || ask_for_ever(&socket, interval, &sender);
    std::thread::Builder::new()
        .name("status".into())
        .spawn(ask)
        .map_err(|error| CliError::os("start a thread", error))?;
    Ok(looks)
}

fn ask_for_ever(socket: &Path, interval: Duration, looks: &SyncSender<Look>) {
    let mut client = None;
    loop {
        let begun = Instant::now();
        let look = ask(&mut client, socket).map(Box::new).map_err(|error| chain(&error));
        if look.is_err() {
            client = None;
        }
        if looks.send(look).is_err() {
            return; // Nobody draws any more.
        }
        std::thread::park_timeout(interval.saturating_sub(begun.elapsed()));
    }
}

fn ask(client: &mut Option<Client>, socket: &Path) -> Result<StatusReport, ClientError> {
    let client = match client {
        Some(client) => client,
        None => client.insert(daemon::connect_once(socket, ANSWER_TIMEOUT)?),
    };
    client.status()
}

/// What a tick brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// Keys, a signal, or nothing.
    Something,
    /// Nobody is at the other end of the terminal any more.
    Hangup,
}

/// Waits for a key, one tick at most.
fn key_or_hangup() -> io::Result<Heard> {
    let stdin = io::stdin();
    let mut terminal = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    let tick = PollTimeout::try_from(TICK).map_err(io::Error::other)?;
    match nix::poll::poll(&mut terminal, tick) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    let is_gone = terminal[0].revents().is_some_and(|events| events.intersects(gone));
    Ok(if is_gone { Heard::Hangup } else { Heard::Something })
}

/// What is on the screen, and where its tables are scrolled to.
#[derive(Debug)]
struct Screen {
    report: Option<Box<StatusReport>>,
    trouble: Option<(String, Instant)>,
    focus: Focus,
    first_worker: usize,
    first_job: usize,
    interval: Duration,
    palette: Palette,
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Continue,
    Quit,
}

impl Screen {
    fn new(interval: Duration, palette: Palette) -> Self {
        let (focus, first_worker, first_job) = (Focus::default(), 0, 0);
        Self { report: None, trouble: None, focus, first_worker, first_job, interval, palette }
    }

    fn run(
        &mut self,
        terminal: &mut DefaultTerminal,
        looks: &Receiver<Look>,
        is_told_to_end: &AtomicBool,
    ) -> io::Result<()> {
        let mut drawn_at: Option<Instant> = None;
        while !is_told_to_end.load(Ordering::Relaxed) {
            let mut is_new = false;
            loop {
                match looks.try_recv() {
                    Ok(look) => {
                        self.take(look);
                        is_new = true;
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        return Err(io::Error::other("the thread that asks the daemon is gone"));
                    }
                }
            }
            // Once a second, because the age of a trouble grows.
            if is_new || drawn_at.is_none_or(|at| at.elapsed() >= Duration::from_secs(1)) {
                terminal.draw(|frame| draw::draw(frame, &self.view()))?;
                drawn_at = Some(Instant::now());
            }
            // crossterm reads for ever from a terminal that is gone (where SIGHUP is ignored, as under nohup).
            if key_or_hangup()? == Heard::Hangup {
                return Ok(());
            }
            while event::poll(Duration::ZERO)? {
                match event::read()? {
                    Event::Key(key) if self.obey(key) == Next::Quit => return Ok(()),
                    Event::Key(_) | Event::Resize(..) => drawn_at = None,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, look: Look) {
        match look {
            Ok(report) => {
                self.report = Some(report);
                self.trouble = None;
            }
            Err(text) => {
                let since = self.trouble.take().map_or_else(Instant::now, |(_, since)| since);
                self.trouble = Some((text, since));
            }
        }
    }

    fn obey(&mut self, key: KeyEvent) -> Next {
        if key.kind == KeyEventKind::Release {
            return Next::Continue;
        }
        let report = self.report.as_deref();
        let (first, n_rows) = match self.focus {
            Focus::Workers => (&mut self.first_worker, report.map_or(0, |report| report.slots.len())),
            Focus::Jobs => (&mut self.first_job, report.map_or(0, |report| report.jobs.len())),
        };
        // The table shows its end if there is less below than fits.
        let last = n_rows.saturating_sub(1);
        *first = (*first).min(last);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Next::Quit,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Next::Quit,
            KeyCode::Tab | KeyCode::BackTab => {
                self.focus = if self.focus == Focus::Jobs { Focus::Workers } else { Focus::Jobs };
            }
            KeyCode::Up => *first = first.saturating_sub(1),
            KeyCode::Down => *first = (*first + 1).min(last),
            KeyCode::PageUp => *first = first.saturating_sub(PAGE),
            KeyCode::PageDown => *first = (*first + PAGE).min(last),
            KeyCode::Home => *first = 0,
            KeyCode::End => *first = last,
            _ => {}
        }
        Next::Continue
    }

    fn view(&self) -> View<'_> {
        View {
            report: self.report.as_deref(),
            trouble: self.trouble.as_ref().map(|(text, since)| (text.as_str(), since.elapsed())),
            focus: self.focus,
            first_worker: self.first_worker,
            first_job: self.first_job,
            interval: Some(self.interval),
            palette: self.palette,
        }
    }
}
