//! Finds special tokens in text: leftmost first, the longest of those that start there.

use super::vocabulary::{TokenKind, Vocabulary};

/// How to treat the text of control tokens inside a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// `<|eot_id|>` is nine characters like any others: for what a user wrote.
    AsText,
    /// `<|eot_id|>` is the token: for what a chat template wrote.
    Parse,
}

/// Special tokens, sorted by their bytes.
pub(super) struct SpecialTokens {
    sorted: Vec<(Box<[u8]>, u32, bool)>, // (bytes, id, whether it is found in plain text too)
    can_start: [bool; 256],
}

/// A stretch of text, or a special token.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Segment<'a> {
    Text(&'a str),
    Token(u32),
}

impl SpecialTokens {
    pub(super) fn of(vocabulary: &Vocabulary) -> Self {
        let mut sorted: Vec<(Box<[u8]>, u32, bool)> = Vec::new();
        for id in vocabulary.special_ids() {
            let bytes = vocabulary.token_bytes(id).unwrap_or_default();
            if !bytes.is_empty() {
                sorted.push((bytes.into(), id, vocabulary.kind(id) == Some(TokenKind::UserDefined)));
            }
        }
        sorted.sort_unstable();
        sorted.dedup_by(|later, first| later.0 == first.0);
        let mut can_start = [false; 256];
        for (bytes, ..) in &sorted {
            can_start[usize::from(bytes[0])] = true;
        }
        Self { sorted, can_start }
    }

    /// Longest special token at the start of `text`: its length and number.
    pub(super) fn longest_at_start(&self, text: &[u8], special: Special) -> Option<(usize, u32)> {
        if !self.can_start[usize::from(*text.first()?)] {
            return None;
        }
        let mut best = None;
        let mut range = &self.sorted[..];
        // Narrow the sorted list byte by byte; an entry of exactly that length comes first in it.
        for (depth, byte) in text.iter().enumerate() {
            let start = range.partition_point(|(bytes, ..)| bytes.get(depth).is_none_or(|b| b < byte));
            range = &range[start..];
            let end = range.partition_point(|(bytes, ..)| bytes.get(depth).is_some_and(|b| b == byte));
            range = &range[..end];
            let Some((bytes, id, in_plain_text)) = range.first() else { break };
            if bytes.len() == depth + 1 && (*in_plain_text || special == Special::Parse) {
                best = Some((depth + 1, *id));
            }
        }
        best
    }

    /// Hands the segments of `text` to `each`, in order.
    pub(super) fn split<'a>(&self, text: &'a str, special: Special, mut each: impl FnMut(Segment<'a>)) {
        let (mut plain_start, mut at) = (0, 0);
        while at < text.len() {
            match self.longest_at_start(&text.as_bytes()[at..], special) {
                Some((len, id)) => {
                    if plain_start < at {
                        each(Segment::Text(&text[plain_start..at]));
                    }
                    each(Segment::Token(id));
                    at += len;
                    plain_start = at;
                }
                None => at += 1,
            }
        }
        if plain_start < text.len() {
            each(Segment::Text(&text[plain_start..]));
        }
    }
}

impl std::fmt::Debug for SpecialTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SpecialTokens({})", self.sorted.len())
    }
}
