//! Selective retransmission between FreeFlow routers: the one extension on the wire.
//!
//! A standard responder drops what comes out of order, and the requester goes back to the gap.
//! Routers that agreed on it (by [`Connection::selective`](crate::Connection::selective), never
//! otherwise) do better: the responder keeps up to [`WINDOW`] packets that came early, and
//! executes them in order when the gap has closed. It does not place them early, for programs
//! poll the last byte of a WRITE and must find the bytes before it. The executor holds their bytes;
//! [`Responder::hold`](crate::Responder::hold) remembers their numbers.
//!
//! What is held is reported in a packet with the format of an ATOMIC Acknowledge, whose AETH has a
//! syndrome that the standard reserves (010 in bits 7-5, 0 below):
//!
//! | field | content |
//! |---|---|
//! | BTH PSN | the last request executed: all up to it is acknowledged |
//! | AETH syndrome | 0x40 |
//! | AETH MSN | the PSN that bit 0 stands for |
//! | AtomicAckETH | bit *i* is set: the packet *i* after that is held |
//!
//! What has been reported as held is never dropped but by an end of the connection, so the
//! requester sends only the rest again, and nothing that is too far ahead of the gap to be held. A
//! standard report of the gap is sent only where nothing is held at all.

use freeflow_types::Psn;
use freeflow_wire::{Aeth, Bth, BthOpcode, Headers, Service, Syndrome};
use serde::{Deserialize, Serialize};

use crate::connection::{Connection, psn};

/// How far ahead of the gap packets are held. It is one report less than the bits there are, so
/// that no report speaks of both ends of the window.
pub const WINDOW: u64 = 448;

/// Bytes of payload that are held at most. The executor drops what would be more; but a requester
/// that knows of a gap sends nothing further beyond it than what is held for sure.
pub const HELD_BYTES: u32 = 1 << 20;

/// Packets that one report speaks of.
pub(crate) const REPORT: u32 = 64;

/// 010 in the three bits of the kind.
const SYNDROME: Syndrome = Syndrome::Reserved(0x40);

const WORDS: u64 = 8;

/// A report of what is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Selective {
    /// The first that has not been executed.
    pub(crate) expected: Psn,
    /// What bit 0 stands for.
    pub(crate) base: Psn,
    pub(crate) bits: u64,
}

impl Selective {
    /// The report in these headers, if they are one.
    pub(crate) fn read(headers: &Headers) -> Option<Self> {
        let aeth = headers.aeth?;
        (aeth.syndrome == SYNDROME).then_some(Selective {
            expected: headers.bth.psn.add(1),
            base: Psn::new(aeth.msn),
            bits: headers.atomic_ack?,
        })
    }
}

/// The packets that a responder holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Held {
    /// By sequence number, modulo their count.
    bits: [u64; WORDS as usize],
    /// Words of which the requester is to be told.
    news: u8,
}

impl Held {
    fn word(at: u64) -> usize {
        (at / u64::from(REPORT) % WORDS) as usize
    }

    fn bit(at: u64) -> u64 {
        1 << (at % u64::from(REPORT))
    }

    /// Whether `at` is held.
    pub(crate) fn has(&self, at: u64) -> bool {
        self.bits[Self::word(at)] & Self::bit(at) != 0
    }

    /// `at` is held, and to be reported; also if it was before.
    pub(crate) fn insert(&mut self, at: u64) {
        self.bits[Self::word(at)] |= Self::bit(at);
        self.news |= 1 << Self::word(at);
    }

    /// `at` is held no more.
    pub(crate) fn remove(&mut self, at: u64) {
        self.bits[Self::word(at)] &= !Self::bit(at);
    }

    /// Whether nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.bits == [0; WORDS as usize]
    }

    /// Whether there is something to report.
    pub(crate) fn has_news(&self) -> bool {
        self.news != 0
    }

    /// The next report of a responder that expects `expected`.
    pub(crate) fn report(&mut self, connection: &Connection, expected: u64) -> Option<Headers> {
        while self.news != 0 {
            let word = self.news.trailing_zeros() as usize;
            self.news &= self.news - 1;
            let bits = self.bits.get(word).copied().unwrap_or(0);
            if bits == 0 {
                continue;
            }
            // The first block from that of `expected` on whose word this is.
            let block = expected / u64::from(REPORT);
            let ahead = (word as u64).wrapping_sub(block) % WORDS;
            let base = (block + ahead) * u64::from(REPORT);
            let opcode = BthOpcode::new(connection.service(), BthOpcode::RC_ATOMIC_ACK.op());
            let at = psn(expected.saturating_sub(1));
            let mut h = Headers::new(Bth::new(opcode, connection.dest_qp, at));
            h.aeth = Some(Aeth {
                syndrome: SYNDROME,
                msn: psn(base).get(),
            });
            h.atomic_ack = Some(bits);
            return Some(h);
        }
        None
    }
}

/// Whether this service's packets may be reports.
pub(crate) fn applies(connection: &Connection) -> bool {
    connection.selective && matches!(connection.service(), Service::Rc | Service::Xrc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_types::{QpAttr, QpType};

    #[test]
    fn reports_name_what_is_held_anywhere_in_the_window() {
        let connection = Connection::new(QpType::Rc, &QpAttr::default());
        for expected in (1u64 << 32)..(1u64 << 32) + 600 {
            for ahead in [1, 2, 63, 64, 65, 300, WINDOW - 1, WINDOW] {
                let mut held = Held::default();
                let at = expected + ahead;
                held.insert(at);
                assert!(held.has(at) && held.has_news());
                let report = held.report(&connection, expected).unwrap();
                let report = Selective::read(&report).unwrap();
                assert_eq!(report.expected, psn(expected));
                assert_eq!(report.bits.count_ones(), 1);
                assert_eq!(report.base.add(report.bits.trailing_zeros()), psn(at));
                assert!(held.report(&connection, expected).is_none());
                held.remove(at);
                assert_eq!(held, Held::default());
            }
        }
    }
}
