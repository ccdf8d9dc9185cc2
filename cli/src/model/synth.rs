//! `bitnetd model synth`: a model of random weights.

use std::path::PathBuf;

use bitnetd_engine::convert::synth::{SynthOptions, synth};
use bitnetd_engine::inspect::ModelShape;
use bitnetd_engine::model::Architecture;
use bitnetd_proto::exit_code::ExitCode;
use clap::{Args, ValueEnum};

use super::{Bar, convert_error};
use crate::error::CliError;
use crate::terminal;

#[derive(Debug, Args)]
pub(super) struct SynthArgs {
    /// The shape to start from; the options below change single numbers of it
    shape: ShapeName,
    /// The file to write
    #[arg(value_name = "OUT.gguf")]
    out: PathBuf,
    /// Chooses the weights: the same seed gives the same file
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The model graph: bitnet-b1.58, bitnet-25, bitnet or llama
    #[arg(long, value_parser = parse_architecture)]
    arch: Option<Architecture>,
    /// Layers
    #[arg(long)]
    layers: Option<u32>,
    /// Width of the residual stream, a multiple of 128
    #[arg(long)]
    embd: Option<u32>,
    /// Width of the feed-forward part, a multiple of 128
    #[arg(long)]
    ff: Option<u32>,
    /// Attention heads
    #[arg(long)]
    heads: Option<u32>,
    /// Key/value heads
    #[arg(long)]
    kv_heads: Option<u32>,
    /// Width of a head
    #[arg(long)]
    head_dim: Option<u32>,
    /// Tokens in the vocabulary
    #[arg(long)]
    vocab: Option<u32>,
    /// Longest context
    #[arg(long)]
    ctx: Option<u32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ShapeName {
    /// BitNet b1.58 2B-4T: 1.2 GB, 332 tensors
    #[value(name = "2b-4t")]
    Bitnet2b4t,
    /// The smallest that has every part: 0.6 MB
    Tiny,
}

fn parse_architecture(name: &str) -> Result<Architecture, String> {
    Architecture::from_name(name).ok_or_else(|| {
        let names = Architecture::ALL.map(Architecture::name).join(", ");
        format!("expected one of {names}")
    })
}

pub(super) fn main(args: &SynthArgs) -> Result<ExitCode, CliError> {
    let (mut shape, name) = match args.shape {
        ShapeName::Bitnet2b4t => (ModelShape::bitnet_2b_4t(), "2b-4t"),
        ShapeName::Tiny => (ModelShape::tiny(), "tiny"),
    };
    shape.architecture = args.arch.unwrap_or(shape.architecture);
    for (field, value) in [
        (&mut shape.n_layers, args.layers),
        (&mut shape.n_embd, args.embd),
        (&mut shape.n_ff, args.ff),
        (&mut shape.n_heads, args.heads),
        (&mut shape.n_kv_heads, args.kv_heads),
        (&mut shape.head_dim, args.head_dim),
        (&mut shape.n_vocab, args.vocab),
        (&mut shape.n_ctx, args.ctx),
    ] {
        *field = value.unwrap_or(*field);
    }
    let name = format!("random weights in the shape {name}, seed {}", args.seed);
    let bar = Bar::new();
    let options = SynthOptions { shape, name, seed: args.seed };
    synth(&args.out, &options, &mut |progress| bar.show(progress)).map_err(convert_error)?;
    drop(bar);
    terminal::say(&format!("wrote {}", args.out.display()));
    Ok(ExitCode::Ok)
}
