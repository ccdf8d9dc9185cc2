//! Stop strings in a text that comes piece by piece.

/// Holds back text that may be the start of a stop string.
///
/// The text ends before the stop string that is complete first; of those complete at the same character, before
/// the longest. That does not depend on how the text was cut into pieces. Each byte costs a constant for each
/// stop string (Knuth, Morris and Pratt's automaton).
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    held: String, // The longest end of the text that starts some stop string.
    has_stopped: bool,
}

#[derive(Clone, Debug)]
struct Stop {
    bytes: Box<[u8]>,
    fallback: Box<[usize]>, // Longest proper border of the first i + 1 bytes.
    n_matched: usize,
}

impl StopMatcher {
    /// A matcher for these strings; empty ones are left out.
    #[must_use]
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let stops = stops.iter().map(AsRef::as_ref).filter(|stop| !stop.is_empty()).map(Stop::new).collect();
        Self { stops, held: String::new(), has_stopped: false }
    }

    /// Takes more text and appends what is certain to `out`. True if a stop string was completed; then everything
    /// from its start on is dropped, and so is all later text.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.has_stopped {
            return true;
        }
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        let n_held_before = self.held.len();
        self.held.push_str(text);
        for (idx, byte) in text.bytes().enumerate() {
            let longest = self.stops.iter_mut().filter_map(|stop| stop.advance(byte)).max();
            if let Some(len) = longest {
                out.push_str(&self.held[..n_held_before + idx + 1 - len]);
                self.held.clear();
                self.has_stopped = true;
                return true;
            }
        }
        let n_keep = self.stops.iter().map(|stop| stop.n_matched).max().unwrap_or(0);
        out.extend(self.held.drain(..self.held.len() - n_keep));
        false
    }

    /// Appends what was held back: no more text will come.
    pub fn flush(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.stops.iter_mut().for_each(|stop| stop.n_matched = 0);
    }
}

impl Stop {
    fn new(text: &str) -> Self {
        let bytes: Box<[u8]> = text.as_bytes().into();
        let mut fallback = vec![0; bytes.len()];
        let mut border = 0;
        for idx in 1..bytes.len() {
            while border > 0 && bytes[idx] != bytes[border] {
                border = fallback[border - 1];
            }
            border += usize::from(bytes[idx] == bytes[border]);
            fallback[idx] = border;
        }
        Self { bytes, fallback: fallback.into(), n_matched: 0 }
    }

    /// Goes on by one byte; the length of the string if it is complete.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        while self.n_matched > 0 && self.bytes[self.n_matched] != byte {
            self.n_matched = self.fallback[self.n_matched - 1];
        }
        self.n_matched += usize::from(self.bytes[self.n_matched] == byte);
        (self.n_matched == self.bytes.len()).then_some(self.n_matched)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let (mut matcher, mut out) = (StopMatcher::new(stops), String::new());
        let stopped = pieces.iter().fold(false, |_, piece| matcher.push(piece, &mut out));
        matcher.flush(&mut out);
        (out, stopped)
    }

    #[test]
    fn the_first_complete_one_stops() {
        assert_eq!(run(&["END"], &["a E", "N", "", "D b", "END"]), ("a ".to_owned(), true));
        assert_eq!(run(&["END"], &["a E", "N"]), ("a EN".to_owned(), false));
        assert_eq!(run(&["aab"], &["aaa", "ab"]), ("aa".to_owned(), true));
        assert_eq!(run(&["b", "ab", ""], &["xab"]), ("x".to_owned(), true));
        assert_eq!(run(&["é\n"], &["aé", "b\u{e9}", "\n"]), ("aéb".to_owned(), true));
        assert_eq!(run(&[], &["anything"]), ("anything".to_owned(), false));
    }

    #[test]
    fn certain_text_is_not_held_back() {
        let (mut matcher, mut out) = (StopMatcher::new(&["\n\n", "User:"]), String::new());
        assert!(!matcher.push("Hi\nUs", &mut out));
        assert_eq!(out, "Hi\n");
        assert!(!matcher.push("a\n", &mut out));
        assert_eq!(out, "Hi\nUsa");
        assert!(matcher.push("\n", &mut out));
        assert_eq!(out, "Hi\nUsa");
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            text in "[ab\u{e9}]{0,40}", stops in prop::collection::vec("[ab\u{e9}]{1,5}", 0..4),
            cuts in prop::collection::vec(0usize..40, 0..8)
        ) {
            // By definition: the shortest prefix of the text that ends in a stop string.
            let end = (1..=text.len()).filter(|end| text.is_char_boundary(*end)).find_map(|end| {
                stops.iter().filter(|stop| text[..end].ends_with(stop.as_str())).map(|stop| end - stop.len()).min()
            });
            let expected = (text[..end.unwrap_or(text.len())].to_owned(), end.is_some());
            let (mut matcher, mut out, mut stopped) = (StopMatcher::new(&stops), String::new(), false);
            let mut at = 0;
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|c| *c <= text.len() && text.is_char_boundary(*c)).collect();
            cuts.sort_unstable();
            cuts.push(text.len());
            for cut in cuts {
                stopped = matcher.push(&text[at..cut], &mut out);
                at = cut;
            }
            matcher.flush(&mut out);
            prop_assert_eq!((out, stopped), expected);
        }
    }
}
