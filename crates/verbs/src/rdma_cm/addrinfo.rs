//! Names to addresses.

use core::ffi::{c_char, c_int, c_uint, c_void};

use freeflow_abi::*;

use crate::objects::set_errno;

/// `rdma_getaddrinfo(3)`: 0, -1 with errno, or a code of `getaddrinfo(3)`. The route and data for
/// the connection stay empty: this transport needs none.
pub(crate) unsafe extern "C" fn getaddrinfo(
    node: *const c_char,
    service: *const c_char,
    hints: *const rdma_addrinfo,
    result: *mut *mut rdma_addrinfo,
) -> c_int {
    // SAFETY: the caller gives strings or null, hints or null, and a place for the result.
    unsafe {
        let hints = hints.as_ref();
        if node.is_null() && service.is_null() && hints.is_none() {
            set_errno(libc::EINVAL);
            return -1;
        }
        let info = libc::calloc(1, size_of::<rdma_addrinfo>()).cast::<rdma_addrinfo>();
        if info.is_null() {
            set_errno(libc::ENOMEM);
            return -1;
        }
        let status = fill(&mut *info, node, service, hints);
        if status == 0 {
            *result = info;
        } else {
            freeaddrinfo(info);
        }
        status
    }
}

/// # Safety
///
/// As for [`getaddrinfo`].
unsafe fn fill(
    info: &mut rdma_addrinfo,
    node: *const c_char,
    service: *const c_char,
    hints: Option<&rdma_addrinfo>,
) -> c_int {
    let mut status = 0;
    // SAFETY: by the caller's promise.
    unsafe {
        if !node.is_null() || !service.is_null() {
            status = look_up(info, node, service, hints);
        } else if let Some(hints) = hints {
            info.ai_flags = hints.ai_flags;
            info.ai_family = hints.ai_family;
            info.ai_qp_type = hints.ai_qp_type;
            info.ai_port_space = hints.ai_port_space;
            let (to, from) = (&mut info.ai_dst_addr, hints.ai_dst_addr);
            status = copy(to, &mut info.ai_dst_len, from, hints.ai_dst_len);
        }
        if let Some(hints) = hints
            && status == 0
            && info.ai_src_len == 0
        {
            let (to, from) = (&mut info.ai_src_addr, hints.ai_src_addr);
            status = copy(to, &mut info.ai_src_len, from, hints.ai_src_len);
        }
    }
    status
}

/// Copies an address; none if it has no length.
///
/// # Safety
///
/// As many bytes.
unsafe fn copy(
    to: &mut *mut c_void,
    to_len: &mut c_uint,
    from: *const c_void,
    len: c_uint,
) -> c_int {
    if len == 0 || from.is_null() {
        return 0;
    }
    // SAFETY: by the caller's promise; the room is as large.
    unsafe {
        let room = libc::malloc(len as usize);
        if room.is_null() {
            return libc::EAI_MEMORY;
        }
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), room.cast(), len as usize);
        (*to, *to_len) = (room, len);
    }
    0
}

/// Asks the system, for the side that the hints say.
///
/// # Safety
///
/// As for [`getaddrinfo`].
unsafe fn look_up(
    info: &mut rdma_addrinfo,
    node: *const c_char,
    service: *const c_char,
    hints: Option<&rdma_addrinfo>,
) -> c_int {
    // SAFETY: a structure of numbers and null pointers.
    let mut asked: libc::addrinfo = unsafe { std::mem::zeroed() };
    let mut wanted = std::ptr::null();
    let passive = hints.is_some_and(|hints| hints.ai_flags & RAI_PASSIVE != 0);
    if let Some(hints) = hints {
        (asked.ai_socktype, asked.ai_protocol) = match socket_kind(hints) {
            Ok(kind) => kind,
            Err(status) => return status,
        };
        if passive {
            asked.ai_flags |= libc::AI_PASSIVE;
        }
        if hints.ai_flags & RAI_NUMERICHOST != 0 {
            asked.ai_flags |= libc::AI_NUMERICHOST;
        }
        asked.ai_family = hints.ai_family;
        wanted = &raw const asked;
    }
    let mut found = std::ptr::null_mut();
    // SAFETY: strings or null, hints or null, and a place for the result, which is given back.
    unsafe {
        let status = libc::getaddrinfo(node, service, wanted, &mut found);
        if status != 0 {
            return status;
        }
        let first = &*found;
        let datagrams = first.ai_socktype == libc::SOCK_DGRAM;
        let (qp_type, ps) = if datagrams {
            (IBV_QPT_UD, RDMA_PS_UDP)
        } else {
            (IBV_QPT_RC, RDMA_PS_TCP)
        };
        let or = |hint: Option<c_int>, other: c_uint| {
            hint.filter(|&hint| hint != 0).unwrap_or(other as c_int)
        };
        info.ai_qp_type = or(hints.map(|hints| hints.ai_qp_type), qp_type);
        info.ai_port_space = or(hints.map(|hints| hints.ai_port_space), ps);
        info.ai_family = first.ai_family;
        let (to, len) = if passive {
            info.ai_flags = RAI_PASSIVE;
            (&mut info.ai_src_addr, &mut info.ai_src_len)
        } else {
            (&mut info.ai_dst_addr, &mut info.ai_dst_len)
        };
        let status = copy(to, len, first.ai_addr.cast(), first.ai_addrlen);
        libc::freeaddrinfo(found);
        status
    }
}

/// The kind of socket that is like what the hints ask for, and its protocol. `EAI_SOCKTYPE` (the
/// man page calls it `EAI_QPTYPE`): the hints contradict each other.
fn socket_kind(hints: &rdma_addrinfo) -> Result<(c_int, c_int), c_int> {
    let kind = match hints.ai_qp_type as c_uint {
        0 => 0,
        IBV_QPT_UD => libc::SOCK_DGRAM,
        IBV_QPT_RC | IBV_QPT_UC | IBV_QPT_XRC_SEND | IBV_QPT_XRC_RECV => libc::SOCK_STREAM,
        _ => return Err(libc::EAI_SOCKTYPE),
    };
    let protocol = match (hints.ai_port_space as c_uint, kind) {
        (RDMA_PS_TCP, libc::SOCK_DGRAM) => return Err(libc::EAI_SOCKTYPE),
        (RDMA_PS_UDP | RDMA_PS_IPOIB, libc::SOCK_STREAM) => return Err(libc::EAI_SOCKTYPE),
        (RDMA_PS_TCP, _) | (RDMA_PS_IB, libc::SOCK_STREAM) => libc::IPPROTO_TCP,
        (RDMA_PS_UDP | RDMA_PS_IPOIB, _) | (RDMA_PS_IB, libc::SOCK_DGRAM) => libc::IPPROTO_UDP,
        _ => 0,
    };
    Ok((kind, protocol))
}

/// `rdma_freeaddrinfo(3)`.
pub(crate) unsafe extern "C" fn freeaddrinfo(mut info: *mut rdma_addrinfo) {
    // SAFETY: the caller gives a list back that `getaddrinfo` made, or null.
    unsafe {
        while let Some(this) = info.as_mut() {
            let next = this.ai_next;
            for part in [
                this.ai_src_addr,
                this.ai_dst_addr,
                this.ai_src_canonname.cast(),
                this.ai_dst_canonname.cast(),
                this.ai_route,
                this.ai_connect,
            ] {
                libc::free(part);
            }
            libc::free(info.cast());
            info = next;
        }
    }
}
