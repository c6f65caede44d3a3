//! Private symbols of libibverbs, of rdma-core 15 to 65, that vendors' libraries need to load: no
//! vendor's device is behind this library, so that none of them has anything to do. They carry no
//! version: the private nodes are empty (see `nodes.map`), which the dynamic loader accepts for any
//! of them.

use core::ffi::{c_char, c_int, c_uint, c_void};

use freeflow_abi::ibv_context;

use crate::unsupported;

/// Functions under their own names that answer as `$answer` does.
macro_rules! answer {
    ($answer:path, $result:ty: $($name:ident)*) => {
        $(#[unsafe(no_mangle)]
        unsafe extern "C" fn $name() -> $result {
            // SAFETY: it takes nothing and touches errno at most.
            unsafe { $answer() }
        })*
    };
}

answer! { unsupported::errno, c_int:
    execute_ioctl
    ibv_cmd_advise_mr
    ibv_cmd_alloc_dm
    ibv_cmd_alloc_dmah
    ibv_cmd_alloc_mw
    ibv_cmd_alloc_pd
    ibv_cmd_attach_mcast
    ibv_cmd_close_xrcd
    ibv_cmd_create_ah
    ibv_cmd_create_comp_cntr
    ibv_cmd_create_counters
    ibv_cmd_create_cq
    ibv_cmd_create_cq_ex
    ibv_cmd_create_cq_ex2
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
    ibv_cmd_destroy_comp_cntr
    ibv_cmd_destroy_counters
    ibv_cmd_destroy_cq
    ibv_cmd_destroy_flow
    ibv_cmd_destroy_flow_action
    ibv_cmd_destroy_qp
    ibv_cmd_destroy_rwq_ind_table
    ibv_cmd_destroy_srq
    ibv_cmd_destroy_wq
    ibv_cmd_detach_mcast
    ibv_cmd_export_dmabuf_fd
    ibv_cmd_free_dm
    ibv_cmd_free_dmah
    ibv_cmd_get_context
    ibv_cmd_inc_comp_cntr
    ibv_cmd_inc_err_comp_cntr
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
    ibv_cmd_qp_attach_comp_cntr
    ibv_cmd_query_comp_cntr_caps
    ibv_cmd_query_context
    ibv_cmd_query_device
    ibv_cmd_query_device_any
    ibv_cmd_query_device_ex
    ibv_cmd_query_mr
    ibv_cmd_query_port
    ibv_cmd_query_port_speed
    ibv_cmd_query_qp
    ibv_cmd_query_srq
    ibv_cmd_read_comp_cntr
    ibv_cmd_read_counters
    ibv_cmd_read_err_comp_cntr
    ibv_cmd_reg_dm_mr
    ibv_cmd_reg_dmabuf_mr
    ibv_cmd_reg_mr
    ibv_cmd_reg_mr_ex
    ibv_cmd_req_notify_cq
    ibv_cmd_rereg_mr
    ibv_cmd_resize_cq
    ibv_cmd_set_comp_cntr
    ibv_cmd_set_err_comp_cntr
}

answer! { unsupported::minus_one, c_int:
    ibv_get_fw_ver
    ibv_read_ibdev_sysfs_file
}

answer! { unsupported::null, *mut c_void:
    _verbs_init_and_alloc_context
    ibv_dmabuf_heap_alloc
    ibv_dmabuf_heap_cc_shared_init
    verbs_open_device
}

// Registering a driver is what a vendor's library does when it is loaded.
answer! { unsupported::nothing, ():
    __verbs_log
    ibv_dmabuf_heap_destroy
    ibv_dmabuf_heap_free
    verbs_init_cq
    verbs_set_ops
    verbs_uninit_context
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

/// A flag, not a function. Vendors' drivers look at it when they free what the kernel destroyed.
#[unsafe(no_mangle)]
static mut verbs_allow_disassociate_destroy: bool = false;

/// The number of attributes of a command that a vendor's driver would send: it is never sent.
#[unsafe(no_mangle)]
unsafe extern "C" fn __ioctl_final_num_attrs(attrs: c_uint, _link: *mut c_void) -> c_uint {
    attrs
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

/// Private by its version, but declared to programs.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_wr_opcode_str(opcode: c_uint) -> *const c_char {
    crate::strings::wr_opcode_str(opcode)
}
