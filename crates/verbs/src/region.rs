//! Memory regions beyond `ibv_reg_mr(3)`: changed ones, null regions, advice, buffers.

use core::ffi::{c_int, c_uint, c_void};

use freeflow_abi::*;
use freeflow_client::{Advise, Errno, Mr as ClientMr, Rereg, Sge};

use crate::memory::{access, reg_mr_iova2};
use crate::objects::{Base, Buf, Mr, code, give, set_errno};

/// The object of a region that the client has made; `addr` and `length` are as the program sees
/// them.
///
/// # Safety
///
/// A live domain.
pub(crate) unsafe fn region(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    rkey: bool,
    made: Result<ClientMr, Errno>,
) -> Result<Box<Mr>, Errno> {
    // SAFETY: by the caller's promise.
    let context = unsafe { (*pd).context };
    made.map(|client| {
        let key = client.key().0;
        let c = ibv_mr {
            context,
            pd,
            addr,
            length,
            handle: client.number(),
            lkey: key,
            rkey: if rkey { key } else { 0 },
        };
        Box::new(Mr { c, client })
    })
}

/// `ibv_rereg_mr(3)`: 0 or `enum ibv_rereg_mr_err_code`, with errno. A region whose change was
/// refused is what it was, whatever the code lets the program expect. Forks need no preparation, so
/// that there are no errors of it.
pub(crate) unsafe extern "C" fn rereg_mr(
    mr: *mut ibv_mr,
    flags: c_int,
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access_flags: c_int,
) -> c_int {
    const KNOWN: c_int =
        IBV_REREG_MR_CHANGE_TRANSLATION | IBV_REREG_MR_CHANGE_PD | IBV_REREG_MR_CHANGE_ACCESS;
    let asks = |flag| flags & flag != 0;
    let moves = asks(IBV_REREG_MR_CHANGE_TRANSLATION);
    // SAFETY: the caller gives a live region.
    let object = unsafe { ibv_mr::object(mr) };
    if flags & !KNOWN != 0
        || !object.client.has_memory()
        || (moves && (length == 0 || addr.is_null()))
        || (access_flags != 0 && !asks(IBV_REREG_MR_CHANGE_ACCESS))
    {
        set_errno(libc::EINVAL);
        return IBV_REREG_MR_ERR_INPUT;
    }
    let change = || {
        if flags == 0 || (asks(IBV_REREG_MR_CHANGE_PD) && pd.is_null()) {
            return Err(Errno::INVAL);
        }
        let rights = asks(IBV_REREG_MR_CHANGE_ACCESS).then(|| access(access_flags as c_uint));
        object.client.rereg(&Rereg {
            // SAFETY: with this flag the caller gives a live domain.
            pd: asks(IBV_REREG_MR_CHANGE_PD).then(|| unsafe { &*ibv_pd::object(pd).client }),
            range: moves.then_some((addr as u64, length as u64)),
            access: rights.transpose()?,
        })
    };
    if let Err(errno) = change() {
        set_errno(code(errno));
        return IBV_REREG_MR_ERR_CMD;
    }
    // SAFETY: the caller may not use the region meanwhile.
    unsafe {
        if asks(IBV_REREG_MR_CHANGE_PD) {
            (*mr).pd = pd;
        }
        if moves {
            (*mr).addr = addr;
            (*mr).length = length;
        }
    }
    0
}

/// `ibv_alloc_null_mr(3)`: only its local key is valid.
pub(crate) unsafe extern "C" fn alloc_null_mr(pd: *mut ibv_pd) -> *mut ibv_mr {
    // SAFETY: the caller gives a live domain.
    unsafe {
        let made = ibv_pd::object(pd).client.alloc_null_mr();
        give(region(pd, std::ptr::null_mut(), usize::MAX, false, made))
    }
}

/// `ibv_advise_mr(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn advise_mr(
    pd: *mut ibv_pd,
    advice: c_uint,
    flags: u32,
    list: *mut ibv_sge,
    n: u32,
) -> c_int {
    let advice = match advice {
        IBV_ADVISE_MR_ADVICE_PREFETCH => Advise::Prefetch,
        IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE => Advise::PrefetchWrite,
        IBV_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT => Advise::PrefetchNoFault,
        _ => return libc::EOPNOTSUPP,
    };
    if flags & !IBV_ADVISE_MR_FLAG_FLUSH != 0 || n == 0 || list.is_null() {
        return libc::EINVAL;
    }
    // SAFETY: the caller gives a live domain and `n` elements; `Sge` has the layout of `ibv_sge`.
    let (domain, ranges) = unsafe {
        let ranges = std::slice::from_raw_parts(list.cast::<Sge>(), n as usize);
        (ibv_pd::object(pd), ranges)
    };
    crate::objects::status(domain.client.advise_mr(advice, ranges))
}

/// `ibv_reg_mr_ex(3)`. There are neither dma-bufs nor DMA handles.
pub(crate) unsafe extern "C" fn reg_mr_ex(
    pd: *mut ibv_pd,
    attr: *mut ibv_mr_init_attr,
) -> *mut ibv_mr {
    const KNOWN: u64 = IBV_REG_MR_MASK_IOVA | IBV_REG_MR_MASK_ADDR | IBV_REG_MR_MASK_BUF;
    const FD: u64 = IBV_REG_MR_MASK_FD | IBV_REG_MR_MASK_FD_OFFSET;
    // SAFETY: the caller gives attributes; the buffer is live if it is meant.
    let (attr, buffer) = unsafe {
        let attr = &*attr;
        let meant = attr.comp_mask & IBV_REG_MR_MASK_BUF != 0 && !attr.buf.is_null();
        (attr, meant.then(|| ibv_buf::object(attr.buf)))
    };
    let has = |bit| attr.comp_mask & bit != 0;
    let (addr, length) = (attr.addr, attr.length);
    let check = || {
        if has(IBV_REG_MR_MASK_ADDR) == has(IBV_REG_MR_MASK_FD)
            || (has(FD) && has(IBV_REG_MR_MASK_BUF))
        {
            return Err(Errno::INVAL);
        }
        if attr.comp_mask & !KNOWN != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        if has(IBV_REG_MR_MASK_BUF) {
            let inside = |b: &Buf| b.pd == pd && b.client.contains(addr as u64, length as u64);
            return buffer.is_some_and(inside).then_some(()).ok_or(Errno::INVAL);
        }
        Ok(())
    };
    if let Err(errno) = check() {
        set_errno(code(errno));
        return std::ptr::null_mut();
    }
    let iova = if has(IBV_REG_MR_MASK_IOVA) {
        attr.iova
    } else {
        addr as u64
    };
    // SAFETY: the caller gives a live domain.
    unsafe { reg_mr_iova2(pd, addr, length, iova, attr.access as c_uint) }
}

/// `ibv_alloc_buf(3)`.
pub(crate) unsafe extern "C" fn alloc_buf(
    pd: *mut ibv_pd,
    size: usize,
    buf: *mut *mut ibv_buf,
) -> *mut c_void {
    // SAFETY: the caller gives a live domain.
    let made = unsafe { ibv_pd::object(pd) }.client.alloc_buf(size as u64);
    let addr = made.as_ref().map_or(0, |client| client.addr());
    let given: *mut ibv_buf = give(made.map(|client| {
        Box::new(Buf {
            c: ibv_buf { _opaque: 0 },
            pd,
            client,
        })
    }));
    if !given.is_null() {
        // SAFETY: the caller gives a place for the handle.
        unsafe { *buf = given };
    }
    addr as *mut c_void
}

/// `ibv_free_buf(3)`.
pub(crate) unsafe extern "C" fn free_buf(buf: *mut ibv_buf) {
    // SAFETY: the caller gives a live buffer up.
    unsafe { ibv_buf::take(buf) }.client.free();
}

/// `ibv_reg_buf_mr(3)`.
pub(crate) unsafe extern "C" fn reg_buf_mr(
    pd: *mut ibv_pd,
    buf: *mut ibv_buf,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    let mut attr = ibv_mr_init_attr {
        length,
        access,
        comp_mask: IBV_REG_MR_MASK_BUF | IBV_REG_MR_MASK_ADDR,
        iova: 0,
        addr,
        fd: -1,
        fd_offset: 0,
        dmah: std::ptr::null_mut(),
        buf,
    };
    // SAFETY: the caller gives a live domain and a live buffer.
    unsafe { reg_mr_ex(pd, &mut attr) }
}

/// `ibv_export_buf_dmabuf_fd(3)`: no buffer is backed by a dma-buf.
pub(crate) unsafe extern "C" fn export_buf_dmabuf_fd(_buf: *mut ibv_buf) -> c_int {
    set_errno(libc::ENODATA);
    -1
}
