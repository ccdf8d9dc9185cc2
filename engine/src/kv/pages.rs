//! Who owns which page of the KV cache, and which pages hold prompts that may come again.
//!
//! A page whose tokens are all stored never changes again. It is then known by its content: by the tokens in it
//! and by the page before it, so that equal content means equal keys and values (promise P4 makes them equal to the
//! bit, whoever computed them). A sequence that starts with the same tokens shares the page; a page that
//! nobody uses stays until its place is needed, the longest unused first.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use super::pages_for;
use crate::kernels::float::KV_PAGE_TOKENS;

/// Names a page's content for ever, unlike the number of the page.
type BlockId = u64;
/// What stands before the first page of every sequence.
const ROOT: BlockId = 0;

/// The content of a page: what comes before it, and its tokens.
type Content = (BlockId, [u32; KV_PAGE_TOKENS]);

/// The pages of a cache.
#[derive(Debug)]
pub struct PagePool {
    pages: Vec<Page>,
    free: Vec<u32>,                             // Neither used nor known.
    known: HashMap<Content, u32>,               // Full pages by content.
    idle: BTreeSet<(u64, Reverse<usize>, u32)>, // Known and unused: (last use, depth, page), first goes first.
    clock: u64,
    next_block: BlockId,
}

#[derive(Clone, Debug, Default)]
struct Page {
    n_users: u32,
    block: Option<Block>,
}

#[derive(Clone, Debug)]
struct Block {
    id: BlockId,
    content: Content,
    depth: usize,
    last_used: u64,
}

impl PagePool {
    /// `n` free pages.
    #[must_use]
    pub fn new(n: usize) -> Self {
        let n_pages = u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            pages: vec![Page::default(); n],
            free: (0..n_pages).rev().collect(),
            known: HashMap::new(),
            idle: BTreeSet::new(),
            clock: 0,
            next_block: ROOT + 1,
        }
    }

    /// Pages that a new sequence could get.
    #[must_use]
    pub fn n_available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// How many tokens of `history` are stored already and could be shared.
    ///
    /// The last token always has to be computed, because its logits are wanted.
    #[must_use]
    pub fn n_shareable(&self, history: &[u32]) -> usize {
        self.known_prefix(history).count() * KV_PAGE_TOKENS
    }

    /// Takes the pages for a sequence of up to `n_tokens` that starts with `history`: shared ones first, then free
    /// ones. Returns how many tokens are stored already; `None`, and nothing is taken, if there are too few pages.
    pub fn acquire(&mut self, history: &[u32], n_tokens: usize, pages: &mut Vec<u32>) -> Option<usize> {
        let shared: Vec<u32> = self.known_prefix(history).collect();
        let n_idle_shared = shared.iter().filter(|page| self.page(**page).n_users == 0).count();
        let n_fresh = pages_for(n_tokens).saturating_sub(shared.len());
        if self.n_available() - n_idle_shared < n_fresh {
            return None;
        }
        self.clock += 1;
        for page in &shared {
            self.take_into_use(*page);
        }
        pages.extend_from_slice(&shared);
        for _ in 0..n_fresh {
            let page = self.free.pop().or_else(|| self.evict())?;
            self.page_mut(page).n_users = 1;
            pages.push(page);
        }
        Some(shared.len() * KV_PAGE_TOKENS)
    }

    /// Makes the full pages of a sequence known, so that others can share them.
    pub fn publish(&mut self, history: &[u32], n_stored: usize, pages: &[u32]) {
        let mut parent = ROOT;
        let (blocks, _) = history[..n_stored].as_chunks::<KV_PAGE_TOKENS>();
        for (depth, (tokens, page)) in blocks.iter().zip(pages).enumerate() {
            let content = (parent, *tokens);
            if let Some(known) = self.known.get(&content) {
                // The same content twice (two equal prompts at the same time): the first one stays the known one.
                parent = self.page(*known).block.as_ref().map_or(ROOT, |block| block.id);
                continue;
            }
            let id = self.next_block;
            self.next_block += 1;
            self.known.insert(content, *page);
            let last_used = self.clock;
            self.page_mut(*page).block = Some(Block { id, content, depth, last_used });
            parent = id;
        }
    }

    /// Gives the pages of a sequence back. Known ones are kept until their place is needed.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        self.clock += 1;
        for number in pages.drain(..).rev() {
            let clock = self.clock;
            let page = self.page_mut(number);
            page.n_users -= 1;
            if page.n_users > 0 {
                continue;
            }
            match &mut page.block {
                None => self.free.push(number),
                Some(block) => {
                    block.last_used = clock;
                    let entry = (clock, Reverse(block.depth), number);
                    self.idle.insert(entry);
                }
            }
        }
    }

    /// The known pages that hold the start of `history`, in order, without its last token.
    fn known_prefix<'a>(&'a self, history: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
        let (blocks, _) = history[..history.len().saturating_sub(1)].as_chunks::<KV_PAGE_TOKENS>();
        let mut parent = ROOT;
        blocks.iter().map_while(move |tokens| {
            let page = *self.known.get(&(parent, *tokens))?;
            parent = self.page(page).block.as_ref()?.id;
            Some(page)
        })
    }

    fn take_into_use(&mut self, number: u32) {
        let page = self.page_mut(number);
        page.n_users += 1;
        if page.n_users > 1 {
            return;
        }
        if let Some(block) = &page.block {
            let entry = (block.last_used, Reverse(block.depth), number);
            self.idle.remove(&entry);
        }
    }

    /// Forgets the page that was unused longest; of those that were released together, the deepest.
    fn evict(&mut self) -> Option<u32> {
        let (_, _, number) = self.idle.pop_first()?;
        if let Some(block) = self.page_mut(number).block.take() {
            self.known.remove(&block.content);
        }
        Some(number)
    }

    fn page(&self, number: u32) -> &Page {
        &self.pages[number as usize]
    }

    fn page_mut(&mut self, number: u32) -> &mut Page {
        &mut self.pages[number as usize]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(n: usize, start: u32) -> Vec<u32> {
        (start..).take(n).collect()
    }

    #[test]
    fn a_prompt_that_comes_again_is_shared_up_to_its_last_token() {
        let mut pool = PagePool::new(8);
        let history = tokens(2 * KV_PAGE_TOKENS, 0);
        let mut first = Vec::new();
        assert_eq!(pool.acquire(&history, history.len() + 1, &mut first), Some(0));
        pool.publish(&history, history.len(), &first);
        let mut second = Vec::new();
        assert_eq!(pool.acquire(&history, history.len() + 1, &mut second), Some(KV_PAGE_TOKENS));
        assert_eq!(first[0], second[0]);
        assert!(first[1..].iter().all(|page| !second.contains(page)));
        let longer = [history.clone(), vec![9]].concat();
        assert_eq!(pool.n_shareable(&longer), 2 * KV_PAGE_TOKENS);
        assert_eq!(pool.n_shareable(&tokens(80, 1)), 0, "other tokens");
    }

    #[test]
    fn an_equal_page_after_another_beginning_is_not_the_same() {
        let mut pool = PagePool::new(8);
        let (a, b, c) =
            (tokens(KV_PAGE_TOKENS, 0), tokens(KV_PAGE_TOKENS, 500), tokens(KV_PAGE_TOKENS + 1, 900));
        let ac = [a, c.clone()].concat();
        let mut pages = Vec::new();
        assert!(pool.acquire(&ac, ac.len(), &mut pages).is_some());
        pool.publish(&ac, 2 * KV_PAGE_TOKENS, &pages);
        assert_eq!(pool.n_shareable(&[b, c].concat()), 0);
    }

    #[test]
    fn unused_pages_make_room_the_oldest_and_deepest_first() {
        let mut pool = PagePool::new(4);
        let old = tokens(2 * KV_PAGE_TOKENS, 0);
        let young = tokens(2 * KV_PAGE_TOKENS, 1000);
        for history in [&old, &young] {
            let mut pages = Vec::new();
            assert_eq!(pool.acquire(history, history.len(), &mut pages), Some(0));
            pool.publish(history, history.len(), &pages);
            pool.release(&mut pages);
        }
        let mut other = Vec::new();
        assert_eq!(pool.acquire(&[7], 1, &mut other), Some(0), "one page has to go");
        let longer = |history: &[u32]| [history, &[3]].concat();
        assert_eq!(pool.n_shareable(&longer(&old)), KV_PAGE_TOKENS, "the old one lost its deepest page");
        assert_eq!(pool.n_shareable(&longer(&young)), 2 * KV_PAGE_TOKENS);
    }

    proptest! {
        /// Random sequences of few different prompts: no page has two writers, none is lost, what is shared is equal.
        #[test]
        fn pages_are_never_lost_and_never_shared_wrongly(
            events in proptest::collection::vec((0_usize..6, 0_usize..4, 1_usize..150), 1..60)
        ) {
            const N_PAGES: usize = 12;
            let mut pool = PagePool::new(N_PAGES);
            let mut running: Vec<Option<(Vec<u32>, Vec<u32>)>> = vec![None; 6];
            let mut written: HashMap<u32, Vec<u32>> = HashMap::new(); // What each page really holds.
            for (slot, prompt, len) in events {
                if let Some((_, mut pages)) = running[slot].take() {
                    pool.release(&mut pages);
                    continue;
                }
                // Prompts 0 and 1 have their first 40 tokens in common.
                let first = if prompt < 2 { 0 } else { prompt * 1000 };
                let history: Vec<u32> = (0..len)
                    .map(|i| u32::try_from(if i < 40 { first + i } else { prompt * 1000 + i }).unwrap())
                    .collect();
                let mut pages = Vec::new();
                let Some(n_shared) = pool.acquire(&history, history.len(), &mut pages) else {
                    prop_assert!(pages.is_empty());
                    continue;
                };
                prop_assert!(n_shared < history.len());
                prop_assert_eq!(pages.len(), pages_for(history.len()));
                for (index, page) in pages.iter().enumerate() {
                    let end = history.len().min((index + 1) * KV_PAGE_TOKENS);
                    let prefix = history[..end].to_vec();
                    if index * KV_PAGE_TOKENS < n_shared {
                        prop_assert_eq!(&written[page], &prefix);
                    } else {
                        let is_used = running.iter().flatten().any(|(_, others)| others.contains(page));
                        prop_assert!(!is_used, "page {} has two writers", page);
                        written.insert(*page, prefix);
                    }
                }
                pool.publish(&history, history.len(), &pages);
                running[slot] = Some((history, pages));
            }
            for (_, pages) in running.iter_mut().flatten() {
                pool.release(pages);
            }
            prop_assert_eq!(pool.n_available(), N_PAGES);
        }
    }
}
