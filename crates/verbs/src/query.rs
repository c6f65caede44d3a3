//! Queries: device, port, GIDs, P_Keys, clocks.

use core::ffi::{c_char, c_int, c_uint};

use freeflow_abi::*;
use freeflow_client::{DeviceInfo, Gid, Mtu};

use crate::objects::{context, set_errno};

/// Not the id of any vendor whose private interfaces programs would try.
const VENDOR_ID: u32 = 0x46_464C;
/// The one full-membership P_Key, in network order.
const DEFAULT_PKEY: u16 = 0xFFFF;
/// "LinkUp".
const PHYS_STATE_UP: u8 = 5;
/// 4X.
const WIDTH_4X: u8 = 2;
/// 25 Gb/s a lane.
const SPEED_EDR: u8 = 32;

const CAPABILITIES: c_uint = IBV_DEVICE_CURR_QP_STATE_MOD
    | IBV_DEVICE_SYS_IMAGE_GUID
    | IBV_DEVICE_RC_RNR_NAK_GEN
    | IBV_DEVICE_SRQ_RESIZE
    | IBV_DEVICE_XRC
    | IBV_DEVICE_MEM_WINDOW
    | IBV_DEVICE_MEM_MGT_EXTENSIONS
    | IBV_DEVICE_MEM_WINDOW_TYPE_2B;

const CAPABILITIES_EX: u64 =
    CAPABILITIES as u64 | IBV_DEVICE_FLUSH_GLOBAL | IBV_DEVICE_ATOMIC_WRITE;

const ODP_UD: u32 = IBV_ODP_SUPPORT_SEND | IBV_ODP_SUPPORT_RECV | IBV_ODP_SUPPORT_SRQ_RECV;
const ODP_UC: u32 = ODP_UD | IBV_ODP_SUPPORT_WRITE;
const ODP_RC: u32 = ODP_UC
    | IBV_ODP_SUPPORT_READ
    | IBV_ODP_SUPPORT_ATOMIC
    | IBV_ODP_SUPPORT_FLUSH
    | IBV_ODP_SUPPORT_ATOMIC_WRITE;

fn device_attr(info: &DeviceInfo) -> ibv_device_attr {
    let limits = &info.limits;
    let int = |n: u32| c_int::try_from(n).unwrap_or(c_int::MAX);
    let mut fw_ver = [0; 64];
    for (to, from) in fw_ver.iter_mut().zip(env!("CARGO_PKG_VERSION").bytes()) {
        *to = from as c_char;
    }
    ibv_device_attr {
        fw_ver,
        node_guid: info.node_guid.to_be(),
        sys_image_guid: info.node_guid.to_be(),
        max_mr_size: limits.max_mr_size,
        page_size_cap: info.page_size,
        vendor_id: VENDOR_ID,
        vendor_part_id: 1,
        hw_ver: 0,
        max_qp: int(limits.max_qp),
        max_qp_wr: int(limits.max_qp_wr),
        device_cap_flags: CAPABILITIES,
        max_sge: int(limits.max_sge),
        max_sge_rd: int(limits.max_sge),
        max_cq: int(limits.max_cq),
        max_cqe: int(limits.max_cqe),
        max_mr: int(limits.max_mr),
        max_pd: int(limits.max_pd),
        max_qp_rd_atom: limits.max_rd_atomic.into(),
        max_ee_rd_atom: 0,
        max_res_rd_atom: int(limits.max_qp).saturating_mul(limits.max_rd_atomic.into()),
        max_qp_init_rd_atom: limits.max_rd_atomic.into(),
        max_ee_init_rd_atom: 0,
        atomic_cap: IBV_ATOMIC_HCA,
        max_ee: 0,
        max_rdd: 0,
        max_mw: int(limits.max_mw),
        max_raw_ipv6_qp: 0,
        max_raw_ethy_qp: 0,
        max_mcast_grp: int(limits.max_mcast_grp),
        max_mcast_qp_attach: int(limits.max_mcast_qp_attach),
        max_total_mcast_qp_attach: int(limits.max_mcast_grp)
            .saturating_mul(int(limits.max_mcast_qp_attach)),
        max_ah: int(limits.max_ah),
        max_fmr: 0,
        max_map_per_fmr: 0,
        max_srq: int(limits.max_srq),
        max_srq_wr: int(limits.max_srq_wr),
        max_srq_sge: int(limits.max_sge),
        max_pkeys: 1,
        local_ca_ack_delay: 0,
        phys_port_cnt: 1,
    }
}

fn port_attr(info: &DeviceInfo) -> ibv_port_attr {
    ibv_port_attr {
        state: IBV_PORT_ACTIVE,
        max_mtu: Mtu::B4096.raw(),
        active_mtu: info.mtu.raw(),
        gid_tbl_len: info.gids.len() as c_int,
        max_msg_sz: freeflow_client::MAX_MESSAGE as u32,
        pkey_tbl_len: 1,
        max_vl_num: 1,
        active_width: WIDTH_4X,
        active_speed: SPEED_EDR,
        phys_state: PHYS_STATE_UP,
        link_layer: IBV_LINK_LAYER_ETHERNET,
        flags: IBV_QPF_GRH_REQUIRED,
        ..ibv_port_attr::default()
    }
}

/// Copies a structure to the caller's of `len` bytes, which may be shorter, or longer: then what we
/// do not know is zero.
///
/// # Safety
///
/// `to` has room for `len` bytes.
unsafe fn put<T>(to: *mut T, from: &T, len: usize) {
    let known = len.min(size_of::<T>());
    // SAFETY: both hold `known` bytes, by the caller's promise and by their type; the caller's has
    // `len`.
    unsafe {
        let to = to.cast::<u8>();
        to.copy_from(std::ptr::from_ref(from).cast(), known);
        to.add(known).write_bytes(0, len - known);
    }
}

/// `ibv_query_device(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn query_device(
    ctx: *mut ibv_context,
    attr: *mut ibv_device_attr,
) -> c_int {
    // SAFETY: the caller gives an open context and room for the attributes.
    unsafe { *attr = device_attr(&context(ctx).client.query()) };
    0
}

/// `ibv_query_device_ex(3)`.
pub(crate) unsafe extern "C" fn query_device_ex(
    ctx: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    len: usize,
) -> c_int {
    // SAFETY: the caller gives an input or null.
    if unsafe { input.as_ref() }.is_some_and(|input| input.comp_mask != 0) {
        return libc::EINVAL;
    }
    if len < size_of::<ibv_device_attr>() {
        return libc::EOPNOTSUPP;
    }
    // SAFETY: the caller gives an open context.
    let info = unsafe { context(ctx) }.client.query();
    let implicit = match info.implicit_regions {
        true => IBV_ODP_SUPPORT_IMPLICIT,
        false => 0,
    };
    let full = ibv_device_attr_ex {
        orig_attr: device_attr(&info),
        comp_mask: 0,
        odp_caps: ibv_odp_caps {
            general_caps: IBV_ODP_SUPPORT | implicit,
            rc_odp_caps: ODP_RC,
            uc_odp_caps: ODP_UC,
            ud_odp_caps: ODP_UD,
        },
        completion_timestamp_mask: u64::MAX,
        // Timestamps are nanoseconds.
        hca_core_clock: 1_000_000,
        device_cap_flags_ex: CAPABILITIES_EX,
        tso_caps: [0; 2],
        rss_caps: ibv_rss_caps {
            supported_qpts: 0,
            max_rwq_indirection_tables: 0,
            max_rwq_indirection_table_size: 0,
            rx_hash_fields_mask: 0,
            rx_hash_function: 0,
        },
        max_wq_type_rq: 0,
        packet_pacing_caps: [0; 3],
        raw_packet_caps: 0,
        tm_caps: [0; 5],
        cq_mod_caps: [u16::MAX; 2],
        max_dm_size: info.limits.max_dm_size,
        pci_atomic_caps: [0; 3],
        xrc_odp_caps: ODP_RC,
        phys_port_cnt_ex: 1,
    };
    // SAFETY: the caller gives room for `len` bytes.
    unsafe { put(attr, &full, len) };
    0
}

fn is_port(port: u32) -> bool {
    port == 1
}

/// The exported `ibv_query_port`: it writes the old, short structure alone.
pub(crate) unsafe extern "C" fn query_port(
    ctx: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
) -> c_int {
    // SAFETY: the caller gives an open context and room for the old structure.
    unsafe {
        query_port_ex(
            ctx,
            port,
            attr,
            core::mem::offset_of!(ibv_port_attr, port_cap_flags2),
        )
    }
}

/// The operation behind the header's `ibv_query_port`.
pub(crate) unsafe extern "C" fn query_port_ex(
    ctx: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
    len: usize,
) -> c_int {
    if !is_port(port.into()) {
        return libc::EINVAL;
    }
    // SAFETY: the caller gives an open context and room for `len` bytes.
    unsafe { put(attr, &port_attr(context(ctx).client.info()), len) };
    0
}

fn raw(gid: Gid) -> ibv_gid {
    ibv_gid { raw: gid.0 }
}

/// The GID at an index of a port.
///
/// # Safety
///
/// `ctx` is an open context.
unsafe fn gid_at(ctx: *mut ibv_context, port: u32, index: u32) -> Option<Gid> {
    // SAFETY: by the caller's promise.
    let gids = unsafe { &context(ctx).client.info().gids };
    gids.get(index as usize).copied().filter(|_| is_port(port))
}

/// `ibv_query_gid(3)`: 0, or -1 with errno.
pub(crate) unsafe extern "C" fn query_gid(
    ctx: *mut ibv_context,
    port: u8,
    index: c_int,
    gid: *mut ibv_gid,
) -> c_int {
    // SAFETY: the caller gives an open context.
    let found = u32::try_from(index)
        .ok()
        .and_then(|i| unsafe { gid_at(ctx, port.into(), i) });
    let Some(found) = found else {
        set_errno(libc::EINVAL);
        return -1;
    };
    // SAFETY: the caller gives room for a GID.
    unsafe { *gid = raw(found) };
    0
}

fn entry(gid: Gid, port: u32, index: u32) -> ibv_gid_entry {
    ibv_gid_entry {
        gid: raw(gid),
        gid_index: index,
        port_num: port,
        gid_type: IBV_GID_TYPE_ROCE_V2,
        ndev_ifindex: 0,
    }
}

/// `ibv_query_gid_ex(3)`: 0 or errno. The table has no empty entries.
pub(crate) unsafe extern "C" fn query_gid_ex(
    ctx: *mut ibv_context,
    port: u32,
    index: u32,
    to: *mut ibv_gid_entry,
    flags: u32,
    len: usize,
) -> c_int {
    if flags != 0 || !is_port(port) {
        return libc::EINVAL;
    }
    // SAFETY: the caller gives an open context.
    let Some(gid) = (unsafe { gid_at(ctx, port, index) }) else {
        return libc::EINVAL;
    };
    // SAFETY: the caller gives room for `len` bytes.
    unsafe { put(to, &entry(gid, port, index), len) };
    0
}

/// `ibv_query_gid_table(3)`: the number of entries, or minus errno.
pub(crate) unsafe extern "C" fn query_gid_table(
    ctx: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max: usize,
    flags: u32,
    len: usize,
) -> isize {
    if flags != 0 {
        return -(libc::EINVAL as isize);
    }
    // SAFETY: the caller gives an open context.
    let gids = unsafe { &context(ctx).client.info().gids };
    if gids.len() > max {
        return -(libc::EINVAL as isize);
    }
    for (index, &gid) in gids.iter().enumerate() {
        // SAFETY: the caller gives room for `max` entries of `len` bytes each.
        unsafe {
            let to = entries.byte_add(index * len);
            put(to, &entry(gid, 1, index as u32), len);
        }
    }
    gids.len() as isize
}

/// Private to rdma-core, but programs use it: the type as sysfs numbers it.
pub(crate) unsafe extern "C" fn query_gid_type(
    ctx: *mut ibv_context,
    port: u8,
    index: c_uint,
    gid_type: *mut c_uint,
) -> c_int {
    /// RoCE v2, where `IB_ROCE_V1` is 0.
    const SYSFS_ROCE_V2: c_uint = 1;
    // SAFETY: the caller gives an open context.
    if unsafe { gid_at(ctx, port.into(), index) }.is_none() {
        set_errno(libc::EINVAL);
        return -1;
    }
    // SAFETY: the caller gives room for the type.
    unsafe { *gid_type = SYSFS_ROCE_V2 };
    0
}

/// `ibv_query_pkey(3)`: 0, or -1 with errno.
pub(crate) unsafe extern "C" fn query_pkey(
    _ctx: *mut ibv_context,
    port: u8,
    index: c_int,
    pkey: *mut u16,
) -> c_int {
    if !is_port(port.into()) || index != 0 {
        set_errno(libc::EINVAL);
        return -1;
    }
    // SAFETY: the caller gives room for the key.
    unsafe { *pkey = DEFAULT_PKEY };
    0
}

/// `ibv_get_pkey_index(3)`: the index, or -1.
pub(crate) unsafe extern "C" fn get_pkey_index(
    _ctx: *mut ibv_context,
    port: u8,
    pkey: u16,
) -> c_int {
    if is_port(port.into()) && pkey == DEFAULT_PKEY {
        return 0;
    }
    set_errno(libc::EINVAL);
    -1
}

/// `ibv_query_rt_values_ex(3)`: completion timestamps are of the monotonic clock.
pub(crate) unsafe extern "C" fn query_rt_values(
    _ctx: *mut ibv_context,
    values: *mut ibv_values_ex,
) -> c_int {
    const RAW_CLOCK: u32 = 1;
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the caller gives the structure; `now` is room for the time.
    unsafe {
        if (*values).comp_mask & RAW_CLOCK != 0 {
            libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now);
            (*values).raw_clock = [now.tv_sec, now.tv_nsec];
        }
        (*values).comp_mask &= RAW_CLOCK;
    }
    0
}
