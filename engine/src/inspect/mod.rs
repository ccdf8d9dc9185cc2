//! What a model file holds and whether it is sound, and the shapes that files are made in.

use std::sync::Arc;

use crate::engine::EngineError;
use crate::gguf::Gguf;
use crate::model::Model;
use crate::tokenizer::{Tokenizer, TokenizerError};

mod info;
mod shape;
mod verify;

pub use info::{MetadataInfo, ModelInfo, TensorInfo, TypeInfo};
pub use shape::{ModelShape, TensorRole, TensorSpec};
pub use verify::{Problem, Verification, verify};

/// Why the engine cannot run a file: of the graph the first reason, and of the vocabulary.
fn problems(gguf: &Arc<Gguf>, tokenizer: &Result<Tokenizer, TokenizerError>) -> Vec<String> {
    let model = Model::load(Arc::clone(gguf));
    let mut problems = Vec::new();
    problems.extend(model.as_ref().err().map(|error| chain(error)));
    match (tokenizer, &model) {
        (Err(error), _) => problems.push(format!("the vocabulary: {}", chain(error))),
        (Ok(tokenizer), Ok(model)) if tokenizer.n_vocab() > model.hparams().n_vocab => {
            let (tokens, rows) = (tokenizer.n_vocab(), model.hparams().n_vocab);
            problems.push(EngineError::VocabularySize { tokens, rows }.to_string());
        }
        _ => {}
    }
    problems
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
