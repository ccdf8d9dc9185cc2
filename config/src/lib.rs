//! bitnetd's configuration: one TOML file to a validated [`Config`].
//!
//! The only crate that reads the environment. The file is read into a tree with the place of every value, every
//! problem is collected with its line, and what is left is typed: nothing downstream checks or fills in defaults
//! again. The tree is walked by hand and not by `serde`'s derive because that one stops at the first problem.
#![forbid(unsafe_code)]

mod choice; // The names of enum values, for the file, the command line and messages.
pub mod cpu_list; // `0-3,8`
mod effective; // `Config` to TOML.
mod environment; // The only reader of the environment, and the places it leads to.
mod load; // Text to `Config`.
mod problem; // What is wrong, and where.
mod reader; // A TOML table that knows its path and collects problems.
mod schema; // Every key there is, with its description.
mod sections; // The typed configuration.
mod service_manager; // What systemd says in the environment.
pub mod values; // Durations and modes.

pub use crate::choice::Choice;
pub use crate::environment::{Environment, SocketPathError};
pub use crate::load::CONFIG_FILE_BYTES_MAX;
pub use crate::problem::{ConfigErrors, LoadError, Problem};
pub use crate::schema::{ISAS, KEYS, Key, SPECULATIONS};
pub use crate::sections::{
    AffinityConfig, Config, Confinement, CopyPolicy, CoreChoice, DurableConfig, EngineConfig, HeadChoice,
    ListenConfig, LogConfig, LogFormat, MetricsAddress, ModelConfig, NumaPolicy, Place, Profile, QueueConfig,
    RestartConfig, SchedulerChoice, SecurityConfig, ServiceConfig, SmtPolicy, SplitConfig, WatchdogConfig,
};
pub use crate::service_manager::{InheritedFd, SERVICE_MANAGER_VARIABLES, ServiceManager};
