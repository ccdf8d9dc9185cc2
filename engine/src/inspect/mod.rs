//! What a model file holds and whether it is sound, and the shapes that files are made in.

mod info;
mod shape;
mod verify;

pub use info::{MetadataInfo, ModelInfo, TensorInfo, TypeInfo};
pub use shape::{ModelShape, TensorRole, TensorSpec};
pub use verify::{Problem, Verification, verify};

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
