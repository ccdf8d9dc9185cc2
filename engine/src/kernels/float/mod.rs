//! Float kernels: norms, activations, RoPE, attention, and products with dense matrices.
//!
//! Each kernel is written once, in safe Rust over `lanes::Lanes`, and compiled once for each instruction set;
//! what differs between them is sixteen-lane arithmetic of the same IEEE operations in the same order. So every
//! result is the same, bit for bit, on every instruction set, thread count and batch size (promise P4).
//!
//! The one order of every float reduction: element i goes to lane i % 16; a lane accumulates in increasing i
//! (fused multiply-add for products); lanes without an element at the end take zeros; then lanes are added
//! j and j + 8, j and j + 4, j and j + 2, j and j + 1.
//!
//! NaN: where an input is NaN the outputs that depend on it are NaN, of unspecified sign and payload.

mod attention; // One layer's attention over the paged KV cache.
mod dense; // Products with dense matrices: the output head.
mod dense_rows; // Their rows, thirty-two columns at a time.
mod elementwise; // Norms, activations, residuals, f16 stores.
pub(super) mod lanes; // Sixteen lanes on each instruction set.
mod rope; // Rotary position embedding.
pub(super) mod shared_out; // An output that several threads fill.
mod stored; // Keys and values as the cache stores them.
mod storing; // Writing them.

#[cfg(test)]
mod tests;

pub use attention::{AttentionRow, AttentionScratch, AttentionShape, KV_PAGE_TOKENS};
pub use elementwise::Activation;
pub use rope::{RopeStyle, RopeTable};
pub use stored::{F16Layer, KV_BLOCK_LEN, KvLayer, Q8Layer};
pub use storing::{KvLayerMut, KvSlots};
