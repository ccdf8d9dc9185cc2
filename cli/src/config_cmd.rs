//! `bitnetd config check` and `config show`: is the file right, and what comes of it.

use std::path::PathBuf;

use bitnetd_config::{Config, Environment};
use bitnetd_proto::exit_code::ExitCode;
use clap::{Args, Subcommand};

use crate::error::CliError;
use crate::terminal;

/// `bitnetd config`
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check a configuration file: print what comes of it, or everything that is wrong with it
    Check(CheckArgs),
    /// Print the effective configuration: the file with every default filled in
    Show(ShowArgs),
}

/// `bitnetd config check`
#[derive(Debug, Args)]
struct CheckArgs {
    #[command(flatten)]
    file: FileArgs,
    /// Print nothing if the file is right
    #[arg(short, long)]
    quiet: bool,
}

/// `bitnetd config show`
#[derive(Debug, Args)]
struct ShowArgs {
    #[command(flatten)]
    file: FileArgs,
    /// With an explanation of every key: a file to start from
    #[arg(long)]
    comments: bool,
    /// Print the defaults, whatever files there are
    #[arg(long, conflicts_with = "file")]
    defaults: bool,
}

/// Which file.
#[derive(Debug, Args)]
struct FileArgs {
    /// The configuration file. Else $BITNETD_CONFIG, else ~/.config/bitnetd/bitnetd.toml, else
    /// /etc/bitnetd/bitnetd.toml, else the defaults
    file: Option<PathBuf>,
}

/// Runs `bitnetd config`.
pub(crate) fn main(args: &ConfigArgs) -> Result<ExitCode, CliError> {
    match &args.command {
        ConfigCommand::Check(args) => {
            let config = load(args.file.file.clone())?;
            if !args.quiet {
                terminal::put(config.to_toml().as_bytes())?;
            }
        }
        ConfigCommand::Show(args) => {
            let config = if args.defaults { Config::default() } else { load(args.file.file.clone())? };
            let text = if args.comments { config.to_commented_toml() } else { config.to_toml() };
            terminal::put(text.as_bytes())?;
        }
    }
    Ok(ExitCode::Ok)
}

/// The configuration in `given`, else in the first file where one is looked for, else the defaults.
pub(crate) fn load(given: Option<PathBuf>) -> Result<Config, CliError> {
    let environment = Environment::read();
    // A file that `$BITNETD_CONFIG` names must be there, as one on the command line must.
    let named = given.or_else(|| environment.config.clone());
    let found = named.or_else(|| environment.config_files().into_iter().find(|file| file.exists()));
    Ok(found.map(|file| Config::load(&file)).transpose()?.unwrap_or_default())
}
