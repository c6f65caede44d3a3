//! The side that sends: the send ring, the peer's buffers, credits.

use std::collections::VecDeque;

use crate::stream::{Config, Range};
use crate::wire::{IoMap, Segment};

/// Entries of the table that the peer tells of its buffers in.
pub(crate) const SEGMENTS: u32 = 2;

/// Requests that are kept for messages about the connection and credits.
pub(crate) const CONTROL_REQUESTS: u16 = 4;

/// The send ring takes bytes when so many are free.
const LOW_WATER: u32 = 2048;

/// Where the bytes of a [`Write`] are taken from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// From the program's memory, while the request is posted.
    Inline,
    /// From the send buffer, where they are to be copied to: these parts of it, of which the
    /// second may be empty.
    Ring([Range; 2]),
}

/// A WRITE of the program's bytes to post.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Write {
    /// How many.
    pub length: u32,
    /// From where.
    pub place: Place,
    /// The peer's address.
    pub addr: u64,
    /// The peer's key.
    pub key: u32,
    /// Immediate data in the host's order; of bytes that go past the stream, none.
    pub imm: Option<u32>,
}

/// No buffer of the peer's has that offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the peer has mapped no buffer at offset {0}")]
pub struct NoMap(pub u64);

/// A request that has not completed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Flight {
    /// Of the program's data, with so many bytes of the ring.
    Data(u32),
    /// Of the protocol.
    Control { disconnects: bool },
}

#[derive(Debug)]
pub(crate) struct Sending {
    size: u32,
    inline: u32,
    /// Where the next bytes go in the ring.
    head: u32,
    used: u32,
    /// Requests that may be posted.
    data_free: u16,
    control_free: u16,
    flight: VecDeque<Flight>,
    /// Messages sent, and up to which they may be, modulo 2^16.
    sequence: u16,
    limit: u16,
    /// The peer's buffer that is being filled.
    target: Segment,
    /// Where the next one will be told.
    next: u32,
    /// The table may have changed since it was looked at.
    look: bool,
    /// The peer's buffers that are written directly.
    maps: Vec<IoMap>,
    /// Entries of them that have changed since they were looked at.
    changed: Vec<u16>,
}

impl Sending {
    pub(crate) fn new(config: &Config) -> Self {
        Sending {
            size: config.send_buffer,
            inline: config.inline,
            head: 0,
            used: 0,
            data_free: config.send_requests - CONTROL_REQUESTS,
            control_free: CONTROL_REQUESTS,
            flight: VecDeque::new(),
            sequence: 0,
            limit: 0,
            target: Segment::default(),
            next: 1,
            look: false,
            maps: vec![IoMap::default(); config.maps.into()],
            changed: Vec::new(),
        }
    }

    pub(crate) fn begin(&mut self, credits: u16, buffer: Segment) {
        self.limit = credits;
        self.target = buffer;
    }

    pub(crate) fn granted(&mut self, limit: u16) {
        self.limit = limit;
        self.look = true;
    }

    pub(crate) fn wanted_segment(&self) -> Option<u32> {
        (self.look && self.target.length == 0).then_some(self.next)
    }

    pub(crate) fn segment(&mut self, found: Segment) {
        if found.length == 0 {
            self.look = false;
        } else {
            self.target = found;
            self.next = (self.next + 1) % SEGMENTS;
        }
    }

    pub(crate) fn map_changed(&mut self, index: u16) {
        if usize::from(index) < self.maps.len() && !self.changed.contains(&index) {
            self.changed.push(index);
        }
    }

    pub(crate) fn wanted_map(&mut self) -> Option<u16> {
        self.changed.pop()
    }

    pub(crate) fn map(&mut self, index: u16, map: IoMap) {
        if let Some(entry) = self.maps.get_mut(usize::from(index)) {
            *entry = map;
        }
    }

    fn has_room(&self) -> bool {
        self.data_free > 0 && self.size - self.used >= LOW_WATER.min(self.size / 2)
    }

    pub(crate) fn has_credit(&self) -> bool {
        self.data_free > 0 && self.sequence != self.limit
    }

    pub(crate) fn can_send(&self) -> bool {
        self.has_room() && self.has_credit() && self.target.length != 0
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.flight.is_empty()
    }

    /// How many of so many bytes fit, and where.
    fn place(&mut self, want: u32) -> (u32, Place) {
        if want <= self.inline {
            self.take(0);
            return (want, Place::Inline);
        }
        let length = want.min(self.size - self.used);
        let first = length.min(self.size - self.head);
        let ranges = [
            Range {
                offset: self.head,
                length: first,
            },
            Range {
                offset: 0,
                length: length - first,
            },
        ];
        self.head = (self.head + length) % self.size;
        self.take(length);
        (length, Place::Ring(ranges))
    }

    fn take(&mut self, ring: u32) {
        self.used += ring;
        self.data_free -= 1;
        self.flight.push_back(Flight::Data(ring));
    }

    /// Only if [`Self::can_send`].
    pub(crate) fn send(&mut self, want: u32) -> (u32, Place, Segment) {
        let at = self.target;
        let (length, place) = self.place(want.min(at.length));
        self.target.addr = at.addr.wrapping_add(length.into());
        self.target.length -= length;
        self.sequence = self.sequence.wrapping_add(1);
        (length, place, at)
    }

    /// Takes a request for a message with bytes of the protocol, but no credit: the peer gives back
    /// those of data alone. Only if [`Self::has_credit`].
    pub(crate) fn message(&mut self) {
        self.take(0);
    }

    pub(crate) fn direct(&mut self, offset: u64, want: u32) -> Result<Option<Write>, NoMap> {
        let inside = |map: &&IoMap| {
            let at = offset.checked_sub(map.offset);
            at.is_some_and(|at| at < map.segment.length.into())
        };
        let map = *self.maps.iter().find(inside).ok_or(NoMap(offset))?;
        if !self.has_room() {
            return Ok(None);
        }
        let at = offset - map.offset;
        let left = u64::from(map.segment.length) - at;
        let (length, place) = self.place(want.min(left as u32));
        Ok(Some(Write {
            length,
            place,
            addr: map.segment.addr.wrapping_add(at),
            key: map.segment.key,
            imm: None,
        }))
    }

    /// Takes a request for a message of the protocol.
    pub(crate) fn control(&mut self, disconnects: bool) -> bool {
        if self.control_free == 0 {
            return false;
        }
        self.control_free -= 1;
        self.flight.push_back(Flight::Control { disconnects });
        true
    }

    pub(crate) fn completed(&mut self) -> Option<Flight> {
        let flight = self.flight.pop_front()?;
        match flight {
            Flight::Data(ring) => {
                self.used -= ring;
                self.data_free += 1;
            }
            Flight::Control { .. } => self.control_free += 1,
        }
        Some(flight)
    }
}
