//! Tests of the engine through its public interface, on the built-in story model.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod golden; // Against transformers.
mod memory; // Steps that allocate nothing.
mod same_answer; // Promise P4.
mod sequences; // Admission, cancellation, ends.
mod speculation; // Guesses change nothing.
mod support;
