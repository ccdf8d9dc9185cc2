//! The model families by the name in `general.architecture`, and what each builds differently.

use std::fmt;

use crate::kernels::float::{Activation, RopeStyle};

/// A model family: which graph is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `bitnet-b1.58` (BitNet-b1.58-2B-4T): squared ReLU, sub-norms.
    BitNetB158,
    /// `bitnet-25`: an older name of the same.
    BitNet25,
    /// `bitnet` (1bitLLM): SiLU, sub-norms.
    BitNet,
    /// `llama` with ternary weights (Falcon3-1.58, Llama3-8B-1.58, TriLM): SiLU, no sub-norms.
    Llama,
}

impl Architecture {
    /// Every architecture that can be run.
    pub const ALL: [Self; 4] = [Self::BitNetB158, Self::BitNet25, Self::BitNet, Self::Llama];

    /// The name in the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BitNetB158 => "bitnet-b1.58",
            Self::BitNet25 => "bitnet-25",
            Self::BitNet => "bitnet",
            Self::Llama => "llama",
        }
    }

    /// The architecture of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    /// Activation between gate and up projection.
    ///
    /// llama.cpp and the head of bitnet.cpp build SiLU for all of them, which is wrong for 2B-4T.
    #[must_use]
    pub fn activation(self) -> Activation {
        match self {
            Self::BitNetB158 | Self::BitNet25 => Activation::ReluSquared,
            Self::BitNet | Self::Llama => Activation::Silu,
        }
    }

    /// Whether attention and feed-forward normalise once more before their output projections.
    #[must_use]
    pub fn has_sub_norms(self) -> bool {
        !matches!(self, Self::Llama)
    }

    /// Which elements of a head are rotated together. The converter of `llama` permutes Q and K.
    #[must_use]
    pub fn rope_style(self) -> RopeStyle {
        match self {
            Self::BitNetB158 | Self::BitNet25 | Self::BitNet => RopeStyle::Neox,
            Self::Llama => RopeStyle::Norm,
        }
    }

    /// Whether the head is the embedding even if the file has an `output.weight`, as in the reference.
    #[must_use]
    pub fn is_always_tied(self) -> bool {
        !matches!(self, Self::Llama)
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
