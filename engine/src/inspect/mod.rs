//! What a model file holds, without running it: its shape, and (later in this file's siblings) whether it is sound.

mod shape;

pub use shape::{Architecture, ModelShape, TensorRole, TensorSpec};
