//! Tests of the engine through its public interface, on the built-in story model.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod fast_image; // What decoding reads instead of the file.
mod golden; // Against transformers.
mod memory; // Steps that allocate nothing.
mod same_answer; // Promise P4.
mod sequences; // Admission, cancellation, ends.
mod speculation; // Guesses change nothing.
mod support;
