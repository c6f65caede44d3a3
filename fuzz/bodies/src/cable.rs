//! A link between engines that keeps what is sent, and brings what it is given.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freeflow_fabric_udp::{Datagram, Datagrams, Ecn, Link, Progress, SendCounters, Trains};
use rustix::event::{EventfdFlags, eventfd};

/// A datagram on its way.
#[derive(Clone)]
pub(crate) struct Packet {
    pub(crate) from: SocketAddr,
    pub(crate) to: IpAddr,
    pub(crate) ecn: Ecn,
    pub(crate) bytes: Vec<u8>,
}

/// A host's end of it; all copies are the same.
#[derive(Clone)]
pub(crate) struct Cable {
    local: IpAddr,
    /// Never readable: whoever gives packets runs the engine too.
    fd: Arc<OwnedFd>,
    ends: Arc<Mutex<Ends>>,
}

#[derive(Default)]
struct Ends {
    sent: Vec<Packet>,
    coming: VecDeque<Packet>,
}

impl Cable {
    pub(crate) fn new(local: IpAddr) -> Cable {
        Cable {
            local,
            fd: Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor")),
            ends: Arc::default(),
        }
    }

    /// Whether this is the cable of a host's address.
    pub(crate) fn is(&self, host: IpAddr) -> bool {
        self.local == host
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the host has sent since this was asked last.
    pub(crate) fn take_sent(&self) -> Vec<Packet> {
        std::mem::take(&mut self.ends().sent)
    }

    /// Brings a packet to the host: it is there when the engine looks next.
    pub(crate) fn bring(&self, packet: Packet) {
        self.ends().coming.push_back(packet);
    }
}

impl Link for Cable {
    fn local(&self) -> IpAddr {
        self.local
    }

    fn source_port(&self, flow: u32) -> u16 {
        0xC000 | (flow as u16 & 0x3FFF)
    }

    fn send(&mut self, _now: u64, trains: &mut Trains) -> io::Result<Progress> {
        let all: Vec<_> = trains.left().map(|(at, t)| (at, t.clone())).collect();
        for (at, train) in all {
            for bytes in trains.bytes(&train).chunks(train.packet_size()) {
                self.ends().sent.push(Packet {
                    from: SocketAddr::new(self.local, train.src_port),
                    to: train.dst,
                    ecn: train.ecn,
                    bytes: bytes.to_vec(),
                });
            }
            trains.finish(at);
        }
        Ok(Progress::Done)
    }

    fn receive(&mut self, _now: u64, into: &mut Datagrams) -> io::Result<()> {
        into.clear();
        let mut before = None;
        for packet in self.ends().coming.drain(..) {
            let follows = before.replace(packet.from) == Some(packet.from);
            into.push(Datagram {
                src: packet.from,
                ecn: packet.ecn,
                bytes: &packet.bytes,
                follows,
            });
        }
        Ok(())
    }

    fn next_timeout(&self) -> Option<u64> {
        (!self.ends().coming.is_empty()).then_some(0)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn has_checksum(&self) -> bool {
        true
    }

    fn sent(&self) -> SendCounters {
        SendCounters::default()
    }

    fn overflows(&self) -> u64 {
        0
    }
}
