//! The extended interfaces: posting by calls (`ibv_wr_post(3)`) and polling by calls
//! (`ibv_create_cq_ex(3)`).

use core::ffi::c_int;
use core::mem::zeroed;
use std::sync::Arc;

use freeflow_abi::*;

use super::{Context, Cq, Mr, Mw, Qp, Sge, errno, operation, verb};
use crate::suite::{Outcome, Stop, skip};

/// Requests between `wr_start` and `wr_complete`.
pub(crate) struct Wr<'a> {
    qp: *mut ibv_qp_ex,
    _of: &'a Qp,
}

/// Calls an operation of the queue pair.
macro_rules! op {
    ($self:ident.$f:ident($($arg:expr),*)) => {{
        // SAFETY: a live queue pair of the extended kind; the operation is checked.
        unsafe {
            match (*$self.qp).$f {
                Some(f) => f($self.qp, $($arg),*),
                None => return Err(Stop::Fail(concat!(stringify!($f), " is absent").to_owned())),
            }
        }
    }};
}

impl<'a> Wr<'a> {
    /// `wr_start`.
    pub(crate) fn start(qp: &'a Qp) -> Outcome<Self> {
        let ex = verb!(ibv_qp_to_qp_ex(qp.ptr));
        if ex.is_null() {
            skip!("the queue pair has no extended interface");
        }
        let wr = Wr { qp: ex, _of: qp };
        op!(wr.wr_start());
        Ok(wr)
    }

    /// The number and the flags of the request that the next call opens.
    pub(crate) fn next(&self, wr_id: u64, flags: u32) -> &Self {
        // SAFETY: a live queue pair; between start and complete this thread alone writes these.
        unsafe {
            (*self.qp).wr_id = wr_id;
            (*self.qp).wr_flags = flags;
        }
        self
    }

    pub(crate) fn send(&self) -> Outcome {
        op!(self.wr_send());
        Ok(())
    }

    pub(crate) fn send_imm(&self, imm: u32) -> Outcome {
        op!(self.wr_send_imm(imm));
        Ok(())
    }

    pub(crate) fn send_inv(&self, rkey: u32) -> Outcome {
        op!(self.wr_send_inv(rkey));
        Ok(())
    }

    pub(crate) fn write(&self, rkey: u32, addr: u64) -> Outcome {
        op!(self.wr_rdma_write(rkey, addr));
        Ok(())
    }

    pub(crate) fn write_imm(&self, rkey: u32, addr: u64, imm: u32) -> Outcome {
        op!(self.wr_rdma_write_imm(rkey, addr, imm));
        Ok(())
    }

    pub(crate) fn read(&self, rkey: u32, addr: u64) -> Outcome {
        op!(self.wr_rdma_read(rkey, addr));
        Ok(())
    }

    pub(crate) fn cmp_swp(&self, rkey: u32, addr: u64, compare: u64, swap: u64) -> Outcome {
        op!(self.wr_atomic_cmp_swp(rkey, addr, compare, swap));
        Ok(())
    }

    pub(crate) fn fetch_add(&self, rkey: u32, addr: u64, add: u64) -> Outcome {
        op!(self.wr_atomic_fetch_add(rkey, addr, add));
        Ok(())
    }

    pub(crate) fn atomic_write(&self, rkey: u32, addr: u64, value: &[u8; 8]) -> Outcome {
        op!(self.wr_atomic_write(rkey, addr, value.as_ptr().cast()));
        Ok(())
    }

    /// Flushes of these types (`IBV_FLUSH_GLOBAL`: 1) a range of memory.
    pub(crate) fn flush(&self, rkey: u32, addr: u64, len: usize, types: u8) -> Outcome {
        const RANGE: u8 = 0;
        op!(self.wr_flush(rkey, addr, len, types, RANGE));
        Ok(())
    }

    pub(crate) fn local_inv(&self, rkey: u32) -> Outcome {
        op!(self.wr_local_inv(rkey));
        Ok(())
    }

    /// Binds a window of type 2 to all of a region.
    pub(crate) fn bind(&self, mw: &Mw, rkey: u32, mr: &Mr, length: u64, access: u32) -> Outcome {
        let info = ibv_mw_bind_info {
            mr: mr.ptr,
            addr: mr.base,
            length,
            mw_access_flags: access,
        };
        op!(self.wr_bind_mw(mw.ptr, rkey, &info));
        Ok(())
    }

    pub(crate) fn ud(&self, ah: &super::Ah, qpn: u32, qkey: u32) -> Outcome {
        op!(self.wr_set_ud_addr(ah.ptr, qpn, qkey));
        Ok(())
    }

    pub(crate) fn sge(&self, sge: Sge) -> Outcome {
        op!(self.wr_set_sge(sge.lkey, sge.addr, sge.length));
        Ok(())
    }

    pub(crate) fn sges(&self, sges: &[Sge]) -> Outcome {
        let c = |s: &Sge| ibv_sge {
            addr: s.addr,
            length: s.length,
            lkey: s.lkey,
        };
        let list: Vec<_> = sges.iter().map(c).collect();
        op!(self.wr_set_sge_list(list.len(), list.as_ptr()));
        Ok(())
    }

    pub(crate) fn inline(&self, bytes: &[u8]) -> Outcome {
        op!(self.wr_set_inline_data(bytes.as_ptr().cast_mut().cast(), bytes.len()));
        Ok(())
    }

    pub(crate) fn inline_list(&self, parts: &[&[u8]]) -> Outcome {
        let c = |p: &&[u8]| ibv_data_buf {
            addr: p.as_ptr().cast_mut().cast(),
            length: p.len(),
        };
        let list: Vec<_> = parts.iter().map(c).collect();
        op!(self.wr_set_inline_data_list(list.len(), list.as_ptr()));
        Ok(())
    }

    /// 0 or errno.
    pub(crate) fn complete(self) -> Outcome<c_int> {
        Ok(op!(self.wr_complete()))
    }

    pub(crate) fn abort(self) -> Outcome {
        op!(self.wr_abort());
        Ok(())
    }
}

/// A completion queue of the extended kind. It is destroyed as the ordinary queue that it is.
pub(crate) struct CqEx {
    pub(crate) cq: Arc<Cq>,
}

/// A polling turn, between `start_poll` and `end_poll`.
pub(crate) struct Reader<'a> {
    cq: *mut ibv_cq_ex,
    _of: &'a CqEx,
}

impl CqEx {
    /// The error is errno.
    pub(crate) fn create(
        ctx: &Arc<Context>,
        cqe: u32,
        wc_flags: u64,
        flags: u32,
    ) -> Result<Self, c_int> {
        // SAFETY: numbers and null pointers.
        let mut init: ibv_cq_init_attr_ex = unsafe { zeroed() };
        init.cqe = cqe;
        init.wc_flags = wc_flags;
        if flags != 0 {
            init.comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS;
            init.flags = flags;
        }
        let Some(create) = operation!(ctx.ptr, create_cq_ex) else {
            return Err(libc::EOPNOTSUPP);
        };
        // SAFETY: the library's own operation on its open context.
        let ptr = unsafe { create(ctx.ptr, &mut init) };
        if ptr.is_null() {
            return Err(errno());
        }
        let cq = Arc::new(Cq {
            ptr: ptr.cast(),
            ctx: ctx.clone(),
            _channel: None,
        });
        Ok(CqEx { cq })
    }

    /// `start_poll`: `None` if the queue is empty.
    pub(crate) fn start(&self) -> Outcome<Option<Reader<'_>>> {
        let cq = self.cq.ptr.cast::<ibv_cq_ex>();
        let mut attr = ibv_poll_cq_attr { comp_mask: 0 };
        // SAFETY: a live queue of the extended kind.
        let got = unsafe {
            match (*cq).start_poll {
                Some(start) => start(cq, &mut attr),
                None => return Err(Stop::Fail("start_poll is absent".to_owned())),
            }
        };
        match got {
            0 => Ok(Some(Reader { cq, _of: self })),
            libc::ENOENT => Ok(None),
            other => Err(Stop::Fail(format!("start_poll returned {other}"))),
        }
    }
}

/// Reads a field of the completion.
macro_rules! read {
    ($($name:ident $f:ident $t:ty;)*) => {
        $(pub(crate) fn $name(&self) -> Outcome<$t> {
            // SAFETY: a live queue in a polling turn; the function is checked.
            unsafe {
                match (*self.cq).$f {
                    Some(f) => Ok(f(self.cq)),
                    None => Err(Stop::Fail(concat!(stringify!($f), " is absent").to_owned())),
                }
            }
        })*
    };
}

impl Reader<'_> {
    /// `next_poll`: whether there is another completion.
    pub(crate) fn next(&self) -> Outcome<bool> {
        // SAFETY: a live queue in a polling turn.
        let got = unsafe {
            match (*self.cq).next_poll {
                Some(next) => next(self.cq),
                None => return Err(Stop::Fail("next_poll is absent".to_owned())),
            }
        };
        match got {
            0 => Ok(true),
            libc::ENOENT => Ok(false),
            other => Err(Stop::Fail(format!("next_poll returned {other}"))),
        }
    }

    pub(crate) fn wr_id(&self) -> u64 {
        // SAFETY: a live queue in a polling turn.
        unsafe { (*self.cq).wr_id }
    }

    pub(crate) fn status(&self) -> u32 {
        // SAFETY: a live queue in a polling turn.
        unsafe { (*self.cq).status }
    }

    read! {
        opcode read_opcode u32;
        vendor_err read_vendor_err u32;
        byte_len read_byte_len u32;
        imm read_imm_data u32;
        qp_num read_qp_num u32;
        flags read_wc_flags u32;
        timestamp read_completion_ts u64;
        wallclock read_completion_wallclock_ns u64;
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        // SAFETY: a live queue in a polling turn, which ends.
        unsafe {
            if let Some(end) = (*self.cq).end_poll {
                end(self.cq);
            }
        }
    }
}
