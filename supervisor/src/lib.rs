//! The parent process: slots, spawn, watch, restart, admission, routing, fail-over.
//!
//! Decisions live in `state` (pure), effects in `event_loop`, `child` and `link`, clients in `listener` and
//! `connection`. It touches no model arithmetic and no tokenizer, so nothing in a model can bring it down.
//! `README.md` beside it has the state diagram and the tables.

mod activation; // What systemd passes on: sockets and stored memory.
mod backoff; // How long a slot waits, and when it gives up.
mod child; // One worker process.
mod connection; // One client.
mod durable; // Jobs that survive everything: who waits, what is next.
mod editions; // What each slot's workers are started with.
mod event_loop; // The one task that owns the state.
mod files; // Locks beside files, and the state files are in.
mod image; // The model every worker inherits.
mod journal; // The file that keeps durable jobs.
mod kept_image; // The fast image on disk.
mod link; // The task of one worker.
mod listener; // The socket.
mod log; // What the log says.
mod meter; // How fast a counter grows.
mod metrics; // What is counted and measured.
mod monitor; // What workers use of the machine.
mod node_copy; // Copies of the model, one for a memory node.
mod notify; // What systemd is told.
mod own_cpus; // Where the supervisor itself may run.
mod peer; // Who a client is.
mod privileges; // What the supervisor gives up.
mod report; // The state in words of the wire.
mod scrape; // Metrics over HTTP.
mod service; // The face to the rest of the program.
mod shelf; // What systemd keeps for us between two lives.
mod state; // The state machine.
mod worker_log; // What workers write to stderr.

pub use activation::{Activation, ActivationError};
pub use image::{ImageError, ModelSource};
pub use journal::{Journal, JournalError};
pub use listener::{ListenError, Listener};
pub use notify::Notifier;
pub use own_cpus::given_affinity;
pub use privileges::{PrivilegeError, allow_locked_memory, reduce as reduce_privileges};
pub use scrape::{ScrapeError, ScrapeListener};
pub use service::{Job, JobEvent, Reloader, Service, ServiceSpec, StartError};
pub use state::ClientId;
