//! Who has which page: reference counts, and full pages found again by what they hold.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::nn::PAGE_SIZE;

/// A full page by its content: what stood before it, as the serial of the page before or of a root, and its tokens.
type Key = (u64, [i64; PAGE_SIZE]);

/// The accounts of a pool of pages. A page is free, idle (no sequence has it, but it can be found by its content) or held by
/// some sequences. Contents are compared, not hashes of them.
#[derive(Debug)]
pub(super) struct PagePool {
    /// Sequences that hold the page.
    holders: Vec<u32>,
    free: Vec<i32>,
    /// By the time they became idle, the longest ago first.
    idle: BTreeMap<u64, i32>,
    idle_since: Vec<u64>,
    known: HashMap<Arc<Key>, (i32, u64)>,
    key_of: Vec<Option<Arc<Key>>>,
    /// Never given twice: serials of contents, times of idleness.
    next: u64,
}

impl PagePool {
    pub(super) fn new(pages: usize) -> PagePool {
        PagePool {
            holders: vec![0; pages],
            free: (0..pages as i32).rev().collect(),
            idle: BTreeMap::new(),
            idle_since: vec![0; pages],
            known: HashMap::new(),
            key_of: vec![None; pages],
            next: 0,
        }
    }

    /// Pages that no sequence holds.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    pub(super) fn held(&self) -> usize {
        self.holders.len() - self.available()
    }

    /// The start of a chain of pages.
    pub(super) fn root(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A page for one holder; the content of the longest idle one is forgotten for it if need be.
    pub(super) fn allocate(&mut self) -> Option<i32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = self.idle.pop_first()?;
                self.forget(page);
                page
            }
        };
        self.holders[page as usize] = 1;
        Some(page)
    }

    /// One more holder.
    pub(super) fn share(&mut self, page: i32) {
        if self.holders[page as usize] == 0 {
            self.idle.remove(&self.idle_since[page as usize]);
        }
        self.holders[page as usize] += 1;
    }

    pub(super) fn is_shared(&self, page: i32) -> bool {
        self.holders[page as usize] > 1
    }

    /// One holder less.
    pub(super) fn release(&mut self, page: i32) {
        let holders = &mut self.holders[page as usize];
        debug_assert!(*holders > 0, "page {page} is released twice");
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        if self.key_of[page as usize].is_some() {
            self.next += 1;
            self.idle_since[page as usize] = self.next;
            self.idle.insert(self.next, page);
        } else {
            self.free.push(page);
        }
    }

    /// The page with these tokens behind `parent`, if one is known, now with one more holder; and its serial.
    pub(super) fn find(&mut self, parent: u64, tokens: &[i64]) -> Option<(i32, u64)> {
        let found = *self.known.get(&key(parent, tokens)?)?;
        self.share(found.0);
        Some(found)
    }

    /// Makes a full page known; returns the serial of its content.
    pub(super) fn register(&mut self, page: i32, parent: u64, tokens: &[i64]) -> u64 {
        let Some(key) = key(parent, tokens) else { return parent };
        if let Some(&(_, serial)) = self.known.get(&key) {
            // Another sequence came first; this page goes free with its holder.
            return serial;
        }
        let key = Arc::new(key);
        self.next += 1;
        self.known.insert(key.clone(), (page, self.next));
        self.key_of[page as usize] = Some(key);
        self.next
    }

    fn forget(&mut self, page: i32) {
        if let Some(key) = self.key_of[page as usize].take() {
            self.known.remove(&key);
        }
    }
}

fn key(parent: u64, tokens: &[i64]) -> Option<Key> {
    Some((parent, tokens.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_found_until_they_are_needed() {
        let mut pool = PagePool::new(3);
        let root = pool.root();
        let (one, two) = ([1; PAGE_SIZE], [2; PAGE_SIZE]);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        let serial = pool.register(a, root, &one);
        assert_eq!(pool.find(root, &one), Some((a, serial)));
        assert_eq!(pool.find(root, &two), None);
        assert_eq!(pool.find(serial, &one), None, "the same tokens behind another page");
        assert_eq!(pool.register(b, root, &one), serial, "the first stays");
        assert!(pool.is_shared(a) && !pool.is_shared(b));
        for page in [a, a, b] {
            pool.release(page);
        }
        assert_eq!((pool.available(), pool.held()), (3, 0));
        assert_eq!(pool.find(root, &one), Some((a, serial)), "idle");
        pool.release(a);
        let all: Vec<i32> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(all[2], a, "free pages go first");
        assert_eq!((pool.find(root, &one), pool.allocate()), (None, None));
    }
}
