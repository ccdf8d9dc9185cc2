//! What a worker can and cannot do in its sandbox, tried by a process that is in it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod sandbox;
