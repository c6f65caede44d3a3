//! XRC: domains, and queue pairs that several processes hold.

use core::ffi::{c_int, c_void};
use std::cell::UnsafeCell;
use std::os::fd::BorrowedFd;

use freeflow_abi::*;
use freeflow_client::{Errno, QpState};

use crate::objects::{Base, COND, MUTEX, Qp, Xrcd, context, give, status};
use crate::wr;

/// `ibv_open_xrcd(3)`.
pub(crate) unsafe extern "C" fn open_xrcd(
    ctx: *mut ibv_context,
    init: *mut ibv_xrcd_init_attr,
) -> *mut ibv_xrcd {
    const NEEDED: u32 = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS;
    // SAFETY: the caller gives attributes.
    let init = unsafe { &*init };
    if init.comp_mask & !NEEDED != 0 {
        return give(Err(Errno::OPNOTSUPP));
    }
    if init.comp_mask != NEEDED || init.oflags & !(libc::O_CREAT | libc::O_EXCL) != 0 {
        return give(Err(Errno::INVAL));
    }
    let file = match init.fd {
        -1 => None,
        fd if fd < 0 => return give(Err(Errno::BADF)),
        // SAFETY: the descriptor is the caller's for as long as this call takes.
        fd => Some(unsafe { BorrowedFd::borrow_raw(fd) }),
    };
    let (create, exclusive) = (
        init.oflags & libc::O_CREAT != 0,
        init.oflags & libc::O_EXCL != 0,
    );
    // SAFETY: the caller gives an open context.
    let made = unsafe { context(ctx) }
        .client
        .open_xrcd(file, create, exclusive);
    give(made.map(|client| {
        let c = ibv_xrcd { context: ctx };
        Box::new(Xrcd { c, client })
    }))
}

/// `ibv_close_xrcd(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn close_xrcd(xrcd: *mut ibv_xrcd) -> c_int {
    // SAFETY: the caller gives a live domain; only one that is closed is dropped.
    unsafe {
        let result = ibv_xrcd::object(xrcd).client.close();
        if result.is_ok() {
            drop(ibv_xrcd::take(xrcd));
        }
        status(result)
    }
}

/// Creates a receive queue pair, or opens the one with this number.
///
/// # Safety
///
/// A live domain, or null.
pub(crate) unsafe fn receiver(
    ctx: *mut ibv_context,
    xrcd: *mut ibv_xrcd,
    qp_context: *mut c_void,
    qpn: Option<u32>,
) -> Result<Box<Qp>, Errno> {
    if xrcd.is_null() {
        return Err(Errno::INVAL);
    }
    let room = Box::<Qp>::new_uninit();
    let user = room.as_ptr() as usize;
    // SAFETY: by the caller's promise.
    let client = unsafe {
        let domain = &ibv_xrcd::object(xrcd).client;
        context(ctx).client.open_xrc_qp(domain, qpn, user)?
    };
    let state = match qpn {
        // It has been modified by others, perhaps.
        Some(_) => client.query().map_or(QpState::Err, |now| now.state),
        None => QpState::Reset,
    };
    let base = ibv_qp {
        context: ctx,
        qp_context,
        pd: std::ptr::null_mut(),
        send_cq: std::ptr::null_mut(),
        recv_cq: std::ptr::null_mut(),
        srq: std::ptr::null_mut(),
        handle: 0,
        qp_num: client.qpn(),
        state: state.raw(),
        qp_type: IBV_QPT_XRC_RECV,
        mutex: MUTEX,
        cond: COND,
        events_completed: 0,
    };
    let qp = Qp {
        c: wr::extended(base, 0),
        client,
        sq_sig_all: false,
        builder: UnsafeCell::new(wr::Builder::default()),
    };
    Ok(Box::write(room, qp))
}

/// `ibv_open_qp(3)`.
pub(crate) unsafe extern "C" fn open_qp(
    ctx: *mut ibv_context,
    attr: *mut ibv_qp_open_attr,
) -> *mut ibv_qp {
    const NEEDED: u32 = IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE;
    // SAFETY: the caller gives attributes.
    let attr = unsafe { &*attr };
    if attr.comp_mask & !(NEEDED | IBV_QP_OPEN_ATTR_CONTEXT) != 0 {
        return give(Err(Errno::OPNOTSUPP));
    }
    if attr.comp_mask & NEEDED != NEEDED || attr.qp_type != IBV_QPT_XRC_RECV {
        return give(Err(Errno::INVAL));
    }
    let qp_context = if attr.comp_mask & IBV_QP_OPEN_ATTR_CONTEXT != 0 {
        attr.qp_context
    } else {
        std::ptr::null_mut()
    };
    // SAFETY: the caller gives an open context and a live domain.
    give(unsafe { receiver(ctx, attr.xrcd, qp_context, Some(attr.qp_num)) })
}
