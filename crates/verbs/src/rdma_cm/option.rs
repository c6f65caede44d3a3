//! Options of ids, and enhanced connection establishment.

use core::ffi::{c_int, c_void};

use freeflow_abi::*;
use freeflow_client::{CmOption, Errno};

use super::{client, state};
use crate::objects::minus_one;

/// What a route may take that the program has found itself, in milliseconds.
const ROUTE_TIME: u32 = 2000;

/// `rdma_set_option(3)`.
pub(crate) unsafe extern "C" fn set_option(
    id: *mut rdma_cm_id,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: usize,
) -> c_int {
    if value.is_null() {
        return minus_one(Err(Errno::INVAL));
    }
    // SAFETY: the caller gives a live id and as many bytes as it says.
    minus_one(unsafe { set(id, level, name, value, len) })
}

/// # Safety
///
/// A live id, and as many bytes.
unsafe fn set(
    id: *mut rdma_cm_id,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: usize,
) -> Result<(), Errno> {
    let byte = || {
        let right = len == size_of::<u8>();
        // SAFETY: there is as much; nothing is known of its alignment.
        right.then(|| unsafe { value.cast::<u8>().read() })
    };
    let flag = || {
        let right = len == size_of::<c_int>();
        // SAFETY: as above.
        right.then(|| unsafe { value.cast::<c_int>().read_unaligned() } != 0)
    };
    let option = match (level, name) {
        (RDMA_OPTION_ID, RDMA_OPTION_ID_TOS) => byte().map(CmOption::Tos),
        (RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR) => flag().map(CmOption::ReuseAddr),
        (RDMA_OPTION_ID, RDMA_OPTION_ID_AFONLY) => flag().map(CmOption::AfOnly),
        (RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT) => byte().map(CmOption::AckTimeout),
        (RDMA_OPTION_IB, RDMA_OPTION_IB_PATH) => {
            // SAFETY: by the caller's promise.
            return unsafe { set_path(id, value.cast(), len) };
        }
        _ => return Err(Errno::NOSYS),
    };
    // SAFETY: by the caller's promise.
    unsafe { client(id) }.set_option(option.ok_or(Errno::INVAL)?)
}

/// The program has found a path: there is only one, and that is found as ever.
///
/// # Safety
///
/// A live id, and as many bytes.
pub(super) unsafe fn set_path(
    id: *mut rdma_cm_id,
    paths: *const ibv_path_data,
    len: usize,
) -> Result<(), Errno> {
    const USABLE: u32 = IBV_PATH_FLAG_GMP
        | IBV_PATH_FLAG_PRIMARY
        | IBV_PATH_FLAG_OUTBOUND
        | IBV_PATH_FLAG_INBOUND_REVERSE;
    if !len.is_multiple_of(size_of::<ibv_path_data>()) {
        return Err(Errno::INVAL);
    }
    let usable = (0..len / size_of::<ibv_path_data>()).any(|at| {
        // SAFETY: by the caller's promise; nothing is known of its alignment.
        let path = unsafe { paths.add(at).read_unaligned() };
        path.flags & USABLE == USABLE
    });
    if !usable {
        return Err(Errno::INVAL);
    }
    // SAFETY: by the caller's promise.
    unsafe { client(id) }.resolve_route(ROUTE_TIME)
}

/// `rdma_set_local_ece(3)`.
pub(crate) unsafe extern "C" fn set_local_ece(id: *mut rdma_cm_id, ece: *const ibv_ece) -> c_int {
    // SAFETY: the caller gives a live id, and options or null.
    minus_one(unsafe {
        match ece.as_ref() {
            Some(ece) if ece.comp_mask == 0 && (*id).qp.is_null() => {
                state(id).local_ece = Some((ece.vendor_id, ece.options));
                Ok(())
            }
            _ => Err(Errno::INVAL),
        }
    })
}

/// `rdma_get_remote_ece(3)`.
pub(crate) unsafe extern "C" fn get_remote_ece(id: *mut rdma_cm_id, ece: *mut ibv_ece) -> c_int {
    // SAFETY: the caller gives a live id, and room or null.
    minus_one(unsafe {
        match ece.as_mut() {
            Some(ece) if (*id).qp.is_null() => {
                let (vendor_id, options) = state(id).remote_ece.unwrap_or_default();
                *ece = ibv_ece {
                    vendor_id,
                    options,
                    comp_mask: 0,
                };
                Ok(())
            }
            _ => Err(Errno::INVAL),
        }
    })
}
