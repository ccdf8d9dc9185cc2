//! `bitnetd model prepare`: the fast image of a model, made and kept before anybody waits for it.

use std::path::PathBuf;
use std::time::Duration;

use bitnetd_config::{Config, HeadChoice};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::status::{KeptImageState, StatusReport};
use bitnetd_proto::worker_link::ImageState;
use clap::Args;
use tokio::time::{Instant, sleep};

use crate::bench::heads;
use crate::error::CliError;
use crate::local::{self, Local};
use crate::logging::{self, LogArgs};
use crate::{runtime, terminal};

/// A slow disk writes a few hundred megabytes in this time.
const DEADLINE: Duration = Duration::from_secs(600);

/// How often the worker and the disk are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
#[command(after_help = "\
Decoding reads a fast image of the model: fewer bytes, the same tokens. `serve` makes it beside its jobs and keeps it; this makes it now,
so that the first `run` or `batch` has it as well. A changed model, or another version of bitnetd, wants a new one. `model.image_cache` in the
configuration says where images are kept; they may be deleted at any time.")]
pub(super) struct PrepareArgs {
    /// The model
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// As `model.head` in the configuration; "fast": also if the model is small
    #[arg(long, value_name = "HEAD", value_parser = heads())]
    head: Option<HeadChoice>,
}

pub(super) fn main(args: &PrepareArgs, log: &LogArgs) -> Result<ExitCode, CliError> {
    let mut config = Config { split: local::one_worker(None), ..Config::default() };
    config.model.path =
        Some(std::path::absolute(&args.file).map_err(|source| CliError::file("find", &args.file, source))?);
    config.model.head = args.head.unwrap_or_default();
    config.engine.max_batch = 1;
    config.log.level = logging::worker_filter(log);
    let outcome = runtime::block_on(Local::with(config, prepare))?;
    terminal::put(format!("{outcome}\n").as_bytes())?;
    Ok(ExitCode::Ok)
}

async fn prepare(local: Local) -> Result<String, CliError> {
    let deadline = Instant::now() + DEADLINE;
    while Instant::now() < deadline {
        if let Some(outcome) = outcome(&local.status().await)? {
            return Ok(outcome);
        }
        sleep(LOOK_INTERVAL).await;
    }
    Err(CliError::new(ExitCode::Os, format!("the fast image was not made and written within {DEADLINE:?}")))
}

/// What there is to say, once it is settled.
fn outcome(status: &StatusReport) -> Result<Option<String>, CliError> {
    // A worker that has told nothing yet reads no bytes.
    let Some(load) = status.slots.iter().map(|slot| slot.load).find(|load| load.step_bytes > 0) else {
        return Ok(None);
    };
    if load.image == ImageState::None {
        return Ok(Some(
            "nothing to prepare: this model is small, or there is no room for a fast image".into(),
        ));
    }
    let Some(kept) = &status.kept_image else {
        return Err(CliError::new(ExitCode::Config, "there is no directory to keep the image in")
            .hint("set CACHE_DIRECTORY, XDG_CACHE_HOME or HOME"));
    };
    let path = &kept.path;
    let size = format!("{} bytes", load.image_bytes);
    Ok(match kept.state {
        KeptImageState::Failed => {
            let problem = kept.problem.as_deref().unwrap_or("no reason is known");
            return Err(CliError::new(ExitCode::Os, format!("cannot write `{path}`: {problem}")));
        }
        KeptImageState::Kept => Some(format!("made and kept: `{path}`, {size}")),
        KeptImageState::Found if load.image == ImageState::Read => {
            Some(format!("there already, and whole: `{path}`, {size}"))
        }
        _ => None,
    })
}
