//! What the reader accepts and, mostly, what it refuses.

use std::sync::Arc;

use super::*;

/// Bytes of a file, put together without any of the writer's care.
#[derive(Clone, Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn head(n_tensors: u64, n_keys: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(n_tensors).u64(n_keys)
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    fn key_u32(self, key: &str, value: u32) -> Self {
        self.string(key).u32(4).u32(value)
    }

    fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let mut raw = self.string(name).u32(u32::try_from(dims.len()).unwrap());
        for &dim in dims {
            raw = raw.u64(dim);
        }
        raw.u32(kind).u64(offset)
    }

    fn data(mut self, n_bytes: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + n_bytes, 0);
        self
    }

    fn parse(&self) -> Result<Gguf, GgufError> {
        Gguf::parse(Arc::new(Mapping::from_bytes(&self.0).unwrap()))
    }

    #[track_caller]
    fn error(&self) -> String {
        self.parse().expect_err("a bad file must be refused").to_string()
    }
}

/// One key of each type, and three tensors.
fn sample() -> Raw {
    let mut raw = Raw::head(3, 14)
        .string("general.architecture")
        .u32(8)
        .string("bitnet-b1.58")
        .key_u32("a.u32", 7)
        .string("a.u8")
        .u32(0)
        .bytes(&[200])
        .string("a.i8")
        .u32(1)
        .bytes(&[200])
        .string("a.u16")
        .u32(2)
        .bytes(&[1, 2])
        .string("a.i16")
        .u32(3)
        .bytes(&[0, 128])
        .string("a.i32")
        .u32(5)
        .u32(u32::MAX)
        .string("a.f32")
        .u32(6)
        .bytes(&1.5_f32.to_le_bytes())
        .string("a.bool")
        .u32(7)
        .bytes(&[1])
        .string("a.u64")
        .u32(10)
        .u64(1 << 40)
        .string("a.f64")
        .u32(12)
        .bytes(&2.5_f64.to_le_bytes())
        .string("a.strings")
        .u32(9)
        .u32(8)
        .u64(20);
    for idx in 0..20 {
        raw = raw.string(&"ab".repeat(idx));
    }
    raw.string("a.i32s")
        .u32(9)
        .u32(5)
        .u64(3)
        .u32(1)
        .u32(2)
        .u32(u32::MAX)
        .string("a.f32s")
        .u32(9)
        .u32(6)
        .u64(1)
        .bytes(&0.25_f32.to_le_bytes())
        .tensor("ternary", &[128, 2], 36, 0)
        .tensor("norm", &[8], 0, 96)
        .tensor("blocks", &[32, 1, 1, 2], 8, 128)
        .data(128 + 68)
}

#[test]
fn reads_every_value_type() {
    let gguf = sample().parse().unwrap();
    let metadata = gguf.metadata();
    assert_eq!(metadata.len(), 14);
    assert_eq!(metadata.str("general.architecture"), Ok(Some("bitnet-b1.58")));
    assert_eq!(metadata.u32("a.u32"), Ok(Some(7)));
    assert_eq!(metadata.u32("a.u8"), Ok(Some(200)));
    assert_eq!(metadata.get("a.i8").unwrap().as_integer(), Some(-56));
    assert_eq!(metadata.get("a.i16").unwrap().as_integer(), Some(-32768));
    assert_eq!(metadata.f32("a.f32"), Ok(Some(1.5)));
    assert_eq!(metadata.f32("a.f64"), Ok(Some(2.5)));
    assert_eq!(metadata.bool("a.bool"), Ok(Some(true)));
    assert_eq!(metadata.u32("a.missing"), Ok(None));
    let strings = metadata.strings("a.strings").unwrap().unwrap();
    assert_eq!(strings.len(), 20);
    for (idx, text) in strings.iter().enumerate() {
        assert_eq!(text, "ab".repeat(idx));
        assert_eq!(strings.get(idx), Some(text));
    }
    assert_eq!(strings.get(20), None);
    assert_eq!(metadata.i32s("a.i32s").unwrap().unwrap().iter().collect::<Vec<_>>(), [1, 2, -1]);
    assert_eq!(metadata.f32s("a.f32s").unwrap().unwrap().get(0), Some(0.25));
}

#[test]
fn typed_access_says_what_was_expected() {
    let gguf = sample().parse().unwrap();
    let metadata = gguf.metadata();
    let text = |error: GgufError| error.to_string();
    assert_eq!(
        text(metadata.u32("a.i32").unwrap_err()),
        "metadata key `a.i32` is -1 (i32): expected an integer from 0 to 4294967295"
    );
    assert_eq!(
        text(metadata.str("a.strings").unwrap_err()),
        "metadata key `a.strings` is array of 20 string: expected a string"
    );
    assert_eq!(
        text(metadata.f32s("a.i32s").unwrap_err()),
        "metadata key `a.i32s` is array of 3 i32: expected an array of f32"
    );
}

#[test]
fn tensors_are_views_of_exactly_their_bytes() {
    let gguf = sample().parse().unwrap();
    let sizes: Vec<_> = gguf.tensors().map(|tensor| (tensor.name, tensor.kind, tensor.data.len())).collect();
    assert_eq!(
        sizes,
        [("ternary", TensorType::I2S, 96), ("norm", TensorType::F32, 32), ("blocks", TensorType::Q8_0, 68)]
    );
    let blocks = gguf.tensor("blocks").unwrap();
    assert_eq!((blocks.n_cols(), blocks.n_rows(), blocks.dims), (32, 2, &[32, 1, 1, 2][..]));
    assert_eq!(blocks.data.as_ptr() as usize % 32, 0);
    assert!(gguf.tensor("block").is_none());
}

#[test]
fn version_2_is_read_and_others_are_named() {
    let with_version = |version: u32| {
        let mut raw = sample();
        raw.0[4..8].copy_from_slice(&version.to_le_bytes());
        raw
    };
    assert_eq!(with_version(2).parse().unwrap().version(), 2);
    assert!(with_version(1).error().contains("August 2023"));
    assert_eq!(with_version(4).error(), "GGUF version `4` is not supported: expected 2 or 3");
    assert!(with_version(3_u32.swap_bytes()).error().starts_with("big-endian GGUF file (version 3)"));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = sample();
    for len in 0..whole.0.len() {
        let cut = Raw(whole.0[..len].to_vec());
        assert!(cut.parse().is_err(), "the first {len} of {} bytes were accepted", whole.0.len());
    }
    let last = Raw(whole.0[..whole.0.len() - 1].to_vec()).error();
    assert!(last.starts_with("tensor `blocks` needs 68 bytes at offset 128"), "{last}");
}

#[test]
fn any_one_changed_byte_never_panics() {
    let whole = sample();
    for at in 0..whole.0.len() {
        for value in [0, 1, 8, 9, 0x7f, 0x80, 0xff, whole.0[at] ^ 1] {
            let mut changed = whole.clone();
            changed.0[at] = value;
            if let Ok(gguf) = changed.parse() {
                let n: usize = gguf.tensors().map(|tensor| tensor.data.len()).sum();
                assert!(n <= gguf.file_bytes());
            }
        }
    }
}

#[test]
fn counts_and_lengths_that_lie_are_refused_at_once() {
    let huge = u64::MAX;
    assert!(Raw::head(huge, 0).error().contains("number of tensors"));
    assert!(Raw::head(0, huge).error().contains("number of metadata keys"));
    assert!(Raw::head(0, KEYS_MAX).error().contains("file ends inside the name of metadata key number 0"));
    assert!(Raw::head(TENSORS_MAX, 0).error().contains("file ends inside the name of tensor number 0"));
    assert!(Raw::head(0, 1).u64(huge).bytes(&[b'a'; 64]).error().contains("length of the name"));
    let string = Raw::head(0, 1).string("k").u32(8);
    assert!(string.clone().u64(huge).error().contains("the value of metadata key `k`"));
    assert!(string.u64(1000).error().contains("1000 bytes needed"));
    for element in [0, 4, 8, 10] {
        let array = Raw::head(0, 1).string("k").u32(9).u32(element);
        assert!(array.clone().u64(huge).error().contains("`k`"));
        assert!(array.clone().u64(ARRAY_LEN_MAX).error().contains("file ends inside"));
        assert!(array.u64(ARRAY_LEN_MAX + 1).error().contains("the limit is 16777216"));
    }
}

#[test]
fn metadata_faults_name_the_key() {
    let twice = Raw::head(0, 2).key_u32("k", 1).key_u32("k", 2);
    assert_eq!(twice.error(), "metadata key `k` occurs twice");
    let nested = Raw::head(0, 1).string("k").u32(9).u32(9).u64(1).u32(9).u64(1);
    assert_eq!(nested.error(), "metadata key `k` is an array of arrays, which no model needs");
    let unknown = Raw::head(0, 1).string("k").u32(13).u64(0);
    assert!(unknown.error().contains("`k` has the unknown value type 13"));
    let truth = Raw::head(0, 1).string("k").u32(7).bytes(&[2]);
    assert!(truth.error().contains("`k` has the truth value 2"));
    let empty = Raw::head(0, 1).key_u32("", 1);
    assert_eq!(empty.error(), "the name of metadata key number 0 is empty");
    let utf8 = Raw::head(0, 1).string("k").u32(8).u64(2).bytes(&[0xff, 0xfe]);
    assert_eq!(utf8.error(), "the value of metadata key `k` is not UTF-8");
    let long = Raw::head(0, 1).key_u32(&"k".repeat(65_536), 1);
    assert!(long.error().contains("is 65536, the limit is 65535"));
    assert!(Raw::head(0, 1).key_u32(&"k".repeat(65_535), 1).parse().is_ok());
}

#[test]
fn alignment_is_a_small_power_of_two() {
    for bad in [0, 3, 24, 131_072, u32::MAX] {
        let raw = Raw::head(0, 1).key_u32("general.alignment", bad);
        assert!(raw.error().contains(&format!("`general.alignment` is {bad}")));
    }
    for good in [1, 8, 64, 65_536] {
        assert_eq!(
            Raw::head(0, 1).key_u32("general.alignment", good).parse().unwrap().alignment(),
            u64::from(good)
        );
    }
    let text = Raw::head(0, 1).string("general.alignment").u32(8).string("32");
    assert!(text.error().contains("`general.alignment` is string: expected an integer"));
}

#[test]
fn tensor_faults_name_the_tensor() {
    let one = |dims: &[u64], kind, offset| Raw::head(1, 0).tensor("t", dims, kind, offset).data(4096);
    assert!(one(&[], 0, 0).error().contains("tensor `t` has 0 dimensions"));
    assert!(one(&[1; 5], 0, 0).error().contains("tensor `t` has 5 dimensions"));
    assert!(one(&[4, 0], 0, 0).error().contains("tensor `t` has shape [4, 0]: a dimension is 0"));
    assert!(one(&[1 << 32, 1 << 32], 0, 0).error().contains("does not fit"));
    assert!(one(&[1 << 40, 1 << 22], 28, 0).error().contains("does not fit"));
    assert!(one(&[4], 38, 0).error().contains("tensor `t` has type number 38: TL1"));
    assert!(one(&[4], 1000, 0).error().contains("tensor `t` has type number 1000"));
    assert!(one(&[100], 36, 0).error().contains("rows of 100 elements: expected a multiple of 128"));
    assert!(one(&[128], 35, 0).error().contains("expected a multiple of 256"));
    assert!(one(&[4], 0, 8).error().contains("offset 8, which is not a multiple of the alignment 32"));
    assert!(
        one(&[1025], 0, 0)
            .error()
            .contains("needs 4100 bytes at offset 0 of the tensor data, the file has 4096")
    );
    assert!(one(&[1], 0, 4096).error().contains("the file has 0 there"));
    assert!(one(&[1], 0, u64::MAX - 31).error().contains("the file has 0 there"));
    assert!(one(&[1024], 0, 0).parse().is_ok());
    // The codes are there, the trailer with the scale is not.
    assert!(one(&[128, 128], 36, 0).error().contains("needs 4128 bytes"));
    let long = Raw::head(1, 0).tensor(&"t".repeat(65), &[1], 0, 0).data(32);
    assert!(long.error().contains("is 65, the limit is 64"));
    assert!(Raw::head(1, 0).tensor("", &[1], 0, 0).data(32).error().contains("is empty"));
}

#[test]
fn tensors_may_not_share_a_name_or_bytes() {
    let twice = Raw::head(2, 0).tensor("t", &[8], 0, 0).tensor("t", &[8], 0, 32).data(64);
    assert_eq!(twice.error(), "tensor `t` occurs twice");
    let overlap = Raw::head(2, 0).tensor("b", &[8], 0, 32).tensor("a", &[9], 0, 0).data(64);
    assert_eq!(overlap.error(), "tensors `a` and `b` overlap: `a` ends at offset 36, `b` starts at 32");
    // Gaps and any order are fine.
    assert!(Raw::head(2, 0).tensor("b", &[8], 0, 96).tensor("a", &[9], 0, 0).data(128).parse().is_ok());
}
