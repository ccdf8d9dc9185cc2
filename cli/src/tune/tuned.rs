//! What `profile = "auto"` knows: the winners of earlier sweeps, for each machine and model.

use std::path::PathBuf;

use bitnetd_config::{AffinityConfig, Config, CoreChoice, Environment, Profile, SplitConfig};
use bitnetd_placement::Machine;
use bitnetd_proto::exit_code::ExitCode;
use serde::{Deserialize, Serialize};

use super::journal::{Identity, Place};
use super::report::Report;
use crate::error::CliError;
use crate::picture;

/// One winner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tuned {
    place: Place,
    workers: usize,
    threads: usize,
    is_performance_only: bool,
    /// Why, in one sentence.
    evidence: String,
}

/// Winners that are kept; the oldest go.
const N_KEPT_MAX: usize = 64;

/// A file of ours that outlives the process.
pub(super) fn state_file(name: &str) -> Result<PathBuf, CliError> {
    let dir = Environment::read().state_dir().ok_or_else(|| {
        CliError::new(ExitCode::Config, "there is no place to keep what is measured: HOME is not set")
            .hint("set XDG_STATE_HOME to a directory of yours")
    })?;
    std::fs::create_dir_all(&dir).map_err(|source| CliError::file("make", &dir, source))?;
    Ok(dir.join(name))
}

/// Keeps the winner.
pub(super) fn keep(identity: &Identity, report: &Report) -> Result<(), CliError> {
    let path = state_file("tuned.json")?;
    let winner = report.winner();
    let tuned = Tuned {
        place: identity.place.clone(),
        workers: winner.workers,
        threads: winner.threads,
        is_performance_only: winner.is_performance_only,
        evidence: report.evidence(),
    };
    let mut all = read();
    all.retain(|other| other.place != tuned.place);
    all.push(tuned);
    let n_old = all.len().saturating_sub(N_KEPT_MAX);
    all.drain(..n_old);
    let json =
        serde_json::to_vec_pretty(&all).map_err(|error| CliError::with_code(ExitCode::Software, error))?;
    picture::replace(&path, &json)
}

fn read() -> Vec<Tuned> {
    let Some(path) = Environment::read().state_dir().map(|dir| dir.join("tuned.json")) else {
        return Vec::new();
    };
    let Ok(text) = std::fs::read(&path) else { return Vec::new() };
    serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "what `tune` measured cannot be read; the rule for `auto` counts");
        Vec::new()
    })
}

/// What `tune` found best for this machine and model, if the configuration leaves the choice to it and it was asked
/// here: split, affinity, and why.
pub(crate) fn tuned_split(
    machine: &Machine,
    config: &Config,
) -> Option<(SplitConfig, AffinityConfig, String)> {
    if config.split != SplitConfig::Profile(Profile::Auto) {
        return None;
    }
    let place = Place::new(machine, config).ok()?;
    let tuned = read().into_iter().find(|tuned| tuned.place == place)?;
    let cores = if tuned.is_performance_only { CoreChoice::Performance } else { config.affinity.cores };
    Some((
        SplitConfig::Counts { workers: tuned.workers, threads: tuned.threads },
        AffinityConfig { cores, ..config.affinity.clone() },
        format!("`auto`: what `tune` measured here. {}", tuned.evidence),
    ))
}
