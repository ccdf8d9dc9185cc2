//! `bitnetd tune`: measures which split of the CPUs is best for a kind of work, and writes it down.
//!
//! Each split runs as it would in the daemon: the same supervisor, worker processes and pinning.

mod journal; // What was measured so far, so that a sweep can go on after a break.
mod plot; // The outcome as a picture.
mod report; // The outcome, as data and as text.
mod settings; // The winner in a configuration file.
mod sweep; // What to measure next, and when to stop.
mod trial; // One split at work.
mod tuned; // What `profile = "auto"` knows.
mod verdict; // Who won, and by how much.
mod workload; // What is measured.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitnetd_config::cpu_list;
use bitnetd_placement::{Candidate, Limits, Machine};
use bitnetd_proto::exit_code::ExitCode;
use clap::{Args, ValueEnum as _};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::LocalSet;

pub(crate) use self::tuned::tuned_split;

use self::journal::{Identity, Journal, Place};
use self::report::Report;
use self::sweep::Sweep;
use self::trial::Bench;
use self::workload::Workload;
use crate::answer::json_line;
use crate::error::CliError;
use crate::local::ModelArgs;
use crate::logging::{self, LogArgs};
use crate::run::parse_count;
use crate::{bench, config_cmd, picture, runtime, terminal};

/// `bitnetd tune`
#[derive(Debug, Args)]
#[command(after_help = "\
Every split (workers x threads) is started as the daemon would start it and does the same work: prompts alone, answers
alone, and both. Splits take turns, round after round, until the medians are steady or the time is up. The split that
does the whole work fastest wins, unless the difference is noise. Let nothing else run meanwhile.

The outcome is kept: from then on `profile = \"auto\"` means the winner, on this machine and for this model. With
--write it is also written into a configuration file, with the evidence as a comment.
A sweep that was interrupted goes on where it stopped if it is started again in the same way.

Examples:
  bitnetd tune --quick                          the built-in model, a few minutes at most
  bitnetd tune -m model.gguf --plot tune.svg    your model, every kind of work
  bitnetd tune -m model.gguf --workload server --write bitnetd.toml")]
pub(crate) struct TuneArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Configuration to start from; what the flags say counts more
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Kinds of work; without it all of them
    #[arg(long, value_enum, value_name = "KIND,…", value_delimiter = ',')]
    workload: Vec<Workload>,
    /// Less work, fewer splits, four minutes at most
    #[arg(long)]
    quick: bool,
    /// Minutes after which the sweep ends, whatever is known by then (--quick: 4, else 30)
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u16).range(1..=1440))]
    budget: Option<u16>,
    /// Most splits to measure (--quick: 6, else 16)
    #[arg(long, value_name = "N", value_parser = parse_count)]
    splits: Option<usize>,
    /// Forget what an interrupted sweep has measured
    #[arg(long)]
    fresh: bool,
    /// Keep nothing: `profile = "auto"` stays as it is
    #[arg(long, conflicts_with = "write")]
    dry_run: bool,
    /// Write the winner into this configuration file, which need not exist; comments in it stay
    #[arg(long, value_name = "FILE.toml", help_heading = "Output")]
    write: Option<PathBuf>,
    /// Draw the outcome into a file, SVG or PNG by its name; can be given twice
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    plot: Vec<PathBuf>,
    /// Print the outcome as JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// Rounds at most.
const N_ROUNDS_MAX: usize = 9;
const N_ROUNDS_MAX_QUICK: usize = 4;

impl TuneArgs {
    fn budget(&self) -> Duration {
        let minutes = self.budget.unwrap_or(if self.quick { 4 } else { 30 });
        Duration::from_secs(60 * u64::from(minutes))
    }

    fn n_splits_max(&self) -> usize {
        self.splits.unwrap_or(if self.quick { 6 } else { 16 })
    }

    fn workloads(&self) -> Vec<Workload> {
        let mut chosen = if self.workload.is_empty() {
            Workload::value_variants().to_vec()
        } else {
            self.workload.clone()
        };
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }
}

/// Runs the command.
pub(crate) fn main(args: &TuneArgs, log: &LogArgs) -> Result<ExitCode, CliError> {
    for path in &args.plot {
        picture::check_name(path)?; // Not after half an hour of work.
    }
    let mut config = config_cmd::load(args.config.clone())?;
    args.model.apply(&mut config)?;
    config.log.level = logging::worker_filter(log);
    let machine = Machine::read(Path::new("/"), &Limits::default());
    let candidates = bitnetd_placement::candidates(&machine, &config.affinity, args.n_splits_max())
        .map_err(|error| CliError::with_code(ExitCode::Config, error))?;
    let cpus: Vec<u32> = {
        let mut cpus: Vec<u32> = candidates
            .iter()
            .flat_map(|split| &split.plan.workers)
            .flat_map(|worker| worker.cpus.clone())
            .collect();
        cpus.sort_unstable();
        cpus.dedup();
        cpus
    };
    let bench = Bench { config, workloads: args.workloads(), n_cpus: cpus.len(), is_quick: args.quick };
    let place = Place::new(&machine, &bench.config)?;
    let identity = Identity::new(place.clone(), &bench, &candidates);
    let say = |line: &str| {
        if !log.quiet {
            terminal::say(line);
        }
    };
    let names: Vec<String> = candidates.iter().map(ToString::to_string).collect();
    say(&format!("{} on CPUs {}", plural(candidates.len(), "split"), cpu_list::format(&cpus)));
    say(&format!("{} (workers x threads)", names.join(", ")));

    let mut journal = Journal::open(&identity, args.fresh)?;
    let mut sweep = Sweep::new(candidates.len(), if args.quick { N_ROUNDS_MAX_QUICK } else { N_ROUNDS_MAX });
    let n_known = journal.replay(&mut sweep);
    if n_known > 0 {
        say(&format!("{} from an interrupted sweep (--fresh forgets them)", plural(n_known, "trial")));
    }
    let bounds = bench::bounds::measure(&bench.config.engine.isa, &cpus)?;
    let bar = progress_bar(log.quiet);
    let sweeping = measure(&bench, &candidates, &mut sweep, &mut journal, args.budget(), &bar);
    let measured = runtime::block_on(async { LocalSet::new().run_until(sweeping).await });
    bar.finish_and_clear();
    measured?;

    let report = Report::new(place, &candidates, &bench, &sweep, bounds)
        .ok_or_else(|| CliError::new(ExitCode::Software, "nothing was measured"))?;
    for path in &args.plot {
        picture::write(path, &plot::draw(&report)?)?;
    }
    if let Some(path) = &args.write {
        settings::write(path, &report)?;
        say(&format!("wrote [split] into {}", path.display()));
    }
    if !args.dry_run {
        tuned::keep(&identity, &report)?;
    }
    journal.finish()?;
    let text = if args.json { json_line(&report)? } else { report.to_string() };
    terminal::put(text.as_bytes())?;
    Ok(ExitCode::Ok)
}

/// Measures until enough is known or the time is up.
async fn measure(
    bench: &Bench,
    candidates: &[Candidate],
    sweep: &mut Sweep,
    journal: &mut Journal,
    budget: Duration,
    bar: &ProgressBar,
) -> Result<(), CliError> {
    let start = Instant::now();
    let mut n_done = 0;
    while let Some((idx, round)) = sweep.next() {
        let Some(candidate) = candidates.get(idx) else { break };
        bar.set_length(n_done + sweep.n_left() as u64);
        bar.set_position(n_done);
        bar.set_message(format!("round {}, {candidate}", round + 1));
        let measurements = bench.run(candidate, round).await?;
        journal.add(idx, &measurements)?;
        sweep.add(idx, measurements);
        n_done += 1;
        if start.elapsed() > budget {
            sweep.stop();
        }
    }
    Ok(())
}

fn progress_bar(is_quiet: bool) -> ProgressBar {
    let is_visible = !is_quiet && std::io::stderr().is_terminal();
    let target = if is_visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(1), target);
    bar.enable_steady_tick(Duration::from_millis(200));
    // At most: what is hopeless or steady ends sooner.
    ProgressStyle::with_template("{spinner} {bar:30} {pos}/{len} at most, {elapsed} so far: {msg}")
        .map_or_else(|_| bar.clone(), |style| bar.clone().with_style(style))
}

fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}
