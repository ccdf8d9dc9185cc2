//! The byte-level alphabet of GPT-2: every byte as one printable character, and back.

/// The character that stands for `byte` in a token's text.
#[cfg(test)]
pub(crate) fn char_of_byte(byte: u8) -> char {
    let code = match byte {
        0..=32 => 256 + u32::from(byte),
        127..=160 => 256 + u32::from(byte) - 127 + 33,
        173 => 256 + 67,
        _ => u32::from(byte),
    };
    char::from_u32(code).unwrap()
}

/// The byte that a character of a token's text stands for.
pub(super) fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    let byte = match code {
        33..=126 | 161..=172 | 174..=255 => code,
        256..=288 => code - 256,
        289..=322 => code - 289 + 127,
        323 => 173,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// Appends the bytes of a token's text. A text with a character outside of the alphabet stands for itself.
pub(super) fn push_token_bytes(text: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in text.chars() {
        match byte_of_char(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(text.as_bytes());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_printable_character() {
        let mut seen = std::collections::BTreeSet::new();
        for byte in 0..=255 {
            let c = char_of_byte(byte);
            assert!(seen.insert(c) && !c.is_control() && !c.is_whitespace(), "{byte} -> {c:?}");
            assert_eq!(byte_of_char(c), Some(byte));
        }
        assert_eq!((char_of_byte(b' '), char_of_byte(b'\n'), char_of_byte(b'a')), ('Ġ', 'Ċ', 'a'));
        assert_eq!((byte_of_char(' '), byte_of_char('\u{144}'), byte_of_char('中')), (None, None, None));
    }

    #[test]
    fn foreign_text_stands_for_itself() {
        let mut out = b"x".to_vec();
        push_token_bytes("Ġa", &mut out);
        push_token_bytes("a b", &mut out);
        push_token_bytes("中", &mut out);
        assert_eq!(out, "x aa b中".as_bytes());
    }
}
