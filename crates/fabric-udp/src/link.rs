//! What carries datagrams.

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use crate::batch::{Datagrams, Trains};

/// Explicit congestion notification: the low two bits of IPv4's TOS and IPv6's traffic class
/// (RFC 3168).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Ecn {
    /// The transport does not react.
    #[default]
    NotCapable,
    /// The transport reacts: ECT(1).
    Capable1,
    /// The transport reacts: ECT(0).
    Capable0,
    /// A queue on the way is full.
    Congested,
}

impl Ecn {
    /// From the byte that has it.
    pub fn from_tos(tos: u8) -> Self {
        match tos & 3 {
            0 => Ecn::NotCapable,
            1 => Ecn::Capable1,
            2 => Ecn::Capable0,
            _ => Ecn::Congested,
        }
    }
}

/// How far sending came.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Progress {
    /// All is sent.
    Done,
    /// The socket is full: the rest is still there, and can go when the link's descriptor is
    /// readable.
    Blocked,
}

/// What a link sent, and what it could not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SendCounters {
    /// Packets sent.
    pub packets: u64,
    /// Their bytes, without IP and UDP headers.
    pub bytes: u64,
    /// System calls.
    pub calls: u64,
    /// Packets dropped because the path does not take their size.
    pub too_big: u64,
    /// Where to the last of them was to go: its path's MTU should be asked again.
    pub last_too_big: Option<IpAddr>,
    /// Packets dropped because the kernel has no way to the destination, or forbids it.
    pub unreachable: u64,
    /// How often the socket was full.
    pub blocked: u64,
}

/// What carries datagrams: sockets, or a layer on top of another link.
pub trait Link {
    /// The address that packets are sent from and received at.
    fn local(&self) -> IpAddr;

    /// UDP source port of packets of a flow.
    fn source_port(&self, flow: u32) -> u16;

    /// Sends the trains that are not sent yet, and drops those that cannot be.
    ///
    /// An error is the socket's own: that a packet cannot be sent is counted instead.
    fn send(&mut self, now: u64, trains: &mut Trains) -> io::Result<Progress>;

    /// Receives datagrams in place of those in the batch, as many as are there and fit.
    fn receive(&mut self, now: u64, into: &mut Datagrams) -> io::Result<()>;

    /// When datagrams come although the descriptor is not ready, on the clock of `now` in ns.
    fn next_timeout(&self) -> Option<u64>;

    /// A descriptor that is readable when there is something to receive or, after
    /// [`Progress::Blocked`], to send.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Whether datagrams are sent with a checksum, so that whoever receives one with other bytes drops
    /// it. What comes has one if its sender says so of itself.
    fn has_checksum(&self) -> bool;

    /// What was sent so far.
    fn sent(&self) -> SendCounters;

    /// Datagrams that the kernel dropped because nobody fetched them in time.
    fn overflows(&self) -> u64;
}

impl<L: Link + ?Sized> Link for Box<L> {
    fn local(&self) -> IpAddr {
        (**self).local()
    }

    fn source_port(&self, flow: u32) -> u16 {
        (**self).source_port(flow)
    }

    fn send(&mut self, now: u64, trains: &mut Trains) -> io::Result<Progress> {
        (**self).send(now, trains)
    }

    fn receive(&mut self, now: u64, into: &mut Datagrams) -> io::Result<()> {
        (**self).receive(now, into)
    }

    fn next_timeout(&self) -> Option<u64> {
        (**self).next_timeout()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        (**self).fd()
    }

    fn has_checksum(&self) -> bool {
        (**self).has_checksum()
    }

    fn sent(&self) -> SendCounters {
        (**self).sent()
    }

    fn overflows(&self) -> u64 {
        (**self).overflows()
    }
}
