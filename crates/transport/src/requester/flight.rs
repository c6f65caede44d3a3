//! What was sent and is not yet answered for good.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Packets sent later that must be known to have arrived before one is taken for lost, so that a
/// little reordering does no harm (RFC 6675's and RFC 9002's number).
const REORDERING: i32 = 3;

/// Capacity that an idle queue pair may keep.
const IDLE_CAPACITY: usize = 32;

/// What is known of a sequence number that was used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum Fate {
    /// Under way.
    Sent,
    /// The peer has it, and will execute it when what is before it has come.
    Held,
    /// A READ, atomic or the like that the peer has, and will answer when it has executed it.
    Awaited,
    /// To be sent again.
    Lost,
    /// Answered; it waits for those before it.
    Answered,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Packet {
    /// Number of the transmission, in the order in which they were made.
    sent: u32,
    /// Bytes on the wire, of the request or of its answer.
    size: u32,
    /// Bytes of all requests before it, modulo 2^32.
    before: u32,
    fate: Fate,
}

/// The sequence numbers from the oldest unanswered to the highest sent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Flight {
    oldest: u64,
    packets: VecDeque<Packet>,
    /// Of which are lost; none of them is below `lost_from`.
    lost: u32,
    lost_from: u64,
    /// Bytes under way.
    under_way: u64,
    /// How many the peer is known to have, and how many of these it has still to answer.
    settled: u32,
    awaited: u32,
    transmissions: u32,
    /// Bytes of all requests, modulo 2^32.
    requests: u32,
    /// The latest transmission that is known to have arrived.
    arrived: u32,
}

impl Flight {
    pub(super) fn new(first: u64) -> Self {
        Flight {
            oldest: first,
            packets: VecDeque::new(),
            lost: 0,
            lost_from: first,
            under_way: 0,
            settled: 0,
            awaited: 0,
            transmissions: 0,
            requests: 0,
            arrived: 0,
        }
    }

    /// The oldest that is not answered.
    pub(super) fn oldest(&self) -> u64 {
        self.oldest
    }

    /// One above the highest ever sent.
    pub(super) fn end(&self) -> u64 {
        self.oldest + self.packets.len() as u64
    }

    pub(super) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Sequence numbers in use.
    pub(super) fn len(&self) -> u32 {
        self.packets.len() as u32
    }

    /// How many bytes are believed to be in the network.
    pub(super) fn under_way(&self) -> u64 {
        self.under_way
    }

    fn index(&self, psn: u64) -> Option<usize> {
        usize::try_from(psn.checked_sub(self.oldest)?).ok()
    }

    pub(super) fn fate(&self, psn: u64) -> Option<Fate> {
        self.packets.get(self.index(psn)?).map(|p| p.fate)
    }

    fn leave(&mut self, fate: Fate, size: u32) {
        match fate {
            Fate::Sent => self.under_way = self.under_way.saturating_sub(size.into()),
            Fate::Lost => self.lost = self.lost.saturating_sub(1),
            Fate::Held | Fate::Awaited | Fate::Answered => {
                self.settled = self.settled.saturating_sub(1);
                let awaited = u32::from(fate == Fate::Awaited);
                self.awaited = self.awaited.saturating_sub(awaited);
            }
        }
    }

    fn enter(&mut self, fate: Fate, size: u32) {
        match fate {
            Fate::Sent => self.under_way += u64::from(size),
            Fate::Lost => self.lost += 1,
            Fate::Held | Fate::Awaited | Fate::Answered => {
                self.settled += 1;
                self.awaited += u32::from(fate == Fate::Awaited);
            }
        }
    }

    fn set(&mut self, psn: u64, fate: Fate) {
        let Some(packet) = self.index(psn).and_then(|i| self.packets.get_mut(i)) else {
            return;
        };
        let (before, size) = (std::mem::replace(&mut packet.fate, fate), packet.size);
        self.leave(before, size);
        self.enter(fate, size);
        if fate == Fate::Lost {
            self.lost_from = self.lost_from.min(psn);
        }
    }

    /// The first that is to be sent again.
    pub(super) fn next_lost(&mut self) -> Option<u64> {
        if self.lost == 0 {
            self.lost_from = self.end();
            return None;
        }
        self.lost_from = self.lost_from.max(self.oldest);
        let from = self.index(self.lost_from)?;
        let ahead = self
            .packets
            .range(from.min(self.packets.len())..)
            .position(|p| p.fate == Fate::Lost)?;
        self.lost_from += ahead as u64;
        Some(self.lost_from)
    }

    /// How many in a row from `psn`, at most `max`, are not answered.
    pub(super) fn unanswered_run(&self, psn: u64, max: u32) -> u32 {
        let answered = [None, Some(Fate::Answered)];
        (0..max)
            .take_while(|&i| !answered.contains(&self.fate(psn + u64::from(i))))
            .count() as u32
    }

    /// Whether something is known to be missing: lost, or behind what has arrived.
    pub(super) fn has_gap(&self) -> bool {
        self.lost != 0 || self.settled != 0
    }

    /// Bytes of the requests from the oldest to the one before `psn`.
    pub(super) fn requests_before(&self, psn: u64) -> u32 {
        let before = |i: usize| self.packets.get(i).map_or(self.requests, |p| p.before);
        let at = self.index(psn).unwrap_or(0);
        before(at).wrapping_sub(before(0))
    }

    /// One of `size` bytes is sent, for the first time or again; its request is of so many bytes.
    pub(super) fn send(&mut self, psn: u64, size: u32, request: u32) {
        self.transmissions = self.transmissions.wrapping_add(1);
        let sent = self.transmissions;
        if psn == self.end() {
            let fate = Fate::Sent;
            self.packets.push_back(Packet {
                sent,
                size,
                before: self.requests,
                fate,
            });
            self.requests = self.requests.wrapping_add(request);
            self.enter(fate, size);
        } else {
            self.set(psn, Fate::Sent);
            if let Some(p) = self.index(psn).and_then(|i| self.packets.get_mut(i)) {
                p.sent = sent;
            }
        }
    }

    /// One is answered. Returns the bytes of it that the network had until now, which are none of
    /// what the peer held, if it is news.
    pub(super) fn answer(&mut self, psn: u64) -> Option<u32> {
        let &Packet {
            sent, size, fate, ..
        } = self.packets.get(self.index(psn)?)?;
        if fate == Fate::Answered {
            return None;
        }
        self.arrive(sent);
        self.set(psn, Fate::Answered);
        Some(if fate == Fate::Held { 0 } else { size })
    }

    fn arrive(&mut self, sent: u32) {
        if sent.wrapping_sub(self.arrived) as i32 > 0 {
            self.arrived = sent;
        }
    }

    /// The peer has one, and keeps it. Returns its bytes, if that is news.
    pub(super) fn hold(&mut self, psn: u64) -> Option<u32> {
        let &Packet {
            sent, size, fate, ..
        } = self.packets.get(self.index(psn)?)?;
        let news = matches!(fate, Fate::Sent | Fate::Lost);
        if news {
            self.arrive(sent);
            self.set(psn, Fate::Held);
        }
        news.then_some(size)
    }

    /// The peer has a request, whose answer is of `count` packets from `psn`.
    pub(super) fn expect(&mut self, psn: u64, count: u32) {
        if let Some(&Packet { sent, fate, .. }) = self.index(psn).and_then(|i| self.packets.get(i))
            && matches!(fate, Fate::Sent | Fate::Lost)
        {
            self.arrive(sent);
        }
        for psn in psn..psn + u64::from(count) {
            if matches!(self.fate(psn), Some(Fate::Sent | Fate::Lost)) {
                self.set(psn, Fate::Awaited);
            }
        }
    }

    /// Whether the peer has requests that it has not answered.
    pub(super) fn awaits(&self) -> bool {
        self.awaited != 0
    }

    /// The peer has executed a request that was awaited. Its answers come before those to what was
    /// sent after the latest that has arrived, whenever it was itself sent.
    pub(super) fn executed(&mut self, psn: u64) {
        if self.fate(psn) == Some(Fate::Awaited) {
            self.set(psn, Fate::Sent);
            let arrived = self.arrived;
            if let Some(p) = self.index(psn).and_then(|i| self.packets.get_mut(i)) {
                p.sent = arrived;
            }
        }
    }

    /// Forgets the oldest, which is answered.
    pub(super) fn pop(&mut self) {
        let Some(packet) = self.packets.pop_front() else {
            return;
        };
        self.leave(packet.fate, packet.size);
        self.oldest += 1;
        if self.packets.is_empty() {
            self.packets.shrink_to(IDLE_CAPACITY);
        }
    }

    /// One is to be sent again, whatever was known of it.
    pub(super) fn lose(&mut self, psn: u64) {
        self.set(psn, Fate::Lost);
    }

    /// All that the peer may not have is to be sent again.
    pub(super) fn lose_all(&mut self) {
        for psn in self.oldest..self.end() {
            if matches!(self.fate(psn), Some(Fate::Sent | Fate::Awaited)) {
                self.set(psn, Fate::Lost);
            }
        }
    }

    /// The peer has dropped what is under way from `psn` on.
    pub(super) fn lose_from(&mut self, psn: u64) {
        for psn in psn..self.end() {
            if self.fate(psn) == Some(Fate::Sent) {
                self.set(psn, Fate::Lost);
            }
        }
    }

    /// What is under way although later transmissions have arrived is lost; true if there is any.
    pub(super) fn lose_overtaken(&mut self) -> bool {
        let before = self.lost;
        let oldest = self.packets.front().map_or(0, |p| p.sent);
        if self.settled == 0 && (self.arrived.wrapping_sub(oldest) as i32) < REORDERING {
            // Nothing has arrived out of order: there is no need to look.
            return false;
        }
        for i in 0..self.packets.len() {
            let Some(&Packet { sent, fate, .. }) = self.packets.get(i) else {
                break;
            };
            let behind = self.arrived.wrapping_sub(sent) as i32;
            if fate == Fate::Sent && behind >= REORDERING {
                self.set(self.oldest + i as u64, Fate::Lost);
            }
        }
        self.lost > before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(f: &mut Flight, psn: u64, count: u64) {
        (psn..psn + count).for_each(|psn| f.send(psn, 10, 8));
    }

    #[test]
    fn overtaken_packets_are_lost_and_their_copies_too() {
        let mut f = Flight::new(100);
        send(&mut f, 100, 8);
        assert_eq!((f.oldest(), f.end(), f.under_way()), (100, 108, 80));
        assert_eq!(
            [100, 101, 108].map(|psn| f.requests_before(psn)),
            [0, 8, 64]
        );
        assert!(!f.has_gap());
        assert_eq!(f.answer(102), Some(10));
        assert_eq!(f.answer(102), None);
        assert!(!f.lose_overtaken());
        f.answer(103);
        assert!(f.lose_overtaken());
        assert_eq!(f.next_lost(), Some(100));
        assert_eq!((f.unanswered_run(100, 9), f.under_way()), (2, 50));
        send(&mut f, 100, 1);
        assert_eq!(f.next_lost(), None);
        // Later ones arrive, the copy does not: nothing overtook it yet.
        f.answer(107);
        assert!(f.lose_overtaken());
        assert_eq!(f.next_lost(), Some(101));
        assert_eq!(f.fate(100), Some(Fate::Sent));
        send(&mut f, 108, 3);
        f.answer(110);
        assert!(f.lose_overtaken());
        assert_eq!(f.next_lost(), Some(100));
    }

    #[test]
    fn counts_follow_every_change() {
        let mut f = Flight::new(5);
        send(&mut f, 5, 4);
        assert_eq!((f.hold(6), f.hold(6)), (Some(10), None));
        assert_eq!(f.under_way(), 30);
        f.lose_all();
        assert_eq!((f.under_way(), f.next_lost()), (0, Some(5)));
        f.lose(6);
        assert_eq!((f.under_way(), f.unanswered_run(5, 9)), (0, 4));
        f.answer(5);
        f.pop();
        assert_eq!((f.oldest(), f.next_lost()), (6, Some(6)));
        send(&mut f, 6, 3);
        for psn in 6..9 {
            f.answer(psn);
            f.pop();
        }
        assert!(f.is_empty() && f.under_way() == 0 && f.next_lost().is_none());
        f.pop();
        assert_eq!(f.oldest(), 9);
    }
}
