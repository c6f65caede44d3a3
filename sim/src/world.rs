//! Events in virtual time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use fastrand::Rng;
use freeflow_transport::Connection;
use freeflow_wire::{Headers, MAX_HEADER_BYTES};

use crate::network::Links;
use crate::stream::{ACK_BYTES, Ack, SEGMENT_BYTES};
use crate::{Network, Qp, Stats, Stream};

/// A queue pair's index.
pub type QpId = usize;

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Packet(QpId, Vec<u8>, bool),
    Timeout(QpId),
    Receives(QpId, usize, usize),
    Segment(usize, u64),
    Ack(usize, Ack),
    Rto(usize, u64),
}

/// Hosts, a network, and the time.
#[derive(Debug)]
pub struct Sim {
    /// The network; it may change while the simulation runs.
    pub network: Network,
    /// What became of packets.
    pub stats: Stats,
    /// All queue pairs.
    pub qps: Vec<Qp>,
    /// All TCP streams.
    pub streams: Vec<Stream>,
    /// For whoever makes up the work.
    pub rng: Rng,
    now: u64,
    /// Host of each queue pair, and its peer.
    places: Vec<(usize, QpId)>,
    links: Vec<Links>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    /// Orders events of the same time.
    count: u64,
    /// The earliest timeout that is scheduled for each queue pair.
    timers: Vec<Option<u64>>,
}

impl Sim {
    /// A network of so many hosts.
    pub fn new(seed: u64, hosts: usize, network: Network) -> Self {
        Sim {
            network,
            stats: Stats::default(),
            qps: Vec::new(),
            streams: Vec::new(),
            rng: Rng::with_seed(seed),
            now: 0,
            places: Vec::new(),
            links: vec![Links::default(); hosts],
            events: BinaryHeap::new(),
            count: 0,
            timers: Vec::new(),
        }
    }

    /// Nanoseconds since the beginning.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Connects a new queue pair of one host with one of another; they have so many bytes of
    /// memory each. The second has the sequence numbers of the first, turned around.
    pub fn connect(
        &mut self,
        hosts: (usize, usize),
        connection: Connection,
        memory: usize,
    ) -> (QpId, QpId) {
        let (a, b) = (self.qps.len(), self.qps.len() + 1);
        let there = Connection {
            dest_qp: a as u32,
            sq_psn: connection.rq_psn,
            rq_psn: connection.sq_psn,
            ..connection
        };
        let here = Connection {
            dest_qp: b as u32,
            ..connection
        };
        self.qps.push(Qp::new(&here, memory));
        self.qps.push(Qp::new(&there, memory));
        self.places.extend([(hosts.0, b), (hosts.1, a)]);
        self.timers.extend([None, None]);
        (a, b)
    }

    /// Begins a TCP stream from one host to another, without end.
    pub fn stream(&mut self, from: usize, to: usize) {
        self.streams.push(Stream::new((from, to)));
        self.pump_stream(self.streams.len() - 1);
    }

    fn pump_stream(&mut self, id: usize) {
        let hosts = self.streams[id].hosts;
        while let Some(seq) = self.streams[id].next_segment(self.now) {
            self.carry(hosts, SEGMENT_BYTES, |_| Event::Segment(id, seq));
        }
        if let Some(at) = self.streams[id].rto_at {
            self.schedule(at, Event::Rto(id, at));
        }
    }

    fn carry(&mut self, hosts: (usize, usize), bytes: usize, event: impl Fn(bool) -> Event) {
        let (times, marked) = self.network.carry(
            &mut self.links,
            hosts,
            bytes,
            self.now,
            &mut self.rng,
            &mut self.stats,
        );
        for at in times.into_iter().flatten() {
            self.schedule(at, event(marked));
        }
    }

    /// Nothing passes to or from a host for so many nanoseconds.
    pub fn cut(&mut self, host: usize, time: u64) {
        self.links[host].cut_until = self.now.saturating_add(time);
    }

    /// Posts receives of `bytes` each, so many nanoseconds from now.
    pub fn post_receives(&mut self, qp: QpId, after: u64, count: usize, bytes: usize) {
        self.schedule(self.now + after, Event::Receives(qp, count, bytes));
    }

    fn schedule(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse((at, self.count, event)));
    }

    /// Sends what a queue pair has to send: to be called after work was posted.
    pub fn pump(&mut self, qp: QpId) {
        let (host, peer) = self.places[qp];
        while let Some((headers, payload)) = self.qps[qp].next_packet(self.now) {
            assert_eq!(headers.bth.dest_qp as QpId, peer);
            let packet = build(&headers, &payload);
            let hosts = (host, self.places[peer].0);
            self.carry(hosts, packet.len(), |marked| {
                Event::Packet(peer, packet.clone(), marked)
            });
        }
        let due = self.qps[qp].requester.next_timeout();
        if let Some(due) = due
            && self.timers[qp].is_none_or(|at| due < at)
        {
            self.timers[qp] = Some(due);
            self.schedule(due.max(self.now), Event::Timeout(qp));
        }
    }

    /// Does what is next; false if there is nothing or it is later than `until`.
    pub fn step(&mut self, until: u64) -> bool {
        match self.events.peek() {
            Some(Reverse((at, _, _))) if *at <= until => {}
            _ => {
                self.now = self.now.max(until.min(u64::MAX / 2));
                return false;
            }
        }
        let Some(Reverse((at, _, event))) = self.events.pop() else {
            return false;
        };
        self.now = at;
        let qp = match event {
            Event::Packet(qp, packet, marked) => {
                let (headers, range) = Headers::parse(&packet).expect("packets are well formed");
                self.qps[qp].on_packet(&headers, &packet[range], marked, at);
                qp
            }
            Event::Timeout(qp) => {
                self.timers[qp] = None;
                let due = self.qps[qp].requester.next_timeout();
                if due.is_some_and(|due| due <= at) {
                    self.qps[qp].on_timeout(at);
                }
                qp
            }
            Event::Receives(qp, count, bytes) => {
                self.qps[qp].receives.extend(vec![bytes; count]);
                qp
            }
            Event::Segment(id, seq) => {
                let ack = self.streams[id].on_segment(seq);
                let (from, to) = self.streams[id].hosts;
                self.carry((to, from), ACK_BYTES, |_| Event::Ack(id, ack));
                return true;
            }
            Event::Ack(id, ack) => {
                self.streams[id].on_ack(ack, at);
                self.pump_stream(id);
                return true;
            }
            Event::Rto(id, due) => {
                if self.streams[id].rto_at == Some(due) {
                    self.streams[id].on_timeout(at);
                    self.pump_stream(id);
                }
                return true;
            }
        };
        self.pump(qp);
        true
    }

    /// Runs until nothing is left to happen; panics after so many nanoseconds.
    pub fn run(&mut self, limit: u64) {
        while self.step(limit) {}
        assert!(self.events.is_empty(), "still busy at {} ns", self.now);
    }
}

fn build(headers: &Headers, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; MAX_HEADER_BYTES];
    let len = headers
        .emit(&mut packet)
        .expect("headers are those of the opcode");
    packet.truncate(len);
    packet.extend_from_slice(payload);
    packet.resize(packet.len() + usize::from(headers.bth.pad), 0);
    packet
}
