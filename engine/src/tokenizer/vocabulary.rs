//! Tokens and merges in a compact form: flat arrays and two open-addressing tables of indexes.
//!
//! The 128,256 tokens and 280,147 merges of Llama 3 take 7 MB. The tables are keyed by a secret that differs from
//! run to run, so that a file cannot be made to collide; what they answer does not depend on it.

use std::hash::BuildHasher;

use foldhash::quality::RandomState;

use super::TokenizerError;
use super::byte_level::push_token_bytes;

/// What a token is for: `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Text (1).
    Normal,
    /// Stands for what the vocabulary cannot say (2).
    Unknown,
    /// Steers the model and is never text (3).
    Control,
    /// Text that is always one token (4).
    UserDefined,
    /// Takes up a number (5).
    Unused,
    /// One byte (6).
    Byte,
}

impl TokenKind {
    /// The kind with this number in the file.
    #[must_use]
    pub fn from_id(id: i32) -> Option<Self> {
        Some(match id {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Whether ordinary text may become this token by merging.
    fn is_ordinary(self) -> bool {
        matches!(self, Self::Normal | Self::UserDefined | Self::Byte)
    }
}

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

/// Of a token number.
const TOKEN_BITS: u32 = 21;

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

/// Tokens, merges and where to find them.
pub(super) struct Vocabulary {
    bytes: Vec<u8>,            // Of all tokens, one after the other.
    starts: Vec<u32>,          // (n_vocab + 1), into `bytes`.
    kinds: Vec<TokenKind>,     // (n_vocab)
    merges: Vec<PackedMerge>,  // By rank.
    tokens_by_bytes: Vec<u32>, // Open addressing: id + 1, 0 is free. Length is a power of two.
    merges_by_pair: Vec<u32>,  // Open addressing: rank + 1, 0 is free. Length is a power of two.
    byte_tokens: [u32; 256],   // `NO_TOKEN` where there is none.
    secret: RandomState,
    pair_secret: (u64, u64),
}

/// No token has this number.
pub(super) const NO_TOKEN: u32 = u32::MAX;

impl Vocabulary {
    /// Builds the tables. `kinds` is empty or one for each token.
    pub(super) fn build<'a>(
        tokens: impl Iterator<Item = &'a str>,
        kinds: Vec<TokenKind>,
        merges: impl Iterator<Item = &'a str>,
    ) -> Result<Self, TokenizerError> {
        let (bytes, starts) = pack_tokens(tokens, &kinds)?;
        let n_vocab = starts.len() - 1;
        let kinds = if kinds.is_empty() { vec![TokenKind::Normal; n_vocab] } else { kinds };
        if kinds.len() != n_vocab {
            return Err(TokenizerError::KindCount { n_tokens: n_vocab, n_kinds: kinds.len() });
        }
        let secret = RandomState::default();
        let mut vocabulary = Self {
            bytes,
            starts,
            kinds,
            merges: Vec::new(),
            tokens_by_bytes: vec![0; table_len(n_vocab)?],
            merges_by_pair: Vec::new(),
            byte_tokens: [NO_TOKEN; 256],
            pair_secret: (secret.hash_one(0), secret.hash_one(1) | 1),
            secret,
        };
        vocabulary.index_tokens();
        vocabulary.find_byte_tokens()?;
        vocabulary.add_merges(merges)?;
        Ok(vocabulary)
    }

    pub(super) fn n_vocab(&self) -> usize {
        self.kinds.len()
    }

    pub(super) fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        let idx = id as usize;
        let end = *self.starts.get(idx + 1)? as usize;
        Some(&self.bytes[self.starts[idx] as usize..end])
    }

    pub(super) fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    pub(super) fn set_kind(&mut self, id: u32, kind: TokenKind) {
        if let Some(slot) = self.kinds.get_mut(id as usize) {
            *slot = kind;
        }
    }

    /// Ids of the tokens that are looked for in the text before it is split.
    pub(super) fn special_ids(&self) -> impl Iterator<Item = u32> {
        let is_special = |kind: &TokenKind| {
            matches!(kind, TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined)
        };
        (0..).zip(&self.kinds).filter(move |(_, kind)| is_special(kind)).map(|(id, _)| id)
    }

    /// The token of one byte of UTF-8; `NO_TOKEN` for bytes that never occur in it.
    pub(super) fn byte_token(&self, byte: u8) -> u32 {
        self.byte_tokens[usize::from(byte)]
    }

    /// The ordinary token with exactly these bytes.
    pub(super) fn token_of(&self, bytes: &[u8]) -> Option<u32> {
        let slot = self.token_slot(bytes);
        self.tokens_by_bytes[slot].checked_sub(1)
    }

    /// Rank of the merge of two neighbours.
    pub(super) fn rank(&self, left: u32, right: u32) -> Option<u32> {
        if self.merges_by_pair.is_empty() {
            return None;
        }
        let slot = self.pair_slot(left, right);
        self.merges_by_pair[slot].checked_sub(1)
    }

    pub(super) fn merge(&self, rank: u32) -> Merge {
        self.merges[rank as usize].unpack()
    }

    /// Bytes on the heap.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        let indexes =
            self.starts.capacity() + self.tokens_by_bytes.capacity() + self.merges_by_pair.capacity();
        let merges = self.merges.capacity() * size_of::<PackedMerge>();
        self.bytes.capacity() + self.kinds.capacity() + merges + indexes * size_of::<u32>()
    }

    fn index_tokens(&mut self) {
        // Of two with the same bytes the ordinary kind goes first, then the lower number.
        for pass in [TokenKind::Normal, TokenKind::Byte, TokenKind::UserDefined] {
            for id in (0..).take(self.n_vocab()) {
                if self.kinds[id as usize] != pass || !pass.is_ordinary() {
                    continue;
                }
                let (start, end) = (self.starts[id as usize] as usize, self.starts[id as usize + 1] as usize);
                let slot = self.token_slot(&self.bytes[start..end]);
                if start != end && self.tokens_by_bytes[slot] == 0 {
                    self.tokens_by_bytes[slot] = id + 1;
                }
            }
        }
    }

    fn find_byte_tokens(&mut self) -> Result<(), TokenizerError> {
        for byte in 0..=u8::MAX {
            let occurs_in_utf8 = !matches!(byte, 0xc0 | 0xc1 | 0xf5..=0xff);
            match self.token_of(&[byte]) {
                Some(id) => self.byte_tokens[usize::from(byte)] = id,
                None if occurs_in_utf8 => return Err(TokenizerError::MissingByte { byte }),
                None => {}
            }
        }
        Ok(())
    }

    fn add_merges<'a>(&mut self, merges: impl Iterator<Item = &'a str>) -> Result<(), TokenizerError> {
        let mut pair = Vec::new();
        for (idx, merge) in merges.enumerate() {
            // The left part has at least one character, which may be a space in odd files.
            let space = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
            let bad = || TokenizerError::BadMerge { idx, merge: excerpt(merge) };
            let space = space.ok_or_else(bad)?;
            pair.clear();
            push_token_bytes(&merge[..space], &mut pair);
            let left_len = pair.len();
            push_token_bytes(&merge[space + 1..], &mut pair);
            let left = self.token_of(&pair[..left_len]).ok_or_else(bad)?;
            let right = self.token_of(&pair[left_len..]).ok_or_else(bad)?;
            let result = self.token_of(&pair).ok_or_else(bad)?;
            self.merges.push(PackedMerge::pack(Merge { left, right, result }));
        }
        self.merges.shrink_to_fit();
        if self.merges.is_empty() {
            return Ok(());
        }
        self.merges_by_pair = vec![0; table_len(self.merges.len())?];
        for (rank, idx) in (1..).zip(0..self.merges.len()) {
            let Merge { left, right, .. } = self.merges[idx].unpack();
            let slot = self.pair_slot(left, right);
            // A repeated merge keeps its best rank.
            if self.merges_by_pair[slot] == 0 {
                self.merges_by_pair[slot] = rank;
            }
        }
        Ok(())
    }

    /// The slot that holds the token with these bytes, or the free one where it belongs.
    fn token_slot(&self, bytes: &[u8]) -> usize {
        let mask = self.tokens_by_bytes.len() - 1;
        let mut slot = low_bits(self.secret.hash_one(bytes).into()) & mask;
        while let Some(id) = self.tokens_by_bytes[slot].checked_sub(1) {
            if self.token_bytes(id) == Some(bytes) {
                break;
            }
            slot = (slot + 1) & mask;
        }
        slot
    }

    /// The slot that holds the merge of this pair, or the free one where it belongs.
    fn pair_slot(&self, left: u32, right: u32) -> usize {
        let mask = self.merges_by_pair.len() - 1;
        let key = u64::from(left) << 32 | u64::from(right);
        let product = u128::from(key ^ self.pair_secret.0) * u128::from(self.pair_secret.1);
        let mut slot = low_bits(product ^ product >> 64) & mask;
        while let Some(rank) = self.merges_by_pair[slot].checked_sub(1) {
            let merge = self.merge(rank);
            if (merge.left, merge.right) == (left, right) {
                break;
            }
            slot = (slot + 1) & mask;
        }
        slot
    }
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vocabulary({} tokens, {} merges)", self.n_vocab(), self.merges.len())
    }
}

/// The bytes of all tokens, and where each starts. Special tokens are text, the others in the byte alphabet.
fn pack_tokens<'a>(
    tokens: impl Iterator<Item = &'a str>,
    kinds: &[TokenKind],
) -> Result<(Vec<u8>, Vec<u32>), TokenizerError> {
    let (mut bytes, mut starts) = (Vec::new(), vec![0]);
    for (idx, text) in tokens.enumerate() {
        match kinds.get(idx).copied().unwrap_or(TokenKind::Normal) {
            TokenKind::Byte => match byte_from_name(text) {
                Some(byte) => bytes.push(byte),
                None => push_token_bytes(text, &mut bytes),
            },
            TokenKind::Normal => push_token_bytes(text, &mut bytes),
            _ => bytes.extend_from_slice(text.as_bytes()),
        }
        starts.push(u32::try_from(bytes.len()).map_err(|_| TokenizerError::TooLarge)?);
    }
    if starts.len() > 1 << TOKEN_BITS {
        return Err(TokenizerError::TooLarge);
    }
    bytes.shrink_to_fit();
    starts.shrink_to_fit();
    Ok((bytes, starts))
}

/// The byte that `<0xE2>` names.
fn byte_from_name(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Length of an open-addressing table that is at most two thirds full.
fn table_len(n_entries: usize) -> Result<usize, TokenizerError> {
    let len = (n_entries / 2).checked_add(n_entries + 1).and_then(usize::checked_next_power_of_two);
    len.filter(|len| *len <= 1 << 31).ok_or(TokenizerError::TooLarge)
}

/// 32 bits of a hash; no table is longer.
fn low_bits(hash: u128) -> usize {
    usize::try_from(hash & u128::from(u32::MAX)).unwrap_or_default()
}

/// The first characters of a text, for messages.
pub(super) fn excerpt(text: &str) -> String {
    text.chars().take(64).collect()
}
