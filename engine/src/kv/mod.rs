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
    // Bits of f16. `u16`, because the standard library takes zeroed `u16`s straight from the kernel without
    // touching them.
    keys: Vec<Vec<u16>>,   // (n_pages, n_kv_heads, head_dim, KV_PAGE_TOKENS): see `KvLayer`
    values: Vec<Vec<u16>>, // (n_pages, n_kv_heads, KV_PAGE_TOKENS, head_dim)
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

    /// All of its memory, in pieces.
    pub fn slabs(&self) -> impl Iterator<Item = &[u16]> {
        self.keys.iter().chain(&self.values).map(Vec::as_slice)
    }

    /// One layer, for attention.
    #[must_use]
    pub fn layer(&self, layer: usize) -> KvLayer<'_> {
        KvLayer { keys: self.keys[layer].reinterpret_cast(), values: self.values[layer].reinterpret_cast() }
    }

    /// Writes the key and the value of one token, each (n_kv_heads, head_dim), rounded to f16.
    pub fn store(&mut self, layer: usize, pages: &[u32], position: usize, key: &[f32], value: &[f32]) {
        let KvShape { n_kv_heads, head_dim, .. } = self.shape;
        let (page, token) = (pages[position / KV_PAGE_TOKENS] as usize, position % KV_PAGE_TOKENS);
        let head_len = head_dim * KV_PAGE_TOKENS;
        let heads = page * n_kv_heads * head_len..(page + 1) * n_kv_heads * head_len;
        let keys: &mut [f16] = self.keys[layer][heads.clone()].reinterpret_cast_mut();
        for (slab, key) in keys.chunks_exact_mut(head_len).zip(key.chunks_exact(head_dim)) {
            let mut rounded = [f16::ZERO; 64];
            for (slab, key) in slab.chunks_mut(64 * KV_PAGE_TOKENS).zip(key.chunks(64)) {
                let rounded = &mut rounded[..key.len()];
                rounded.convert_from_f32_slice(key);
                for (column, x) in slab.as_chunks_mut::<KV_PAGE_TOKENS>().0.iter_mut().zip(rounded) {
                    column[token] = *x;
                }
            }
        }
        let values: &mut [f16] = self.values[layer][heads].reinterpret_cast_mut();
        for (slab, value) in values.chunks_exact_mut(head_len).zip(value.chunks_exact(head_dim)) {
            slab[token * head_dim..][..head_dim].convert_from_f32_slice(value);
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
        // Page 0, token 5; head 0 and head 1.
        let keys = |head: usize| {
            let element = |d: usize| layer.keys[(head * 4 + d) * KV_PAGE_TOKENS + 5].to_f32();
            [0, 1, 2, 3].map(element)
        };
        let values = |head: usize| {
            let element = |d: usize| layer.values[(head * KV_PAGE_TOKENS + 5) * 4 + d].to_f32();
            [0, 1, 2, 3].map(element)
        };
        assert_eq!(keys(0), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(keys(1), [4.0, 5.0, 6.0, 7.0]);
        assert_eq!(values(0), [100.0, 101.0, 102.0, 103.0]);
        assert_eq!(values(1), [104.0, 105.0, 106.0, 107.0]);
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
