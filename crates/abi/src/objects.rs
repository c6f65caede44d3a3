//! Objects: devices, domains, regions, queues.

use core::ffi::{c_char, c_int, c_uint, c_void};

use crate::context::ibv_context;
use crate::memory::{ibv_mw, ibv_mw_bind_info};
use crate::srq::ibv_srq;
use crate::work::{ibv_poll_cq_attr, ibv_wc_tm_info};

/// Room of glibc's `pthread_mutex_t` on 64-bit Linux.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct pthread_mutex(pub [u8; 40]);

/// Room of glibc's `pthread_cond_t` on 64-bit Linux.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct pthread_cond(pub [u8; 48]);

#[repr(C)]
pub struct ibv_device {
    pub _ops: [*mut c_void; 2],
    pub node_type: c_int,
    pub transport_type: c_int,
    pub name: [c_char; 64],
    pub dev_name: [c_char; 64],
    pub dev_path: [c_char; 256],
    pub ibdev_path: [c_char; 256],
}

pub const IBV_NODE_CA: c_int = 1;
pub const IBV_TRANSPORT_IB: c_int = 0;

/// What a provider adds to a device; vendors' libraries look at `ops`.
#[repr(C)]
pub struct verbs_device {
    pub device: ibv_device,
    pub ops: *const c_void,
    pub refcount: usize,
    pub entry: [*mut c_void; 2],
    pub sysfs: *mut c_void,
    pub core_support: u64,
}

#[repr(C)]
pub struct ibv_pd {
    pub context: *mut ibv_context,
    pub handle: u32,
}

#[repr(C)]
pub struct ibv_mr {
    pub context: *mut ibv_context,
    pub pd: *mut ibv_pd,
    pub addr: *mut c_void,
    pub length: usize,
    pub handle: u32,
    pub lkey: u32,
    pub rkey: u32,
}

#[repr(C)]
pub struct ibv_ah {
    pub context: *mut ibv_context,
    pub pd: *mut ibv_pd,
    pub handle: u32,
}

#[repr(C)]
pub struct ibv_comp_channel {
    pub context: *mut ibv_context,
    pub fd: c_int,
    pub refcnt: c_int,
}

#[repr(C)]
pub struct ibv_cq {
    pub context: *mut ibv_context,
    pub channel: *mut ibv_comp_channel,
    pub cq_context: *mut c_void,
    pub handle: u32,
    pub cqe: c_int,
    pub mutex: pthread_mutex,
    pub cond: pthread_cond,
    pub comp_events_completed: u32,
    pub async_events_completed: u32,
}

pub type read_u32 = Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u32>;
pub type read_u8 = Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u8>;
pub type read_u64 = Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u64>;

#[repr(C)]
pub struct ibv_cq_ex {
    pub cq: ibv_cq,
    pub comp_mask: u32,
    pub status: c_uint,
    pub wr_id: u64,
    pub start_poll: Option<unsafe extern "C" fn(*mut ibv_cq_ex, *mut ibv_poll_cq_attr) -> c_int>,
    pub next_poll: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> c_int>,
    pub end_poll: Option<unsafe extern "C" fn(*mut ibv_cq_ex)>,
    pub read_opcode: read_u32,
    pub read_vendor_err: read_u32,
    pub read_byte_len: read_u32,
    pub read_imm_data: read_u32,
    pub read_qp_num: read_u32,
    pub read_src_qp: read_u32,
    pub read_wc_flags: read_u32,
    pub read_slid: read_u32,
    pub read_sl: read_u8,
    pub read_dlid_path_bits: read_u8,
    pub read_completion_ts: read_u64,
    pub read_cvlan: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u16>,
    pub read_flow_tag: read_u32,
    pub read_tm_info: Option<unsafe extern "C" fn(*mut ibv_cq_ex, *mut ibv_wc_tm_info)>,
    pub read_completion_wallclock_ns: read_u64,
}

#[repr(C)]
pub struct ibv_qp {
    pub context: *mut ibv_context,
    pub qp_context: *mut c_void,
    pub pd: *mut ibv_pd,
    pub send_cq: *mut ibv_cq,
    pub recv_cq: *mut ibv_cq,
    pub srq: *mut ibv_srq,
    pub handle: u32,
    pub qp_num: u32,
    pub state: c_uint,
    pub qp_type: c_uint,
    pub mutex: pthread_mutex,
    pub cond: pthread_cond,
    pub events_completed: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_data_buf {
    pub addr: *mut c_void,
    pub length: usize,
}

type Qpx = *mut ibv_qp_ex;

#[repr(C)]
pub struct ibv_qp_ex {
    pub qp_base: ibv_qp,
    pub comp_mask: u64,
    pub wr_id: u64,
    pub wr_flags: c_uint,
    pub wr_atomic_cmp_swp: Option<unsafe extern "C" fn(Qpx, u32, u64, u64, u64)>,
    pub wr_atomic_fetch_add: Option<unsafe extern "C" fn(Qpx, u32, u64, u64)>,
    pub wr_bind_mw: Option<unsafe extern "C" fn(Qpx, *mut ibv_mw, u32, *const ibv_mw_bind_info)>,
    pub wr_local_inv: Option<unsafe extern "C" fn(Qpx, u32)>,
    pub wr_rdma_read: Option<unsafe extern "C" fn(Qpx, u32, u64)>,
    pub wr_rdma_write: Option<unsafe extern "C" fn(Qpx, u32, u64)>,
    pub wr_rdma_write_imm: Option<unsafe extern "C" fn(Qpx, u32, u64, u32)>,
    pub wr_send: Option<unsafe extern "C" fn(Qpx)>,
    pub wr_send_imm: Option<unsafe extern "C" fn(Qpx, u32)>,
    pub wr_send_inv: Option<unsafe extern "C" fn(Qpx, u32)>,
    pub wr_send_tso: Option<unsafe extern "C" fn(Qpx, *mut c_void, u16, u16)>,
    pub wr_set_ud_addr: Option<unsafe extern "C" fn(Qpx, *mut ibv_ah, u32, u32)>,
    pub wr_set_xrc_srqn: Option<unsafe extern "C" fn(Qpx, u32)>,
    pub wr_set_inline_data: Option<unsafe extern "C" fn(Qpx, *mut c_void, usize)>,
    pub wr_set_inline_data_list: Option<unsafe extern "C" fn(Qpx, usize, *const ibv_data_buf)>,
    pub wr_set_sge: Option<unsafe extern "C" fn(Qpx, u32, u64, u32)>,
    pub wr_set_sge_list: Option<unsafe extern "C" fn(Qpx, usize, *const crate::ibv_sge)>,
    pub wr_start: Option<unsafe extern "C" fn(Qpx)>,
    pub wr_complete: Option<unsafe extern "C" fn(Qpx) -> c_int>,
    pub wr_abort: Option<unsafe extern "C" fn(Qpx)>,
    pub wr_atomic_write: Option<unsafe extern "C" fn(Qpx, u32, u64, *const c_void)>,
    pub wr_flush: Option<unsafe extern "C" fn(Qpx, u32, u64, usize, u8, u8)>,
}
