//! The C structures of libibverbs, newest layout.
//!
//! Definitions only. They follow `<infiniband/verbs.h>` of rdma-core 44 to 65: where a structure
//! has grown, this is its newest form, which begins (or, for `verbs_context`, ends) with the older
//! ones. Names are the header's. Sizes are asserted here, and compared with the installed header
//! by a test of the network library.

#![allow(non_camel_case_types, reason = "the names are the C header's")]
#![allow(missing_docs, reason = "documented by the header and the man pages")]

mod attr;
mod context;
mod objects;
mod work;

pub use attr::*;
pub use context::*;
pub use objects::*;
pub use work::*;

use core::mem::{offset_of, size_of};

const _: () = {
    assert!(size_of::<ibv_device>() == 664);
    assert!(offset_of!(ibv_device, name) == 24);
    assert!(offset_of!(ibv_device, dev_name) == 88);
    assert!(offset_of!(ibv_device, ibdev_path) == 408);
    assert!(size_of::<ibv_context>() == 328);
    assert!(offset_of!(ibv_context, cmd_fd) == 264);
    assert!(offset_of!(ibv_context, abi_compat) == 320);
    assert!(size_of::<verbs_context>() == 696);
    assert!(offset_of!(verbs_context, context) == 368);
    assert!(size_of::<ibv_qp>() == 160);
    assert!(size_of::<ibv_qp_ex>() == 360);
    assert!(offset_of!(ibv_qp_ex, wr_atomic_write) == 344);
    assert!(size_of::<ibv_cq>() == 128);
    assert!(size_of::<ibv_cq_ex>() == 288);
    assert!(offset_of!(ibv_cq_ex, start_poll) == 144);
    assert!(size_of::<ibv_wc>() == 48);
    assert!(size_of::<ibv_mr>() == 48);
    assert!(size_of::<ibv_port_attr>() == 56);
    assert!(size_of::<ibv_device_attr>() == 232);
    assert!(size_of::<ibv_device_attr_ex>() == 400);
    assert!(size_of::<ibv_qp_init_attr_ex>() == 136);
    assert!(offset_of!(ibv_qp_init_attr_ex, comp_mask) == 60);
};
