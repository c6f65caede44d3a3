//! RoCEv2 packets over UDP sockets.
//!
//! A [`Fabric`] belongs to one thread, which calls it: there are no threads and no clock inside.
//! - [`Fabric::push`] builds a packet: headers, payload and CRC, in one buffer. The payload is
//!   copied first and the CRC computed over the copy, so that it is right also when an application
//!   changes its memory meanwhile.
//! - [`Fabric::flush`] sends what was pushed. Packets of one size that go the same way leave in one
//!   system call (UDP generic segmentation offload, Linux 4.18), and several such trains too. When
//!   the socket is full, the rest stays, and the caller comes again when the fabric's
//!   descriptor is ready.
//! - [`Fabric::receive`] gives a batch of packets whose CRC and headers are right; others are
//!   counted by reason.
//!
//! Underneath is a [`Link`]: sockets ([`Udp`]), and as many layers on them as one likes, which
//! capture packets ([`Capture`]) or spoil them ([`Faults`]).

mod batch;
mod capture;
mod fabric;
mod faults;
mod link;
mod sys;
mod udp;

pub use batch::{Datagram, Datagrams, Train, Trains};
pub use capture::Capture;
pub use fabric::{Counters, Fabric, PushError, Received, To};
pub use faults::{FaultCounters, FaultRates, Faults};
pub use link::{Ecn, Link, Progress, SendCounters};
pub use udp::{Udp, UdpOptions, largest_payload, path_mtu};
