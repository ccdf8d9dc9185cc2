//! What the machine can do at best with some of its CPUs: read memory, multiply small integers.

use bitnetd_engine::kernels::probe::{ProbeMemory, integer_peak, read_bandwidth};
use bitnetd_engine::kernels::{Isa, KernelSet};
use bitnetd_engine::pool::{PoolOptions, ThreadPool, Wait};
use bitnetd_proto::exit_code::ExitCode;
use serde::Serialize;

use super::BoundBy;
use crate::error::CliError;

/// Memory to read: more than caches hold.
const PROBE_BYTES: usize = 512 << 20;

/// The limits of some CPUs together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Bounds {
    /// Threads, one on each CPU.
    pub threads: usize,
    /// Bytes read in a second.
    pub read_bytes_per_s: f64,
    /// Multiplications of an unsigned with a signed byte, added up, in a second.
    pub macs_per_s: f64,
    /// By how much the better of two measurements, before and after the rates, is better than the other, as a share of it: how
    /// steady the machine was.
    pub moved: f64,
}

/// Measures both on these CPUs.
pub(crate) fn measure(isa: &str, cpus: &[u32]) -> Result<Bounds, CliError> {
    let kernels = match isa.parse::<Isa>() {
        Ok(isa) => KernelSet::for_isa(isa).ok_or_else(|| {
            CliError::new(ExitCode::Config, format!("this CPU cannot run the `{isa}` kernels"))
        })?,
        Err(_) => KernelSet::detect(),
    };
    let options = PoolOptions {
        cpus: cpus.iter().copied().map(Some).collect(),
        wait: Wait::Hybrid,
        name: "probe".into(),
    };
    // On a thread of its own: a pool pins the thread that starts it.
    let probe = move || -> Result<Bounds, CliError> {
        let threads = options.cpus.len();
        let memory =
            ProbeMemory::new(PROBE_BYTES).map_err(|error| CliError::os("get memory to read", error))?;
        let pool = ThreadPool::new(options).map_err(|error| CliError::with_code(ExitCode::Os, error))?;
        Ok(Bounds {
            threads,
            read_bytes_per_s: read_bandwidth(kernels, &pool, memory.bytes()),
            macs_per_s: integer_peak(kernels, &pool),
            moved: 0.0,
        })
    };
    match std::thread::spawn(probe).join() {
        Ok(bounds) => bounds,
        Err(_) => Err(CliError::new(ExitCode::Software, "the measurement of the machine's limits failed")),
    }
}

impl Bounds {
    /// The better of both: a rate is no larger a share of what the machine can do because it was slower for a while.
    pub(crate) fn or_better(self, later: Self) -> Self {
        let pairs = [(self.read_bytes_per_s, later.read_bytes_per_s), (self.macs_per_s, later.macs_per_s)];
        let [read_bytes_per_s, macs_per_s] = pairs.map(|(a, b)| a.max(b));
        let moved = pairs.map(|(a, b)| a.max(b) / a.min(b) - 1.0).into_iter().fold(0.0, f64::max);
        Self { threads: self.threads, read_bytes_per_s, macs_per_s, moved }
    }

    /// Steps of `n_rows` tokens each: the most tokens in a second, and what it is that limits them.
    #[expect(clippy::cast_precision_loss, reason = "a rate, good to a few digits")]
    pub(crate) fn tokens_per_s(&self, step_bytes: u64, macs_per_token: u64, n_rows: usize) -> (f64, BoundBy) {
        let reading = self.read_bytes_per_s / step_bytes.max(1) as f64 * n_rows as f64;
        let multiplying = self.macs_per_s / macs_per_token.max(1) as f64;
        if reading < multiplying { (reading, BoundBy::Reading) } else { (multiplying, BoundBy::Multiplying) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_are_bound_by_reading_and_many_by_multiplying() {
        let bounds = Bounds { threads: 2, read_bytes_per_s: 1000.0, macs_per_s: 8000.0, moved: 0.0 };
        assert_eq!(bounds.tokens_per_s(100, 200, 1), (10.0, BoundBy::Reading));
        assert_eq!(bounds.tokens_per_s(100, 200, 8), (40.0, BoundBy::Multiplying));
    }

    #[test]
    fn the_better_of_two_measurements_counts() {
        let before = Bounds { threads: 2, read_bytes_per_s: 1000.0, macs_per_s: 9000.0, moved: 0.0 };
        let after = Bounds { read_bytes_per_s: 1250.0, macs_per_s: 8000.0, ..before };
        let expected = Bounds { threads: 2, read_bytes_per_s: 1250.0, macs_per_s: 9000.0, moved: 0.25 };
        assert_eq!((before.or_better(after), after.or_better(before)), (expected, expected));
        assert_eq!(before.or_better(before), before);
    }
}
