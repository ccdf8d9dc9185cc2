//! `bitnetd topology`: the machine, which worker gets what of it, and why. As text, JSON or SVG.

mod drawing; // The machine as lines of text.
mod svg; // The machine as a picture.

use std::path::PathBuf;

use bitnetd_config::{Choice as _, Profile, SplitConfig};
use bitnetd_placement::{Limits, Machine, Plan, PlanError};
use bitnetd_proto::exit_code::ExitCode;
use clap::Args;
use clap::builder::PossibleValuesParser;
use serde::Serialize;

use crate::answer::json_line;
use crate::error::CliError;
use crate::{config_cmd, picture, terminal};

/// `bitnetd topology`
#[derive(Debug, Args)]
#[command(after_help = "\
Without --profile or --workers the plan is that of the configuration.
Exit code: 0, or 78 if the machine cannot do what is asked for (it is shown all the same).")]
pub(crate) struct TopologyArgs {
    /// The configuration file
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Plan for this profile
    #[arg(long, conflicts_with_all = ["workers", "threads"],
        value_parser = PossibleValuesParser::new(Profile::CHOICES.iter().map(|(name, _)| *name)))]
    profile: Option<String>,
    /// Plan for this many workers
    #[arg(long, requires = "threads", value_parser = clap::value_parser!(u16).range(1..))]
    workers: Option<u16>,
    /// … with this many threads each
    #[arg(long, requires = "workers", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Print machine and plan as JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Draw machine and plan into a file, too
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    svg: Option<PathBuf>,
    /// Look at a recorded tree of /sys and /proc instead of this machine
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    machine: &'a Machine,
    usable: Vec<u32>,
    plan: Option<&'a Plan>,
    error: Option<String>,
}

/// Runs `bitnetd topology`.
pub(crate) fn main(args: &TopologyArgs) -> Result<ExitCode, CliError> {
    let mut config = config_cmd::load(args.config.clone())?;
    let machine = Machine::read(&args.root, &Limits::default());
    match (&args.profile, args.workers, args.threads) {
        (Some(name), ..) => config.split = SplitConfig::Profile(Profile::from_name(name).unwrap_or_default()),
        (None, Some(workers), Some(threads)) => {
            config.split = SplitConfig::Counts { workers: workers.into(), threads: threads.into() };
        }
        _ => {}
    }
    let planned = crate::local::plan_for(&machine, &config);
    let usable = machine.usable(&config.affinity.reserve);
    let plan = planned.as_ref().ok();
    if let Some(path) = &args.svg {
        picture::write(path, &svg::draw(&machine, &usable, plan))?;
    }
    let text = if args.json {
        let error = planned.as_ref().err().map(PlanError::to_string);
        json_line(&Report { machine: &machine, usable, plan, error })?
    } else {
        drawing::text(&machine, &usable, plan)
    };
    terminal::put(text.as_bytes())?;
    planned.map_or_else(|error| Err(CliError::with_code(ExitCode::Config, error)), |_| Ok(ExitCode::Ok))
}

/// For each CPU of a plan its worker.
fn owner(plan: Option<&Plan>, cpu: u32) -> Option<usize> {
    plan?.workers.iter().position(|worker| worker.cpus.binary_search(&cpu).is_ok())
}
