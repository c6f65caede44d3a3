//! Queue pairs.

use core::ffi::{c_int, c_uint};
use core::mem::zeroed;
use std::sync::Arc;

use freeflow_abi::*;

use super::{Cq, Pd, Recv, RecvList, Send, SendList, Srq, errno, name_of, operation, verb};
use crate::suite::{Outcome, complain, fail};

/// How a queue pair is made.
#[derive(Clone)]
pub(crate) struct QpSpec {
    pub(crate) kind: c_uint,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) sig_all: bool,
    /// Operations of the extended interface; 0 uses `ibv_create_qp`.
    pub(crate) ops: u64,
    pub(crate) srq: Option<Arc<Srq>>,
}

/// Attributes to modify, with their mask.
#[derive(Clone, Copy)]
pub(crate) struct Attr {
    pub(crate) raw: ibv_qp_attr,
    pub(crate) mask: c_int,
}

impl Attr {
    pub(crate) fn new() -> Self {
        // SAFETY: plain numbers.
        let raw = unsafe { zeroed() };
        Attr { raw, mask: 0 }
    }

    pub(crate) fn state(state: c_uint) -> Self {
        Attr::new().with(IBV_QP_STATE, |a| a.qp_state = state)
    }

    /// Sets fields and names them in the mask.
    pub(crate) fn with(mut self, mask: c_int, set: impl FnOnce(&mut ibv_qp_attr)) -> Self {
        set(&mut self.raw);
        self.mask |= mask;
        self
    }
}

/// Whether a post failed: errno and the place of the request that was bad.
pub(crate) type Posted = Result<(), (c_int, Option<usize>)>;

/// A queue pair.
pub(crate) struct Qp {
    pub(crate) ptr: *mut ibv_qp,
    pub(crate) kind: c_uint,
    /// Capacities that were granted.
    pub(crate) cap: ibv_qp_cap,
    pub(crate) pd: Arc<Pd>,
    _cqs: [Arc<Cq>; 2],
    _srq: Option<Arc<Srq>>,
}

// SAFETY: verbs are thread-safe.
unsafe impl core::marker::Send for Qp {}
// SAFETY: as above.
unsafe impl Sync for Qp {}

impl Qp {
    /// The error is errno.
    pub(crate) fn create(
        pd: &Arc<Pd>,
        send_cq: &Arc<Cq>,
        recv_cq: &Arc<Cq>,
        spec: &QpSpec,
    ) -> Result<Self, c_int> {
        // SAFETY: numbers and null pointers.
        let mut init: ibv_qp_init_attr_ex = unsafe { zeroed() };
        init.send_cq = send_cq.ptr;
        init.recv_cq = recv_cq.ptr;
        init.srq = spec.srq.as_ref().map_or(core::ptr::null_mut(), |s| s.ptr);
        init.cap = spec.cap;
        init.qp_type = spec.kind;
        init.sq_sig_all = spec.sig_all.into();
        let ptr = if spec.ops == 0 {
            // The plain structure is how the extended one begins.
            verb!(ibv_create_qp(pd.ptr, (&raw mut init).cast()))
        } else {
            init.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
            init.pd = pd.ptr;
            init.send_ops_flags = spec.ops;
            let Some(create) = operation!(pd.ctx.ptr, create_qp_ex) else {
                return Err(libc::EOPNOTSUPP);
            };
            // SAFETY: the library's own operation on live objects.
            unsafe { create(pd.ctx.ptr, &mut init) }
        };
        if ptr.is_null() {
            return Err(errno());
        }
        Ok(Qp {
            ptr,
            kind: spec.kind,
            cap: init.cap,
            pd: pd.clone(),
            _cqs: [send_cq.clone(), recv_cq.clone()],
            _srq: spec.srq.clone(),
        })
    }

    pub(crate) fn new(
        pd: &Arc<Pd>,
        send_cq: &Arc<Cq>,
        recv_cq: &Arc<Cq>,
        spec: &QpSpec,
    ) -> Outcome<Self> {
        match Qp::create(pd, send_cq, recv_cq, spec) {
            Ok(qp) => Ok(qp),
            Err(errno) => fail!(
                "creating a queue pair of type {}: {}",
                spec.kind,
                name_of(errno)
            ),
        }
    }

    /// Takes over a queue pair that an operation of the extended table made.
    pub(crate) fn adopt(
        ptr: *mut ibv_qp,
        kind: c_uint,
        pd: &Arc<Pd>,
        cq: &Arc<Cq>,
        cap: ibv_qp_cap,
    ) -> Self {
        Qp {
            ptr,
            kind,
            cap,
            pd: pd.clone(),
            _cqs: [cq.clone(), cq.clone()],
            _srq: None,
        }
    }

    pub(crate) fn number(&self) -> u32 {
        // SAFETY: a live queue pair.
        unsafe { (*self.ptr).qp_num }
    }

    /// 0 or errno.
    pub(crate) fn modify(&self, attr: &Attr) -> c_int {
        let mut raw = attr.raw;
        verb!(ibv_modify_qp(self.ptr, &mut raw, attr.mask))
    }

    /// Modifies, or fails the test.
    pub(crate) fn must_modify(&self, attr: &Attr) -> Outcome {
        match self.modify(attr) {
            0 => Ok(()),
            failed => fail!(
                "ibv_modify_qp to state {} with mask {:#x}: {}",
                attr.raw.qp_state,
                attr.mask,
                name_of(failed)
            ),
        }
    }

    pub(crate) fn set_state(&self, state: c_uint) -> Outcome {
        self.must_modify(&Attr::state(state))
    }

    pub(crate) fn query(&self) -> Outcome<ibv_qp_attr> {
        // SAFETY: numbers and null pointers.
        let (mut attr, mut init): (ibv_qp_attr, ibv_qp_init_attr) = unsafe { (zeroed(), zeroed()) };
        let failed = verb!(ibv_query_qp(self.ptr, &mut attr, (1 << 21) - 1, &mut init));
        if failed != 0 {
            fail!("ibv_query_qp: {}", name_of(failed));
        }
        Ok(attr)
    }

    pub(crate) fn post_send(&self, requests: &[Send]) -> Posted {
        self.post_send_list(&mut SendList::new(requests))
    }

    pub(crate) fn post_send_list(&self, list: &mut SendList) -> Posted {
        let mut bad = core::ptr::null_mut();
        // SAFETY: the operations of an open context, on its live queue pair, with a list that
        // lives across the call.
        let failed = unsafe {
            match (*self.pd.ctx.ptr).ops.post_send {
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

    pub(crate) fn post_recv(&self, requests: &[Recv]) -> Posted {
        self.post_recv_list(&mut RecvList::new(requests))
    }

    pub(crate) fn post_recv_list(&self, list: &mut RecvList) -> Posted {
        let mut bad = core::ptr::null_mut();
        // SAFETY: as in `post_send_list`.
        let failed = unsafe {
            match (*self.pd.ctx.ptr).ops.post_recv {
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
    pub(crate) fn send(&self, requests: &[Send]) -> Outcome {
        posted("ibv_post_send", self.post_send(requests))
    }

    /// Posts, or fails the test.
    pub(crate) fn recv(&self, requests: &[Recv]) -> Outcome {
        posted("ibv_post_recv", self.post_recv(requests))
    }
}

/// Fails the test if a post did.
pub(crate) fn posted(what: &str, result: Posted) -> Outcome {
    match result {
        Ok(()) => Ok(()),
        Err((errno, at)) => fail!("{what}: {} at request {at:?}", name_of(errno)),
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        let failed = verb!(ibv_destroy_qp(self.ptr));
        if failed != 0 {
            complain(format!("ibv_destroy_qp: {}", name_of(failed)));
        }
    }
}
