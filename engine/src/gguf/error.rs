//! What can be wrong with a GGUF file: each variant names the key or tensor, what was expected and what was found.

/// Why a file is not a GGUF file that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum GgufError {
    #[error("not a GGUF file: {looks_like}")]
    Magic { looks_like: &'static str },
    #[error("GGUF version `{version}` is not supported: expected 2 or 3{hint}")]
    Version { version: u32, hint: &'static str },
    #[error("big-endian GGUF file (version {version}): only little-endian files are supported")]
    BigEndian { version: u32 },
    #[error("file ends inside {what}: {needed} bytes needed at offset {offset}, {available} are left")]
    Cut { what: String, offset: u64, needed: u64, available: u64 },
    #[error("{what} is {found}, the limit is {limit}")]
    Limit { what: String, found: u64, limit: u64 },
    #[error("{what} is not UTF-8")]
    Utf8 { what: String },
    #[error("{what} is empty")]
    Empty { what: String },
    #[error("metadata key `{key}` occurs twice")]
    DuplicateKey { key: String },
    #[error("metadata key `{key}` has the unknown value type {found}: expected 0 to 12")]
    ValueType { key: String, found: u32 },
    #[error("metadata key `{key}` is an array of arrays, which no model needs")]
    NestedArray { key: String },
    #[error("metadata key `{key}` has the truth value {found}: expected 0 or 1")]
    Bool { key: String, found: u8 },
    #[error("metadata key `{key}` is {found}: expected {expected}")]
    KeyType { key: String, expected: &'static str, found: String },
    #[error("metadata key `{key}` is missing")]
    MissingKey { key: String },
    #[error("metadata key `general.alignment` is {found}: expected a power of two up to {max}", max = super::ALIGNMENT_MAX)]
    Alignment { found: u64 },
    #[error("tensor `{name}` occurs twice")]
    DuplicateTensor { name: String },
    #[error("tensor `{name}` has {found} dimensions: expected 1 to {max}", max = super::DIMS_MAX)]
    Dimensions { name: String, found: u32 },
    #[error("tensor `{name}` has shape {dims:?}: {problem}")]
    Shape { name: String, dims: Vec<u64>, problem: &'static str },
    #[error("tensor `{name}` has type number {id}: {hint}")]
    TensorType { name: String, id: u32, hint: &'static str },
    #[error("tensor `{name}` of type {kind} has rows of {found} elements: expected a multiple of {block}")]
    RowLength { name: String, kind: super::TensorType, found: u64, block: u64 },
    #[error(
        "tensor `{name}` starts at offset {offset}, which is not a multiple of the alignment {alignment}"
    )]
    Misaligned { name: String, offset: u64, alignment: u64 },
    #[error(
        "tensor `{name}` needs {needed} bytes at offset {offset} of the tensor data, the file has {available} there: \
         it is cut or its size is wrong"
    )]
    TensorOutOfBounds { name: String, offset: u64, needed: u64, available: u64 },
    #[error(
        "tensors `{first}` and `{second}` overlap: `{first}` ends at offset {end}, `{second}` starts at {start}"
    )]
    Overlap { first: String, second: String, end: u64, start: u64 },
}
