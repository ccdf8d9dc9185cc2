//! End to end: the real binary with its built-in model, real workers, real sockets, real signals.
//!
//! Each test has its own folder and socket. Nothing waits by the clock: `support::wait_for` polls with a deadline.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod bad_input; // Every wrong input has its words, its hint and its exit code.
mod batch; // Many prompts: the same answers with any split, resumed after a kill.
mod bench; // Rates, bounds and pictures.
mod daemon; // `serve` and its clients.
mod deaths; // Workers and supervisors that are killed.
mod durable; // Jobs that survive everything.
mod formats; // Every way that weights and heads are stored.
mod journal; // The journal of systemd, with a stand-in.
mod kept_image; // The fast image on disk.
mod memory; // Copies of the model, and memory that is locked.
mod metrics; // What is counted and measured, printed and scraped.
mod monitor; // What runs where, as `status`, `top` and `--stats` tell.
mod reload; // From one configuration to the next.
mod reuse; // What was read or said before saves work and changes nothing.
mod run; // One answer.
mod security; // What holds workers in, and who may connect.
mod support; // Start, watch, kill.
mod systemd; // Notifications and sockets, with a stand-in for systemd.
mod tune; // A sweep of splits.
mod vocabulary; // Models with a SentencePiece vocabulary.
