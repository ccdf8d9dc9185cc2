//! The KV cache: keys and values of every layer, as f16 or as signed bytes with scales, in pages that sequences own.
//!
//! The whole cache is reserved once, so that its size is known at start; the kernel backs a page of memory only
//! when it is first written. A sequence takes all the pages it can ever need when it is admitted and gives
//! them back when it ends, so a step never runs out.

mod pages; // Who owns which page, and which ones hold prompts that may come again.

pub use pages::PagePool;

use std::fmt;
use std::io;
use std::str::FromStr;

use half::f16;
use half::slice::HalfBitsSliceExt;

use crate::kernels::KernelSet;
use crate::kernels::float::{F16Layer, KV_BLOCK_LEN, KV_PAGE_TOKENS, KvLayer, KvLayerMut, KvSlots, Q8Layer};
use crate::mapping::{LockPages, lock};
use crate::pool::ThreadPool;

/// What keys and values are stored as. It is part of what an answer depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// IEEE binary16.
    #[default]
    F16,
    /// Signed bytes, with an f16 scale for each 32: 53 % of the memory where heads are whole blocks.
    Q8_0,
}

impl KvType {
    /// Every type.
    pub const ALL: [KvType; 2] = [Self::F16, Self::Q8_0];

    /// The name in configurations, as llama.cpp has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name is none of [`KvType::ALL`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown type of the KV cache `{0}`")]
pub struct UnknownKvType(String);

impl FromStr for KvType {
    type Err = UnknownKvType;

    fn from_str(name: &str) -> Result<Self, UnknownKvType> {
        Self::ALL
            .into_iter()
            .find(|kv_type| kv_type.name() == name)
            .ok_or_else(|| UnknownKvType(name.to_owned()))
    }
}

/// Shape of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// What an element is stored as.
    pub kv_type: KvType,
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
    /// Positions of all heads in one layer.
    fn n_head_tokens(&self) -> usize {
        self.n_pages * self.n_kv_heads * KV_PAGE_TOKENS
    }

    /// Blocks of a head.
    fn n_blocks(&self) -> usize {
        self.head_dim.div_ceil(KV_BLOCK_LEN)
    }

    /// Size of the cache when every page is in use.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let head_bytes = match self.kv_type {
            KvType::F16 => self.head_dim * size_of::<f16>(),
            KvType::Q8_0 => self.head_dim + self.n_blocks() * size_of::<f16>(),
        };
        2 * self.n_layers as u64 * self.n_head_tokens() as u64 * head_bytes as u64
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
    layers: Vec<Layer>,
}

/// Of one layer. Halves are kept as their bits: the standard library takes zeroed integers straight from the kernel
/// without touching them.
#[derive(Debug)]
enum Layer {
    /// As `F16Layer`.
    F16 { keys: Vec<u16>, values: Vec<u16> },
    /// As `Q8Layer`.
    Q8_0 { key_codes: Vec<i8>, key_scales: Vec<u16>, value_codes: Vec<i8>, value_scales: Vec<u16> },
}

impl Layer {
    fn new(shape: &KvShape) -> Self {
        let n_elements = shape.n_head_tokens() * shape.head_dim;
        let n_scales = shape.n_head_tokens() * shape.n_blocks();
        match shape.kv_type {
            KvType::F16 => Self::F16 { keys: vec![0; n_elements], values: vec![0; n_elements] },
            KvType::Q8_0 => Self::Q8_0 {
                key_codes: vec![0; n_elements],
                key_scales: vec![0; n_scales],
                value_codes: vec![0; n_elements],
                value_scales: vec![0; n_scales],
            },
        }
    }
}

impl KvCache {
    /// An empty cache.
    #[must_use]
    pub fn new(shape: KvShape) -> Self {
        Self { shape, layers: (0..shape.n_layers).map(|_| Layer::new(&shape)).collect() }
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Keeps it in memory.
    ///
    /// # Errors
    /// Beyond the limit of locked memory, or there is not so much memory.
    pub fn lock(&self, pages: LockPages) -> io::Result<()> {
        self.layers.iter().try_for_each(|layer| match layer {
            Layer::F16 { keys, values } => lock(keys, pages).and_then(|()| lock(values, pages)),
            Layer::Q8_0 { key_codes, key_scales, value_codes, value_scales } => lock(key_codes, pages)
                .and_then(|()| lock(key_scales, pages))
                .and_then(|()| lock(value_codes, pages))
                .and_then(|()| lock(value_scales, pages)),
        })
    }

    /// One layer, for attention.
    #[must_use]
    pub fn layer(&self, layer: usize) -> KvLayer<'_> {
        match &self.layers[layer] {
            Layer::F16 { keys, values } => {
                KvLayer::F16(F16Layer { keys: keys.reinterpret_cast(), values: values.reinterpret_cast() })
            }
            Layer::Q8_0 { key_codes, key_scales, value_codes, value_scales } => KvLayer::Q8_0(Q8Layer {
                key_codes,
                key_scales: key_scales.reinterpret_cast(),
                value_codes,
                value_scales: value_scales.reinterpret_cast(),
            }),
        }
    }

    /// Writes keys and values, both (rows, n_kv_heads, head_dim), rounded to what they are stored as.
    ///
    /// # Panics
    /// If they are not as many rows as `slots`, or a page does not exist.
    pub fn store(
        &mut self,
        (kernels, pool): (KernelSet, &ThreadPool),
        layer: usize,
        slots: &KvSlots,
        rows: [&[f32]; 2],
    ) {
        let KvShape { n_kv_heads, head_dim, .. } = self.shape;
        let layer = match &mut self.layers[layer] {
            Layer::F16 { keys, values } => {
                KvLayerMut::F16([keys.reinterpret_cast_mut(), values.reinterpret_cast_mut()])
            }
            Layer::Q8_0 { key_codes, key_scales, value_codes, value_scales } => KvLayerMut::Q8_0([
                (key_codes, key_scales.reinterpret_cast_mut()),
                (value_codes, value_scales.reinterpret_cast_mut()),
            ]),
        };
        kernels.store_kv(pool, (n_kv_heads, head_dim), slots, rows, layer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use crate::kernels::float::AttentionRow;
    use crate::pool::PoolOptions;

    const SHAPE: KvShape =
        KvShape { kv_type: KvType::F16, n_layers: 2, n_kv_heads: 2, head_dim: 4, n_pages: 3 };

    /// A cache with one token, at place 5 of page 0 in layer 1.
    fn one_token(kv_type: KvType) -> KvCache {
        let mut cache = KvCache::new(KvShape { kv_type, ..SHAPE });
        let key: Vec<f32> = (0..8_u8).map(f32::from).collect();
        let value: Vec<f32> = key.iter().map(|x| x + 100.0).collect();
        let pool = ThreadPool::new(PoolOptions::unpinned(2)).unwrap();
        let mut slots = KvSlots::default();
        slots.set(&[AttentionRow { pages: &[2, 0], n_visible: KV_PAGE_TOKENS + 6 }]);
        cache.store((KernelSet::detect(), &pool), 1, &slots, [&key, &value]);
        cache
    }

    #[test]
    fn a_token_is_stored_in_its_page_head_by_head() {
        let cache = one_token(KvType::F16);
        let KvLayer::F16(layer) = cache.layer(1) else { panic!("another type") };
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
        let KvLayer::F16(other) = cache.layer(0) else { panic!("another type") };
        assert!(other.keys.iter().all(|x| x.to_bits() == 0), "the other layer is untouched");
    }

    #[test]
    fn as_q8_0_it_is_stored_in_the_same_places() {
        let cache = one_token(KvType::Q8_0);
        let KvLayer::Q8_0(layer) = cache.layer(1) else { panic!("another type") };
        for head in [0, 1] {
            let key_scale = layer.key_scales[head * KV_PAGE_TOKENS + 5].to_f32();
            let value_scale = layer.value_scales[head * KV_PAGE_TOKENS + 5].to_f32();
            for d in 0..4 {
                let expected = f32::from(u8::try_from(4 * head + d).unwrap());
                let key = key_scale * f32::from(layer.key_codes[(head * 4 + d) * KV_PAGE_TOKENS + 5]);
                let value = value_scale * f32::from(layer.value_codes[(head * KV_PAGE_TOKENS + 5) * 4 + d]);
                assert!((key - expected).abs() < 0.03, "{key} for {expected}");
                assert!((value - expected - 100.0).abs() < 0.5, "{value} for 100 + {expected}");
            }
        }
        let KvLayer::Q8_0(other) = cache.layer(0) else { panic!("another type") };
        assert!(other.key_codes.iter().chain(other.value_codes).all(|code| *code == 0));
    }

    /// Threads write rows of several sequences at once, and several tokens of a page; with every instruction set the same.
    #[test]
    fn many_rows_are_stored_as_one_after_the_other() {
        let pools = [1, 3].map(|n| ThreadPool::new(PoolOptions::unpinned(n)).unwrap());
        let row = |pages, n_visible| AttentionRow { pages, n_visible };
        let rows: Vec<AttentionRow<'_>> = (20..50)
            .map(|n_visible| row(&[4, 1][..], n_visible))
            .chain([row(&[0], 1), row(&[3, 2], 33)])
            .collect();
        let number = |i: usize| f32::from(u16::try_from(i * 7919 % 4001).unwrap()) / 999.0 - 2.0;
        let widths = [1, 31, 33, 70, 128, 139];
        for (kv_type, head_dim) in KvType::ALL.into_iter().flat_map(|t| widths.map(|width| (t, width))) {
            let shape = KvShape { kv_type, n_layers: 1, n_kv_heads: 3, head_dim, n_pages: 5 };
            let small = 3 * head_dim;
            let keys: Vec<f32> = (0..rows.len() * small).map(number).collect();
            let values: Vec<f32> = keys.iter().map(|x| x * 0.7 + 0.1).collect();
            let mut each = KvCache::new(shape);
            let mut slots = KvSlots::with_capacity(rows.len());
            let scalar = KernelSet::for_isa(Isa::Scalar).unwrap();
            for (i, row) in rows.iter().enumerate() {
                slots.set(std::slice::from_ref(row));
                let of = |all: &[f32]| all[i * small..(i + 1) * small].to_vec();
                each.store((scalar, &pools[0]), 0, &slots, [&of(&keys), &of(&values)]);
            }
            slots.set(&rows);
            for kernels in KernelSet::all_present() {
                let mut all = KvCache::new(shape);
                all.store((kernels, &pools[1]), 0, &slots, [&keys, &values]);
                let isa = kernels.isa();
                let [each, all] = [&each, &all].map(|cache| format!("{:?}", cache.layers));
                assert!(each == all, "{kv_type}, heads of {head_dim}, {isa}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "two rows of a pass are the same position")]
    fn one_slot_for_two_rows_is_refused() {
        let row = AttentionRow { pages: &[1], n_visible: 3 };
        KvSlots::default().set(&[row, row]);
    }

    #[test]
    fn the_size_is_known_before_anything_is_written() {
        assert_eq!(SHAPE.bytes(), 2 * 2 * 3 * 2 * 32 * 4 * 2);
        let q8 = |head_dim| KvShape { kv_type: KvType::Q8_0, head_dim, ..SHAPE }.bytes();
        assert_eq!([q8(4), q8(128), q8(130)], [6, 136, 140].map(|bytes| 2 * 2 * 3 * 2 * 32 * bytes));
        for kv_type in KvType::ALL {
            let cache = KvCache::new(KvShape { kv_type, head_dim: 130, ..SHAPE });
            let n_bytes: usize = cache
                .layers
                .iter()
                .map(|layer| match layer {
                    Layer::F16 { keys, values } => size_of_val(&keys[..]) + size_of_val(&values[..]),
                    Layer::Q8_0 { key_codes, key_scales, value_codes, value_scales } => {
                        key_codes.len() + value_codes.len() + 2 * (key_scales.len() + value_scales.len())
                    }
                })
                .sum();
            assert_eq!(cache.shape().bytes(), n_bytes as u64, "{kv_type}");
        }
        assert_eq!(pages_for(0), 0);
        assert_eq!(pages_for(KV_PAGE_TOKENS), 1);
        assert_eq!(pages_for(KV_PAGE_TOKENS + 1), 2);
    }

    #[test]
    fn names_are_read_back() {
        for kv_type in KvType::ALL {
            assert_eq!(kv_type.to_string().parse(), Ok(kv_type));
        }
        assert!("q4_0".parse::<KvType>().is_err());
    }
}
