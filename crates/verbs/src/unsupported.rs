//! Verbs that the device does not have, with the answer that their man pages give for that.

use core::ffi::{c_int, c_void};

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
