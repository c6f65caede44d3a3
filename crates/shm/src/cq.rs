//! Completion queue: the router produces, the library consumes.

use crate::sync::{AtomicU64, Ordering, fence};
use crate::wqe::CompletionEntry;

const PRODUCED: usize = 0;
const CONSUMED: usize = 8;
const ARMED: usize = 16;
const OVERRUN: usize = 24;
const ENTRIES: usize = 32;

/// Arming for the next completion of any kind.
pub const ARM_ANY: u64 = 1;
/// Arming for the next solicited completion or error.
pub const ARM_SOLICITED: u64 = 2;

/// View of a completion queue's ring.
#[derive(Clone, Copy)]
pub struct CqRing<'a> {
    words: &'a [AtomicU64],
    mask: u64,
}

impl<'a> CqRing<'a> {
    /// Words a ring of `entries` takes.
    pub const fn words(entries: u32) -> usize {
        ENTRIES + entries as usize * CompletionEntry::WORDS
    }

    /// A view; `None` if `entries` is no power of two or the memory too small.
    pub fn new(words: &'a [AtomicU64], entries: u32) -> Option<Self> {
        let fits = entries.is_power_of_two() && words.len() >= Self::words(entries);
        fits.then_some(CqRing {
            words,
            mask: u64::from(entries) - 1,
        })
    }

    fn slot(&self, index: u64) -> &'a [AtomicU64] {
        let at = ENTRIES + (index & self.mask) as usize * CompletionEntry::WORDS;
        &self.words[at..at + CompletionEntry::WORDS]
    }

    /// Router: whether the entry with this index would overwrite one that is not yet consumed.
    /// A consumer index out of range counts as full.
    pub fn is_full(&self, index: u64) -> bool {
        // Acquire: the library has read an entry before it hands it back (edge: `consume`).
        let consumed = self.words[CONSUMED].load(Ordering::Acquire);
        index.wrapping_sub(consumed) > self.mask
    }

    /// Router: writes the entry with this index and publishes it.
    pub fn produce(&self, index: u64, entry: &CompletionEntry) {
        entry.store(self.slot(index));
        // Release: the entry, and the data it reports, come before the index (edge: `produced`).
        self.words[PRODUCED].store(index.wrapping_add(1), Ordering::Release);
    }

    /// Router, after [`Self::produce`]: whether the library waits for an event of this kind.
    pub fn is_armed(&self, solicited: bool) -> bool {
        // Store-load edge against `arm`, followed by the library's look at PRODUCED: either it
        // sees our entry or we see its arming.
        fence(Ordering::SeqCst);
        let armed = self.words[ARMED].load(Ordering::Relaxed);
        armed == ARM_ANY || (armed == ARM_SOLICITED && solicited)
    }

    /// As [`Self::is_armed`]; the arming is used up.
    pub fn take_arming(&self, solicited: bool) -> bool {
        // One of several completions takes it.
        self.is_armed(solicited) && self.words[ARMED].swap(0, Ordering::AcqRel) != 0
    }

    /// Router: how many entries before this index are not consumed. What the library claims is
    /// not believed beyond the ring's size.
    pub fn backlog(&self, index: u64) -> u64 {
        // Acquire: as in `is_full`.
        let consumed = self.words[CONSUMED].load(Ordering::Acquire);
        index.wrapping_sub(consumed).min(self.mask + 1)
    }

    /// Router, when another ring takes the place of this one: what it was armed for goes on. The
    /// library does not arm either at this moment: it waits for the new ring.
    pub fn hand_over_arming(&self, to: &CqRing<'_>) {
        let armed = self.words[ARMED].swap(0, Ordering::AcqRel);
        to.words[ARMED].store(armed, Ordering::Release);
    }

    /// Router: an entry was lost for want of room.
    pub fn set_overrun(&self) {
        // Release: entries before the overrun are visible (edge: `overrun`).
        self.words[OVERRUN].store(1, Ordering::Release);
    }

    /// Library: whether an entry was lost.
    pub fn overrun(&self) -> bool {
        // Acquire: pairs with `set_overrun`.
        self.words[OVERRUN].load(Ordering::Acquire) != 0
    }

    /// Library: index behind the last entry.
    pub fn produced(&self) -> u64 {
        // Acquire: pairs with `produce`.
        self.words[PRODUCED].load(Ordering::Acquire)
    }

    /// Library: reads an entry below [`Self::produced`].
    pub fn read(&self, index: u64) -> CompletionEntry {
        CompletionEntry::load(self.slot(index))
    }

    /// Library: hands back all entries below `index`.
    pub fn consume(&self, index: u64) {
        // Release: the entries were read before (edge: `is_full`).
        self.words[CONSUMED].store(index, Ordering::Release);
    }

    /// Library: asks for one event; see [`ARM_ANY`] and [`ARM_SOLICITED`]. A wider arming is not
    /// narrowed.
    pub fn arm(&self, kind: u64) {
        if kind == ARM_ANY || self.words[ARMED].load(Ordering::Relaxed) != ARM_ANY {
            self.words[ARMED].store(kind, Ordering::Release);
        }
        // Store-load edge against `take_arming`; the library polls after arming.
        fence(Ordering::SeqCst);
    }

    /// Library: takes back an arming for any completion, unless the router has used it up.
    pub fn disarm(&self) -> bool {
        // Relaxed: either side's exchange takes the word as a whole; it guards no other memory.
        self.words[ARMED]
            .compare_exchange(ARM_ANY, 0, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    }
}
