//! Contexts and their operation tables.

use core::ffi::{c_int, c_void};

use crate::attr::{
    ibv_cq_init_attr_ex, ibv_device_attr, ibv_device_attr_ex, ibv_port_attr, ibv_qp_init_attr_ex,
    ibv_query_device_ex_input, ibv_values_ex,
};
use crate::objects::{ibv_cq, ibv_cq_ex, ibv_device, ibv_qp, pthread_mutex};
use crate::work::{ibv_recv_wr, ibv_send_wr, ibv_wc};

/// An operation that this device does not have.
pub type absent = Option<unsafe extern "C" fn()>;

#[repr(C)]
pub struct ibv_context_ops {
    pub _compat_query_device:
        Option<unsafe extern "C" fn(*mut ibv_context, *mut ibv_device_attr) -> c_int>,
    pub _compat_query_port:
        Option<unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int>,
    pub _compat_alloc_pd_to_dereg_mr: [absent; 5],
    pub alloc_mw: Option<unsafe extern "C" fn(*mut c_void, c_int) -> *mut c_void>,
    pub bind_mw: Option<unsafe extern "C" fn(*mut ibv_qp, *mut c_void, *mut c_void) -> c_int>,
    pub dealloc_mw: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    pub _compat_create_cq: absent,
    pub poll_cq: Option<unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int>,
    pub req_notify_cq: Option<unsafe extern "C" fn(*mut ibv_cq, c_int) -> c_int>,
    pub _compat_cq_event_to_destroy_srq: [absent; 7],
    pub post_srq_recv:
        Option<unsafe extern "C" fn(*mut c_void, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int>,
    pub _compat_create_qp_to_destroy_qp: [absent; 4],
    pub post_send:
        Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int>,
    pub post_recv:
        Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int>,
    pub _compat_create_ah_to_async_event: [absent; 5],
}

#[repr(C)]
pub struct ibv_context {
    pub device: *mut ibv_device,
    pub ops: ibv_context_ops,
    pub cmd_fd: c_int,
    pub async_fd: c_int,
    pub num_comp_vectors: c_int,
    pub mutex: pthread_mutex,
    pub abi_compat: *mut c_void,
}

/// Grows upward: new operations come first, `context` is last.
#[repr(C)]
pub struct verbs_context {
    pub free_buf: absent,
    pub alloc_buf: absent,
    pub dm_export_dmabuf_fd: absent,
    pub reg_mr_ex: absent,
    pub dealloc_dmah: absent,
    pub alloc_dmah: absent,
    pub query_port:
        Option<unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr, usize) -> c_int>,
    pub advise_mr: absent,
    pub alloc_null_mr: absent,
    pub read_counters: absent,
    pub attach_counters_point_flow: absent,
    pub create_counters: absent,
    pub destroy_counters: absent,
    pub reg_dm_mr: absent,
    pub alloc_dm: absent,
    pub free_dm: absent,
    pub modify_flow_action_esp: absent,
    pub destroy_flow_action: absent,
    pub create_flow_action_esp: absent,
    pub modify_qp_rate_limit: absent,
    pub alloc_parent_domain: absent,
    pub dealloc_td: absent,
    pub alloc_td: absent,
    pub modify_cq: absent,
    pub post_srq_ops: absent,
    pub destroy_rwq_ind_table: absent,
    pub create_rwq_ind_table: absent,
    pub destroy_wq: absent,
    pub modify_wq: absent,
    pub create_wq: absent,
    pub query_rt_values:
        Option<unsafe extern "C" fn(*mut ibv_context, *mut ibv_values_ex) -> c_int>,
    pub create_cq_ex:
        Option<unsafe extern "C" fn(*mut ibv_context, *mut ibv_cq_init_attr_ex) -> *mut ibv_cq_ex>,
    pub private: *mut c_void,
    pub query_device_ex: Option<
        unsafe extern "C" fn(
            *mut ibv_context,
            *const ibv_query_device_ex_input,
            *mut ibv_device_attr_ex,
            usize,
        ) -> c_int,
    >,
    pub ibv_destroy_flow: absent,
    pub abi_placeholder2: absent,
    pub ibv_create_flow: absent,
    pub abi_placeholder1: absent,
    pub open_qp: absent,
    pub create_qp_ex:
        Option<unsafe extern "C" fn(*mut ibv_context, *mut ibv_qp_init_attr_ex) -> *mut ibv_qp>,
    pub get_srq_num: absent,
    pub create_srq_ex: absent,
    pub open_xrcd: absent,
    pub close_xrcd: absent,
    pub abi_placeholder3: u64,
    pub sz: usize,
    pub context: ibv_context,
}
