//! Tokens in a compact form: flat arrays and an open-addressing table of indexes.
//!
//! The 128,256 tokens and 280,147 merges of Llama 3 take 7 MB. The table is keyed by a secret that differs from
//! run to run, so that a file cannot be made to collide; what it answers does not depend on it.

use std::hash::BuildHasher;

use foldhash::quality::RandomState;

use super::byte_level::push_token_bytes;
use super::pieces::SPACE_SYMBOL;
use super::{TokenizerError, excerpt};

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
}

/// Of a token number.
pub(super) const TOKEN_BITS: u32 = 21;

/// How a vocabulary writes the texts of its ordinary tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Bytes as printable characters, as GPT-2 does.
    ByteAlphabet,
    /// As text, but for the symbol that stands for a space; single bytes are tokens called `<0x00>` to `<0xFF>`.
    SpaceSymbol,
}

/// Tokens and where to find them.
pub(super) struct Vocabulary {
    bytes: Vec<u8>,            // Of all tokens, one after the other.
    starts: Vec<u32>,          // (n_vocab + 1), into `bytes`.
    kinds: Vec<TokenKind>,     // (n_vocab)
    tokens_by_bytes: Vec<u32>, // Open addressing: id + 1, 0 is free. Length is a power of two.
    byte_tokens: [u32; 256],   // `NO_TOKEN` where there is none.
    secret: RandomState,
}

/// No token has this number.
pub(super) const NO_TOKEN: u32 = u32::MAX;

impl Vocabulary {
    /// Builds the table. `kinds` is empty or one for each token.
    pub(super) fn build<'a>(
        tokens: impl Iterator<Item = &'a str>,
        kinds: Vec<TokenKind>,
        spelling: Spelling,
    ) -> Result<Self, TokenizerError> {
        let (bytes, starts) = pack_tokens(tokens, &kinds, spelling)?;
        let n_vocab = starts.len() - 1;
        let kinds = if kinds.is_empty() { vec![TokenKind::Normal; n_vocab] } else { kinds };
        if kinds.len() != n_vocab {
            return Err(TokenizerError::KindCount { n_tokens: n_vocab, n_kinds: kinds.len() });
        }
        let mut vocabulary = Self {
            bytes,
            starts,
            kinds,
            tokens_by_bytes: vec![0; table_len(n_vocab)?],
            byte_tokens: [NO_TOKEN; 256],
            secret: RandomState::default(),
        };
        match spelling {
            Spelling::ByteAlphabet => {
                // Of two with the same bytes the ordinary kind goes first, then the lower number.
                vocabulary.index_tokens(TokenKind::Normal);
                vocabulary.index_tokens(TokenKind::Byte);
                vocabulary.index_tokens(TokenKind::UserDefined);
                vocabulary.find_byte_tokens()?;
            }
            Spelling::SpaceSymbol => {
                // Others are never made by merging: bytes stand in where there is no piece, and what is found in
                // the text beforehand is no longer in it.
                if let Some((first, second)) = vocabulary.index_tokens(TokenKind::Normal) {
                    let text =
                        excerpt(&String::from_utf8_lossy(vocabulary.token_bytes(first).unwrap_or_default()));
                    return Err(TokenizerError::SameText { first, second, text });
                }
                vocabulary.take_byte_tokens()?;
            }
        }
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

    /// Bytes on the heap.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        let indexes = self.starts.capacity() + self.tokens_by_bytes.capacity();
        self.bytes.capacity() + self.kinds.capacity() + indexes * size_of::<u32>()
    }

    /// Enters the tokens of one kind, the lowest number of those with the same bytes. The first two that have.
    fn index_tokens(&mut self, kind: TokenKind) -> Option<(u32, u32)> {
        let mut same = None;
        for id in (0..).take(self.n_vocab()) {
            let (start, end) = (self.starts[id as usize] as usize, self.starts[id as usize + 1] as usize);
            if self.kinds[id as usize] != kind || start == end {
                continue;
            }
            let slot = self.token_slot(&self.bytes[start..end]);
            match self.tokens_by_bytes[slot].checked_sub(1) {
                None => self.tokens_by_bytes[slot] = id + 1,
                Some(first) => same = same.or(Some((first, id))),
            }
        }
        same
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

    /// Notes the tokens that are single bytes by their kind; [`pack_tokens`] has read their names.
    fn take_byte_tokens(&mut self) -> Result<(), TokenizerError> {
        for id in (0..).take(self.n_vocab()) {
            if let (Some(TokenKind::Byte), Some(&[byte])) = (self.kind(id), self.token_bytes(id)) {
                let place = &mut self.byte_tokens[usize::from(byte)];
                if *place != NO_TOKEN {
                    let text = format!("<0x{byte:02X}>");
                    return Err(TokenizerError::SameText { first: *place, second: id, text });
                }
                *place = id;
            }
        }
        match (0..=u8::MAX).find(|byte| self.byte_token(*byte) == NO_TOKEN) {
            Some(byte) => Err(TokenizerError::MissingByteToken { byte }),
            None => Ok(()),
        }
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
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vocabulary({} tokens)", self.n_vocab())
    }
}

/// The bytes of all tokens, and where each starts. Special tokens are text.
fn pack_tokens<'a>(
    tokens: impl Iterator<Item = &'a str>,
    kinds: &[TokenKind],
    spelling: Spelling,
) -> Result<(Vec<u8>, Vec<u32>), TokenizerError> {
    let (mut bytes, mut starts) = (Vec::new(), vec![0]);
    for (id, text) in (0..).zip(tokens) {
        let kind = kinds.get(starts.len() - 1).copied().unwrap_or(TokenKind::Normal);
        match (spelling, kind) {
            (_, TokenKind::Byte) => match (byte_from_name(text), spelling) {
                (Some(byte), _) => bytes.push(byte),
                (None, Spelling::ByteAlphabet) => push_token_bytes(text, &mut bytes),
                (None, Spelling::SpaceSymbol) => {
                    return Err(TokenizerError::ByteName { id, text: excerpt(text) });
                }
            },
            (Spelling::ByteAlphabet, TokenKind::Normal) => push_token_bytes(text, &mut bytes),
            (Spelling::SpaceSymbol, TokenKind::Normal | TokenKind::UserDefined) => {
                push_with_spaces(text, &mut bytes);
            }
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

fn push_with_spaces(text: &str, out: &mut Vec<u8>) {
    for part in text.split_inclusive(SPACE_SYMBOL) {
        match part.strip_suffix(SPACE_SYMBOL) {
            Some(part) => {
                out.extend_from_slice(part.as_bytes());
                out.push(b' ');
            }
            None => out.extend_from_slice(part.as_bytes()),
        }
    }
}

/// The byte that `<0xE2>` names.
fn byte_from_name(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_byte = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_byte.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Length of an open-addressing table that is at most two thirds full.
pub(super) fn table_len(n_entries: usize) -> Result<usize, TokenizerError> {
    let len = (n_entries / 2).checked_add(n_entries + 1).and_then(usize::checked_next_power_of_two);
    len.filter(|len| *len <= 1 << 31).ok_or(TokenizerError::TooLarge)
}

/// 32 bits of a hash; no table is longer.
pub(super) fn low_bits(hash: u128) -> usize {
    usize::try_from(hash & u128::from(u32::MAX)).unwrap_or_default()
}
