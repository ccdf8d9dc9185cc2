//! Merging of neighbours in one piece of text: lowest rank first, leftmost of equals.
//!
//! The symbols are a doubly linked list in an array, the candidates a heap: n log n for a piece of n bytes, so
//! that a megabyte without a space is no way to hold up a worker.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::vocabulary::NO_TOKEN;

/// Which neighbours become one token, and which go first.
pub(super) trait Rules {
    /// What tokens `left` and `right` become, which together are the bytes `both`. A token is [`NO_TOKEN`] if its
    /// bytes are none.
    fn made_of(&self, left: u32, right: u32, both: &[u8]) -> Option<Made>;
}

/// A token, and how early it is made: the lowest rank goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) rank: u32,
    pub(super) token: u32,
}

/// The symbols of a piece. Reused between pieces.
#[derive(Default)]
pub(super) struct MergeScratch {
    symbols: Vec<Symbol>, // (bytes of the piece); those inside of a symbol are `MERGED`.
    candidates: BinaryHeap<Reverse<Candidate>>,
}

#[derive(Clone, Copy)]
struct Symbol {
    token: u32,
    left: u32, // Where the symbol to the left starts, or `NONE`.
    end: u32,  // Where the symbol to the right starts.
}

/// Two neighbours. Their end tells whether they are still there: it moves whenever one of them grows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    start: u32,
    end: u32,
    token: u32,
}

const NONE: u32 = u32::MAX;
/// The token of a place that belongs to a symbol which starts before it.
const MERGED: u32 = NO_TOKEN - 1;

impl MergeScratch {
    /// Forgets the piece.
    pub(super) fn clear(&mut self) {
        self.symbols.clear();
        self.candidates.clear();
    }

    /// Adds a symbol of `n_bytes`, at least one, at the end.
    pub(super) fn push(&mut self, token: u32, n_bytes: usize) {
        let start = self.symbols.len();
        self.symbols.push(Symbol { token, left: self.last_start(), end: place(start + n_bytes) });
        let inside = Symbol { token: MERGED, left: place(start), end: place(start) };
        self.symbols.resize(start + n_bytes, inside);
    }

    /// Merges the symbols of `piece`, whose bytes were pushed.
    pub(super) fn merge(&mut self, rules: &impl Rules, piece: &[u8]) {
        let n_bytes = place(self.symbols.len());
        let mut start = 0;
        while start < n_bytes {
            self.consider(rules, piece, start);
            start = self.symbols[start as usize].end;
        }
        while let Some(Reverse(Candidate { start, end, token, .. })) = self.candidates.pop() {
            let Symbol { token: old, left, end: middle } = self.symbols[start as usize];
            if old == MERGED || middle == n_bytes || self.symbols[middle as usize].end != end {
                continue; // One of the two was merged since.
            }
            self.symbols[middle as usize].token = MERGED;
            self.symbols[start as usize] = Symbol { token, left, end };
            if end != n_bytes {
                self.symbols[end as usize].left = start;
                self.consider(rules, piece, start);
            }
            if left != NONE {
                self.consider(rules, piece, left);
            }
        }
    }

    /// The symbols and where they are.
    pub(super) fn symbols(&self) -> impl Iterator<Item = (u32, Range<usize>)> {
        let starts = self.symbols.iter().enumerate().filter(|(_, symbol)| symbol.token != MERGED);
        starts.map(|(start, symbol)| (symbol.token, start..symbol.end as usize))
    }

    /// Notes the symbol at `start` and its right neighbour if they can be merged.
    fn consider(&mut self, rules: &impl Rules, piece: &[u8], start: u32) {
        let Symbol { token: left, end: middle, .. } = self.symbols[start as usize];
        let Some(&Symbol { token: right, end, .. }) = self.symbols.get(middle as usize) else { return };
        if let Some(Made { rank, token }) = rules.made_of(left, right, &piece[start as usize..end as usize]) {
            self.candidates.push(Reverse(Candidate { rank, start, end, token }));
        }
    }

    fn last_start(&self) -> u32 {
        match self.symbols.last() {
            None => NONE,
            Some(Symbol { token: MERGED, left, .. }) => *left,
            Some(_) => place(self.symbols.len() - 1),
        }
    }
}

/// A place in a text. Texts have at most [`super::TEXT_BYTES_MAX`] bytes.
fn place(idx: usize) -> u32 {
    u32::try_from(idx).unwrap_or(NONE)
}
