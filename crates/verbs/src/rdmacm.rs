//! librdmacm's symbols. There are no rsockets: a program that asks for one is told that there is
//! no RDMA device for it.

use core::ffi::{c_int, c_long};

use crate::export::export;
use crate::objects::set_errno;
use crate::rdma_cm;

unsafe extern "C" fn minus_one() -> c_int {
    set_errno(libc::ENODEV);
    -1
}

unsafe extern "C" fn minus_one_long() -> c_long {
    set_errno(libc::ENODEV);
    -1
}

export! {
    "raccept" "@@RDMACM_1.0" minus_one;
    "rbind" "@@RDMACM_1.0" minus_one;
    "rclose" "@@RDMACM_1.0" minus_one;
    "rconnect" "@@RDMACM_1.0" minus_one;
    "rdma_accept" "@@RDMACM_1.0" rdma_cm::connection::accept;
    "rdma_ack_cm_event" "@@RDMACM_1.0" rdma_cm::event::ack_cm_event;
    "rdma_bind_addr" "@@RDMACM_1.0" rdma_cm::id::bind_addr;
    "rdma_connect" "@@RDMACM_1.0" rdma_cm::connection::connect;
    "rdma_create_ep" "@@RDMACM_1.0" rdma_cm::endpoint::create_ep;
    "rdma_create_event_channel" "@@RDMACM_1.0" rdma_cm::id::create_event_channel;
    "rdma_create_id" "@@RDMACM_1.0" rdma_cm::id::create_id;
    "rdma_create_qp" "@@RDMACM_1.0" rdma_cm::queues::create_qp;
    "rdma_create_qp_ex" "@@RDMACM_1.0" rdma_cm::queues::create_qp_ex;
    "rdma_create_srq" "@@RDMACM_1.0" rdma_cm::queues::create_srq;
    "rdma_create_srq_ex" "@@RDMACM_1.0" rdma_cm::queues::create_srq_ex;
    "rdma_destroy_ep" "@@RDMACM_1.0" rdma_cm::endpoint::destroy_ep;
    "rdma_destroy_event_channel" "@@RDMACM_1.0" rdma_cm::id::destroy_event_channel;
    "rdma_destroy_id" "@@RDMACM_1.0" rdma_cm::id::destroy_id;
    "rdma_destroy_qp" "@@RDMACM_1.0" rdma_cm::queues::destroy_qp;
    "rdma_destroy_srq" "@@RDMACM_1.0" rdma_cm::queues::destroy_srq;
    "rdma_disconnect" "@@RDMACM_1.0" rdma_cm::connection::disconnect;
    "rdma_event_str" "@@RDMACM_1.0" rdma_cm::event::event_str;
    "rdma_free_devices" "@@RDMACM_1.0" rdma_cm::free_devices;
    "rdma_freeaddrinfo" "@@RDMACM_1.0" rdma_cm::addrinfo::freeaddrinfo;
    "rdma_get_cm_event" "@@RDMACM_1.0" rdma_cm::event::get_cm_event;
    "rdma_get_devices" "@@RDMACM_1.0" rdma_cm::get_devices;
    "rdma_get_dst_port" "@@RDMACM_1.0" rdma_cm::id::get_dst_port;
    "rdma_get_request" "@@RDMACM_1.0" rdma_cm::endpoint::get_request;
    "rdma_get_src_port" "@@RDMACM_1.0" rdma_cm::id::get_src_port;
    "rdma_getaddrinfo" "@@RDMACM_1.0" rdma_cm::addrinfo::getaddrinfo;
    "rdma_join_multicast" "@@RDMACM_1.0" rdma_cm::group::join_multicast;
    "rdma_leave_multicast" "@@RDMACM_1.0" rdma_cm::group::leave_multicast;
    "rdma_listen" "@@RDMACM_1.0" rdma_cm::id::listen;
    "rdma_migrate_id" "@@RDMACM_1.0" rdma_cm::id::migrate_id;
    "rdma_notify" "@@RDMACM_1.0" rdma_cm::connection::notify;
    "rdma_reject" "@@RDMACM_1.0" rdma_cm::connection::reject;
    "rdma_resolve_addr" "@@RDMACM_1.0" rdma_cm::connection::resolve_addr;
    "rdma_resolve_route" "@@RDMACM_1.0" rdma_cm::connection::resolve_route;
    "rdma_set_option" "@@RDMACM_1.0" rdma_cm::option::set_option;
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
    "rdma_join_multicast_ex" "@@RDMACM_1.1" rdma_cm::group::join_multicast_ex;
    "rdma_establish" "@@RDMACM_1.2" rdma_cm::connection::establish;
    "rdma_init_qp_attr" "@@RDMACM_1.2" rdma_cm::event::init_qp_attr;
    "rdma_get_remote_ece" "@@RDMACM_1.3" rdma_cm::option::get_remote_ece;
    "rdma_set_local_ece" "@@RDMACM_1.3" rdma_cm::option::set_local_ece;
    "rdma_reject_ece" "@@RDMACM_1.3" rdma_cm::connection::reject_ece;
    "rdma_query_addrinfo" "@@RDMACM_1.4" rdma_cm::endpoint::no_addrinfo;
    "rdma_resolve_addrinfo" "@@RDMACM_1.4" rdma_cm::endpoint::no_addrinfo;
    "rdma_write_cm_event" "@@RDMACM_1.4" rdma_cm::event::write_cm_event;
    "repoll_create" "@@RDMACM_1.5" minus_one;
    "repoll_ctl" "@@RDMACM_1.5" minus_one;
    "repoll_wait" "@@RDMACM_1.5" minus_one;
}
