//! Memory windows.

use core::ffi::{c_int, c_uint};

use freeflow_abi::*;
use freeflow_client::{Access, Bind, Errno, MwType, SendFlags, SendWr};

use crate::objects::{Base, Mw, give, status};

/// The bits of a key that `ibv_inc_rkey(3)` counts.
const TAG: u32 = 0xFF;

/// `ibv_alloc_mw(3)`.
pub(crate) unsafe extern "C" fn alloc_mw(pd: *mut ibv_pd, kind: c_uint) -> *mut ibv_mw {
    // SAFETY: the caller gives a live domain.
    let (domain, context) = unsafe { (&ibv_pd::object(pd).client, (*pd).context) };
    let made = MwType::from_raw(kind).ok_or(Errno::INVAL);
    let made = made.and_then(|kind| domain.alloc_mw(kind));
    give(made.map(|client| {
        let c = ibv_mw {
            context,
            pd,
            rkey: client.key().0,
            handle: client.number(),
            kind,
        };
        Box::new(Mw { c, client })
    }))
}

/// `ibv_dealloc_mw(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    // SAFETY: the caller gives a live window; only one that is gone is dropped.
    unsafe {
        let result = ibv_mw::object(mw).client.dealloc();
        if result.is_ok() {
            drop(ibv_mw::take(mw));
        }
        status(result)
    }
}

/// The request that binds a window of this kind under a key. What is wrong with it otherwise, its
/// completion says.
///
/// # Safety
///
/// A live window or null; a live region or null in `info`.
pub(crate) unsafe fn request(
    mw: *mut ibv_mw,
    kind: MwType,
    rkey: u32,
    info: &ibv_mw_bind_info,
    wr_id: u64,
    flags: SendFlags,
) -> Result<SendWr, Errno> {
    if mw.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: by the caller's promise.
    let (window, mr) = unsafe { (&ibv_mw::object(mw).client, info.mr.as_ref()) };
    if window.kind() != kind {
        return Err(Errno::INVAL);
    }
    let bind = Bind {
        window: window.number(),
        rkey,
        lkey: mr.map_or(0, |mr| mr.lkey),
        addr: info.addr,
        len: info.length,
        access: info.mw_access_flags & !Access::OPTIONAL_RANGE,
    };
    Ok(SendWr::bind(wr_id, flags, &bind))
}

/// `ibv_bind_mw(3)`: 0 or errno. The window's key is the new one at once; if the completion says
/// that binding failed, the old one stands.
pub(crate) unsafe extern "C" fn bind_mw(
    qp: *mut ibv_qp,
    mw: *mut ibv_mw,
    bind: *mut ibv_mw_bind,
) -> c_int {
    // SAFETY: the caller gives a live queue pair, a live window, and what to bind.
    unsafe {
        let bind = &*bind;
        let zero_based = Access::ZERO_BASED.bits();
        if bind.bind_info.mw_access_flags & zero_based != 0 {
            // Not with type 1 (IBTA volume 1, o10-36.2.2).
            return libc::EINVAL;
        }
        let old = (*mw).rkey;
        let rkey = old & !TAG | old.wrapping_add(1) & TAG;
        let flags = SendFlags::from_bits_truncate(bind.send_flags as u8);
        let posted =
            request(mw, MwType::One, rkey, &bind.bind_info, bind.wr_id, flags).and_then(|wr| {
                let mut queue = ibv_qp::object(qp).client.lock_send();
                queue.push(&wr, &[])?;
                (*mw).rkey = rkey;
                queue.commit();
                Ok(())
            });
        status(posted)
    }
}
