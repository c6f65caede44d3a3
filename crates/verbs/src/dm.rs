//! Device memory.

use core::ffi::{c_int, c_uint, c_void};

use freeflow_abi::*;
use freeflow_client::Errno;

use crate::memory::access;
use crate::objects::{Base, Dm, context, give, status};
use crate::region::region;

/// Device memory begins on a page of 4 KiB or more.
const LARGEST_ALIGNMENT: u32 = 12;

/// `ibv_alloc_dm(3)`.
pub(crate) unsafe extern "C" fn alloc_dm(
    ctx: *mut ibv_context,
    attr: *mut ibv_alloc_dm_attr,
) -> *mut ibv_dm {
    // SAFETY: the caller gives an open context and attributes.
    let (client, attr) = unsafe { (&context(ctx).client, &*attr) };
    let made = if attr.comp_mask != 0 || attr.log_align_req > LARGEST_ALIGNMENT {
        Err(Errno::INVAL)
    } else {
        client.alloc_dm(attr.length as u64)
    };
    give(made.map(|client| {
        let c = ibv_dm {
            context: ctx,
            memcpy_to_dm: Some(memcpy_to_dm),
            memcpy_from_dm: Some(memcpy_from_dm),
            comp_mask: IBV_DM_MASK_HANDLE,
            handle: client.number(),
        };
        Box::new(Dm { c, client })
    }))
}

/// `ibv_free_dm(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn free_dm(dm: *mut ibv_dm) -> c_int {
    // SAFETY: the caller gives live device memory; only what is gone is dropped.
    unsafe {
        let result = ibv_dm::object(dm).client.free();
        if result.is_ok() {
            drop(ibv_dm::take(dm));
        }
        status(result)
    }
}

/// `ibv_reg_dm_mr(3)`.
pub(crate) unsafe extern "C" fn reg_dm_mr(
    pd: *mut ibv_pd,
    dm: *mut ibv_dm,
    offset: u64,
    length: usize,
    flags: c_uint,
) -> *mut ibv_mr {
    // SAFETY: the caller gives a live domain and live device memory.
    unsafe {
        let (domain, dm) = (&ibv_pd::object(pd).client, &ibv_dm::object(dm).client);
        let made =
            access(flags).and_then(|access| domain.reg_dm_mr(dm, offset, length as u64, access));
        give(region(pd, std::ptr::null_mut(), length, true, made))
    }
}

/// `ibv_memcpy_to_dm(3)`: 0 or errno.
unsafe extern "C" fn memcpy_to_dm(
    dm: *mut ibv_dm,
    offset: u64,
    host: *const c_void,
    length: usize,
) -> c_int {
    if length == 0 {
        return 0;
    }
    // SAFETY: the caller gives live device memory and `length` bytes that may be read.
    unsafe {
        let bytes = std::slice::from_raw_parts(host.cast::<u8>(), length);
        status(ibv_dm::object(dm).client.write(offset, bytes))
    }
}

/// `ibv_memcpy_from_dm(3)`: 0 or errno.
unsafe extern "C" fn memcpy_from_dm(
    host: *mut c_void,
    dm: *mut ibv_dm,
    offset: u64,
    length: usize,
) -> c_int {
    if length == 0 {
        return 0;
    }
    // SAFETY: the caller gives live device memory and room for `length` bytes.
    unsafe {
        let out = std::slice::from_raw_parts_mut(host.cast::<u8>(), length);
        status(ibv_dm::object(dm).client.read(offset, out))
    }
}
