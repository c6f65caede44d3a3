//! Table of memory regions that the library registers and deregisters without a message.
//!
//! The router gives out slots, each with a key that it has chosen; the library writes a region
//! into a slot, and the router reads it whenever a request names the key. Nothing has to be told
//! to the router, and nothing has to be drained: a region is registered, or is not, by what its
//! slot says.
//!
//! A slot has one life: empty, live, dead. The library may reuse neither a dead slot nor the
//! memory behind it before the router is seen not to use it:
//!
//! * The router publishes that it uses the table by an odd number, before it reads a slot, and by
//!   an even one when it is done with the memory that slots led it to. Each use has numbers of
//!   its own.
//! * The library lets a slot die, and then looks at that number. If it is odd, it waits until it
//!   is another.
//!
//! Between the two steps of either side is a sequentially consistent fence. If the library's comes
//! first, the router sees the dead slot; if the router's comes first, the library sees that use,
//! or a later number, whose store releases all that the router did in that use.

use crate::sync::{AtomicU64, Ordering, fence};
use crate::wqe::{high, low, pair};

const IN_USE: usize = 0;
const COUNT: usize = 8;
const BYTES: usize = 9;
const SLOTS: usize = 16;
/// A cache line: neighbours are written by different threads.
const SLOT_WORDS: usize = 8;

/// Word of a slot that holds the region's length.
const LEN: usize = 3;

/// High half of a slot's first word; the low half is the key of the region.
const LIVE: u32 = 1;
const DEAD: u32 = 2;

/// A region in a slot. Numbers are raw: whoever reads one checks them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RegionEntry {
    /// Handle of the protection domain.
    pub pd: u32,
    /// `enum ibv_access_flags`.
    pub access: u32,
    /// Address of the first byte in work requests.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// Pool segment that holds them.
    pub segment: u32,
    /// Offset of the first byte in the segment.
    pub offset: u64,
}

/// View of a session's table.
#[derive(Clone, Copy)]
pub struct RegionTable<'a> {
    words: &'a [AtomicU64],
}

impl<'a> RegionTable<'a> {
    /// Words a table of `slots` takes.
    pub const fn words(slots: u32) -> usize {
        SLOTS + slots as usize * SLOT_WORDS
    }

    /// A view of a table of `slots`; `None` if there are none, or the memory is too small.
    pub fn new(words: &'a [AtomicU64], slots: u32) -> Option<Self> {
        let words = words.get(..Self::words(slots))?;
        (slots != 0).then_some(RegionTable { words })
    }

    fn slot(&self, slot: u32) -> &'a [AtomicU64] {
        let slots = (self.words.len() - SLOTS) / SLOT_WORDS;
        let at = SLOTS + (slot as usize % slots) * SLOT_WORDS;
        &self.words[at..at + SLOT_WORDS]
    }

    /// Library: registers a region in an empty slot that it was given with this key.
    pub fn register(&self, slot: u32, key: u32, entry: &RegionEntry) {
        let words = self.slot(slot);
        let values = [
            pair(entry.pd, entry.access),
            entry.iova,
            entry.len,
            entry.segment.into(),
            entry.offset,
        ];
        for (word, value) in words[1..].iter().zip(values) {
            // Relaxed: the store below comes after them.
            word.store(value, Ordering::Relaxed);
        }
        self.words[COUNT].fetch_add(1, Ordering::Relaxed);
        self.words[BYTES].fetch_add(entry.len, Ordering::Relaxed);
        // Release: the region comes before its state (edge: `lookup`).
        words[0].store(pair(key, LIVE), Ordering::Release);
    }

    /// Library: lets a region die. False if the router has taken the slot back before. The router
    /// may still use its memory: see [`Self::in_use`].
    pub fn deregister(&self, slot: u32, key: u32) -> bool {
        let (live, dead) = (pair(key, LIVE), pair(key, DEAD));
        // Relaxed: the fence orders it.
        let (yes, no) = (Ordering::Relaxed, Ordering::Relaxed);
        let died = self.slot(slot)[0].compare_exchange(live, dead, yes, no);
        // Store-load edge against `begin_use`: the router sees the dead slot, or `in_use` sees
        // the router.
        fence(Ordering::SeqCst);
        if died.is_ok() {
            self.uncount(slot);
        }
        died.is_ok()
    }

    /// Library: a region in a slot that it alone writes is not one of the table any more.
    pub fn uncount(&self, slot: u32) {
        let len = self.slot(slot)[LEN].load(Ordering::Relaxed);
        // Relaxed: the counts order nothing.
        self.words[COUNT].fetch_sub(1, Ordering::Relaxed);
        self.words[BYTES].fetch_sub(len, Ordering::Relaxed);
    }

    /// Router: how many regions the library has registered, and their bytes; untrusted.
    pub fn counts(&self) -> (u64, u64) {
        // Relaxed: as in `uncount`.
        let load = |at: usize| self.words[at].load(Ordering::Relaxed);
        (load(COUNT), load(BYTES))
    }

    /// Library, after [`Self::deregister`]: the use in which the router may have found what was
    /// deregistered; `None` if there is none, or it is over.
    pub fn in_use(&self) -> Option<u64> {
        // Acquire: pairs with `end_use`, so that what the router did is done.
        let number = self.words[IN_USE].load(Ordering::Acquire);
        (!number.is_multiple_of(2)).then_some(number)
    }

    /// Library: whether a use that [`Self::in_use`] told of is over.
    pub fn is_over(&self, number: u64) -> bool {
        // Acquire: as in `in_use`; every later number was stored after the end of that use.
        self.words[IN_USE].load(Ordering::Acquire) != number
    }

    /// Router: begins to use the table. The number is odd, and greater than all before.
    pub fn begin_use(&self, number: u64) {
        // Release: who waits for an earlier use may see this number first (edge: `is_over`).
        self.words[IN_USE].store(number, Ordering::Release);
        // Store-load edge against `deregister`.
        fence(Ordering::SeqCst);
    }

    /// Router: it is done with the memory that it found in the table. The number is even, and
    /// greater than all before.
    pub fn end_use(&self, number: u64) {
        // Release: all accesses come before it (edge: `in_use`, `is_over`).
        self.words[IN_USE].store(number, Ordering::Release);
    }

    /// Router: copies the region in a slot, if it is live and has this key; what it says is
    /// untrusted. Its memory is accessed between [`Self::begin_use`] and [`Self::end_use`] alone.
    pub fn lookup(&self, slot: u32, key: u32) -> Option<RegionEntry> {
        let words = self.slot(slot);
        // Acquire: pairs with `register`.
        if words[0].load(Ordering::Acquire) != pair(key, LIVE) {
            return None;
        }
        // Relaxed: a library that keeps to the rules changes none of them before this use is over.
        let word = |at: usize| words[at].load(Ordering::Relaxed);
        Some(RegionEntry {
            pd: low(word(1)),
            access: high(word(1)),
            iova: word(2),
            len: word(LEN),
            segment: low(word(4)),
            offset: word(5),
        })
    }

    /// Router: empties a slot, to give it out or to take it back. It is not in use.
    pub fn clear(&self, slot: u32) {
        // Relaxed: the library learns by message that the slot is its own.
        self.slot(slot)[0].store(0, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_found_by_its_key_alone_as_long_as_it_lives() {
        let words: Vec<_> = (0..RegionTable::words(4))
            .map(|_| AtomicU64::new(0))
            .collect();
        assert!(RegionTable::new(&words[1..], 4).is_none());
        assert!(RegionTable::new(&words, 0).is_none());
        let table = RegionTable::new(&words, 4).unwrap();
        let entry = |n: u32| RegionEntry {
            pd: n,
            access: n + 1,
            iova: u64::from(n) << 32,
            len: n.into(),
            segment: n + 2,
            offset: u64::MAX - u64::from(n),
        };
        for slot in 0..4 {
            table.register(slot, 100 + slot, &entry(slot));
        }
        for slot in 0..4 {
            assert_eq!(table.lookup(slot, 100 + slot), Some(entry(slot)));
            assert_eq!(table.lookup(slot, 101 + slot), None);
            // No number of a slot reaches beyond the table.
            assert_eq!(
                table.lookup(slot + (1 << 31), 100 + slot),
                Some(entry(slot))
            );
        }
        assert!(!table.deregister(1, 100));
        assert!(table.deregister(1, 101));
        assert!(!table.deregister(1, 101));
        assert_eq!(table.lookup(1, 101), None);
        assert_eq!(table.lookup(2, 102), Some(entry(2)));
        table.clear(2);
        assert_eq!(table.lookup(2, 102), None);
        // A slot that the router clears is still counted, until the library knows.
        assert_eq!(table.counts(), (3, 2 + 3));
        table.uncount(2);
        assert_eq!(table.counts(), (2, 3));
        assert_eq!(table.in_use(), None);
        table.begin_use(7);
        assert_eq!(table.in_use(), Some(7));
        assert!(!table.is_over(7));
        table.end_use(8);
        assert!(table.is_over(7) && table.in_use().is_none());
    }
}
