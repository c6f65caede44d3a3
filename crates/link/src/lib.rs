//! The control connections between routers.
//!
//! Each pair of hosts has one TCP connection, by which each knows that the other is there, in which
//! incarnation, and what both can do. With an [`Identity`] it is TLS 1.3, and both sides show a
//! certificate for their address; without one, a host is whoever speaks from its address.
//!
//! [`Talk`] is what is said, as a plain value that takes bytes and the time; [`Links`] is the thread
//! that owns the sockets.

#![forbid(unsafe_code)]

mod backoff;
mod connection;
mod identity;
mod links;
mod message;
mod peer;
pub mod pki;
mod talk;

pub use identity::{Expiry, Identity, IdentityError, Part, is_host_name};
pub use links::{Config, LinkError, Links, Observer, PeerSpec, Status};
pub use message::{
    DecodeError, Frames, HEADER_CRC, Hello, MAX_FRAME, MAX_SEGMENT, MIN_SEGMENT, Message, Preamble,
    SELECTIVE, VERSIONS, decode, encode,
};
pub use talk::{Agreed, Ended, Heard, Talk};

/// TCP port of routers, unless another one is chosen.
pub const DEFAULT_PORT: u16 = 4792;
