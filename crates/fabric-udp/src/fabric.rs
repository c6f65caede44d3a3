//! Packets in and out.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use freeflow_wire::{EmitError, Flow, Headers, ICRC_BYTES, ParseError, verify};

use crate::batch::{Datagram, Datagrams, Trains, addresses};
use crate::link::{Ecn, Link, Progress, SendCounters};

/// Bytes of packets that are pushed before they must be sent.
const SEND_BYTES: usize = 512 << 10;

/// Where a packet goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct To {
    /// The other host, of the family of the fabric's address.
    pub dst: IpAddr,
    /// Any number that the packets of one connection have in common: it chooses the UDP source
    /// port, so that connections spread over paths, and none is reordered.
    pub flow: u32,
    /// Congestion notification.
    pub ecn: Ecn,
}

/// Why a packet was not added.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PushError<E> {
    /// There is no room until what is there is sent.
    #[error("too much waits to be sent")]
    Full,
    /// The headers cannot be written.
    #[error(transparent)]
    Headers(#[from] EmitError),
    /// The destination's address is not of the fabric's family.
    #[error("{dst} cannot be reached from {local}")]
    Family {
        /// Where to.
        dst: IpAddr,
        /// Where from.
        local: IpAddr,
    },
    /// Headers and payload are longer than any datagram.
    #[error("a packet of {0} bytes")]
    Size(usize),
    /// The payload could not be had.
    #[error("the payload could not be read")]
    Payload(E),
}

/// What was received, and what was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Packets taken.
    pub packets: u64,
    /// Their bytes, without IP and UDP headers.
    pub bytes: u64,
    /// Of those, how many met a full queue (ECN).
    pub congested: u64,
    /// Wrong CRC.
    pub bad_icrc: u64,
    /// Shorter than their headers.
    pub truncated: u64,
    /// A transport header version other than 0.
    pub version: u64,
    /// An opcode that no packet has.
    pub opcode: u64,
    /// Data whose length such a packet cannot have.
    pub length: u64,
}

/// A packet whose CRC and headers are right.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received<'a> {
    /// The sender's address, as the network tells it.
    pub src: IpAddr,
    /// Congestion notification.
    pub ecn: Ecn,
    /// Identification of the IPv4 packet, which the CRC tells: below 64 if a fabric like this one
    /// sent it.
    pub ip_id: u16,
    /// All transport headers.
    pub headers: Headers,
    /// Payload, without pad.
    pub payload: &'a [u8],
}

/// Sends and receives packets over a link.
pub struct Fabric<L> {
    link: L,
    trains: Trains,
    counters: Counters,
    /// Identification of the last packet checked.
    last_id: u16,
}

impl<L: Link> Fabric<L> {
    /// A fabric over sockets, or over layers on them.
    pub fn new(link: L) -> Self {
        Fabric {
            link,
            trains: Trains::new(SEND_BYTES),
            counters: Counters::default(),
            last_id: 0,
        }
    }

    /// The address that packets are sent from and received at.
    pub fn local(&self) -> IpAddr {
        self.link.local()
    }

    /// Adds a packet to those that [`flush`](Self::flush) sends. `payload` is its length in bytes,
    /// and `fill` copies it to where it is sent from; the pad follows from it, whatever the headers
    /// say. If there is an error, nothing is added.
    pub fn push<E>(
        &mut self,
        to: &To,
        headers: &Headers,
        payload: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), PushError<E>> {
        let (local, dst) = (self.link.local(), to.dst);
        if local.is_ipv4() != dst.is_ipv4() {
            return Err(PushError::Family { dst, local });
        }
        let headers = headers.with_payload(payload);
        let pad = usize::from(headers.bth.pad);
        let head = headers.len();
        let len = head.saturating_add(payload) + pad + ICRC_BYTES;
        if len > usize::from(u16::MAX) - 48 {
            return Err(PushError::Size(len));
        }
        let room = self.trains.room(len).ok_or(PushError::Full)?;
        headers.emit(room)?;
        let (data, rest) = room[head..].split_at_mut(payload);
        fill(data).map_err(PushError::Payload)?;
        rest[..pad].fill(0);
        let port = self.link.source_port(to.flow);
        self.trains.add(local, dst, port, to.ecn, len);
        Ok(())
    }

    /// Sends what was pushed. After [`Progress::Blocked`] the rest is sent by the next call, which
    /// succeeds when the descriptor is ready. `now` is in ns.
    pub fn flush(&mut self, now: u64) -> io::Result<Progress> {
        if self.trains.is_empty() {
            return Ok(Progress::Done);
        }
        self.link.send(now, &mut self.trains)
    }

    /// Whether packets wait to be sent.
    pub fn has_unsent(&self) -> bool {
        !self.trains.is_empty()
    }

    /// Receives into a batch what is there, up to some hundred KiB; [`check`](Self::check) makes
    /// packets of it. The batch is the caller's, who answers packets of it while it lasts, and
    /// should be used again. `now` is in ns.
    pub fn receive(&mut self, now: u64, into: &mut Datagrams) -> io::Result<()> {
        into.clear();
        self.link.receive(now, into)
    }

    /// The packet in a datagram, if it is one; else why not is counted.
    pub fn check<'a>(&mut self, datagram: Datagram<'a>) -> Option<Received<'a>> {
        let src = datagram.src.ip();
        let addresses = addresses(src, self.link.local())?;
        let flow = Flow {
            addresses,
            src_port: datagram.src.port(),
        };
        // A fabric like this one numbers the packets of a train.
        let likely = match datagram.follows {
            true => self.last_id.wrapping_add(1),
            false => 0,
        };
        let Ok(ip_id) = verify(&flow, likely, datagram.bytes) else {
            self.counters.bad_icrc += 1;
            return None;
        };
        self.last_id = ip_id;
        let end = datagram.bytes.len().saturating_sub(ICRC_BYTES);
        let packet = datagram.bytes.get(..end).unwrap_or_default();
        let (headers, payload) = match Headers::parse(packet) {
            Ok(parsed) => parsed,
            Err(e) => {
                let counter = match e {
                    ParseError::Truncated => &mut self.counters.truncated,
                    ParseError::Version(_) => &mut self.counters.version,
                    ParseError::Opcode(_) => &mut self.counters.opcode,
                    ParseError::Pad { .. } | ParseError::Data { .. } => &mut self.counters.length,
                };
                *counter += 1;
                return None;
            }
        };
        self.counters.packets += 1;
        self.counters.bytes += datagram.bytes.len() as u64;
        self.counters.congested += u64::from(datagram.ecn == Ecn::Congested);
        Some(Received {
            src,
            ecn: datagram.ecn,
            ip_id,
            headers,
            payload: packet.get(payload).unwrap_or_default(),
        })
    }

    /// When something comes although the descriptor is not ready, on the clock of `now`: only with
    /// layers that delay packets.
    pub fn next_timeout(&self) -> Option<u64> {
        self.link.next_timeout()
    }

    /// What was received and refused.
    pub fn received(&self) -> Counters {
        self.counters
    }

    /// What was sent, and what could not be.
    pub fn sent(&self) -> SendCounters {
        self.link.sent()
    }

    /// Whether UDP's checksum covers what is sent.
    pub fn has_checksum(&self) -> bool {
        self.link.has_checksum()
    }

    /// Datagrams that the kernel dropped because they were not received in time.
    pub fn overflows(&self) -> u64 {
        self.link.overflows()
    }

    /// The link underneath.
    pub fn link(&self) -> &L {
        &self.link
    }
}

/// Readable when there is something to receive or, after [`Progress::Blocked`], to send.
impl<L: Link> AsFd for Fabric<L> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.fd()
    }
}
