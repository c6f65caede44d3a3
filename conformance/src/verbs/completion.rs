//! Completion channels and queues.

use core::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_abi::*;
use serde::{Deserialize, Serialize};

use super::{Context, errno, name_of, readable, verb};
use crate::suite::{Outcome, complain, fail};

/// A completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wc {
    pub(crate) wr_id: u64,
    pub(crate) status: u32,
    pub(crate) opcode: u32,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    /// As it is in memory.
    pub(crate) imm: u32,
    pub(crate) qp_num: u32,
    pub(crate) src_qp: u32,
    pub(crate) flags: u32,
    pub(crate) pkey_index: u16,
    pub(crate) slid: u16,
    pub(crate) sl: u8,
}

impl From<&ibv_wc> for Wc {
    fn from(wc: &ibv_wc) -> Self {
        Wc {
            wr_id: wc.wr_id,
            status: wc.status,
            opcode: wc.opcode,
            vendor_err: wc.vendor_err,
            byte_len: wc.byte_len,
            imm: wc.imm_data,
            qp_num: wc.qp_num,
            src_qp: wc.src_qp,
            flags: wc.wc_flags,
            pkey_index: wc.pkey_index,
            slid: wc.slid,
            sl: wc.sl,
        }
    }
}

impl Wc {
    /// The C structure again.
    pub(crate) fn raw(&self) -> ibv_wc {
        ibv_wc {
            wr_id: self.wr_id,
            status: self.status,
            opcode: self.opcode,
            vendor_err: self.vendor_err,
            byte_len: self.byte_len,
            imm_data: self.imm,
            qp_num: self.qp_num,
            src_qp: self.src_qp,
            wc_flags: self.flags,
            pkey_index: self.pkey_index,
            slid: self.slid,
            sl: self.sl,
            dlid_path_bits: 0,
        }
    }
}

/// A completion channel.
pub(crate) struct Channel {
    pub(crate) ptr: *mut ibv_comp_channel,
    _ctx: Arc<Context>,
}

// SAFETY: verbs are thread-safe.
unsafe impl core::marker::Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    pub(crate) fn new(ctx: &Arc<Context>) -> Outcome<Arc<Self>> {
        let ptr = verb!(ibv_create_comp_channel(ctx.ptr));
        if ptr.is_null() {
            fail!("ibv_create_comp_channel: {}", name_of(errno()));
        }
        Ok(Arc::new(Channel {
            ptr,
            _ctx: ctx.clone(),
        }))
    }

    pub(crate) fn fd(&self) -> i32 {
        // SAFETY: a live channel.
        unsafe { (*self.ptr).fd }
    }

    /// The next event: its queue's address and the context that the queue was made with. Not
    /// acknowledged.
    pub(crate) fn take(&self) -> Result<(usize, usize), c_int> {
        let (mut cq, mut context) = (core::ptr::null_mut(), core::ptr::null_mut());
        if verb!(ibv_get_cq_event(self.ptr, &mut cq, &mut context)) != 0 {
            return Err(errno());
        }
        Ok((cq as usize, context as usize))
    }

    /// Waits for an event; not acknowledged.
    pub(crate) fn wait(&self, within: Duration) -> Option<(usize, usize)> {
        readable(self.fd(), within).then(|| self.take().ok())?
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let failed = verb!(ibv_destroy_comp_channel(self.ptr));
        if failed != 0 {
            complain(format!("ibv_destroy_comp_channel: {}", name_of(failed)));
        }
    }
}

/// A completion queue.
pub(crate) struct Cq {
    pub(crate) ptr: *mut ibv_cq,
    pub(crate) ctx: Arc<Context>,
    pub(crate) _channel: Option<Arc<Channel>>,
}

// SAFETY: verbs are thread-safe.
unsafe impl core::marker::Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

impl Cq {
    /// The error is errno.
    pub(crate) fn create(
        ctx: &Arc<Context>,
        cqe: c_int,
        channel: Option<&Arc<Channel>>,
        vector: c_int,
        context: usize,
    ) -> Result<Arc<Self>, c_int> {
        let c = channel.map_or(core::ptr::null_mut(), |c| c.ptr);
        let ptr = verb!(ibv_create_cq(
            ctx.ptr,
            cqe,
            context as *mut c_void,
            c,
            vector
        ));
        if ptr.is_null() {
            return Err(errno());
        }
        Ok(Arc::new(Cq {
            ptr,
            ctx: ctx.clone(),
            _channel: channel.cloned(),
        }))
    }

    pub(crate) fn new(ctx: &Arc<Context>, cqe: u32) -> Outcome<Arc<Self>> {
        Cq::with_channel(ctx, cqe, None)
    }

    pub(crate) fn with_channel(
        ctx: &Arc<Context>,
        cqe: u32,
        channel: Option<&Arc<Channel>>,
    ) -> Outcome<Arc<Self>> {
        match Cq::create(ctx, cqe as c_int, channel, 0, 0) {
            Ok(cq) => Ok(cq),
            Err(errno) => fail!("ibv_create_cq of {cqe}: {}", name_of(errno)),
        }
    }

    /// Entries that it says it has.
    pub(crate) fn cqe(&self) -> u32 {
        // SAFETY: a live queue.
        unsafe { (*self.ptr).cqe as u32 }
    }

    /// Polls once; the error is what ibv_poll_cq returned.
    pub(crate) fn poll(&self, max: usize) -> Result<Vec<Wc>, c_int> {
        let mut wcs = vec![ibv_wc::default(); max];
        // SAFETY: the operations of an open context, and room for `max` completions.
        let n = unsafe {
            match (*self.ctx.ptr).ops.poll_cq {
                Some(poll) => poll(self.ptr, max as c_int, wcs.as_mut_ptr()),
                None => -libc::ENOSYS,
            }
        };
        if n < 0 {
            return Err(n);
        }
        Ok(wcs.iter().take(n as usize).map(Wc::from).collect())
    }

    /// Polls until `n` completions have come.
    pub(crate) fn wait(&self, n: usize, within: Duration) -> Outcome<Vec<Wc>> {
        let end = Instant::now() + within;
        let mut got = Vec::with_capacity(n);
        while got.len() < n {
            match self.poll((n - got.len()).min(64)) {
                Ok(more) if more.is_empty() => {
                    if Instant::now() > end {
                        fail!(
                            "{} of {n} completions within {within:?}: {got:?}",
                            got.len()
                        );
                    }
                    std::thread::yield_now();
                }
                Ok(more) => got.extend(more),
                Err(code) => fail!(
                    "ibv_poll_cq returned {code} after {} completions",
                    got.len()
                ),
            }
        }
        Ok(got)
    }

    /// Asks for an event.
    pub(crate) fn arm(&self, solicited: bool) -> Outcome {
        // SAFETY: the operations of an open context and its live queue.
        let failed = unsafe {
            match (*self.ctx.ptr).ops.req_notify_cq {
                Some(arm) => arm(self.ptr, solicited.into()),
                None => libc::ENOSYS,
            }
        };
        if failed != 0 {
            fail!("ibv_req_notify_cq: {}", name_of(failed));
        }
        Ok(())
    }

    pub(crate) fn acknowledge(&self, events: u32) {
        verb!(ibv_ack_cq_events(self.ptr, events));
    }

    /// Tries to destroy it; the caller says what it expects.
    pub(crate) fn destroy_now(&self) -> c_int {
        verb!(ibv_destroy_cq(self.ptr))
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        let failed = verb!(ibv_destroy_cq(self.ptr));
        if failed != 0 {
            complain(format!("ibv_destroy_cq: {}", name_of(failed)));
        }
    }
}
