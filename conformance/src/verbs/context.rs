//! Devices and protection domains.

use core::ffi::{CStr, c_int};
use core::mem::zeroed;
use std::sync::Arc;
use std::time::Duration;

use freeflow_abi::*;

use super::{errno, name_of, nonblocking, operation, readable, verb};
use crate::suite::{Outcome, Stop, complain, fail};

/// An open device.
pub(crate) struct Context {
    pub(crate) ptr: *mut ibv_context,
    pub(crate) name: String,
    pub(crate) attr: ibv_device_attr,
    pub(crate) port: ibv_port_attr,
    /// The GID that addresses use, and its index.
    pub(crate) gid: [u8; 16],
    pub(crate) gid_index: u8,
}

// SAFETY: verbs are thread-safe (ibv_open_device(3) and the library's own documentation).
unsafe impl core::marker::Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// An asynchronous event, acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AsyncEvent {
    pub(crate) kind: u32,
    /// Address of the object that it is about.
    pub(crate) object: usize,
}

impl Context {
    /// Opens the device of this name, or the first.
    pub(crate) fn open(name: Option<&str>, gid_index: u8) -> Outcome<Arc<Self>> {
        let mut n = 0;
        let list = verb!(ibv_get_device_list(&mut n));
        if list.is_null() {
            fail!("ibv_get_device_list: {}", name_of(errno()));
        }
        let mut opened = Err(Stop::Skip(format!(
            "no device {}",
            name.unwrap_or("at all")
        )));
        for i in 0..n as usize {
            // SAFETY: the list has `n` devices.
            let device = unsafe { *list.add(i) };
            let found = verb!(ibv_get_device_name(device));
            // SAFETY: a device's name is a string.
            let found = unsafe { CStr::from_ptr(found) };
            let found = found.to_string_lossy().into_owned();
            if name.is_none_or(|wanted| wanted == found) {
                let ptr = verb!(ibv_open_device(device));
                opened = if ptr.is_null() {
                    Err(Stop::Fail(format!(
                        "ibv_open_device({found}): {}",
                        name_of(errno())
                    )))
                } else {
                    Context::describe(ptr, found, gid_index)
                };
                break;
            }
        }
        verb!(ibv_free_device_list(list));
        opened.map(Arc::new)
    }

    fn describe(ptr: *mut ibv_context, name: String, gid_index: u8) -> Outcome<Self> {
        // SAFETY: both structures are plain numbers.
        let (mut attr, mut gid): (ibv_device_attr, ibv_gid) = unsafe { (zeroed(), zeroed()) };
        let mut port = ibv_port_attr::default();
        let failed = verb!(ibv_query_device(ptr, &mut attr));
        if failed != 0 {
            fail!("ibv_query_device: {}", name_of(failed));
        }
        let failed = verb!(ibv_query_port(ptr, 1, &mut port));
        if failed != 0 {
            fail!("ibv_query_port: {}", name_of(failed));
        }
        if verb!(ibv_query_gid(ptr, 1, gid_index.into(), &mut gid)) != 0 {
            fail!("ibv_query_gid({gid_index}): {}", name_of(errno()));
        }
        // SAFETY: any bytes are a GID.
        let gid = unsafe { gid.raw };
        nonblocking(Context::fd_of(ptr), true);
        Ok(Context {
            ptr,
            name,
            attr,
            port,
            gid,
            gid_index,
        })
    }

    fn fd_of(ptr: *mut ibv_context) -> i32 {
        // SAFETY: an open context.
        unsafe { (*ptr).async_fd }
    }

    /// Completion vectors.
    pub(crate) fn vectors(&self) -> c_int {
        // SAFETY: an open context.
        unsafe { (*self.ptr).num_comp_vectors }
    }

    /// Whether this is the kernel's software device.
    pub(crate) fn is_rxe(&self) -> bool {
        self.name.starts_with("rxe")
    }

    /// Extended attributes, if the library answers.
    pub(crate) fn attr_ex(&self) -> Option<ibv_device_attr_ex> {
        let query = operation!(self.ptr, query_device_ex)?;
        // SAFETY: plain numbers.
        let mut attr: ibv_device_attr_ex = unsafe { zeroed() };
        let input = ibv_query_device_ex_input { comp_mask: 0 };
        // SAFETY: the library's own operation with room for its answer.
        let failed = unsafe { query(self.ptr, &input, &mut attr, size_of_val(&attr)) };
        (failed == 0).then_some(attr)
    }

    /// The next asynchronous event, not yet acknowledged.
    pub(crate) fn raw_event(&self, within: Duration) -> Option<ibv_async_event> {
        // SAFETY: plain numbers and a null pointer.
        let mut event: ibv_async_event = unsafe { zeroed() };
        readable(Context::fd_of(self.ptr), within)
            .then(|| verb!(ibv_get_async_event(self.ptr, &mut event)) == 0)?
            .then_some(event)
    }

    /// The next asynchronous event.
    pub(crate) fn event(&self, within: Duration) -> Option<AsyncEvent> {
        let mut event = self.raw_event(within)?;
        // SAFETY: the union's members overlap; the address is only compared.
        let object = unsafe { event.element.object } as usize;
        verb!(ibv_ack_async_event(&mut event));
        Some(AsyncEvent {
            kind: event.event_type,
            object,
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let failed = verb!(ibv_close_device(self.ptr));
        if failed != 0 {
            complain(format!(
                "ibv_close_device: {failed}, errno {}",
                name_of(errno())
            ));
        }
    }
}

/// A protection domain.
pub(crate) struct Pd {
    pub(crate) ptr: *mut ibv_pd,
    pub(crate) ctx: Arc<Context>,
}

// SAFETY: verbs are thread-safe.
unsafe impl core::marker::Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    pub(crate) fn new(ctx: &Arc<Context>) -> Outcome<Arc<Self>> {
        let ptr = verb!(ibv_alloc_pd(ctx.ptr));
        if ptr.is_null() {
            fail!("ibv_alloc_pd: {}", name_of(errno()));
        }
        Ok(Arc::new(Pd {
            ptr,
            ctx: ctx.clone(),
        }))
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        let failed = verb!(ibv_dealloc_pd(self.ptr));
        if failed != 0 {
            complain(format!("ibv_dealloc_pd: {}", name_of(failed)));
        }
    }
}
