//! The prepared model on the service manager's shelf: kept while the service is restarted, so that the next process
//! need not prepare it again.
//!
//! What lies there is sealed, hence whole, and has a name that says what it was made of and by which program. Anything
//! else is not taken back, and cleared away.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bitnetd_config::{Choice as _, Config};
use bitnetd_proto::sealed::is_sealed;
use nix::sys::stat::{fstat, stat};

use crate::editions::Prepared;
use crate::files::FileState;
use crate::image::ModelImage;
use crate::notify::Notifier;

/// How often to look whether the workers have finished what is to be kept.
const INTERVAL: Duration = Duration::from_secs(1);
/// Longest name that systemd keeps.
const NAME_BYTES_MAX: usize = 255;

/// What is on the shelf, and what is put there.
#[derive(Debug)]
pub(crate) struct Shelf {
    notifier: Notifier,
    /// What lies there under our names.
    names: Vec<String>,
    look_at: Duration,
}

impl Shelf {
    /// Takes back what an earlier process left for this model; what is left of others is cleared away.
    pub(crate) fn open(
        notifier: Notifier,
        stored: Vec<(String, OwnedFd)>,
        config: &Config,
        image: &mut ModelImage,
    ) -> Self {
        let mut shelf = Self { notifier, names: Vec::new(), look_at: Duration::ZERO };
        let wanted = name(config, image);
        let mut others = Vec::new();
        for (name, memory) in stored {
            if shelf.names.is_empty() && Some(&name) == wanted.as_ref() && is_whole(&memory) {
                tracing::info!(
                    name,
                    bytes = size(&memory),
                    "the prepared model was kept by the service manager"
                );
                image.set_head(memory);
                shelf.names.push(name);
            } else {
                others.push(name);
            }
        }
        for name in others {
            tracing::info!(name, "what the service manager kept is of no use any more");
            // A name stands for everything that is kept under it.
            if !shelf.names.contains(&name) {
                shelf.notifier.forget(&name);
            }
        }
        shelf
    }

    /// When to look again; `None`: never, nobody keeps anything.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.notifier.is_heard().then_some(self.look_at)
    }

    /// Puts the prepared model on the shelf once it is whole, in place of another one.
    pub(crate) fn look(&mut self, present: &Prepared, now: Duration) {
        if !self.notifier.is_heard() || now < self.look_at {
            return;
        }
        self.look_at = now + INTERVAL;
        let image = &present.image;
        if !is_whole(image.head()) {
            return;
        }
        let Some(name) = name(&present.spec.config, image).filter(|name| !self.names.contains(name)) else {
            return;
        };
        if self.notifier.store(&name, image.head()) {
            for former in std::mem::take(&mut self.names) {
                self.notifier.forget(&former);
            }
            tracing::debug!(name, "the service manager keeps the prepared model");
            self.names.push(name);
        }
    }
}

/// Full, and nobody can change it any more.
fn is_whole(memory: impl AsFd) -> bool {
    is_sealed(&memory) == Ok(true) && size(&memory) > 0
}

fn size(memory: impl AsFd) -> i64 {
    fstat(memory).map_or(0, |stat| stat.st_size)
}

/// Says what it was made of: the model's file, how it is read, and the program, each in the state it is in now.
fn name(config: &Config, image: &ModelImage) -> Option<String> {
    // The built-in model is in memory, new in each process, and part of the program.
    let model = if image.is_built_in() {
        "built-in".into()
    } else {
        FileState::from(&fstat(image.model()).ok()?).to_string()
    };
    let program = FileState::from(&stat("/proc/self/exe").ok()?);
    // Which parts the first worker makes also follows from the instruction set, and where it puts them from the pages.
    let engine = &config.engine;
    let how = format!("{}.{}.{}", config.model.head.name(), engine.isa, engine.huge_pages);
    let name = format!("prepared.{how}.{model}.{program}");
    (name.len() <= NAME_BYTES_MAX).then_some(name)
}
