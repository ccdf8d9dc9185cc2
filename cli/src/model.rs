//! `bitnetd model …`: look at model files, check them, make them.

mod convert;
mod info;
mod prepare;
mod synth;

use std::path::Path;
use std::sync::Arc;

use bitnetd_engine::convert::{ConvertError, Progress};
use bitnetd_engine::gguf::Gguf;
use bitnetd_engine::mapping::{Mapping, MappingError};
use bitnetd_proto::exit_code::ExitCode;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use crate::error::CliError;
use crate::logging::LogArgs;

/// `bitnetd model`.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    #[command(subcommand)]
    command: ModelCommand,
}

#[derive(Debug, Subcommand)]
enum ModelCommand {
    /// Show what a GGUF file holds, and whether it can be run
    Info(info::InfoArgs),
    /// Read every tensor of a GGUF file and say what is wrong with it
    Verify(info::VerifyArgs),
    /// Make the fast image of a model, and keep it for every later start
    Prepare(prepare::PrepareArgs),
    /// Make a GGUF file from a Hugging Face checkpoint, or store a GGUF file's tensors in another way
    Convert(convert::ConvertArgs),
    /// Make a model of random ternary weights in a real shape, to measure with
    Synth(synth::SynthArgs),
}

/// Runs one of the subcommands.
pub(crate) fn main(args: &ModelArgs, log: &LogArgs) -> Result<ExitCode, CliError> {
    match &args.command {
        ModelCommand::Info(args) => info::info(args),
        ModelCommand::Verify(args) => info::check(args),
        ModelCommand::Prepare(args) => prepare::main(args, log),
        ModelCommand::Convert(args) => convert::main(args),
        ModelCommand::Synth(args) => synth::main(args),
    }
}

/// Shows on a terminal how far a conversion is.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        Self(bar)
    }

    fn show(&self, progress: Progress<'_>) {
        self.0.set_length(progress.n_total as u64);
        self.0.set_position(progress.n_done as u64);
        self.0.set_message(progress.tensor.to_owned());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Opens and parses a model file.
fn open(path: &Path) -> Result<Gguf, CliError> {
    let mapping = Mapping::open(path).map_err(|error| match error {
        MappingError::Open { path, source } => CliError::file("open", &path, source),
        MappingError::NotAFile { .. } => CliError::new(ExitCode::NoInput, error),
        MappingError::Map { .. } => CliError::new(ExitCode::Os, format!("{:#}", anyhow::Error::new(error))),
    })?;
    Gguf::parse(Arc::new(mapping))
        .map_err(|error| CliError::new(ExitCode::Data, format!("cannot use `{}`: {error}", path.display())))
}

/// A failed conversion, with the exit code that fits.
fn convert_error(error: ConvertError) -> CliError {
    let code = match &error {
        ConvertError::Output { .. } | ConvertError::Write(_) => ExitCode::Os,
        ConvertError::Shape { .. } => ExitCode::Usage,
        ConvertError::HuggingFace(_) | ConvertError::Retype(_) => ExitCode::Data,
    };
    CliError::new(code, format!("{:#}", anyhow::Error::new(error)))
}
