//! Private symbols of libibverbs that vendors' libraries need to load: no vendor's device is
//! behind this library, so that none of them is ever of use. They carry no version: the private
//! nodes are empty (see `nodes.map`), which the dynamic loader accepts for any of them.

use core::ffi::{c_int, c_uint};

use freeflow_abi::ibv_context;

/// A private function that cannot do its work: it returns ENOSYS, or a null pointer where one is
/// expected would be returned as that number; no such function is called without a vendor's
/// context, which this library never makes.
macro_rules! absent {
    ($($name:ident)*) => {
        $(#[unsafe(no_mangle)]
        unsafe extern "C" fn $name() -> c_int {
            libc::ENOSYS
        })*
    };
}

/// Registration of a vendor's driver, which its constructor calls: nothing to do.
macro_rules! ignored {
    ($($name:ident)*) => {
        $(#[unsafe(no_mangle)]
        unsafe extern "C" fn $name() {})*
    };
}

absent! {
    __ioctl_final_num_attrs
    __verbs_log
    _verbs_init_and_alloc_context
    execute_ioctl
    ibv_cmd_advise_mr
    ibv_cmd_alloc_dm
    ibv_cmd_alloc_mw
    ibv_cmd_alloc_pd
    ibv_cmd_attach_mcast
    ibv_cmd_close_xrcd
    ibv_cmd_create_ah
    ibv_cmd_create_counters
    ibv_cmd_create_cq
    ibv_cmd_create_cq_ex
    ibv_cmd_create_flow
    ibv_cmd_create_flow_action_esp
    ibv_cmd_create_qp
    ibv_cmd_create_qp_ex
    ibv_cmd_create_qp_ex2
    ibv_cmd_create_rwq_ind_table
    ibv_cmd_create_srq
    ibv_cmd_create_srq_ex
    ibv_cmd_create_wq
    ibv_cmd_dealloc_mw
    ibv_cmd_dealloc_pd
    ibv_cmd_dereg_mr
    ibv_cmd_destroy_ah
    ibv_cmd_destroy_counters
    ibv_cmd_destroy_cq
    ibv_cmd_destroy_flow
    ibv_cmd_destroy_flow_action
    ibv_cmd_destroy_qp
    ibv_cmd_destroy_rwq_ind_table
    ibv_cmd_destroy_srq
    ibv_cmd_destroy_wq
    ibv_cmd_detach_mcast
    ibv_cmd_free_dm
    ibv_cmd_get_context
    ibv_cmd_modify_cq
    ibv_cmd_modify_flow_action_esp
    ibv_cmd_modify_qp
    ibv_cmd_modify_qp_ex
    ibv_cmd_modify_srq
    ibv_cmd_modify_wq
    ibv_cmd_open_qp
    ibv_cmd_open_xrcd
    ibv_cmd_poll_cq
    ibv_cmd_post_recv
    ibv_cmd_post_send
    ibv_cmd_post_srq_recv
    ibv_cmd_query_context
    ibv_cmd_query_device_any
    ibv_cmd_query_mr
    ibv_cmd_query_port
    ibv_cmd_query_qp
    ibv_cmd_query_srq
    ibv_cmd_read_counters
    ibv_cmd_reg_dm_mr
    ibv_cmd_reg_dmabuf_mr
    ibv_cmd_reg_mr
    ibv_cmd_req_notify_cq
    ibv_cmd_rereg_mr
    ibv_cmd_resize_cq
    ibv_read_ibdev_sysfs_file
    verbs_allow_disassociate_destroy
    verbs_init_cq
    verbs_open_device
    verbs_set_ops
    verbs_uninit_context
    ibv_cmd_query_device
    ibv_cmd_query_device_ex
    ibv_cmd_create_xrc_srq
    ibv_cmd_reg_mr_ex
    ibv_cmd_alloc_dmah
    ibv_cmd_free_dmah
    ibv_cmd_dm_export_dmabuf_fd
    ibv_cmd_create_cq_ex2
    ibv_cmd_query_port_speed
    ibv_cmd_get_dma_buf
    ibv_cmd_create_comp_cntr
    ibv_cmd_destroy_comp_cntr
    verbs_set_log_level
    verbs_get_context
    verbs_init_context
    ibv_cmd_modify_comp_cntr
    ibv_cmd_read_comp_cntr
    ibv_cmd_rereg_mr_ex
    verbs_fini_context
}

ignored! {
    verbs_register_driver_15
    verbs_register_driver_16
    verbs_register_driver_17
    verbs_register_driver_18
    verbs_register_driver_19
    verbs_register_driver_20
    verbs_register_driver_21
    verbs_register_driver_22
    verbs_register_driver_25
    verbs_register_driver_33
    verbs_register_driver_34
    verbs_register_driver_57
    verbs_register_driver_59
    verbs_register_driver_64
    verbs_register_driver_65
}

/// Private, but programs use it.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_gid_type(
    context: *mut ibv_context,
    port: u8,
    index: c_uint,
    gid_type: *mut c_uint,
) -> c_int {
    // SAFETY: the caller's promises are passed on.
    unsafe { crate::query::query_gid_type(context, port, index, gid_type) }
}
