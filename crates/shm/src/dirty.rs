//! Which queues of a session have new work, and whether the router sleeps.
//!
//! A three-level bitmap: a poster sets its queue's bit in a leaf, the leaf's bit in a
//! summary and the summary's bit in the top word; the router reads one word per session when
//! there is nothing to do, and never scans idle queues.

use crate::sync::{AtomicU64, Ordering, fence};

/// Queues that a session's map has room for: queue pairs and shared receive queues.
pub const MAX_SLOTS: u32 = 131_072;

const NEED_WAKE: usize = 0;
const TOP: usize = 8;
const SUMMARY: usize = 16;
const SUMMARIES: usize = (MAX_SLOTS / 64 / 64) as usize;
const LEAF: usize = 64;
const _: () = assert!(SUMMARIES <= 64 && SUMMARY + SUMMARIES <= LEAF);
const LEAVES: usize = (MAX_SLOTS / 64) as usize;

/// View of a session's dirty map.
#[derive(Clone, Copy)]
pub struct DirtyMap<'a> {
    words: &'a [AtomicU64],
}

impl<'a> DirtyMap<'a> {
    /// Words a map takes.
    pub const WORDS: usize = LEAF + LEAVES;

    /// A view; `None` if the memory is too small.
    pub fn new(words: &'a [AtomicU64]) -> Option<Self> {
        (words.len() >= Self::WORDS).then_some(DirtyMap { words })
    }

    /// Library: marks `slot` as having new work. True if the router sleeps and its doorbell must
    /// be rung; only one of several callers is told so.
    pub fn mark(&self, slot: u32) -> bool {
        let slot = (slot % MAX_SLOTS) as usize;
        let (leaf, summary) = (slot / 64, slot / 64 / 64);
        let bit = 1 << (slot % 64);
        // AcqRel: the ring index stored before this call is visible to whoever takes the bit
        // (edge: poster -> `take`).
        let before = self.words[LEAF + leaf].fetch_or(bit, Ordering::AcqRel);
        if before & bit == 0 {
            self.words[SUMMARY + summary].fetch_or(1 << (leaf % 64), Ordering::AcqRel);
            self.words[TOP].fetch_or(1 << summary, Ordering::AcqRel);
        }
        // Store-load edge against `arm`: the router that sleeps set NEED_WAKE before it looked at
        // TOP for the last time; either it saw our bit, or we see its flag.
        fence(Ordering::SeqCst);
        self.words[NEED_WAKE].load(Ordering::Relaxed) != 0
            && self.words[NEED_WAKE].swap(0, Ordering::AcqRel) != 0
    }

    /// Whether any work may be waiting. A plain load: it may miss what another thread posts at this
    /// moment, which a later look or `arm` finds.
    pub fn is_dirty(&self) -> bool {
        self.words[TOP].load(Ordering::Relaxed) != 0
    }

    /// Router: takes all marks and calls `each` with every slot that was marked. The indices the
    /// posters stored before marking are visible afterwards.
    pub fn take(&self, each: impl FnMut(u32)) {
        self.take_some(u32::MAX, &mut 0, each);
    }

    /// Router: as [`Self::take`], but looks at no more than about `most` slots: the others stay
    /// marked. `from` says where to begin, and where to begin the next time.
    pub fn take_some(&self, most: u32, from: &mut u32, mut each: impl FnMut(u32)) {
        let first = *from as usize % LEAVES;
        let (first, above) = (first / 64, u64::MAX << (first % 64));
        // Round once: what lies before the beginning, of the same summary, comes last.
        let visits = std::iter::once((first, above))
            .chain((first + 1..SUMMARIES).map(|s| (s, u64::MAX)))
            .chain((0..first).map(|s| (s, u64::MAX)))
            .chain(std::iter::once((first, !above)));
        let mut left = most;
        // AcqRel on each level: synchronises with the fetch_or of `mark`, level by level, so
        // that a bit taken above implies that the bits below are visible.
        let top = self.words[TOP].swap(0, Ordering::AcqRel);
        let mut back = 0;
        for (summary, mask) in visits.filter(|&(s, _)| top >> s & 1 != 0) {
            let bit = 1 << summary;
            if left == 0 {
                back |= bit;
                continue;
            }
            let leaves = self.words[SUMMARY + summary].swap(0, Ordering::AcqRel);
            let mut leaves_back = leaves & !mask;
            for leaf in bits(leaves & mask) {
                if left == 0 {
                    leaves_back |= 1 << leaf;
                    continue;
                }
                let at = summary * 64 + leaf;
                let slots = self.words[LEAF + at].swap(0, Ordering::AcqRel);
                left = left.saturating_sub(slots.count_ones().max(1));
                for slot in bits(slots) {
                    each((at * 64 + slot) as u32);
                }
                *from = (at + 1) as u32;
            }
            if leaves_back != 0 {
                // As `mark` does: the bit above comes last.
                self.words[SUMMARY + summary].fetch_or(leaves_back, Ordering::AcqRel);
                back |= bit;
            } else {
                back &= !bit;
            }
        }
        if back != 0 {
            self.words[TOP].fetch_or(back, Ordering::AcqRel);
        }
    }

    /// Router, before it stops looking at this session: asks to be woken. False if work came in
    /// the meantime; then the request is withdrawn and the caller goes on.
    pub fn arm(&self) -> bool {
        self.words[NEED_WAKE].store(1, Ordering::Relaxed);
        // The store-load edge that `mark` answers.
        fence(Ordering::SeqCst);
        if self.words[TOP].load(Ordering::Relaxed) == 0 {
            return true;
        }
        self.disarm();
        false
    }

    /// Router: it looks again, no wake is needed.
    pub fn disarm(&self) {
        // Relaxed: a poster that still sees the flag rings the doorbell once too often.
        self.words[NEED_WAKE].store(0, Ordering::Relaxed);
    }
}

/// Positions of the bits that are set, lowest first.
fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(bit)
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_slot_comes_once() {
        let words: Vec<_> = (0..DirtyMap::WORDS).map(|_| AtomicU64::new(0)).collect();
        let map = DirtyMap::new(&words).unwrap();
        let slots = [0, 1, 63, 64, 4095, 4096, 40_000, MAX_SLOTS - 1];
        for slot in slots.into_iter().rev() {
            assert!(!map.mark(slot));
            assert!(!map.mark(slot));
        }
        assert!(map.is_dirty());
        assert!(!map.arm());
        let mut seen = Vec::new();
        map.take(|slot| seen.push(slot));
        assert_eq!(seen, slots);
        assert!(!map.is_dirty());
        assert!(map.arm());
        assert!(map.mark(7));
        assert!(!map.mark(8));
    }

    #[test]
    fn a_part_leaves_the_rest_marked_and_everybody_gets_a_turn() {
        let words: Vec<_> = (0..DirtyMap::WORDS).map(|_| AtomicU64::new(0)).collect();
        let map = DirtyMap::new(&words).unwrap();
        let slots = [0, 5, 64, 4096, 4160, 40_000, MAX_SLOTS - 1];
        let mut from = 0;
        let mut seen = std::collections::BTreeSet::new();
        for round in 0..slots.len() {
            // Those at the front are marked again and again.
            for slot in slots {
                map.mark(slot);
            }
            let mut count = 0;
            map.take_some(1, &mut from, |slot| {
                seen.insert(slot);
                count += 1;
            });
            assert!((1..=2).contains(&count), "round {round}: {count}");
            assert!(map.is_dirty() && !map.arm());
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), slots);
        let mut rest = Vec::new();
        map.take(|slot| rest.push(slot));
        assert!(rest.len() >= slots.len() - 2);
        assert!(map.arm());
    }

    #[test]
    fn garbage_in_the_map_stays_in_range() {
        let words: Vec<_> = (0..DirtyMap::WORDS)
            .map(|_| AtomicU64::new(u64::MAX))
            .collect();
        let mut count = 0;
        DirtyMap::new(&words).unwrap().take(|slot| {
            assert!(slot < MAX_SLOTS);
            count += 1;
        });
        assert_eq!(count, MAX_SLOTS);
    }
}
