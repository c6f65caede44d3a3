//! Links with a rate, a delay, a queue and faults.

use fastrand::Rng;

use crate::{MS, US};

/// Bytes that a packet takes on the link beside its own: Ethernet with preamble and gap, IPv4,
/// UDP and the invariant CRC.
const OVERHEAD: u64 = 38 + 20 + 8 + 4;

/// How the network is. Probabilities are from 0 to 1, per packet and direction.
#[derive(Clone, Debug)]
pub struct Network {
    /// Bits per second of each host's link.
    pub rate: u64,
    /// How much faster hosts send than their links carry to them: what many send at once waits at
    /// the switch, not in a host.
    pub haste: u64,
    /// One way through the switch, in nanoseconds.
    pub delay: u64,
    /// Up to so much more, in nanoseconds, that keeps the order.
    pub jitter: u64,
    /// Up to so much, in nanoseconds, before a host sends: without, who comes regularly finds room
    /// in a full queue always, and the others never.
    pub scatter: u64,
    /// Bytes that wait at the switch for a host's link; what comes then is dropped.
    pub queue: u64,
    /// Bytes that wait there before packets are marked (RFC 3168, CE).
    pub mark: u64,
    /// Packets lost.
    pub loss: f64,
    /// Packets damaged: the receiver's CRC finds out, and they are lost.
    pub damage: f64,
    /// Packets that come twice.
    pub duplicate: f64,
    /// Packets that are late by up to `late`, and are overtaken.
    pub reorder: f64,
    /// How late, in nanoseconds.
    pub late: u64,
}

impl Default for Network {
    /// 10 Gbit/s, 10 us one way, no faults.
    fn default() -> Self {
        Network {
            rate: 10_000_000_000,
            haste: 1,
            scatter: 0,
            delay: 10 * US,
            jitter: 0,
            queue: 1 << 20,
            mark: u64::MAX,
            loss: 0.0,
            damage: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
            late: MS,
        }
    }
}

impl Network {
    /// Time on the link, in nanoseconds.
    pub(crate) fn time(&self, bytes: usize) -> u64 {
        (bytes as u64 + OVERHEAD) * 8 * 1_000_000_000 / self.rate
    }
}

/// What became of packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sent by hosts.
    pub sent: u64,
    /// Lost or damaged on the way.
    pub lost: u64,
    /// Dropped at a full queue.
    pub overflowed: u64,
    /// Sent to or from a host that was cut off.
    pub cut: u64,
}

/// A host's two links.
#[derive(Clone, Debug, Default)]
pub(crate) struct Links {
    /// When each is free again.
    up: u64,
    down: u64,
    /// The last arrival, which jitter does not overtake.
    last: u64,
    /// Until when nothing passes.
    pub(crate) cut_until: u64,
}

impl Network {
    /// When a packet that a host sends now arrives: not at all, once, or twice; and whether it is
    /// marked.
    pub(crate) fn carry(
        &self,
        links: &mut [Links],
        (from, to): (usize, usize),
        bytes: usize,
        now: u64,
        rng: &mut Rng,
        stats: &mut Stats,
    ) -> ([Option<u64>; 2], bool) {
        stats.sent += 1;
        let time = self.time(bytes);
        let up = &mut links[from];
        let scatter = match self.scatter {
            0 => 0,
            most => rng.u64(0..=most),
        };
        up.up = up.up.max(now + scatter) + time / self.haste;
        let at_switch = up.up + self.delay / 2;
        if links[from].cut_until > now || links[to].cut_until > now {
            stats.cut += 1;
            return ([None, None], false);
        }
        if rng.f64() < self.loss || rng.f64() < self.damage {
            stats.lost += 1;
            return ([None, None], false);
        }
        let down = &mut links[to];
        let free = down.down.max(at_switch);
        let waiting = (free - at_switch) * self.rate / 8_000_000_000;
        if waiting > self.queue {
            stats.overflowed += 1;
            return ([None, None], false);
        }
        down.down = free + time;
        let jitter = if self.jitter == 0 {
            0
        } else {
            rng.u64(0..=self.jitter)
        };
        let in_order = (down.down + self.delay / 2 + jitter).max(down.last);
        down.last = in_order;
        let mut late = |p: f64| (rng.f64() < p).then(|| in_order + rng.u64(0..=self.late));
        let copy = late(self.duplicate);
        let first = late(self.reorder).unwrap_or(in_order);
        ([Some(first), copy], waiting > self.mark)
    }
}
