//! The KV cache: keys and values of every layer as f16, in pages that sequences own.
//!
//! The whole cache is reserved once, so that its size is known at start; the kernel backs a page of memory only
//! when it is first written. A sequence takes all the pages it can ever need when it is admitted and gives
//! them back when it ends, so a step never runs out.

mod pages; // Who owns which page, and which ones hold prompts that may come again.

pub use pages::PagePool;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::kernels::float::{KV_PAGE_TOKENS, KvLayer};

/// Shape of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub n_layers: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Pages of [`KV_PAGE_TOKENS`] tokens.
    pub n_pages: usize,
}

impl KvShape {
    /// Elements of the keys (or of the values) of one layer.
    fn layer_len(&self) -> usize {
        self.n_pages * self.n_kv_heads * KV_PAGE_TOKENS * self.head_dim
    }

    /// Size of the cache when every page is in use.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        2 * self.n_layers as u64 * self.layer_len() as u64 * size_of::<f16>() as u64
    }

    /// Tokens that fit.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.n_pages * KV_PAGE_TOKENS
    }
}

/// Pages that a sequence needs for this many tokens.
#[must_use]
pub fn pages_for(n_tokens: usize) -> usize {
    n_tokens.div_ceil(KV_PAGE_TOKENS)
}

/// Keys and values of all layers.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    // Bits of f16, each (n_pages, n_kv_heads, KV_PAGE_TOKENS, head_dim). `u16`, because the standard library
    // takes zeroed `u16`s straight from the kernel without touching them.
    keys: Vec<Vec<u16>>,
    values: Vec<Vec<u16>>,
}

impl KvCache {
    /// An empty cache.
    #[must_use]
    pub fn new(shape: KvShape) -> Self {
        let slabs = || (0..shape.n_layers).map(|_| vec![0_u16; shape.layer_len()]).collect();
        Self { shape, keys: slabs(), values: slabs() }
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// One layer, for attention.
    #[must_use]
    pub fn layer(&self, layer: usize) -> KvLayer<'_> {
        KvLayer { keys: self.keys[layer].reinterpret_cast(), values: self.values[layer].reinterpret_cast() }
    }

    /// Writes the key and the value of one token, each (n_kv_heads, head_dim), rounded to f16.
    pub fn store(&mut self, layer: usize, pages: &[u32], position: usize, key: &[f32], value: &[f32]) {
        let KvShape { n_kv_heads, head_dim, .. } = self.shape;
        let page = pages[position / KV_PAGE_TOKENS] as usize;
        for (slab, row) in [(&mut self.keys[layer], key), (&mut self.values[layer], value)] {
            let slab: &mut [f16] = slab.reinterpret_cast_mut();
            for (head, row) in row.chunks_exact(head_dim).enumerate() {
                let token = (page * n_kv_heads + head) * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS;
                slab[token * head_dim..][..head_dim].convert_from_f32_slice(row);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { n_layers: 2, n_kv_heads: 2, head_dim: 4, n_pages: 3 };

    #[test]
    fn a_token_is_stored_in_its_page_head_by_head() {
        let mut cache = KvCache::new(SHAPE);
        let key: Vec<f32> = (0..8_u8).map(f32::from).collect();
        let value: Vec<f32> = key.iter().map(|x| x + 100.0).collect();
        cache.store(1, &[2, 0], KV_PAGE_TOKENS + 5, &key, &value);
        let layer = cache.layer(1);
        let first_head = 5 * 4; // Page 0, head 0, token 5.
        let second_head = (KV_PAGE_TOKENS + 5) * 4;
        let as_f32 =
            |slab: &[f16], at: usize| slab[at..at + 4].iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        assert_eq!(as_f32(layer.keys, first_head), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(as_f32(layer.keys, second_head), [4.0, 5.0, 6.0, 7.0]);
        assert_eq!(as_f32(layer.values, second_head), [104.0, 105.0, 106.0, 107.0]);
        assert!(cache.layer(0).keys.iter().all(|x| x.to_bits() == 0), "the other layer is untouched");
    }

    #[test]
    fn the_size_is_known_before_anything_is_written() {
        assert_eq!(SHAPE.bytes(), 2 * 2 * 3 * 2 * 32 * 4 * 2);
        assert_eq!(pages_for(0), 0);
        assert_eq!(pages_for(KV_PAGE_TOKENS), 1);
        assert_eq!(pages_for(KV_PAGE_TOKENS + 1), 2);
    }
}
