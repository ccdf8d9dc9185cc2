//! The wire protocol of bitnetd: versioned handshake, length-prefixed frames, messages, error and exit codes.
//!
//! Two links speak it: a local client with the supervisor ([`client_link`]) and the supervisor with a worker
//! ([`worker_link`]). Both carry JSON in frames with a hard size limit, so that a peer in any language is a
//! page of code. `proto/PROTOCOL.md` is the specification.

#![forbid(unsafe_code)]

pub mod client; // The blocking client that the command line uses.
pub mod client_link; // Client <-> supervisor.
pub mod durable; // Jobs that survive everything.
pub mod error; // What a failure looks like on the wire.
pub mod event; // What comes back, token by token.
pub mod exit_code;
mod float; // Exact floats in JSON.
pub mod frame; // Bytes <-> messages.
pub mod handshake;
pub mod kept; // Sealed memory in a file, for a later process.
pub mod limits;
pub mod request; // What a client asks for.
pub mod sealed; // Memory handed over by descriptor.
pub mod status; // The state of the service.
mod validate; // Which requests are refused at the door.
pub mod worker_link; // Supervisor <-> worker.

/// Version of both links. A peer with another version is refused at the handshake.
pub const PROTOCOL_VERSION: u32 = 1;
