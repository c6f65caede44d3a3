//! A layer that spoils what is received, as bad networks do.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use fastrand::Rng;

use crate::batch::{Datagram, Datagrams, Trains};
use crate::link::{Ecn, Link, Progress, SendCounters};

/// Datagrams held back at a time: further ones are lost.
const MAX_HELD: usize = 1 << 16;

/// How often what happens: of the chances, 0 is never and 1 always.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct FaultRates {
    /// Chance that a datagram is lost.
    pub loss: f64,
    /// Chance that one comes twice.
    pub duplication: f64,
    /// Chance that a bit is changed.
    pub corruption: f64,
    /// Chance that one is held back by `reordering_ns`, so that others pass it.
    pub reordering: f64,
    /// See `reordering`, in ns.
    pub reordering_ns: u64,
    /// What every datagram is delayed by, in ns.
    pub delay_ns: u64,
    /// What each is delayed by in addition, at most, in ns; this reorders too.
    pub jitter_ns: u64,
}

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FaultCounters {
    /// Datagrams that came.
    pub seen: u64,
    /// Lost.
    pub lost: u64,
    /// Doubled.
    pub duplicated: u64,
    /// Changed.
    pub corrupted: u64,
    /// Held back.
    pub reordered: u64,
}

/// A link whose received datagrams are spoiled, always alike for the same seed and datagrams.
pub struct Faults<L> {
    link: L,
    rates: FaultRates,
    rng: Rng,
    batch: Datagrams,
    held: BinaryHeap<Reverse<Held>>,
    order: u64,
    counters: FaultCounters,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    due: u64,
    /// Of those that are due at once, the order.
    order: u64,
    src: SocketAddr,
    tos: u8,
    bytes: Vec<u8>,
}

impl<L: Link> Faults<L> {
    /// Spoils what comes from a link.
    pub fn new(link: L, rates: FaultRates, seed: u64) -> Self {
        Faults {
            link,
            rates,
            rng: Rng::with_seed(seed),
            batch: Datagrams::default(),
            held: BinaryHeap::new(),
            order: 0,
            counters: FaultCounters::default(),
        }
    }

    /// Changes how often what happens, from the next datagram on.
    pub fn set_rates(&mut self, rates: FaultRates) {
        self.rates = rates;
    }

    /// What happened.
    pub fn counters(&self) -> FaultCounters {
        self.counters
    }

    fn chance(&mut self, rate: f64) -> bool {
        // Drawn always, so that one rate's change does not change what others do.
        self.rng.f64() < rate
    }

    fn spoil(&mut self, now: u64, datagram: Datagram<'_>) {
        let rates = self.rates;
        self.counters.seen += 1;
        let lost = self.chance(rates.loss);
        let twice = self.chance(rates.duplication);
        if lost {
            self.counters.lost += 1;
            return;
        }
        self.counters.duplicated += u64::from(twice);
        for _ in 0..=usize::from(twice) {
            let mut bytes = datagram.bytes.to_vec();
            if self.chance(rates.corruption) && !bytes.is_empty() {
                let at = self.rng.usize(..bytes.len());
                bytes[at] ^= 1 << self.rng.u32(..8);
                self.counters.corrupted += 1;
            }
            let mut due = now.saturating_add(rates.delay_ns);
            if rates.jitter_ns > 0 {
                due = due.saturating_add(self.rng.u64(..=rates.jitter_ns));
            }
            if self.chance(rates.reordering) {
                due = due.saturating_add(rates.reordering_ns);
                self.counters.reordered += 1;
            }
            if self.held.len() >= MAX_HELD {
                self.counters.lost += 1;
                continue;
            }
            self.order += 1;
            self.held.push(Reverse(Held {
                due,
                order: self.order,
                src: datagram.src,
                tos: datagram.ecn as u8,
                bytes,
            }));
        }
    }
}

impl<L: Link> Link for Faults<L> {
    fn local(&self) -> IpAddr {
        self.link.local()
    }

    fn source_port(&self, flow: u32) -> u16 {
        self.link.source_port(flow)
    }

    fn send(&mut self, now: u64, trains: &mut Trains) -> io::Result<Progress> {
        self.link.send(now, trains)
    }

    fn receive(&mut self, now: u64, into: &mut Datagrams) -> io::Result<()> {
        let mut batch = std::mem::take(&mut self.batch);
        let received = self.link.receive(now, &mut batch);
        batch.iter().for_each(|datagram| self.spoil(now, datagram));
        batch.clear();
        self.batch = batch;
        received?;
        into.clear();
        while let Some(Reverse(first)) = self.held.peek()
            && first.due <= now
        {
            into.push(Datagram {
                src: first.src,
                ecn: Ecn::from_tos(first.tos),
                follows: false,
                bytes: &first.bytes,
            });
            self.held.pop();
        }
        Ok(())
    }

    fn next_timeout(&self) -> Option<u64> {
        let held = self.held.peek().map(|Reverse(first)| first.due);
        held.into_iter().chain(self.link.next_timeout()).min()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.link.fd()
    }

    fn has_checksum(&self) -> bool {
        // It is done with when bits change here.
        false
    }

    fn sent(&self) -> SendCounters {
        self.link.sent()
    }

    fn overflows(&self) -> u64 {
        self.link.overflows()
    }
}
