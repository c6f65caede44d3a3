//! Memory regions and windows, address handles.

use core::ffi::c_int;
use std::sync::Arc;

use freeflow_abi::*;

use super::{Buf, Pd, Sge, errno, name_of, verb};
use crate::suite::{Outcome, complain, fail};

/// A memory region.
pub(crate) struct Mr {
    pub(crate) ptr: *mut ibv_mr,
    /// Address that requests use for its first byte.
    pub(crate) base: u64,
    pub(crate) buf: Arc<Buf>,
    _pd: Arc<Pd>,
}

// SAFETY: verbs are thread-safe.
unsafe impl core::marker::Send for Mr {}
// SAFETY: as above.
unsafe impl Sync for Mr {}

impl Mr {
    /// Registers a part of a buffer; the error is errno.
    pub(crate) fn register(
        pd: &Arc<Pd>,
        buf: &Arc<Buf>,
        at: usize,
        len: usize,
        access: u32,
    ) -> Result<Self, c_int> {
        let base = buf.addr() + at as u64;
        let ptr = verb!(ibv_reg_mr(pd.ptr, base as *mut _, len, access as c_int));
        Mr::adopt(ptr, base, buf, pd)
    }

    pub(crate) fn register_iova(
        pd: &Arc<Pd>,
        buf: &Arc<Buf>,
        len: usize,
        iova: u64,
        access: u32,
    ) -> Result<Self, c_int> {
        let ptr = verb!(ibv_reg_mr_iova2(
            pd.ptr,
            buf.addr() as *mut _,
            len,
            iova,
            access
        ));
        Mr::adopt(ptr, iova, buf, pd)
    }

    pub(crate) fn adopt(
        ptr: *mut ibv_mr,
        base: u64,
        buf: &Arc<Buf>,
        pd: &Arc<Pd>,
    ) -> Result<Self, c_int> {
        if ptr.is_null() {
            return Err(errno());
        }
        Ok(Mr {
            ptr,
            base,
            buf: buf.clone(),
            _pd: pd.clone(),
        })
    }

    /// A buffer of its own, registered.
    pub(crate) fn new(pd: &Arc<Pd>, len: usize, access: u32) -> Outcome<Self> {
        let buf = Arc::new(Buf::new(len)?);
        match Mr::register(pd, &buf, 0, len, access) {
            Ok(mr) => Ok(mr),
            Err(errno) => fail!(
                "ibv_reg_mr of {len} bytes, access {access:#x}: {}",
                name_of(errno)
            ),
        }
    }

    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: a live region.
        unsafe { (*self.ptr).lkey }
    }

    pub(crate) fn rkey(&self) -> u32 {
        // SAFETY: a live region.
        unsafe { (*self.ptr).rkey }
    }

    /// An element of this region.
    pub(crate) fn sge(&self, at: usize, len: usize) -> Sge {
        Sge {
            addr: self.base + at as u64,
            length: len as u32,
            lkey: self.lkey(),
        }
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        let failed = verb!(ibv_dereg_mr(self.ptr));
        if failed != 0 {
            complain(format!("ibv_dereg_mr: {}", name_of(failed)));
        }
    }
}

/// A memory window.
pub(crate) struct Mw {
    pub(crate) ptr: *mut ibv_mw,
    pd: Arc<Pd>,
}

impl Mw {
    /// The error is errno.
    pub(crate) fn new(pd: &Arc<Pd>, kind: u32) -> Result<Self, c_int> {
        // SAFETY: the operations of an open context; the domain is live.
        let ptr = unsafe {
            match (*pd.ctx.ptr).ops.alloc_mw {
                Some(alloc) => alloc(pd.ptr, kind),
                None => return Err(libc::EOPNOTSUPP),
            }
        };
        if ptr.is_null() {
            Err(errno())
        } else {
            Ok(Mw {
                ptr,
                pd: pd.clone(),
            })
        }
    }

    pub(crate) fn rkey(&self) -> u32 {
        // SAFETY: a live window.
        unsafe { (*self.ptr).rkey }
    }

    /// Notes the key of a binding by work request: a later request reads it from the window.
    pub(crate) fn set_rkey(&self, rkey: u32) {
        // SAFETY: a live window; the library reads the field when a request is posted only.
        unsafe { (*self.ptr).rkey = rkey };
    }
}

impl Drop for Mw {
    fn drop(&mut self) {
        // SAFETY: the operations of an open context; the window is live until now.
        let failed = unsafe {
            (*self.pd.ctx.ptr)
                .ops
                .dealloc_mw
                .map_or(libc::ENOSYS, |dealloc| dealloc(self.ptr))
        };
        if failed != 0 {
            complain(format!("ibv_dealloc_mw: {}", name_of(failed)));
        }
    }
}

/// An address handle.
pub(crate) struct Ah {
    pub(crate) ptr: *mut ibv_ah,
    _pd: Arc<Pd>,
}

impl Ah {
    pub(crate) fn new(pd: &Arc<Pd>, gid: [u8; 16]) -> Outcome<Self> {
        let mut attr = address(pd, gid);
        let ptr = verb!(ibv_create_ah(pd.ptr, &mut attr));
        if ptr.is_null() {
            fail!("ibv_create_ah: {}", name_of(errno()));
        }
        Ok(Ah {
            ptr,
            _pd: pd.clone(),
        })
    }

    /// An answer's address, from a datagram that came (`ibv_create_ah_from_wc(3)`).
    pub(crate) fn from_wc(pd: &Arc<Pd>, wc: &super::Wc, grh: &[u8; 40]) -> Outcome<Self> {
        let mut raw = wc.raw();
        let mut grh = *grh;
        let ptr = verb!(ibv_create_ah_from_wc(
            pd.ptr,
            &mut raw,
            grh.as_mut_ptr().cast(),
            1
        ));
        if ptr.is_null() {
            fail!("ibv_create_ah_from_wc: {}", name_of(errno()));
        }
        Ok(Ah {
            ptr,
            _pd: pd.clone(),
        })
    }
}

/// The address that a datagram came from (`ibv_init_ah_from_wc(3)`).
pub(crate) fn address_of(pd: &Arc<Pd>, wc: &super::Wc, grh: &[u8; 40]) -> Outcome<ibv_ah_attr> {
    let (mut raw, mut grh, mut attr) = (wc.raw(), *grh, address(pd, [0; 16]));
    let at = grh.as_mut_ptr().cast();
    let got = verb!(ibv_init_ah_from_wc(pd.ctx.ptr, 1, &mut raw, at, &mut attr));
    if got != 0 {
        fail!("ibv_init_ah_from_wc: {got}, errno {}", name_of(errno()));
    }
    Ok(attr)
}

/// The address of a GID, reached from the domain's device.
pub(crate) fn address(pd: &Arc<Pd>, gid: [u8; 16]) -> ibv_ah_attr {
    ibv_ah_attr {
        grh: ibv_global_route {
            dgid: ibv_gid { raw: gid },
            flow_label: 0,
            sgid_index: pd.ctx.gid_index,
            hop_limit: 64,
            traffic_class: 0,
        },
        dlid: 0,
        sl: 0,
        src_path_bits: 0,
        static_rate: 0,
        is_global: 1,
        port_num: 1,
    }
}

impl Drop for Ah {
    fn drop(&mut self) {
        let failed = verb!(ibv_destroy_ah(self.ptr));
        if failed != 0 {
            complain(format!("ibv_destroy_ah: {}", name_of(failed)));
        }
    }
}
