//! Shared receive queues and XRC domains.

use core::ffi::c_int;
use core::mem::zeroed;
use std::sync::Arc;

use freeflow_abi::*;

use super::{Context, Cq, Pd, Posted, Recv, RecvList, errno, name_of, operation, posted, verb};
use crate::suite::{Outcome, complain, fail};

/// An XRC domain.
pub(crate) struct Xrcd {
    pub(crate) ptr: *mut ibv_xrcd,
    ctx: Arc<Context>,
}

impl Xrcd {
    /// A domain of this file, or a private one; the error is errno.
    pub(crate) fn open(ctx: &Arc<Context>, fd: c_int) -> Result<Arc<Self>, c_int> {
        let mut init = ibv_xrcd_init_attr {
            comp_mask: IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS,
            fd,
            oflags: libc::O_CREAT,
        };
        let Some(open) = operation!(ctx.ptr, open_xrcd) else {
            return Err(libc::EOPNOTSUPP);
        };
        // SAFETY: the library's own operation on its open context.
        let ptr = unsafe { open(ctx.ptr, &mut init) };
        if ptr.is_null() {
            Err(errno())
        } else {
            Ok(Arc::new(Xrcd {
                ptr,
                ctx: ctx.clone(),
            }))
        }
    }
}

impl Drop for Xrcd {
    fn drop(&mut self) {
        let close = operation!(self.ctx.ptr, close_xrcd);
        // SAFETY: the library's own operation; the domain is live until now.
        let failed = close.map_or(libc::ENOSYS, |close| unsafe { close(self.ptr) });
        if failed != 0 {
            complain(format!("ibv_close_xrcd: {}", name_of(failed)));
        }
    }
}

/// A shared receive queue.
pub(crate) struct Srq {
    pub(crate) ptr: *mut ibv_srq,
    pub(crate) pd: Arc<Pd>,
    /// What was granted.
    pub(crate) granted: ibv_srq_attr,
    _xrc: Option<(Arc<Xrcd>, Arc<Cq>)>,
}

// SAFETY: verbs are thread-safe.
unsafe impl core::marker::Send for Xrcd {}
// SAFETY: as above.
unsafe impl Sync for Xrcd {}

// SAFETY: verbs are thread-safe.
unsafe impl core::marker::Send for Srq {}
// SAFETY: as above.
unsafe impl Sync for Srq {}

impl Srq {
    /// The error is errno.
    pub(crate) fn create(pd: &Arc<Pd>, max_wr: u32, max_sge: u32) -> Result<Arc<Self>, c_int> {
        // SAFETY: numbers and null pointers.
        let mut init: ibv_srq_init_attr = unsafe { zeroed() };
        init.attr = ibv_srq_attr {
            max_wr,
            max_sge,
            srq_limit: 0,
        };
        let ptr = verb!(ibv_create_srq(pd.ptr, &mut init));
        if ptr.is_null() {
            return Err(errno());
        }
        Ok(Arc::new(Srq {
            ptr,
            pd: pd.clone(),
            granted: init.attr,
            _xrc: None,
        }))
    }

    /// Of an XRC domain; the error is errno.
    pub(crate) fn create_xrc(
        pd: &Arc<Pd>,
        xrcd: &Arc<Xrcd>,
        cq: &Arc<Cq>,
        max_wr: u32,
    ) -> Result<Arc<Self>, c_int> {
        // SAFETY: numbers and null pointers.
        let mut init: ibv_srq_init_attr_ex = unsafe { zeroed() };
        init.attr = ibv_srq_attr {
            max_wr,
            max_sge: 1,
            srq_limit: 0,
        };
        init.comp_mask = IBV_SRQ_INIT_ATTR_TYPE
            | IBV_SRQ_INIT_ATTR_PD
            | IBV_SRQ_INIT_ATTR_XRCD
            | IBV_SRQ_INIT_ATTR_CQ;
        init.srq_type = IBV_SRQT_XRC;
        init.pd = pd.ptr;
        init.xrcd = xrcd.ptr;
        init.cq = cq.ptr;
        let Some(create) = operation!(pd.ctx.ptr, create_srq_ex) else {
            return Err(libc::EOPNOTSUPP);
        };
        // SAFETY: the library's own operation on live objects.
        let ptr = unsafe { create(pd.ctx.ptr, &mut init) };
        if ptr.is_null() {
            return Err(errno());
        }
        let xrc = Some((xrcd.clone(), cq.clone()));
        Ok(Arc::new(Srq {
            ptr,
            pd: pd.clone(),
            granted: init.attr,
            _xrc: xrc,
        }))
    }

    /// XRC's number of the queue.
    pub(crate) fn number(&self) -> Outcome<u32> {
        let mut number = 0;
        let get = operation!(self.pd.ctx.ptr, get_srq_num);
        // SAFETY: the library's own operation on its live queue.
        let failed = get.map_or(libc::ENOSYS, |get| unsafe { get(self.ptr, &mut number) });
        if failed != 0 {
            fail!("ibv_get_srq_num: {}", name_of(failed));
        }
        Ok(number)
    }

    pub(crate) fn post_recv(&self, requests: &[Recv]) -> Posted {
        let mut list = RecvList::new(requests);
        let mut bad = core::ptr::null_mut();
        // SAFETY: the operations of an open context, on its live queue, with a list that lives
        // across the call.
        let failed = unsafe {
            match (*self.pd.ctx.ptr).ops.post_srq_recv {
                Some(post) => post(self.ptr, list.head(), &mut bad),
                None => libc::ENOSYS,
            }
        };
        if failed == 0 {
            Ok(())
        } else {
            Err((failed, list.index(bad)))
        }
    }

    /// Posts, or fails the test.
    pub(crate) fn recv(&self, requests: &[Recv]) -> Outcome {
        posted("ibv_post_srq_recv", self.post_recv(requests))
    }

    /// 0 or errno.
    pub(crate) fn modify(&self, max_wr: Option<u32>, limit: Option<u32>) -> c_int {
        let mut attr = ibv_srq_attr {
            max_wr: max_wr.unwrap_or(0),
            max_sge: 0,
            srq_limit: limit.unwrap_or(0),
        };
        let mask = max_wr.map_or(0, |_| IBV_SRQ_MAX_WR) | limit.map_or(0, |_| IBV_SRQ_LIMIT);
        verb!(ibv_modify_srq(self.ptr, &mut attr, mask))
    }

    pub(crate) fn query(&self) -> Outcome<ibv_srq_attr> {
        let mut attr = ibv_srq_attr::default();
        let failed = verb!(ibv_query_srq(self.ptr, &mut attr));
        if failed != 0 {
            fail!("ibv_query_srq: {}", name_of(failed));
        }
        Ok(attr)
    }

    /// Tries to destroy it; the caller says what it expects.
    pub(crate) fn destroy_now(&self) -> c_int {
        verb!(ibv_destroy_srq(self.ptr))
    }
}

impl Drop for Srq {
    fn drop(&mut self) {
        let failed = verb!(ibv_destroy_srq(self.ptr));
        if failed != 0 {
            complain(format!("ibv_destroy_srq: {}", name_of(failed)));
        }
    }
}
