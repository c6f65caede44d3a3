//! What a packet asks for, given the message that it belongs to (IBTA volume 1, 9.7.4.1).

use freeflow_types::{MAX_MESSAGE, Opcode};
use freeflow_wire::{BthOpcode, Headers};
use serde::{Deserialize, Serialize};

use super::{Action, Execution, MessageEnd};
use crate::connection::Connection;

/// A message of which packets have come, and the last has not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Current {
    /// Bytes that have come.
    done: u32,
    /// Of a WRITE: where it goes. `None`: a SEND.
    target: Option<Target>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Target {
    va: u64,
    rkey: u32,
    total: u32,
}

/// `None`: no such packet may come here.
pub(super) fn plan(
    connection: &Connection,
    current: Option<Current>,
    headers: &Headers,
    payload: usize,
    at: u64,
) -> Option<Execution> {
    let code = headers.bth.opcode;
    // Within a message there is none but its packets.
    if code.starts_message() != current.is_none() {
        return None;
    }
    let payload = u32::try_from(payload).ok()?;
    if code.is_send() || code.is_write() {
        return message(connection, current, headers, payload, at);
    }
    let mut packets = 1;
    let (opcode, action) = match BthOpcode(code.op()) {
        BthOpcode::RC_READ_REQUEST => {
            let reth = headers.reth?;
            packets = connection.packets(reth.len);
            let (va, rkey, len) = (reth.va, reth.rkey, reth.len);
            if u64::from(len) > MAX_MESSAGE {
                return None;
            }
            (Opcode::RdmaRead, Action::Read { va, rkey, len })
        }
        op @ (BthOpcode::RC_COMPARE_SWAP | BthOpcode::RC_FETCH_ADD) => {
            let atomic = headers.atomic.filter(|a| a.va.is_multiple_of(8))?;
            let swaps = op == BthOpcode::RC_COMPARE_SWAP;
            let action = Action::Atomic {
                va: atomic.va,
                rkey: atomic.rkey,
                swap_add: atomic.swap_add,
                compare: swaps.then_some(atomic.compare),
            };
            let opcode = if swaps {
                Opcode::CompareSwap
            } else {
                Opcode::FetchAdd
            };
            (opcode, action)
        }
        BthOpcode::RC_ATOMIC_WRITE => {
            let reth = headers.reth?;
            let (va, rkey) = (reth.va, reth.rkey);
            if !va.is_multiple_of(8) || reth.len != 8 {
                return None;
            }
            (Opcode::AtomicWrite, Action::AtomicWrite { va, rkey })
        }
        BthOpcode::RC_FLUSH => {
            let (reth, spec) = (headers.reth?, headers.feth?.spec()?);
            let action = Action::Flush {
                va: reth.va,
                rkey: reth.rkey,
                len: reth.len,
                spec,
            };
            (Opcode::Flush, action)
        }
        _ => return None,
    };
    let bytes = if opcode == Opcode::AtomicWrite { 8 } else { 0 };
    let len = match action {
        Action::Read { len, .. } => len,
        Action::Flush { .. } => 0,
        _ => 8,
    };
    (payload == bytes).then_some(Execution {
        opcode,
        starts: true,
        take_recv: false,
        xrc_srq: headers.xrc_srq,
        action,
        end: Some(MessageEnd {
            opcode,
            len,
            imm: None,
            invalidate: None,
            solicited: headers.bth.solicited,
        }),
        at,
        packets,
        ack_req: headers.bth.ack_req,
        next: None,
    })
}

/// A packet of a SEND or WRITE.
fn message(
    connection: &Connection,
    current: Option<Current>,
    headers: &Headers,
    payload: u32,
    at: u64,
) -> Option<Execution> {
    let code = headers.bth.opcode;
    let (starts, ends) = (code.starts_message(), code.ends_message());
    let segment = connection.segment();
    let fits = match (starts, ends) {
        (_, false) => payload == segment,
        (true, true) => payload <= segment,
        (false, true) => payload <= segment && payload != 0,
    };
    let current = match current {
        Some(current) => current,
        None => Current {
            done: 0,
            target: match headers.reth {
                Some(reth) if code.is_write() => Some(Target {
                    va: reth.va,
                    rkey: reth.rkey,
                    total: reth.len,
                }),
                None if code.is_send() => None,
                _ => return None,
            },
        },
    };
    let same = current.target.is_some() == code.is_write();
    let offset = current.done;
    let done = u64::from(offset) + u64::from(payload);
    let limit = current.target.map_or(MAX_MESSAGE, |t| u64::from(t.total));
    // All that a WRITE announced must come, and no more.
    let complete = current.target.is_none() || (done == limit) == ends;
    if !fits || !same || limit > MAX_MESSAGE || done > limit || !complete {
        return None;
    }
    let done = done as u32;
    let opcode = match (current.target, headers.imm, headers.ieth) {
        (None, None, None) => Opcode::Send,
        (None, Some(_), _) => Opcode::SendImm,
        (None, None, Some(_)) => Opcode::SendInv,
        (Some(_), None, _) => Opcode::RdmaWrite,
        (Some(_), Some(_), _) => Opcode::RdmaWriteImm,
    };
    let action = match current.target {
        _ if payload == 0 => Action::Nothing,
        None => Action::Recv {
            offset,
            len: payload,
        },
        Some(t) => Action::Write {
            va: t.va,
            rkey: t.rkey,
            total: t.total,
            offset,
            len: payload,
        },
    };
    Some(Execution {
        opcode,
        starts,
        take_recv: code.is_send() || headers.imm.is_some(),
        xrc_srq: headers.xrc_srq,
        action,
        end: ends.then_some(MessageEnd {
            opcode,
            len: done,
            imm: headers.imm,
            invalidate: headers.ieth,
            solicited: headers.bth.solicited,
        }),
        at,
        packets: 1,
        ack_req: headers.bth.ack_req,
        next: (!ends).then_some(Current { done, ..current }),
    })
}
