//! Two ends and what is between them: memory, queues, completions.

use std::collections::VecDeque;

use freeflow_rsocket::{Broken, Config, IoMap, Local, NoMap, Place, Post, Segment, Stream, Write};

const TABLE: u64 = 0x1000_0000;
const BUFFER: u64 = 0x2000_0000;
const MAPPED: u64 = 0x3000_0000;
const KEYS: [u32; 2] = [0x101, 0x202];

/// The byte at that place of the stream.
pub(crate) fn byte(at: u64) -> u8 {
    (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

enum Bytes {
    Given(Vec<u8>),
    /// Of the send buffer, read when the request is executed.
    Sent(Place),
}

struct Request {
    bytes: Bytes,
    addr: u64,
    key: u32,
    imm: Option<u32>,
}

enum Completion {
    Sent(bool),
    Received(u32),
}

pub(crate) struct End {
    pub(crate) stream: Stream,
    key: u32,
    table: Vec<u8>,
    buffer: Vec<u8>,
    /// Whether the byte there has not been read.
    fresh: Vec<bool>,
    send_buffer: Vec<u8>,
    /// What the peer writes directly.
    pub(crate) mapped: Vec<u8>,
    queue: VecDeque<Request>,
    completions: VecDeque<Completion>,
    receives: u32,
    pub(crate) written: u64,
    pub(crate) read: u64,
}

impl End {
    fn new(config: Config, key: u32) -> Self {
        let local = Local {
            table_addr: TABLE,
            table_key: key,
            buffer_addr: BUFFER,
            buffer_key: key,
        };
        End {
            stream: Stream::new(config, local),
            key,
            table: vec![0; config.table_bytes()],
            buffer: vec![0; config.recv_buffer as usize],
            fresh: vec![false; config.recv_buffer as usize],
            send_buffer: vec![0; config.send_buffer as usize],
            mapped: vec![0; 100_000],
            queue: VecDeque::new(),
            completions: VecDeque::new(),
            receives: config.recv_requests.into(),
            written: 0,
            read: 0,
        }
    }

    fn post(&mut self, post: &Post) {
        self.queue.push_back(Request {
            bytes: Bytes::Given(post.bytes().to_vec()),
            addr: post.addr,
            key: post.key,
            imm: post.imm,
        });
    }

    fn write(&mut self, write: &Write, bytes: &[u8]) {
        assert_eq!(bytes.len(), write.length as usize);
        let bytes = match write.place {
            Place::Inline => Bytes::Given(bytes.to_vec()),
            Place::Ring([first, second]) => {
                let (a, b) = bytes.split_at(first.length as usize);
                self.send_buffer[first.offset as usize..][..a.len()].copy_from_slice(a);
                self.send_buffer[second.offset as usize..][..b.len()].copy_from_slice(b);
                Bytes::Sent(write.place)
            }
        };
        self.queue.push_back(Request {
            bytes,
            addr: write.addr,
            key: write.key,
            imm: write.imm,
        });
        let most = usize::from(self.stream.config().send_requests);
        assert!(self.queue.len() <= most, "the send queue overflows");
    }

    /// Writes as much of so many bytes as there is room for.
    pub(crate) fn send(&mut self, bytes: u64) -> u64 {
        let before = self.written;
        let mut left = bytes;
        while let Some(write) = self.stream.send(u32::try_from(left).unwrap()) {
            let at = self.written;
            let data: Vec<u8> = (at..at + u64::from(write.length)).map(byte).collect();
            self.write(&write, &data);
            self.written += u64::from(write.length);
            left -= u64::from(write.length);
        }
        self.written - before
    }

    /// Writes the bytes where the peer has mapped something, as many as there is room for.
    pub(crate) fn send_at(&mut self, offset: u64, bytes: &[u8]) -> Result<usize, NoMap> {
        let mut done = 0;
        while done < bytes.len() {
            let left = (bytes.len() - done) as u32;
            let Some(write) = self.stream.write_at(offset + done as u64, left)? else {
                break;
            };
            let end = done + write.length as usize;
            self.write(&write, &bytes[done..end]);
            done = end;
        }
        Ok(done)
    }

    /// Maps the buffer that the peer can write.
    pub(crate) fn map(&mut self, offset: u64) -> Option<u16> {
        self.stream.map_own(IoMap {
            offset,
            segment: Segment {
                addr: MAPPED,
                key: self.key,
                length: self.mapped.len() as u32,
            },
        })
    }

    /// Reads up to so many bytes, and checks them.
    pub(crate) fn read(&mut self, most: u32) {
        let mut left = most;
        for range in self.stream.unread_ranges() {
            let length = range.length.min(left);
            for at in range.offset as usize..(range.offset + length) as usize {
                assert!(
                    std::mem::take(&mut self.fresh[at]),
                    "read what was not written"
                );
                assert_eq!(self.buffer[at], byte(self.read), "byte {}", self.read);
                self.read += 1;
            }
            left -= length;
            self.stream.consume(length);
        }
    }

    /// Takes up to so many completions, and does what is due.
    pub(crate) fn poll(&mut self, most: usize) -> Result<(), Broken> {
        for _ in 0..most {
            match self.completions.pop_front() {
                Some(Completion::Sent(success)) => self.stream.sent(success),
                Some(Completion::Received(imm)) => self.stream.received(imm)?,
                None => break,
            }
        }
        self.settle();
        Ok(())
    }

    /// Does what is due.
    pub(crate) fn settle(&mut self) {
        self.receives += self.stream.taken();
        while let Some(index) = self.stream.wanted_segment() {
            let at = &mut self.table[Config::segment_offset(index)..][..Segment::BYTES];
            let found = Segment {
                addr: u64::from_ne_bytes(at[..8].try_into().unwrap()),
                key: u32::from_ne_bytes(at[8..12].try_into().unwrap()),
                length: u32::from_ne_bytes(at[12..].try_into().unwrap()),
            };
            at[12..].fill(0);
            self.stream.segment(found);
        }
        while let Some(index) = self.stream.wanted_map() {
            let at = &self.table[Config::map_offset(index)..][..IoMap::BYTES];
            let map = IoMap {
                offset: u64::from_ne_bytes(at[..8].try_into().unwrap()),
                segment: Segment {
                    addr: u64::from_ne_bytes(at[8..16].try_into().unwrap()),
                    key: u32::from_ne_bytes(at[16..20].try_into().unwrap()),
                    length: u32::from_ne_bytes(at[20..].try_into().unwrap()),
                },
            };
            self.stream.map(index, map);
        }
        while let Some(post) = self.stream.control() {
            self.post(&post);
        }
    }

    fn place(&mut self, addr: u64, bytes: &[u8]) {
        let (memory, at) = match addr {
            MAPPED.. => (&mut self.mapped, addr - MAPPED),
            BUFFER.. => {
                let at = (addr - BUFFER) as usize;
                for fresh in &mut self.fresh[at..at + bytes.len()] {
                    assert!(!*fresh, "unread bytes are overwritten");
                    *fresh = true;
                }
                (&mut self.buffer, addr - BUFFER)
            }
            _ => {
                let at = addr - TABLE;
                let filled = at < 32 && self.table[at as usize + 12..][..4] != [0; 4];
                assert!(!filled, "a segment that is not taken is overwritten");
                (&mut self.table, at)
            }
        };
        memory[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// The peer is dead: whatever is under way fails.
    pub(crate) fn break_off(&mut self) {
        for _ in self.queue.drain(..) {
            self.completions.push_back(Completion::Sent(false));
        }
    }
}

/// A pair of connected ends.
pub(crate) struct World(pub(crate) [End; 2]);

impl World {
    pub(crate) fn new(configs: [Config; 2]) -> Self {
        let settled = configs.map(|c| c.settle(1024, 256));
        let mut ends = [End::new(settled[0], KEYS[0]), End::new(settled[1], KEYS[1])];
        let data = [0, 1].map(|i: usize| ends[i].stream.conn_data());
        ends[0].stream.connected(&data[1]);
        ends[1].stream.connected(&data[0]);
        World(ends)
    }

    /// Executes up to so many requests of an end; false: there was none that could be.
    pub(crate) fn deliver(&mut self, from: usize, most: usize) -> bool {
        let [a, b] = &mut self.0;
        let (from, to) = if from == 0 { (a, b) } else { (b, a) };
        for done in 0..most {
            let waits = |r: &Request| r.imm.is_some() && to.receives == 0;
            if from.queue.front().is_none_or(waits) {
                return done > 0;
            }
            let request = from.queue.pop_front().unwrap();
            let bytes = match request.bytes {
                Bytes::Given(bytes) => bytes,
                Bytes::Sent(Place::Ring(ranges)) => ranges
                    .iter()
                    .flat_map(|r| &from.send_buffer[r.offset as usize..][..r.length as usize])
                    .copied()
                    .collect(),
                Bytes::Sent(Place::Inline) => unreachable!(),
            };
            if !bytes.is_empty() {
                assert_eq!(request.key, to.key);
                to.place(request.addr, &bytes);
            }
            if let Some(imm) = request.imm {
                to.receives -= 1;
                to.completions.push_back(Completion::Received(imm));
            }
            from.completions.push_back(Completion::Sent(true));
        }
        true
    }

    /// Lets everything that is under way arrive, without anybody reading.
    pub(crate) fn quiesce(&mut self) -> Result<(), Broken> {
        loop {
            let delivered = [self.deliver(0, usize::MAX), self.deliver(1, usize::MAX)];
            let polled = self.0.iter().any(|end| !end.completions.is_empty());
            for end in &mut self.0 {
                end.poll(usize::MAX)?;
            }
            if delivered == [false; 2] && !polled {
                return Ok(());
            }
        }
    }

    /// Lets everything arrive and be read.
    pub(crate) fn drain(&mut self) -> Result<(), Broken> {
        loop {
            self.quiesce()?;
            let unread = self.0.iter().any(|end| end.stream.unread() > 0);
            for end in &mut self.0 {
                end.read(u32::MAX);
                end.settle();
            }
            if !unread {
                return Ok(());
            }
        }
    }
}
