//! Token ids to text, one at a time, in whole characters.

use super::{TokenKind, Tokenizer};

/// Keeps the bytes of a character that is not complete yet.
///
/// What comes out in all is what `String::from_utf8_lossy` makes of all the bytes: a byte sequence that can be no
/// character becomes U+FFFD. Control tokens say nothing. The space that a SentencePiece vocabulary puts in front of a
/// text is taken away again.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    pending: Vec<u8>,     // At most three bytes between calls: the start of a character.
    expects_prefix: bool, // Nothing was said yet since the text began, or since a special token that is text.
}

impl Default for Detokenizer {
    fn default() -> Self {
        Self::new()
    }
}

impl Detokenizer {
    /// For a text from its start.
    #[must_use]
    pub fn new() -> Self {
        Self { pending: Vec::new(), expects_prefix: true }
    }

    /// For what follows `token`: after ordinary text the text goes on, after a special token it begins.
    #[must_use]
    pub fn after(tokenizer: &Tokenizer, token: u32) -> Self {
        let is_text = matches!(tokenizer.kind(token), Some(TokenKind::Normal | TokenKind::Byte));
        Self { pending: Vec::new(), expects_prefix: !is_text }
    }

    /// Appends to `text` what is certain after token `id`.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32, text: &mut String) {
        match tokenizer.kind(id) {
            None | Some(TokenKind::Control | TokenKind::Unknown | TokenKind::Unused) => {}
            Some(TokenKind::UserDefined) => {
                self.push_bytes(tokenizer.token_bytes(id), text);
                self.expects_prefix = true;
            }
            Some(TokenKind::Normal | TokenKind::Byte) => {
                let bytes = tokenizer.token_bytes(id);
                let has_prefix = self.expects_prefix && tokenizer.may_start_with_prefix(id);
                self.push_bytes(&bytes[usize::from(has_prefix)..], text);
                self.expects_prefix = false;
            }
        }
    }

    /// Appends U+FFFD if a character was left incomplete.
    pub fn flush(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }

    fn push_bytes(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut start = 0;
        loop {
            match str::from_utf8(&self.pending[start..]) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.pending.clear();
                    return;
                }
                Err(error) => {
                    let valid_end = start + error.valid_up_to();
                    text.push_str(str::from_utf8(&self.pending[start..valid_end]).unwrap_or_default());
                    start = valid_end;
                    let Some(invalid) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    start += invalid;
                }
            }
        }
        self.pending.drain(..start);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_cuts_give_the_lossy_text(
            chunks in prop::collection::vec(prop_oneof![
                prop::collection::vec(any::<u8>(), 0..6),
                prop::sample::select(vec!["é", "中", "😀", "a"]).prop_flat_map(|c| {
                    (0..=c.len(), 0..=c.len()).prop_map(move |(a, b)| c.as_bytes()[a.min(b)..a.max(b)].to_vec())
                }),
            ], 0..20)
        ) {
            let (mut detokenizer, mut text) = (Detokenizer::new(), String::new());
            for chunk in &chunks {
                detokenizer.push_bytes(chunk, &mut text);
                prop_assert!(detokenizer.pending.len() <= 3);
            }
            detokenizer.flush(&mut text);
            let all = chunks.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&all));
        }
    }

    #[test]
    fn a_character_appears_when_it_is_complete() {
        let (mut detokenizer, mut text) = (Detokenizer::new(), String::new());
        detokenizer.push_bytes(&"😀".as_bytes()[..3], &mut text);
        assert_eq!(text, "");
        detokenizer.push_bytes(&"😀".as_bytes()[3..], &mut text);
        assert_eq!(text, "😀");
        detokenizer.push_bytes(&[b'a', 0xf0, 0x9f], &mut text);
        detokenizer.flush(&mut text);
        assert_eq!(text, "😀a\u{fffd}");
    }
}
