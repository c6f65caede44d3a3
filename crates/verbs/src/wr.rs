//! The extended posting interface (`ibv_wr_post(3)`): requests are built by calls, then posted
//! together or not at all.

use core::ffi::{c_int, c_void};

use freeflow_abi::*;
use freeflow_client::{
    Errno, FlushSpec, MwType, Opcode, QpType, SendFlags, SendQueue, SendWr, Sge,
};

use crate::mw;
use crate::objects::{Base, code};

/// What is between wr_start and wr_complete.
#[derive(Default)]
pub(crate) struct Builder {
    queue: Option<SendQueue<'static>>,
    /// The request that setters still add to.
    open: Option<SendWr>,
    sges: Vec<Sge>,
    /// Inline data is copied when it is set, as the program may change it at once.
    inline: Option<Vec<u8>>,
    error: Option<Errno>,
}

const RDMA: u64 = IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM;
const SEND: u64 = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM;
const READ: u64 = IBV_QP_EX_WITH_RDMA_READ
    | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
    | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD;

const WINDOWS: u64 =
    IBV_QP_EX_WITH_LOCAL_INV | IBV_QP_EX_WITH_BIND_MW | IBV_QP_EX_WITH_SEND_WITH_INV;
const PLACED: u64 = IBV_QP_EX_WITH_FLUSH | IBV_QP_EX_WITH_ATOMIC_WRITE;

/// Whether a queue pair of this type can have the operations.
pub(crate) fn check_ops(qp_type: QpType, ops: u64) -> Result<(), Errno> {
    let offered = match qp_type {
        QpType::Rc | QpType::XrcSend => SEND | RDMA | READ | WINDOWS | PLACED,
        QpType::Uc => SEND | RDMA | WINDOWS,
        QpType::Ud => SEND,
        QpType::XrcRecv => 0,
    };
    if ops & !offered == 0 {
        Ok(())
    } else {
        Err(Errno::OPNOTSUPP)
    }
}

/// The queue pair's structure with the operations that it was created for.
pub(crate) fn extended(qp_base: ibv_qp, ops: u64) -> ibv_qp_ex {
    let has = |op| ops & op != 0;
    ibv_qp_ex {
        qp_base,
        comp_mask: 0,
        wr_id: 0,
        wr_flags: 0,
        wr_atomic_cmp_swp: has(IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP).then_some(cmp_swp as _),
        wr_atomic_fetch_add: has(IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD).then_some(fetch_add as _),
        wr_bind_mw: has(IBV_QP_EX_WITH_BIND_MW).then_some(bind_mw as _),
        wr_local_inv: has(IBV_QP_EX_WITH_LOCAL_INV).then_some(local_inv as _),
        wr_rdma_read: has(IBV_QP_EX_WITH_RDMA_READ).then_some(rdma_read as _),
        wr_rdma_write: has(IBV_QP_EX_WITH_RDMA_WRITE).then_some(rdma_write as _),
        wr_rdma_write_imm: has(IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM).then_some(rdma_write_imm as _),
        wr_send: has(IBV_QP_EX_WITH_SEND).then_some(send as _),
        wr_send_imm: has(IBV_QP_EX_WITH_SEND_WITH_IMM).then_some(send_imm as _),
        wr_send_inv: has(IBV_QP_EX_WITH_SEND_WITH_INV).then_some(send_inv as _),
        wr_send_tso: None,
        wr_set_ud_addr: Some(set_ud_addr),
        wr_set_xrc_srqn: Some(set_xrc_srqn),
        wr_set_inline_data: Some(set_inline_data),
        wr_set_inline_data_list: Some(set_inline_data_list),
        wr_set_sge: Some(set_sge),
        wr_set_sge_list: Some(set_sge_list),
        wr_start: Some(start),
        wr_complete: Some(complete),
        wr_abort: Some(abort),
        wr_atomic_write: has(IBV_QP_EX_WITH_ATOMIC_WRITE).then_some(atomic_write as _),
        wr_flush: has(IBV_QP_EX_WITH_FLUSH).then_some(flush as _),
    }
}

/// The builder of a queue pair.
///
/// # Safety
///
/// A live queue pair, the caller between wr_start and wr_complete: then it is the only one.
unsafe fn builder<'a>(qp: *mut ibv_qp_ex) -> &'a mut Builder {
    // SAFETY: by the caller's promise nobody else has a reference.
    unsafe { &mut *ibv_qp_ex::object(qp).builder.get() }
}

impl Builder {
    fn begin(&mut self, queue: SendQueue<'static>) {
        self.queue = Some(queue);
        self.forget();
        self.error = None;
    }

    fn forget(&mut self) {
        self.open = None;
        self.sges.clear();
        self.inline = None;
    }

    fn fail(&mut self, errno: Errno) {
        self.error.get_or_insert(errno);
    }

    /// Pushes the request that is open.
    fn close(&mut self) {
        let Some(mut wr) = self.open.take() else {
            return;
        };
        if let Some(bytes) = &self.inline {
            wr.flags |= SendFlags::INLINE;
            self.sges.clear();
            let addr = bytes.as_ptr() as u64;
            self.sges.push(Sge {
                addr,
                length: bytes.len() as u32,
                lkey: 0,
            });
        } else {
            wr.flags -= SendFlags::INLINE;
        }
        let Some(queue) = &mut self.queue else {
            return self.fail(Errno::INVAL);
        };
        if self.error.is_none() {
            // SAFETY: the only inline element is our own copy, which lives until `forget`.
            let pushed = unsafe { queue.push(&wr, &self.sges) };
            if let Err(errno) = pushed {
                self.fail(errno);
            }
        }
        self.forget();
    }
}

/// Opens a request with the program's number and flags.
///
/// # Safety
///
/// As [`builder`].
unsafe fn open(qp: *mut ibv_qp_ex, opcode: Opcode, fill: impl FnOnce(&mut SendWr)) {
    // SAFETY: by the caller's promise.
    let (builder, wr_id, flags) = unsafe { (builder(qp), (*qp).wr_id, (*qp).wr_flags) };
    builder.close();
    let flags = SendFlags::from_bits_truncate(flags as u8);
    let mut wr = SendWr {
        wr_id,
        opcode,
        flags,
        ..SendWr::default()
    };
    fill(&mut wr);
    builder.open = Some(wr);
}

unsafe extern "C" fn start(qp: *mut ibv_qp_ex) {
    // SAFETY: the caller gives a live queue pair. The lock's guard borrows it: it is released in
    // `complete` or `abort`, before the queue pair may be destroyed. From here on the caller is
    // the only one with the builder.
    unsafe {
        let queue = ibv_qp_ex::object(qp).client.lock_send();
        let queue = core::mem::transmute::<SendQueue<'_>, SendQueue<'static>>(queue);
        builder(qp).begin(queue);
    }
}

unsafe extern "C" fn complete(qp: *mut ibv_qp_ex) -> c_int {
    // SAFETY: the caller is between wr_start and this. The builder is left before the lock is.
    let (queue, error) = unsafe {
        let builder = builder(qp);
        builder.close();
        (builder.queue.take(), builder.error.take())
    };
    match (queue, error) {
        (Some(queue), None) => {
            queue.commit();
            0
        }
        (_, error) => code(error.unwrap_or(Errno::INVAL)),
    }
}

unsafe extern "C" fn abort(qp: *mut ibv_qp_ex) {
    // SAFETY: as in `complete`; the guard's drop discards what was pushed.
    let queue = unsafe {
        let builder = builder(qp);
        builder.forget();
        builder.queue.take()
    };
    drop(queue);
}

unsafe extern "C" fn send(qp: *mut ibv_qp_ex) {
    // SAFETY: the caller is between wr_start and wr_complete; so in all that follow.
    unsafe { open(qp, Opcode::Send, |_| {}) };
}

unsafe extern "C" fn send_imm(qp: *mut ibv_qp_ex, imm: u32) {
    // SAFETY: see `send`.
    unsafe { open(qp, Opcode::SendImm, |wr| wr.imm = imm) };
}

unsafe extern "C" fn rdma_write(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64) {
    // SAFETY: see `send`.
    unsafe {
        open(qp, Opcode::RdmaWrite, |wr| {
            wr.rkey = rkey;
            wr.remote_addr = remote_addr;
        });
    }
}

unsafe extern "C" fn rdma_write_imm(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64, imm: u32) {
    // SAFETY: see `send`.
    unsafe {
        open(qp, Opcode::RdmaWriteImm, |wr| {
            wr.rkey = rkey;
            wr.remote_addr = remote_addr;
            wr.imm = imm;
        });
    }
}

unsafe extern "C" fn rdma_read(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64) {
    // SAFETY: see `send`.
    unsafe {
        open(qp, Opcode::RdmaRead, |wr| {
            wr.rkey = rkey;
            wr.remote_addr = remote_addr;
        });
    }
}

unsafe extern "C" fn cmp_swp(
    qp: *mut ibv_qp_ex,
    rkey: u32,
    remote_addr: u64,
    compare: u64,
    swap: u64,
) {
    // SAFETY: see `send`.
    unsafe {
        open(qp, Opcode::CompareSwap, |wr| {
            wr.rkey = rkey;
            wr.remote_addr = remote_addr;
            wr.compare_add = compare;
            wr.swap = swap;
        });
    }
}

unsafe extern "C" fn fetch_add(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64, add: u64) {
    // SAFETY: see `send`.
    unsafe {
        open(qp, Opcode::FetchAdd, |wr| {
            wr.rkey = rkey;
            wr.remote_addr = remote_addr;
            wr.compare_add = add;
        });
    }
}

unsafe extern "C" fn send_inv(qp: *mut ibv_qp_ex, key: u32) {
    // SAFETY: see `send`.
    unsafe { open(qp, Opcode::SendInv, |wr| wr.imm = key) };
}

unsafe extern "C" fn local_inv(qp: *mut ibv_qp_ex, key: u32) {
    // SAFETY: see `send`.
    unsafe { open(qp, Opcode::LocalInv, |wr| wr.imm = key) };
}

unsafe extern "C" fn bind_mw(
    qp: *mut ibv_qp_ex,
    window: *mut ibv_mw,
    rkey: u32,
    info: *const ibv_mw_bind_info,
) {
    // SAFETY: see `send`; the caller gives a live window and what to bind it to.
    unsafe {
        let mut wanted = Err(Errno::INVAL);
        open(qp, Opcode::BindMw, |wr| {
            wanted = mw::request(window, MwType::Two, rkey, &*info, wr.wr_id, wr.flags);
            if let Ok(bind) = wanted {
                *wr = bind;
            }
        });
        if let Err(errno) = wanted {
            builder(qp).fail(errno);
        }
    }
}

/// The 8 bytes are copied at once.
unsafe extern "C" fn atomic_write(
    qp: *mut ibv_qp_ex,
    rkey: u32,
    remote_addr: u64,
    word: *const c_void,
) {
    // SAFETY: see `send`; the caller gives 8 bytes.
    unsafe {
        open(qp, Opcode::AtomicWrite, |wr| {
            wr.rkey = rkey;
            wr.remote_addr = remote_addr;
        });
        builder(qp).inline = Some(word.cast::<[u8; 8]>().read_unaligned().to_vec());
    }
}

unsafe extern "C" fn flush(
    qp: *mut ibv_qp_ex,
    rkey: u32,
    remote_addr: u64,
    length: usize,
    types: u8,
    level: u8,
) {
    let spec = FlushSpec::new(types.into(), level.into());
    // SAFETY: see `send`.
    unsafe {
        open(qp, Opcode::Flush, |wr| {
            wr.rkey = rkey;
            wr.remote_addr = remote_addr;
            wr.compare_add = length as u64;
            wr.swap = spec.map_or(0, FlushSpec::raw);
        });
        if spec.is_none() {
            builder(qp).fail(Errno::INVAL);
        }
    }
}

unsafe extern "C" fn set_ud_addr(qp: *mut ibv_qp_ex, ah: *mut ibv_ah, qpn: u32, qkey: u32) {
    // SAFETY: see `send`; the caller gives a live address handle.
    let (builder, av) = unsafe { (builder(qp), ibv_ah::object(ah).av) };
    if let Some(wr) = &mut builder.open {
        wr.ud = freeflow_client::UdTarget { av, qpn, qkey };
    }
}

unsafe extern "C" fn set_xrc_srqn(qp: *mut ibv_qp_ex, remote_srqn: u32) {
    // SAFETY: see `send`.
    let builder = unsafe { builder(qp) };
    if let Some(wr) = &mut builder.open {
        wr.remote_srqn = remote_srqn;
    }
}

unsafe extern "C" fn set_sge(qp: *mut ibv_qp_ex, lkey: u32, addr: u64, length: u32) {
    // SAFETY: see `send`.
    let builder = unsafe { builder(qp) };
    builder.inline = None;
    builder.sges.clear();
    builder.sges.push(Sge { addr, length, lkey });
}

unsafe extern "C" fn set_sge_list(qp: *mut ibv_qp_ex, n: usize, list: *const ibv_sge) {
    // SAFETY: see `send`.
    let builder = unsafe { builder(qp) };
    builder.inline = None;
    builder.sges.clear();
    if n != 0 {
        // SAFETY: the caller gives `n` elements; `Sge` has the layout of `ibv_sge`.
        builder
            .sges
            .extend_from_slice(unsafe { std::slice::from_raw_parts(list.cast(), n) });
    }
}

unsafe extern "C" fn set_inline_data(qp: *mut ibv_qp_ex, addr: *mut c_void, length: usize) {
    let buffer = ibv_data_buf { addr, length };
    // SAFETY: see `send`; one buffer.
    unsafe { set_inline_data_list(qp, 1, &buffer) };
}

unsafe extern "C" fn set_inline_data_list(qp: *mut ibv_qp_ex, n: usize, list: *const ibv_data_buf) {
    // SAFETY: see `send`.
    let (builder, limit) = unsafe {
        (
            builder(qp),
            ibv_qp_ex::object(qp).client.cap().max_inline as usize,
        )
    };
    let mut bytes = Vec::with_capacity(limit);
    for at in 0..n {
        // SAFETY: the caller gives `n` buffers that may be read.
        unsafe {
            let buffer = &*list.add(at);
            if buffer.length > limit - bytes.len() {
                return builder.fail(Errno::INVAL);
            }
            if buffer.length != 0 {
                bytes.extend_from_slice(std::slice::from_raw_parts(
                    buffer.addr.cast::<u8>(),
                    buffer.length,
                ));
            }
        }
    }
    builder.inline = Some(bytes);
}
