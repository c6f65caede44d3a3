//! Verbs that the device does not have, with the answer that their man pages give for that.

use core::ffi::{c_int, c_uint, c_void};

use freeflow_abi::*;

use crate::objects::set_errno;

/// For verbs that return an errno value.
pub(crate) unsafe extern "C" fn errno() -> c_int {
    libc::EOPNOTSUPP
}

/// For verbs that return -1 and set errno.
pub(crate) unsafe extern "C" fn minus_one() -> c_int {
    set_errno(libc::EOPNOTSUPP);
    -1
}

/// For verbs that return an object.
pub(crate) unsafe extern "C" fn null() -> *mut c_void {
    set_errno(libc::EOPNOTSUPP);
    std::ptr::null_mut()
}

/// For verbs that give an object back that cannot exist.
pub(crate) unsafe extern "C" fn nothing() {}

pub(crate) unsafe extern "C" fn alloc_mw(_pd: *mut ibv_pd, _kind: c_uint) -> *mut ibv_mw {
    // SAFETY: it touches errno alone.
    unsafe { null() }.cast()
}

pub(crate) unsafe extern "C" fn bind_mw(
    _qp: *mut ibv_qp,
    _mw: *mut ibv_mw,
    _bind: *mut ibv_mw_bind,
) -> c_int {
    libc::EOPNOTSUPP
}

pub(crate) unsafe extern "C" fn dealloc_mw(_mw: *mut ibv_mw) -> c_int {
    libc::EOPNOTSUPP
}
