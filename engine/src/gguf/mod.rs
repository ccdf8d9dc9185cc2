//! GGUF files: a bounded, zero-copy reader and a streaming writer.
//!
//! The reader believes nothing: every count, length and offset is checked against the file before it is used,
//! so that a cut, lying or hostile file gives an error that names the key or tensor. It never panics, and what
//! it allocates is a small multiple of what the file itself holds in names and keys. Tensor data and strings
//! stay where they are, in the [`Mapping`].

mod cursor;
mod error;
mod foreign;
mod metadata;
mod parse;
mod tensor_type;
mod value;
mod writer;

use std::ops::Range;
use std::sync::Arc;

pub use error::GgufError;
pub use metadata::Metadata;
pub use tensor_type::{I2S_BLOCK_LEN, I2S_TRAILER_BYTES, TensorType};
pub use value::{F32Array, I32Array, NumberArray, StringArray, Value, ValueType};
pub use writer::{GgufWriteError, GgufWriter, TensorWriter};

use crate::mapping::Mapping;

/// Most metadata keys a file may have.
pub const KEYS_MAX: u64 = 65_536;
/// Most tensors a file may have.
pub const TENSORS_MAX: u64 = 65_536;
/// Longest metadata key.
pub const KEY_BYTES_MAX: u64 = 65_535;
/// Longest string value, chat templates included.
pub const STRING_BYTES_MAX: u64 = 16 << 20;
/// Most elements of an array value.
pub const ARRAY_LEN_MAX: u64 = 16 << 20;
/// Longest tensor name.
pub const TENSOR_NAME_BYTES_MAX: u64 = 64;
/// Most dimensions of a tensor.
pub const DIMS_MAX: usize = 4;
/// Largest `general.alignment`.
pub const ALIGNMENT_MAX: u64 = 65_536;
/// `general.alignment` of a file that does not say.
pub const ALIGNMENT_DEFAULT: u64 = 32;

/// A parsed GGUF file: its metadata, and where its tensors lie in the mapping.
#[derive(Debug)]
pub struct Gguf {
    mapping: Arc<Mapping>,
    version: u32,
    alignment: u64,
    data_start: usize,
    table: metadata::Table,
    tensors: Vec<TensorInfo>,
    by_name: Vec<u32>, // Indexes into `tensors`, sorted by name.
}

// Where one tensor lies. All ranges are in bounds of the mapping and the name is UTF-8: `parse` saw to it.
#[derive(Debug)]
struct TensorInfo {
    name: Range<usize>,
    kind: TensorType,
    dims: [u64; DIMS_MAX],
    n_dims: usize,
    data: Range<usize>,
}

/// One tensor of a file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// The name in the file.
    pub name: &'a str,
    /// How the elements are stored.
    pub kind: TensorType,
    /// 1 to 4 dimensions, the contiguous one (columns) first. None is 0.
    pub dims: &'a [u64],
    /// Exactly the tensor's bytes, the trailer of `I2_S` included.
    pub data: &'a [u8],
}

impl TensorView<'_> {
    /// Elements of one row: the contiguous dimension.
    #[must_use]
    pub fn n_cols(&self) -> u64 {
        self.dims[0]
    }

    /// Rows: the product of all other dimensions.
    #[must_use]
    pub fn n_rows(&self) -> u64 {
        self.dims[1..].iter().product() // No overflow: the product of all dimensions is in bounds.
    }

    /// All elements.
    #[must_use]
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }
}

impl Gguf {
    /// Reads what precedes the tensor data, and checks where each tensor lies. Touches no tensor data.
    ///
    /// # Errors
    /// The file is not GGUF, or is cut, or breaks a rule of the format or a limit of this reader.
    pub fn parse(mapping: Arc<Mapping>) -> Result<Self, GgufError> {
        parse::parse(mapping)
    }

    /// Version of the format: 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Tensor data starts at multiples of this many bytes.
    #[must_use]
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn file_bytes(&self) -> usize {
        self.mapping.len()
    }

    /// Where the tensor data starts in the file; past its end if there are no tensors.
    #[must_use]
    pub fn data_start(&self) -> usize {
        self.data_start
    }

    /// The mapping that all views borrow from.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The metadata.
    #[must_use]
    pub fn metadata(&self) -> Metadata<'_> {
        self.table.over(&self.mapping)
    }

    /// Number of tensors.
    #[must_use]
    pub fn n_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|info| self.view(info))
    }

    /// The tensor of that name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let found = self.by_name.binary_search_by(|&idx| {
            self.mapping[self.tensors[idx as usize].name.clone()].cmp(name.as_bytes())
        });
        found.ok().map(|at| self.view(&self.tensors[self.by_name[at] as usize]))
    }

    fn view<'a>(&'a self, info: &'a TensorInfo) -> TensorView<'a> {
        TensorView {
            name: value::utf8(&self.mapping[info.name.clone()]),
            kind: info.kind,
            dims: &info.dims[..info.n_dims],
            data: &self.mapping[info.data.clone()],
        }
    }
}

#[cfg(test)]
mod tests;
