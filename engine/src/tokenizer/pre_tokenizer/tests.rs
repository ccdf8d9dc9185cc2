//! The hand-written splitters against the regular expressions they stand for.

use proptest::prelude::*;

use super::*;

const LLAMA: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

fn twin(pattern: PreTokenizer) -> &'static fancy_regex::Regex {
    static TWINS: OnceLock<[fancy_regex::Regex; 2]> = OnceLock::new();
    let twins = TWINS.get_or_init(|| [LLAMA, GPT2].map(|p| fancy_regex::Regex::new(p).unwrap()));
    &twins[usize::from(pattern == PreTokenizer::Gpt2)]
}

#[track_caller]
fn assert_like_regex(text: &str) {
    for pattern in [PreTokenizer::LlamaBpe, PreTokenizer::Gpt2] {
        let expected: Vec<&str> = twin(pattern).find_iter(text).map(|m| m.unwrap().as_str()).collect();
        let found: Vec<&str> = pattern.split(text).collect();
        assert_eq!(found, expected, "{pattern:?} of {text:?}");
        assert_eq!(found.concat(), text);
    }
}

#[test]
fn known_splits() {
    let split = |text| PreTokenizer::LlamaBpe.split(text).collect::<Vec<_>>();
    assert_eq!(split("I'LL pay  $1234!\n\n x"), ["I", "'LL", " pay", " ", " $", "123", "4", "!\n\n", " x"]);
    assert_eq!(split(" \n\n  a"), [" \n\n", " ", " a"]);
    assert_eq!(split("'ſx \u{a0}\t"), ["'ſ", "x", " \u{a0}\t"]);
}

#[test]
fn hostile_runs_take_linear_time() {
    for unit in [" ", "\n", "a", "1", "!", "'", "\t ", " \n", "é", "😀", "\u{3000}", " '", "'l"] {
        let text = unit.repeat((1 << 20) / unit.len()) + "x";
        for pattern in [PreTokenizer::LlamaBpe, PreTokenizer::Gpt2] {
            assert_eq!(pattern.split(&text).map(str::len).sum::<usize>(), text.len());
        }
    }
}

#[test]
fn every_code_point_is_what_the_regex_says() {
    for c in '\0'..=char::MAX {
        assert_like_regex_cheaply(c);
    }
}

/// Compares classes only; the whole pattern on each of a million characters is slow.
fn assert_like_regex_cheaply(c: char) {
    static CLASSES: OnceLock<[fancy_regex::Regex; 3]> = OnceLock::new();
    let [letter, number, space] =
        CLASSES.get_or_init(|| [r"\p{L}", r"\p{N}", r"\s"].map(|p| fancy_regex::Regex::new(p).unwrap()));
    let mut buffer = [0; 4];
    let text = c.encode_utf8(&mut buffer);
    let kind = if letter.is_match(text).unwrap() {
        Kind::Letter
    } else if number.is_match(text).unwrap() {
        Kind::Number
    } else if space.is_match(text).unwrap() {
        Kind::Space
    } else {
        Kind::Mark
    };
    assert_eq!(Kind::of(c), kind, "U+{:04X}", u32::from(c));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn splits_like_the_regex(
        blocks in prop::collection::vec(prop_oneof![
            prop::sample::select(vec![
                " ", "  ", "\n", "\r", "\r\n", "\t", "\u{a0}", "\u{3000}", "\u{85}", "\u{2028}", "\u{b}", "a", "B",
                "the", "é", "e\u{301}", "я", "中", "1", "22", "333", "٣", "½", "Ⅳ", "'", "'s", "'S", "'ſ", "'ll",
                "'LL", "'l", "'re", "'Ve", "'d", "'m", "’s", ".", "!?", "<|", "|>", "😀", "\u{200d}", "\u{0}", "K",
            ]).prop_map(str::to_owned),
            any::<char>().prop_map(String::from),
        ], 0..24)
    ) {
        assert_like_regex(&blocks.concat());
    }
}
