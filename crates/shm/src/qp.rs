//! Send and receive rings of a queue pair: the library produces, the router consumes.

use crate::sync::{AtomicU64, Ordering, fence};
use crate::wqe::{RecvEntry, SendEntry};

const SEND_PRODUCED: usize = 0;
const RECV_PRODUCED: usize = 16;
const RECV_WAKE: usize = 32;
const RINGS: usize = 64;

/// Sizes of a queue pair's rings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QpGeometry {
    send_entries: u32,
    recv_entries: u32,
    send_words: u32,
    recv_words: u32,
}

impl QpGeometry {
    /// Rings with room for these capacities; the numbers of requests are rounded up to powers of
    /// two, a request's size to a cache line.
    pub fn new(send_wr: u32, recv_wr: u32, send_sge: u32, recv_sge: u32, inline: u32) -> Self {
        let payload = (send_sge * 2).max(inline.div_ceil(8));
        QpGeometry {
            send_entries: send_wr.max(1).next_power_of_two(),
            recv_entries: recv_wr.max(1).next_power_of_two(),
            send_words: (SendEntry::WORDS as u32 + payload).next_multiple_of(8),
            recv_words: (RecvEntry::WORDS as u32 + recv_sge.max(1) * 2).next_multiple_of(2),
        }
    }

    /// Words of shared memory.
    pub fn words(&self) -> usize {
        RINGS
            + self.send_entries as usize * self.send_words as usize
            + self.recv_entries as usize * self.recv_words as usize
    }

    /// Send requests the ring holds.
    pub fn send_entries(&self) -> u32 {
        self.send_entries
    }

    /// Receive requests the ring holds.
    pub fn recv_entries(&self) -> u32 {
        self.recv_entries
    }

    /// Scatter/gather elements that fit a send request.
    pub fn send_sge(&self) -> u32 {
        (self.send_words - SendEntry::WORDS as u32) / 2
    }

    /// Inline bytes that fit a send request.
    pub fn inline(&self) -> u32 {
        (self.send_words - SendEntry::WORDS as u32) * 8
    }
}

/// View of a queue pair's rings.
#[derive(Clone, Copy)]
pub struct QpRings<'a> {
    words: &'a [AtomicU64],
    geometry: QpGeometry,
}

impl<'a> QpRings<'a> {
    /// A view; `None` if the memory is too small.
    pub fn new(words: &'a [AtomicU64], geometry: QpGeometry) -> Option<Self> {
        (words.len() >= geometry.words()).then_some(QpRings { words, geometry })
    }

    /// Inline bytes that fit a send request.
    pub fn inline(&self) -> u32 {
        self.geometry.inline()
    }

    /// The words of the send request with this index.
    pub fn send_slot(&self, index: u64) -> &'a [AtomicU64] {
        let g = &self.geometry;
        let n = g.send_words as usize;
        let at = RINGS + (index as usize & (g.send_entries as usize - 1)) * n;
        &self.words[at..at + n]
    }

    /// The words of the receive request with this index.
    pub fn recv_slot(&self, index: u64) -> &'a [AtomicU64] {
        let g = &self.geometry;
        let n = g.recv_words as usize;
        let rings = RINGS + g.send_entries as usize * g.send_words as usize;
        let at = rings + (index as usize & (g.recv_entries as usize - 1)) * n;
        &self.words[at..at + n]
    }

    /// Library: publishes all send requests below `index`.
    pub fn publish_send(&self, index: u64) {
        // Release: the requests come before the index (edge: `send_produced`).
        self.words[SEND_PRODUCED].store(index, Ordering::Release);
    }

    /// Router: index behind the last send request; untrusted.
    pub fn send_produced(&self) -> u64 {
        // Acquire: pairs with `publish_send`.
        self.words[SEND_PRODUCED].load(Ordering::Acquire)
    }

    /// Library: publishes all receive requests below `index`. True if the router waits for one
    /// (a sender was told "receiver not ready"): then the queue pair must be marked.
    pub fn publish_recv(&self, index: u64) -> bool {
        // Release: the requests come before the index (edge: `recv_produced`).
        self.words[RECV_PRODUCED].store(index, Ordering::Release);
        // Store-load edge against `want_recv`.
        fence(Ordering::SeqCst);
        self.words[RECV_WAKE].load(Ordering::Relaxed) != 0
            && self.words[RECV_WAKE].swap(0, Ordering::AcqRel) != 0
    }

    /// Router: index behind the last receive request; untrusted.
    pub fn recv_produced(&self) -> u64 {
        // Acquire: pairs with `publish_recv`.
        self.words[RECV_PRODUCED].load(Ordering::Acquire)
    }

    /// Router: asks to be told of the next receive request, and looks again; true if there is
    /// one beyond `have` by now.
    pub fn want_recv(&self, have: u64) -> bool {
        self.words[RECV_WAKE].store(1, Ordering::Relaxed);
        // Store-load edge against `publish_recv`: it sees the flag or we see its index.
        fence(Ordering::SeqCst);
        self.recv_produced() != have
    }
}
