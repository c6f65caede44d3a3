//! A queue pair with the simplest executor: memory in a vector, receives in a queue.

use std::collections::{BTreeMap, VecDeque};

use freeflow_transport::{
    Action, Connection, Execution, MessageEnd, Refusal, Reply, Requester, RequesterEvent,
    Responder, Verdict, Work, selective,
};
use freeflow_types::WcStatus;
use freeflow_wire::Headers;

/// Address of a queue pair's memory as its peer knows it.
pub const BASE: u64 = 0x10_0000;
/// Its key.
pub const KEY: u32 = 0x4242;

/// A completion of a send request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// Number of the message.
    pub seq: u64,
    /// What became of it.
    pub status: WcStatus,
    /// When, in nanoseconds.
    pub at: u64,
}

/// A message that consumed a receive request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received {
    /// What the transport says of it.
    pub end: MessageEnd,
    /// The data of a SEND.
    pub data: Vec<u8>,
    /// The SRQ that it named: of XRC.
    pub srq: Option<u32>,
}

/// A queue pair of a simulated host.
#[derive(Debug)]
pub struct Qp {
    /// Sends.
    pub requester: Requester,
    /// Receives.
    pub responder: Responder,
    /// What the peer may read, write and change, at [`BASE`] with [`KEY`].
    pub memory: Vec<u8>,
    /// Receive requests: the size of each buffer.
    pub receives: VecDeque<usize>,
    /// What has come.
    pub received: Vec<Received>,
    /// Completions of send requests.
    pub completions: Vec<Completion>,
    /// Data of send requests: sent, or read.
    pub buffers: BTreeMap<u64, Vec<u8>>,
    /// Payload bytes placed or executed, as the goodput counts them.
    pub delivered: u64,
    /// Packets that may be held for the responder.
    pub hold_limit: usize,
    /// Request packets sent.
    pub requests: u64,
    taken: Option<Vec<u8>>,
    held: BTreeMap<u64, (Headers, Vec<u8>)>,
    events: Vec<RequesterEvent>,
}

impl Qp {
    /// A queue pair with so much memory of zeroes.
    pub fn new(connection: &Connection, memory: usize) -> Self {
        Qp {
            requester: Requester::new(connection),
            responder: Responder::new(connection),
            memory: vec![0; memory],
            receives: VecDeque::new(),
            received: Vec::new(),
            completions: Vec::new(),
            buffers: BTreeMap::new(),
            delivered: 0,
            hold_limit: selective::WINDOW as usize,
            requests: 0,
            taken: None,
            held: BTreeMap::new(),
            events: Vec::new(),
        }
    }

    /// Posts work with the data it sends, or room for what it reads.
    pub fn post(&mut self, work: Work, data: Vec<u8>) -> u64 {
        let message = self.requester.post(work).expect("the work is legal");
        self.buffers.insert(message.seq, data);
        message.seq
    }

    /// A packet has arrived.
    pub(crate) fn on_packet(&mut self, headers: &Headers, payload: &[u8], marked: bool, now: u64) {
        if !headers.bth.opcode.is_request() {
            if marked {
                self.requester.on_congestion();
            }
            self.requester
                .on_response(headers, payload.len(), now, &mut self.events);
            self.take_events(payload, now);
            return;
        }
        if marked {
            self.responder.on_mark(now);
        }
        self.on_request(headers, payload);
        while let Some(number) = self.responder.next_held() {
            self.held = self.held.split_off(&number);
            let (headers, payload) = self.held.remove(&number).expect("held packets are kept");
            self.on_request(&headers, &payload);
        }
    }

    fn on_request(&mut self, headers: &Headers, payload: &[u8]) {
        match self.responder.on_request(headers, payload.len()) {
            Verdict::Execute(execution) => {
                let outcome = self.execute(&execution, payload);
                self.responder.finish(&execution, outcome);
            }
            Verdict::Hold(number) if self.has_room(payload.len()) => {
                self.held.insert(number, (*headers, payload.to_vec()));
                self.responder.hold(number);
            }
            _ => {}
        }
    }

    fn has_room(&self, len: usize) -> bool {
        let held: usize = self.held.values().map(|(_, payload)| payload.len()).sum();
        self.held.len() < self.hold_limit && held + len <= selective::HELD_BYTES as usize
    }

    fn range(&mut self, va: u64, rkey: u32, len: u64) -> Result<&mut [u8], Refusal> {
        let start = va.checked_sub(BASE).filter(|_| rkey == KEY);
        let end = start.and_then(|s| s.checked_add(len));
        start
            .zip(end)
            .and_then(|(s, e)| self.memory.get_mut(s as usize..e as usize))
            .ok_or(Refusal::RemoteAccess)
    }

    fn word(&mut self, va: u64, rkey: u32) -> Result<&mut [u8; 8], Refusal> {
        let bytes = self.range(va, rkey, 8)?;
        Ok(bytes.try_into().expect("the range is of 8 bytes"))
    }

    fn execute(&mut self, execution: &Execution, payload: &[u8]) -> Result<u64, Refusal> {
        if execution.take_recv && self.taken.is_none() {
            let room = self.receives.pop_front().ok_or(Refusal::NotReady)?;
            self.taken = Some(vec![0; room]);
        }
        let mut value = 0;
        match execution.action {
            Action::Nothing => {}
            Action::Recv { offset, len } => {
                assert_eq!(len as usize, payload.len());
                let taken = self.taken.as_mut().expect("a receive was taken");
                let at = offset as usize..offset as usize + payload.len();
                let room = taken.get_mut(at).ok_or(Refusal::InvalidRequest)?;
                room.copy_from_slice(payload);
            }
            Action::Write {
                va,
                rkey,
                total,
                offset,
                len,
            } => {
                assert_eq!(len as usize, payload.len());
                assert!(u64::from(offset) + u64::from(len) <= u64::from(total));
                let all = self.range(va, rkey, total.into())?;
                all[offset as usize..][..payload.len()].copy_from_slice(payload);
            }
            Action::Read { va, rkey, len } => {
                self.range(va, rkey, len.into())?;
            }
            Action::Atomic {
                va,
                rkey,
                swap_add,
                compare,
            } => {
                let word = self.word(va, rkey)?;
                value = u64::from_ne_bytes(*word);
                let new = match compare {
                    Some(compare) if compare != value => value,
                    Some(_) => swap_add,
                    None => value.wrapping_add(swap_add),
                };
                *word = new.to_ne_bytes();
            }
            Action::AtomicWrite { va, rkey } => {
                let bytes = payload.try_into().expect("an atomic write is of 8 bytes");
                *self.word(va, rkey)? = bytes;
            }
            Action::Flush { va, rkey, len, .. } => {
                self.range(va, rkey, len.into())?;
            }
        }
        self.delivered += payload.len() as u64;
        if let Some(end) = execution.end
            && execution.take_recv
        {
            let mut data = self.taken.take().expect("a receive was taken");
            data.truncate(if end.opcode.has_remote() {
                0
            } else {
                end.len as usize
            });
            let srq = execution.xrc_srq;
            self.received.push(Received { end, data, srq });
        }
        Ok(value)
    }

    fn take_events(&mut self, payload: &[u8], now: u64) {
        for event in std::mem::take(&mut self.events) {
            match event {
                RequesterEvent::Place(part) => {
                    let buffer = self.buffers.get_mut(&part.message.seq);
                    let buffer = buffer.expect("a message under way has a buffer");
                    buffer[part.offset as usize..][..part.len as usize].copy_from_slice(payload);
                    self.delivered += payload.len() as u64;
                }
                RequesterEvent::Atomic { message, value } => {
                    let buffer = self.buffers.get_mut(&message.seq);
                    buffer
                        .expect("a message under way has a buffer")
                        .copy_from_slice(&value.to_ne_bytes());
                }
                RequesterEvent::Complete(message) => {
                    self.complete(message.seq, WcStatus::Success, now);
                }
                RequesterEvent::Failed(message, status) => self.complete(message.seq, status, now),
            }
        }
    }

    fn complete(&mut self, seq: u64, status: WcStatus, at: u64) {
        self.completions.push(Completion { seq, status, at });
    }

    /// The time of [`Requester::next_timeout`] has come.
    pub(crate) fn on_timeout(&mut self, now: u64) {
        self.requester.on_timeout(now, &mut self.events);
        self.take_events(&[], now);
    }

    /// The next packet to send.
    pub(crate) fn next_packet(&mut self, now: u64) -> Option<(Headers, Vec<u8>)> {
        if let Some(reply) = self.responder.next_reply() {
            let data = self.read(&reply)?;
            return Some((reply.headers, data));
        }
        let transmit = self.requester.next_packet(now, &mut self.events);
        let packet = transmit.map(|t| {
            self.requests += 1;
            let data = t.payload.map_or(Vec::new(), |part| {
                let buffer = &self.buffers[&part.message.seq];
                buffer[part.offset as usize..][..part.len as usize].to_vec()
            });
            (t.headers, data)
        });
        self.take_events(&[], now);
        packet
    }

    fn read(&mut self, reply: &Reply) -> Option<Vec<u8>> {
        let Some(data) = reply.data else {
            return Some(Vec::new());
        };
        if let Ok(bytes) = self.range(data.va, data.rkey, data.len.into()) {
            return Some(bytes.to_vec());
        }
        self.responder.read_failed(reply);
        let nak = self.responder.next_reply()?;
        // A refusal carries no data.
        assert_eq!(nak.data, None);
        None
    }
}
