//! librdmacm's symbols. The connection manager is not there yet: a program that asks for it is
//! told that there is no RDMA device to connect with.

use core::ffi::{CStr, c_char, c_int, c_long, c_uint, c_void};

use crate::export::export;
use crate::objects::set_errno;

unsafe extern "C" fn null() -> *mut c_void {
    set_errno(libc::ENODEV);
    std::ptr::null_mut()
}

unsafe extern "C" fn minus_one() -> c_int {
    set_errno(libc::ENODEV);
    -1
}

unsafe extern "C" fn minus_one_long() -> c_long {
    set_errno(libc::ENODEV);
    -1
}

unsafe extern "C" fn no_port() -> u16 {
    0
}

unsafe extern "C" fn nothing() {}

/// `rdma_get_devices(3)`: programs look at the number alone.
unsafe extern "C" fn get_devices(num: *mut c_int) -> *mut c_void {
    if !num.is_null() {
        // SAFETY: the caller gives a place for the number, or null.
        unsafe { *num = 0 };
    }
    // SAFETY: it touches errno alone.
    unsafe { null() }
}

/// `rdma_event_str(3)`.
unsafe extern "C" fn event_str(event: c_uint) -> *const c_char {
    const NAMES: [&CStr; 16] = [
        c"RDMA_CM_EVENT_ADDR_RESOLVED",
        c"RDMA_CM_EVENT_ADDR_ERROR",
        c"RDMA_CM_EVENT_ROUTE_RESOLVED",
        c"RDMA_CM_EVENT_ROUTE_ERROR",
        c"RDMA_CM_EVENT_CONNECT_REQUEST",
        c"RDMA_CM_EVENT_CONNECT_RESPONSE",
        c"RDMA_CM_EVENT_CONNECT_ERROR",
        c"RDMA_CM_EVENT_UNREACHABLE",
        c"RDMA_CM_EVENT_REJECTED",
        c"RDMA_CM_EVENT_ESTABLISHED",
        c"RDMA_CM_EVENT_DISCONNECTED",
        c"RDMA_CM_EVENT_DEVICE_REMOVAL",
        c"RDMA_CM_EVENT_MULTICAST_JOIN",
        c"RDMA_CM_EVENT_MULTICAST_ERROR",
        c"RDMA_CM_EVENT_ADDR_CHANGE",
        c"RDMA_CM_EVENT_TIMEWAIT_EXIT",
    ];
    NAMES
        .get(event as usize)
        .copied()
        .unwrap_or(c"UNKNOWN EVENT")
        .as_ptr()
}

export! {
    "raccept" "@@RDMACM_1.0" minus_one;
    "rbind" "@@RDMACM_1.0" minus_one;
    "rclose" "@@RDMACM_1.0" minus_one;
    "rconnect" "@@RDMACM_1.0" minus_one;
    "rdma_accept" "@@RDMACM_1.0" minus_one;
    "rdma_ack_cm_event" "@@RDMACM_1.0" minus_one;
    "rdma_bind_addr" "@@RDMACM_1.0" minus_one;
    "rdma_connect" "@@RDMACM_1.0" minus_one;
    "rdma_create_ep" "@@RDMACM_1.0" minus_one;
    "rdma_create_event_channel" "@@RDMACM_1.0" null;
    "rdma_create_id" "@@RDMACM_1.0" minus_one;
    "rdma_create_qp" "@@RDMACM_1.0" minus_one;
    "rdma_create_qp_ex" "@@RDMACM_1.0" minus_one;
    "rdma_create_srq" "@@RDMACM_1.0" minus_one;
    "rdma_create_srq_ex" "@@RDMACM_1.0" minus_one;
    "rdma_destroy_ep" "@@RDMACM_1.0" nothing;
    "rdma_destroy_event_channel" "@@RDMACM_1.0" nothing;
    "rdma_destroy_id" "@@RDMACM_1.0" minus_one;
    "rdma_destroy_qp" "@@RDMACM_1.0" nothing;
    "rdma_destroy_srq" "@@RDMACM_1.0" nothing;
    "rdma_disconnect" "@@RDMACM_1.0" minus_one;
    "rdma_event_str" "@@RDMACM_1.0" event_str;
    "rdma_free_devices" "@@RDMACM_1.0" nothing;
    "rdma_freeaddrinfo" "@@RDMACM_1.0" nothing;
    "rdma_get_cm_event" "@@RDMACM_1.0" minus_one;
    "rdma_get_devices" "@@RDMACM_1.0" get_devices;
    "rdma_get_dst_port" "@@RDMACM_1.0" no_port;
    "rdma_get_request" "@@RDMACM_1.0" minus_one;
    "rdma_get_src_port" "@@RDMACM_1.0" no_port;
    "rdma_getaddrinfo" "@@RDMACM_1.0" minus_one;
    "rdma_join_multicast" "@@RDMACM_1.0" minus_one;
    "rdma_leave_multicast" "@@RDMACM_1.0" minus_one;
    "rdma_listen" "@@RDMACM_1.0" minus_one;
    "rdma_migrate_id" "@@RDMACM_1.0" minus_one;
    "rdma_notify" "@@RDMACM_1.0" minus_one;
    "rdma_reject" "@@RDMACM_1.0" minus_one;
    "rdma_resolve_addr" "@@RDMACM_1.0" minus_one;
    "rdma_resolve_route" "@@RDMACM_1.0" minus_one;
    "rdma_set_option" "@@RDMACM_1.0" minus_one;
    "rfcntl" "@@RDMACM_1.0" minus_one;
    "rgetpeername" "@@RDMACM_1.0" minus_one;
    "rgetsockname" "@@RDMACM_1.0" minus_one;
    "rgetsockopt" "@@RDMACM_1.0" minus_one;
    "riomap" "@@RDMACM_1.0" minus_one_long;
    "riounmap" "@@RDMACM_1.0" minus_one;
    "riowrite" "@@RDMACM_1.0" minus_one_long;
    "rlisten" "@@RDMACM_1.0" minus_one;
    "rpoll" "@@RDMACM_1.0" minus_one;
    "rread" "@@RDMACM_1.0" minus_one_long;
    "rreadv" "@@RDMACM_1.0" minus_one_long;
    "rrecv" "@@RDMACM_1.0" minus_one_long;
    "rrecvfrom" "@@RDMACM_1.0" minus_one_long;
    "rrecvmsg" "@@RDMACM_1.0" minus_one_long;
    "rselect" "@@RDMACM_1.0" minus_one;
    "rsend" "@@RDMACM_1.0" minus_one_long;
    "rsendmsg" "@@RDMACM_1.0" minus_one_long;
    "rsendto" "@@RDMACM_1.0" minus_one_long;
    "rsetsockopt" "@@RDMACM_1.0" minus_one;
    "rshutdown" "@@RDMACM_1.0" minus_one;
    "rsocket" "@@RDMACM_1.0" minus_one;
    "rwrite" "@@RDMACM_1.0" minus_one_long;
    "rwritev" "@@RDMACM_1.0" minus_one_long;
    "rdma_join_multicast_ex" "@@RDMACM_1.1" minus_one;
    "rdma_establish" "@@RDMACM_1.2" minus_one;
    "rdma_init_qp_attr" "@@RDMACM_1.2" minus_one;
    "rdma_get_remote_ece" "@@RDMACM_1.3" minus_one;
    "rdma_set_local_ece" "@@RDMACM_1.3" minus_one;
    "rdma_reject_ece" "@@RDMACM_1.3" minus_one;
    "rdma_query_addrinfo" "@@RDMACM_1.4" minus_one;
    "rdma_resolve_addrinfo" "@@RDMACM_1.4" minus_one;
    "rdma_write_cm_event" "@@RDMACM_1.4" minus_one;
    "repoll_create" "@@RDMACM_1.5" minus_one;
    "repoll_ctl" "@@RDMACM_1.5" minus_one;
    "repoll_wait" "@@RDMACM_1.5" minus_one;
}
