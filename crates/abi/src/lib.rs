//! The C structures of libibverbs and librdmacm, newest layout.
//!
//! Definitions only. They follow `<infiniband/verbs.h>` and `<rdma/rdma_cma.h>` of rdma-core 44 to
//! 65: where a structure has grown, this is its newest form, which begins (or, for
//! `verbs_context`, ends) with the older ones. Names are the headers'. Sizes are asserted here, and
//! compared with the installed headers by a test of the network library.

#![allow(non_camel_case_types, reason = "the names are the C header's")]
#![allow(missing_docs, reason = "documented by the header and the man pages")]

mod attr;
mod cma;
mod constants;
mod context;
mod domain;
mod memory;
mod objects;
mod srq;
mod work;

pub use attr::*;
pub use cma::*;
pub use constants::*;
pub use context::*;
pub use domain::*;
pub use memory::*;
pub use objects::*;
pub use srq::*;
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
    assert!(size_of::<ibv_srq>() == 128);
    assert!(offset_of!(ibv_srq, events_completed) == 120);
    assert!(size_of::<ibv_srq_init_attr>() == 24);
    assert!(size_of::<ibv_srq_init_attr_ex>() == 64);
    assert!(offset_of!(ibv_srq_init_attr_ex, pd) == 32);
    assert!(size_of::<ibv_ops_wr>() == 72);
    assert!(size_of::<ibv_xrcd_init_attr>() == 12);
    assert!(size_of::<ibv_qp_open_attr>() == 32);
    assert!(size_of::<ibv_mw>() == 32);
    assert!(size_of::<ibv_mw_bind_info>() == 32);
    assert!(size_of::<ibv_mw_bind>() == 48);
    assert!(size_of::<ibv_mr_init_attr>() == 72);
    assert!(offset_of!(ibv_mr_init_attr, buf) == 64);
    assert!(size_of::<ibv_send_wr>() == 128);
    assert!(offset_of!(ibv_send_wr, more) == 80);
    assert!(size_of::<ibv_recv_wr>() == 32);
    assert!(size_of::<ibv_alloc_dm_attr>() == 16);
    assert!(size_of::<ibv_dm>() == 32);
    assert!(offset_of!(ibv_dm, handle) == 28);
    assert!(size_of::<ibv_parent_domain_init_attr>() == 48);
    assert!(offset_of!(ibv_parent_domain_init_attr, pd_context) == 40);
    assert!(size_of::<ibv_counter_attach_attr>() == 12);
    assert!(size_of::<ibv_modify_cq_attr>() == 8);
    assert!(size_of::<ibv_qp_rate_limit_attr>() == 16);
    assert!(size_of::<ibv_wq>() == 152);
    assert!(offset_of!(ibv_wq, post_recv) == 48);
    assert!(size_of::<ibv_wq_init_attr>() == 48);
    assert!(size_of::<ibv_wq_attr>() == 20);
    assert!(size_of::<ibv_rwq_ind_table>() == 24);
    assert!(size_of::<ibv_rwq_ind_table_init_attr>() == 24);
    assert!(size_of::<ibv_flow_attr>() == 20);
    assert!(size_of::<ibv_flow>() == 24);
    assert!(size_of::<ibv_qp_attr>() == 144);
    assert!(size_of::<ibv_qp_init_attr>() == 64);
    assert!(size_of::<ibv_qp_init_attr_ex>() == 136);
    assert!(offset_of!(ibv_qp_init_attr_ex, comp_mask) == 60);
    assert!(offset_of!(ibv_qp_init_attr_ex, xrcd) == 72);
    assert!(size_of::<ibv_cq_init_attr_ex>() == 56);
    assert!(size_of::<ibv_ah_attr>() == 32);
    assert!(size_of::<ibv_gid_entry>() == 32);
    assert!(size_of::<ibv_grh>() == 40);
    assert!(size_of::<ibv_wc_tm_info>() == 16);
    assert!(size_of::<ibv_async_event>() == 16);
    assert!(size_of::<rdma_cm_id>() == 416);
    assert!(offset_of!(rdma_cm_id, event) == 352);
    assert!(size_of::<rdma_addr>() == 296);
    assert!(size_of::<rdma_cm_event>() == 80);
    assert!(size_of::<rdma_addrinfo>() == 96);
    assert!(size_of::<ibv_sa_path_rec>() == 64);
    assert!(size_of::<ibv_path_data>() == 72);
};
