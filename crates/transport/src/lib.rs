//! Queue pair state machines, sans-IO.
//!
//! All state is plain values. They are told what was asked and what came of it, and say what is to
//! be done; they know no memory, no sockets, no tenants and no clock: the time comes in as
//! nanoseconds. There are two kinds.
//!
//! # Within a host
//!
//! A [`Qp`] has a queue pair's state, attributes and retries. Whoever executes messages (the router
//! on one host, a fabric between hosts, the posting thread itself) asks the same value.
//!
//! # On the wire
//!
//! A connected queue pair whose peer is elsewhere has a [`Requester`] and a [`Responder`], made
//! from one [`Connection`] when it enters RTS and RTR. They speak RoCEv2 as the standard has it
//! (IBTA volume 1, chapter 9), with headers of `freeflow-wire`; payload they only count. Between
//! FreeFlow routers, segments may be longer than a path MTU of the verbs, and retransmission is
//! [`selective`]. A [`Datagrams`] is the sender of an unreliable datagram queue pair.
//!
//! The executor's part, for each queue pair:
//!
//! * Work: it checks and copies a request from the ring, and [posts](Requester::post) it; it keeps
//!   the request's elements under the message's number until the message is complete, for data is
//!   read whenever a packet is (re)sent. Then it calls [`Requester::next_packet`] until `None` or
//!   until its turn is over, reads the [`Part`] of the message, and sends. It executes local
//!   operations itself, when the requester [is idle](Requester::is_idle). If data cannot be read,
//!   it calls [`Requester::abort`].
//! * Packets that arrive are responses ([`Requester::on_response`], also for notifications of
//!   congestion) or requests ([`Responder::on_request`]), as the opcode says. If the network has
//!   marked one as congested, [`Requester::on_congestion`] or [`Responder::on_mark`] is told. An [`Execution`] is done in its order and
//!   concluded with [`Responder::finish`]. After the packets that have come together, it calls
//!   [`Responder::next_reply`] until `None` or the end of its turn.
//! * Time: one timer at [`Requester::next_timeout`], asked for after each of the above; when it is
//!   due, and packets that have arrived have been given, [`Requester::on_timeout`], then
//!   [`Requester::next_packet`]. A responder has no timers.
//! * Events ([`RequesterEvent`]) are appended to a vector of the executor's, which it works off
//!   after each call.
//!
//! Nothing that a peer sends makes either of them panic, or grow beyond what the connection grants.

#![forbid(unsafe_code)]

mod check;
mod congestion;
mod connection;
mod datagram;
mod modify;
mod qp;
mod requester;
mod responder;
pub mod selective;

pub use check::{PostError, check_send};
pub use connection::{Connection, MAX_SEGMENT};
pub use datagram::{Datagram, Datagrams, Destination, accept_datagram};
pub use modify::{ModifyError, ModifyLimits, check_modify};
pub use qp::{Nak, Next, Outcome, Qp, Transition};
pub use requester::{Message, Part, Requester, RequesterEvent, Transmit, Work, WorkError};
pub use responder::{
    Action, Dropped, Execution, MessageEnd, ReadData, Refusal, Reply, Responder, Verdict,
};
