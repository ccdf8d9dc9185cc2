//! Which beginnings of prompts a worker has lately seen, and so most likely still has in its cache.
//!
//! The supervisor knows no tokens. It goes by the bytes of a prompt, one hash for each [`STRIDE`] of them that covers
//! everything from the start; that is near enough, since being wrong costs only time.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use bitnetd_proto::request::Prompt;

/// Bytes between two hashes: about a page of 32 tokens of text.
const STRIDE: usize = 128;
/// Tokens that a stride is thought to be.
pub(super) const STRIDE_TOKENS: u64 = 32;
/// Beginnings of one prompt, at most; what is longer is not told apart.
const HASHES_MAX: usize = 512;
/// Beginnings that are remembered of one worker.
pub(super) const REMEMBERED_MAX: usize = 4096;

/// The beginnings of a prompt, shortest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Prefixes(Vec<u64>);

impl Prefixes {
    pub(super) fn of(prompt: &Prompt) -> Self {
        let mut chain = Chain::default();
        match prompt {
            Prompt::Text(text) => chain.push(text.as_bytes()),
            Prompt::Chat(messages) => {
                for message in messages {
                    chain.push(message.role.as_bytes());
                    chain.push(&[0]);
                    chain.push(message.content.as_bytes());
                    chain.push(&[0]);
                }
            }
            Prompt::Tokens(tokens) => {
                for token in tokens {
                    chain.push(&token.to_le_bytes());
                }
            }
        }
        Self(chain.hashes)
    }
}

/// Cuts bytes into strides and hashes each with all before it.
#[derive(Default)]
struct Chain {
    hashes: Vec<u64>,
    hasher: DefaultHasher, // Not keyed; who makes two prompts collide misleads only the route of his own job.
    n_in_stride: usize,
}

impl Chain {
    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.hashes.len() < HASHES_MAX {
            let (now, rest) = bytes.split_at(bytes.len().min(STRIDE - self.n_in_stride));
            for byte in now {
                byte.hash(&mut self.hasher);
            }
            self.n_in_stride += now.len();
            bytes = rest;
            if self.n_in_stride == STRIDE {
                self.n_in_stride = 0;
                self.hashes.push(self.hasher.finish());
            }
        }
    }
}

/// What one worker has seen, the latest [`REMEMBERED_MAX`] beginnings.
#[derive(Debug, Default)]
pub(super) struct SeenPrefixes {
    last_seen: HashMap<u64, u64>,
    order: VecDeque<(u64, u64)>, // (beginning, when), oldest first; only its last entry counts for each.
    clock: u64,
}

impl SeenPrefixes {
    /// Tokens at the start of a prompt that the worker need not compute again, roughly.
    pub(super) fn n_tokens(&self, prefixes: &Prefixes) -> u64 {
        let n_known = prefixes.0.iter().take_while(|hash| self.last_seen.contains_key(hash)).count();
        n_known as u64 * STRIDE_TOKENS
    }

    pub(super) fn remember(&mut self, prefixes: &Prefixes) {
        // The shortest last, so that it is forgotten last: without it the longer ones are of no use.
        for hash in prefixes.0.iter().rev() {
            self.clock += 1;
            self.last_seen.insert(*hash, self.clock);
            self.order.push_back((*hash, self.clock));
        }
        while self.last_seen.len() > REMEMBERED_MAX || self.order.len() > 2 * REMEMBERED_MAX {
            let Some((hash, at)) = self.order.pop_front() else { return };
            if self.last_seen.get(&hash) == Some(&at) {
                self.last_seen.remove(&hash);
            }
        }
    }

    /// The worker is gone, and its cache with it.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        assert!(self.last_seen.len() <= self.order.len(), "something is never forgotten");
        self.order.len().max(self.last_seen.len())
    }
}

#[cfg(test)]
mod tests {
    use bitnetd_proto::request::ChatMessage;
    use proptest::prelude::*;

    use super::*;

    fn chat(contents: &[&str]) -> Prompt {
        let message = |content: &&str| ChatMessage { role: "user".into(), content: (*content).into() };
        Prompt::Chat(contents.iter().map(message).collect())
    }

    #[test]
    fn a_conversation_that_goes_on_is_known_so_far() {
        let (long, next) = ("a".repeat(300), "b".repeat(300));
        let mut seen = SeenPrefixes::default();
        seen.remember(&Prefixes::of(&chat(&[&long])));
        assert_eq!(seen.n_tokens(&Prefixes::of(&chat(&[&long, &next]))), 2 * STRIDE_TOKENS);
        assert_eq!(seen.n_tokens(&Prefixes::of(&chat(&[&next, &long]))), 0);
        seen.clear();
        assert_eq!(seen.n_tokens(&Prefixes::of(&chat(&[&long]))), 0);
    }

    #[test]
    fn very_long_prompts_have_a_bounded_number_of_hashes() {
        let prefixes = Prefixes::of(&Prompt::Tokens((0..100_000).collect()));
        assert_eq!(prefixes.0.len(), HASHES_MAX);
    }

    proptest! {
        /// Two prompts share as many hashes as whole strides, and how a prompt came in pieces does not matter.
        #[test]
        fn hashes_are_those_of_the_common_beginning(
            common in proptest::collection::vec(any::<u32>(), 0..200),
            first in proptest::collection::vec(any::<u32>(), 0..50),
            second in proptest::collection::vec(any::<u32>(), 0..50),
        ) {
            let a = [common.clone(), vec![1], first].concat();
            let b = [common.clone(), vec![2], second].concat();
            let (a, b) = (Prefixes::of(&Prompt::Tokens(a)), Prefixes::of(&Prompt::Tokens(b)));
            let n_same = a.0.iter().zip(&b.0).take_while(|(a, b)| a == b).count();
            prop_assert_eq!(n_same, common.len() * 4 / STRIDE);
        }

        /// What came lately is known, and the memory is bounded.
        #[test]
        fn the_latest_are_remembered(prompts in proptest::collection::vec((0_u32..40, 0_u32..20_000), 1..40)) {
            let mut seen = SeenPrefixes::default();
            for (first, len) in prompts {
                let prefixes = Prefixes::of(&Prompt::Tokens((first..first + len).collect()));
                seen.remember(&prefixes);
                prop_assert_eq!(seen.n_tokens(&prefixes), prefixes.0.len() as u64 * STRIDE_TOKENS);
                prop_assert!(seen.len() <= 2 * REMEMBERED_MAX);
            }
        }
    }
}
