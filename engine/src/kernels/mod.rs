//! Kernels: for each, a scalar definition of what is right and fast twins that agree with it bit for bit.
//!
//! One folder per concern, one file per instruction set. [`KernelSet::for_isa`] is the only place that asks
//! the CPU; the set is chosen once at load and passed down.

use std::fmt;
use std::str::FromStr;

#[cfg(target_arch = "aarch64")]
mod aarch64; // Sums of products on ARM.
pub mod float; // Norms, activations, RoPE, attention, dense products.
pub mod head; // The fast output head.
pub mod probe; // What the machine can do at best.
pub mod ternary; // Ternary matrices times int8 activations.
#[cfg(target_arch = "x86_64")]
mod x86_avx512; // Sums across registers.

/// An instruction set that kernels are written for, best last within an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Portable Rust: the definition of correct.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The same with 256-bit `vpdpbusd`: AVX-VNNI, or AVX-512 VNNI and VL, which have the same in another encoding.
    AvxVnni,
    /// AVX-512 F, BW, VL and VNNI.
    Avx512Vnni,
    /// ARM Advanced SIMD.
    Neon,
    /// The same with `sdot`.
    NeonDotprod,
}

impl Isa {
    /// Every instruction set, worst first.
    pub const ALL: [Isa; 6] =
        [Self::Scalar, Self::Avx2, Self::AvxVnni, Self::Avx512Vnni, Self::Neon, Self::NeonDotprod];

    /// The name on the command line and in logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon-dotprod",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name is none of [`Isa::ALL`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown instruction set `{0}`")]
pub struct UnknownIsa(String);

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| UnknownIsa(name.to_owned()))
    }
}

/// The kernels of one instruction set that the running CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelSet {
    // Invariant: `for_isa` saw this instruction set on the running CPU.
    isa: Isa,
    // Invariant: only if `for_isa` saw AVX-VNNI on the running CPU.
    has_vex_vnni: bool,
}

impl KernelSet {
    /// The kernels of `isa`, if the running CPU has it and kernels are written for it.
    #[must_use]
    pub fn for_isa(isa: Isa) -> Option<Self> {
        is_present(isa).then(|| Self { isa, has_vex_vnni: has_vex_vnni() })
    }

    /// The best kernels the running CPU has.
    #[must_use]
    pub fn detect() -> Self {
        let best = Isa::ALL.into_iter().rev().find_map(Self::for_isa);
        best.unwrap_or(Self { isa: Isa::Scalar, has_vex_vnni: false })
    }

    /// Every set the running CPU has, worst first.
    pub fn all_present() -> impl Iterator<Item = Self> {
        Isa::ALL.into_iter().filter_map(Self::for_isa)
    }

    /// Which instruction set these are for.
    #[must_use]
    pub fn isa(self) -> Isa {
        self.isa
    }
}

/// Whether 256-bit `vpdpbusd` can be had without AVX-512.
fn has_vex_vnni() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avxvnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
fn is_present(isa: Isa) -> bool {
    let has_avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let has_avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    match isa {
        Isa::Scalar => true,
        Isa::Avx2 => has_avx2,
        Isa::AvxVnni => has_avx2 && (has_vex_vnni() || has_avx512),
        Isa::Avx512Vnni => has_avx2 && has_avx512,
        Isa::Neon | Isa::NeonDotprod => false,
    }
}

#[cfg(target_arch = "aarch64")]
fn is_present(isa: Isa) -> bool {
    let has_neon = std::arch::is_aarch64_feature_detected!("neon");
    match isa {
        Isa::Scalar => true,
        Isa::Neon => has_neon,
        Isa::NeonDotprod => has_neon && std::arch::is_aarch64_feature_detected!("dotprod"),
        Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni => false,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn is_present(isa: Isa) -> bool {
    matches!(isa, Isa::Scalar)
}
