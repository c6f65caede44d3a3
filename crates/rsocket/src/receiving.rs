//! The side that receives: the circular buffer and what the peer was told of it.

use std::collections::VecDeque;

use crate::stream::{Config, Range};

/// The peer broke a rule of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Broken {
    /// It announced more bytes than it was given room for.
    #[error("the peer announced {announced} bytes and had room for {room}")]
    Room {
        /// What it announced.
        announced: u32,
        /// What it had room for.
        room: u32,
    },
    /// It sent more messages than it had credits for.
    #[error("the peer sent more than {0} messages without a credit")]
    Credits(u16),
    /// Its message is none of the protocol.
    #[error("the peer sent a message unknown to the rsocket protocol: {0:#010x}")]
    Unknown(u32),
}

#[derive(Debug)]
pub(crate) struct Receiving {
    /// Of the buffer, in two halves.
    half: u32,
    requests: u16,
    /// Bytes of messages that are not read.
    messages: VecDeque<u32>,
    unread: u32,
    /// Where they begin.
    at: u32,
    /// What the peer may write.
    exposed: u32,
    /// What was read, or never exposed, and where that begins.
    free: u32,
    free_at: u32,
    /// Messages read, and when the next grant is due, modulo 2^16.
    sequence: u16,
    due: u16,
    /// Receive requests that were taken and are to be posted again.
    taken: u32,
}

/// What to tell the peer.
pub(crate) struct Grant {
    /// Up to which message it may send.
    pub(crate) limit: u16,
    /// Part of the buffer that it may write.
    pub(crate) range: Option<Range>,
}

impl Receiving {
    pub(crate) fn new(config: &Config) -> Self {
        let half = config.recv_buffer / 2;
        Receiving {
            half,
            requests: config.recv_requests,
            messages: VecDeque::new(),
            unread: 0,
            at: 0,
            exposed: half,
            free: half,
            free_at: half,
            sequence: 0,
            due: config.recv_requests / 2,
            taken: 0,
        }
    }

    /// A receive request was taken.
    pub(crate) fn took(&mut self) {
        self.taken += 1;
    }

    pub(crate) fn taken(&mut self) -> u32 {
        std::mem::take(&mut self.taken)
    }

    pub(crate) fn data(&mut self, announced: u32) -> Result<(), Broken> {
        if announced > self.exposed {
            let room = self.exposed;
            return Err(Broken::Room { announced, room });
        }
        if self.messages.len() >= self.requests.into() {
            return Err(Broken::Credits(self.requests));
        }
        self.exposed -= announced;
        self.unread += announced;
        self.messages.push_back(announced);
        self.drop_read();
        Ok(())
    }

    fn drop_read(&mut self) {
        while self.messages.front() == Some(&0) {
            self.messages.pop_front();
            self.sequence = self.sequence.wrapping_add(1);
        }
    }

    pub(crate) fn unread(&self) -> u32 {
        self.unread
    }

    pub(crate) fn ranges(&self) -> [Range; 2] {
        let first = self.unread.min(2 * self.half - self.at);
        [
            Range {
                offset: self.at,
                length: first,
            },
            Range {
                offset: 0,
                length: self.unread - first,
            },
        ]
    }

    pub(crate) fn consume(&mut self, bytes: u32) {
        let bytes = bytes.min(self.unread);
        self.at = (self.at + bytes) % (2 * self.half);
        self.free += bytes;
        self.unread -= bytes;
        let mut left = bytes;
        for message in &mut self.messages {
            let part = left.min(*message);
            *message -= part;
            left -= part;
            if left == 0 {
                break;
            }
        }
        self.drop_read();
    }

    pub(crate) fn grant_is_due(&self) -> bool {
        self.free >= self.half || self.sequence.wrapping_sub(self.due) < 1 << 15
    }

    pub(crate) fn grant(&mut self) -> Grant {
        self.due = self.sequence.wrapping_add(self.requests / 2);
        let range = (self.free >= self.half).then(|| {
            let range = Range {
                offset: self.free_at,
                length: self.half,
            };
            self.free -= self.half;
            self.exposed += self.half;
            self.free_at = (self.free_at + self.half) % (2 * self.half);
            range
        });
        Grant {
            limit: self.sequence.wrapping_add(self.requests),
            range,
        }
    }
}
