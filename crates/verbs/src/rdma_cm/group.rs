//! Multicast groups of an id.

use core::ffi::{c_int, c_void};
use std::net::SocketAddr;
use std::sync::Arc;

use freeflow_abi::*;
use freeflow_client::{CmDetail, CmGroup, CmReport, Errno, Gid};

use super::event::{complete, errno};
use super::{address, client, state};
use crate::objects::{Base, minus_one};

/// A group that an id has joined or is about to.
pub(super) struct Member {
    addr: SocketAddr,
    group: Arc<CmGroup>,
    context: *mut c_void,
    send_only: bool,
    /// The GID that the id's queue pair is attached to.
    attached: Option<Gid>,
}

/// `rdma_join_multicast(3)`.
pub(crate) unsafe extern "C" fn join_multicast(
    id: *mut rdma_cm_id,
    addr: *const libc::sockaddr,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller gives a live id and an address.
    minus_one(unsafe { join(id, addr, false, context) })
}

/// `rdma_join_multicast_ex(3)`.
pub(crate) unsafe extern "C" fn join_multicast_ex(
    id: *mut rdma_cm_id,
    attr: *const rdma_cm_join_mc_attr_ex,
    context: *mut c_void,
) -> c_int {
    const NEEDED: u32 = RDMA_CM_JOIN_MC_ATTR_ADDRESS | RDMA_CM_JOIN_MC_ATTR_JOIN_FLAGS;
    // SAFETY: the caller gives attributes.
    let attr = unsafe { &*attr };
    if attr.comp_mask & !NEEDED != 0 {
        return minus_one(Err(Errno::OPNOTSUPP));
    }
    if attr.comp_mask != NEEDED || attr.join_flags > RDMA_MC_JOIN_FLAG_SENDONLY_FULLMEMBER {
        return minus_one(Err(Errno::INVAL));
    }
    let send_only = attr.join_flags == RDMA_MC_JOIN_FLAG_SENDONLY_FULLMEMBER;
    // SAFETY: the caller gives a live id and an address.
    minus_one(unsafe { join(id, attr.addr.cast(), send_only, context) })
}

/// # Safety
///
/// A live id and an address.
unsafe fn join(
    id: *mut rdma_cm_id,
    addr: *const libc::sockaddr,
    send_only: bool,
    context: *mut c_void,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let addr = address::socket_address(addr)?;
        {
            // Held until the member is there: its event may be another thread's.
            let mut state = state(id);
            let group = client(id).join(addr, send_only)?;
            state.members.push(Member {
                addr,
                group,
                context,
                send_only,
                attached: None,
            });
        }
        complete(id)
    }
}

/// An id has joined a group, or could not: attaches its queue pair. Gives what the program called
/// the membership, and how it went.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn joined(
    id: *mut rdma_cm_id,
    report: &CmReport,
) -> (*const c_void, Result<(), Errno>) {
    // SAFETY: by the caller's promise.
    let (mut state, queue_pair) = unsafe { (state(id), (*id).qp) };
    let member = state.members.iter_mut().find(|member| {
        report
            .group
            .as_ref()
            .is_some_and(|g| Arc::ptr_eq(g, &member.group))
    });
    let Some(member) = member else {
        return (std::ptr::null(), Ok(()));
    };
    let context = member.context.cast_const();
    if report.event.status != 0 {
        return (context, Err(errno(report.event.status)));
    }
    if queue_pair.is_null() || member.send_only {
        return (context, Ok(()));
    }
    let CmDetail::Datagram { gid, .. } = report.event.detail else {
        return (context, Ok(()));
    };
    // SAFETY: the id's queue pair is live.
    let attached = unsafe { ibv_qp::object(queue_pair) }
        .client
        .multicast(gid, true);
    if attached.is_ok() {
        member.attached = Some(gid);
    }
    (context, attached)
}

/// `rdma_leave_multicast(3)`: waits until the group's events are acknowledged.
pub(crate) unsafe extern "C" fn leave_multicast(
    id: *mut rdma_cm_id,
    addr: *const libc::sockaddr,
) -> c_int {
    // SAFETY: the caller gives a live id and an address.
    minus_one(unsafe { leave(id, addr) })
}

/// # Safety
///
/// A live id and an address.
unsafe fn leave(id: *mut rdma_cm_id, addr: *const libc::sockaddr) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let addr = address::socket_address(addr)?;
        let member = {
            let members = &mut state(id).members;
            let at = members.iter().position(|member| member.addr == addr);
            members.swap_remove(at.ok_or(Errno::ADDRNOTAVAIL)?)
        };
        if let (Some(gid), Some(queue_pair)) = (member.attached, (*id).qp.as_mut()) {
            // One that was destroyed and made anew is not attached.
            let _ = ibv_qp::object(queue_pair).client.multicast(gid, false);
        }
        client(id).leave(&member.group)
    }
}
