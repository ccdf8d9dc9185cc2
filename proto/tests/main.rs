//! The codec and the messages through the public API only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod codec; // Frames: identity, splits, garbage.
mod messages; // What the JSON looks like.
mod strategies; // Random messages.
