//! Conversions from and to the kernel's structures, which connection managers built on a kernel
//! use.

use core::ffi::c_int;

use freeflow_abi::*;

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct KernelAh {
    dgid: [u8; 16],
    flow_label: u32,
    sgid_index: u8,
    hop_limit: u8,
    traffic_class: u8,
    reserved: u8,
    dlid: u16,
    sl: u8,
    src_path_bits: u8,
    static_rate: u8,
    is_global: u8,
    port_num: u8,
    reserved2: u8,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct KernelQpAttr {
    mask: u32,
    qp_state: u32,
    cur_qp_state: u32,
    path_mtu: u32,
    path_mig_state: u32,
    qkey: u32,
    rq_psn: u32,
    sq_psn: u32,
    dest_qp_num: u32,
    qp_access_flags: u32,
    ah_attr: KernelAh,
    alt_ah_attr: KernelAh,
    cap: ibv_qp_cap,
    pkey_index: u16,
    alt_pkey_index: u16,
    en_sqd_async_notify: u8,
    sq_draining: u8,
    max_rd_atomic: u8,
    max_dest_rd_atomic: u8,
    min_rnr_timer: u8,
    port_num: u8,
    timeout: u8,
    retry_cnt: u8,
    rnr_retry: u8,
    alt_port_num: u8,
    alt_timeout: u8,
    reserved: [u8; 5],
}

const _: () = assert!(size_of::<KernelAh>() == 32 && size_of::<KernelQpAttr>() == 144);

fn ah(k: &KernelAh) -> ibv_ah_attr {
    ibv_ah_attr {
        grh: ibv_global_route {
            dgid: ibv_gid { raw: k.dgid },
            flow_label: k.flow_label,
            sgid_index: k.sgid_index,
            hop_limit: k.hop_limit,
            traffic_class: k.traffic_class,
        },
        dlid: k.dlid,
        sl: k.sl,
        src_path_bits: k.src_path_bits,
        static_rate: k.static_rate,
        is_global: k.is_global,
        port_num: k.port_num,
    }
}

pub(crate) unsafe extern "C" fn copy_ah_attr_from_kern(
    to: *mut ibv_ah_attr,
    from: *const KernelAh,
) {
    // SAFETY: the caller gives both structures.
    unsafe { *to = ah(&*from) };
}

/// All but the state, which the connection manager keeps itself, and what the kernel's structure
/// has not.
pub(crate) unsafe extern "C" fn copy_qp_attr_from_kern(
    to: *mut ibv_qp_attr,
    from: *const KernelQpAttr,
) {
    // SAFETY: the caller gives both structures.
    unsafe {
        let k = &*from;
        *to = ibv_qp_attr {
            cur_qp_state: k.cur_qp_state,
            path_mtu: k.path_mtu,
            path_mig_state: k.path_mig_state,
            qkey: k.qkey,
            rq_psn: k.rq_psn,
            sq_psn: k.sq_psn,
            dest_qp_num: k.dest_qp_num,
            qp_access_flags: k.qp_access_flags,
            cap: k.cap,
            ah_attr: ah(&k.ah_attr),
            alt_ah_attr: ah(&k.alt_ah_attr),
            pkey_index: k.pkey_index,
            alt_pkey_index: k.alt_pkey_index,
            en_sqd_async_notify: k.en_sqd_async_notify,
            sq_draining: k.sq_draining,
            max_rd_atomic: k.max_rd_atomic,
            max_dest_rd_atomic: k.max_dest_rd_atomic,
            min_rnr_timer: k.min_rnr_timer,
            port_num: k.port_num,
            timeout: k.timeout,
            retry_cnt: k.retry_cnt,
            rnr_retry: k.rnr_retry,
            alt_port_num: k.alt_port_num,
            alt_timeout: k.alt_timeout,
            ..*to
        };
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct KernelPath {
    dgid: [u8; 16],
    sgid: [u8; 16],
    dlid: u16,
    slid: u16,
    raw_traffic: u32,
    flow_label: u32,
    reversible: u32,
    mtu: u32,
    pkey: u16,
    hop_limit: u8,
    traffic_class: u8,
    numb_path: u8,
    sl: u8,
    mtu_selector: u8,
    rate_selector: u8,
    rate: u8,
    packet_life_time_selector: u8,
    packet_life_time: u8,
    preference: u8,
}

pub(crate) unsafe extern "C" fn copy_path_rec_from_kern(
    to: *mut ibv_sa_path_rec,
    from: *const KernelPath,
) {
    // SAFETY: the caller gives both structures.
    unsafe {
        let k = &*from;
        *to = ibv_sa_path_rec {
            dgid: ibv_gid { raw: k.dgid },
            sgid: ibv_gid { raw: k.sgid },
            dlid: k.dlid,
            slid: k.slid,
            raw_traffic: k.raw_traffic as c_int,
            flow_label: k.flow_label,
            hop_limit: k.hop_limit,
            traffic_class: k.traffic_class,
            reversible: k.reversible as c_int,
            numb_path: k.numb_path,
            pkey: k.pkey,
            sl: k.sl,
            mtu_selector: k.mtu_selector,
            mtu: k.mtu as u8,
            rate_selector: k.rate_selector,
            rate: k.rate,
            packet_life_time_selector: k.packet_life_time_selector,
            packet_life_time: k.packet_life_time,
            preference: k.preference,
        };
    }
}

pub(crate) unsafe extern "C" fn copy_path_rec_to_kern(
    to: *mut KernelPath,
    from: *const ibv_sa_path_rec,
) {
    // SAFETY: the caller gives both structures.
    unsafe {
        let p = &*from;
        *to = KernelPath {
            dgid: p.dgid.raw,
            sgid: p.sgid.raw,
            dlid: p.dlid,
            slid: p.slid,
            raw_traffic: p.raw_traffic as u32,
            flow_label: p.flow_label,
            reversible: p.reversible as u32,
            mtu: p.mtu.into(),
            pkey: p.pkey,
            hop_limit: p.hop_limit,
            traffic_class: p.traffic_class,
            numb_path: p.numb_path,
            sl: p.sl,
            mtu_selector: p.mtu_selector,
            rate_selector: p.rate_selector,
            rate: p.rate,
            packet_life_time_selector: p.packet_life_time_selector,
            packet_life_time: p.packet_life_time,
            preference: p.preference,
        };
    }
}
