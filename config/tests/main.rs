//! The configuration file from outside: what is accepted, what is refused and in which words.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod example; // example.toml is the defaults.
mod problems; // Every problem at once, with line and hint.
mod round_trip; // Config -> TOML -> Config.
