//! Values of metadata keys, as views into the file.

use std::fmt;
use std::marker::PhantomData;

/// Type of a metadata value, by its number on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the names say it")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type with this number on disk.
    #[must_use]
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.id() == id)
    }

    /// The number on disk.
    #[must_use]
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        }
    }

    /// Bytes of one value; `None` for strings and arrays.
    #[must_use]
    pub fn n_bytes(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A metadata value.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(&'a str),
    U64(u64),
    I64(i64),
    F64(f64),
    Strings(StringArray<'a>),
    Numbers(NumberArray<'a>),
}

impl Value<'_> {
    /// What it is, for messages: `u32`, `array of 3 string`.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Strings(array) => format!("array of {} string", array.len()),
            Self::Numbers(array) => format!("array of {} {}", array.len(), array.element_type()),
            scalar => scalar.value_type().name().to_owned(),
        }
    }

    /// Its type on disk.
    #[must_use]
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
            Self::Strings(_) | Self::Numbers(_) => ValueType::Array,
        }
    }

    /// The value of any integer type.
    #[must_use]
    pub fn as_integer(&self) -> Option<i128> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::I8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::I16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::I32(value) => Some(value.into()),
            Self::U64(value) => Some(value.into()),
            Self::I64(value) => Some(value.into()),
            _ => None,
        }
    }
}

/// Every how many strings the reader remembers a position.
pub(super) const STRING_STRIDE: usize = 8;

/// An array of strings, left where it is in the file.
#[derive(Clone, Copy)]
pub struct StringArray<'a> {
    // Invariant: `bytes` is exactly `len` times a u64 length and that many bytes of UTF-8, and `checkpoints[i]`
    // is where string i * STRING_STRIDE starts. The parser walked through it.
    pub(super) bytes: &'a [u8],
    pub(super) len: usize,
    pub(super) checkpoints: &'a [u64],
}

impl<'a> StringArray<'a> {
    /// Number of strings.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No strings.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the array in the file.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The array as it is in the file: lengths and bytes.
    pub(super) fn raw(&self) -> &'a [u8] {
        self.bytes
    }

    /// String `idx`. Walks over at most seven others; to read many, [`Self::iter`] is faster.
    #[must_use]
    pub fn get(&self, idx: usize) -> Option<&'a str> {
        self.bytes_at(idx).map(utf8)
    }

    /// The bytes of string `idx`.
    #[must_use]
    pub fn bytes_at(&self, idx: usize) -> Option<&'a [u8]> {
        if idx >= self.len {
            return None;
        }
        let start = usize::try_from(self.checkpoints[idx / STRING_STRIDE]).ok()?;
        StringBytes { rest: &self.bytes[start..] }.nth(idx % STRING_STRIDE)
    }

    /// All strings, in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a str> + Clone + use<'a> {
        self.iter_bytes().map(utf8)
    }

    /// The bytes of all strings, in order.
    pub fn iter_bytes(&self) -> impl Iterator<Item = &'a [u8]> + Clone + use<'a> {
        StringBytes { rest: self.bytes }
    }
}

impl fmt::Debug for StringArray<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StringArray({} strings)", self.len)
    }
}

#[derive(Clone)]
struct StringBytes<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for StringBytes<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (len, rest) = self.rest.split_first_chunk::<8>()?;
        let (string, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.rest = rest;
        Some(string)
    }
}

/// An array of numbers or truth values, left where it is in the file (at any address).
#[derive(Clone, Copy)]
pub struct NumberArray<'a> {
    pub(super) element_type: ValueType, // Neither a string nor an array.
    pub(super) bytes: &'a [u8],         // (len, element bytes)
}

impl<'a> NumberArray<'a> {
    /// Type of the elements.
    #[must_use]
    pub fn element_type(&self) -> ValueType {
        self.element_type
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.stride()
    }

    /// No elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements' bytes, little endian.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Element `idx`.
    #[must_use]
    pub fn get(&self, idx: usize) -> Option<Value<'static>> {
        let start = idx.checked_mul(self.stride())?;
        let bytes = self.bytes.get(start..start.checked_add(self.stride())?)?;
        scalar(self.element_type, bytes)
    }

    fn stride(&self) -> usize {
        self.element_type.n_bytes().and_then(|n| usize::try_from(n).ok()).unwrap_or(1)
    }
}

impl fmt::Debug for NumberArray<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NumberArray({} x {})", self.len(), self.element_type)
    }
}

/// An array of 32-bit numbers, left where it is in the file (at any address).
#[derive(Clone, Copy)]
pub struct Array32<'a, T> {
    bytes: &'a [[u8; 4]],
    element: PhantomData<T>,
}

/// Array of `i32`.
pub type I32Array<'a> = Array32<'a, i32>;
/// Array of `f32`.
pub type F32Array<'a> = Array32<'a, f32>;

impl<'a, T: FromLe> Array32<'a, T> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes: bytes.as_chunks().0, element: PhantomData }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// No elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Element `idx`.
    #[must_use]
    pub fn get(&self, idx: usize) -> Option<T> {
        self.bytes.get(idx).map(|&bytes| T::from_le(bytes))
    }

    /// All elements, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = T> + use<'a, T> {
        self.bytes.iter().map(|&bytes| T::from_le(bytes))
    }
}

impl<T> fmt::Debug for Array32<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Array32({})", self.bytes.len())
    }
}

/// Numbers of four bytes.
pub trait FromLe {
    /// The number with these little-endian bytes.
    fn from_le(bytes: [u8; 4]) -> Self;
}

impl FromLe for i32 {
    fn from_le(bytes: [u8; 4]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

impl FromLe for f32 {
    fn from_le(bytes: [u8; 4]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

/// The value of a number or truth value; `None` if the bytes are too few or the type is another.
pub(super) fn scalar(kind: ValueType, bytes: &[u8]) -> Option<Value<'static>> {
    fn first<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
        bytes.first_chunk().copied()
    }
    Some(match kind {
        ValueType::U8 => Value::U8(u8::from_le_bytes(first(bytes)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(first(bytes)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(first(bytes)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(first(bytes)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(first(bytes)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(first(bytes)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(first(bytes)?)),
        ValueType::Bool => Value::Bool(u8::from_le_bytes(first(bytes)?) != 0),
        ValueType::U64 => Value::U64(u64::from_le_bytes(first(bytes)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(first(bytes)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(first(bytes)?)),
        ValueType::String | ValueType::Array => return None,
    })
}

/// Text that the parser saw to be UTF-8. Were the file changed under the mapping, it would be empty.
pub(super) fn utf8(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}
