//! `bitnetd model info` and `bitnetd model verify`: what a file holds, and whether it is sound.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use bitnetd_engine::inspect::{ModelInfo, verify};
use bitnetd_proto::exit_code::ExitCode;
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value as Json, json};

use super::open;
use crate::error::CliError;
use crate::terminal;

#[derive(Debug, Args)]
pub(super) struct InfoArgs {
    /// A GGUF file
    #[arg(value_name = "FILE.gguf")]
    file: PathBuf,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print everything as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// A GGUF file
    #[arg(value_name = "FILE.gguf")]
    file: PathBuf,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

/// Longest value that is shown of a key.
const VALUE_CHARS_SHOWN: usize = 80;

pub(super) fn info(args: &InfoArgs) -> Result<ExitCode, CliError> {
    let info = ModelInfo::new(&Arc::new(open(&args.file)?));
    if args.json {
        put_json(&json!(info))?;
    } else {
        terminal::put(describe(&info, args.tensors).as_bytes())?;
    }
    Ok(ExitCode::Ok)
}

fn describe(info: &ModelInfo, with_tensors: bool) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string does not fail.
        let _written = writeln!(text, "{name:<14}{value}");
    };
    let known = |value: &Option<String>| value.clone().unwrap_or_else(|| "(not given)".to_owned());
    line("name", known(&info.name));
    line("architecture", known(&info.architecture));
    line(
        "file",
        format!("{} bytes, GGUF version {}, alignment {}", info.file_bytes, info.version, info.alignment),
    );
    line("parameters", format!("{}, of which ternary {}", info.n_parameters, info.n_ternary_weights));
    line("vocabulary", info.vocabulary.clone().unwrap_or_else(|| "(cannot be used)".to_owned()));
    match &info.problem {
        None => line("supported", "yes".to_owned()),
        Some(problem) => line("supported", format!("no: {problem}")),
    }
    line("", String::new());
    for sum in &info.types {
        let (n_tensors, n_elements, n_bytes) = (sum.n_tensors, sum.n_elements, sum.n_bytes);
        line(&sum.kind, format!("{n_tensors:>6} tensors {n_elements:>14} elements {n_bytes:>14} bytes"));
    }
    line("", String::new());
    for entry in &info.metadata {
        let value: String = match &entry.value {
            Json::String(value) => value.replace('\n', "\\n"),
            value => value.to_string(),
        };
        let shown: String = value.chars().take(VALUE_CHARS_SHOWN).collect();
        let rest = if shown.len() < value.len() { "…" } else { "" };
        line(&entry.key, format!("  {}  {shown}{rest}", entry.kind));
    }
    if with_tensors {
        line("", String::new());
        for tensor in &info.tensors {
            line(&tensor.name, format!("  {} {:?} {} bytes", tensor.kind, tensor.dims, tensor.n_bytes));
        }
    }
    text
}

pub(super) fn check(args: &VerifyArgs) -> Result<ExitCode, CliError> {
    let gguf = Arc::new(open(&args.file)?);
    let bar = ProgressBar::new(gguf.n_tensors() as u64);
    let found = verify(&gguf, &mut |_| bar.inc(1));
    bar.finish_and_clear();
    let is_sound = found.problems.is_empty();
    if args.json {
        let problems: Vec<Json> = found
            .problems
            .iter()
            .map(|problem| json!({ "tensor": problem.tensor, "problem": problem.text }))
            .collect();
        let (n_tensors, n_bytes) = (found.n_tensors, found.n_bytes);
        put_json(
            &json!({ "ok": is_sound, "n_tensors": n_tensors, "n_bytes": n_bytes, "problems": problems }),
        )?;
    } else {
        let mut text = String::new();
        for problem in &found.problems {
            let place = problem.tensor.as_ref().map_or("file".to_owned(), |name| format!("tensor `{name}`"));
            let _written = writeln!(text, "{place}: {}", problem.text);
        }
        if is_sound {
            let _written = writeln!(text, "ok: {} tensors, {} bytes", found.n_tensors, found.n_bytes);
        }
        terminal::put(text.as_bytes())?;
    }
    if is_sound {
        return Ok(ExitCode::Ok);
    }
    let n_problems = found.problems.len();
    Err(CliError::new(ExitCode::Data, format!("`{}` has {n_problems} problems", args.file.display()))
        .hint("get or convert the model again"))
}

fn put_json(value: &Json) -> Result<(), CliError> {
    terminal::put(format!("{value:#}\n").as_bytes())
}
