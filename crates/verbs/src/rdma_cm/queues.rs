//! The queues of an id: made as the program wants them, with what it leaves to this library, and
//! moved through their states.

use core::ffi::c_int;

use freeflow_abi::*;
use freeflow_client::{CmParam, CmUp, Errno, QpAttr, QpAttrMask, QpState};

use super::{client, device};
use crate::objects::minus_one;
use crate::{cq, qp, srq};

/// The error of a call that set errno.
fn last_error() -> Errno {
    // SAFETY: libc gives the address of this thread's errno.
    match unsafe { *libc::__errno_location() } {
        0 => Errno::NOMEM,
        raw => Errno::from_raw_os_error(raw),
    }
}

fn made<T>(object: *mut T) -> Result<*mut T, Errno> {
    if object.is_null() {
        Err(last_error())
    } else {
        Ok(object)
    }
}

/// A completion channel and queue, as large as asked for; none if it is not needed. What could be
/// made is in its place also if the rest could not.
///
/// # Safety
///
/// A live id that is bound, and places for both.
unsafe fn create_cq(
    id: *mut rdma_cm_id,
    entries: u32,
    channel: *mut *mut ibv_comp_channel,
    queue: *mut *mut ibv_cq,
) -> Result<(), Errno> {
    let Ok(entries @ 1..) = c_int::try_from(entries) else {
        return Ok(());
    };
    // SAFETY: by the caller's promise.
    unsafe {
        *channel = made(cq::create_comp_channel((*id).verbs))?;
        *queue = made(cq::create_cq((*id).verbs, entries, id.cast(), *channel, 0))?;
    }
    Ok(())
}

/// Destroys the completion queues and channels that were made for an id.
///
/// # Safety
///
/// A live id whose queues nobody uses.
unsafe fn destroy_cqs(id: *mut rdma_cm_id) {
    // SAFETY: by the caller's promise; what is not null was made for the id.
    unsafe {
        if (*id).qp_type == IBV_QPT_XRC_RECV && !(*id).srq.is_null() {
            // Its shared receive queue still completes there.
            return;
        }
        let cqs = [(*id).recv_cq, (*id).send_cq];
        let channels = [(*id).recv_cq_channel, (*id).send_cq_channel];
        ((*id).recv_cq, (*id).send_cq) = (std::ptr::null_mut(), std::ptr::null_mut());
        ((*id).recv_cq_channel, (*id).send_cq_channel) =
            (std::ptr::null_mut(), std::ptr::null_mut());
        for (at, cq) in cqs.into_iter().enumerate() {
            if !cq.is_null() && !cqs[..at].contains(&cq) {
                cq::destroy_cq(cq);
            }
        }
        for (at, channel) in channels.into_iter().enumerate() {
            if !channel.is_null() && !channels[..at].contains(&channel) {
                cq::destroy_comp_channel(channel);
            }
        }
    }
}

/// `rdma_create_qp_ex(3)`.
pub(crate) unsafe extern "C" fn create_qp_ex(
    id: *mut rdma_cm_id,
    attr: *mut ibv_qp_init_attr_ex,
) -> c_int {
    // SAFETY: the caller gives a live id and attributes.
    minus_one(unsafe { create(id, &mut *attr) })
}

/// `rdma_create_qp(3)`.
pub(crate) unsafe extern "C" fn create_qp(
    id: *mut rdma_cm_id,
    pd: *mut ibv_pd,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: the caller gives a live id, a live domain or null, and attributes.
    minus_one(unsafe { create_plain(id, pd, &mut *init) })
}

/// # Safety
///
/// A live id, and a live domain or null.
pub(super) unsafe fn create_plain(
    id: *mut rdma_cm_id,
    pd: *mut ibv_pd,
    init: &mut ibv_qp_init_attr,
) -> Result<(), Errno> {
    let mut attr = ibv_qp_init_attr_ex {
        qp_context: init.qp_context,
        send_cq: init.send_cq,
        recv_cq: init.recv_cq,
        srq: init.srq,
        cap: init.cap,
        qp_type: init.qp_type,
        sq_sig_all: init.sq_sig_all,
        comp_mask: IBV_QP_INIT_ATTR_PD,
        pd,
        xrcd: std::ptr::null_mut(),
        create_flags: 0,
        max_tso_header: 0,
        rwq_ind_tbl: std::ptr::null_mut(),
        rx_hash_conf: ibv_rx_hash_conf {
            rx_hash_function: 0,
            rx_hash_key_len: 0,
            rx_hash_key: std::ptr::null_mut(),
            rx_hash_fields_mask: 0,
        },
        source_qpn: 0,
        send_ops_flags: 0,
    };
    // SAFETY: by the caller's promise.
    let result = unsafe { create(id, &mut attr) };
    (init.send_cq, init.recv_cq, init.srq) = (attr.send_cq, attr.recv_cq, attr.srq);
    init.cap = attr.cap;
    result
}

/// Creates an id's queue pair, ready to receive requests, and if it has no connection to send too.
/// EINVAL: the id is not bound or has one, or the domain or a queue is another's.
///
/// # Safety
///
/// A live id, and live objects in the attributes.
unsafe fn create(id: *mut rdma_cm_id, attr: &mut ibv_qp_init_attr_ex) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        if !(*id).qp.is_null() || (*id).verbs.is_null() {
            return Err(Errno::INVAL);
        }
        if attr.comp_mask & IBV_QP_INIT_ATTR_PD == 0 || attr.pd.is_null() {
            attr.comp_mask |= IBV_QP_INIT_ATTR_PD;
            attr.pd = (*id).pd;
        }
        if attr.pd.is_null() || (*attr.pd).context != (*id).verbs {
            return Err(Errno::INVAL);
        }
        let other = |ours: *mut ibv_cq, given: *mut ibv_cq| {
            !ours.is_null() && !given.is_null() && ours != given
        };
        if other((*id).send_cq, attr.send_cq) || other((*id).recv_cq, attr.recv_cq) {
            return Err(Errno::INVAL);
        }
        let no_xrcd = attr.comp_mask & IBV_QP_INIT_ATTR_XRCD == 0 || attr.xrcd.is_null();
        if (*id).qp_type == IBV_QPT_XRC_RECV && no_xrcd {
            attr.xrcd = device::of(client(id))?.xrcd()?;
            attr.comp_mask |= IBV_QP_INIT_ATTR_XRCD;
        }
        let queue_pair = create_queues(id, attr);
        if queue_pair.is_err() {
            destroy_cqs(id);
        }
        let queue_pair = queue_pair?;
        (*id).pd = attr.pd;
        (*id).qp = queue_pair;
    }
    Ok(())
}

/// # Safety
///
/// As for [`create`].
unsafe fn create_queues(
    id: *mut rdma_cm_id,
    attr: &mut ibv_qp_init_attr_ex,
) -> Result<*mut ibv_qp, Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        if attr.recv_cq.is_null() && (*id).recv_cq.is_null() {
            let (channel, queue) = (&raw mut (*id).recv_cq_channel, &raw mut (*id).recv_cq);
            create_cq(id, attr.cap.max_recv_wr, channel, queue)?;
        }
        if attr.send_cq.is_null() && (*id).send_cq.is_null() {
            let (channel, queue) = (&raw mut (*id).send_cq_channel, &raw mut (*id).send_cq);
            create_cq(id, attr.cap.max_send_wr, channel, queue)?;
        }
        if attr.send_cq.is_null() {
            attr.send_cq = (*id).send_cq;
        }
        if attr.recv_cq.is_null() {
            attr.recv_cq = (*id).recv_cq;
        }
        if attr.srq.is_null() {
            attr.srq = (*id).srq;
        }
        let queue_pair = made(qp::create_qp_ex((*id).verbs, attr))?;
        let first = match (*id).qp_type {
            IBV_QPT_UD => QpState::Rts,
            _ => QpState::Init,
        };
        if let Err(errno) = bring_up(id, queue_pair, first) {
            qp::destroy_qp(queue_pair);
            return Err(errno);
        }
        Ok(queue_pair)
    }
}

/// Brings a queue pair to a state, through those before it, as the connection manager says.
///
/// # Safety
///
/// A live id and a live queue pair.
unsafe fn bring_up(
    id: *mut rdma_cm_id,
    queue_pair: *mut ibv_qp,
    state: QpState,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe { qp::follow(queue_pair, |qp| client(id).bring_up(&CmUp::new(qp, state))) }
}

/// Accepts a request or, without parameters, a reply; first brings the id's queue pair, if it has
/// one, to where it receives and sends: the other side's address is known by now.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn accept(
    id: *mut rdma_cm_id,
    param: Option<CmParam>,
    (resources, depth): (u8, u8),
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let client = client(id);
        if (*id).qp.is_null() {
            return client.accept(param);
        }
        qp::follow((*id).qp, |qp| {
            let up = CmUp {
                max_dest_rd_atomic: Some(resources).filter(|&r| r != RDMA_MAX_RESP_RES),
                max_rd_atomic: Some(depth).filter(|&d| d != RDMA_MAX_INIT_DEPTH),
                ..CmUp::new(qp, QpState::Rts)
            };
            client.accept_with(param, &up)
        })
    }
}

/// State of an id's queue pair, if it has one.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn state(id: *mut rdma_cm_id) -> Option<u32> {
    // SAFETY: by the caller's promise.
    unsafe { (*id).qp.as_ref().map(|qp| qp.state) }
}

/// Ends an id's connection, and its queue pair, if it has one: what is posted is flushed.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn disconnect(id: *mut rdma_cm_id) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        if (*id).qp.is_null() {
            return client(id).disconnect();
        }
        qp::follow((*id).qp, |qp| client(id).disconnect_with(qp))
    }
}

/// Ends an id's queue pair, if it has one: what is posted is flushed.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn fail(id: *mut rdma_cm_id) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        if (*id).qp.is_null() {
            return Ok(());
        }
        let attr = QpAttr {
            state: QpState::Err,
            ..QpAttr::default()
        };
        qp::modify((*id).qp, &attr, QpAttrMask::STATE)
    }
}

/// `rdma_destroy_qp(3)`, with the completion queues that were made for it.
pub(crate) unsafe extern "C" fn destroy_qp(id: *mut rdma_cm_id) {
    // SAFETY: the caller gives a live id with a queue pair.
    unsafe {
        let queue_pair = std::mem::replace(&mut (*id).qp, std::ptr::null_mut());
        if !queue_pair.is_null() {
            qp::destroy_qp(queue_pair);
        }
        destroy_cqs(id);
    }
}

/// `rdma_create_srq_ex(3)`.
pub(crate) unsafe extern "C" fn create_srq_ex(
    id: *mut rdma_cm_id,
    attr: *mut ibv_srq_init_attr_ex,
) -> c_int {
    // SAFETY: the caller gives a live id and attributes.
    minus_one(unsafe { create_shared(id, &mut *attr) })
}

/// `rdma_create_srq(3)`: of XRC if the id is.
pub(crate) unsafe extern "C" fn create_srq(
    id: *mut rdma_cm_id,
    pd: *mut ibv_pd,
    init: *mut ibv_srq_init_attr,
) -> c_int {
    // SAFETY: the caller gives a live id, a live domain or null, and attributes.
    minus_one(unsafe {
        let srq_type = if (*id).qp_type == IBV_QPT_XRC_RECV {
            IBV_SRQT_XRC
        } else {
            IBV_SRQT_BASIC
        };
        let mut attr = ibv_srq_init_attr_ex {
            srq_context: (*init).srq_context,
            attr: (*init).attr,
            comp_mask: IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD,
            srq_type,
            pd,
            xrcd: std::ptr::null_mut(),
            cq: std::ptr::null_mut(),
            tm_cap: ibv_tm_cap::default(),
        };
        let result = create_shared(id, &mut attr);
        (*init).attr = attr.attr;
        result
    })
}

/// # Safety
///
/// A live id, and live objects in the attributes.
unsafe fn create_shared(id: *mut rdma_cm_id, attr: &mut ibv_srq_init_attr_ex) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let bound = !(*id).verbs.is_null();
        if attr.comp_mask & IBV_SRQ_INIT_ATTR_TYPE == 0 || !bound || !(*id).srq.is_null() {
            return Err(Errno::INVAL);
        }
        let has = |attr: &ibv_srq_init_attr_ex, bit| attr.comp_mask & bit != 0;
        if !has(attr, IBV_SRQ_INIT_ATTR_PD) || attr.pd.is_null() {
            attr.pd = (*id).pd;
            attr.comp_mask |= IBV_SRQ_INIT_ATTR_PD;
        }
        if attr.srq_type == IBV_SRQT_XRC {
            if !has(attr, IBV_SRQ_INIT_ATTR_XRCD) || attr.xrcd.is_null() {
                attr.xrcd = device::of(client(id))?.xrcd()?;
            }
            if !has(attr, IBV_SRQ_INIT_ATTR_CQ) || attr.cq.is_null() {
                let (channel, queue) = (&raw mut (*id).recv_cq_channel, &raw mut (*id).recv_cq);
                if let Err(errno) = create_cq(id, attr.attr.max_wr, channel, queue) {
                    destroy_cqs(id);
                    return Err(errno);
                }
                attr.cq = (*id).recv_cq;
            }
            attr.comp_mask |= IBV_SRQ_INIT_ATTR_XRCD | IBV_SRQ_INIT_ATTR_CQ;
        }
        match made(srq::create_srq_ex((*id).verbs, attr)) {
            Ok(srq) => (*id).srq = srq,
            Err(errno) => {
                destroy_cqs(id);
                return Err(errno);
            }
        }
        if (*id).pd.is_null() {
            (*id).pd = attr.pd;
        }
    }
    Ok(())
}

/// `rdma_destroy_srq(3)`.
pub(crate) unsafe extern "C" fn destroy_srq(id: *mut rdma_cm_id) {
    // SAFETY: the caller gives a live id with a shared receive queue.
    unsafe {
        let srq = std::mem::replace(&mut (*id).srq, std::ptr::null_mut());
        if !srq.is_null() {
            srq::destroy_srq(srq);
        }
        if (*id).qp.is_null() {
            destroy_cqs(id);
        }
    }
}
