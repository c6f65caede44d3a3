//! Sealed memory, rings and doorbells shared between an application and the router.
//!
//! The only home of raw atomics and of memory that two processes write. Its shape:
//!
//! * [`Mapping`] (unsafe inside) maps a sealed memfd and lends it as `&[AtomicU64]`; every
//!   access through that slice is bounds-checked and free of data races by type.
//! * the views ([`QpRings`], [`SrqRing`], [`CqRing`], [`DirtyMap`], [`RegionTable`]) are safe code
//!   over such slices, so that loom checks the very code that runs.
//!
//! The peer of every word is hostile: an index is reduced modulo the ring before use, a distance
//! is compared with the ring's size by the caller, and a descriptor is decoded from one copy.

mod cq;
mod dirty;
mod qp;
mod regions;
mod srq;
mod sync;
mod wqe;

#[cfg(not(loom))]
mod doorbell;
#[cfg(not(loom))]
mod mapping;
#[cfg(not(loom))]
mod packet;
#[cfg(not(loom))]
mod peer;

pub use cq::{ARM_ANY, ARM_SOLICITED, CqRing};
pub use dirty::{DirtyMap, MAX_SLOTS};
pub use qp::{QpGeometry, QpRings};
pub use regions::{RegionEntry, RegionTable};
pub use srq::{SrqGeometry, SrqRing};
pub use sync::AtomicU64;
pub use wqe::{Bind, CompletionEntry, RecvEntry, SendEntry, Sge};

#[cfg(not(loom))]
pub use doorbell::{Doorbell, event_pair};
#[cfg(not(loom))]
pub use mapping::{Mapping, OutOfBounds, Region, sealed_memfd};
#[cfg(not(loom))]
pub use packet::{Packet, recv_packet, recv_packet_interruptible, recv_plain, send_packet};
#[cfg(not(loom))]
pub use peer::{PeerProcess, is_alive, peer_process, refuse_descriptors};
