//! Byte-pair merging of one piece of text: lowest rank first, leftmost of equals.
//!
//! The symbols are a doubly linked list in an array, the candidates a heap: n log n for a piece of n bytes, so
//! that a megabyte without a space is no way to hold up a worker.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::vocabulary::{NO_TOKEN, Vocabulary};

/// Reused between pieces.
#[derive(Default)]
pub(super) struct MergeScratch {
    symbols: Vec<Symbol>,
    candidates: BinaryHeap<Reverse<(u32, u32)>>, // (rank, position of the left symbol)
}

#[derive(Clone, Copy)]
struct Symbol {
    token: u32, // `NO_TOKEN` once it was merged into its left neighbour.
    left: u32,
    right: u32, // `END` for the last.
}

const END: u32 = u32::MAX;

/// Appends the tokens of `piece` to `out`.
pub(super) fn merge_piece(
    vocabulary: &Vocabulary,
    piece: &[u8],
    scratch: &mut MergeScratch,
    out: &mut Vec<u32>,
) {
    if let [byte] = piece {
        out.push(vocabulary.byte_token(*byte));
        return;
    }
    let MergeScratch { symbols, candidates } = scratch;
    symbols.clear();
    candidates.clear();
    for (at, byte) in (0u32..).zip(piece) {
        symbols.push(Symbol { token: vocabulary.byte_token(*byte), left: at.wrapping_sub(1), right: at + 1 });
    }
    if let Some(last) = symbols.last_mut() {
        last.right = END;
    }
    for (at, pair) in (0u32..).zip(symbols.windows(2)) {
        if let Some(rank) = vocabulary.rank(pair[0].token, pair[1].token) {
            candidates.push(Reverse((rank, at)));
        }
    }
    while let Some(Reverse((rank, at))) = candidates.pop() {
        let merge = vocabulary.merge(rank);
        let Symbol { token, left, right } = symbols[at as usize];
        // A candidate is stale if either side was merged since; its pair tells, as a rank has only one.
        if token != merge.left || right == END || symbols[right as usize].token != merge.right {
            continue;
        }
        let next = symbols[right as usize].right;
        symbols[right as usize].token = NO_TOKEN;
        symbols[at as usize] = Symbol { token: merge.result, left, right: next };
        if next != END {
            symbols[next as usize].left = at;
            if let Some(rank) = vocabulary.rank(merge.result, symbols[next as usize].token) {
                candidates.push(Reverse((rank, at)));
            }
        }
        if left != END
            && let Some(rank) = vocabulary.rank(symbols[left as usize].token, merge.result)
        {
            candidates.push(Reverse((rank, left)));
        }
    }
    out.extend(symbols.iter().map(|symbol| symbol.token).filter(|token| *token != NO_TOKEN));
}
