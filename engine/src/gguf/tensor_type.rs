//! Tensor types of GGUF files: the number on disk, the name, and how many bytes a tensor takes.
//!
//! The ids clash: 36 to 39 mean bitnet.cpp's I2_S, I8_S, TL1 and TL2 here, while upstream ggml removed 36 to 38
//! and gave 39 to another type. I2_S is the only one of the four that published files hold.

use std::fmt;

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum TensorType {
    /// `F32` (0): IEEE single precision.
    F32 = 0,
    /// `F16` (1): IEEE half precision.
    F16 = 1,
    /// `Q4_0` (2): blocks of 32, one half-precision scale, 4 bits each.
    Q4_0 = 2,
    /// `Q4_1` (3).
    Q4_1 = 3,
    /// `Q5_0` (6).
    Q5_0 = 6,
    /// `Q5_1` (7).
    Q5_1 = 7,
    /// `Q8_0` (8): blocks of 32, one half-precision scale, 8 bits each.
    Q8_0 = 8,
    /// `Q8_1` (9).
    Q8_1 = 9,
    /// `Q2_K` (10).
    Q2K = 10,
    /// `Q3_K` (11).
    Q3K = 11,
    /// `Q4_K` (12).
    Q4K = 12,
    /// `Q5_K` (13).
    Q5K = 13,
    /// `Q6_K` (14): blocks of 256, 16 sub-scales of 8 bits, 6 bits each.
    Q6K = 14,
    /// `Q8_K` (15).
    Q8K = 15,
    /// `IQ2_XXS` (16).
    Iq2Xxs = 16,
    /// `IQ2_XS` (17).
    Iq2Xs = 17,
    /// `IQ3_XXS` (18).
    Iq3Xxs = 18,
    /// `IQ1_S` (19).
    Iq1S = 19,
    /// `IQ4_NL` (20).
    Iq4Nl = 20,
    /// `IQ3_S` (21).
    Iq3S = 21,
    /// `IQ2_S` (22).
    Iq2S = 22,
    /// `IQ4_XS` (23).
    Iq4Xs = 23,
    /// `I8` (24).
    I8 = 24,
    /// `I16` (25).
    I16 = 25,
    /// `I32` (26).
    I32 = 26,
    /// `I64` (27).
    I64 = 27,
    /// `F64` (28).
    F64 = 28,
    /// `IQ1_M` (29).
    Iq1M = 29,
    /// `BF16` (30): the upper half of IEEE single precision.
    Bf16 = 30,
    /// `TQ1_0` (34): ternary, blocks of 256, five weights a byte, one half-precision scale.
    Tq1_0 = 34,
    /// `TQ2_0` (35): ternary, blocks of 256, four weights a byte, one half-precision scale.
    Tq2_0 = 35,
    /// `I2_S` (36): ternary, blocks of 128, four weights a byte, one single-precision scale for the tensor.
    I2S = 36,
}

/// Columns of one `I2_S` block; the row length is a multiple.
pub const I2S_BLOCK_LEN: u64 = 128;
/// Bytes that follow the codes of an `I2_S` tensor: the scale and what is reserved.
pub const I2S_TRAILER_BYTES: u64 = 32;

impl TensorType {
    /// Every type, by id.
    pub const ALL: [Self; 32] = [
        Self::F32,
        Self::F16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q8_1,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Q8K,
        Self::Iq2Xxs,
        Self::Iq2Xs,
        Self::Iq3Xxs,
        Self::Iq1S,
        Self::Iq4Nl,
        Self::Iq3S,
        Self::Iq2S,
        Self::Iq4Xs,
        Self::I8,
        Self::I16,
        Self::I32,
        Self::I64,
        Self::F64,
        Self::Iq1M,
        Self::Bf16,
        Self::Tq1_0,
        Self::Tq2_0,
        Self::I2S,
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

    /// The type with this name, upper or lower case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(name))
    }

    /// The name that other tools use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q8_1 => "Q8_1",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Q8K => "Q8_K",
            Self::Iq2Xxs => "IQ2_XXS",
            Self::Iq2Xs => "IQ2_XS",
            Self::Iq3Xxs => "IQ3_XXS",
            Self::Iq1S => "IQ1_S",
            Self::Iq4Nl => "IQ4_NL",
            Self::Iq3S => "IQ3_S",
            Self::Iq2S => "IQ2_S",
            Self::Iq4Xs => "IQ4_XS",
            Self::I8 => "I8",
            Self::I16 => "I16",
            Self::I32 => "I32",
            Self::I64 => "I64",
            Self::F64 => "F64",
            Self::Iq1M => "IQ1_M",
            Self::Bf16 => "BF16",
            Self::Tq1_0 => "TQ1_0",
            Self::Tq2_0 => "TQ2_0",
            Self::I2S => "I2_S",
        }
    }

    /// Elements in one block: the row length `dims[0]` is a multiple of it.
    #[must_use]
    pub fn block_len(self) -> u64 {
        self.block().0
    }

    /// Bytes of one block. An `I2_S` tensor has [`I2S_TRAILER_BYTES`] more at its end.
    #[must_use]
    pub fn block_bytes(self) -> u64 {
        self.block().1
    }

    /// Bytes of a tensor of `n_rows` rows of `row_len` elements; `None` if a row is not made of whole blocks or
    /// the number does not fit.
    #[must_use]
    pub fn n_bytes(self, row_len: u64, n_rows: u64) -> Option<u64> {
        if !row_len.is_multiple_of(self.block_len()) {
            return None;
        }
        let blocks = (row_len / self.block_len()).checked_mul(n_rows)?;
        let trailer = if self == Self::I2S { I2S_TRAILER_BYTES } else { 0 };
        blocks.checked_mul(self.block_bytes())?.checked_add(trailer)
    }

    /// Weights that are -1, 0 or 1 times a scale.
    #[must_use]
    pub fn is_ternary(self) -> bool {
        matches!(self, Self::I2S | Self::Tq1_0 | Self::Tq2_0)
    }

    /// Types that this engine computes with.
    #[must_use]
    pub fn is_supported(self) -> bool {
        self.is_ternary()
            || matches!(self, Self::F32 | Self::F16 | Self::Bf16 | Self::Q8_0 | Self::Q6K | Self::Q4_0)
    }

    /// (elements, bytes) of one block.
    fn block(self) -> (u64, u64) {
        match self {
            Self::F32 | Self::I32 => (1, 4),
            Self::F16 | Self::Bf16 | Self::I16 => (1, 2),
            Self::I8 => (1, 1),
            Self::I64 | Self::F64 => (1, 8),
            Self::Q4_0 | Self::Iq4Nl => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q8_1 => (32, 36),
            Self::Q2K => (256, 84),
            Self::Q3K | Self::Iq3S => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
            Self::Q8K => (256, 292),
            Self::Iq2Xxs | Self::Tq2_0 => (256, 66),
            Self::Iq2Xs => (256, 74),
            Self::Iq3Xxs => (256, 98),
            Self::Iq1S => (256, 50),
            Self::Iq2S => (256, 82),
            Self::Iq4Xs => (256, 136),
            Self::Iq1M => (256, 56),
            Self::Tq1_0 => (256, 54),
            Self::I2S => (I2S_BLOCK_LEN, I2S_BLOCK_LEN / 4),
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is known of a type number that no [`TensorType`] has.
#[must_use]
pub(crate) fn describe_unknown_id(id: u32) -> &'static str {
    match id {
        4 | 5 | 31..=33 => "a type that was removed from the format",
        37 => "I8_S, which bitnet.cpp uses for activations only",
        38 => "TL1, a layout made for one CPU and one model: convert the original again to I2_S",
        39 => "TL2 of bitnet.cpp or MXFP4 of ggml: convert the original again to I2_S",
        _ => "a type this version does not know",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_come_back() {
        for kind in TensorType::ALL {
            assert_eq!(TensorType::from_id(kind.id()), Some(kind));
            assert_eq!(TensorType::from_name(&kind.name().to_lowercase()), Some(kind));
        }
        for id in [4, 5, 31, 32, 33, 37, 38, 39, 40, u32::MAX] {
            assert_eq!(TensorType::from_id(id), None);
        }
    }

    #[test]
    fn sizes_are_those_of_the_published_file() {
        assert_eq!(TensorType::I2S.n_bytes(2560, 6912), Some(2560 * 6912 / 4 + 32));
        assert_eq!(TensorType::F16.n_bytes(2560, 128_256), Some(656_670_720));
        assert_eq!(TensorType::Q6K.n_bytes(2560, 128_256), Some(269_337_600));
        assert_eq!(TensorType::I2S.n_bytes(100, 4), None);
        assert_eq!(TensorType::F64.n_bytes(u64::MAX / 4, 1), None);
        assert_eq!(TensorType::I2S.n_bytes(1 << 40, 1 << 40), None);
    }
}
