//! What a sweep has measured so far, in a file, so that it can go on after a break.
//!
//! The first line says of what sweep; each further line is one trial. A sweep of anything else starts a new file.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;

use bitnetd_config::{Config, cpu_list};
use bitnetd_placement::{Candidate, Machine};
use serde::{Deserialize, Serialize};

use super::sweep::Sweep;
use super::trial::{Bench, Measurement};
use super::tuned;
use crate::error::CliError;

/// What was swept, where, and by what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) program: String,
    pub(super) place: Place,
    workloads: Vec<String>,
    splits: Vec<String>,
    is_quick: bool,
    engine: String,
}

/// A machine with a model: what a split is best for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// Name of the processor.
    pub(super) processor: String,
    /// CPUs that there are to use, in the kernel's list form.
    pub(super) cpus: String,
    /// File name of the model.
    pub(super) model: String,
    /// Size of the model.
    pub(super) model_bytes: u64,
}

impl Place {
    /// # Errors
    /// If the model is not to be found.
    pub(super) fn new(machine: &Machine, config: &Config) -> Result<Self, CliError> {
        let (model, model_bytes) = match &config.model.path {
            None => ("built-in".into(), 0),
            Some(path) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let found = std::fs::metadata(path).map_err(|source| CliError::file("find", path, source))?;
                (name, found.len())
            }
        };
        let cpus = cpu_list::format(&machine.usable(&config.affinity.reserve));
        let processor = machine.model_name.clone().unwrap_or_else(|| "unknown processor".into());
        Ok(Self { processor, cpus, model, model_bytes })
    }
}

impl Identity {
    pub(super) fn new(place: Place, bench: &Bench, candidates: &[Candidate]) -> Self {
        Self {
            program: concat!("bitnetd ", env!("CARGO_PKG_VERSION")).into(),
            place,
            workloads: bench.workloads.iter().map(|workload| workload.name().to_owned()).collect(),
            splits: candidates.iter().map(ToString::to_string).collect(),
            is_quick: bench.is_quick,
            engine: format!("{:?} {:?} {:?}", bench.config.model, bench.config.engine, bench.config.affinity),
        }
    }
}

/// One trial.
#[derive(Debug, Serialize, Deserialize)]
struct Trial {
    split: usize,
    measurements: Vec<Measurement>,
}

/// The file.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    known: Vec<Trial>,
}

/// Most trials that are read.
const N_LINES_MAX: usize = 10_000;

impl Journal {
    /// Opens what an earlier sweep of the same identity left, unless `is_fresh`; else begins anew.
    pub(super) fn open(identity: &Identity, is_fresh: bool) -> Result<Self, CliError> {
        let path = tuned::state_file("tune.jsonl")?;
        let known = if is_fresh { None } else { read(&path, identity) };
        let at = |source| CliError::file("write", &path, source);
        let is_known = known.is_some();
        let mut file = OpenOptions::new()
            .create(true)
            .append(is_known)
            .write(true)
            .truncate(!is_known)
            .open(&path)
            .map_err(at)?;
        if !is_known {
            file.write_all(crate::answer::json_line(identity)?.as_bytes()).map_err(at)?;
        }
        Ok(Self { path, file, known: known.unwrap_or_default() })
    }

    /// Tells the sweep what is known already; says how many trials that is.
    pub(super) fn replay(&mut self, sweep: &mut Sweep) -> usize {
        let mut n_known = 0;
        for trial in self.known.drain(..) {
            // Only what would be measured next counts: a damaged file must not lead astray.
            if sweep.next().is_some_and(|(split, _)| split == trial.split) {
                sweep.add(trial.split, trial.measurements);
                n_known += 1;
            }
        }
        n_known
    }

    /// Writes one trial down.
    pub(super) fn add(&mut self, split: usize, measurements: &[Measurement]) -> Result<(), CliError> {
        let line = crate::answer::json_line(&Trial { split, measurements: measurements.to_vec() })?;
        self.file.write_all(line.as_bytes()).map_err(|source| CliError::file("write", &self.path, source))
    }

    /// The sweep is over: the next one starts anew.
    pub(super) fn finish(self) -> Result<(), CliError> {
        std::fs::remove_file(&self.path).map_err(|source| CliError::file("remove", &self.path, source))
    }
}

/// The trials in a file, if it is of this sweep. A last line that was cut is left out.
fn read(path: &std::path::Path, identity: &Identity) -> Option<Vec<Trial>> {
    let mut lines = BufReader::new(File::open(path).ok()?).lines().take(N_LINES_MAX).map_while(Result::ok);
    let first: Identity = serde_json::from_str(&lines.next()?).ok()?;
    let trials = lines.map_while(|line| serde_json::from_str(&line).ok());
    (first == *identity).then(|| trials.collect())
}
