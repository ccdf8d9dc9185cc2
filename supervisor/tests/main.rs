//! The supervisor with real processes: the scripted worker of `tests/fake_worker`, real sockets, real signals.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod chaos; // Everything at once.
mod clients; // Over the socket: good, bad and slow ones.
mod durable; // Jobs that survive everything.
mod failover; // Workers die in the middle of answers.
mod lifecycle; // Start, drain, restart, orphans, descriptors.
mod misbehaviour; // Workers that lie, hang, or never come up.
mod reload; // From one configuration to the next.
mod socket; // Taking and giving back the socket.
mod support;
