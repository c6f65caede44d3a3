//! The messages.

use freeflow_types::{Access, DeviceLimits, Gid, Mtu, QpAttr, QpAttrMask, QpCap, QpType, Qpn};
use serde::{Deserialize, Serialize};

use crate::cm::{CmEvent, CmIdInfo, CmQpAttr, CmRequest};
use crate::memory::{
    AdviseMr, AllocMw, DmAllocated, ExchangeSlots, MAX_ADVISED, MAX_SLOTS_AT_ONCE, MrRegistered,
    MwAllocated, RegDmMr, RegMr, ReregMr, SlotsExchanged,
};
use crate::srq::{CreateSrq, ModifySrq, OpenXrcQp, OpenXrcd, SrqCreated, SrqQueried, XrcQpOpened};

/// A handle of the session's own: opaque, with a generation in it, refused in any other session.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Handle(pub u32);

/// An errno value of Linux, as the man page of the verb promises it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Errno(pub i32);

/// Where a ring lies in the session's shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RingLocation {
    /// Index of the slab; a slab the library does not have yet comes beside the reply.
    pub slab: u32,
    /// Bytes of the whole slab.
    pub slab_len: u64,
    /// Offset in the slab.
    pub offset: u64,
    /// Bytes of the object.
    pub len: u64,
}

/// Creates a completion queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CreateCq {
    /// Context.
    pub context: Handle,
    /// Least number of entries.
    pub cqe: u32,
    /// Completion channel.
    pub channel: Option<Handle>,
    /// Completion vector.
    pub comp_vector: u32,
}

/// Creates a queue pair of any type but [`QpType::XrcRecv`], which has no queues of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CreateQp {
    /// Protection domain.
    pub pd: Handle,
    /// Transport service.
    pub qp_type: QpType,
    /// Completion queue of sends.
    pub send_cq: Handle,
    /// Completion queue of receives; [`QpType::XrcSend`] has none.
    pub recv_cq: Option<Handle>,
    /// Shared receive queue in place of its own.
    pub srq: Option<Handle>,
    /// Capacities asked for.
    pub cap: QpCap,
    /// Every send request is signaled.
    pub sq_sig_all: bool,
}

/// A request of the library.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Request {
    /// First message of a session. Answered with [`Reply::Welcome`].
    Hello {
        /// [`crate::PROTOCOL_VERSION`] of the library.
        version: u16,
    },
    /// Opens a context (`ibv_open_device`). [`Reply::Created`]; descriptor: asynchronous events.
    OpenContext,
    /// Closes it with all that is left in it. [`Reply::Done`].
    CloseContext {
        /// The context.
        context: Handle,
    },
    /// Allocates a protection domain. [`Reply::Created`].
    AllocPd {
        /// The context.
        context: Handle,
    },
    /// Frees a protection domain; EBUSY while it is used. [`Reply::Done`].
    DeallocPd {
        /// The domain.
        pd: Handle,
    },
    /// A range of shared pages. [`Reply::Pages`]; descriptor: the segment, if it is new.
    AllocPages {
        /// Bytes, a multiple of the page size.
        len: u64,
    },
    /// Gives a range back; its content is gone. ENOMEM, and it stays handed out: there would be too
    /// many free ranges with others between them. [`Reply::Done`].
    FreePages {
        /// Segment.
        segment: u32,
        /// Offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Lets the router reach the application's memory. [`Reply::Done`].
    AttachMemory,
    /// Registers memory. [`Reply::Mr`].
    RegMr(RegMr),
    /// Changes a memory region; EBUSY while a window is bound to it. [`Reply::Done`].
    ReregMr(ReregMr),
    /// Makes a region that swallows what is written and reads as zeroes. [`Reply::Mr`].
    AllocNullMr {
        /// Protection domain.
        pd: Handle,
    },
    /// Asks whether ranges may be fetched ahead. [`Reply::Done`].
    AdviseMr(AdviseMr),
    /// Deregisters memory; EBUSY while a window is bound to it. [`Reply::Done`].
    DeregMr {
        /// The region.
        mr: Handle,
    },
    /// Exchanges slots of the table of regions. [`Reply::Slots`]; descriptor: the slab, if it is
    /// new.
    ExchangeSlots(ExchangeSlots),
    /// Makes a region of the table one like all others, with the same key; its slot is given
    /// back. [`Reply::Mr`].
    AdoptMr {
        /// Its slot.
        slot: u32,
    },
    /// Waits until memory that the router is accessing is not accessed any more, unless it may be
    /// by what is registered now. [`Reply::Done`].
    Settle,
    /// What the device is now: its limits follow the endpoint's quota. [`Reply::Device`].
    QueryDevice,
    /// Allocates a memory window. [`Reply::Mw`].
    AllocMw(AllocMw),
    /// Unbinds and frees a memory window. [`Reply::Done`].
    DeallocMw {
        /// The window.
        mw: Handle,
    },
    /// Allocates device memory. [`Reply::Dm`]; descriptor: the segment, if it is new.
    AllocDm {
        /// The context.
        context: Handle,
        /// Bytes.
        len: u64,
    },
    /// Frees device memory; EBUSY while a region is in it. [`Reply::Done`].
    FreeDm {
        /// The device memory.
        dm: Handle,
    },
    /// Registers device memory. [`Reply::Mr`].
    RegDmMr(RegDmMr),
    /// Creates a completion channel. [`Reply::Created`]; descriptor: completion events.
    CreateChannel {
        /// The context.
        context: Handle,
    },
    /// Destroys it; EBUSY while a CQ uses it. [`Reply::Done`].
    DestroyChannel {
        /// The channel.
        channel: Handle,
    },
    /// Creates a completion queue. [`Reply::Cq`]; descriptor: the slab, if it is new.
    CreateCq(CreateCq),
    /// Replaces the ring of a CQ; EINVAL if its completions would not fit. [`Reply::Cq`];
    /// descriptor: the slab, if it is new. Completions in the old ring stay there, until the CQ
    /// is resized again or destroyed, for the library to read.
    ResizeCq {
        /// The queue.
        cq: Handle,
        /// Least number of entries.
        cqe: u32,
    },
    /// Moderates the events of a CQ: once armed it raises its event after so many completions, or so
    /// long after the first of them, whichever is first. A count below 2, or a period of 0, has
    /// each completion raise it at once. [`Reply::Done`].
    ModifyCq {
        /// The queue.
        cq: Handle,
        /// Completions.
        count: u16,
        /// Microseconds.
        period: u16,
    },
    /// Destroys it; EBUSY while a QP uses it. [`Reply::Done`].
    DestroyCq {
        /// The queue.
        cq: Handle,
    },
    /// Creates a queue pair. [`Reply::Qp`]; descriptor: the slab, if it is new.
    CreateQp(CreateQp),
    /// Modifies a queue pair. [`Reply::Done`].
    ModifyQp {
        /// The QP.
        qp: Handle,
        /// Attributes.
        attr: QpAttr,
        /// Which of them.
        mask: QpAttrMask,
    },
    /// Queries a queue pair. [`Reply::QpQueried`].
    QueryQp {
        /// The QP.
        qp: Handle,
    },
    /// Destroys it. [`Reply::Done`].
    DestroyQp {
        /// The QP.
        qp: Handle,
    },
    /// Attaches a datagram queue pair to a multicast group, or detaches it. [`Reply::Done`].
    Multicast {
        /// The QP.
        qp: Handle,
        /// The group.
        gid: Gid,
        /// Attach, or detach.
        attach: bool,
    },
    /// Creates a shared receive queue. [`Reply::Srq`]; descriptor: the slab, if it is new.
    CreateSrq(CreateSrq),
    /// Modifies it. [`Reply::Srq`] if it has a new ring by now (descriptor: the slab, if it is
    /// new), else [`Reply::Done`].
    ModifySrq(ModifySrq),
    /// Queries it. [`Reply::SrqQueried`].
    QuerySrq {
        /// The queue.
        srq: Handle,
    },
    /// Destroys it; EBUSY while a QP uses it. [`Reply::Done`].
    DestroySrq {
        /// The queue.
        srq: Handle,
    },
    /// Opens an XRC domain. [`Reply::Created`].
    OpenXrcd(OpenXrcd),
    /// Closes it; EBUSY while something of this session uses it. [`Reply::Done`].
    CloseXrcd {
        /// The domain.
        xrcd: Handle,
    },
    /// Creates an XRC receive queue pair, or opens one. [`Reply::XrcQp`].
    OpenXrcQp(OpenXrcQp),
    /// Modifies an XRC receive queue pair. [`Reply::Done`].
    ModifyXrcQp {
        /// The opening.
        open: Handle,
        /// Attributes.
        attr: QpAttr,
        /// Which of them.
        mask: QpAttrMask,
    },
    /// Queries an XRC receive queue pair. [`Reply::QpQueried`].
    QueryXrcQp {
        /// The opening.
        open: Handle,
    },
    /// Closes it; the last one that closes it destroys it. [`Reply::Done`].
    CloseXrcQp {
        /// The opening.
        open: Handle,
    },
    /// About the connection manager.
    Cm(CmRequest),
}

/// What the virtual device is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Node GUID, network order.
    pub node_guid: u64,
    /// The GID table; dense, RoCEv2.
    pub gids: Vec<Gid>,
    /// Limits.
    pub limits: DeviceLimits,
    /// Name of the endpoint, for messages.
    pub endpoint: String,
    /// Bytes of the router's pages of shared memory.
    pub page_size: u64,
    /// The port's MTU: what the network between hosts carries.
    pub mtu: Mtu,
    /// Whether regions of all addresses may be had: not where registered bytes are limited.
    pub implicit_regions: bool,
}

/// Answer to [`Request::Hello`]. Descriptors: the doorbell (an eventfd), then the slab that
/// `region` names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// The router's protocol version.
    pub version: u16,
    /// The device.
    pub device: DeviceInfo,
    /// The session's dirty map.
    pub region: RingLocation,
}

/// Answer to [`Request::CreateCq`] and [`Request::ResizeCq`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CqCreated {
    /// The queue.
    pub cq: Handle,
    /// Entries, a power of two.
    pub entries: u32,
    /// Its ring.
    pub ring: RingLocation,
}

/// Answer to [`Request::CreateQp`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct QpCreated {
    /// The QP.
    pub qp: Handle,
    /// Its number.
    pub qpn: Qpn,
    /// Its slot in the session's dirty map; completions carry it.
    pub slot: u32,
    /// Capacities granted.
    pub cap: QpCap,
    /// Its rings.
    pub ring: RingLocation,
}

/// Answer to [`Request::QueryQp`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct QpQueried {
    /// All attributes as they are now.
    pub attr: QpAttr,
}

/// A successful answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// To a hello.
    Welcome(Welcome),
    /// Done, nothing to say.
    Done,
    /// A new object.
    Created(Handle),
    /// A range of shared pages.
    Pages {
        /// Segment.
        segment: u32,
        /// Bytes of the whole segment.
        segment_len: u64,
        /// Offset of the range.
        offset: u64,
    },
    /// A new memory region.
    Mr(MrRegistered),
    /// Slots of the table of regions.
    Slots(SlotsExchanged),
    /// A new memory window.
    Mw(MwAllocated),
    /// Device memory.
    Dm(DmAllocated),
    /// A new completion queue.
    Cq(CqCreated),
    /// A new queue pair.
    Qp(QpCreated),
    /// Attributes.
    QpQueried(QpQueried),
    /// A shared receive queue's new ring.
    Srq(SrqCreated),
    /// A shared receive queue's attributes.
    SrqQueried(SrqQueried),
    /// An XRC receive queue pair.
    XrcQp(XrcQpOpened),
    /// The device.
    Device(DeviceInfo),
    /// What is known of an id of the connection manager.
    CmId(CmIdInfo),
    /// Its next event; none if none waits.
    CmEvent(Option<Box<CmEvent>>),
    /// Attributes for an id's queue pair.
    CmQpAttr(Box<CmQpAttr>),
    /// An id or a membership is gone, and with it those of its events that waited: as many packets
    /// of its channel's socket are void.
    CmDestroyed {
        /// Events that waited.
        events: u32,
    },
    /// An id has another channel, with so many events that waited in the old one: as many packets
    /// of the old channel's socket are void.
    CmMigrated {
        /// Events taken along.
        events: u32,
    },
}

/// Why a well-formed request cannot be meant.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} is {value}, not {least} to {limit}")]
pub struct Invalid {
    /// What is out of bounds.
    pub what: &'static str,
    /// Its value.
    pub value: u64,
    /// Least value.
    pub least: u64,
    /// Greatest value.
    pub limit: u64,
}

pub(crate) fn at_most(what: &'static str, value: u64, limit: u64) -> Result<(), Invalid> {
    if value > limit {
        Err(Invalid {
            what,
            value,
            least: 0,
            limit,
        })
    } else {
        Ok(())
    }
}

pub(crate) fn at_least_one(what: &'static str, value: u64) -> Result<(), Invalid> {
    if value == 0 {
        Err(Invalid {
            what,
            value,
            least: 1,
            limit: u64::MAX,
        })
    } else {
        Ok(())
    }
}

/// A completion queue has at least one entry (`ibv_create_cq(3)`, `ibv_resize_cq(3)`).
fn entries(cqe: u32, limits: &DeviceLimits) -> Result<(), Invalid> {
    at_least_one("cqe", cqe.into())?;
    at_most("cqe", cqe.into(), limits.max_cqe.into())
}

impl Request {
    /// Checks all bounds that do not depend on the session's state. The answer to a request
    /// that fails is EINVAL.
    pub fn validate(&self, limits: &DeviceLimits) -> Result<(), Invalid> {
        match self {
            Request::CreateCq(c) => {
                entries(c.cqe, limits)?;
                at_most(
                    "comp_vector",
                    c.comp_vector.into(),
                    u64::from(limits.comp_vectors) - 1,
                )
            }
            Request::ResizeCq { cqe, .. } => entries(*cqe, limits),
            Request::CreateQp(c) => {
                let (wr, sge) = (limits.max_qp_wr.into(), limits.max_sge.into());
                at_most("max_send_wr", c.cap.max_send_wr.into(), wr)?;
                at_most("max_recv_wr", c.cap.max_recv_wr.into(), wr)?;
                at_most("max_send_sge", c.cap.max_send_sge.into(), sge)?;
                at_most("max_recv_sge", c.cap.max_recv_sge.into(), sge)?;
                at_most(
                    "max_inline_data",
                    c.cap.max_inline.into(),
                    limits.max_inline.into(),
                )
            }
            Request::AllocPages { len } => at_most("pages", *len, limits.max_mr_size),
            Request::RegMr(r) => r.translation.validate(r.access, limits.max_mr_size),
            Request::ReregMr(r) => match &r.translation {
                Some(to) => {
                    let access = r.access.unwrap_or(Access::empty());
                    to.validate(access, limits.max_mr_size)
                }
                None => Ok(()),
            },
            Request::AdviseMr(a) => at_most("ranges", a.ranges.len() as u64, MAX_ADVISED as u64),
            Request::ExchangeSlots(e) => {
                at_most("back", e.back.len() as u64, MAX_SLOTS_AT_ONCE.into())?;
                at_most("want", e.want.into(), MAX_SLOTS_AT_ONCE.into())
            }
            Request::AllocDm { len, .. } => {
                at_least_one("length", *len)?;
                at_most("length", *len, limits.max_dm_size)
            }
            Request::RegDmMr(r) => at_most("offset", r.offset, u64::MAX - r.len),
            Request::Cm(request) => request.validate(),
            Request::CreateSrq(c) => c.validate(limits),
            Request::ModifySrq(m) => m.validate(limits),
            Request::ModifyQp { attr, .. } | Request::ModifyXrcQp { attr, .. } => {
                at_most("dest_qp_num", attr.dest_qpn.into(), Qpn::MASK.into())?;
                at_most("timeout", attr.timeout.into(), 31)
            }
            Request::Hello { .. }
            | Request::OpenContext
            | Request::CloseContext { .. }
            | Request::AllocPd { .. }
            | Request::DeallocPd { .. }
            | Request::FreePages { .. }
            | Request::AttachMemory
            | Request::AllocNullMr { .. }
            | Request::DeregMr { .. }
            | Request::AdoptMr { .. }
            | Request::Settle
            | Request::QueryDevice
            | Request::AllocMw(_)
            | Request::DeallocMw { .. }
            | Request::FreeDm { .. }
            | Request::CreateChannel { .. }
            | Request::DestroyChannel { .. }
            | Request::ModifyCq { .. }
            | Request::DestroyCq { .. }
            | Request::QueryQp { .. }
            | Request::DestroyQp { .. }
            | Request::Multicast { .. }
            | Request::QuerySrq { .. }
            | Request::DestroySrq { .. }
            | Request::OpenXrcd(_)
            | Request::CloseXrcd { .. }
            | Request::OpenXrcQp(_)
            | Request::QueryXrcQp { .. }
            | Request::CloseXrcQp { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_sizes_are_bounded() {
        let limits = DeviceLimits::default();
        let cq = |cqe| {
            Request::CreateCq(CreateCq {
                context: Handle(0),
                cqe,
                channel: None,
                comp_vector: 0,
            })
        };
        assert!(cq(0).validate(&limits).is_err());
        assert!(cq(limits.max_cqe).validate(&limits).is_ok());
        assert!(cq(limits.max_cqe + 1).validate(&limits).is_err());
        let resize = Request::ResizeCq {
            cq: Handle(0),
            cqe: 0,
        };
        assert!(resize.validate(&limits).is_err());
    }
}
