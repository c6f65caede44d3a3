//! Ring of a shared receive queue: the library produces, the router consumes.
//!
//! Several queue pairs take from it and complete out of order, into different completion queues:
//! so a slot is not handed back by a completion. The router copies a request when it takes it,
//! and publishes at once how far it has read.

use crate::sync::{AtomicU64, Ordering, fence};
use crate::wqe::RecvEntry;

const PRODUCED: usize = 0;
const CONSUMED: usize = 8;
const WAKE: usize = 16;
const ENTRIES: usize = 24;

/// Sizes of a shared receive queue's ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SrqGeometry {
    entries: u32,
    entry_words: u32,
}

impl SrqGeometry {
    /// A ring with room for `wr` requests, rounded up to a power of two, of `sge` elements.
    pub fn new(wr: u32, sge: u32) -> Self {
        SrqGeometry {
            entries: wr.max(1).next_power_of_two(),
            entry_words: RecvEntry::WORDS as u32 + sge.max(1) * 2,
        }
    }

    /// Words of shared memory.
    pub fn words(&self) -> usize {
        ENTRIES + self.entries as usize * self.entry_words as usize
    }

    /// Requests the ring holds.
    pub fn entries(&self) -> u32 {
        self.entries
    }
}

/// View of a shared receive queue's ring.
#[derive(Clone, Copy)]
pub struct SrqRing<'a> {
    words: &'a [AtomicU64],
    geometry: SrqGeometry,
}

impl<'a> SrqRing<'a> {
    /// A view; `None` if the memory is too small.
    pub fn new(words: &'a [AtomicU64], geometry: SrqGeometry) -> Option<Self> {
        (words.len() >= geometry.words()).then_some(SrqRing { words, geometry })
    }

    /// The words of the request with this index.
    pub fn slot(&self, index: u64) -> &'a [AtomicU64] {
        let n = self.geometry.entry_words as usize;
        let at = ENTRIES + (index as usize & (self.geometry.entries as usize - 1)) * n;
        &self.words[at..at + n]
    }

    /// Library: publishes all requests below `index`. True if the router waits for one: then the
    /// queue must be marked.
    pub fn publish(&self, index: u64) -> bool {
        // Release: the requests come before the index (edge: `produced`).
        self.words[PRODUCED].store(index, Ordering::Release);
        // Store-load edge against `want`.
        fence(Ordering::SeqCst);
        self.words[WAKE].load(Ordering::Relaxed) != 0
            && self.words[WAKE].swap(0, Ordering::AcqRel) != 0
    }

    /// Library: index behind the last request that the router has taken; slots below are free.
    pub fn consumed(&self) -> u64 {
        // Acquire: pairs with `consume`.
        self.words[CONSUMED].load(Ordering::Acquire)
    }

    /// Router: index behind the last request; untrusted.
    pub fn produced(&self) -> u64 {
        // Acquire: pairs with `publish`.
        self.words[PRODUCED].load(Ordering::Acquire)
    }

    /// Router: it has copied all requests below `index`.
    pub fn consume(&self, index: u64) {
        // Release: the copies were made before their slots are written again (edge: `consumed`).
        self.words[CONSUMED].store(index, Ordering::Release);
    }

    /// Router: asks to be told of the next request, and looks again; true if there is one beyond
    /// `have` by now.
    pub fn want(&self, have: u64) -> bool {
        self.words[WAKE].store(1, Ordering::Relaxed);
        // Store-load edge against `publish`: it sees the flag or we see its index.
        fence(Ordering::SeqCst);
        self.produced() != have
    }

    /// Copies the requests from `head` up to `end` into a ring of another size, whose elements
    /// are as many. The caller has made sure that they fit.
    pub fn copy_to(&self, to: &SrqRing<'_>, head: u64, end: u64) {
        let mut at = head;
        while at != end {
            for (from, to) in self.slot(at).iter().zip(to.slot(at)) {
                // Relaxed: `publish` and `consume` below order them.
                to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            at = at.wrapping_add(1);
        }
        to.consume(head);
        to.publish(end);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::Sge;

    fn words(geometry: SrqGeometry) -> Vec<AtomicU64> {
        (0..geometry.words()).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn slots_do_not_overlap_and_wrap() {
        let geometry = SrqGeometry::new(3, 2);
        assert_eq!(geometry.entries(), 4);
        let memory = words(geometry);
        let ring = SrqRing::new(&memory, geometry).unwrap();
        assert!(SrqRing::new(&memory[1..], geometry).is_none());
        let sge = |n| Sge {
            addr: n,
            length: n as u32,
            lkey: 7,
        };
        for at in 0..4 {
            RecvEntry::store(at, &[sge(at), sge(at + 100)], ring.slot(at));
        }
        for at in 0..8 {
            let mut sges = Vec::new();
            assert_eq!(RecvEntry::load(ring.slot(at), &mut sges).wr_id, at % 4);
            assert_eq!(sges, [sge(at % 4), sge(at % 4 + 100)]);
        }
    }

    #[test]
    fn requests_move_to_a_ring_of_another_size() {
        let (small, large) = (SrqGeometry::new(4, 1), SrqGeometry::new(16, 1));
        let (from, to) = (words(small), words(large));
        let (from, to) = (
            SrqRing::new(&from, small).unwrap(),
            SrqRing::new(&to, large).unwrap(),
        );
        for at in 5..8 {
            RecvEntry::store(at, &[], from.slot(at));
        }
        from.copy_to(&to, 5, 8);
        assert_eq!((to.consumed(), to.produced()), (5, 8));
        for at in 5..8 {
            assert_eq!(RecvEntry::load(to.slot(at), &mut Vec::new()).wr_id, at);
        }
    }
}
