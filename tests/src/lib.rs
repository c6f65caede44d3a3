//! A test bed: a router of its own on this machine, endpoints on it, and programs on them.
//!
//! Tests say with [`skip`] that the machine lacks what they need; `cargo xtask test` collects
//! what was skipped and says so at its end. Every wait has a deadline.

mod bed;
mod checker;
mod compiled;
mod footprint;
mod fuse;
mod guard;
mod hosts;
mod machine;
pub mod perftest;
mod place;
mod port;
mod process;
mod victim;

pub mod packets;
pub mod raw;
pub mod rig;

pub use bed::{Bed, Endpoint, Lasting, count, dist};
pub use checker::{Checker, held};
pub use compiled::{compiled, compiled_by};
pub use footprint::Footprint;
pub use fuse::StuckFile;
pub use hosts::{Hosts, Trust, Underlay};
pub use machine::{TcpPair, dir_for_apt, have, is_root, program, skip, unpacked};
pub use place::Place;
pub use port::{free_port, wait_for_listener, wait_for_listener_of, wait_for_listener_with};
pub use process::{Ended, Running, descendants, wait_until};
pub use victim::Victim;

use std::time::Duration;

/// A program that is not done by then hangs: generous, as machines are shared.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// Where the program `reached-memory` has memory: far from where the kernel puts anything itself.
pub const REACHED: std::ops::Range<u64> = 0x3000_0000_0000..0x3000_0001_0000;

/// What a `reached-memory` that is nobody's client fills it with.
pub const UNTOUCHED: u8 = 0xC7;
