//! A TCP stream, to share links with: CUBIC (RFC 9438) with the slow start of Linux (HyStart),
//! selective acknowledgements (RFC 6675), and an acknowledgement for each segment. It shares no code with
//! the transport, so that it says what others on the network meet.

use std::collections::{BTreeMap, BTreeSet};

use crate::{MS, SEC};

/// Payload bytes of a segment.
pub(crate) const SEGMENT: u64 = 1448;
/// Bytes of a segment, and of an acknowledgement, as the network counts a packet's (its overhead
/// is UDP's).
pub(crate) const SEGMENT_BYTES: usize = 1468;
pub(crate) const ACK_BYTES: usize = 20;

const BETA: f64 = 717.0 / 1024.0;
const C: f64 = 0.4;
const REORDERING: u64 = 3;
const MIN_RTO: u64 = 200 * MS;

/// An acknowledgement: all below the first, and that one.
pub(crate) type Ack = (u64, u64);

/// Both ends of a stream that always has something to send.
#[derive(Debug)]
pub struct Stream {
    /// Sending and receiving host.
    pub(crate) hosts: (usize, usize),
    cwnd: f64,
    threshold: f64,
    max: f64,
    epoch: Option<(u64, f64)>,
    reno: f64,
    srtt: u64,
    rttvar: u64,
    min_rtt: u64,
    /// Of this round: its end, samples, their least.
    round: (u64, u32, u64),
    /// Under way: order and time of its transmission, and whether it was sent before.
    sent: BTreeMap<u64, (u64, u64, bool)>,
    lost: BTreeSet<u64>,
    next: u64,
    order: u64,
    arrived: u64,
    recovery_end: u64,
    pub(crate) rto_at: Option<u64>,
    backoff: u32,
    expected: u64,
    early: BTreeSet<u64>,
}

impl Stream {
    pub(crate) fn new(hosts: (usize, usize)) -> Self {
        Stream {
            hosts,
            cwnd: 10.0,
            threshold: f64::MAX,
            max: 0.0,
            epoch: None,
            reno: 0.0,
            srtt: 0,
            rttvar: 0,
            min_rtt: u64::MAX,
            round: (0, 0, u64::MAX),
            sent: BTreeMap::new(),
            lost: BTreeSet::new(),
            next: 0,
            order: 0,
            arrived: 0,
            recovery_end: 0,
            rto_at: None,
            backoff: 0,
            expected: 0,
            early: BTreeSet::new(),
        }
    }

    /// Bytes that have arrived in order.
    pub fn delivered(&self) -> u64 {
        self.expected * SEGMENT
    }

    /// The next segment to send.
    pub(crate) fn next_segment(&mut self, now: u64) -> Option<u64> {
        if self.sent.len() as f64 >= self.cwnd.max(1.0) {
            return None;
        }
        let again = self.lost.pop_first();
        let seq = again.unwrap_or(self.next);
        self.next = self.next.max(seq + 1);
        self.order += 1;
        self.sent.insert(seq, (self.order, now, again.is_some()));
        self.rto_at.get_or_insert(now + self.rto());
        Some(seq)
    }

    /// A segment has arrived; the acknowledgement to send.
    pub(crate) fn on_segment(&mut self, seq: u64) -> Ack {
        if seq >= self.expected {
            self.early.insert(seq);
        }
        while self.early.remove(&self.expected) {
            self.expected += 1;
        }
        (self.expected, seq)
    }

    /// An acknowledgement has arrived.
    pub(crate) fn on_ack(&mut self, (expected, seq): Ack, now: u64) {
        let rest = self.sent.split_off(&expected);
        let mut done = std::mem::replace(&mut self.sent, rest);
        self.lost = self.lost.split_off(&expected);
        if let Some(one) = self.sent.remove(&seq) {
            done.insert(seq, one);
        }
        self.lost.remove(&seq);
        if done.is_empty() {
            return;
        }
        self.backoff = 0;
        self.rto_at = None;
        let news = done.values().max().expect("there are some");
        self.arrived = self.arrived.max(news.0);
        if !news.2 {
            self.on_rtt(now - news.1, expected);
        }
        let overtaken: Vec<u64> = (self.sent.iter())
            .filter(|(_, (order, ..))| order + REORDERING <= self.arrived)
            .map(|(&seq, _)| seq)
            .collect();
        for seq in &overtaken {
            self.sent.remove(seq);
            self.lost.insert(*seq);
        }
        let oldest = self.oldest();
        if !overtaken.is_empty() && oldest >= self.recovery_end {
            self.recovery_end = self.next;
            self.shrink();
        } else if oldest >= self.recovery_end {
            self.grow(done.len() as f64, now);
        }
        if !self.sent.is_empty() {
            self.rto_at = Some(now + self.rto());
        }
    }

    fn oldest(&self) -> u64 {
        let first = self.sent.keys().next().copied().unwrap_or(self.next);
        self.lost.first().copied().unwrap_or(first).min(first)
    }

    pub(crate) fn on_timeout(&mut self, now: u64) {
        self.shrink();
        self.cwnd = 1.0;
        self.lost.extend(self.sent.keys());
        self.sent.clear();
        self.recovery_end = self.next;
        self.backoff += 1;
        self.rto_at = Some(now + self.rto());
    }

    fn rto(&self) -> u64 {
        let base = match self.srtt {
            0 => SEC,
            srtt => (srtt + 4 * self.rttvar).max(srtt + MIN_RTO),
        };
        base << self.backoff.min(8)
    }

    fn on_rtt(&mut self, rtt: u64, expected: u64) {
        if self.srtt == 0 {
            (self.srtt, self.rttvar) = (rtt, rtt / 2);
        } else {
            self.rttvar = (3 * self.rttvar + self.srtt.abs_diff(rtt)) / 4;
            self.srtt = (7 * self.srtt + rtt) / 8;
        }
        self.min_rtt = self.min_rtt.min(rtt);
        if expected > self.round.0 {
            self.round = (self.next, 0, u64::MAX);
        }
        self.round.1 += 1;
        if self.round.1 <= 8 {
            self.round.2 = self.round.2.min(rtt);
        }
        let step = (self.min_rtt / 8).clamp(4 * MS, 16 * MS);
        let slow_start = self.cwnd < self.threshold && self.cwnd >= 16.0;
        if slow_start && self.round.1 >= 8 && self.round.2 > self.min_rtt + step {
            self.threshold = self.cwnd;
        }
    }

    fn grow(&mut self, acked: f64, now: u64) {
        if self.cwnd < self.threshold {
            self.cwnd += acked;
            return;
        }
        if self.epoch.is_none() {
            self.max = self.max.max(self.cwnd);
            self.epoch = Some((now, ((self.max - self.cwnd) / C).cbrt()));
            self.reno = self.cwnd;
        }
        let (start, plateau) = self.epoch.expect("it has begun");
        let t = (now - start + self.srtt) as f64 / 1e9 - plateau;
        let target = (C * t * t * t + self.max).clamp(self.cwnd, 1.5 * self.cwnd);
        self.reno += 3.0 * (1.0 - BETA) / (1.0 + BETA) * acked / self.cwnd;
        let cubic = self.cwnd + (target - self.cwnd) * acked / self.cwnd;
        self.cwnd = cubic.max(self.reno);
    }

    fn shrink(&mut self) {
        self.max = match self.cwnd < self.max {
            true => self.cwnd * (1.0 + BETA) / 2.0,
            false => self.cwnd,
        };
        self.cwnd = (self.cwnd * BETA).max(2.0);
        self.threshold = self.cwnd;
        self.epoch = None;
    }
}
