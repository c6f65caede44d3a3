//! Socket addresses, and the fields of an id that follow from them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use freeflow_abi::*;
use freeflow_client::{CmIdInfo, Errno};

use super::{client, device};

/// The default partition (IBTA volume 1, 10.9.1.2), in network order.
const PKEY: u16 = 0xFFFF;
/// Routers that a packet may pass, as the kernel's connection manager says for RoCE.
const HOP_LIMIT: u8 = 64;
/// `IBV_RATE_100_GBPS`.
const RATE: u8 = 16;
/// 4.096 us times two to this power: what a packet may take.
const PACKET_LIFE_TIME: u8 = 16;
/// "Exactly this" (IBTA volume 1, 15.2.5.16).
const EXACTLY: u8 = 2;

/// A program's socket address. EINVAL: it is of no family that has GIDs here.
///
/// # Safety
///
/// Null or an address of its family's size.
pub(crate) unsafe fn socket_address(addr: *const libc::sockaddr) -> Result<SocketAddr, Errno> {
    if addr.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: every address begins with its family, and by the caller's promise it is as long as
    // that one's; nothing is known of its alignment.
    unsafe {
        match i32::from((&raw const (*addr).sa_family).read_unaligned()) {
            libc::AF_INET => {
                let sin = addr.cast::<libc::sockaddr_in>().read_unaligned();
                let ip = Ipv4Addr::from(u32::from_be(sin.sin_addr.s_addr));
                Ok(SocketAddrV4::new(ip, u16::from_be(sin.sin_port)).into())
            }
            libc::AF_INET6 => {
                let sin = addr.cast::<libc::sockaddr_in6>().read_unaligned();
                let ip = Ipv6Addr::from(sin.sin6_addr.s6_addr);
                let port = u16::from_be(sin.sin6_port);
                Ok(SocketAddrV6::new(ip, port, sin.sin6_flowinfo, sin.sin6_scope_id).into())
            }
            _ => Err(Errno::INVAL),
        }
    }
}

/// An address as programs read it.
pub(crate) fn storage(addr: SocketAddr) -> sockaddr_storage {
    let mut room = sockaddr_storage([0; 128]);
    match addr {
        SocketAddr::V4(v4) => {
            let sin = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from(*v4.ip()).to_be(),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: the room is larger, and aligned for any address.
            unsafe { (&raw mut room).cast::<libc::sockaddr_in>().write(sin) };
        }
        SocketAddr::V6(v6) => {
            let sin = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut room).cast::<libc::sockaddr_in6>().write(sin) };
        }
    }
    room
}

/// The port of an id's address, in network order.
pub(super) fn port(room: &sockaddr_storage) -> u16 {
    // SAFETY: the room holds an address of its family, or zeroes, which are no family.
    let addr = unsafe { socket_address(std::ptr::from_ref(room).cast()) };
    addr.map_or(0, |addr| addr.port().to_be())
}

/// Writes what the router knows of an id into its fields.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn set_info(id: *mut rdma_cm_id, info: &CmIdInfo) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    unsafe {
        let addr = &raw mut (*id).route.addr;
        (*addr).src_storage = storage(info.src);
        if let Some(dst) = info.dst {
            (*addr).dst_storage = storage(dst);
        }
        let Some(port) = info.port else {
            return Ok(());
        };
        (*addr).addr.sgid.raw = port.sgid.0;
        if let Some(dgid) = port.dgid {
            (*addr).addr.dgid.raw = dgid.0;
        }
        (*addr).addr.pkey = PKEY;
        (*id).port_num = 1;
        if (*id).verbs.is_null() {
            let device = device::of(client(id))?;
            (*id).verbs = device.verbs;
            if (*id).pd.is_null() {
                (*id).pd = device.pd;
            }
        }
    }
    Ok(())
}

/// Writes the one path into an id's fields.
///
/// # Safety
///
/// A live id.
pub(super) unsafe fn set_path(id: *mut rdma_cm_id, info: &CmIdInfo) {
    let Some(port) = info.port else {
        return;
    };
    let dgid = port.dgid.unwrap_or_default();
    let path = ibv_sa_path_rec {
        dgid: ibv_gid { raw: dgid.0 },
        sgid: ibv_gid { raw: port.sgid.0 },
        dlid: 0,
        slid: 0,
        raw_traffic: 0,
        flow_label: 0,
        hop_limit: HOP_LIMIT,
        traffic_class: port.tos,
        reversible: 1,
        numb_path: 1,
        pkey: PKEY,
        sl: 0,
        mtu_selector: EXACTLY,
        mtu: port.mtu.raw() as u8,
        rate_selector: EXACTLY,
        rate: RATE,
        packet_life_time_selector: EXACTLY,
        packet_life_time: PACKET_LIFE_TIME,
        preference: 0,
    };
    // SAFETY: by the caller's promise.
    unsafe {
        forget_path(id);
        (*id).route.path_rec = Box::into_raw(Box::new(path));
        (*id).route.num_paths = 1;
    }
}

/// # Safety
///
/// A live id.
pub(super) unsafe fn forget_path(id: *mut rdma_cm_id) {
    // SAFETY: what is there was made by `set_path`.
    unsafe {
        let path = std::mem::replace(&mut (*id).route.path_rec, std::ptr::null_mut());
        (*id).route.num_paths = 0;
        if !path.is_null() {
            drop(Box::from_raw(path));
        }
    }
}

/// Address of a peer that datagrams go to.
pub(super) fn datagram_address(
    gid: freeflow_client::Gid,
    sgid_index: u8,
    traffic_class: u8,
) -> ibv_ah_attr {
    ibv_ah_attr {
        grh: ibv_global_route {
            dgid: ibv_gid { raw: gid.0 },
            flow_label: 0,
            sgid_index,
            hop_limit: HOP_LIMIT,
            traffic_class,
        },
        dlid: 0,
        sl: 0,
        src_path_bits: 0,
        static_rate: 0,
        is_global: 1,
        port_num: 1,
    }
}
