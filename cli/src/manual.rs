//! `bitnetd completions` and `bitnetd man`: made from the command line's own definition.

use std::path::PathBuf;

use bitnetd_proto::exit_code::ExitCode;
use clap::Args;

use crate::error::CliError;
use crate::terminal;

/// `bitnetd completions`
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// Which shell
    shell: clap_complete::Shell,
}

/// `bitnetd man`
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write one page for each subcommand to this folder, which must exist
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// Prints the completion script.
pub(crate) fn completions(args: &CompletionsArgs, mut command: clap::Command) -> Result<ExitCode, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "bitnetd", &mut script);
    terminal::put(&script)?;
    Ok(ExitCode::Ok)
}

/// Prints the manual page, or writes all of them.
pub(crate) fn man(args: &ManArgs, command: clap::Command) -> Result<ExitCode, CliError> {
    match &args.folder {
        Some(folder) => {
            clap_mangen::generate_to(command, folder)
                .map_err(|source| CliError::file("write manual pages to", folder, source))
                .map_err(|error| error.hint("make the folder first, such as ~/.local/share/man/man1"))?;
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command)
                .render(&mut page)
                .map_err(|source| CliError::os("make the manual page", source))?;
            terminal::put(&page)?;
        }
    }
    Ok(ExitCode::Ok)
}
