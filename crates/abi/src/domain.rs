//! Thread and parent domains, counters, moderation, receive work queues.

use core::ffi::{c_int, c_uint, c_void};

use crate::context::ibv_context;
use crate::objects::{ibv_cq, ibv_pd, pthread_cond, pthread_mutex};
use crate::work::ibv_recv_wr;

/// `ibv_alloc_td(3)`.
#[repr(C)]
pub struct ibv_td {
    pub context: *mut ibv_context,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_td_init_attr {
    pub comp_mask: u32,
}

pub type parent_domain_alloc =
    Option<unsafe extern "C" fn(*mut ibv_pd, *mut c_void, usize, usize, u64) -> *mut c_void>;
pub type parent_domain_free =
    Option<unsafe extern "C" fn(*mut ibv_pd, *mut c_void, *mut c_void, u64)>;

/// `ibv_alloc_parent_domain(3)`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_parent_domain_init_attr {
    pub pd: *mut ibv_pd,
    /// May be null.
    pub td: *mut ibv_td,
    pub comp_mask: u32,
    pub alloc: parent_domain_alloc,
    pub free: parent_domain_free,
    pub pd_context: *mut c_void,
}

pub const IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS: u32 = 1;
pub const IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT: u32 = 1 << 1;

/// `ibv_create_counters(3)`.
#[repr(C)]
pub struct ibv_counters {
    pub context: *mut ibv_context,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_counters_init_attr {
    pub comp_mask: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_counter_attach_attr {
    pub counter_desc: c_uint,
    /// Where the counter is in what `ibv_read_counters(3)` reads.
    pub index: u32,
    pub comp_mask: u32,
}

pub const IBV_COUNTER_PACKETS: c_uint = 0;
pub const IBV_COUNTER_BYTES: c_uint = 1;
pub const IBV_READ_COUNTERS_ATTR_PREFER_CACHED: u32 = 1;

/// `ibv_modify_cq(3)`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct ibv_modify_cq_attr {
    pub attr_mask: u32,
    pub moderate: ibv_moderate_cq,
}

/// An event comes after so many completions or so long, whichever is first.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct ibv_moderate_cq {
    pub cq_count: u16,
    /// Microseconds.
    pub cq_period: u16,
}

pub const IBV_CQ_ATTR_MODERATE: u32 = 1;

/// `ibv_modify_qp_rate_limit(3)`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct ibv_qp_rate_limit_attr {
    /// Kilobits per second.
    pub rate_limit: u32,
    /// Bytes.
    pub max_burst_sz: u32,
    /// Bytes.
    pub typical_pkt_sz: u16,
    pub comp_mask: u32,
}

/// `ibv_create_wq(3)`.
#[repr(C)]
pub struct ibv_wq {
    pub context: *mut ibv_context,
    pub wq_context: *mut c_void,
    pub pd: *mut ibv_pd,
    pub cq: *mut ibv_cq,
    pub wq_num: u32,
    pub handle: u32,
    pub state: c_uint,
    pub wq_type: c_uint,
    pub post_recv:
        Option<unsafe extern "C" fn(*mut ibv_wq, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int>,
    pub mutex: pthread_mutex,
    pub cond: pthread_cond,
    pub events_completed: u32,
    pub comp_mask: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_wq_init_attr {
    pub wq_context: *mut c_void,
    pub wq_type: c_uint,
    pub max_wr: u32,
    pub max_sge: u32,
    pub pd: *mut ibv_pd,
    pub cq: *mut ibv_cq,
    pub comp_mask: u32,
    pub create_flags: u32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct ibv_wq_attr {
    pub attr_mask: u32,
    pub wq_state: c_uint,
    pub curr_wq_state: c_uint,
    pub flags: u32,
    pub flags_mask: u32,
}

/// `ibv_create_rwq_ind_table(3)`.
#[repr(C)]
pub struct ibv_rwq_ind_table {
    pub context: *mut ibv_context,
    pub ind_tbl_handle: c_int,
    pub ind_tbl_num: c_int,
    pub comp_mask: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_rwq_ind_table_init_attr {
    pub log_ind_tbl_size: u32,
    pub ind_tbl: *mut *mut ibv_wq,
    pub comp_mask: u32,
}

/// `ibv_create_flow(3)`; specifications follow it in memory.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_flow_attr {
    pub comp_mask: u32,
    pub kind: c_uint,
    pub size: u16,
    pub priority: u16,
    pub num_of_specs: u8,
    pub port: u8,
    pub flags: u32,
}

#[repr(C)]
pub struct ibv_flow {
    pub comp_mask: u32,
    pub context: *mut ibv_context,
    pub handle: u32,
}
