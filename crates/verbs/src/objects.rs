//! The objects behind the C pointers, and errno.

use core::ffi::{c_int, c_void};
use std::cell::UnsafeCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use freeflow_abi::*;
use freeflow_client as client;

/// An open device: what the program holds is the address of `verbs.context`.
#[repr(C)]
pub(crate) struct Context {
    pub(crate) verbs: verbs_context,
    pub(crate) client: Arc<client::Context>,
    /// `cmd_fd`, by which programs tell contexts apart and which some duplicate: nothing is behind it.
    pub(crate) _command: OwnedFd,
}

#[repr(C)]
pub(crate) struct Pd {
    pub(crate) c: ibv_pd,
    pub(crate) client: Arc<client::Pd>,
    /// Parent domains over it.
    pub(crate) users: Arc<AtomicU32>,
    /// A parent domain over another one.
    pub(crate) parent: Option<Parent>,
}

/// What a parent domain uses, by its counts of users.
pub(crate) struct Parent {
    pub(crate) uses: Vec<Arc<AtomicU32>>,
}

#[repr(C)]
pub(crate) struct Td {
    pub(crate) c: ibv_td,
    pub(crate) users: Arc<AtomicU32>,
}

#[repr(C)]
pub(crate) struct Mr {
    pub(crate) c: ibv_mr,
    pub(crate) client: client::Mr,
}

#[repr(C)]
pub(crate) struct Mw {
    pub(crate) c: ibv_mw,
    pub(crate) client: client::Mw,
}

#[repr(C)]
pub(crate) struct Dm {
    pub(crate) c: ibv_dm,
    pub(crate) client: client::Dm,
}

#[repr(C)]
pub(crate) struct Buf {
    pub(crate) c: ibv_buf,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) client: client::Buf,
}

#[repr(C)]
pub(crate) struct Ah {
    pub(crate) c: ibv_ah,
    pub(crate) av: client::AddressVector,
}

#[repr(C)]
pub(crate) struct Channel {
    pub(crate) c: ibv_comp_channel,
    pub(crate) client: Arc<client::CompChannel>,
}

#[repr(C)]
pub(crate) struct Cq {
    pub(crate) c: ibv_cq_ex,
    pub(crate) client: Arc<client::Cq>,
    /// Held from start_poll to end_poll.
    pub(crate) polling: RawLock,
    /// Owned by who holds `polling`.
    pub(crate) current: UnsafeCell<Current>,
}

/// What the read functions of a completion queue show.
#[derive(Default)]
pub(crate) struct Current {
    pub(crate) completion: client::Completion,
    /// Nanoseconds from 1970 to the monotonic clock's zero, once asked for since start_poll.
    pub(crate) since_1970: Option<u64>,
}

#[repr(C)]
pub(crate) struct Qp {
    pub(crate) c: ibv_qp_ex,
    pub(crate) client: Arc<client::Qp>,
    pub(crate) sq_sig_all: bool,
    /// Work requests between wr_start and wr_complete; owned by who is between them.
    pub(crate) builder: UnsafeCell<crate::wr::Builder>,
}

#[repr(C)]
pub(crate) struct Srq {
    pub(crate) c: ibv_srq,
    pub(crate) client: Arc<client::Srq>,
}

#[repr(C)]
pub(crate) struct Xrcd {
    pub(crate) c: ibv_xrcd,
    pub(crate) client: client::Xrcd,
}

/// A lock that is taken in one C call and released in another.
#[derive(Default)]
pub(crate) struct RawLock {
    locked: std::sync::Mutex<bool>,
    free: std::sync::Condvar,
}

impl RawLock {
    pub(crate) fn lock(&self) {
        let locked = self
            .locked
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let free = self.free.wait_while(locked, |locked| *locked);
        *free.unwrap_or_else(std::sync::PoisonError::into_inner) = true;
    }

    pub(crate) fn unlock(&self) {
        *self
            .locked
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = false;
        self.free.notify_one();
    }
}

/// A C structure that is the first field of the object that we allocated for it.
///
/// # Safety
///
/// `Object` is `repr(C)` and begins with `Self`.
pub(crate) unsafe trait Base: Sized {
    type Object;

    /// The object behind a pointer that the program gave back.
    ///
    /// # Safety
    ///
    /// The pointer came from this library and the object is not destroyed, as the man pages
    /// demand.
    unsafe fn object<'a>(this: *mut Self) -> &'a Self::Object {
        // SAFETY: the caller promises that `this` is the base of a live `Object`.
        unsafe { &*this.cast::<Self::Object>() }
    }

    /// Takes the object back to drop it.
    ///
    /// # Safety
    ///
    /// As for [`Base::object`], and nobody uses the object any more.
    unsafe fn take(this: *mut Self) -> Box<Self::Object> {
        // SAFETY: it was made by `Box::into_raw`, and the caller gives it up.
        unsafe { Box::from_raw(this.cast::<Self::Object>()) }
    }
}

// SAFETY: `Pd` is repr(C) and begins with ibv_pd.
unsafe impl Base for ibv_pd {
    type Object = Pd;
}
// SAFETY: `Td` is repr(C) and begins with ibv_td.
unsafe impl Base for ibv_td {
    type Object = Td;
}
// SAFETY: `Mr` is repr(C) and begins with ibv_mr.
unsafe impl Base for ibv_mr {
    type Object = Mr;
}
// SAFETY: `Mw` is repr(C) and begins with ibv_mw.
unsafe impl Base for ibv_mw {
    type Object = Mw;
}
// SAFETY: `Dm` is repr(C) and begins with ibv_dm.
unsafe impl Base for ibv_dm {
    type Object = Dm;
}
// SAFETY: `Buf` is repr(C) and begins with ibv_buf.
unsafe impl Base for ibv_buf {
    type Object = Buf;
}
// SAFETY: `Ah` is repr(C) and begins with ibv_ah.
unsafe impl Base for ibv_ah {
    type Object = Ah;
}
// SAFETY: `Channel` is repr(C) and begins with ibv_comp_channel.
unsafe impl Base for ibv_comp_channel {
    type Object = Channel;
}
// SAFETY: `Cq` is repr(C) and begins with ibv_cq_ex, which begins with ibv_cq.
unsafe impl Base for ibv_cq {
    type Object = Cq;
}
// SAFETY: `Cq` is repr(C) and begins with ibv_cq_ex.
unsafe impl Base for ibv_cq_ex {
    type Object = Cq;
}
// SAFETY: `Qp` is repr(C) and begins with ibv_qp_ex, which begins with ibv_qp.
unsafe impl Base for ibv_qp {
    type Object = Qp;
}
// SAFETY: `Qp` is repr(C) and begins with ibv_qp_ex.
unsafe impl Base for ibv_qp_ex {
    type Object = Qp;
}

// SAFETY: `Srq` is repr(C) and begins with ibv_srq.
unsafe impl Base for ibv_srq {
    type Object = Srq;
}
// SAFETY: `Xrcd` is repr(C) and begins with ibv_xrcd.
unsafe impl Base for ibv_xrcd {
    type Object = Xrcd;
}

/// The object behind a context that the program gave back.
///
/// # Safety
///
/// It came from this library and is not closed.
pub(crate) unsafe fn context<'a>(context: *mut ibv_context) -> &'a Context {
    let offset = core::mem::offset_of!(verbs_context, context);
    // SAFETY: every context of this library is the `context` field of the `verbs` field at the
    // start of a `Context`.
    unsafe { &*context.byte_sub(offset).cast::<Context>() }
}

/// The errno value of an error.
pub(crate) fn code(errno: client::Errno) -> c_int {
    errno.raw_os_error()
}

pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: libc gives the address of this thread's errno.
    unsafe { *libc::__errno_location() = errno };
}

/// 0, or the errno value.
pub(crate) fn status(result: Result<(), client::Errno>) -> c_int {
    result.map_or_else(code, |()| 0)
}

/// 0, or -1 with errno set.
pub(crate) fn minus_one(result: Result<(), client::Errno>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(code(errno));
            -1
        }
    }
}

/// A new object, or NULL with errno set.
pub(crate) fn give<C: Base>(object: Result<Box<C::Object>, client::Errno>) -> *mut C {
    match object {
        Ok(object) => Box::into_raw(object).cast(),
        Err(errno) => {
            set_errno(code(errno));
            std::ptr::null_mut()
        }
    }
}

/// A default-initialised mutex and condition variable: all zeroes with glibc.
pub(crate) const MUTEX: pthread_mutex = pthread_mutex([0; 40]);
pub(crate) const COND: pthread_cond = pthread_cond([0; 48]);

pub(crate) const NULL: *mut c_void = std::ptr::null_mut();
