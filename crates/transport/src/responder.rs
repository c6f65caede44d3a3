//! The receiving half of a connected queue pair: it judges request packets and owes answers.
//!
//! Judging and executing are two steps, for the executor has the memory and the receive requests:
//! [`Responder::on_request`] says what a packet asks for, and [`Responder::finish`] takes what came
//! of it. Only then does the sequence number go on. Requests are executed strictly in order and
//! once each (IBTA volume 1, 9.7.5.1); [`plan`] has the rules of a message's packets, [`replies`]
//! the answers and their replay.

mod plan;
mod replies;

use freeflow_types::Opcode;
use freeflow_wire::{BthOpcode, Headers, NakCode};
use serde::{Deserialize, Serialize};

use crate::connection::{Connection, extend, first, psn};
use crate::selective::{self, Held};
use plan::Current;
use replies::Replies;
pub use replies::{ReadData, Reply};

/// Notifications of congestion go out no oftener, in nanoseconds: a round trip of a data centre
/// (IBTA annex A17.9.4 leaves the rate to the implementation).
const NOTIFICATION_NS: u64 = 50_000;

/// How far behind a packet of an unreliable connection is taken for a late copy rather than for
/// the first after a long loss.
const LATE: u64 = 1 << 16;

/// What a request packet asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Nothing to move: a message of no bytes.
    Nothing,
    /// Place the payload in the receive request.
    Recv {
        /// Bytes of the message before it.
        offset: u32,
        /// Its bytes.
        len: u32,
    },
    /// Write the payload to memory. At offset 0 the rights to the whole message are to be checked.
    Write {
        /// Address of the message.
        va: u64,
        /// Key of the memory.
        rkey: u32,
        /// Bytes of the whole message.
        total: u32,
        /// Bytes of the message before the payload.
        offset: u32,
        /// Bytes of the payload.
        len: u32,
    },
    /// Check the rights to read; the data is asked for later, by [`Responder::next_reply`].
    Read {
        /// Address.
        va: u64,
        /// Key of the memory.
        rkey: u32,
        /// Bytes.
        len: u32,
    },
    /// Run an atomic; [`Responder::finish`] takes what the memory held before.
    Atomic {
        /// Address, a multiple of 8.
        va: u64,
        /// Key of the memory.
        rkey: u32,
        /// Swap this in, or add it.
        swap_add: u64,
        /// If this is there; `None`: fetch and add.
        compare: Option<u64>,
    },
    /// Write the 8 bytes of payload as one.
    AtomicWrite {
        /// Address, a multiple of 8.
        va: u64,
        /// Key of the memory.
        rkey: u32,
    },
    /// Make what was written visible, or persistent.
    Flush {
        /// Address.
        va: u64,
        /// Key of the memory.
        rkey: u32,
        /// Bytes.
        len: u32,
        /// Placement types and level, as on the wire.
        spec: freeflow_types::FlushSpec,
    },
}

/// A message has arrived in full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageEnd {
    /// What it was.
    pub opcode: Opcode,
    /// Its bytes.
    pub len: u32,
    /// Immediate data.
    pub imm: Option<[u8; 4]>,
    /// Key to invalidate.
    pub invalidate: Option<u32>,
    /// It raises a solicited event.
    pub solicited: bool,
}

/// What the executor is to do for a packet, in this order; then [`Responder::finish`] takes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Execution {
    /// What the message is; of a packet that is not the last, without regard to immediate data.
    pub opcode: Opcode,
    /// The first packet of a message: the queue pair must allow the operation.
    pub starts: bool,
    /// Take a receive request first, unless one is taken already.
    pub take_recv: bool,
    /// From this SRQ: of XRC.
    pub xrc_srq: Option<u32>,
    /// Then do this.
    pub action: Action,
    /// Then complete the message.
    pub end: Option<MessageEnd>,
    at: u64,
    packets: u32,
    ack_req: bool,
    next: Option<Current>,
}

/// Why the executor refuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// No receive request is posted.
    NotReady,
    /// The request does not fit the receive request or the queue pair.
    InvalidRequest,
    /// The memory may not be accessed so.
    RemoteAccess,
    /// This side failed to execute it.
    RemoteOperation,
}

/// Why a packet is dropped; the executor counts them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Dropped {
    /// It is no request, or not of this service.
    NotForUs,
    /// Packets before it are missing.
    OutOfSequence,
    /// It was executed before; if that is due, an answer is on its way.
    Duplicate,
    /// The responder has failed.
    Failed,
    /// It does not fit the message of an unreliable connection.
    Malformed,
}

/// What to do with a request packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Execute it, then tell [`Responder::finish`].
    Execute(Execution),
    /// Keep its bytes under this number, if there is room, and tell [`Responder::hold`]; see
    /// [`selective`].
    Hold(u64),
    /// Nothing.
    Drop(Dropped),
    /// The peer violates the protocol: the queue pair goes to its error state, with the event of
    /// an invalid request. A NAK is on its way.
    Invalid,
}

/// The last word that is owed, when all replies before it are out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Owed {
    Nothing,
    Ack,
    SequenceNak,
    NotReady,
    Refusal,
}

/// The responder of a queue pair on the wire.
///
/// Packets go to [`on_request`](Self::on_request); then, best after all that have come together,
/// [`next_reply`](Self::next_reply) says what to send, until `None`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Responder {
    connection: Connection,
    /// The sequence number that is due.
    expected: u64,
    /// Messages completed, 24 bits.
    msn: u32,
    current: Option<Current>,
    replies: Replies,
    owed: Owed,
    /// The gap at `expected` has been reported.
    gap_reported: bool,
    /// `expected` waits for a receive request.
    not_ready: bool,
    failed: Option<Failure>,
    held: Option<Box<Held>>,
    /// The peer is to be told of congestion; and when it may be told again.
    congested: bool,
    notify_at: u64,
}

/// A request that was refused for good.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Failure {
    InvalidRequest,
    RemoteAccess,
    RemoteOperation,
}

impl Failure {
    fn code(self) -> NakCode {
        match self {
            Failure::InvalidRequest => NakCode::InvalidRequest,
            Failure::RemoteAccess => NakCode::RemoteAccess,
            Failure::RemoteOperation => NakCode::RemoteOperation,
        }
    }
}

impl Responder {
    /// A responder that waits for the first packet.
    pub fn new(connection: &Connection) -> Self {
        Responder {
            connection: *connection,
            expected: first(connection.rq_psn),
            msn: 0,
            current: None,
            replies: Replies::default(),
            owed: Owed::Nothing,
            gap_reported: false,
            not_ready: false,
            failed: None,
            held: None,
            congested: false,
            notify_at: 0,
        }
    }

    /// Takes over what may change while the queue pair lives: the RNR timer and resources.
    pub fn reconfigure(&mut self, connection: &Connection) {
        self.connection.min_rnr_timer = connection.min_rnr_timer;
        self.connection.max_dest_rd_atomic = connection.max_dest_rd_atomic;
    }

    /// The sequence number expected next.
    pub fn next_psn(&self) -> u32 {
        psn(self.expected).get()
    }

    /// Whether it has refused a request for good.
    pub fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// A request packet has come with the mark of a congested network (RFC 3168, CE): the peer is
    /// told by a notification packet, not too often.
    pub fn on_mark(&mut self, now: u64) {
        if now >= self.notify_at {
            self.notify_at = now.saturating_add(NOTIFICATION_NS);
            self.congested = true;
        }
    }

    /// Judges a request packet with so many bytes of payload.
    pub fn on_request(&mut self, headers: &Headers, payload: usize) -> Verdict {
        let opcode = headers.bth.opcode;
        if !opcode.is_request() || opcode.service() != self.connection.service() {
            return Verdict::Drop(Dropped::NotForUs);
        }
        let at = extend(self.expected, headers.bth.psn);
        if !self.connection.qp_type.is_reliable() {
            return self.on_unreliable(headers, payload, at);
        }
        if self.failed.is_some() {
            // The refusal may have been lost.
            if at >= self.expected {
                self.owed = Owed::Refusal;
            }
            return Verdict::Drop(Dropped::Failed);
        }
        if at > self.expected {
            return self.on_early(at);
        }
        if at < self.expected {
            self.on_duplicate(headers, at);
            return Verdict::Drop(Dropped::Duplicate);
        }
        if let Some(held) = &mut self.held {
            held.remove(at);
        }
        let plan = plan::plan(&self.connection, self.current, headers, payload, at);
        let room = plan.is_some_and(|p| !self.takes_resources(&p) || self.has_resources());
        match plan {
            Some(execution) if room => Verdict::Execute(execution),
            _ => {
                self.fail(Failure::InvalidRequest);
                Verdict::Invalid
            }
        }
    }

    fn takes_resources(&self, execution: &Execution) -> bool {
        execution.opcode.takes_responder_resources() || execution.opcode == Opcode::Flush
    }

    /// Whether one more request may be answered: the peer has at most as many outstanding as were
    /// granted (IBTA volume 1, 9.4.4).
    fn has_resources(&self) -> bool {
        self.replies.unanswered() < u32::from(self.connection.max_dest_rd_atomic).max(1)
    }

    /// A packet is ahead of what is due.
    fn on_early(&mut self, at: u64) -> Verdict {
        if selective::applies(&self.connection) && at <= self.expected + selective::WINDOW {
            if let Some(held) = self.held.as_mut().filter(|h| h.has(at)) {
                held.insert(at);
                return Verdict::Drop(Dropped::Duplicate);
            }
            return Verdict::Hold(at);
        }
        // One NAK per gap, and none while the peer waits anyway (IBTA volume 1, 9.7.5.1.3), or
        // knows of the gap by what is held behind it.
        let known = self.held.as_ref().is_some_and(|h| !h.is_empty());
        if !self.gap_reported && !self.not_ready && !known {
            self.gap_reported = true;
            self.owed = Owed::SequenceNak;
        }
        Verdict::Drop(Dropped::OutOfSequence)
    }

    /// The executor keeps the packet of a [`Verdict::Hold`] until [`next_held`](Self::next_held)
    /// asks for it, whatever happens but the end of the connection.
    pub fn hold(&mut self, number: u64) {
        let ahead = number.saturating_sub(self.expected);
        if ahead != 0 && ahead <= selective::WINDOW {
            self.held.get_or_insert_default().insert(number);
        }
    }

    /// A packet that is held and now due: it is to be given to [`on_request`](Self::on_request).
    /// The executor may forget what it keeps under lower numbers.
    pub fn next_held(&self) -> Option<u64> {
        let held = self.held.as_ref()?;
        (self.failed.is_none() && held.has(self.expected)).then_some(self.expected)
    }

    /// What came of an execution: for an atomic, what the memory held before; else 0.
    pub fn finish(&mut self, execution: &Execution, outcome: Result<u64, Refusal>) {
        if execution.at != self.expected || self.failed.is_some() {
            return;
        }
        let reliable = self.connection.qp_type.is_reliable();
        let refused = match outcome {
            Ok(value) => {
                self.accept(execution, value);
                return;
            }
            Err(refused) => refused,
        };
        match refused {
            _ if !reliable => {
                self.current = None;
                self.expected += 1;
            }
            Refusal::NotReady => {
                self.not_ready = true;
                self.owed = Owed::NotReady;
            }
            Refusal::InvalidRequest => self.fail(Failure::InvalidRequest),
            Refusal::RemoteAccess => self.fail(Failure::RemoteAccess),
            Refusal::RemoteOperation => self.fail(Failure::RemoteOperation),
        }
    }

    fn accept(&mut self, execution: &Execution, value: u64) {
        self.expected += u64::from(execution.packets);
        self.current = execution.next;
        self.not_ready = false;
        self.gap_reported = false;
        if execution.end.is_some() {
            self.msn = (self.msn + 1) & 0xFF_FFFF;
        }
        if !self.connection.qp_type.is_reliable() {
            return;
        }
        if self.takes_resources(execution) {
            let keep = self.connection.max_dest_rd_atomic.max(1);
            self.replies.begin(execution, value, keep);
            // The answer acknowledges what was before it.
            self.owed = Owed::Nothing;
        } else if execution.ack_req || self.owed != Owed::Nothing {
            self.owed = Owed::Ack;
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.failed = Some(failure);
        self.owed = Owed::Refusal;
        self.current = None;
    }

    /// The data of the last reply could not be read: its rights were withdrawn meanwhile, or its
    /// memory failed. The queue pair goes to its error state.
    pub fn read_failed(&mut self, reply: &Reply) {
        // What was executed after the READ is not answered any more.
        self.expected = extend(self.expected, reply.headers.bth.psn);
        self.replies.clear();
        self.fail(Failure::RemoteAccess);
    }

    /// A request that was executed before: it is answered again (IBTA volume 1, 9.7.5.1.4 and
    /// 9.7.5.1.5).
    fn on_duplicate(&mut self, headers: &Headers, at: u64) {
        let op = BthOpcode(headers.bth.opcode.op());
        let data = op.is_send() || (op.is_write() && op != BthOpcode::RC_ATOMIC_WRITE);
        if !data {
            self.replies.replay(&self.connection, headers, at);
        } else if self.owed == Owed::Nothing {
            self.owed = Owed::Ack;
        }
    }

    /// Unreliable: a gap drops the message, up to the next beginning of one (IBTA volume 1,
    /// 9.8.2.2).
    fn on_unreliable(&mut self, headers: &Headers, payload: usize, at: u64) -> Verdict {
        if at < self.expected && self.expected - at < LATE {
            return Verdict::Drop(Dropped::Duplicate);
        }
        let gap = at != self.expected;
        if gap || headers.bth.opcode.starts_message() {
            self.current = None;
        }
        self.expected = at;
        if let Some(e) = plan::plan(&self.connection, self.current, headers, payload, at) {
            return Verdict::Execute(e);
        }
        self.current = None;
        self.expected = at + 1;
        Verdict::Drop(if gap {
            Dropped::OutOfSequence
        } else {
            Dropped::Malformed
        })
    }

    /// The next packet to answer with.
    pub fn next_reply(&mut self) -> Option<Reply> {
        if std::mem::take(&mut self.congested) {
            return Some(replies::notification(&self.connection));
        }
        if let Some(reply) = self.replies.next(&self.connection, self.msn) {
            return Some(reply);
        }
        let owed = std::mem::replace(&mut self.owed, Owed::Nothing);
        if let Some(reply) = self.last_word(owed) {
            return Some(reply);
        }
        let held = self.held.as_mut().filter(|h| h.has_news())?;
        let headers = held.report(&self.connection, self.expected)?;
        Some(Reply {
            headers,
            data: None,
        })
    }

    fn last_word(&self, owed: Owed) -> Option<Reply> {
        use freeflow_wire::Syndrome;
        let due = psn(self.expected);
        let done = psn(self.expected.saturating_sub(1));
        let (at, syndrome) = match owed {
            Owed::Nothing => return None,
            Owed::Ack => (done, Syndrome::ACK),
            Owed::SequenceNak => (due, Syndrome::Nak(NakCode::PsnSequence)),
            Owed::NotReady => {
                let timer = self.connection.min_rnr_timer & 0x1F;
                (due, Syndrome::RnrNak { timer })
            }
            Owed::Refusal => (due, Syndrome::Nak(self.failed?.code())),
        };
        Some(replies::acknowledge(
            &self.connection,
            at,
            syndrome,
            self.msn,
        ))
    }
}
