//! The metadata of a file: a sorted index of keys, and typed access that says what was expected.

use std::ops::Range;

use super::value::{self, Array32, STRING_STRIDE};
use super::{F32Array, GgufError, I32Array, NumberArray, StringArray, Value, ValueType};

/// The index, without the bytes it points into.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Vec<Entry>,
    by_key: Vec<u32>, // Indexes into `entries`, sorted by key.
}

/// Where one key and its value lie. All ranges were checked by the parser.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: Range<usize>,
    pub(super) value: Stored,
}

#[derive(Debug)]
pub(super) enum Stored {
    Scalar { kind: ValueType, bytes: Range<usize> },
    String(Range<usize>),
    Numbers { element_type: ValueType, bytes: Range<usize> },
    Strings { bytes: Range<usize>, len: usize, checkpoints: Vec<u64> },
}

impl Table {
    /// Sorts the keys; the name of one that occurs twice is an error.
    pub(super) fn new(entries: Vec<Entry>, bytes: &[u8]) -> Result<Self, GgufError> {
        let key_of = |idx: u32| &bytes[entries[idx as usize].key.clone()];
        let mut by_key: Vec<u32> = (0..).take(entries.len()).collect();
        by_key.sort_unstable_by_key(|&idx| key_of(idx));
        if let Some(twice) = by_key.windows(2).find(|pair| key_of(pair[0]) == key_of(pair[1])) {
            return Err(GgufError::DuplicateKey { key: value::utf8(key_of(twice[0])).to_owned() });
        }
        Ok(Self { entries, by_key })
    }

    pub(super) fn over<'a>(&'a self, bytes: &'a [u8]) -> Metadata<'a> {
        Metadata { table: self, bytes }
    }
}

/// The metadata of one file.
#[derive(Clone, Copy, Debug)]
pub struct Metadata<'a> {
    table: &'a Table,
    bytes: &'a [u8], // The whole file.
}

impl<'a> Metadata<'a> {
    /// Number of keys.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.entries.len()
    }

    /// No keys.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.entries.is_empty()
    }

    /// All keys and values, in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&'a str, Value<'a>)> + use<'a> {
        let this = *self;
        this.table.entries.iter().map(move |entry| (this.key_of(entry), this.value_of(entry)))
    }

    /// The value of `key`, whatever its type.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        let entries = &self.table.entries;
        let by_key = &self.table.by_key;
        let at = by_key
            .binary_search_by(|&idx| self.bytes[entries[idx as usize].key.clone()].cmp(key.as_bytes()))
            .ok()?;
        Some(self.value_of(&entries[by_key[at] as usize]))
    }

    /// A number from 0 to `u32::MAX` of any integer type.
    ///
    /// # Errors
    /// The key is there, but its value is something else.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.typed(key, "an integer from 0 to 4294967295", |value| {
            value.as_integer().and_then(|number| u32::try_from(number).ok())
        })
    }

    /// A floating-point number; a double is rounded.
    ///
    /// # Errors
    /// The key is there, but its value is something else.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a floating-point number", |value| match value {
            Value::F32(number) => Some(number),
            #[expect(clippy::cast_possible_truncation, reason = "rounding is what is asked for")]
            Value::F64(number) => Some(number as f32),
            _ => None,
        })
    }

    /// A truth value.
    ///
    /// # Errors
    /// The key is there, but its value is something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a truth value", |value| match value {
            Value::Bool(truth) => Some(truth),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    /// The key is there, but its value is something else.
    pub fn str(&self, key: &str) -> Result<Option<&'a str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text),
            _ => None,
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// The key is there, but its value is something else.
    pub fn strings(&self, key: &str) -> Result<Option<StringArray<'a>>, GgufError> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Strings(array) => Some(array),
            Value::Numbers(array) if array.is_empty() => {
                Some(StringArray { bytes: &[], len: 0, checkpoints: &[] })
            }
            _ => None,
        })
    }

    /// An array of `i32`, or of `u32` that would be the same numbers.
    ///
    /// # Errors
    /// The key is there, but its value is something else.
    pub fn i32s(&self, key: &str) -> Result<Option<I32Array<'a>>, GgufError> {
        self.typed(key, "an array of i32", |value| {
            let Value::Numbers(array) = value else { return None };
            let numbers = Array32::<i32>::new(array.bytes());
            match array.element_type() {
                ValueType::I32 => Some(numbers),
                ValueType::U32 if numbers.iter().all(|number| number >= 0) => Some(numbers),
                _ => None,
            }
        })
    }

    /// An array of `f32`.
    ///
    /// # Errors
    /// The key is there, but its value is something else.
    pub fn f32s(&self, key: &str) -> Result<Option<F32Array<'a>>, GgufError> {
        self.typed(key, "an array of f32", |value| match value {
            Value::Numbers(array) if array.element_type() == ValueType::F32 => {
                Some(Array32::new(array.bytes()))
            }
            _ => None,
        })
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        accept: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match accept(value) {
            Some(accepted) => Ok(Some(accepted)),
            None => {
                let found = match value.as_integer() {
                    Some(number) => format!("{number} ({})", value.describe()),
                    None => value.describe(),
                };
                Err(GgufError::KeyType { key: key.to_owned(), expected, found })
            }
        }
    }

    fn key_of(&self, entry: &Entry) -> &'a str {
        value::utf8(&self.bytes[entry.key.clone()])
    }

    fn value_of(&self, entry: &'a Entry) -> Value<'a> {
        match &entry.value {
            Stored::Scalar { kind, bytes } => {
                // The parser took as many bytes as the type has.
                value::scalar(*kind, &self.bytes[bytes.clone()]).unwrap_or(Value::U8(0))
            }
            Stored::String(bytes) => Value::String(value::utf8(&self.bytes[bytes.clone()])),
            Stored::Numbers { element_type, bytes } => {
                Value::Numbers(NumberArray { element_type: *element_type, bytes: &self.bytes[bytes.clone()] })
            }
            Stored::Strings { bytes, len, checkpoints } => {
                debug_assert_eq!(checkpoints.len(), len.div_ceil(STRING_STRIDE));
                Value::Strings(StringArray { bytes: &self.bytes[bytes.clone()], len: *len, checkpoints })
            }
        }
    }
}
