//! `bitnetd model convert`: a Hugging Face checkpoint or a GGUF file to a GGUF file.

use std::path::PathBuf;

use bitnetd_engine::convert::huggingface::{self, HuggingFaceOptions};
use bitnetd_engine::convert::retype::{RetypeOptions, retype};
use bitnetd_engine::dense::DenseFormat;
use bitnetd_engine::ternary::TernaryFormat;
use bitnetd_proto::exit_code::ExitCode;
use clap::Args;

use super::{Bar, convert_error, open};
use crate::error::CliError;
use crate::terminal;

#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// A Hugging Face directory (config.json, safetensors, tokenizer.json or tokenizer.model), or a GGUF file
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// The file to write
    #[arg(value_name = "OUT.gguf")]
    out: PathBuf,
    /// How ternary weights are stored: i2_s, tq2_0 or tq1_0 [of a directory: i2_s; of a file: as they are]
    #[arg(long, value_parser = parse_ternary, value_name = "TYPE")]
    weights: Option<TernaryFormat>,
    /// How the embedding is stored: f16, bf16, f32, q8_0, q6_k or q4_0 [of a directory: f16; of a file: as it is]
    #[arg(long, value_parser = parse_dense, value_name = "TYPE")]
    embedding: Option<DenseFormat>,
    /// How an output head of its own is stored [as the embedding]
    #[arg(long, value_parser = parse_dense, value_name = "TYPE")]
    head: Option<DenseFormat>,
    /// `general.name` of a converted directory [its name]
    #[arg(long)]
    name: Option<String>,
}

fn parse_ternary(name: &str) -> Result<TernaryFormat, String> {
    let found = TernaryFormat::ALL.into_iter().find(|format| format.name().eq_ignore_ascii_case(name));
    found.ok_or_else(|| "expected i2_s, tq2_0 or tq1_0".to_owned())
}

fn parse_dense(name: &str) -> Result<DenseFormat, String> {
    let all = [
        DenseFormat::F32,
        DenseFormat::F16,
        DenseFormat::Bf16,
        DenseFormat::Q8_0,
        DenseFormat::Q6K,
        DenseFormat::Q4_0,
    ];
    let found = all.into_iter().find(|format| format.name().eq_ignore_ascii_case(name));
    found.ok_or_else(|| "expected f16, bf16, f32, q8_0, q6_k or q4_0".to_owned())
}

pub(super) fn main(args: &ConvertArgs) -> Result<ExitCode, CliError> {
    let bar = Bar::new();
    if args.model.is_dir() {
        if args.weights.is_some_and(|format| format != TernaryFormat::I2S) {
            let error = CliError::new(ExitCode::Usage, "a directory is converted to I2_S first");
            return Err(error.hint("convert the resulting file again with `--weights`"));
        }
        let options = HuggingFaceOptions {
            name: args.name.clone(),
            embedding: args.embedding.unwrap_or(DenseFormat::F16),
        };
        huggingface::convert(&args.model, &args.out, &options, &mut |progress| bar.show(progress))
            .map_err(convert_error)?;
    } else {
        let gguf = open(&args.model)?;
        let head = args.head.or(args.embedding);
        let options = RetypeOptions { ternary: args.weights, embedding: args.embedding, head };
        retype(&gguf, &args.out, options, &mut |progress| bar.show(progress)).map_err(convert_error)?;
    }
    drop(bar);
    terminal::say(&format!("wrote {}", args.out.display()));
    Ok(ExitCode::Ok)
}
