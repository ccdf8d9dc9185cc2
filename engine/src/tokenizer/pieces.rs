//! SentencePiece BPE: the neighbours go first that make the piece with the highest score, the leftmost of equals.
//!
//! There are no words here: spaces are characters of the pieces. So that a long text is not one long piece all the
//! same, it is cut where no piece has these two characters side by side, over which nothing can ever be merged.
//! A character that ends up in no piece becomes the tokens of its bytes.

use std::ops::Range;

use super::merge::{Made, MergeScratch, Rules};
use super::vocabulary::{NO_TOKEN, Vocabulary};
use super::{TokenKind, TokenizerError, excerpt};

/// Longest text of an ordinary piece, in bytes. Trainers make 16 characters.
pub const PIECE_BYTES_MAX: usize = 1024;

/// What stands for a space in the texts of the pieces.
pub(super) const SPACE_SYMBOL: char = '\u{2581}';

/// Ranks and neighbours of the pieces of a vocabulary.
pub(super) struct Pieces {
    ranks: Vec<u32>, // (n_vocab); the highest score has rank 0, equal scores have equal ranks.
    neighbours: Neighbours,
    n_bytes_max: usize, // Of a piece.
}

impl Pieces {
    /// `scores` are one for each token.
    pub(super) fn build(vocabulary: &Vocabulary, mut scores: Vec<f32>) -> Result<Self, TokenizerError> {
        let n_tokens = vocabulary.n_vocab();
        if scores.len() != n_tokens {
            return Err(TokenizerError::ScoreCount { n_tokens, n_scores: scores.len() });
        }
        let mut ids: Vec<u32> = Vec::new();
        let (mut neighbours, mut n_bytes_max) = (Neighbours::none(), 0);
        for (id, score) in (0..).zip(&mut scores) {
            let bytes = vocabulary.token_bytes(id).unwrap_or_default();
            if !score.is_finite() {
                let text = excerpt(&String::from_utf8_lossy(bytes));
                return Err(TokenizerError::BadScore { id, text, score: *score });
            }
            *score += 0.0; // There is one zero.
            if vocabulary.kind(id) == Some(TokenKind::Normal) {
                if bytes.len() > PIECE_BYTES_MAX {
                    return Err(TokenizerError::PieceTooLong { id, len: bytes.len() });
                }
                n_bytes_max = n_bytes_max.max(bytes.len());
                let text = str::from_utf8(bytes).unwrap_or_default();
                text.chars().zip(text.chars().skip(1)).for_each(|(left, right)| neighbours.add(left, right));
                ids.push(id);
            }
        }
        ids.sort_unstable_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
        let (mut ranks, mut rank, mut last) = (vec![0; n_tokens], 0, None);
        for id in ids {
            let score = scores[id as usize];
            rank += u32::from(last.replace(score).is_some_and(|last| last.total_cmp(&score).is_ne()));
            ranks[id as usize] = rank;
        }
        Ok(Self { ranks, neighbours, n_bytes_max })
    }

    /// Appends the tokens of `text`, which has spaces where pieces have [`SPACE_SYMBOL`].
    pub(super) fn encode(
        &self,
        vocabulary: &Vocabulary,
        text: &str,
        scratch: &mut MergeScratch,
        out: &mut Vec<u32>,
    ) {
        for part in self.cut(text) {
            self.encode_part(vocabulary, &text[part], scratch, out);
        }
    }

    fn encode_part(
        &self,
        vocabulary: &Vocabulary,
        part: &str,
        scratch: &mut MergeScratch,
        out: &mut Vec<u32>,
    ) {
        scratch.clear();
        for (start, c) in part.char_indices() {
            let bytes = &part.as_bytes()[start..start + c.len_utf8()];
            scratch.push(vocabulary.token_of(bytes).unwrap_or(NO_TOKEN), bytes.len());
        }
        scratch.merge(&Scored { vocabulary, pieces: self }, part.as_bytes());
        for (token, place) in scratch.symbols() {
            if token == NO_TOKEN {
                out.extend(part.as_bytes()[place].iter().map(|byte| vocabulary.byte_token(*byte)));
            } else {
                out.push(token);
            }
        }
    }

    /// Bytes on the heap.
    #[cfg(test)]
    fn memory_bytes(&self) -> usize {
        self.ranks.capacity() * size_of::<u32>() + self.neighbours.bits.capacity() * size_of::<u64>()
    }

    /// Parts of `text` that no piece connects.
    fn cut(&self, text: &str) -> impl Iterator<Item = Range<usize>> {
        let places = text.char_indices().zip(text.chars().skip(1));
        let cuts = places
            .filter(|((_, left), right)| !self.neighbours.may_have(*left, *right))
            .map(|((start, left), _)| start + left.len_utf8());
        let ends = cuts.chain((!text.is_empty()).then_some(text.len()));
        ends.scan(0, |start, end| Some(std::mem::replace(start, end)..end))
    }
}

impl std::fmt::Debug for Pieces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pieces({} bytes at most)", self.n_bytes_max)
    }
}

/// Merging by score.
struct Scored<'a> {
    vocabulary: &'a Vocabulary,
    pieces: &'a Pieces,
}

impl Rules for Scored<'_> {
    fn made_of(&self, _left: u32, _right: u32, both: &[u8]) -> Option<Made> {
        if both.len() > self.pieces.n_bytes_max {
            return None;
        }
        let token = self.vocabulary.token_of(both)?;
        Some(Made { rank: self.pieces.ranks[token as usize], token })
    }
}

/// Which characters stand side by side in some piece: a bit for each pair, shared by those that fall on the same.
struct Neighbours {
    bits: Vec<u64>, // (1 << PAIR_BITS) bits
}

/// Of the place of a pair. 128 KiB; a vocabulary of 32,000 pieces sets a bit or two in a hundred.
const PAIR_BITS: u32 = 20;

impl Neighbours {
    fn none() -> Self {
        Self { bits: vec![0; 1 << (PAIR_BITS - 6)] }
    }

    fn add(&mut self, left: char, right: char) {
        let (word, bit) = Self::place(left, right);
        self.bits[word] |= bit;
    }

    /// False only if no piece has them side by side.
    fn may_have(&self, left: char, right: char) -> bool {
        let (word, bit) = Self::place(left, right);
        self.bits[word] & bit != 0
    }

    fn place(left: char, right: char) -> (usize, u64) {
        let pair = u64::from(left) << 32 | u64::from(right);
        // The upper bits of a product with an odd number depend on all bits of the pair.
        let place = pair.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(pair >> 32) >> (64 - PAIR_BITS);
        (usize::try_from(place >> 6).unwrap_or_default(), 1 << (place & 63))
    }
}

#[cfg(test)]
mod tests;
