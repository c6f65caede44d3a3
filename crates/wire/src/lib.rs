//! RoCEv2 packets: the transport headers of RC, UC, UD and XRC, and their invariant CRC.
//!
//! Pure: bytes in, values out, and back. A packet is the payload of a UDP datagram to port
//! [`UDP_PORT`]: transport headers, message data, up to three bytes of pad, and 4 bytes of CRC
//! (IBTA volume 1, chapter 9, and annex A17 for RoCEv2). Parsing never panics, and what it accepts
//! builds the same packet again, but for bits that the standard reserves.

#![forbid(unsafe_code)]

mod bytes;
pub mod cm;
mod headers;
mod icrc;
mod opcode;
mod partition;

pub use headers::{
    Aeth, AtomicEth, Bth, Deth, EmitError, Feth, Headers, NakCode, ParseError, Reth, Syndrome,
};
pub use icrc::{Addresses, BadIcrc, Flow, icrc, verify};
pub use opcode::{BthOpcode, Service};
pub use partition::tenant_pkey;

/// UDP destination port of RoCEv2 (IANA: `roce`).
pub const UDP_PORT: u16 = 4791;

/// Bytes of the invariant CRC that ends each packet.
pub const ICRC_BYTES: usize = 4;

/// Longest transport headers of any packet: BTH, XRCETH and AtomicETH.
pub const MAX_HEADER_BYTES: usize = 12 + 4 + 28;

/// P_Key of the default partition with full membership, the only one that standard RoCE uses.
pub const DEFAULT_PKEY: u16 = 0xFFFF;
