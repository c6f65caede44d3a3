//! The sending half of a connected queue pair: it turns work into request packets.
//!
//! Every message takes sequence numbers when it is posted, one per packet; a READ takes those of
//! its response. A long READ is asked for in pieces that a standard responder takes for READs of
//! their own, so that the congestion window governs both directions and a lost response costs one
//! piece at most. Which sequence numbers are under way, lost or answered is kept apart
//! ([`flight`]); what answers do to it is in [`answers`].

mod answers;
mod flight;

use std::collections::VecDeque;

use freeflow_types::{FlushSpec, MAX_MESSAGE, Opcode, QpType, WcStatus};
use freeflow_wire::{AtomicEth, Bth, BthOpcode, Headers, Reth};
use serde::{Deserialize, Serialize};

use crate::congestion::Window;
use crate::connection::{Connection, first, psn};
use crate::selective;
use flight::{Fate, Flight};

/// Packets of response that one READ request asks for, at least and at most, if it is a piece of a
/// long READ: between them, as many as fill the window if all that were granted are, or
/// [`READ_PIECES`].
const READ_PIECE: (u32, u32) = (2, 64);

/// Pieces of READs that are worth having under way at once: responses cost less the more of them
/// follow one another.
const READ_PIECES: u32 = 6;

/// What the window counts for headers, below it and of its own.
const HEADER_BYTES: u32 = 80;

/// Sequence numbers in use at once: well below 2^23, the most that 24 bits allow.
const MAX_FLIGHT: u32 = 8192;

/// Packets, at most, from one that asks for an acknowledgement to the next: of a standard
/// responder, and of a router, which loses nothing that has come and answers trains of packets.
const ACK_EVERY: u32 = 16;
const ROUTER_ACK_EVERY: u32 = 64;

/// Work requests that an idle queue pair keeps room for.
const IDLE_CAPACITY: usize = 4;

/// A send work request, as the wire needs to know it. It is not of a local operation
/// ([`Opcode::is_local`]): the executor runs these itself when the requester
/// [is idle](Requester::is_idle).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Work {
    /// What to do.
    pub opcode: Opcode,
    /// Bytes of the message; 8 for atomics, 0 for a flush.
    pub len: u32,
    /// Remote address.
    pub va: u64,
    /// Remote key.
    pub rkey: u32,
    /// What to swap in or add; of a FLUSH, [`FlushSpec::raw`].
    pub swap_add: u64,
    /// What to compare with.
    pub compare: u64,
    /// Bytes of the remote range that a FLUSH is about.
    pub flush_len: u32,
    /// Immediate data.
    pub imm: [u8; 4],
    /// Key that the receiver is to invalidate.
    pub invalidate: u32,
    /// Raise a solicited event.
    pub solicited: bool,
    /// Wait for earlier READs and atomics.
    pub fence: bool,
    /// SRQ at the receiver: of XRC.
    pub xrc_srq: u32,
    /// Whatever the executor likes to find again.
    pub id: u64,
}

impl Work {
    /// A request without remote memory, operands and flags.
    pub fn new(opcode: Opcode, len: u32) -> Self {
        Work {
            opcode,
            len,
            va: 0,
            rkey: 0,
            swap_add: 0,
            compare: 0,
            flush_len: 0,
            imm: [0; 4],
            invalidate: 0,
            solicited: false,
            fence: false,
            xrc_srq: 0,
            id: 0,
        }
    }
}

/// A message: its number in the order of posting, from 0, and the [`Work::id`] of its request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    /// Number.
    pub seq: u64,
    /// The executor's.
    pub id: u64,
}

/// A part of a message's data in local memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Which message.
    pub message: Message,
    /// From its beginning.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
}

/// A request packet to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transmit {
    /// Its headers, pad included.
    pub headers: Headers,
    /// The payload that follows them.
    pub payload: Option<Part>,
}

/// What the executor learns from the requester.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequesterEvent {
    /// The payload of the response just given is this part of a message: place it. It comes before
    /// the completion that it may cause. If it cannot be placed, the executor calls
    /// [`Requester::abort`].
    Place(Part),
    /// An atomic's result: 8 bytes to place.
    Atomic {
        /// Of which message.
        message: Message,
        /// What the memory held before.
        value: u64,
    },
    /// The message is done; completions come in the order of posting.
    Complete(Message),
    /// The message failed, and the requester is dead: the executor completes it with this status,
    /// flushes what follows, and moves the queue pair to its error state.
    Failed(Message, WcStatus),
}

/// Why work is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WorkError {
    /// Local operations are the executor's own; and each service has its operations.
    #[error("operation {0:?} is not sent on {1:?}")]
    Opcode(Opcode, QpType),
    /// A message is of at most 2^31 bytes, a datagram of one packet.
    #[error("{len} bytes, at most {longest}")]
    Length {
        /// Bytes of the message.
        len: u32,
        /// How many it may have.
        longest: u64,
    },
    /// There are no such placement types or level.
    #[error("flush {0:#x} is not one")]
    Flush(u64),
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Slot {
    work: Work,
    seq: u64,
    /// Its first sequence number, and how many it has.
    first: u64,
    packets: u32,
    /// Packets of response that each request on the wire asks for: of a READ.
    piece: u32,
    /// Why it cannot go on.
    aborted: Option<WcStatus>,
}

impl Slot {
    fn end(&self) -> u64 {
        self.first + u64::from(self.packets)
    }

    /// Whether an acknowledgement alone does not complete it.
    fn is_answered(&self) -> bool {
        self.work.opcode.takes_responder_resources() || self.work.opcode == Opcode::Flush
    }

    /// Packets from `psn` to the end of the unit of which the responder keeps track: the whole
    /// message, or a piece of a READ.
    fn rest_of_unit(&self, psn: u64) -> u32 {
        let at = psn.saturating_sub(self.first) as u32;
        self.packets
            .saturating_sub(at)
            .min(self.piece - at % self.piece)
    }

    fn message(&self) -> Message {
        Message {
            seq: self.seq,
            id: self.work.id,
        }
    }
}

/// A packet, and when it was first sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Sample {
    psn: u64,
    sent: u64,
    /// It was sent again: which copy is answered will not be known.
    copied: bool,
}

/// The requester of a queue pair on the wire.
///
/// [`post`](Self::post) takes work; [`next_packet`](Self::next_packet) says what to send, until
/// `None`; answers go to [`on_response`](Self::on_response); at
/// [`next_timeout`](Self::next_timeout) the executor calls [`on_timeout`](Self::on_timeout). After
/// each of these two there may be packets to send. The executor should give all packets that have
/// arrived before it tells of a timeout that is due.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Requester {
    connection: Connection,
    slots: VecDeque<Slot>,
    next_seq: u64,
    /// The message that a packet was sent of last.
    sending: u64,
    /// One above the last sequence number that a posted message has.
    posted: u64,
    flight: Flight,
    window: Window,
    /// Of READ pieces, atomics and the like that were sent and are not answered.
    answers_due: u32,
    /// A loss below this is of an episode that the window knows of already.
    recovery_end: u64,
    /// The oldest when the requester last went back to it because answers were missing.
    back_at: Option<u64>,
    /// The packet whose loss the peer reported last, and when.
    reported: Option<(u64, u64)>,
    /// Packets and bytes since the last that asked for an acknowledgement.
    unasked: u32,
    unasked_bytes: u64,
    /// What a round trip is measured by.
    sample: Option<Sample>,
    /// The window, not lack of work, stopped the sender since the last answer.
    limited: bool,
    timeouts: u8,
    rnr_naks: u8,
    /// Probes since the last answer.
    probes: u8,
    /// When the peer will be ready, when an answer is missed, and when it is overdue.
    ready_at: Option<u64>,
    probe_at: Option<u64>,
    overdue_at: Option<u64>,
    dead: bool,
}

impl Requester {
    /// An idle requester.
    pub fn new(connection: &Connection) -> Self {
        let first = first(connection.sq_psn);
        Requester {
            connection: *connection,
            slots: VecDeque::new(),
            next_seq: 0,
            sending: 0,
            posted: first,
            flight: Flight::new(first),
            window: Window::default(),
            answers_due: 0,
            recovery_end: first,
            back_at: None,
            reported: None,
            unasked: 0,
            unasked_bytes: 0,
            sample: None,
            limited: false,
            timeouts: 0,
            rnr_naks: 0,
            probes: 0,
            ready_at: None,
            probe_at: None,
            overdue_at: None,
            dead: false,
        }
    }

    /// Takes over parameters that may change while the queue pair lives: timeouts, retries and
    /// resources.
    pub fn reconfigure(&mut self, connection: &Connection) {
        self.connection = Connection {
            dest_qp: self.connection.dest_qp,
            segment: self.connection.segment,
            sq_psn: self.connection.sq_psn,
            rq_psn: self.connection.rq_psn,
            qp_type: self.connection.qp_type,
            selective: self.connection.selective,
            ..*connection
        };
    }

    /// Takes a request; it gets the next message number.
    pub fn post(&mut self, work: Work) -> Result<Message, WorkError> {
        let Work { opcode, len, .. } = work;
        let on_wire = opcode_of(opcode, true, true).with_service(self.connection.service());
        let sent = on_wire.is_known() && opcode.allowed_on(self.connection.qp_type);
        if opcode.is_local() || !sent {
            return Err(WorkError::Opcode(opcode, self.connection.qp_type));
        }
        if u64::from(len) > MAX_MESSAGE {
            return Err(WorkError::Length {
                len,
                longest: MAX_MESSAGE,
            });
        }
        if opcode == Opcode::Flush && FlushSpec::from_raw(work.swap_add).is_none() {
            return Err(WorkError::Flush(work.swap_add));
        }
        // Without a grant such a request could never be sent.
        let granted = !opcode.takes_responder_resources() || self.connection.max_rd_atomic != 0;
        let one = opcode.is_word() || opcode == Opcode::Flush;
        let packets = if one { 1 } else { self.connection.packets(len) };
        let slot = Slot {
            work,
            seq: self.next_seq,
            first: self.posted,
            packets,
            piece: if opcode == Opcode::RdmaRead {
                self.read_piece()
            } else {
                packets
            },
            aborted: (!granted).then_some(WcStatus::LocQpOpErr),
        };
        let message = slot.message();
        self.next_seq += 1;
        self.posted = slot.end();
        self.slots.push_back(slot);
        Ok(message)
    }

    /// Messages posted and not complete.
    pub fn outstanding(&self) -> usize {
        self.slots.len()
    }

    /// Whether all that was posted is complete.
    pub fn is_idle(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether it has failed.
    pub fn is_dead(&self) -> bool {
        self.dead
    }

    /// The sequence number of the next message posted.
    pub fn next_psn(&self) -> u32 {
        psn(self.posted).get()
    }

    /// Smoothed round-trip time in nanoseconds, once there is one.
    pub fn round_trip(&self) -> Option<u64> {
        Some(self.window.srtt()).filter(|&t| t != 0)
    }

    /// Bytes that may be under way, headers included.
    pub fn window(&self) -> u64 {
        let full = self.connection.segment() + HEADER_BYTES;
        (self.window.packets() * f64::from(full)) as u64
    }

    fn read_piece(&self) -> u32 {
        let granted = u32::from(self.connection.max_rd_atomic);
        let (least, most) = READ_PIECE;
        (self.window.packets() as u32 / granted.clamp(1, READ_PIECES)).clamp(least, most)
    }

    fn slot_at(&self, psn: u64) -> Option<&Slot> {
        let has = |slot: &&Slot| slot.first <= psn && psn < slot.end();
        let oldest = self.slots.front()?;
        // Most often it is the oldest message, or the one whose packets are sent now.
        let sending = self.sending.checked_sub(oldest.seq);
        let sending = sending.and_then(|index| self.slots.get(index as usize));
        let likely = [Some(oldest), sending];
        likely.into_iter().flatten().find(has).or_else(|| {
            let after = self.slots.partition_point(|s| s.first <= psn);
            self.slots.get(after.checked_sub(1)?).filter(has)
        })
    }

    /// The next packet to send now, if there is one.
    ///
    /// An unreliable message completes as its last packet is handed out, before its data is read:
    /// if that fails, the executor fails the message instead of completing it. Events are appended
    /// to `events`.
    pub fn next_packet(&mut self, now: u64, events: &mut Vec<RequesterEvent>) -> Option<Transmit> {
        self.settle(events);
        if self.dead {
            return None;
        }
        if let Some(at) = self.ready_at {
            if now < at {
                return None;
            }
            self.retry_ready(now);
        }
        let lost = self.flight.next_lost();
        let psn = lost.unwrap_or(self.flight.end());
        let Some(slot) = self.slot_at(psn).cloned() else {
            self.limited = false;
            return None;
        };
        if slot.aborted.is_some() {
            return None;
        }
        self.sending = slot.seq;
        if !self.connection.qp_type.is_reliable() {
            return Some(self.send_unreliable(psn, &slot, events));
        }
        let unit = slot.rest_of_unit(psn);
        let count = match (slot.work.opcode, lost) {
            (Opcode::RdmaRead, None) => unit,
            // All that has no answer: the responder, which may not have seen the request, must not
            // take parts of it for requests of their own.
            (Opcode::RdmaRead, Some(_)) => self.flight.unanswered_run(psn, unit),
            _ => 1,
        };
        if lost.is_none() && !self.may_begin(psn, &slot, count) || !self.is_held(psn, &slot) {
            return None;
        }
        if self.flight.is_empty() {
            self.window.on_start(now);
        }
        let numbers = psn..psn + u64::from(count);
        // What is under way counts already.
        let size: u64 = numbers
            .clone()
            .filter(|&n| self.flight.fate(n) != Some(Fate::Sent))
            .map(|n| u64::from(self.size(&slot, n)))
            .sum();
        let (under_way, room) = (self.flight.under_way(), self.window());
        if under_way != 0 && under_way + size > room {
            self.limited = true;
            return None;
        }
        if let Some(sample) = &mut self.sample
            && numbers.contains(&sample.psn)
        {
            sample.copied = true;
            // That what is known to be lost takes longer says nothing.
            self.sample = self.sample.filter(|_| self.probes != 0);
        }
        for number in numbers {
            let size = self.size(&slot, number);
            let request = self.request_size(&slot, number);
            self.flight.send(number, size, request);
        }
        if lost.is_none() && slot.is_answered() {
            self.answers_due += 1;
        }
        let last = psn + u64::from(count) == self.posted;
        let full = self.flight.under_way() >= room;
        self.limited |= full;
        self.unasked += 1;
        self.unasked_bytes += size;
        let ack_every = match self.connection.selective {
            true => ROUTER_ACK_EVERY,
            false => ACK_EVERY,
        };
        let often = self.unasked >= ack_every || self.unasked_bytes >= room / self.window.acks();
        let ask = last || full || often || lost.is_some() || slot.is_answered();
        if ask {
            (self.unasked, self.unasked_bytes) = (0, 0);
            if lost.is_none() && self.sample.is_none() {
                self.sample = Some(Sample {
                    psn,
                    sent: now,
                    copied: false,
                });
            }
        }
        self.start_timers(now);
        Some(self.packet(psn, &slot, count, ask))
    }

    /// Whether packets of a message that were never sent may be.
    fn may_begin(&self, psn: u64, slot: &Slot, count: u32) -> bool {
        let fenced = slot.work.fence && psn == slot.first && self.answers_due != 0;
        let granted = u32::from(self.connection.max_rd_atomic).max(1);
        let resources = slot.is_answered() && self.answers_due >= granted;
        !fenced && !resources && self.flight.len() + count <= MAX_FLIGHT
    }

    /// Whether a peer that holds what comes early has room for a packet, if it does not come early
    /// enough: nothing is further from the oldest than what it holds, while there is a gap.
    fn is_held(&self, psn: u64, slot: &Slot) -> bool {
        let oldest = self.flight.oldest();
        let bytes = self.flight.requests_before(psn) + self.request_size(slot, psn);
        !self.connection.selective
            || !self.flight.has_gap()
            || psn == oldest
            || psn - oldest <= selective::WINDOW && bytes <= selective::HELD_BYTES
    }

    /// The peer misses the oldest, and what it could not hold meanwhile is lost with it.
    fn lose_unheld(&mut self) {
        let oldest = self.flight.oldest();
        let (mut held, mut beyond) = (oldest + 1, self.flight.end());
        beyond = beyond.min(oldest + selective::WINDOW + 1);
        // The first that, with those before it, is more than what is held.
        while held < beyond {
            let middle = held + (beyond - held) / 2;
            match self.flight.requests_before(middle + 1) <= selective::HELD_BYTES {
                true => held = middle + 1,
                false => beyond = middle,
            }
        }
        self.flight.lose_from(held);
    }

    /// Bytes of the request that a sequence number is of, headers included.
    fn request_size(&self, slot: &Slot, psn: u64) -> u32 {
        match slot.work.opcode {
            Opcode::RdmaRead => 0,
            _ => self.size(slot, psn),
        }
    }

    /// Bytes that a sequence number of a message costs the network.
    fn size(&self, slot: &Slot, psn: u64) -> u32 {
        let segment = self.connection.segment();
        let offset = (psn.saturating_sub(slot.first) as u32).saturating_mul(segment);
        slot.work.len.saturating_sub(offset).min(segment) + HEADER_BYTES
    }

    fn send_unreliable(
        &mut self,
        psn: u64,
        slot: &Slot,
        events: &mut Vec<RequesterEvent>,
    ) -> Transmit {
        let transmit = self.packet(psn, slot, 1, false);
        self.flight.send(psn, 0, 0);
        self.flight.pop();
        if psn + 1 == slot.end() {
            self.complete_front(events);
        }
        transmit
    }

    /// Builds the packet of a message with this sequence number, or the READ request for the
    /// `count` responses from it.
    fn packet(&self, at: u64, slot: &Slot, count: u32, ask: bool) -> Transmit {
        let (work, segment) = (&slot.work, self.connection.segment());
        let index = at.saturating_sub(slot.first) as u32;
        let offset = index.saturating_mul(segment);
        let left = work.len.saturating_sub(offset);
        let (starts, ends) = (index == 0, index + 1 == slot.packets);
        let service = self.connection.service();
        let opcode = opcode_of(work.opcode, starts, ends).with_service(service);
        let mut h = Headers::new(Bth::new(opcode, self.connection.dest_qp, psn(at)));
        h.bth.ack_req = ask;
        h.bth.solicited = work.solicited && ends && work.opcode.consumes_recv();
        h.xrc_srq = opcode.has_xrc_srq().then_some(work.xrc_srq);
        h.imm = opcode.has_imm().then_some(work.imm);
        h.ieth = opcode.has_ieth().then_some(work.invalidate);
        let mut data = left.min(segment);
        let mut reth = Reth {
            va: work.va,
            rkey: work.rkey,
            len: work.len,
        };
        match work.opcode {
            Opcode::RdmaRead => {
                reth.va = work.va.wrapping_add(offset.into());
                reth.len = left.min(count.saturating_mul(segment));
                data = 0;
            }
            Opcode::CompareSwap | Opcode::FetchAdd => {
                h.atomic = Some(AtomicEth {
                    va: work.va,
                    rkey: work.rkey,
                    swap_add: work.swap_add,
                    compare: work.compare,
                });
                data = 0;
            }
            Opcode::Flush => {
                reth.len = work.flush_len;
                h.feth = FlushSpec::from_raw(work.swap_add).map(Into::into);
                data = 0;
            }
            _ => {}
        }
        h.reth = opcode.has_reth().then_some(reth);
        let payload = (data != 0).then_some(Part {
            message: slot.message(),
            offset,
            len: data,
        });
        Transmit {
            headers: h.with_payload(data as usize),
            payload,
        }
    }

    fn start_timers(&mut self, now: u64) {
        if self.probe_at.is_none() {
            let selective = self.connection.selective;
            let wait = self.window.probe_ns(self.probes, selective);
            self.probe_at = Some(now.saturating_add(wait));
        }
        if self.overdue_at.is_none() {
            let timeout = self.connection.timeout_ns();
            self.overdue_at = timeout.map(|t| now.saturating_add(t));
        }
    }

    /// When [`on_timeout`](Self::on_timeout) is due, in the nanoseconds of `now`.
    pub fn next_timeout(&self) -> Option<u64> {
        if self.dead {
            return None;
        }
        if self.ready_at.is_some() {
            return self.ready_at;
        }
        match (self.probe_at, self.overdue_at) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// The time has come. There may be packets to send, or the oldest message has failed.
    pub fn on_timeout(&mut self, now: u64, events: &mut Vec<RequesterEvent>) {
        if self.dead {
            return;
        }
        if let Some(at) = self.ready_at {
            if now >= at {
                self.retry_ready(now);
            }
            return;
        }
        if self.overdue_at.is_some_and(|at| now >= at) {
            if self.timeouts >= self.connection.retry_cnt {
                self.fail(WcStatus::RetryExcErr, events);
                return;
            }
            self.timeouts += 1;
            self.overdue_at = None;
            self.window.on_timeout();
            self.again(now);
        } else if self.probe_at.is_some_and(|at| now >= at) {
            self.probes = self.probes.saturating_add(1);
            if self.probes > 1 {
                self.window.on_timeout();
            } else if self.connection.selective {
                // The answer to one packet will tell of the others (RFC 8985, 7).
                self.probe_at = None;
                self.flight.lose(self.flight.oldest());
                return self.start_timers(now);
            } else {
                self.on_congestion();
            }
            self.again(now);
        }
    }

    /// The peer has had the time it asked for.
    fn retry_ready(&mut self, now: u64) {
        self.ready_at = None;
        if !self.flight.is_empty() {
            self.start_timers(now);
        }
    }

    /// Begins anew from the oldest unanswered.
    fn again(&mut self, now: u64) {
        self.flight.lose_all();
        self.recovery_end = self.flight.end();
        self.reported = None;
        self.back_at = None;
        self.probe_at = None;
        self.start_timers(now);
    }

    /// The network is congested: an answer has come with its mark (RFC 3168, CE), a notification
    /// packet says so, or something is lost. The window learns of it once per episode.
    pub fn on_congestion(&mut self) {
        if !self.flight.is_empty() && self.flight.oldest() >= self.recovery_end {
            self.recovery_end = self.flight.end();
            self.window.on_loss();
        }
    }

    /// A message cannot go on, for a reason on this side: it fails with this status when those
    /// before it are complete. False if it is complete already: then the executor has its
    /// completion, and fails it and the queue pair itself.
    pub fn abort(&mut self, seq: u64, status: WcStatus, events: &mut Vec<RequesterEvent>) -> bool {
        let index = self.slots.front().and_then(|s| seq.checked_sub(s.seq));
        let index = index.and_then(|i| usize::try_from(i).ok());
        let Some(slot) = index.and_then(|i| self.slots.get_mut(i)) else {
            return false;
        };
        slot.aborted.get_or_insert(status);
        self.settle(events);
        true
    }

    /// Fails the oldest message if it cannot go on.
    fn settle(&mut self, events: &mut Vec<RequesterEvent>) {
        if let Some(status) = self.slots.front().and_then(|s| s.aborted) {
            self.fail(status, events);
        }
    }

    fn fail(&mut self, status: WcStatus, events: &mut Vec<RequesterEvent>) {
        if self.dead {
            return;
        }
        self.dead = true;
        if let Some(slot) = self.slots.pop_front() {
            events.push(RequesterEvent::Failed(slot.message(), status));
        }
    }

    fn complete_front(&mut self, events: &mut Vec<RequesterEvent>) {
        self.settle(events);
        if self.dead {
            return;
        }
        if let Some(slot) = self.slots.pop_front() {
            events.push(RequesterEvent::Complete(slot.message()));
        }
        if self.slots.is_empty() {
            self.slots.shrink_to(IDLE_CAPACITY);
        }
    }
}

/// The opcode, as the reliable connection has it, of a packet of a message.
fn opcode_of(opcode: Opcode, starts: bool, ends: bool) -> BthOpcode {
    use BthOpcode as B;
    let parts = match opcode {
        Opcode::Send => [
            B::RC_SEND_FIRST,
            B::RC_SEND_MIDDLE,
            B::RC_SEND_LAST,
            B::RC_SEND_ONLY,
        ],
        Opcode::SendImm => [
            B::RC_SEND_FIRST,
            B::RC_SEND_MIDDLE,
            B::RC_SEND_LAST_IMM,
            B::RC_SEND_ONLY_IMM,
        ],
        Opcode::SendInv => [
            B::RC_SEND_FIRST,
            B::RC_SEND_MIDDLE,
            B::RC_SEND_LAST_INV,
            B::RC_SEND_ONLY_INV,
        ],
        Opcode::RdmaWrite => [
            B::RC_WRITE_FIRST,
            B::RC_WRITE_MIDDLE,
            B::RC_WRITE_LAST,
            B::RC_WRITE_ONLY,
        ],
        Opcode::RdmaWriteImm => [
            B::RC_WRITE_FIRST,
            B::RC_WRITE_MIDDLE,
            B::RC_WRITE_LAST_IMM,
            B::RC_WRITE_ONLY_IMM,
        ],
        Opcode::CompareSwap => [B::RC_COMPARE_SWAP; 4],
        Opcode::FetchAdd => [B::RC_FETCH_ADD; 4],
        Opcode::AtomicWrite => [B::RC_ATOMIC_WRITE; 4],
        Opcode::Flush => [B::RC_FLUSH; 4],
        // Local operations are refused when they are posted.
        Opcode::RdmaRead | Opcode::LocalInv | Opcode::BindMw => [B::RC_READ_REQUEST; 4],
    };
    let [first, middle, last, only] = parts;
    match (starts, ends) {
        (true, false) => first,
        (false, false) => middle,
        (false, true) => last,
        (true, true) => only,
    }
}
