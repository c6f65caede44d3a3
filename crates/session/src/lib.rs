//! Messages between the network library and the router, and the checks on them.
//!
//! A session is one `SOCK_SEQPACKET` connection to an endpoint's socket: one packet is one
//! message, encoded with postcard. The library sends a [`Request`] and waits for its [`Reply`];
//! descriptors travel beside a reply as `SCM_RIGHTS`, in the order that the reply's
//! documentation gives. The library never sends descriptors.
//!
//! Everything a [`Request`] says is untrusted: [`decode_request`] refuses what is not well
//! formed, and [`Request::validate`] what is out of any bound that does not depend on the
//! session's state. What does depend on it (handles, quotas, states) the router checks.

#![forbid(unsafe_code)]

mod cm;
mod codec;
mod event;
mod memory;
mod message;
mod srq;

pub use cm::{
    CmBringUp, CmDetail, CmEvent, CmEventType, CmIdInfo, CmOption, CmParam, CmPort, CmQp, CmQpAttr,
    CmRequest, MAX_PRIVATE_DATA, PortSpace,
};
pub use codec::{DecodeError, decode_reply, decode_request, encode_reply, encode_request};
pub use event::Event;
pub use memory::{
    AdviseMr, AdvisedRange, AllocMw, DmAllocated, ExchangeSlots, MAX_ADVISED, MAX_PIECES,
    MAX_SLOTS_AT_ONCE, MrRegistered, MwAllocated, PieceDesc, PieceKind, REGION_SLOTS, RegDmMr,
    RegMr, RegionSlot, ReregMr, SlotsExchanged, Translation, may_be_in_table,
};
pub use message::{
    CqCreated, CreateCq, CreateQp, DeviceInfo, Errno, Handle, Invalid, QpCreated, QpQueried, Reply,
    Request, RingLocation, Welcome,
};
pub use srq::{
    CreateSrq, FileId, ModifySrq, OpenXrcQp, OpenXrcd, SrqCreated, SrqQueried, XrcQpOpened, XrcSrq,
};

/// Version of the protocol; a router serves the version it names in [`Welcome`] alone.
pub const PROTOCOL_VERSION: u16 = 4;

/// Largest encoded message, either way.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Most descriptors beside one reply.
pub const MAX_FDS: usize = 4;
