//! The device as all ids share it: opened when the first of them is bound, and never closed.

use core::ffi::c_int;
use std::sync::{Arc, Mutex, PoisonError};

use freeflow_abi::*;
use freeflow_client::{self as client, CmId, Errno};

use crate::objects::{code, set_errno};
use crate::{device, memory, xrc};

/// What ids have if the program brings nothing of its own.
pub(super) struct Device {
    pub(super) verbs: *mut ibv_context,
    pub(super) pd: *mut ibv_pd,
    /// Made for the first who needs it.
    xrcd: Mutex<*mut ibv_xrcd>,
}

/// Opens the device and gives its address.
fn open(context: Arc<client::Context>) -> Result<usize, Errno> {
    let verbs = device::open(context)?;
    // SAFETY: just opened.
    let pd = unsafe { memory::alloc_pd(verbs) };
    if pd.is_null() {
        return Err(Errno::NOMEM);
    }
    let device = Box::new(Device {
        verbs,
        pd,
        xrcd: Mutex::new(std::ptr::null_mut()),
    });
    Ok(Box::into_raw(device) as usize)
}

/// # Safety
///
/// An address that [`open`] gave.
unsafe fn at<'a>(address: usize) -> &'a Device {
    // SAFETY: by the caller's promise; it is never freed.
    unsafe { &*(address as *const Device) }
}

/// The device of an id's session.
pub(super) fn of<'a>(id: &CmId) -> Result<&'a Device, Errno> {
    // SAFETY: it comes from `open`.
    Ok(unsafe { at(id.device(open)?) })
}

impl Device {
    /// The XRC domain of ids that the program gives none.
    pub(super) fn xrcd(&self) -> Result<*mut ibv_xrcd, Errno> {
        let mut xrcd = self.xrcd.lock().unwrap_or_else(PoisonError::into_inner);
        if xrcd.is_null() {
            let mut init = ibv_xrcd_init_attr {
                comp_mask: IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS,
                fd: -1,
                oflags: libc::O_CREAT,
            };
            // SAFETY: the device is open.
            *xrcd = unsafe { xrc::open_xrcd(self.verbs, &mut init) };
        }
        if xrcd.is_null() {
            return Err(Errno::NOMEM);
        }
        Ok(*xrcd)
    }
}

/// `rdma_get_devices(3)`: the list ends with NULL.
pub(crate) unsafe extern "C" fn get_devices(num: *mut c_int) -> *mut *mut ibv_context {
    let device = client::cm_device(open);
    if !num.is_null() {
        // SAFETY: the caller gives a place for the number, or null.
        unsafe { *num = device.is_ok().into() };
    }
    let address = match device {
        Ok(address) => address,
        Err(errno) => {
            set_errno(code(errno));
            return std::ptr::null_mut();
        }
    };
    // SAFETY: calloc gives zeroed room for two pointers, or null; the address comes from `open`.
    unsafe {
        let list = libc::calloc(2, size_of::<*mut ibv_context>()).cast::<*mut ibv_context>();
        match list.as_mut() {
            Some(first) => *first = at(address).verbs,
            None => {
                if let Some(num) = num.as_mut() {
                    *num = 0;
                }
                set_errno(libc::ENOMEM);
            }
        }
        list
    }
}

/// `rdma_free_devices(3)`.
pub(crate) unsafe extern "C" fn free_devices(list: *mut *mut ibv_context) {
    // SAFETY: the list came from `get_devices`, or is null.
    unsafe { libc::free(list.cast()) };
}
