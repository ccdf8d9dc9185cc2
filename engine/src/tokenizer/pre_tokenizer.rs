//! Splits text into the pieces that byte-pair merges never cross.
//!
//! The patterns are published as regular expressions with a look-ahead. Written out by hand they need no
//! backtracking: every character is looked at a fixed number of times, whatever the text. The expressions
//! themselves are kept as twins in the tests.

use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

/// Which published pattern splits the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreTokenizer {
    /// Llama 3: contractions in any case, letters with one leading mark, digits in threes.
    LlamaBpe,
    /// GPT-2: contractions in lower case, letters or digits with one leading space.
    Gpt2,
}

impl PreTokenizer {
    /// The pattern that a file means by `tokenizer.ggml.pre`, if it is one of these.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "falcon_e" => {
                Some(Self::LlamaBpe)
            }
            "gpt-2" => Some(Self::Gpt2),
            _ => None,
        }
    }

    /// Its name in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::LlamaBpe => "llama-bpe",
            Self::Gpt2 => "gpt-2",
        }
    }

    /// The pieces of `text`, in order and without gaps.
    pub fn split(self, text: &str) -> impl Iterator<Item = &str> {
        Pieces { pattern: self, rest: text }
    }

    /// What a character is to the patterns: `letter` (`\p{L}`), `number` (`\p{N}`), `space` (`\s`) or `mark`.
    #[must_use]
    pub fn class_name(c: char) -> &'static str {
        match Kind::of(c) {
            Kind::Letter => "letter",
            Kind::Number => "number",
            Kind::Space => "space",
            Kind::Mark => "mark",
        }
    }
}

/// Iterator over pieces.
struct Pieces<'a> {
    pattern: PreTokenizer,
    rest: &'a str,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let first = self.rest.chars().next()?;
        let len = match self.pattern {
            PreTokenizer::LlamaBpe => llama_piece_len(self.rest, first),
            PreTokenizer::Gpt2 => gpt2_piece_len(self.rest, first),
        };
        let (piece, rest) = self.rest.split_at(len);
        self.rest = rest;
        Some(piece)
    }
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
fn llama_piece_len(text: &str, first: char) -> usize {
    if first == '\''
        && let Some(len) = contraction_len(text, fold_case)
    {
        return len;
    }
    let kind = Kind::of(first);
    let after = &text[first.len_utf8()..];
    let second = after.chars().next().map(Kind::of);
    match kind {
        Kind::Letter => return run_len(text, Kind::Letter),
        Kind::Number => return text.chars().take(3).take_while(|c| is_number(*c)).map(char::len_utf8).sum(),
        _ => {}
    }
    if second == Some(Kind::Letter) && !is_newline(first) {
        return first.len_utf8() + run_len(after, Kind::Letter);
    }
    let marks = match (kind, second) {
        (Kind::Mark, _) => run_len(text, Kind::Mark),
        (Kind::Space, Some(Kind::Mark)) if first == ' ' => 1 + run_len(after, Kind::Mark),
        _ => return space_len(text, true),
    };
    let newlines = text[marks..].bytes().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    marks + newlines
}

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
fn gpt2_piece_len(text: &str, first: char) -> usize {
    if first == '\''
        && let Some(len) = contraction_len(text, |c| c)
    {
        return len;
    }
    let (space, rest) = match text.strip_prefix(' ') {
        Some(rest) => (1, rest),
        None => (0, text),
    };
    match rest.chars().next().map(Kind::of) {
        None | Some(Kind::Space) => space_len(text, false),
        Some(kind) => space + run_len(rest, kind),
    }
}

/// Length of `'s`, `'t`, `'re`, `'ve`, `'m`, `'ll` or `'d` at the start of `text`.
fn contraction_len(text: &str, fold: fn(char) -> char) -> Option<usize> {
    let mut chars = text.chars().skip(1);
    let first = chars.next()?;
    match fold(first) {
        's' | 't' | 'm' | 'd' => Some(1 + first.len_utf8()),
        start => {
            let second = chars.next()?;
            match (start, fold(second)) {
                ('r' | 'v', 'e') | ('l', 'l') => Some(1 + first.len_utf8() + second.len_utf8()),
                _ => None,
            }
        }
    }
}

/// Simple case folding as far as the letters of contractions need it.
fn fold_case(c: char) -> char {
    match c {
        'ſ' => 's',
        _ => c.to_ascii_lowercase(),
    }
}

/// Length of the white space piece at the start of `text`: `\s*[\r\n]+` if asked for, `\s+(?!\S)` or `\s+`.
fn space_len(text: &str, ends_at_newline: bool) -> usize {
    let run = run_len(text, Kind::Space);
    if ends_at_newline && let Some(last) = text[..run].rfind(is_newline) {
        return last + 1;
    }
    if run == text.len() {
        return run;
    }
    // The last one belongs to what follows, unless it is the only one.
    let last = text[..run].chars().next_back().map_or(0, char::len_utf8);
    if last == run { run } else { run - last }
}

fn is_newline(c: char) -> bool {
    matches!(c, '\r' | '\n')
}

/// What a character is to the patterns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s`
    Space,
    /// Everything else.
    Mark,
}

impl Kind {
    fn of(c: char) -> Self {
        if c.is_ascii() {
            return match c {
                'a'..='z' | 'A'..='Z' => Self::Letter,
                '0'..='9' => Self::Number,
                '\t'..='\r' | ' ' => Self::Space,
                _ => Self::Mark,
            };
        }
        if is_letter(c) {
            Self::Letter
        } else if is_number(c) {
            Self::Number
        } else if c.is_whitespace() {
            Self::Space
        } else {
            Self::Mark
        }
    }
}

fn run_len(text: &str, kind: Kind) -> usize {
    text.char_indices().find(|(_, c)| Kind::of(*c) != kind).map_or(text.len(), |(idx, _)| idx)
}

fn is_letter(c: char) -> bool {
    static RANGES: OnceLock<Vec<(char, char)>> = OnceLock::new();
    contains(RANGES.get_or_init(|| class_ranges(r"\p{L}")), c)
}

fn is_number(c: char) -> bool {
    static RANGES: OnceLock<Vec<(char, char)>> = OnceLock::new();
    contains(RANGES.get_or_init(|| class_ranges(r"\p{N}")), c)
}

fn contains(ranges: &[(char, char)], c: char) -> bool {
    let after = ranges.partition_point(|(start, _)| *start <= c);
    after > 0 && c <= ranges[after - 1].1
}

/// The inclusive ranges of a Unicode class, from the tables of the regex crate.
fn class_ranges(pattern: &str) -> Vec<(char, char)> {
    let parsed = regex_syntax::parse(pattern).ok();
    match parsed.as_ref().map(regex_syntax::hir::Hir::kind) {
        Some(HirKind::Class(Class::Unicode(class))) => {
            class.ranges().iter().map(|range| (range.start(), range.end())).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests;
