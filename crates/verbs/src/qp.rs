//! Queue pairs: creating, modifying, posting.

use core::ffi::{c_int, c_uint};
use std::cell::UnsafeCell;

use freeflow_abi::*;
use freeflow_client::{
    Access, Errno, Gid, Mtu, MwType, Opcode, QpAttr, QpAttrMask, QpCap, QpInit, QpState, QpType,
    SendFlags, SendWr, Sge, UdTarget,
};

use crate::memory::{address, address_attr};
use crate::objects::{Base, COND, MUTEX, Qp, code, give, status};
use crate::{mw, wr, xrc};

fn cap(c: &ibv_qp_cap) -> QpCap {
    QpCap {
        max_send_wr: c.max_send_wr,
        max_recv_wr: c.max_recv_wr,
        max_send_sge: c.max_send_sge,
        max_recv_sge: c.max_recv_sge,
        max_inline: c.max_inline_data,
    }
}

fn c_cap(cap: &QpCap) -> ibv_qp_cap {
    ibv_qp_cap {
        max_send_wr: cap.max_send_wr,
        max_recv_wr: cap.max_recv_wr,
        max_send_sge: cap.max_send_sge,
        max_recv_sge: cap.max_recv_sge,
        max_inline_data: cap.max_inline,
    }
}

/// `ibv_create_qp(3)`.
pub(crate) unsafe extern "C" fn create_qp(
    pd: *mut ibv_pd,
    init: *mut ibv_qp_init_attr,
) -> *mut ibv_qp {
    // SAFETY: the caller gives a live domain and attributes.
    give(unsafe { create(pd, &mut *init, 0) })
}

/// `ibv_create_qp_ex(3)`.
pub(crate) unsafe extern "C" fn create_qp_ex(
    ctx: *mut ibv_context,
    init: *mut ibv_qp_init_attr_ex,
) -> *mut ibv_qp {
    const KNOWN: u32 = IBV_QP_INIT_ATTR_PD
        | IBV_QP_INIT_ATTR_XRCD
        | IBV_QP_INIT_ATTR_CREATE_FLAGS
        | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
    // SAFETY: the caller gives attributes.
    let init = unsafe { &mut *init };
    let flags = if init.comp_mask & IBV_QP_INIT_ATTR_CREATE_FLAGS != 0 {
        init.create_flags
    } else {
        0
    };
    if init.comp_mask & !KNOWN != 0 || flags != 0 {
        return give(Err(Errno::OPNOTSUPP));
    }
    if init.qp_type == IBV_QPT_XRC_RECV {
        if init.comp_mask & IBV_QP_INIT_ATTR_XRCD == 0 {
            return give(Err(Errno::INVAL));
        }
        // SAFETY: the caller gives an open context and a live XRC domain.
        let made = unsafe { xrc::receiver(ctx, init.xrcd, init.qp_context, None) };
        init.cap = ibv_qp_cap::default();
        return give(made);
    }
    if init.comp_mask & IBV_QP_INIT_ATTR_PD == 0 {
        return give(Err(Errno::INVAL));
    }
    let ops = if init.comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS != 0 {
        init.send_ops_flags
    } else {
        0
    };
    let pd = init.pd;
    let mut base = ibv_qp_init_attr {
        qp_context: init.qp_context,
        send_cq: init.send_cq,
        recv_cq: init.recv_cq,
        srq: init.srq,
        cap: init.cap,
        qp_type: init.qp_type,
        sq_sig_all: init.sq_sig_all,
    };
    // SAFETY: the caller gives a live domain and queues.
    let made = unsafe { create(pd, &mut base, ops) };
    init.cap = base.cap;
    give(made)
}

/// Creates a queue pair that also has the operations `ops` of the extended interface.
///
/// # Safety
///
/// A live domain and live queues.
unsafe fn create(pd: *mut ibv_pd, init: &mut ibv_qp_init_attr, ops: u64) -> Result<Box<Qp>, Errno> {
    let qp_type = QpType::from_raw(init.qp_type).ok_or(Errno::OPNOTSUPP)?;
    // The sending side of XRC has no use for what receives need.
    let receives = qp_type != QpType::XrcSend;
    if init.send_cq.is_null() || (receives && init.recv_cq.is_null()) {
        return Err(Errno::INVAL);
    }
    wr::check_ops(qp_type, ops)?;
    // SAFETY: by the caller's promise.
    let (domain, send_cq, recv_cq, srq) = unsafe {
        (
            ibv_pd::object(pd),
            ibv_cq::object(init.send_cq),
            receives.then(|| ibv_cq::object(init.recv_cq)),
            (receives && !init.srq.is_null()).then(|| ibv_srq::object(init.srq)),
        )
    };
    let sq_sig_all = init.sq_sig_all != 0;
    let wanted = QpInit {
        qp_type,
        send_cq: &send_cq.client,
        recv_cq: recv_cq.map(|cq| &cq.client),
        srq: srq.map(|srq| &srq.client),
        cap: cap(&init.cap),
        sq_sig_all,
    };
    let room = Box::<Qp>::new_uninit();
    let client = domain.client.create_qp(&wanted, room.as_ptr() as usize)?;
    init.cap = c_cap(&client.cap());
    let base = ibv_qp {
        context: domain.c.context,
        qp_context: init.qp_context,
        pd,
        send_cq: init.send_cq,
        recv_cq: init.recv_cq,
        srq: init.srq,
        handle: 0,
        qp_num: client.qpn(),
        state: QpState::Reset.raw(),
        qp_type: init.qp_type,
        mutex: MUTEX,
        cond: COND,
        events_completed: 0,
    };
    let builder = UnsafeCell::new(wr::Builder::default());
    let c = wr::extended(base, ops);
    Ok(Box::write(
        room,
        Qp {
            c,
            client,
            sq_sig_all,
            builder,
        },
    ))
}

/// `ibv_qp_to_qp_ex(3)`: every queue pair of ours is an extended one.
pub(crate) unsafe extern "C" fn qp_to_qp_ex(qp: *mut ibv_qp) -> *mut ibv_qp_ex {
    qp.cast()
}

/// `ibv_destroy_qp(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: the caller gives a live queue pair; only one that is gone is dropped.
    unsafe {
        let result = ibv_qp::object(qp).client.destroy();
        if result.is_ok() {
            drop(ibv_qp::take(qp));
        }
        status(result)
    }
}

fn state(raw: c_uint, meant: bool) -> Result<QpState, Errno> {
    match QpState::from_raw(raw) {
        Some(state) => Ok(state),
        None if meant => Err(Errno::INVAL),
        None => Ok(QpState::Reset),
    }
}

/// Attributes of a modification; what the mask does not name is not looked at.
fn attributes(attr: &ibv_qp_attr, mask: QpAttrMask) -> Result<QpAttr, Errno> {
    let mtu = match Mtu::from_raw(attr.path_mtu) {
        None if mask.contains(QpAttrMask::PATH_MTU) => return Err(Errno::INVAL),
        mtu => mtu.unwrap_or(Mtu::B1024),
    };
    let access = match Access::from_bits(attr.qp_access_flags & !Access::OPTIONAL_RANGE) {
        None if mask.contains(QpAttrMask::ACCESS_FLAGS) => return Err(Errno::INVAL),
        access => access.unwrap_or_default(),
    };
    Ok(QpAttr {
        state: state(attr.qp_state, mask.contains(QpAttrMask::STATE))?,
        cur_state: state(attr.cur_qp_state, mask.contains(QpAttrMask::CUR_STATE))?,
        path_mtu: mtu,
        qkey: attr.qkey,
        rq_psn: attr.rq_psn & 0xFF_FFFF,
        sq_psn: attr.sq_psn & 0xFF_FFFF,
        dest_qpn: if mask.contains(QpAttrMask::DEST_QPN) {
            attr.dest_qp_num
        } else {
            0
        },
        access,
        cap: cap(&attr.cap),
        av: address(&attr.ah_attr),
        pkey_index: attr.pkey_index,
        en_sqd_async_notify: attr.en_sqd_async_notify != 0,
        sq_draining: false,
        max_rd_atomic: attr.max_rd_atomic,
        max_dest_rd_atomic: attr.max_dest_rd_atomic,
        min_rnr_timer: attr.min_rnr_timer,
        port_num: attr.port_num,
        timeout: if mask.contains(QpAttrMask::TIMEOUT) {
            attr.timeout
        } else {
            0
        },
        retry_cnt: attr.retry_cnt,
        rnr_retry: attr.rnr_retry,
        path_mig_state: u8::try_from(attr.path_mig_state).unwrap_or(u8::MAX),
    })
}

/// `ibv_modify_qp(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn modify_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    mask: c_int,
) -> c_int {
    let Some(mask) = QpAttrMask::from_bits(mask as u32) else {
        return libc::EINVAL;
    };
    // SAFETY: the caller gives a live queue pair and attributes.
    status(unsafe { attributes(&*attr, mask).and_then(|attr| modify(qp, &attr, mask)) })
}

/// Modifies a queue pair, and what programs see of its state.
///
/// # Safety
///
/// A live queue pair.
pub(crate) unsafe fn modify(qp: *mut ibv_qp, attr: &QpAttr, mask: QpAttrMask) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        ibv_qp::object(qp).client.modify(attr, mask)?;
        if mask.contains(QpAttrMask::STATE) {
            (*qp).state = attr.state.raw();
        }
    }
    Ok(())
}

/// Has the connection manager do something to a queue pair, and shows its state since.
///
/// # Safety
///
/// A live queue pair.
pub(crate) unsafe fn follow(
    qp: *mut ibv_qp,
    work: impl FnOnce(&freeflow_client::Qp) -> Result<(), Errno>,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let client = &ibv_qp::object(qp).client;
        let done = work(client);
        (*qp).state = client.state().raw();
        done
    }
}

/// The attributes as C has them.
pub(crate) fn c_attributes(attr: &QpAttr) -> ibv_qp_attr {
    ibv_qp_attr {
        qp_state: attr.state.raw(),
        cur_qp_state: attr.cur_state.raw(),
        path_mtu: attr.path_mtu.raw(),
        path_mig_state: attr.path_mig_state.into(),
        qkey: attr.qkey,
        rq_psn: attr.rq_psn,
        sq_psn: attr.sq_psn,
        dest_qp_num: attr.dest_qpn,
        qp_access_flags: attr.access.bits(),
        cap: c_cap(&attr.cap),
        ah_attr: address_attr(&attr.av),
        alt_ah_attr: address_attr(&Default::default()),
        pkey_index: attr.pkey_index,
        alt_pkey_index: 0,
        en_sqd_async_notify: attr.en_sqd_async_notify.into(),
        sq_draining: attr.sq_draining.into(),
        max_rd_atomic: attr.max_rd_atomic,
        max_dest_rd_atomic: attr.max_dest_rd_atomic,
        min_rnr_timer: attr.min_rnr_timer,
        port_num: attr.port_num,
        timeout: attr.timeout,
        retry_cnt: attr.retry_cnt,
        rnr_retry: attr.rnr_retry,
        alt_port_num: 0,
        alt_timeout: 0,
        rate_limit: 0,
    }
}

/// `ibv_query_qp(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _mask: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: the caller gives a live queue pair and room for the answers.
    unsafe {
        let object = ibv_qp::object(qp);
        let now = match object.client.query() {
            Ok(now) => now,
            Err(errno) => return code(errno),
        };
        *attr = c_attributes(&now);
        *init = ibv_qp_init_attr {
            qp_context: (*qp).qp_context,
            send_cq: (*qp).send_cq,
            recv_cq: (*qp).recv_cq,
            srq: (*qp).srq,
            cap: c_cap(&now.cap),
            qp_type: (*qp).qp_type,
            sq_sig_all: object.sq_sig_all.into(),
        };
        (*qp).state = now.state.raw();
    }
    0
}

/// The elements of a request.
///
/// # Safety
///
/// `list` has `n` elements.
pub(crate) unsafe fn elements<'a>(list: *const ibv_sge, n: c_int) -> Result<&'a [Sge], Errno> {
    match usize::try_from(n) {
        Ok(0) => Ok(&[]),
        // SAFETY: by the caller's promise; `Sge` has the layout of `ibv_sge`.
        Ok(n) if !list.is_null() => Ok(unsafe { std::slice::from_raw_parts(list.cast(), n) }),
        _ => Err(Errno::INVAL),
    }
}

/// # Safety
///
/// A request as the man page wants it.
unsafe fn send_request(qp_type: QpType, wr: &ibv_send_wr) -> Result<SendWr, Errno> {
    let opcode = Opcode::from_raw(wr.opcode).ok_or(Errno::OPNOTSUPP)?;
    if opcode == Opcode::Flush {
        // The structure has no room for it: `ibv_wr_flush(3)` alone posts it.
        return Err(Errno::OPNOTSUPP);
    }
    if !opcode.allowed_on(qp_type) {
        return Err(Errno::INVAL);
    }
    let mut request = SendWr {
        wr_id: wr.wr_id,
        opcode,
        flags: SendFlags::from_bits_truncate(wr.send_flags as u8),
        imm: wr.imm_data,
        ..SendWr::default()
    };
    // SAFETY: the union's members are plain numbers and, of datagrams alone, a live handle.
    unsafe {
        if qp_type == QpType::Ud {
            let ud = &wr.wr.ud;
            if ud.ah.is_null() {
                return Err(Errno::INVAL);
            }
            let av = ibv_ah::object(ud.ah).av;
            request.ud = UdTarget {
                av,
                qpn: ud.remote_qpn,
                qkey: ud.remote_qkey,
            };
        } else if opcode == Opcode::BindMw {
            let bind = &wr.more.bind_mw;
            let (info, flags) = (&bind.bind_info, request.flags);
            return mw::request(bind.mw, MwType::Two, bind.rkey, info, wr.wr_id, flags);
        } else if opcode.is_atomic() {
            let atomic = &wr.wr.atomic;
            request.remote_addr = atomic.remote_addr;
            request.rkey = atomic.rkey;
            request.compare_add = atomic.compare_add;
            request.swap = atomic.swap;
        } else if opcode.has_remote() {
            request.remote_addr = wr.wr.rdma.remote_addr;
            request.rkey = wr.wr.rdma.rkey;
        }
    }
    if qp_type == QpType::XrcSend {
        request.remote_srqn = wr.remote_srqn;
    }
    Ok(request)
}

/// `ibv_post_send(3)`: 0 or errno; requests before the bad one are posted.
pub(crate) unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    mut wr: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the caller gives a live queue pair.
    let client = unsafe { &ibv_qp::object(qp).client };
    let mut queue = client.lock_send();
    let mut result = 0;
    // SAFETY: the caller gives a list of requests whose elements are valid, and a place for the
    // bad one.
    unsafe {
        while let Some(request) = wr.as_ref() {
            let posted = send_request(client.qp_type(), request)
                .and_then(|send| queue.push(&send, elements(request.sg_list, request.num_sge)?));
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

/// `ibv_post_recv(3)`: 0 or errno; requests before the bad one are posted.
pub(crate) unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    mut wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller gives a live queue pair.
    let mut queue = unsafe { &ibv_qp::object(qp).client }.lock_recv();
    let mut result = 0;
    // SAFETY: as in `post_send`.
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

/// `ibv_attach_mcast(3)`: 0 or errno. RoCE has no LIDs.
pub(crate) unsafe extern "C" fn attach_mcast(
    qp: *mut ibv_qp,
    gid: *const ibv_gid,
    _lid: u16,
) -> c_int {
    // SAFETY: the caller gives a live queue pair and a GID.
    status(unsafe { ibv_qp::object(qp).client.multicast(Gid((*gid).raw), true) })
}

/// `ibv_detach_mcast(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn detach_mcast(
    qp: *mut ibv_qp,
    gid: *const ibv_gid,
    _lid: u16,
) -> c_int {
    // SAFETY: the caller gives a live queue pair and a GID.
    status(unsafe { ibv_qp::object(qp).client.multicast(Gid((*gid).raw), false) })
}

/// `ibv_query_qp_data_in_order(3)`: data may be written in any order within a message.
pub(crate) unsafe extern "C" fn query_qp_data_in_order(
    _qp: *mut ibv_qp,
    _opcode: c_uint,
    _flags: u32,
) -> c_int {
    0
}

/// `ibv_query_ece(3)` and `ibv_set_ece(3)`: there are no options to agree on.
pub(crate) unsafe extern "C" fn ece(_qp: *mut ibv_qp, _ece: *mut ibv_ece) -> c_int {
    libc::EOPNOTSUPP
}
