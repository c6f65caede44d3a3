//! Batches of datagrams to send and received.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use freeflow_wire::{Addresses, Flow, ICRC_BYTES, icrc};

use crate::Ecn;

/// Packets of a train: what every kernel with segmentation takes (`UDP_MAX_SEGMENTS`).
const MAX_PACKETS: usize = 64;
/// Bytes of a train: an IP packet's 65,535 less its headers and some options.
const MAX_BYTES: usize = 65_000;

/// Trains of a batch.
const MAX_TRAINS: usize = 256;

/// Packets that go the same way: of one size, but for the last, which may be smaller.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Train {
    /// Where to.
    pub dst: IpAddr,
    /// UDP source port.
    pub src_port: u16,
    /// Congestion notification.
    pub ecn: Ecn,
    /// Bytes of each packet but the last.
    size: usize,
    range: Range<usize>,
    /// Somebody has looked at it, so no packet is added any more.
    closed: bool,
}

impl Train {
    /// How many packets there are.
    pub fn packets(&self) -> usize {
        self.range.len().div_ceil(self.size)
    }

    /// Bytes of each packet but the last, which may have fewer.
    pub fn packet_size(&self) -> usize {
        self.size
    }

    fn takes(&self, to: (IpAddr, u16, Ecn), len: usize) -> bool {
        !self.closed
            && to == (self.dst, self.src_port, self.ecn)
            && len <= self.size
            // A smaller packet was the last.
            && self.range.len().is_multiple_of(self.size)
            && self.packets() < MAX_PACKETS
            && self.range.len() + len <= MAX_BYTES
    }
}

/// Packets to send, in the order in which they were added.
#[derive(Debug)]
pub struct Trains {
    bytes: Box<[u8]>,
    used: usize,
    trains: Vec<Train>,
    /// Of each, whether it is sent or dropped.
    done: Vec<bool>,
    left: usize,
    /// Every packet is a train.
    apart: bool,
}

impl Trains {
    /// Room for `bytes` bytes of packets.
    pub(crate) fn new(bytes: usize) -> Self {
        Trains {
            bytes: vec![0; bytes].into(),
            used: 0,
            trains: Vec::new(),
            done: Vec::new(),
            left: 0,
            apart: false,
        }
    }

    /// The trains that are left to send, each with its place.
    pub fn left(&self) -> impl Iterator<Item = (usize, &Train)> {
        let all = self.trains.iter().enumerate();
        all.filter(|&(i, _)| !self.done.get(i).copied().unwrap_or(true))
    }

    /// Whether nothing is left to send.
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Calls `each` with the trains that no call has seen yet, each with its packets.
    pub fn look(&mut self, mut each: impl FnMut(&Train, &[u8])) {
        // They are at the end.
        let seen = self.trains.iter().rposition(|train| train.closed);
        for train in self.trains.iter_mut().skip(seen.map_or(0, |i| i + 1)) {
            train.closed = true;
            each(
                train,
                self.bytes.get(train.range.clone()).unwrap_or_default(),
            );
        }
    }

    /// A train's packets, one after another.
    pub fn bytes(&self, train: &Train) -> &[u8] {
        self.bytes.get(train.range.clone()).unwrap_or_default()
    }

    /// Marks the train at a place as sent or dropped.
    pub fn finish(&mut self, place: usize) {
        if let Some(done) = self.done.get_mut(place)
            && !std::mem::replace(done, true)
        {
            self.left -= 1;
        }
        if self.left == 0 {
            self.used = 0;
            self.trains.clear();
            self.done.clear();
        }
    }

    /// Makes a train of each packet that is added from now on.
    pub fn keep_apart(&mut self) {
        self.apart = true;
    }

    /// Makes a train of each packet that is left, because the kernel or the device cannot split
    /// trains. IPv4's identification, which the CRC covers, counts within a train, so the CRCs
    /// change.
    pub fn split(&mut self, local: IpAddr) {
        if self.left().all(|(_, train)| train.packets() == 1) {
            return;
        }
        let trains = std::mem::take(&mut self.trains);
        let done = std::mem::take(&mut self.done);
        self.left = 0;
        for (train, _) in trains.into_iter().zip(done).filter(|&(_, done)| !done) {
            let end = train.range.end;
            for start in train.range.clone().step_by(train.size) {
                let range = start..end.min(start + train.size);
                if let Some(packet) = self.bytes.get_mut(range.clone()) {
                    seal(local, train.dst, train.src_port, 0, packet);
                }
                self.trains.push(Train {
                    size: range.len(),
                    range,
                    ..train.clone()
                });
                self.done.push(false);
                self.left += 1;
            }
        }
    }

    /// Room for a packet of `len` bytes, if there is.
    pub(crate) fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        if self.trains.len() >= MAX_TRAINS {
            return None;
        }
        self.bytes.get_mut(self.used..self.used.checked_add(len)?)
    }

    /// Adds the packet of `len` bytes that was written where [`room`](Self::room) was, but for its
    /// CRC.
    pub(crate) fn add(&mut self, local: IpAddr, dst: IpAddr, src_port: u16, ecn: Ecn, len: usize) {
        let range = self.used..self.used + len;
        self.used = range.end;
        let undone = self.done.last() == Some(&false);
        let last = self.trains.last_mut().filter(|_| undone && !self.apart);
        let place = match last {
            Some(train) if train.takes((dst, src_port, ecn), len) => {
                train.range.end = range.end;
                train.packets() - 1
            }
            _ => {
                self.trains.push(Train {
                    dst,
                    src_port,
                    ecn,
                    size: len,
                    range: range.clone(),
                    closed: false,
                });
                self.done.push(false);
                self.left += 1;
                0
            }
        };
        if let Some(packet) = self.bytes.get_mut(range) {
            seal(local, dst, src_port, place as u16, packet);
        }
    }
}

/// Source and destination of one family; `None` if they are of two.
pub(crate) fn addresses(src: IpAddr, dst: IpAddr) -> Option<Addresses> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => Some(Addresses::V4 { src, dst }),
        (IpAddr::V6(src), IpAddr::V6(dst)) => Some(Addresses::V6 { src, dst }),
        _ => None,
    }
}

/// Writes a packet's CRC. `place` is its place in its train, and thereby IPv4's identification:
/// Linux gives 0 to a packet that may not be fragmented and has no connected socket, and counts on
/// from there when it splits a train.
fn seal(src: IpAddr, dst: IpAddr, src_port: u16, place: u16, packet: &mut [u8]) {
    let Some(addresses) = addresses(src, dst) else {
        return;
    };
    let flow = Flow {
        addresses,
        src_port,
    };
    if let Some((body, crc)) = packet.split_last_chunk_mut::<ICRC_BYTES>() {
        *crc = icrc(&flow, place, body);
    }
}

/// A received datagram.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Datagram<'a> {
    /// The sender.
    pub src: SocketAddr,
    /// Congestion notification.
    pub ecn: Ecn,
    /// It follows the one before in what the kernel gave as one, most likely a train of its
    /// sender's.
    pub follows: bool,
    /// Payload.
    pub bytes: &'a [u8],
}

#[derive(Debug)]
struct Place {
    src: SocketAddr,
    ecn: Ecn,
    follows: bool,
    range: Range<usize>,
}

/// Received datagrams.
#[derive(Debug, Default)]
pub struct Datagrams {
    pub(crate) storage: Vec<u8>,
    places: Vec<Place>,
    used: usize,
}

impl Datagrams {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// In the order of arrival.
    pub fn iter(&self) -> impl Iterator<Item = Datagram<'_>> {
        self.places.iter().map(|place| Datagram {
            src: place.src,
            ecn: place.ecn,
            follows: place.follows,
            bytes: self.storage.get(place.range.clone()).unwrap_or_default(),
        })
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.places.clear();
        self.used = 0;
    }

    /// Adds one.
    pub fn push(&mut self, datagram: Datagram<'_>) {
        let range = self.used..self.used + datagram.bytes.len();
        if self.storage.len() < range.end {
            self.storage.resize(range.end, 0);
        }
        if let Some(room) = self.storage.get_mut(range.clone()) {
            room.copy_from_slice(datagram.bytes);
        }
        self.used = range.end;
        self.places.push(Place {
            src: datagram.src,
            ecn: datagram.ecn,
            follows: datagram.follows,
            range,
        });
    }

    /// The first `bytes` of the storage, to receive into.
    pub(crate) fn slots(&mut self, bytes: usize) -> &mut [u8] {
        self.clear();
        if self.storage.len() < bytes {
            self.storage.resize(bytes, 0);
        }
        self.used = bytes;
        self.storage.get_mut(..bytes).unwrap_or_default()
    }

    /// Adds what was received into a slot: datagrams of `size` bytes, the last maybe smaller.
    pub(crate) fn split(&mut self, src: SocketAddr, ecn: Ecn, range: Range<usize>, size: usize) {
        let mut start = range.start;
        loop {
            let end = range.end.min(start.saturating_add(size.max(1)));
            self.places.push(Place {
                src,
                ecn,
                follows: start != range.start,
                range: start..end,
            });
            start = end;
            if start >= range.end {
                break;
            }
        }
    }
}
