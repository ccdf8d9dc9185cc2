//! The parser: one pass over everything in front of the tensor data, each number checked before it is used.

use std::ops::Range;
use std::sync::Arc;

use super::cursor::Cursor;
use super::metadata::{Entry, Stored, Table};
use super::value::{self, STRING_STRIDE, ValueType};
use super::{
    ALIGNMENT_DEFAULT, ALIGNMENT_MAX, ARRAY_LEN_MAX, DIMS_MAX, Gguf, GgufError, KEY_BYTES_MAX, KEYS_MAX,
    Metadata, STRING_BYTES_MAX, TENSOR_NAME_BYTES_MAX, TENSORS_MAX, TensorInfo, TensorType, foreign,
    tensor_type,
};
use crate::mapping::Mapping;

/// See [`Gguf::parse`].
pub(super) fn parse(mapping: Arc<Mapping>) -> Result<Gguf, GgufError> {
    let mut cursor = Cursor::new(&mapping);
    let version = parse_version(&mut cursor)?;
    let n_tensors = cursor.u64().map_err(|cut| cut.inside("the tensor count"))?;
    let n_keys = cursor.u64().map_err(|cut| cut.inside("the metadata count"))?;
    check_limit("the number of tensors", n_tensors, TENSORS_MAX)?;
    check_limit("the number of metadata keys", n_keys, KEYS_MAX)?;

    // Neither vector is given room by what the file claims: they grow with what it really holds.
    let mut entries = Vec::new();
    for idx in 0..n_keys {
        entries.push(parse_entry(&mut cursor, idx)?);
    }
    let table = Table::new(entries, &mapping)?;
    let alignment = alignment_of(&table.over(&mapping))?;

    let mut unplaced = Vec::new();
    for idx in 0..n_tensors {
        unplaced.push(parse_tensor(&mut cursor, idx)?);
    }
    let data_start = cursor.at().next_multiple_of(usize::try_from(alignment).unwrap_or(usize::MAX));
    let mut tensors = Vec::with_capacity(unplaced.len());
    for tensor in unplaced {
        tensors.push(place(tensor, &mapping, data_start, alignment)?);
    }
    let by_name = sort_by_name(&tensors, &mapping)?;
    check_overlap(&tensors, &mapping, data_start)?;
    Ok(Gguf { version, alignment, data_start, table, tensors, by_name, mapping })
}

fn parse_version(cursor: &mut Cursor<'_>) -> Result<u32, GgufError> {
    let file = cursor.bytes();
    let magic =
        cursor.array::<4>().map_err(|_| GgufError::Magic { looks_like: foreign::looks_like(file) })?;
    if &magic != b"GGUF" {
        return Err(GgufError::Magic { looks_like: foreign::looks_like(file) });
    }
    let version = cursor.u32().map_err(|cut| cut.inside("the version"))?;
    match version {
        2 | 3 => Ok(version),
        1 => Err(GgufError::Version { version, hint: " (a format of August 2023: convert the model again)" }),
        _ if (1..=3).contains(&version.swap_bytes()) => {
            Err(GgufError::BigEndian { version: version.swap_bytes() })
        }
        _ => Err(GgufError::Version { version, hint: "" }),
    }
}

fn parse_entry(cursor: &mut Cursor<'_>, idx: u64) -> Result<Entry, GgufError> {
    let key = parse_string(cursor, KEY_BYTES_MAX, || format!("the name of metadata key number {idx}"))?;
    if key.is_empty() {
        return Err(GgufError::Empty { what: format!("the name of metadata key number {idx}") });
    }
    let name = value::utf8(&cursor.bytes()[key.clone()]);
    let what = || format!("the value of metadata key `{name}`");
    let kind = parse_value_type(cursor, name)?;
    let value = match kind {
        ValueType::String => Stored::String(parse_string(cursor, STRING_BYTES_MAX, what)?),
        ValueType::Array => parse_array(cursor, name)?,
        scalar => {
            let bytes = cursor.take(scalar.n_bytes().unwrap_or(0)).map_err(|cut| cut.inside(what()))?;
            if scalar == ValueType::Bool {
                check_bools(&cursor.bytes()[bytes.clone()], name)?;
            }
            Stored::Scalar { kind: scalar, bytes }
        }
    };
    Ok(Entry { key, value })
}

fn parse_value_type(cursor: &mut Cursor<'_>, key: &str) -> Result<ValueType, GgufError> {
    let id = cursor.u32().map_err(|cut| cut.inside(format!("the value type of metadata key `{key}`")))?;
    ValueType::from_id(id).ok_or_else(|| GgufError::ValueType { key: key.to_owned(), found: id })
}

fn parse_array(cursor: &mut Cursor<'_>, key: &str) -> Result<Stored, GgufError> {
    let element_type = parse_value_type(cursor, key)?;
    let what = || format!("the array of metadata key `{key}`");
    let len = cursor.u64().map_err(|cut| cut.inside(what()))?;
    check_limit(format!("the length of the array of metadata key `{key}`"), len, ARRAY_LEN_MAX)?;
    match element_type {
        ValueType::Array => Err(GgufError::NestedArray { key: key.to_owned() }),
        ValueType::String => parse_strings(cursor, key, len),
        number => {
            // No overflow: 2^24 elements of at most 8 bytes.
            let n_bytes = len * number.n_bytes().unwrap_or(0);
            let bytes = cursor.take(n_bytes).map_err(|cut| cut.inside(what()))?;
            if number == ValueType::Bool {
                check_bools(&cursor.bytes()[bytes.clone()], key)?;
            }
            Ok(Stored::Numbers { element_type: number, bytes })
        }
    }
}

fn parse_strings(cursor: &mut Cursor<'_>, key: &str, len: u64) -> Result<Stored, GgufError> {
    let start = cursor.at();
    let mut checkpoints = Vec::new();
    for idx in 0..len {
        if idx.is_multiple_of(STRING_STRIDE as u64) {
            checkpoints.push((cursor.at() - start) as u64);
        }
        parse_string(cursor, STRING_BYTES_MAX, || format!("string {idx} of metadata key `{key}`"))?;
    }
    checkpoints.shrink_to_fit();
    // Lossless: at least 8 bytes of the file were read for each.
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    Ok(Stored::Strings { bytes: start..cursor.at(), len, checkpoints })
}

fn parse_string(
    cursor: &mut Cursor<'_>,
    bytes_max: u64,
    what: impl Fn() -> String,
) -> Result<Range<usize>, GgufError> {
    let n_bytes = cursor.u64().map_err(|cut| cut.inside(what()))?;
    if n_bytes > bytes_max {
        return check_limit(format!("the length of {} in bytes", what()), n_bytes, bytes_max).map(|()| 0..0);
    }
    let range = cursor.take(n_bytes).map_err(|cut| cut.inside(what()))?;
    if std::str::from_utf8(&cursor.bytes()[range.clone()]).is_err() {
        return Err(GgufError::Utf8 { what: what() });
    }
    Ok(range)
}

fn alignment_of(metadata: &Metadata<'_>) -> Result<u64, GgufError> {
    let found = metadata.u32("general.alignment")?.map_or(ALIGNMENT_DEFAULT, u64::from);
    if found.is_power_of_two() && found <= ALIGNMENT_MAX {
        Ok(found)
    } else {
        Err(GgufError::Alignment { found })
    }
}

// A tensor whose place in the file is not checked yet.
struct Unplaced {
    name: Range<usize>,
    kind: TensorType,
    dims: [u64; DIMS_MAX],
    n_dims: usize,
    offset: u64,
    n_bytes: u64,
}

fn parse_tensor(cursor: &mut Cursor<'_>, idx: u64) -> Result<Unplaced, GgufError> {
    let what = || format!("the name of tensor number {idx}");
    let name = parse_string(cursor, TENSOR_NAME_BYTES_MAX, what)?;
    if name.is_empty() {
        return Err(GgufError::Empty { what: what() });
    }
    let text = value::utf8(&cursor.bytes()[name.clone()]);
    let what = || format!("the description of tensor `{text}`");
    let n_dims_found = cursor.u32().map_err(|cut| cut.inside(what()))?;
    let n_dims = usize::try_from(n_dims_found).unwrap_or(usize::MAX);
    if !(1..=DIMS_MAX).contains(&n_dims) {
        return Err(GgufError::Dimensions { name: text.to_owned(), found: n_dims_found });
    }
    let mut dims = [1; DIMS_MAX];
    for dim in &mut dims[..n_dims] {
        *dim = cursor.u64().map_err(|cut| cut.inside(what()))?;
    }
    let id = cursor.u32().map_err(|cut| cut.inside(what()))?;
    let offset = cursor.u64().map_err(|cut| cut.inside(what()))?;
    let kind = TensorType::from_id(id).ok_or_else(|| GgufError::TensorType {
        name: text.to_owned(),
        id,
        hint: tensor_type::describe_unknown_id(id),
    })?;
    let n_bytes = tensor_bytes(text, kind, &dims[..n_dims])?;
    Ok(Unplaced { name, kind, dims, n_dims, offset, n_bytes })
}

fn tensor_bytes(name: &str, kind: TensorType, dims: &[u64]) -> Result<u64, GgufError> {
    let shape_error = |problem| GgufError::Shape { name: name.to_owned(), dims: dims.to_vec(), problem };
    if dims.contains(&0) {
        return Err(shape_error("a dimension is 0"));
    }
    let too_large = || shape_error("the number of elements does not fit into 63 bits");
    let n_elements = dims.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim));
    if n_elements.is_none_or(|n| n > u64::MAX / 2) {
        return Err(too_large());
    }
    let (row_len, block) = (dims[0], kind.block_len());
    if !row_len.is_multiple_of(block) {
        return Err(GgufError::RowLength { name: name.to_owned(), kind, found: row_len, block });
    }
    let n_rows = dims[1..].iter().product();
    kind.n_bytes(row_len, n_rows).ok_or_else(too_large)
}

fn place(tensor: Unplaced, file: &[u8], data_start: usize, alignment: u64) -> Result<TensorInfo, GgufError> {
    let Unplaced { name, kind, dims, n_dims, offset, n_bytes } = tensor;
    let text = || value::utf8(&file[name.clone()]).to_owned();
    if !offset.is_multiple_of(alignment) {
        return Err(GgufError::Misaligned { name: text(), offset, alignment });
    }
    let data_bytes = file.len().saturating_sub(data_start) as u64;
    let available = data_bytes.saturating_sub(offset);
    if n_bytes > available {
        return Err(GgufError::TensorOutOfBounds { name: text(), offset, needed: n_bytes, available });
    }
    // Lossless: both are at most the length of a slice.
    let start = data_start + usize::try_from(offset).unwrap_or(0);
    let end = start + usize::try_from(n_bytes).unwrap_or(0);
    Ok(TensorInfo { name, kind, dims, n_dims, data: start..end })
}

fn sort_by_name(tensors: &[TensorInfo], file: &[u8]) -> Result<Vec<u32>, GgufError> {
    let name_of = |idx: u32| &file[tensors[idx as usize].name.clone()];
    let mut by_name: Vec<u32> = (0..).take(tensors.len()).collect();
    by_name.sort_unstable_by_key(|&idx| name_of(idx));
    match by_name.windows(2).find(|pair| name_of(pair[0]) == name_of(pair[1])) {
        Some(twice) => Err(GgufError::DuplicateTensor { name: value::utf8(name_of(twice[0])).to_owned() }),
        None => Ok(by_name),
    }
}

fn check_overlap(tensors: &[TensorInfo], file: &[u8], data_start: usize) -> Result<(), GgufError> {
    let mut by_start: Vec<&TensorInfo> = tensors.iter().collect();
    by_start.sort_unstable_by_key(|tensor| tensor.data.start);
    let text = |tensor: &TensorInfo| value::utf8(&file[tensor.name.clone()]).to_owned();
    match by_start.windows(2).find(|pair| pair[0].data.end > pair[1].data.start) {
        Some(pair) => Err(GgufError::Overlap {
            first: text(pair[0]),
            second: text(pair[1]),
            end: (pair[0].data.end - data_start) as u64,
            start: (pair[1].data.start - data_start) as u64,
        }),
        None => Ok(()),
    }
}

fn check_bools(bytes: &[u8], key: &str) -> Result<(), GgufError> {
    match bytes.iter().find(|&&byte| byte > 1) {
        Some(&found) => Err(GgufError::Bool { key: key.to_owned(), found }),
        None => Ok(()),
    }
}

fn check_limit(what: impl Into<String>, found: u64, limit: u64) -> Result<(), GgufError> {
    if found <= limit { Ok(()) } else { Err(GgufError::Limit { what: what.into(), found, limit }) }
}
