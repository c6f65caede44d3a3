//! Shared receive queues.

use core::ffi::{c_int, c_void};
use std::sync::Arc;

use freeflow_abi::*;
use freeflow_client::{Cq, Errno, Xrcd};

use crate::objects::{Base, COND, MUTEX, Srq, code, give, status};
use crate::qp::elements;

/// Creates a queue, and tells the caller how large it became.
///
/// # Safety
///
/// A live domain.
unsafe fn create(
    pd: *mut ibv_pd,
    srq_context: *mut c_void,
    attr: &mut ibv_srq_attr,
    xrc: Option<(&Xrcd, &Arc<Cq>)>,
) -> Result<Box<Srq>, Errno> {
    // SAFETY: by the caller's promise.
    let domain = unsafe { ibv_pd::object(pd) };
    let room = Box::<Srq>::new_uninit();
    let user = room.as_ptr() as usize;
    let client = domain
        .client
        .create_srq(attr.max_wr, attr.max_sge, xrc, user)?;
    (attr.max_wr, attr.max_sge) = client.size();
    let c = ibv_srq {
        context: domain.c.context,
        srq_context,
        pd,
        handle: 0,
        mutex: MUTEX,
        cond: COND,
        events_completed: 0,
    };
    Ok(Box::write(room, Srq { c, client }))
}

/// `ibv_create_srq(3)`.
pub(crate) unsafe extern "C" fn create_srq(
    pd: *mut ibv_pd,
    init: *mut ibv_srq_init_attr,
) -> *mut ibv_srq {
    // SAFETY: the caller gives a live domain and attributes.
    give(unsafe { create(pd, (*init).srq_context, &mut (*init).attr, None) })
}

/// `ibv_create_srq_ex(3)`: a queue of XRC; the header makes plain ones by `ibv_create_srq`.
pub(crate) unsafe extern "C" fn create_srq_ex(
    _ctx: *mut ibv_context,
    init: *mut ibv_srq_init_attr_ex,
) -> *mut ibv_srq {
    const KNOWN: u32 = IBV_SRQ_INIT_ATTR_TYPE
        | IBV_SRQ_INIT_ATTR_PD
        | IBV_SRQ_INIT_ATTR_XRCD
        | IBV_SRQ_INIT_ATTR_CQ;
    // SAFETY: the caller gives attributes.
    let init = unsafe { &mut *init };
    let has = |bit| init.comp_mask & bit != 0;
    let kind = if has(IBV_SRQ_INIT_ATTR_TYPE) {
        init.srq_type
    } else {
        IBV_SRQT_BASIC
    };
    if init.comp_mask & !KNOWN != 0 || kind > IBV_SRQT_XRC {
        return give(Err(Errno::OPNOTSUPP));
    }
    if !has(IBV_SRQ_INIT_ATTR_PD) || init.pd.is_null() {
        return give(Err(Errno::INVAL));
    }
    if kind == IBV_SRQT_BASIC {
        // SAFETY: the caller gives a live domain.
        return give(unsafe { create(init.pd, init.srq_context, &mut init.attr, None) });
    }
    let complete = has(IBV_SRQ_INIT_ATTR_XRCD) && has(IBV_SRQ_INIT_ATTR_CQ);
    if !complete || init.xrcd.is_null() || init.cq.is_null() {
        return give(Err(Errno::INVAL));
    }
    // SAFETY: the caller gives live domains and a live completion queue.
    give(unsafe {
        let (xrcd, cq) = (ibv_xrcd::object(init.xrcd), ibv_cq::object(init.cq));
        let xrc = Some((&xrcd.client, &cq.client));
        create(init.pd, init.srq_context, &mut init.attr, xrc)
    })
}

/// `ibv_get_srq_num(3)`: 0 or errno; only a queue of XRC has a number.
pub(crate) unsafe extern "C" fn get_srq_num(srq: *mut ibv_srq, number: *mut u32) -> c_int {
    // SAFETY: the caller gives a live queue and a place for the number.
    unsafe {
        match ibv_srq::object(srq).client.number() {
            Some(found) => {
                *number = found;
                0
            }
            None => libc::EINVAL,
        }
    }
}

/// `ibv_modify_srq(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn modify_srq(
    srq: *mut ibv_srq,
    attr: *mut ibv_srq_attr,
    mask: c_int,
) -> c_int {
    if mask & !(IBV_SRQ_MAX_WR | IBV_SRQ_LIMIT) != 0 {
        return libc::EINVAL;
    }
    // SAFETY: the caller gives a live queue and attributes.
    let (client, attr) = unsafe { (&ibv_srq::object(srq).client, &*attr) };
    let max_wr = (mask & IBV_SRQ_MAX_WR != 0).then_some(attr.max_wr);
    let limit = (mask & IBV_SRQ_LIMIT != 0).then_some(attr.srq_limit);
    status(client.modify(max_wr, limit))
}

/// `ibv_query_srq(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    // SAFETY: the caller gives a live queue and room for the attributes.
    unsafe {
        match ibv_srq::object(srq).client.query() {
            Ok(now) => {
                *attr = ibv_srq_attr {
                    max_wr: now.max_wr,
                    max_sge: now.max_sge,
                    srq_limit: now.limit,
                };
                0
            }
            Err(errno) => code(errno),
        }
    }
}

/// `ibv_destroy_srq(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn destroy_srq(srq: *mut ibv_srq) -> c_int {
    // SAFETY: the caller gives a live queue; only one that is gone is dropped.
    unsafe {
        let result = ibv_srq::object(srq).client.destroy();
        if result.is_ok() {
            drop(ibv_srq::take(srq));
        }
        status(result)
    }
}

/// `ibv_post_srq_recv(3)`: 0 or errno; requests before the bad one are posted.
pub(crate) unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    mut wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller gives a live queue.
    let mut queue = unsafe { &ibv_srq::object(srq).client }.lock();
    let mut result = 0;
    // SAFETY: the caller gives a list of requests whose elements are valid, and a place for the
    // bad one.
    unsafe {
        while let Some(request) = wr.as_ref() {
            let posted = elements(request.sg_list, request.num_sge)
                .and_then(|sges| queue.push(request.wr_id, sges));
            if let Err(errno) = posted {
                *bad = wr;
                result = code(errno);
                break;
            }
            wr = request.next;
        }
    }
    queue.commit();
    result
}
