//! Event channels and ids: making, moving, binding and destroying them.

use core::ffi::{c_int, c_uint, c_void};
use std::sync::{Arc, Mutex};

use freeflow_abi::*;
use freeflow_client::{CmChannel, CmId, Errno, PortSpace, QpType};

use super::{Channel, Event, Id, State, address, client, state};
use crate::objects::{Base, code, give, minus_one, set_errno};

/// `rdma_create_event_channel(3)`.
pub(crate) unsafe extern "C" fn create_event_channel() -> *mut rdma_event_channel {
    give(CmChannel::create().map(channel))
}

fn channel(client: Arc<CmChannel>) -> Box<Channel> {
    let c = rdma_event_channel { fd: client.fd() };
    Box::new(Channel { c, client })
}

/// `rdma_destroy_event_channel(3)`. One that ids still use stays.
pub(crate) unsafe extern "C" fn destroy_event_channel(channel: *mut rdma_event_channel) {
    if channel.is_null() {
        return;
    }
    // SAFETY: the caller gives a live channel; only one that is gone is dropped.
    unsafe {
        match rdma_event_channel::object(channel).client.destroy() {
            Ok(()) => drop(rdma_event_channel::take(channel)),
            Err(errno) => set_errno(code(errno)),
        }
    }
}

fn port_space(ps: c_uint) -> Result<PortSpace, Errno> {
    match ps {
        RDMA_PS_IPOIB => Ok(PortSpace::Ipoib),
        RDMA_PS_TCP => Ok(PortSpace::Tcp),
        RDMA_PS_UDP => Ok(PortSpace::Udp),
        RDMA_PS_IB => Ok(PortSpace::Ib),
        _ => Err(Errno::INVAL),
    }
}

/// `rdma_create_id(3)`.
pub(crate) unsafe extern "C" fn create_id(
    channel: *mut rdma_event_channel,
    id: *mut *mut rdma_cm_id,
    context: *mut c_void,
    ps: c_uint,
) -> c_int {
    let qp_type = match ps {
        RDMA_PS_IPOIB | RDMA_PS_UDP => QpType::Ud,
        _ => QpType::Rc,
    };
    // SAFETY: the caller gives a live channel or null, and a place for the id.
    minus_one(unsafe { create(channel, context, ps, qp_type).map(|made| *id = made) })
}

/// Creates an id; without a channel it gets one of its own, and its calls wait for their events.
///
/// # Safety
///
/// A live channel or null.
pub(super) unsafe fn create(
    in_channel: *mut rdma_event_channel,
    context: *mut c_void,
    ps: c_uint,
    qp_type: QpType,
) -> Result<*mut rdma_cm_id, Errno> {
    let space = port_space(ps)?;
    let sync = in_channel.is_null();
    let in_channel = if sync {
        Box::into_raw(channel(CmChannel::create()?)).cast()
    } else {
        in_channel
    };
    let room = Box::<Id>::new_uninit();
    let user = room.as_ptr() as usize;
    // SAFETY: by the caller's promise, or just made.
    let made = unsafe {
        let created = rdma_event_channel::object(in_channel)
            .client
            .create_id(space, qp_type, user);
        if sync && created.is_err() {
            destroy_event_channel(in_channel);
        }
        created?
    };
    let id = Id {
        c: fields(in_channel, context, ps, qp_type.raw()),
        client: made,
        state: Mutex::new(State {
            sync,
            ..State::default()
        }),
    };
    Ok(Box::into_raw(Box::write(room, id)).cast())
}

/// The id of a request for a connection: it is like the listener, and its events go where the
/// listener's go. Gives its address.
///
/// # Safety
///
/// A live listener.
pub(super) unsafe fn accepted(client: Arc<CmId>, listener: *mut rdma_cm_id) -> usize {
    // SAFETY: by the caller's promise.
    let c = unsafe {
        let of = &raw const *listener;
        fields((*of).channel, (*of).context, (*of).ps, (*of).qp_type)
    };
    let id = Id {
        c,
        client,
        state: Mutex::default(),
    };
    Box::into_raw(Box::new(id)) as usize
}

fn fields(
    channel: *mut rdma_event_channel,
    context: *mut c_void,
    ps: c_uint,
    qp_type: c_uint,
) -> rdma_cm_id {
    let none = sockaddr_storage([0; 128]);
    let gid = ibv_gid { raw: [0; 16] };
    rdma_cm_id {
        verbs: std::ptr::null_mut(),
        channel,
        context,
        qp: std::ptr::null_mut(),
        route: rdma_route {
            addr: rdma_addr {
                src_storage: none,
                dst_storage: none,
                addr: rdma_ib_addr {
                    sgid: gid,
                    dgid: gid,
                    pkey: 0,
                },
            },
            path_rec: std::ptr::null_mut(),
            num_paths: 0,
        },
        ps,
        port_num: 0,
        event: std::ptr::null_mut(),
        send_cq_channel: std::ptr::null_mut(),
        send_cq: std::ptr::null_mut(),
        recv_cq_channel: std::ptr::null_mut(),
        recv_cq: std::ptr::null_mut(),
        srq: std::ptr::null_mut(),
        pd: std::ptr::null_mut(),
        qp_type,
    }
}

/// Acknowledges the event that an id shows of its last call.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn forget_event(id: *mut rdma_cm_id) {
    // SAFETY: by the caller's promise; the event was kept by this library.
    unsafe {
        let event = std::mem::replace(&mut (*id).event, std::ptr::null_mut());
        if !event.is_null() {
            acknowledge(event);
        }
    }
}

/// # Safety
///
/// An event that nobody uses any more.
pub(super) unsafe fn acknowledge(event: *mut rdma_cm_event) {
    // SAFETY: by the caller's promise.
    let event: Box<Event> = unsafe { rdma_cm_event::take(event) };
    event.report.acknowledge();
}

/// `rdma_destroy_id(3)`: waits until the id's events are acknowledged.
pub(crate) unsafe extern "C" fn destroy_id(id: *mut rdma_cm_id) -> c_int {
    // SAFETY: the caller gives a live id up; it is dropped when the router has forgotten it and
    // the program has no event of it.
    unsafe {
        if let Err(errno) = client(id).destroy() {
            set_errno(code(errno));
            return -1;
        }
        forget_event(id);
        client(id).wait_for_acknowledgements();
        let sync = state(id).sync;
        if sync {
            destroy_event_channel((*id).channel);
        }
        address::forget_path(id);
        drop(rdma_cm_id::take(id));
    }
    0
}

/// `rdma_migrate_id(3)`.
pub(crate) unsafe extern "C" fn migrate_id(
    id: *mut rdma_cm_id,
    channel: *mut rdma_event_channel,
) -> c_int {
    // SAFETY: the caller gives a live id, and a live channel or null.
    minus_one(unsafe { migrate(id, channel) })
}

/// # Safety
///
/// A live id, and a live channel or null.
pub(super) unsafe fn migrate(
    id: *mut rdma_cm_id,
    to: *mut rdma_event_channel,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let was_sync = state(id).sync;
        let sync = to.is_null();
        if sync && was_sync {
            return Err(Errno::INVAL);
        }
        let to = if sync {
            Box::into_raw(channel(client(id).own_channel()?)).cast()
        } else {
            to
        };
        if was_sync {
            forget_event(id);
        }
        if let Err(errno) = client(id).migrate(&rdma_event_channel::object(to).client) {
            if sync {
                destroy_event_channel(to);
            }
            return Err(errno);
        }
        let from = std::mem::replace(&mut (*id).channel, to);
        state(id).sync = sync;
        client(id).wait_for_acknowledgements();
        if was_sync {
            destroy_event_channel(from);
        }
    }
    Ok(())
}

/// `rdma_bind_addr(3)`.
pub(crate) unsafe extern "C" fn bind_addr(
    id: *mut rdma_cm_id,
    addr: *const libc::sockaddr,
) -> c_int {
    // SAFETY: the caller gives a live id and an address.
    minus_one(unsafe {
        address::socket_address(addr)
            .and_then(|addr| client(id).bind(addr))
            .and_then(|info| address::set_info(id, &info))
    })
}

/// `rdma_listen(3)`.
pub(crate) unsafe extern "C" fn listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int {
    // None, and none that makes sense: as many as there may be.
    let backlog = u32::try_from(backlog).unwrap_or(0);
    // SAFETY: the caller gives a live id.
    minus_one(unsafe {
        client(id)
            .listen(backlog)
            .and_then(|info| address::set_info(id, &info))
    })
}

/// `rdma_get_src_port(3)`, in network order.
pub(crate) unsafe extern "C" fn get_src_port(id: *mut rdma_cm_id) -> u16 {
    // SAFETY: the caller gives a live id.
    unsafe { address::port(&(*id).route.addr.src_storage) }
}

/// `rdma_get_dst_port(3)`, in network order.
pub(crate) unsafe extern "C" fn get_dst_port(id: *mut rdma_cm_id) -> u16 {
    // SAFETY: the caller gives a live id.
    unsafe { address::port(&(*id).route.addr.dst_storage) }
}
