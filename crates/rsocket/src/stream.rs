//! One end of a byte stream.

use std::collections::VecDeque;

use crate::receiving::{Broken, Grant, Receiving};
use crate::sending::{Flight, NoMap, SEGMENTS, Sending, Write};
use crate::wire::{ByteOrder, ConnData, Control, IoMap, Message, Segment, map_entries};

/// Sizes of a stream (`SOL_RDMA`, `SO_SNDBUF` and `SO_RCVBUF`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Send requests of the queue pair (`RDMA_SQSIZE`).
    pub send_requests: u16,
    /// Receive requests of the queue pair (`RDMA_RQSIZE`).
    pub recv_requests: u16,
    /// Bytes of the send buffer.
    pub send_buffer: u32,
    /// Bytes of the receive buffer.
    pub recv_buffer: u32,
    /// Most bytes that are sent without a copy in the send buffer (`RDMA_INLINE`).
    pub inline: u32,
    /// Buffers that the peer may have written directly (`RDMA_IOMAPSIZE`).
    pub maps: u16,
}

impl Default for Config {
    /// rdma-core's.
    fn default() -> Self {
        Config {
            send_requests: 384,
            recv_requests: 384,
            send_buffer: 1 << 17,
            recv_buffer: 1 << 17,
            inline: 64,
            maps: 0,
        }
    }
}

impl Config {
    /// Fewest requests.
    pub const MIN_REQUESTS: u16 = 16;
    /// Most requests: what is granted is counted modulo 2^16, and compared.
    pub const MAX_REQUESTS: u16 = 0x7FFE;
    /// Smallest buffer.
    pub const MIN_BUFFER: u32 = 4096;
    /// Largest buffer: a message of half of it can be announced.
    pub const MAX_BUFFER: u32 = 1 << 29;
    /// Inline data that messages of the protocol need.
    pub const MIN_INLINE: u32 = IoMap::BYTES as u32;

    /// The nearest sizes that are possible.
    pub fn settle(self, max_requests: u32, max_inline: u32) -> Self {
        let most = u16::try_from(max_requests).unwrap_or(u16::MAX);
        let most = most.clamp(Config::MIN_REQUESTS, Config::MAX_REQUESTS);
        let requests = |n: u16| n.clamp(Config::MIN_REQUESTS, most);
        let buffer = |n: u32| n.clamp(Config::MIN_BUFFER, Config::MAX_BUFFER) & !1;
        Config {
            send_requests: requests(self.send_requests),
            recv_requests: requests(self.recv_requests),
            send_buffer: buffer(self.send_buffer),
            recv_buffer: buffer(self.recv_buffer),
            inline: self
                .inline
                .clamp(Config::MIN_INLINE, max_inline.max(Config::MIN_INLINE)),
            maps: map_entries(self.maps),
        }
    }

    /// Bytes of the table that the peer writes: of [`Segment`]s, and behind them of [`IoMap`]s.
    pub fn table_bytes(&self) -> usize {
        SEGMENTS as usize * Segment::BYTES + usize::from(self.maps) * IoMap::BYTES
    }

    /// Where the table has the [`Segment`] of that index.
    pub fn segment_offset(index: u32) -> usize {
        index as usize * Segment::BYTES
    }

    /// Where the table has the [`IoMap`] of that index.
    pub fn map_offset(index: u16) -> usize {
        SEGMENTS as usize * Segment::BYTES + usize::from(index) * IoMap::BYTES
    }
}

/// This side's memory, as the peer is to name it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Local {
    /// Address of the table.
    pub table_addr: u64,
    /// Remote key of the table.
    pub table_key: u32,
    /// Address of the receive buffer.
    pub buffer_addr: u64,
    /// Remote key of the receive buffer.
    pub buffer_key: u32,
}

/// Part of a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Range {
    /// Where it begins.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
}

/// How far a stream is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The peer is not known.
    Opening,
    /// Both sides are there.
    Connected,
    /// It has ended; what came before may be read.
    Closed,
    /// It broke; what came before may be read.
    Broken,
}

/// A WRITE of the protocol's own to post, inline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Post {
    bytes: [u8; IoMap::BYTES],
    length: usize,
    /// The peer's address.
    pub addr: u64,
    /// The peer's key.
    pub key: u32,
    /// Immediate data in the host's order.
    pub imm: Option<u32>,
}

impl Post {
    fn new(content: &[u8], addr: u64, key: u32, imm: Option<u32>) -> Self {
        let mut bytes = [0; IoMap::BYTES];
        bytes[..content.len()].copy_from_slice(content);
        Post {
            bytes,
            length: content.len(),
            addr,
            key,
            imm,
        }
    }

    /// What to write; it may be nothing.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// What this side has mapped for the peer.
#[derive(Debug, Default)]
struct OwnMaps {
    /// By index in the peer's table: in use.
    used: Vec<bool>,
    /// To be told.
    pending: VecDeque<(u16, IoMap)>,
}

/// One end of a byte stream.
///
/// Its owner posts all it says, signaled, in order, and reports each completion. After each report
/// and each call of the program it asks for what is wanted and due: [`Stream::wanted_segment`],
/// [`Stream::wanted_map`], [`Stream::taken`], [`Stream::control`].
#[derive(Debug)]
pub struct Stream {
    config: Config,
    local: Local,
    phase: Phase,
    /// The program may send; the peer may.
    sends: bool,
    receives: bool,
    order: ByteOrder,
    /// The peer's table, and where this side writes next in it.
    table: Segment,
    table_next: u32,
    sending: Sending,
    receiving: Receiving,
    own_maps: OwnMaps,
    /// To be sent when a request is free.
    pending: Option<Control>,
    /// Nothing is sent behind it.
    disconnecting: bool,
    /// What is under way will not arrive.
    lost: bool,
    keep_alive: Option<KeepAlive>,
}

#[derive(Clone, Copy, Debug)]
struct KeepAlive {
    interval: u64,
    due: u64,
    pending: bool,
}

impl Stream {
    /// Bytes of the first [`Write`] of a long buffer: small, so that the peer begins early.
    pub const FIRST_STEP: u32 = 2048;
    /// Bytes of the later ones, which double.
    pub const MAX_STEP: u32 = 65536;

    /// An end with settled sizes.
    pub fn new(config: Config, local: Local) -> Self {
        Stream {
            config,
            local,
            phase: Phase::Opening,
            sends: true,
            receives: true,
            order: ByteOrder::NATIVE,
            table: Segment::default(),
            table_next: 1,
            sending: Sending::new(&config),
            receiving: Receiving::new(&config),
            own_maps: OwnMaps::default(),
            pending: None,
            disconnecting: false,
            lost: false,
            keep_alive: None,
        }
    }

    /// Its sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the peer is to know.
    pub fn conn_data(&self) -> ConnData {
        ConnData {
            order: ByteOrder::NATIVE,
            credits: self.config.recv_requests,
            maps: Some(self.config.maps),
            table: Segment {
                addr: self.local.table_addr,
                key: self.local.table_key,
                length: SEGMENTS,
            },
            buffer: Segment {
                addr: self.local.buffer_addr,
                key: self.local.buffer_key,
                length: self.config.recv_buffer / 2,
            },
        }
    }

    /// The connection is there.
    pub fn connected(&mut self, peer: &ConnData) {
        self.order = peer.order;
        self.table = peer.table;
        self.own_maps.used = vec![false; peer.maps.unwrap_or(0).into()];
        self.sending.begin(peer.credits, peer.buffer);
        self.phase = Phase::Connected;
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    fn is_connected(&self) -> bool {
        self.phase == Phase::Connected
    }

    fn end(&mut self, phase: Phase) {
        if matches!(self.phase, Phase::Connected | Phase::Opening) {
            self.phase = phase;
            self.sends = false;
            self.receives = false;
        }
    }

    /// The connection is gone; all that was received before has been reported.
    pub fn lost(&mut self) {
        self.lost = true;
        self.end(Phase::Closed);
    }

    /// The connection is unusable.
    pub fn fail(&mut self) {
        self.end(Phase::Broken);
    }

    /// A receive request completed, with this immediate data in the host's order.
    pub fn received(&mut self, imm: u32) -> Result<(), Broken> {
        self.receiving.took();
        let message = Message::decode(imm);
        if !self.is_connected() && !matches!(message, Some(Message::Data(_))) {
            return Ok(());
        }
        let result = match message {
            Some(Message::Data(bytes)) => self.receiving.data(bytes),
            Some(Message::Credits(limit)) => {
                self.sending.granted(limit);
                Ok(())
            }
            Some(Message::Map(index)) => {
                self.sending.map_changed(index);
                Ok(())
            }
            Some(Message::Control(control)) => {
                self.controlled(control);
                Ok(())
            }
            None => Err(Broken::Unknown(imm)),
        };
        if result.is_err() {
            self.end(Phase::Broken);
        }
        result
    }

    fn controlled(&mut self, control: Control) {
        match control {
            Control::KeepAlive => {}
            Control::Shutdown if self.sends => self.receives = false,
            // The peer is not told yet that this side has ended.
            Control::Shutdown if self.pending.is_some() => {
                self.receives = false;
                self.pending = Some(Control::Disconnect);
            }
            Control::Shutdown | Control::Disconnect => self.end(Phase::Closed),
        }
    }

    /// The oldest send request that had not completed has.
    pub fn sent(&mut self, success: bool) {
        let flight = self.sending.completed();
        if !success {
            self.end(Phase::Broken);
        } else if let Some(Flight::Control { disconnects: true }) = flight {
            self.end(Phase::Closed);
        }
    }

    /// Receive requests to post, in place of those that were taken.
    pub fn taken(&mut self) -> u32 {
        self.receiving.taken()
    }

    /// Index of the segment in the table that is needed now. Whoever reads it sets its length to
    /// zero, if it is not, before anything else is sent, and reports it in [`Stream::segment`].
    pub fn wanted_segment(&self) -> Option<u32> {
        self.sending.wanted_segment()
    }

    /// What the table had there; of length zero, nothing.
    pub fn segment(&mut self, found: Segment) {
        self.sending.segment(found);
    }

    /// Index of an [`IoMap`] that has changed in the table; it is to be reported in
    /// [`Stream::map`].
    pub fn wanted_map(&mut self) -> Option<u16> {
        self.sending.wanted_map()
    }

    /// What the table has there.
    pub fn map(&mut self, index: u16, map: IoMap) {
        self.sending.map(index, map);
    }

    /// The next message of the protocol that is due and may be posted.
    pub fn control(&mut self) -> Option<Post> {
        if !self.is_connected() || self.disconnecting {
            return None;
        }
        if self.receiving.grant_is_due() && self.sending.control(false) {
            return Some(self.grant());
        }
        if let Some(&(index, map)) = self.own_maps.pending.front()
            && self.sending.has_credit()
        {
            self.own_maps.pending.pop_front();
            self.sending.message();
            let behind = u64::from(self.table.length) * Segment::BYTES as u64
                + u64::from(index) * IoMap::BYTES as u64;
            return Some(Post::new(
                &map.to_bytes(self.order),
                self.table.addr.wrapping_add(behind),
                self.table.key,
                Some(Message::Map(index).encode()),
            ));
        }
        if let Some(control) = self.pending
            && self.sending.control(control == Control::Disconnect)
        {
            self.pending = None;
            self.disconnecting = control == Control::Disconnect;
            let imm = Message::Control(control).encode();
            return Some(Post::new(&[], 0, 0, Some(imm)));
        }
        if let Some(alive) = &mut self.keep_alive
            && alive.pending
            && self.sending.control(false)
        {
            alive.pending = false;
            // Nothing for the peer to see: that it arrives is enough.
            return Some(Post::new(&[], 0, 0, None));
        }
        None
    }

    fn grant(&mut self) -> Post {
        let Grant { limit, range } = self.receiving.grant();
        let imm = Some(Message::Credits(limit).encode());
        let Some(range) = range else {
            return Post::new(&[], 0, 0, imm);
        };
        let segment = Segment {
            addr: self.local.buffer_addr.wrapping_add(u64::from(range.offset)),
            key: self.local.buffer_key,
            length: range.length,
        };
        let at = u64::from(self.table_next) * Segment::BYTES as u64;
        self.table_next = (self.table_next + 1) % self.table.length.max(1);
        let addr = self.table.addr.wrapping_add(at);
        Post::new(&segment.to_bytes(self.order), addr, self.table.key, imm)
    }

    /// Whether the program may send: not after the end of either side.
    pub fn is_writable(&self) -> bool {
        self.sends
    }

    /// Whether more may come than is there.
    pub fn is_readable(&self) -> bool {
        self.receives
    }

    /// Whether [`Stream::send`] has room.
    pub fn can_send(&self) -> bool {
        self.is_connected()
            && self.sends
            && self.own_maps.pending.is_empty()
            && self.sending.can_send()
    }

    /// Takes some of so many bytes, more than none, to be sent. `None`: there is no room now.
    pub fn send(&mut self, want: u32) -> Option<Write> {
        if want == 0 || !self.can_send() {
            return None;
        }
        let (length, place, at) = self.sending.send(want.min(Self::MAX_STEP));
        Some(Write {
            length,
            place,
            addr: at.addr,
            key: at.key,
            imm: Some(Message::Data(length).encode()),
        })
    }

    /// Takes some of so many bytes to be written where the peer has mapped a buffer. `None`: there
    /// is no room now.
    pub fn write_at(&mut self, offset: u64, want: u32) -> Result<Option<Write>, NoMap> {
        let now = self.is_connected() && self.sends && self.own_maps.pending.is_empty();
        if want == 0 || !now {
            return Ok(None);
        }
        self.sending.direct(offset, want.min(Self::MAX_STEP))
    }

    /// Maps a buffer for the peer to write; the index by which to unmap it. `None`: the peer has no
    /// place to be told of it.
    pub fn map_own(&mut self, map: IoMap) -> Option<u16> {
        let index = self.own_maps.used.iter().position(|used| !used)?;
        self.own_maps.used[index] = true;
        let index = index as u16;
        self.own_maps.pending.push_back((index, map));
        Some(index)
    }

    /// Forgets a buffer, so that its index can be another's.
    pub fn unmap_own(&mut self, index: u16) {
        if let Some(used) = self.own_maps.used.get_mut(usize::from(index)) {
            *used = false;
        }
        self.own_maps.pending.retain(|&(other, _)| other != index);
    }

    /// Bytes that can be read.
    pub fn unread(&self) -> u32 {
        self.receiving.unread()
    }

    /// Where in the receive buffer they are, in this order; the second part may be empty.
    pub fn unread_ranges(&self) -> [Range; 2] {
        self.receiving.ranges()
    }

    /// So many of them were read.
    pub fn consume(&mut self, bytes: u32) {
        self.receiving.consume(bytes);
    }

    /// The program sends no more; behind what it has sent, the peer is told so.
    pub fn shutdown_send(&mut self) {
        if self.is_connected() && self.sends {
            self.sends = false;
            self.pending = Some(if self.receives {
                Control::Shutdown
            } else {
                Control::Disconnect
            });
        }
    }

    /// The program reads no more. If it does not send either, the peer is told so.
    pub fn shutdown_receive(&mut self) {
        if self.is_connected() && self.receives {
            self.receives = false;
            if !self.sends {
                self.pending = Some(Control::Disconnect);
            }
        }
    }

    /// The program neither sends nor reads any more.
    pub fn disconnect(&mut self) {
        if self.is_connected() && !self.disconnecting {
            self.sends = false;
            self.receives = false;
            self.pending = Some(Control::Disconnect);
        }
    }

    /// Whether nothing is left to be sent or to complete, or never will be.
    pub fn is_flushed(&self) -> bool {
        let waits = match self.phase {
            Phase::Connected => self.pending.is_some() || !self.sending.is_idle(),
            // What was sent before both ended is the peer's to read.
            Phase::Closed => !self.lost && !self.sending.is_idle(),
            Phase::Opening | Phase::Broken => false,
        };
        !waits
    }

    /// Has the peer's existence asked for at that interval; `None`: no more. Times are nanoseconds
    /// of any monotonic clock.
    pub fn keep_alive(&mut self, interval: Option<u64>, now: u64) {
        self.keep_alive = interval.map(|interval| KeepAlive {
            interval,
            due: now.saturating_add(interval),
            pending: false,
        });
    }

    /// When [`Stream::tick`] has something to do.
    pub fn deadline(&self) -> Option<u64> {
        let alive = self.keep_alive.filter(|_| self.is_connected())?;
        Some(alive.due)
    }

    /// Tells the time.
    pub fn tick(&mut self, now: u64) {
        if let Some(alive) = &mut self.keep_alive
            && alive.due <= now
        {
            alive.pending = true;
            alive.due = now.saturating_add(alive.interval);
        }
    }
}
