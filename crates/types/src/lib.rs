//! Newtypes and constants that every FreeFlow crate speaks.
//!
//! Pure: no sockets, threads, clocks or unsafe code. Numeric values of the verbs enumerations
//! are those of `<infiniband/verbs.h>`, so that the C boundary converts without tables.

#![forbid(unsafe_code)]

mod attr;
mod ids;
mod verbs;

pub use attr::{AddressVector, QpAttr, QpAttrMask, QpCap};
pub use ids::{Gid, Key, Psn, Qpn, TenantId, VirtualIp};
pub use verbs::{
    Access, AsyncEventType, DeviceLimits, FlushSpec, Mtu, MwType, Opcode, QpState, QpType,
    SendFlags, WcFlags, WcOpcode, WcStatus, rnr_timer_ns, timeout_ns,
};

/// Bytes of the Global Routing Header space in front of every datagram received
/// (IBTA volume 1, 11.4.1.2: the first 40 bytes of a UD receive buffer).
pub const GRH_BYTES: u32 = 40;

/// Longest message of a connected queue pair: 2^31 bytes (IBTA volume 1, 9.3.1).
pub const MAX_MESSAGE: u64 = 1 << 31;
