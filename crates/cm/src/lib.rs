//! The connection manager: what `rdma_cm(7)` promises a program, over the messages of the
//! communication manager (IBTA volume 1, chapter 12, and annex A11).
//!
//! A [`Manager`] holds the ids of all endpoints of a host, and the connections that they have or
//! had. It is sans-IO: requests of programs, messages of other managers and the time come in with
//! calls; what is to be sent and told comes out as [`Output`]. Its order of events, its statuses
//! and what it refuses in which state are those of Linux (`drivers/infiniband/core/{cm,cma}.c`),
//! where they leave nothing undecided. It differs where theirs is worse for a program:
//!
//! - A connection outlives its id until the other side knows of its end; Linux tells it once.
//! - Of two sides that disconnect at once each answers the other.
//! - Requests that come late, after the end of their connection, are not taken for new ones.
//! - A reply to a connection that is not there any more is rejected at once.

#![forbid(unsafe_code)]

mod attr;
mod connection;
mod error;
mod gone;
mod handshake;
mod id;
mod manager;
mod ports;
mod receive;
mod requests;

pub use error::Refused;
pub use gone::answer_for_the_gone;
pub use id::{Event, Port, is_any};
pub use manager::{Arrival, Manager, Output};
pub use receive::NewId;

/// The kernel's errno values that events carry as their status.
pub mod status {
    /// No device has the address.
    pub const ENODEV: i32 = -19;
    /// There is no way to the address's network.
    pub const ENETUNREACH: i32 = -101;
    /// Nobody answered.
    pub const ETIMEDOUT: i32 = -110;
    /// Nobody has the address.
    pub const EHOSTUNREACH: i32 = -113;
}
