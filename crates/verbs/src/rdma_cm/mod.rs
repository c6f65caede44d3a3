//! The C functions of librdmacm over the client's channels and ids.
//!
//! Functions here do what the library of rdma-core does beside telling the kernel: they keep the
//! fields of `struct rdma_cm_id`, make what a program leaves to them, and move queue pairs. What an
//! event does to its id is done when the program is given it (`event.rs`).

pub(crate) mod address;
pub(crate) mod addrinfo;
pub(crate) mod connection;
mod device;
pub(crate) mod endpoint;
pub(crate) mod event;
pub(crate) mod group;
pub(crate) mod id;
pub(crate) mod option;
pub(crate) mod queues;

pub(crate) use device::{free_devices, get_devices};

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freeflow_abi::*;
use freeflow_client::{CmChannel, CmId, CmReport};

use crate::objects::Base;

/// An event channel.
#[repr(C)]
pub(crate) struct Channel {
    c: rdma_event_channel,
    client: Arc<CmChannel>,
}

/// An id.
#[repr(C)]
pub(crate) struct Id {
    c: rdma_cm_id,
    client: Arc<CmId>,
    state: Mutex<State>,
}

/// An event that the program has.
#[repr(C)]
pub(crate) struct Event {
    c: rdma_cm_event,
    report: CmReport,
}

/// What the structure that programs see has no room for.
#[derive(Default)]
struct State {
    /// Its channel is its own, and calls wait for their events.
    sync: bool,
    initiator_depth: u8,
    responder_resources: u8,
    /// The connection could not be brought up here, and the program was told: what the other side
    /// says of it is no news.
    connect_error: bool,
    /// Of a listener: what each connection's queue pair is to be.
    init: Option<InitAttr>,
    /// What goes before the program's private data (`ai_connect`).
    connect_data: Vec<u8>,
    local_ece: Option<(u32, u32)>,
    remote_ece: Option<(u32, u32)>,
    members: Vec<group::Member>,
}

/// `struct ibv_qp_init_attr` to make copies of.
struct InitAttr(ibv_qp_init_attr);

// SAFETY: `Channel` is repr(C) and begins with rdma_event_channel.
unsafe impl Base for rdma_event_channel {
    type Object = Channel;
}
// SAFETY: `Id` is repr(C) and begins with rdma_cm_id.
unsafe impl Base for rdma_cm_id {
    type Object = Id;
}
// SAFETY: `Event` is repr(C) and begins with rdma_cm_event.
unsafe impl Base for rdma_cm_event {
    type Object = Event;
}

/// The client's side of an id. Unlike [`Base::object`] it leaves the fields alone that the program
/// and this library write.
///
/// # Safety
///
/// A live id of this library.
unsafe fn client<'a>(id: *mut rdma_cm_id) -> &'a Arc<CmId> {
    // SAFETY: by the caller's promise.
    unsafe { &(*id.cast::<Id>()).client }
}

/// # Safety
///
/// As for [`client`].
unsafe fn state<'a>(id: *mut rdma_cm_id) -> MutexGuard<'a, State> {
    // SAFETY: by the caller's promise.
    let state = unsafe { &(*id.cast::<Id>()).state };
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
