//! Protection domains, memory regions, address handles.

use core::ffi::{c_int, c_uint, c_void};

use std::sync::Arc;

use freeflow_abi::*;
use freeflow_client::{Access, AddressVector, Errno, GRH_BYTES, Gid};

use crate::objects::{Ah, Base, Pd, context, give, set_errno, status};
use crate::region::region;

/// `ibv_alloc_pd(3)`.
pub(crate) unsafe extern "C" fn alloc_pd(ctx: *mut ibv_context) -> *mut ibv_pd {
    // SAFETY: the caller gives an open context.
    let made = unsafe { context(ctx) }.client.alloc_pd();
    give(made.map(|client| {
        Box::new(Pd {
            c: ibv_pd {
                context: ctx,
                handle: client.number(),
            },
            client,
            users: Arc::default(),
            parent: None,
        })
    }))
}

/// The rights that are meant; unknown ones are refused, optional ones left out.
pub(crate) fn access(bits: c_uint) -> Result<Access, Errno> {
    let access = Access::from_bits(bits & !Access::OPTIONAL_RANGE).ok_or(Errno::OPNOTSUPP)?;
    Ok(access - Access::HUGETLB)
}

/// `ibv_reg_mr(3)`.
pub(crate) unsafe extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    flags: c_int,
) -> *mut ibv_mr {
    // SAFETY: the caller gives a live domain.
    unsafe { reg_mr_iova2(pd, addr, length, addr as u64, flags as c_uint) }
}

/// `ibv_reg_mr_iova(3)`.
pub(crate) unsafe extern "C" fn reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    flags: c_int,
) -> *mut ibv_mr {
    // SAFETY: the caller gives a live domain.
    unsafe { reg_mr_iova2(pd, addr, length, iova, flags as c_uint) }
}

/// What the header's `ibv_reg_mr` macro calls.
pub(crate) unsafe extern "C" fn reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    flags: c_uint,
) -> *mut ibv_mr {
    // SAFETY: the caller gives a live domain.
    unsafe {
        let domain = &ibv_pd::object(pd).client;
        let made = access(flags)
            .and_then(|access| domain.reg_mr(addr as u64, length as u64, iova, access));
        give(region(pd, addr, length, true, made))
    }
}

/// `ibv_dereg_mr(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: the caller gives a live region; only one that is gone is dropped.
    unsafe {
        let result = ibv_mr::object(mr).client.dereg();
        if result.is_ok() {
            drop(ibv_mr::take(mr));
        }
        status(result)
    }
}

/// An address as attributes give it.
pub(crate) fn address(attr: &ibv_ah_attr) -> AddressVector {
    let grh = &attr.grh;
    AddressVector {
        // SAFETY: every bit pattern is a GID.
        dgid: Gid(unsafe { grh.dgid.raw }),
        flow_label: grh.flow_label,
        sgid_index: grh.sgid_index,
        hop_limit: grh.hop_limit,
        traffic_class: grh.traffic_class,
        dlid: attr.dlid,
        sl: attr.sl,
        src_path_bits: attr.src_path_bits,
        static_rate: attr.static_rate,
        is_global: attr.is_global != 0,
        port_num: attr.port_num,
    }
}

/// The attributes of an address.
pub(crate) fn address_attr(av: &AddressVector) -> ibv_ah_attr {
    ibv_ah_attr {
        grh: ibv_global_route {
            dgid: ibv_gid { raw: av.dgid.0 },
            flow_label: av.flow_label,
            sgid_index: av.sgid_index,
            hop_limit: av.hop_limit,
            traffic_class: av.traffic_class,
        },
        dlid: av.dlid,
        sl: av.sl,
        src_path_bits: av.src_path_bits,
        static_rate: av.static_rate,
        is_global: av.is_global.into(),
        port_num: av.port_num,
    }
}

/// `ibv_create_ah(3)`. RoCE addresses are GIDs: there is no address without one.
pub(crate) unsafe extern "C" fn create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah {
    // SAFETY: the caller gives a live domain and attributes.
    let (domain, av) = unsafe { (ibv_pd::object(pd), address(&*attr)) };
    // SAFETY: the domain's context is open.
    let gids = unsafe { context(domain.c.context) }
        .client
        .info()
        .gids
        .len();
    let good = av.is_global && av.port_num == 1 && usize::from(av.sgid_index) < gids;
    let c = ibv_ah {
        context: domain.c.context,
        pd,
        handle: 0,
    };
    give(if good {
        Ok(Box::new(Ah { c, av }))
    } else {
        Err(Errno::INVAL)
    })
}

/// `ibv_destroy_ah(3)`.
pub(crate) unsafe extern "C" fn destroy_ah(ah: *mut ibv_ah) -> c_int {
    // SAFETY: the caller gives a live handle up.
    drop(unsafe { ibv_ah::take(ah) });
    0
}

/// `ibv_init_ah_from_wc(3)`: 0, or -1 with errno.
pub(crate) unsafe extern "C" fn init_ah_from_wc(
    ctx: *mut ibv_context,
    port: u8,
    wc: *mut ibv_wc,
    grh: *mut ibv_grh,
    attr: *mut ibv_ah_attr,
) -> c_int {
    const WC_GRH: c_uint = 1;
    const NO_LIMIT: u8 = 0xFF;
    // SAFETY: the caller gives a completion, the GRH that came with it, and room.
    unsafe {
        if (*wc).wc_flags & WC_GRH == 0 {
            set_errno(libc::EINVAL);
            return -1;
        }
        let header = grh.cast::<[u8; GRH_BYTES as usize]>().read();
        let (sgid, traffic_class, flow_label) = sender(&header);
        let to = receiver(&header);
        let gids = &context(ctx).client.info().gids;
        // A group's datagrams are answered from the first.
        let sgid_index = gids.iter().position(|&gid| gid == to).unwrap_or(0);
        *attr = address_attr(&AddressVector {
            dgid: sgid,
            flow_label,
            sgid_index: sgid_index as u8,
            hop_limit: NO_LIMIT,
            traffic_class,
            dlid: (*wc).slid,
            // The completion's is the type of the packet: RoCE carries no service level.
            sl: 0,
            src_path_bits: (*wc).dlid_path_bits,
            is_global: true,
            port_num: port,
            ..AddressVector::default()
        });
    }
    0
}

/// Whether the 40 bytes in front of a datagram have an IPv4 header, in the last 20.
fn is_v4(header: &[u8; GRH_BYTES as usize]) -> bool {
    header[20] == 0x45 && header[0] >> 4 != 6
}

/// Whom a datagram was sent to, by the 40 bytes in front of it.
fn receiver(header: &[u8; GRH_BYTES as usize]) -> Gid {
    let mut gid = [0; 16];
    if is_v4(header) {
        gid[10..12].copy_from_slice(&[0xFF, 0xFF]);
        gid[12..].copy_from_slice(&header[36..]);
    } else {
        gid.copy_from_slice(&header[24..]);
    }
    Gid(gid)
}

/// Who sent a datagram, by the 40 bytes in front of it: an IPv6 header, or an IPv4 header in the
/// last 20 bytes (IBTA annex A17).
fn sender(header: &[u8; GRH_BYTES as usize]) -> (Gid, u8, u32) {
    if is_v4(header) {
        let mut gid = [0; 16];
        gid[10..12].copy_from_slice(&[0xFF, 0xFF]);
        gid[12..].copy_from_slice(&header[32..36]);
        return (Gid(gid), header[21], 0);
    }
    let mut gid = [0; 16];
    gid.copy_from_slice(&header[8..24]);
    let first = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
    (Gid(gid), (first >> 20) as u8, first & 0xF_FFFF)
}

/// `ibv_create_ah_from_wc(3)`.
pub(crate) unsafe extern "C" fn create_ah_from_wc(
    pd: *mut ibv_pd,
    wc: *mut ibv_wc,
    grh: *mut ibv_grh,
    port: u8,
) -> *mut ibv_ah {
    let mut attr = address_attr(&AddressVector::default());
    // SAFETY: the caller gives a live domain, a completion and its GRH.
    unsafe {
        if init_ah_from_wc((*pd).context, port, wc, grh, &mut attr) != 0 {
            return std::ptr::null_mut();
        }
        create_ah(pd, &mut attr)
    }
}

/// `ibv_fork_init(3)`: children always have copies of registered memory, so that there is nothing
/// to prepare.
pub(crate) unsafe extern "C" fn fork_init() -> c_int {
    0
}

/// `ibv_is_fork_initialized(3)`: `IBV_FORK_UNNEEDED`.
pub(crate) unsafe extern "C" fn is_fork_initialized() -> c_int {
    2
}

/// `ibv_dontfork_range` and `ibv_dofork_range`: as `fork_init`.
pub(crate) unsafe extern "C" fn fork_range(_base: *mut c_void, _size: usize) -> c_int {
    0
}
