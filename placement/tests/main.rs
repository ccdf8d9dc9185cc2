//! Plans for recorded machines, as an expert would sign them, and what holds for every plan.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod machines; // What is read out of recorded trees.
mod memory; // How much there is to take.
mod plans; // Plans with their reasons, as snapshots.
mod properties; // What holds for every plan on every machine.
mod refusals; // What is impossible, and in which words.
mod support; // Machines described in a few lines, written as trees.
mod usage; // Counters of CPUs, threads and memory.
