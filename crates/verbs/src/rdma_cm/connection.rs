//! Finding the way, connecting, accepting, and ending connections.

use core::ffi::{c_int, c_uint, c_void};

use freeflow_abi::*;
use freeflow_client::{AsyncEventType, CmParam, CmQp, Errno, QpState, QpType, Qpn};

use super::event::{complete, respond};
use super::{State, address, client, queues, state};
use crate::objects::minus_one;

/// Retries of a program that says nothing, after timeouts and RNR NAKs.
const RETRIES: u8 = 7;

/// `rdma_resolve_addr(3)`.
pub(crate) unsafe extern "C" fn resolve_addr(
    id: *mut rdma_cm_id,
    src: *const libc::sockaddr,
    dst: *const libc::sockaddr,
    timeout_ms: c_int,
) -> c_int {
    // SAFETY: the caller gives a live id, and addresses.
    minus_one(unsafe { resolve(id, src, dst, timeout_ms) })
}

/// # Safety
///
/// A live id, and addresses; the source may be null.
pub(super) unsafe fn resolve(
    id: *mut rdma_cm_id,
    src: *const libc::sockaddr,
    dst: *const libc::sockaddr,
    timeout_ms: c_int,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let dst = address::socket_address(dst)?;
        let src = if src.is_null() {
            None
        } else {
            Some(address::socket_address(src)?)
        };
        // Before the event, which may be another thread's.
        (*id).route.addr.dst_storage = address::storage(dst);
        client(id).resolve_addr(src, dst, milliseconds(timeout_ms))?;
        complete(id)
    }
}

fn milliseconds(timeout: c_int) -> u32 {
    u32::try_from(timeout).unwrap_or(0)
}

/// `rdma_resolve_route(3)`.
pub(crate) unsafe extern "C" fn resolve_route(id: *mut rdma_cm_id, timeout_ms: c_int) -> c_int {
    // SAFETY: the caller gives a live id.
    minus_one(unsafe { route(id, timeout_ms) })
}

/// # Safety
///
/// A live id.
pub(super) unsafe fn route(id: *mut rdma_cm_id, timeout_ms: c_int) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        client(id).resolve_route(milliseconds(timeout_ms))?;
        complete(id)
    }
}

/// What the device can is enough for what a program asks for.
///
/// # Safety
///
/// A live id.
unsafe fn check(id: *mut rdma_cm_id, param: Option<&rdma_conn_param>) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    let (ps, has_qp, most) = unsafe { ((*id).ps, !(*id).qp.is_null(), client(id).max_rd_atomic()) };
    if ps != RDMA_PS_TCP {
        return Ok(());
    }
    let Some(param) = param else {
        return if has_qp { Ok(()) } else { Err(Errno::INVAL) };
    };
    let within = |value: u8, any: u8| value == any || value <= most;
    let resources = within(param.responder_resources, RDMA_MAX_RESP_RES);
    if resources && within(param.initiator_depth, RDMA_MAX_INIT_DEPTH) {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}

/// What is told the other side.
///
/// # Safety
///
/// A live id, and parameters with as much private data as they say.
unsafe fn parameters(
    id: *mut rdma_cm_id,
    param: Option<&rdma_conn_param>,
    state: &State,
) -> Result<CmParam, Errno> {
    // SAFETY: by the caller's promise.
    let qp = unsafe {
        let qp_type = QpType::from_raw((*id).qp_type).ok_or(Errno::INVAL)?;
        match (*id).qp.as_ref() {
            Some(qp) => CmQp {
                qpn: Qpn::new(qp.qp_num),
                qp_type,
                srq: !qp.srq.is_null(),
            },
            None => CmQp {
                qpn: Qpn::new(param.map_or(0, |param| param.qp_num)),
                qp_type,
                srq: param.is_some_and(|param| param.srq != 0),
            },
        }
    };
    let mut private_data = state.connect_data.clone();
    if let Some(param) = param {
        // SAFETY: by the caller's promise.
        private_data.extend(unsafe { bytes(param.private_data, param.private_data_len) });
    }
    Ok(CmParam {
        qp,
        private_data,
        responder_resources: state.responder_resources,
        initiator_depth: state.initiator_depth,
        flow_control: param.is_some_and(|param| param.flow_control != 0),
        retry_count: param.map_or(RETRIES, |param| param.retry_count.min(RETRIES)),
        rnr_retry_count: param.map_or(RETRIES, |param| param.rnr_retry_count.min(RETRIES)),
        qkey: None,
        ece: state.local_ece,
    })
}

/// # Safety
///
/// Null, or as many bytes.
unsafe fn bytes<'a>(data: *const c_void, len: u8) -> &'a [u8] {
    if data.is_null() {
        return &[];
    }
    // SAFETY: by the caller's promise.
    unsafe { std::slice::from_raw_parts(data.cast(), len.into()) }
}

/// `rdma_connect(3)`.
pub(crate) unsafe extern "C" fn connect(
    id: *mut rdma_cm_id,
    param: *const rdma_conn_param,
) -> c_int {
    // SAFETY: the caller gives a live id, and parameters or null.
    minus_one(unsafe { begin(id, param.as_ref()) })
}

/// # Safety
///
/// A live id, and parameters with as much private data as they say.
unsafe fn begin(id: *mut rdma_cm_id, param: Option<&rdma_conn_param>) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        check(id, param)?;
        let told = {
            let mut state = state(id);
            let most = client(id).max_rd_atomic();
            let wanted = |value: Option<u8>, any: u8| value.filter(|&v| v != any).unwrap_or(most);
            let depth = param.map(|param| param.initiator_depth);
            let resources = param.map(|param| param.responder_resources);
            state.initiator_depth = wanted(depth, RDMA_MAX_INIT_DEPTH);
            state.responder_resources = wanted(resources, RDMA_MAX_RESP_RES);
            parameters(id, param, &state)?
        };
        client(id).connect(told)?;
        state(id).connect_data.clear();
        complete(id)
    }
}

/// `rdma_accept(3)`.
pub(crate) unsafe extern "C" fn accept(
    id: *mut rdma_cm_id,
    param: *const rdma_conn_param,
) -> c_int {
    // SAFETY: the caller gives a live id, and parameters or null.
    minus_one(unsafe { answer(id, param.as_ref()) })
}

/// # Safety
///
/// As for [`begin`].
unsafe fn answer(id: *mut rdma_cm_id, param: Option<&rdma_conn_param>) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        check(id, param)?;
        if param.is_none() && (*id).qp.is_null() {
            return Err(Errno::INVAL);
        }
        let (told, resources, depth) = {
            let mut state = state(id);
            let most = client(id).max_rd_atomic();
            // What the other side asked for is there already.
            let depth = param.map(|param| param.initiator_depth);
            let resources = param.map(|param| param.responder_resources);
            state.initiator_depth = depth
                .filter(|&depth| depth != RDMA_MAX_INIT_DEPTH)
                .unwrap_or(state.initiator_depth.min(most));
            state.responder_resources = resources
                .filter(|&resources| resources != RDMA_MAX_RESP_RES)
                .unwrap_or(state.responder_resources.min(most));
            let told = parameters(id, param, &state)?;
            (told, state.responder_resources, state.initiator_depth)
        };
        let connects = (*id).qp_type != IBV_QPT_UD;
        if !connects {
            return client(id).accept(Some(told));
        }
        let before = queues::state(id);
        if let Err(errno) = queues::accept(id, Some(told), (resources, depth)) {
            // It was brought up now, and not by an earlier call, for nothing.
            let up = Some(QpState::Rts.raw());
            if queues::state(id) == up && before != up {
                let _ = queues::fail(id);
            }
            return Err(errno);
        }
        complete(id)
    }
}

/// `rdma_establish(3)`: of an id without a queue pair.
pub(crate) unsafe extern "C" fn establish(id: *mut rdma_cm_id) -> c_int {
    // SAFETY: the caller gives a live id.
    minus_one(unsafe {
        if (*id).qp.is_null() {
            respond(id)
        } else {
            Err(Errno::INVAL)
        }
    })
}

/// `rdma_reject(3)`.
pub(crate) unsafe extern "C" fn reject(
    id: *mut rdma_cm_id,
    private_data: *const c_void,
    private_data_len: u8,
) -> c_int {
    // SAFETY: the caller gives a live id, and data or null.
    minus_one(unsafe {
        let data = bytes(private_data, private_data_len).to_vec();
        client(id).reject(data, false)
    })
}

/// `rdma_reject_ece(3)`.
pub(crate) unsafe extern "C" fn reject_ece(
    id: *mut rdma_cm_id,
    private_data: *const c_void,
    private_data_len: u8,
) -> c_int {
    // SAFETY: the caller gives a live id, and data or null.
    minus_one(unsafe {
        let data = bytes(private_data, private_data_len).to_vec();
        client(id).reject(data, true)
    })
}

/// `rdma_disconnect(3)`.
pub(crate) unsafe extern "C" fn disconnect(id: *mut rdma_cm_id) -> c_int {
    // SAFETY: the caller gives a live id.
    minus_one(unsafe {
        if (*id).verbs.is_null() {
            Err(Errno::INVAL)
        } else {
            queues::disconnect(id).and_then(|()| complete(id))
        }
    })
}

/// `rdma_notify(3)`.
pub(crate) unsafe extern "C" fn notify(id: *mut rdma_cm_id, event: c_uint) -> c_int {
    // SAFETY: the caller gives a live id.
    let id = unsafe { client(id) };
    minus_one(
        AsyncEventType::from_raw(event)
            .ok_or(Errno::INVAL)
            .and_then(|event| id.notify(event)),
    )
}
