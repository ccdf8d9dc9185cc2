//! The prepared model on the service manager's shelf: kept while the service is restarted, so that the next process
//! need not prepare it again. That is the fast image, and the copies of the model that memory nodes have of their own:
//! their pages stay on their nodes.
//!
//! What lies there is sealed, hence whole, and has a name that says what it was made of and by which program. Anything
//! else is not taken back, and cleared away.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bitnetd_config::Config;
use nix::sys::stat::fstat;

use crate::editions::Prepared;
use crate::image::{ModelImage, is_whole, made_of};
use crate::node_copy::NodeCopies;
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
        (image, copies): (&mut ModelImage, &mut NodeCopies),
    ) -> Self {
        let mut shelf = Self { notifier, names: Vec::new(), look_at: Duration::ZERO };
        let wanted = names(config, image, copies);
        let mut others = Vec::new();
        for (name, memory) in stored {
            let part = wanted.iter().find(|(wanted, _)| *wanted == name).map(|(_, part)| *part);
            let bytes = size(&memory);
            let is_fit = |part: &Part| is_whole(&memory) && (part.is_image() || bytes == size(image.model()));
            match part.filter(is_fit).filter(|_| !shelf.names.contains(&name)) {
                Some(part) if part.put_back(memory, image, copies) => {
                    tracing::info!(name, bytes, "the prepared model was kept by the service manager");
                    shelf.names.push(name);
                }
                _ => others.push(name),
            }
        }
        for name in others {
            tracing::info!(name, "what the service manager kept is of no use any more");
            // A name stands for everything that is kept under it.
            if !shelf.names.contains(&name) {
                let _not_taken = shelf.notifier.forget(&name);
            }
        }
        shelf
    }

    /// When to look again; `None`: never, nobody keeps anything.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.notifier.is_heard().then_some(self.look_at)
    }

    /// Puts what is whole on the shelf, in place of what the present configuration has no use for.
    pub(crate) fn look(&mut self, present: &Prepared, now: Duration) {
        if !self.notifier.is_heard() || now < self.look_at {
            return;
        }
        self.look_at = now + INTERVAL;
        let wanted = names(&present.spec.config, &present.image, &present.copies);
        // First of all: systemd keeps no file twice, and takes the second name for the first.
        let Self { notifier, names, .. } = self;
        names.retain(|name| wanted.iter().any(|(wanted, _)| wanted == name) || !notifier.forget(name));
        for (name, part) in wanted {
            let Some(memory) = part.memory(present).filter(is_whole) else { continue };
            if !self.names.contains(&name) && self.notifier.store(&name, memory) {
                tracing::debug!(name, "the service manager keeps it");
                self.names.push(name);
            }
        }
    }
}

/// One memory that workers fill, seal and share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// The fast image.
    Image,
    /// A node's copy of the model.
    NodeModel(u32),
    /// A node's fast image.
    NodeImage(u32),
}

impl Part {
    fn is_image(self) -> bool {
        !matches!(self, Self::NodeModel(_))
    }

    /// Start of its name.
    fn kind(self) -> String {
        match self {
            Self::Image => "prepared".into(),
            Self::NodeModel(node) => format!("copy-{node}"),
            Self::NodeImage(node) => format!("prepared-{node}"),
        }
    }

    fn memory(self, of: &Prepared) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Image => Some(of.image.head()),
            Self::NodeModel(node) => of.copies.get(&node).map(|copy| copy.model()),
            Self::NodeImage(node) => of.copies.get(&node).map(|copy| copy.image()),
        }
    }

    /// In place of the empty memory that no worker has seen yet.
    fn put_back(self, memory: OwnedFd, image: &mut ModelImage, copies: &mut NodeCopies) -> bool {
        let (Self::NodeModel(node) | Self::NodeImage(node)) = self else {
            image.set_head(memory);
            return true;
        };
        let Some(copy) = copies.get_mut(&node).and_then(Arc::get_mut) else { return false };
        if self.is_image() {
            copy.set_image(memory);
        } else {
            copy.set_model(memory);
        }
        true
    }
}

fn size(memory: impl AsFd) -> i64 {
    fstat(memory).map_or(0, |stat| stat.st_size)
}

/// What there may be to keep. A name says what it was made of ([`made_of`]), and from which pages.
fn names(config: &Config, image: &ModelImage, copies: &NodeCopies) -> Vec<(String, Part)> {
    let Some(made_of) = made_of(config, image) else { return Vec::new() };
    let of_nodes = copies.keys().flat_map(|&node| [Part::NodeModel(node), Part::NodeImage(node)]);
    let parts = std::iter::once(Part::Image).chain(of_nodes);
    let pages = &config.engine.huge_pages;
    let names = parts.map(|part| (format!("{}.{pages}.{made_of}", part.kind()), part));
    names.filter(|(name, _)| name.len() <= NAME_BYTES_MAX).collect()
}
