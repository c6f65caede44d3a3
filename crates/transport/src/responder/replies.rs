//! Answers to READs, atomics, ATOMIC WRITEs and FLUSHes: made once, and again if asked again.

use std::collections::VecDeque;

use freeflow_types::Psn;
use freeflow_wire::{Aeth, Bth, BthOpcode, Headers, Syndrome};
use serde::{Deserialize, Serialize};

use super::{Action, Execution};
use crate::connection::{Connection, psn};

/// Answers that are being made again, at most, beside those that are made for the first time.
const MAX_REPLAYS: usize = 32;

/// Data of a READ response: to be read from memory, with the rights checked again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadData {
    /// Address.
    pub va: u64,
    /// Key of the memory.
    pub rkey: u32,
    /// Bytes.
    pub len: u32,
}

/// An answer to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    /// Its headers, pad included.
    pub headers: Headers,
    /// The payload that follows them.
    pub data: Option<ReadData>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Answer {
    Read { va: u64, rkey: u32, len: u32 },
    Value(u64),
    Bare,
}

/// A request that was executed, and its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Executed {
    at: u64,
    packets: u32,
    answer: Answer,
}

/// An answer that is being sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Sending {
    /// Of the next packet.
    at: u64,
    /// What is left of it.
    answer: Answer,
    begun: bool,
    again: bool,
}

/// The answers of a responder.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Replies {
    /// By sequence number.
    sending: VecDeque<Sending>,
    /// The latest, for replay.
    executed: VecDeque<Executed>,
}

impl Replies {
    /// Requests whose first answer is not out.
    pub(super) fn unanswered(&self) -> u32 {
        self.sending.iter().filter(|s| !s.again).count() as u32
    }

    /// A request was executed: it is to be answered, and remembered together with the last `keep`.
    pub(super) fn begin(&mut self, execution: &Execution, value: u64, keep: u8) {
        let answer = match execution.action {
            Action::Read { va, rkey, len } => Answer::Read { va, rkey, len },
            Action::Atomic { .. } => Answer::Value(value),
            _ => Answer::Bare,
        };
        let at = execution.at;
        while self.executed.len() >= usize::from(keep) {
            self.executed.pop_front();
        }
        self.executed.push_back(Executed {
            at,
            packets: execution.packets,
            answer,
        });
        self.send(at, answer, false);
    }

    /// Answers go out by sequence number.
    fn send(&mut self, at: u64, answer: Answer, again: bool) {
        let index = self.sending.partition_point(|s| s.at <= at);
        self.sending.insert(
            index,
            Sending {
                at,
                answer,
                begun: false,
                again,
            },
        );
    }

    /// A request came again. Its answer is made again if it is one of those remembered; a READ may
    /// ask for a part of what it asked for before.
    pub(super) fn replay(&mut self, connection: &Connection, headers: &Headers, at: u64) {
        let known = |e: &&Executed| e.at <= at && at < e.at + u64::from(e.packets);
        let Some(executed) = self.executed.iter().find(known) else {
            return;
        };
        let is_read = headers.bth.opcode.op() == BthOpcode::RC_READ_REQUEST.op();
        let answer = match (executed.answer, headers.reth) {
            (Answer::Read { va, rkey, len }, Some(reth)) if is_read => {
                let skipped = (at - executed.at) * u64::from(connection.segment());
                let same = reth.rkey == rkey && reth.va == va.wrapping_add(skipped);
                if !same || skipped + u64::from(reth.len) > u64::from(len) {
                    return;
                }
                Answer::Read {
                    va: reth.va,
                    rkey,
                    len: reth.len,
                }
            }
            (Answer::Read { .. }, _) => return,
            (answer, _) if !is_read => answer,
            _ => return,
        };
        let replays = self.sending.iter().filter(|s| s.again).count();
        // What is about to be sent need not be sent twice.
        let due = self.sending.iter().any(|s| s.at == at);
        if !due && replays < MAX_REPLAYS {
            self.send(at, answer, true);
        }
    }

    pub(super) fn clear(&mut self) {
        self.sending.clear();
        self.executed.clear();
    }

    /// The next packet.
    pub(super) fn next(&mut self, connection: &Connection, msn: u32) -> Option<Reply> {
        let sending = self.sending.front_mut()?;
        let at = psn(sending.at);
        let (mut done, mut data) = (true, None);
        let mut value = None;
        let opcode = match &mut sending.answer {
            Answer::Value(v) => {
                value = Some(*v);
                BthOpcode::RC_ATOMIC_ACK
            }
            Answer::Bare => BthOpcode::RC_READ_RESPONSE_ONLY,
            Answer::Read { va, rkey, len } => {
                let part = (*len).min(connection.segment());
                data = (part != 0).then_some(ReadData {
                    va: *va,
                    rkey: *rkey,
                    len: part,
                });
                *va = va.wrapping_add(part.into());
                *len -= part;
                done = *len == 0;
                match (sending.begun, done) {
                    (false, false) => BthOpcode::RC_READ_RESPONSE_FIRST,
                    (true, false) => BthOpcode::RC_READ_RESPONSE_MIDDLE,
                    (true, true) => BthOpcode::RC_READ_RESPONSE_LAST,
                    (false, true) => BthOpcode::RC_READ_RESPONSE_ONLY,
                }
            }
        };
        sending.at += 1;
        sending.begun = true;
        if done {
            self.sending.pop_front();
        }
        let opcode = opcode.with_service(connection.service());
        let mut h = Headers::new(Bth::new(opcode, connection.dest_qp, at));
        h.aeth = opcode.has_aeth().then_some(Aeth {
            syndrome: Syndrome::ACK,
            msn,
        });
        h.atomic_ack = value;
        let payload = data.map_or(0, |d| d.len as usize);
        Some(Reply {
            headers: h.with_payload(payload),
            data,
        })
    }
}

/// An acknowledgement, positive or negative.
pub(super) fn acknowledge(connection: &Connection, at: Psn, syndrome: Syndrome, msn: u32) -> Reply {
    let opcode = BthOpcode::RC_ACK.with_service(connection.service());
    let mut h = Headers::new(Bth::new(opcode, connection.dest_qp, at));
    h.aeth = Some(Aeth { syndrome, msn });
    Reply {
        headers: h,
        data: None,
    }
}

/// A congestion notification packet (IBTA annex A17.9.3).
pub(super) fn notification(connection: &Connection) -> Reply {
    let mut bth = Bth::new(BthOpcode::CNP, connection.dest_qp, Psn::new(0));
    bth.becn = true;
    Reply {
        headers: Headers::new(bth),
        data: None,
    }
}
