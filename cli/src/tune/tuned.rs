//! What `profile = "auto"` knows: the winners of earlier sweeps, for each machine and model.

use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

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
    /// When, in seconds since 1970; files of earlier versions do not say.
    #[serde(default)]
    measured_unix_s: u64,
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
        measured_unix_s: UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
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
/// here: workers and threads, affinity, and the evidence.
pub(crate) fn tuned_split(
    machine: &Machine,
    config: &Config,
) -> Option<((usize, usize), AffinityConfig, String)> {
    if config.split != SplitConfig::Profile(Profile::Auto) {
        return None;
    }
    let place = Place::new(machine, config).ok()?;
    let tuned = read().into_iter().find(|tuned| tuned.place == place)?;
    let cores = if tuned.is_performance_only { CoreChoice::Performance } else { config.affinity.cores };
    let affinity = AffinityConfig { cores, ..config.affinity.clone() };
    Some(((tuned.workers, tuned.threads), affinity, tuned.evidence_words()))
}

impl Tuned {
    /// When, and by how much.
    fn evidence_words(&self) -> String {
        let when = match self.measured_unix_s {
            0 => String::new(),
            seconds => {
                // "Sun, 06 Nov 1994 08:49:37 GMT"
                let date = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(seconds));
                date.get(5..16).map_or_else(String::new, |day| format!(" on {day}"))
            }
        };
        format!("measured here by `tune`{when}: {}", self.evidence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_evidence_says_when() {
        let place = Place { processor: "p".into(), cpus: "0-1".into(), model: "m".into(), model_bytes: 1 };
        let (workers, threads, is_performance_only) = (1, 2, false);
        let evidence = "1x2 wins, 9.0 % ahead of 2x1.".to_owned();
        let tuned = |measured_unix_s| {
            let (place, evidence) = (place.clone(), evidence.clone());
            Tuned { place, workers, threads, is_performance_only, evidence, measured_unix_s }
        };
        let words = tuned(784_111_777).evidence_words();
        assert_eq!(words, "measured here by `tune` on 06 Nov 1994: 1x2 wins, 9.0 % ahead of 2x1.");
        assert_eq!(tuned(0).evidence_words(), "measured here by `tune`: 1x2 wins, 9.0 % ahead of 2x1.");
    }
}
