//! Endpoints: an id with its queue pair, in one call.

use core::ffi::{c_int, c_void};

use freeflow_abi::*;
use freeflow_client::{Errno, QpType};

use super::event::{complete, errno, get};
use super::{InitAttr, address, client, connection, id, option, queues, state};
use crate::objects::minus_one;

/// What finding the way may take, and the route, in milliseconds.
const RESOLVE_TIME: c_int = 2000;

/// `rdma_create_ep(3)`.
pub(crate) unsafe extern "C" fn create_ep(
    made: *mut *mut rdma_cm_id,
    info: *mut rdma_addrinfo,
    pd: *mut ibv_pd,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: the caller gives a place for the id, an address, a live domain or null, and
    // attributes or null.
    minus_one(unsafe {
        let info = &*info;
        let qp_type = QpType::from_raw(info.ai_qp_type as u32).ok_or(Errno::INVAL);
        let created = qp_type.and_then(|qp_type| {
            let ps = info.ai_port_space as u32;
            id::create(std::ptr::null_mut(), std::ptr::null_mut(), ps, qp_type)
        });
        created.and_then(|new| {
            let done = if info.ai_flags & RAI_PASSIVE != 0 {
                passive(new, info, pd, init)
            } else {
                active(new, info, pd, init)
            };
            match done {
                Ok(()) => *made = new,
                Err(_) => destroy_ep(new),
            }
            done
        })
    })
}

/// # Safety
///
/// A live id, and the rest as for [`create_ep`].
unsafe fn passive(
    id: *mut rdma_cm_id,
    info: &rdma_addrinfo,
    pd: *mut ibv_pd,
    init: *mut ibv_qp_init_attr,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let bound = client(id).bind(address::socket_address(info.ai_src_addr.cast())?)?;
        address::set_info(id, &bound)?;
        if !pd.is_null() {
            (*id).pd = pd;
        }
        if let Some(init) = init.as_ref() {
            state(id).init = Some(InitAttr(ibv_qp_init_attr {
                qp_type: info.ai_qp_type as u32,
                ..copy(init)
            }));
        }
    }
    Ok(())
}

/// # Safety
///
/// As for [`passive`].
unsafe fn active(
    id: *mut rdma_cm_id,
    info: &rdma_addrinfo,
    pd: *mut ibv_pd,
    init: *mut ibv_qp_init_attr,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let (src, dst) = (info.ai_src_addr.cast(), info.ai_dst_addr.cast());
        connection::resolve(id, src, dst, RESOLVE_TIME)?;
        if info.ai_route_len == 0 {
            connection::route(id, RESOLVE_TIME)?;
        } else {
            option::set_path(id, info.ai_route.cast(), info.ai_route_len)?;
            complete(id)?;
        }
        if let Some(init) = init.as_mut() {
            init.qp_type = info.ai_qp_type as u32;
            queues::create_plain(id, pd, init)?;
        }
        if info.ai_connect_len != 0 && !info.ai_connect.is_null() {
            let data: *const u8 = info.ai_connect.cast();
            let data = std::slice::from_raw_parts(data, info.ai_connect_len);
            state(id).connect_data = data.to_vec();
        }
    }
    Ok(())
}

fn copy(init: &ibv_qp_init_attr) -> ibv_qp_init_attr {
    ibv_qp_init_attr {
        qp_context: init.qp_context,
        send_cq: init.send_cq,
        recv_cq: init.recv_cq,
        srq: init.srq,
        cap: init.cap,
        qp_type: init.qp_type,
        sq_sig_all: init.sq_sig_all,
    }
}

/// `rdma_destroy_ep(3)`.
pub(crate) unsafe extern "C" fn destroy_ep(id: *mut rdma_cm_id) {
    // SAFETY: the caller gives a live id up.
    unsafe {
        if !(*id).qp.is_null() {
            queues::destroy_qp(id);
        }
        if !(*id).srq.is_null() {
            queues::destroy_srq(id);
        }
        id::destroy_id(id);
    }
}

/// `rdma_get_request(3)`: of a listener whose calls wait for their events.
pub(crate) unsafe extern "C" fn get_request(
    listener: *mut rdma_cm_id,
    id: *mut *mut rdma_cm_id,
) -> c_int {
    // SAFETY: the caller gives a live id, and a place for the new one.
    minus_one(unsafe { request(listener).map(|new| *id = new) })
}

/// # Safety
///
/// A live id.
unsafe fn request(listener: *mut rdma_cm_id) -> Result<*mut rdma_cm_id, Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        if !state(listener).sync {
            return Err(Errno::INVAL);
        }
        id::forget_event(listener);
        let event = get((*listener).channel)?;
        let answer = accepted(listener, event);
        if answer.is_err() {
            (*listener).event = event;
        }
        answer
    }
}

/// # Safety
///
/// A live listener, and an event of its channel.
unsafe fn accepted(
    listener: *mut rdma_cm_id,
    event: *mut rdma_cm_event,
) -> Result<*mut rdma_cm_id, Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        match ((*event).event, (*event).status) {
            (RDMA_CM_EVENT_CONNECT_REQUEST, 0) => {}
            (RDMA_CM_EVENT_DEVICE_REMOVAL, _) => return Err(Errno::NODEV),
            (_, 0) => return Err(Errno::INVAL),
            (_, status) => return Err(errno(status)),
        }
        let new = (*event).id;
        let init = state(listener).init.as_ref().map(|init| copy(&init.0));
        if let Some(mut init) = init {
            queues::create_plain(new, (*listener).pd, &mut init)?;
        }
        (*new).event = event;
        Ok(new)
    }
}

/// `rdma_resolve_addrinfo(3)` and `rdma_query_addrinfo(3)`: names are not resolved in the
/// background.
pub(crate) unsafe extern "C" fn no_addrinfo(_id: *mut rdma_cm_id, _info: *mut c_void) -> c_int {
    minus_one(Err(Errno::OPNOTSUPP))
}
