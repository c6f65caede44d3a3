//! Hosts in virtual time, and between them a network that loses, delays, reorders, doubles and
//! damages packets.
//!
//! A [`Sim`] is a star: every host has a link to one switch and back, with a rate, a delay and a
//! bounded queue. On the hosts are [`Qp`]s: the transport's own state machines with the simplest
//! executor there can be, memory in a vector. Everything follows from one seed, so a failure is
//! run again by its number. Packets are bytes between hosts, built and parsed by `freeflow-wire`.

#![forbid(unsafe_code)]

mod network;
mod qp;
mod stream;
mod world;

pub use network::{Network, Stats};
pub use qp::{BASE, Completion, KEY, Qp, Received};
pub use stream::Stream;
pub use world::{QpId, Sim};

/// Nanoseconds of a microsecond.
pub const US: u64 = 1_000;
/// Nanoseconds of a millisecond.
pub const MS: u64 = 1_000_000;
/// Nanoseconds of a second.
pub const SEC: u64 = 1_000_000_000;

/// Tries so many seeds, from 0 or from what `FREEFLOW_SEED` says; a panic names the one that
/// failed, and `FREEFLOW_SEEDS` changes their number.
pub fn seeds(count: u64, what: impl Fn(u64)) {
    struct Named(u64);
    impl Drop for Named {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("again with: FREEFLOW_SEED={} FREEFLOW_SEEDS=1", self.0);
            }
        }
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse().ok());
    let first: u64 = number("FREEFLOW_SEED").unwrap_or(0);
    let count = number("FREEFLOW_SEEDS").unwrap_or(count);
    for seed in first..first.saturating_add(count) {
        let named = Named(seed);
        what(seed);
        drop(named);
    }
}
