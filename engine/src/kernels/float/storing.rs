//! Writing the keys and values of a pass into one layer: the other side of [`super::stored`].
#![expect(unsafe_code, reason = "threads write disjoint elements of one layer")]

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::attention::{AttentionRow, KV_PAGE_TOKENS};
use super::shared_out::SharedOut;
use super::stored::KV_BLOCK_LEN;
use crate::kernels::KernelSet;
use crate::pool::ThreadPool;

/// Elements that are rounded at a time.
const ROUNDED: usize = 64;

/// Pieces of work for each thread, where there are as many.
const ITEMS_PER_THREAD: usize = 4;

/// Where the rows of a pass are stored: a page, and a position in it. No two are the same, so that threads may write them at once.
#[derive(Debug, Default)]
pub struct KvSlots {
    slots: Vec<(u32, usize)>,
    sorted: Vec<(u32, usize)>,
}

impl KvSlots {
    /// Room for so many rows.
    #[must_use]
    pub fn with_capacity(n_rows: usize) -> Self {
        Self { slots: Vec::with_capacity(n_rows), sorted: Vec::with_capacity(n_rows) }
    }

    /// The slots of the last position that each row sees: its own.
    ///
    /// # Panics
    /// If a row has no page for it, or two rows have the same slot.
    pub fn set(&mut self, rows: &[AttentionRow<'_>]) {
        let slot = |row: &AttentionRow<'_>| {
            let position = row.n_visible - 1;
            (row.pages[position / KV_PAGE_TOKENS], position % KV_PAGE_TOKENS)
        };
        self.slots.clear();
        self.slots.extend(rows.iter().map(slot));
        self.sorted.clone_from(&self.slots);
        self.sorted.sort_unstable();
        let is_distinct = self.sorted.is_sorted_by(|a, b| a < b);
        assert!(is_distinct, "two rows of a pass are the same position of a page");
    }
}

/// Keys and values of one layer, to be written. Their shapes are those of [`super::KvLayer`].
#[derive(Debug)]
pub enum KvLayerMut<'a> {
    /// Keys and values.
    F16([&'a mut [f16]; 2]),
    /// Codes and scales of keys, then of values.
    Q8_0([(&'a mut [i8], &'a mut [f16]); 2]),
}

/// The same for threads that write their own parts.
enum Target<'a> {
    F16([SharedOut<'a, f16>; 2]),
    Q8_0([(SharedOut<'a, i8>, SharedOut<'a, f16>); 2]),
}

/// One head of one token.
#[derive(Clone, Copy)]
struct Place {
    head: usize, // page * n_kv_heads + head
    token: usize,
    head_dim: usize,
}

impl KernelSet {
    /// Writes `keys` and `values`, both (rows, `n_kv_heads`, `head_dim`), rounded to what they are stored as.
    ///
    /// # Panics
    /// If they are not as many rows as `slots`, or the layer has no such page.
    pub fn store_kv(
        self,
        pool: &ThreadPool,
        (n_kv_heads, head_dim): (usize, usize),
        slots: &KvSlots,
        [keys, values]: [&[f32]; 2],
        layer: KvLayerMut<'_>,
    ) {
        let n_items = slots.slots.len() * n_kv_heads;
        assert!(keys.len() == n_items * head_dim && values.len() == keys.len(), "heads of {head_dim}");
        let target = match layer {
            KvLayerMut::F16(both) => Target::F16(both.map(SharedOut::new)),
            KvLayerMut::Q8_0(both) => {
                Target::Q8_0(both.map(|(codes, scales)| (SharedOut::new(codes), SharedOut::new(scales))))
            }
        };
        // One row takes a few microseconds, no more than threads need to begin.
        let n_pieces = if slots.slots.len() == 1 { 1 } else { ITEMS_PER_THREAD * pool.n_threads() };
        let chunk = n_items.div_ceil(n_pieces).max(1);
        pool.for_each_chunk(n_items, chunk, &|_, items| {
            for item in items {
                let (page, token) = slots.slots[item / n_kv_heads];
                let head = page as usize * n_kv_heads + item % n_kv_heads;
                let place = Place { head, token, head_dim };
                let [key, value] = [keys, values].map(|of| &of[item * head_dim..][..head_dim]);
                // SAFETY: slots are distinct, and each comes up once with each head.
                unsafe { self.store_head(&target, place, [key, value]) };
            }
        });
    }

    /// # Safety
    /// No other thread uses what is stored of this head of this token.
    unsafe fn store_head(self, target: &Target<'_>, place: Place, [key, value]: [&[f32]; 2]) {
        let Place { head, token, head_dim } = place;
        // Where elements of a key lie, each a page's positions behind the last one; and where a value lies, in one piece.
        let column = head * head_dim * KV_PAGE_TOKENS + token;
        let row = (head * KV_PAGE_TOKENS + token) * head_dim;
        match target {
            Target::F16([keys, values]) => {
                let mut rounded = [f16::ZERO; ROUNDED];
                for (first, key) in (0..).step_by(ROUNDED).zip(key.chunks(ROUNDED)) {
                    let rounded = &mut rounded[..key.len()];
                    rounded.convert_from_f32_slice(key);
                    for (d, x) in (first..).zip(rounded) {
                        // SAFETY: the caller's promise.
                        unsafe { keys.set(column + d * KV_PAGE_TOKENS, *x) };
                    }
                }
                // SAFETY: the caller's promise.
                unsafe { values.part(row, head_dim) }.convert_from_f32_slice(value);
            }
            Target::Q8_0([(key_codes, key_scales), (value_codes, value_scales)]) => {
                let n_blocks = head_dim.div_ceil(KV_BLOCK_LEN);
                let mut codes = [0; KV_BLOCK_LEN];
                for (block, key) in key.chunks(KV_BLOCK_LEN).enumerate() {
                    let scale = self.quantize_kv_block(key, &mut codes);
                    // SAFETY: the caller's promise.
                    unsafe { key_scales.set((head * n_blocks + block) * KV_PAGE_TOKENS + token, scale) };
                    for (d, code) in (block * KV_BLOCK_LEN..).zip(&codes[..key.len()]) {
                        // SAFETY: the caller's promise.
                        unsafe { key_codes.set(column + d * KV_PAGE_TOKENS, *code) };
                    }
                }
                // SAFETY: the caller's promise.
                let scales =
                    unsafe { value_scales.part((head * KV_PAGE_TOKENS + token) * n_blocks, n_blocks) };
                // SAFETY: the caller's promise.
                let all_codes = unsafe { value_codes.part(row, head_dim) };
                let blocks = all_codes.chunks_mut(KV_BLOCK_LEN).zip(value.chunks(KV_BLOCK_LEN));
                for ((out, value), scale) in blocks.zip(scales) {
                    *scale = self.quantize_kv_block(value, &mut codes);
                    out.copy_from_slice(&codes[..value.len()]);
                }
            }
        }
    }
}
