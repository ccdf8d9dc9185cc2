//! The merges of byte-level BPE: pairs of tokens by rank, in a table of indexes.
//!
//! Keyed by a secret that differs from run to run, so that a file cannot be made to collide; what the table answers
//! does not depend on it.

use foldhash::quality::RandomState;
use std::hash::BuildHasher;

use super::byte_level::push_token_bytes;
use super::merge::{Made, MergeScratch, Rules};
use super::vocabulary::{TOKEN_BITS, Vocabulary, low_bits, table_len};
use super::{TokenizerError, excerpt};

/// One merge; its index is its rank, and the lowest rank goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Merge {
    pub(super) left: u32,
    pub(super) right: u32,
    pub(super) result: u32,
}

/// The same in fewer bytes: left, right and result in [`TOKEN_BITS`] each, from the highest bit.
#[derive(Clone, Copy)]
struct PackedMerge(u64);

impl PackedMerge {
    fn pack(Merge { left, right, result }: Merge) -> Self {
        Self((u64::from(left) << TOKEN_BITS | u64::from(right)) << TOKEN_BITS | u64::from(result))
    }

    #[expect(clippy::cast_possible_truncation, reason = "the mask leaves 21 bits")]
    fn unpack(self) -> Merge {
        let token = |n_behind: u32| (self.0 >> (n_behind * TOKEN_BITS)) as u32 & ((1 << TOKEN_BITS) - 1);
        Merge { left: token(2), right: token(1), result: token(0) }
    }
}

/// All merges, and where to find them.
pub(super) struct Merges {
    merges: Vec<PackedMerge>, // By rank.
    by_pair: Vec<u32>,        // Open addressing: rank + 1, 0 is free. Length is a power of two.
    secret: (u64, u64),
}

impl Merges {
    /// Reads merges as files have them: two tokens in the byte alphabet with a space between.
    pub(super) fn build<'a>(
        vocabulary: &Vocabulary,
        lines: impl Iterator<Item = &'a str>,
    ) -> Result<Self, TokenizerError> {
        let secret = RandomState::default();
        let mut merges = Self {
            merges: Vec::new(),
            by_pair: Vec::new(),
            secret: (secret.hash_one(0), secret.hash_one(1) | 1),
        };
        merges.read(vocabulary, lines)?;
        merges.index()?;
        Ok(merges)
    }

    /// Appends the tokens of `piece` to `out`.
    pub(super) fn encode(
        &self,
        vocabulary: &Vocabulary,
        piece: &[u8],
        scratch: &mut MergeScratch,
        out: &mut Vec<u32>,
    ) {
        if let [byte] = piece {
            out.push(vocabulary.byte_token(*byte));
            return;
        }
        scratch.clear();
        piece.iter().for_each(|byte| scratch.push(vocabulary.byte_token(*byte), 1));
        scratch.merge(self, piece);
        out.extend(scratch.symbols().map(|(token, _)| token));
    }

    /// Rank of the merge of two neighbours.
    pub(super) fn rank(&self, left: u32, right: u32) -> Option<u32> {
        if self.by_pair.is_empty() {
            return None;
        }
        let slot = self.pair_slot(left, right);
        self.by_pair[slot].checked_sub(1)
    }

    pub(super) fn merge(&self, rank: u32) -> Merge {
        self.merges[rank as usize].unpack()
    }

    /// Bytes on the heap.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        self.merges.capacity() * size_of::<PackedMerge>() + self.by_pair.capacity() * size_of::<u32>()
    }

    fn read<'a>(
        &mut self,
        vocabulary: &Vocabulary,
        lines: impl Iterator<Item = &'a str>,
    ) -> Result<(), TokenizerError> {
        let mut pair = Vec::new();
        for (idx, merge) in lines.enumerate() {
            // The left part has at least one character, which may be a space in odd files.
            let space = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
            let bad = || TokenizerError::BadMerge { idx, merge: excerpt(merge) };
            let space = space.ok_or_else(bad)?;
            pair.clear();
            push_token_bytes(&merge[..space], &mut pair);
            let left_len = pair.len();
            push_token_bytes(&merge[space + 1..], &mut pair);
            let left = vocabulary.token_of(&pair[..left_len]).ok_or_else(bad)?;
            let right = vocabulary.token_of(&pair[left_len..]).ok_or_else(bad)?;
            let result = vocabulary.token_of(&pair).ok_or_else(bad)?;
            self.merges.push(PackedMerge::pack(Merge { left, right, result }));
        }
        self.merges.shrink_to_fit();
        Ok(())
    }

    fn index(&mut self) -> Result<(), TokenizerError> {
        if self.merges.is_empty() {
            return Ok(());
        }
        self.by_pair = vec![0; table_len(self.merges.len())?];
        for (rank, idx) in (1..).zip(0..self.merges.len()) {
            let Merge { left, right, .. } = self.merges[idx].unpack();
            let slot = self.pair_slot(left, right);
            // A repeated merge keeps its best rank.
            if self.by_pair[slot] == 0 {
                self.by_pair[slot] = rank;
            }
        }
        Ok(())
    }

    /// The slot that holds the merge of this pair, or the free one where it belongs.
    fn pair_slot(&self, left: u32, right: u32) -> usize {
        let mask = self.by_pair.len() - 1;
        let key = u64::from(left) << 32 | u64::from(right);
        let product = u128::from(key ^ self.secret.0) * u128::from(self.secret.1);
        let mut slot = low_bits(product ^ product >> 64) & mask;
        while let Some(rank) = self.by_pair[slot].checked_sub(1) {
            let merge = self.merge(rank);
            if (merge.left, merge.right) == (left, right) {
                break;
            }
            slot = (slot + 1) & mask;
        }
        slot
    }
}

impl Rules for Merges {
    fn made_of(&self, left: u32, right: u32, _both: &[u8]) -> Option<Made> {
        let rank = self.rank(left, right)?;
        Some(Made { rank, token: self.merge(rank).result })
    }
}

impl std::fmt::Debug for Merges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Merges({})", self.merges.len())
    }
}
