//! The network library's core: what stands behind the verbs in an application's process.
//!
//! Verbs objects are reference-counted values over one [`session`](Context::open) per process
//! with the router. Control verbs are messages and wait for their answer; posting and polling
//! touch shared memory alone, but for the doorbell of a router that sleeps. The library starts no
//! threads, installs nothing but handlers of `fork`, and makes its system calls itself, so that libraries that interpose
//! on libc's do not interpose on it.
//!
//! If the router dies, every object stays usable enough to end: work requests are completed with
//! flush errors, event streams end in a device-fatal event, destroying succeeds.

mod acks;
mod buf;
mod channel;
mod cm;
mod context;
mod cq;
mod dm;
mod link;
mod mr;
mod mw;
mod qp;
mod session;
mod slots;
mod srq;
mod xrc;

pub use buf::Buf;
pub use channel::CompChannel;
pub use cm::{CmChannel, CmGroup, CmId, CmReport, CmUp, cm_device};
pub use context::{AsyncEvent, Context, Element, Pd, device};
pub use cq::{Completion, Cq};
pub use dm::Dm;
pub use freeflow_session::{
    CmDetail, CmEvent, CmEventType, CmIdInfo, CmOption, CmParam, CmPort, CmQp, CmQpAttr,
    DeviceInfo, PortSpace,
};
pub use freeflow_shm::{Bind, Sge};
pub use freeflow_types::*;
pub use mr::{Advise, Mr, Rereg};
pub use mw::Mw;
pub use qp::{Qp, QpInit, RecvQueue, SendQueue, SendWr, UdTarget};
/// An errno value, as the man pages name it.
pub use rustix::io::Errno;
pub use session::prepare_for_fork;
pub use srq::{Srq, SrqAttr, SrqQueue};
pub use xrc::Xrcd;
