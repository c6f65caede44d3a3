//! The protocol of `rsocket(7)`: byte streams over a reliable connected queue pair, and the headers
//! of its datagrams. Wire-compatible with librdmacm's.
//!
//! Pure: no sockets, threads, clocks or memory of its own. A [`Stream`] says which work requests to
//! post and where in which buffer bytes are; who owns it copies, posts, polls, and tells it what
//! came of that.
//!
//! Each side exposes a circular receive buffer, in halves. The peer WRITEs into the half that it
//! was told of, with immediate data that says how many bytes; when it has filled the half, it goes
//! on in the next one, if it was told of that. It is told by a WRITE of a [`Segment`] into a small
//! table of its own. The number of messages that may be under way or unread is limited by credits,
//! so that each finds a receive request.

#![forbid(unsafe_code)]

mod datagram;
mod receiving;
mod sending;
mod stream;
mod wire;

pub use datagram::{DatagramHeader, UdpHeader, UdpOp};
pub use receiving::Broken;
pub use sending::{NoMap, Place, Write};
pub use stream::{Config, Local, Phase, Post, Range, Stream};
pub use wire::{ByteOrder, ConnData, Control, IoMap, Message, Refused, Segment, map_entries};
