//! Events: what they do to their id, and how programs see them.

use core::ffi::{c_char, c_int, c_uint};
use std::ffi::CStr;
use std::sync::Arc;

use freeflow_abi::*;
use freeflow_client::{CmDetail, CmEvent, CmEventType, CmId, CmReport, Errno, QpState};

use super::{Event, address, client, group, id, queues, state};
use crate::objects::{Base, code, minus_one};

/// `rdma_get_cm_event(3)`.
pub(crate) unsafe extern "C" fn get_cm_event(
    channel: *mut rdma_event_channel,
    event: *mut *mut rdma_cm_event,
) -> c_int {
    if channel.is_null() || event.is_null() {
        return minus_one(Err(Errno::INVAL));
    }
    // SAFETY: the caller gives a live channel and a place for the event.
    minus_one(unsafe { get(channel).map(|got| *event = got) })
}

/// `rdma_ack_cm_event(3)`.
pub(crate) unsafe extern "C" fn ack_cm_event(event: *mut rdma_cm_event) -> c_int {
    if event.is_null() {
        return minus_one(Err(Errno::INVAL));
    }
    // SAFETY: the caller gives an event back that it was given.
    unsafe { id::acknowledge(event) };
    0
}

/// The next event of a channel; what it does to its id is done.
///
/// # Safety
///
/// A live channel.
pub(super) unsafe fn get(channel: *mut rdma_event_channel) -> Result<*mut rdma_cm_event, Errno> {
    // Held while one waits: another thread may destroy the channel.
    // SAFETY: by the caller's promise.
    let from = unsafe { rdma_event_channel::object(channel) }
        .client
        .clone();
    loop {
        // SAFETY: the listener is not destroyed before it has its turn.
        let accepted = |new: &_, listener: &CmId| unsafe {
            id::accepted(Arc::clone(new), listener.user() as _)
        };
        let report = from.get_event(accepted)?;
        // SAFETY: an id lives until its events are acknowledged.
        if let Some(event) = unsafe { process(report) } {
            return Ok(Box::into_raw(event).cast());
        }
    }
}

/// Does what an event does to its id. None: it is nothing that the program should see.
///
/// # Safety
///
/// The id, and that of a request, are live.
unsafe fn process(report: CmReport) -> Option<Box<Event>> {
    let listener = report.id.user() as *mut rdma_cm_id;
    let event = &report.event;
    let new_id = report.new_id.as_ref().map(|id| id.user());
    let of = new_id.map_or(listener, |user| user as *mut rdma_cm_id);
    let mut c = rdma_cm_event {
        id: of,
        listen_id: std::ptr::null_mut(),
        event: event.event as c_uint,
        status: event.status,
        param: param(event),
    };
    // SAFETY: by the caller's promise.
    unsafe {
        match event.event {
            CmEventType::AddrResolved => {
                let done = address::set_info(of, &event.info);
                turn_into(&mut c, RDMA_CM_EVENT_ADDR_ERROR, done);
            }
            CmEventType::RouteResolved => address::set_path(of, &event.info),
            CmEventType::ConnectRequest => {
                c.listen_id = listener;
                if request(listener, of, event).is_err() {
                    // Nobody could answer it.
                    id::destroy_id(of);
                    report.acknowledge();
                    return None;
                }
            }
            CmEventType::ConnectResponse => {
                state(of).remote_ece = event.ece;
                if !(*of).qp.is_null() {
                    match respond(of) {
                        Ok(()) => c.event = RDMA_CM_EVENT_ESTABLISHED,
                        failed => {
                            state(of).connect_error = true;
                            turn_into(&mut c, RDMA_CM_EVENT_CONNECT_ERROR, failed);
                        }
                    }
                }
            }
            CmEventType::Rejected | CmEventType::Disconnected if state(of).connect_error => {
                report.acknowledge();
                return None;
            }
            CmEventType::Rejected => {
                // A queue pair that is gone with its router needs no more.
                let _ = queues::fail(of);
            }
            CmEventType::MulticastJoin | CmEventType::MulticastError => {
                let (context, done) = group::joined(of, &report);
                c.param.ud.private_data = context;
                turn_into(&mut c, RDMA_CM_EVENT_MULTICAST_ERROR, done);
            }
            _ => {}
        }
    }
    Some(Box::new(Event { c, report }))
}

fn turn_into(c: &mut rdma_cm_event, kind: c_uint, done: Result<(), Errno>) {
    if let Err(errno) = done {
        (c.event, c.status) = (kind, -code(errno));
    }
}

/// A request for a connection came with a new id.
///
/// # Safety
///
/// A live listener and a live id.
unsafe fn request(
    listener: *mut rdma_cm_id,
    new_id: *mut rdma_cm_id,
    event: &CmEvent,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        {
            let mut state = state(new_id);
            state.remote_ece = event.ece;
            if let CmDetail::Connection {
                responder_resources,
                initiator_depth,
                ..
            } = event.detail
            {
                state.responder_resources = responder_resources;
                state.initiator_depth = initiator_depth;
            }
        }
        address::set_info(new_id, &event.info)?;
        address::set_path(new_id, &event.info);
        if state(listener).sync {
            id::migrate(new_id, std::ptr::null_mut())?;
        }
    }
    Ok(())
}

/// The other side accepted: brings the queue pair up, if the id has one, and accepts in turn.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn respond(id: *mut rdma_cm_id) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let done = queues::accept(id, None, (RDMA_MAX_RESP_RES, RDMA_MAX_INIT_DEPTH));
        if done.is_err() {
            let _ = queues::fail(id);
        }
        done
    }
}

/// What an event carries.
fn param(event: &CmEvent) -> rdma_cm_event_param {
    let data = &event.private_data;
    let private_data = if data.is_empty() {
        std::ptr::null()
    } else {
        data.as_ptr().cast()
    };
    // It is bounded where it is decoded, to less.
    let private_data_len = u8::try_from(data.len()).unwrap_or(u8::MAX);
    let traffic_class = event.info.port.map_or(0, |port| port.tos);
    let nowhere = address::datagram_address(Default::default(), 0, 0);
    let none = rdma_ud_param {
        private_data,
        private_data_len,
        ah_attr: ibv_ah_attr {
            is_global: 0,
            ..nowhere
        },
        qp_num: 0,
        qkey: 0,
    };
    let mut param = rdma_cm_event_param { ud: none };
    match event.detail {
        CmDetail::None => {}
        CmDetail::User { arg } => param.arg = arg,
        CmDetail::Datagram {
            qpn,
            qkey,
            gid,
            sgid_index,
            cookie: _,
        } => {
            param.ud = rdma_ud_param {
                ah_attr: address::datagram_address(gid, sgid_index, traffic_class),
                qp_num: qpn.get(),
                qkey,
                ..none
            }
        }
        CmDetail::Connection {
            responder_resources,
            initiator_depth,
            flow_control,
            retry_count,
            rnr_retry_count,
            srq,
            qpn,
            psn: _,
        } => {
            param.conn = rdma_conn_param {
                private_data,
                private_data_len,
                responder_resources,
                initiator_depth,
                flow_control: flow_control.into(),
                retry_count,
                rnr_retry_count,
                srq: srq.into(),
                qp_num: qpn.get(),
            }
        }
    }
    param
}

/// Waits for the event of a call, if the id's calls do; it stays to be looked at.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn complete(id: *mut rdma_cm_id) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        if !state(id).sync {
            return Ok(());
        }
        id::forget_event(id);
        let event = get((*id).channel)?;
        (*id).event = event;
        match ((*event).event, (*event).status) {
            (RDMA_CM_EVENT_DEVICE_REMOVAL, _) => Err(Errno::NODEV),
            (_, 0) => Ok(()),
            (RDMA_CM_EVENT_REJECTED, _) => Err(Errno::CONNREFUSED),
            (_, status) => Err(errno(status)),
        }
    }
}

/// The errno value in an event's status; others are reasons that the transport gave.
pub(super) fn errno(status: c_int) -> Errno {
    const LARGEST: u32 = 4095;
    match status.unsigned_abs() {
        raw @ 1..=LARGEST => Errno::from_raw_os_error(raw as i32),
        _ => Errno::IO,
    }
}

/// `rdma_write_cm_event(3)`.
pub(crate) unsafe extern "C" fn write_cm_event(
    id: *mut rdma_cm_id,
    event: c_uint,
    status: c_int,
    arg: u64,
) -> c_int {
    if event != RDMA_CM_EVENT_USER {
        return minus_one(Err(Errno::INVAL));
    }
    // SAFETY: the caller gives a live id.
    minus_one(unsafe { client(id) }.write_event(status, arg))
}

/// `rdma_init_qp_attr(3)`: the program says in `qp_state` what for.
pub(crate) unsafe extern "C" fn init_qp_attr(
    id: *mut rdma_cm_id,
    attr: *mut ibv_qp_attr,
    mask: *mut c_int,
) -> c_int {
    // SAFETY: the caller gives a live id, and attributes with a state.
    minus_one(unsafe {
        let wanted = QpState::from_raw((*attr).qp_state).ok_or(Errno::INVAL);
        wanted
            .and_then(|wanted| client(id).init_qp_attr(wanted))
            .map(|got| {
                let state = (*attr).qp_state;
                *attr = ibv_qp_attr {
                    qp_state: state,
                    ..crate::qp::c_attributes(&got.attr)
                };
                *mask = got.mask.bits() as c_int;
            })
    })
}

/// `rdma_event_str(3)`.
pub(crate) unsafe extern "C" fn event_str(event: c_uint) -> *const c_char {
    const NAMES: [&CStr; 19] = [
        c"RDMA_CM_EVENT_ADDR_RESOLVED",
        c"RDMA_CM_EVENT_ADDR_ERROR",
        c"RDMA_CM_EVENT_ROUTE_RESOLVED",
        c"RDMA_CM_EVENT_ROUTE_ERROR",
        c"RDMA_CM_EVENT_CONNECT_REQUEST",
        c"RDMA_CM_EVENT_CONNECT_RESPONSE",
        c"RDMA_CM_EVENT_CONNECT_ERROR",
        c"RDMA_CM_EVENT_UNREACHABLE",
        c"RDMA_CM_EVENT_REJECTED",
        c"RDMA_CM_EVENT_ESTABLISHED",
        c"RDMA_CM_EVENT_DISCONNECTED",
        c"RDMA_CM_EVENT_DEVICE_REMOVAL",
        c"RDMA_CM_EVENT_MULTICAST_JOIN",
        c"RDMA_CM_EVENT_MULTICAST_ERROR",
        c"RDMA_CM_EVENT_ADDR_CHANGE",
        c"RDMA_CM_EVENT_TIMEWAIT_EXIT",
        c"RDMA_CM_EVENT_ADDRINFO_RESOLVED",
        c"RDMA_CM_EVENT_ADDRINFO_ERROR",
        c"RDMA_CM_EVENT_USER",
    ];
    NAMES
        .get(event as usize)
        .copied()
        .unwrap_or(c"UNKNOWN EVENT")
        .as_ptr()
}
