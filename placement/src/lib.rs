//! The machine as sysfs shows it, and the plan: which worker gets which CPUs and which memory node, and why.
//!
//! Everything is a pure function over the root of a file tree, so that a plan for any machine can be made and tested
//! from a recorded tree. Nothing here sets an affinity or a memory policy: the supervisor does, by the plan.
#![forbid(unsafe_code)]

mod cgroup; // What control groups leave to us.
mod machine; // The machine: CPUs, caches, nodes, limits.
pub mod memory; // How much there is to take.
mod plan; // From machine and configuration to workers.
mod read; // Machine out of a tree.
mod tree; // Small files below a root.
pub mod usage; // What the kernel counts about CPUs, threads and memory.

pub use crate::machine::{CoreKind, Cpu, Limits, Machine, Node};
pub use crate::plan::candidates::{Candidate, candidates};
pub use crate::plan::{Plan, PlanError, WorkerPlacement, plan, plan_as_measured};
