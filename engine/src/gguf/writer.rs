//! Writes GGUF v3: metadata and tensor list first, then the tensors' bytes, streamed in that order.

use std::collections::HashSet;
use std::io::{self, Write};

use super::{ALIGNMENT_DEFAULT, DIMS_MAX, NumberArray, TENSOR_NAME_BYTES_MAX, TensorType, Value, ValueType};

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message says what each field is")]
pub enum GgufWriteError {
    #[error("metadata key `{key}` is written twice")]
    DuplicateKey { key: String },
    #[error("tensor `{name}` is written twice")]
    DuplicateTensor { name: String },
    #[error("tensor name `{name}` is longer than {TENSOR_NAME_BYTES_MAX} bytes")]
    TensorName { name: String },
    #[error("tensor `{name}` with shape {dims:?} cannot be stored as {kind}: rows are blocks of {block}", block = kind.block_len())]
    Shape { name: String, dims: Vec<u64>, kind: TensorType },
    #[error("tensor `{name}` has {expected} bytes, {found} were written")]
    Length { name: String, expected: u64, found: u64 },
    #[error("cannot write the file")]
    Write(#[source] io::Error),
}

/// What precedes the tensor data, in the order in which it was added.
#[derive(Debug, Default)]
pub struct GgufWriter {
    keys: Vec<u8>, // As on disk.
    n_keys: u64,
    names: HashSet<String>, // Of keys and tensors: which were used.
    tensors: Vec<Planned>,
    tensor_infos: Vec<u8>, // As on disk.
    data_bytes: u64,       // Where the next tensor starts.
}

#[derive(Debug)]
struct Planned {
    name: String,
    n_bytes: u64,
}

impl GgufWriter {
    /// A file without keys and tensors.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a number.
    ///
    /// # Errors
    /// The key is there already.
    pub fn u32(&mut self, key: &str, value: u32) -> Result<(), GgufWriteError> {
        self.key(key, ValueType::U32, &value.to_le_bytes())
    }

    /// Adds a number.
    ///
    /// # Errors
    /// The key is there already.
    pub fn f32(&mut self, key: &str, value: f32) -> Result<(), GgufWriteError> {
        self.key(key, ValueType::F32, &value.to_le_bytes())
    }

    /// Adds a truth value.
    ///
    /// # Errors
    /// The key is there already.
    pub fn bool(&mut self, key: &str, value: bool) -> Result<(), GgufWriteError> {
        self.key(key, ValueType::Bool, &[value.into()])
    }

    /// Adds a string.
    ///
    /// # Errors
    /// The key is there already.
    pub fn str(&mut self, key: &str, value: &str) -> Result<(), GgufWriteError> {
        self.key(key, ValueType::String, &[])?;
        push_string(&mut self.keys, value);
        Ok(())
    }

    /// Adds an array of strings.
    ///
    /// # Errors
    /// The key is there already.
    pub fn strings<'a>(
        &mut self,
        key: &str,
        values: impl ExactSizeIterator<Item = &'a str>,
    ) -> Result<(), GgufWriteError> {
        self.array(key, ValueType::String, values.len())?;
        for value in values {
            push_string(&mut self.keys, value);
        }
        Ok(())
    }

    /// Adds an array of `i32`.
    ///
    /// # Errors
    /// The key is there already.
    pub fn i32s(&mut self, key: &str, values: &[i32]) -> Result<(), GgufWriteError> {
        self.array(key, ValueType::I32, values.len())?;
        self.keys.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        Ok(())
    }

    /// Adds an array of `f32`.
    ///
    /// # Errors
    /// The key is there already.
    pub fn f32s(&mut self, key: &str, values: &[f32]) -> Result<(), GgufWriteError> {
        self.array(key, ValueType::F32, values.len())?;
        self.keys.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        Ok(())
    }

    /// Adds a value as another file has it.
    ///
    /// # Errors
    /// The key is there already.
    pub fn value(&mut self, key: &str, value: Value<'_>) -> Result<(), GgufWriteError> {
        match value {
            Value::U8(number) => self.key(key, ValueType::U8, &number.to_le_bytes()),
            Value::I8(number) => self.key(key, ValueType::I8, &number.to_le_bytes()),
            Value::U16(number) => self.key(key, ValueType::U16, &number.to_le_bytes()),
            Value::I16(number) => self.key(key, ValueType::I16, &number.to_le_bytes()),
            Value::U32(number) => self.u32(key, number),
            Value::I32(number) => self.key(key, ValueType::I32, &number.to_le_bytes()),
            Value::F32(number) => self.f32(key, number),
            Value::Bool(truth) => self.bool(key, truth),
            Value::String(text) => self.str(key, text),
            Value::U64(number) => self.key(key, ValueType::U64, &number.to_le_bytes()),
            Value::I64(number) => self.key(key, ValueType::I64, &number.to_le_bytes()),
            Value::F64(number) => self.key(key, ValueType::F64, &number.to_le_bytes()),
            Value::Strings(array) => {
                self.array(key, ValueType::String, array.len())?;
                self.keys.extend(array.raw());
                Ok(())
            }
            Value::Numbers(array) => self.numbers(key, array),
        }
    }

    /// Plans a tensor; its bytes come later, in the same order. `dims` has the contiguous dimension first.
    ///
    /// # Errors
    /// The name is taken or too long, or the type cannot hold the shape.
    pub fn tensor(&mut self, name: &str, kind: TensorType, dims: &[u64]) -> Result<(), GgufWriteError> {
        if name.len() as u64 > TENSOR_NAME_BYTES_MAX || name.is_empty() {
            return Err(GgufWriteError::TensorName { name: name.to_owned() });
        }
        if !self.names.insert(format!("tensor {name}")) {
            return Err(GgufWriteError::DuplicateTensor { name: name.to_owned() });
        }
        let shape_error = || GgufWriteError::Shape { name: name.to_owned(), dims: dims.to_vec(), kind };
        if dims.is_empty() || dims.len() > DIMS_MAX || dims.contains(&0) {
            return Err(shape_error());
        }
        let n_rows = dims[1..].iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim));
        let n_bytes = n_rows.and_then(|n_rows| kind.n_bytes(dims[0], n_rows)).ok_or_else(shape_error)?;
        push_string(&mut self.tensor_infos, name);
        let n_dims = u32::try_from(dims.len()).map_err(|_| shape_error())?;
        self.tensor_infos.extend(n_dims.to_le_bytes());
        self.tensor_infos.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        self.tensor_infos.extend(kind.id().to_le_bytes());
        self.tensor_infos.extend(self.data_bytes.to_le_bytes());
        self.data_bytes = padded(self.data_bytes.checked_add(n_bytes).ok_or_else(shape_error)?);
        self.tensors.push(Planned { name: name.to_owned(), n_bytes });
        Ok(())
    }

    /// Bytes the tensor data will have, padding included.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Writes everything up to the tensor data.
    ///
    /// # Errors
    /// The sink refuses.
    pub fn start<W: Write>(self, sink: W) -> Result<TensorWriter<W>, GgufWriteError> {
        let mut writer =
            TensorWriter { sink, tensors: self.tensors.into_iter(), current: None, written: 0, total: 0 };
        let n_tensors = writer.tensors.len() as u64;
        writer.put(b"GGUF")?;
        writer.put(&3_u32.to_le_bytes())?;
        writer.put(&n_tensors.to_le_bytes())?;
        writer.put(&self.n_keys.to_le_bytes())?;
        writer.put(&self.keys)?;
        writer.put(&self.tensor_infos)?;
        writer.pad()?;
        writer.current = writer.tensors.next();
        Ok(writer)
    }

    fn key(&mut self, key: &str, kind: ValueType, bytes: &[u8]) -> Result<(), GgufWriteError> {
        if !self.names.insert(format!("key {key}")) {
            return Err(GgufWriteError::DuplicateKey { key: key.to_owned() });
        }
        self.n_keys += 1;
        push_string(&mut self.keys, key);
        self.keys.extend(kind.id().to_le_bytes());
        self.keys.extend(bytes);
        Ok(())
    }

    fn array(&mut self, key: &str, element: ValueType, len: usize) -> Result<(), GgufWriteError> {
        self.key(key, ValueType::Array, &element.id().to_le_bytes())?;
        self.keys.extend((len as u64).to_le_bytes());
        Ok(())
    }

    fn numbers(&mut self, key: &str, array: NumberArray<'_>) -> Result<(), GgufWriteError> {
        self.array(key, array.element_type(), array.len())?;
        self.keys.extend(array.bytes());
        Ok(())
    }
}

/// Takes the tensors' bytes, in the order in which the tensors were planned.
#[derive(Debug)]
pub struct TensorWriter<W> {
    sink: W,
    tensors: std::vec::IntoIter<Planned>, // After `current`.
    current: Option<Planned>,
    written: u64, // Bytes of `current`.
    total: u64,   // Bytes of the file.
}

impl<W: Write> TensorWriter<W> {
    /// Appends bytes to the tensor whose turn it is; the last of them end it.
    ///
    /// # Errors
    /// More bytes than the tensor has, or the sink refuses.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), GgufWriteError> {
        let expected = self.current.as_ref().map_or(0, |tensor| tensor.n_bytes);
        let found = self.written + bytes.len() as u64;
        if found > expected {
            let name = self.current.as_ref().map_or("after the last one", |tensor| &tensor.name).to_owned();
            return Err(GgufWriteError::Length { name, expected, found });
        }
        self.put(bytes)?;
        self.written = found;
        if found == expected && self.current.is_some() {
            self.pad()?;
            self.written = 0;
            self.current = self.tensors.next();
        }
        Ok(())
    }

    /// Flushes, once every tensor has all its bytes.
    ///
    /// # Errors
    /// A tensor is not complete, or the sink refuses.
    pub fn finish(mut self) -> Result<W, GgufWriteError> {
        if let Some(tensor) = self.current {
            return Err(GgufWriteError::Length {
                name: tensor.name,
                expected: tensor.n_bytes,
                found: self.written,
            });
        }
        self.sink.flush().map_err(GgufWriteError::Write)?;
        Ok(self.sink)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), GgufWriteError> {
        self.total += bytes.len() as u64;
        self.sink.write_all(bytes).map_err(GgufWriteError::Write)
    }

    fn pad(&mut self) -> Result<(), GgufWriteError> {
        while self.total < padded(self.total) {
            self.put(&[0])?;
        }
        Ok(())
    }
}

fn padded(n_bytes: u64) -> u64 {
    n_bytes.next_multiple_of(ALIGNMENT_DEFAULT)
}

fn push_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::gguf::Gguf;
    use crate::mapping::Mapping;

    fn parse(bytes: &[u8]) -> Gguf {
        Gguf::parse(Arc::new(Mapping::from_bytes(bytes).unwrap())).unwrap()
    }

    fn sample() -> Vec<u8> {
        let mut writer = GgufWriter::new();
        writer.str("general.architecture", "bitnet-b1.58").unwrap();
        writer.u32("u32", 7).unwrap();
        writer.f32("f32", 0.5).unwrap();
        writer.bool("bool", true).unwrap();
        writer.strings("strings", ["a", "", "ccc"].into_iter()).unwrap();
        writer.i32s("i32s", &[-1, 2]).unwrap();
        writer.f32s("f32s", &[1.0]).unwrap();
        for value in
            [Value::U8(1), Value::I8(-1), Value::U16(1), Value::I16(-1), Value::I32(-1), Value::U64(1)]
        {
            writer.value(value.value_type().name(), value).unwrap();
        }
        writer.value("i64", Value::I64(-9)).unwrap();
        writer.value("f64", Value::F64(0.25)).unwrap();
        writer.tensor("odd", TensorType::F32, &[3]).unwrap();
        writer.tensor("ternary", TensorType::I2S, &[128, 2]).unwrap();
        let mut data = writer.start(Vec::new()).unwrap();
        data.append(&[1; 8]).unwrap();
        data.append(&[2; 4]).unwrap();
        data.append(&[3; 96]).unwrap();
        data.finish().unwrap()
    }

    #[test]
    fn what_is_written_is_read_and_writes_the_same_again() {
        let first = sample();
        let gguf = parse(&first);
        assert_eq!(gguf.tensor("odd").unwrap().data, [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
        assert_eq!(gguf.metadata().strings("strings").unwrap().unwrap().get(2), Some("ccc"));
        let mut writer = GgufWriter::new();
        for (key, value) in gguf.metadata().iter() {
            writer.value(key, value).unwrap();
        }
        for tensor in gguf.tensors() {
            writer.tensor(tensor.name, tensor.kind, tensor.dims).unwrap();
        }
        let mut data = writer.start(Vec::new()).unwrap();
        for tensor in gguf.tensors() {
            data.append(tensor.data).unwrap();
        }
        assert_eq!(data.finish().unwrap(), first);
    }

    #[test]
    fn misuse_is_an_error() {
        let mut writer = GgufWriter::new();
        writer.u32("k", 1).unwrap();
        assert!(matches!(writer.f32("k", 1.0), Err(GgufWriteError::DuplicateKey { .. })));
        writer.tensor("t", TensorType::F32, &[2]).unwrap();
        assert!(matches!(
            writer.tensor("t", TensorType::F32, &[2]),
            Err(GgufWriteError::DuplicateTensor { .. })
        ));
        assert!(matches!(writer.tensor("u", TensorType::I2S, &[64]), Err(GgufWriteError::Shape { .. })));
        assert!(matches!(writer.tensor("v", TensorType::F32, &[0]), Err(GgufWriteError::Shape { .. })));
        let mut data = writer.start(Vec::new()).unwrap();
        assert!(matches!(data.append(&[0; 9]), Err(GgufWriteError::Length { .. })));
        data.append(&[0; 7]).unwrap();
        assert!(matches!(data.finish(), Err(GgufWriteError::Length { expected: 8, found: 7, .. })));
    }
}
