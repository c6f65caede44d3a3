//! Thread domains and parent domains: hints about who uses what, which this library does not
//! need. What they promise holds all the same: every queue may be used by any thread, and memory
//! for queues is the router's, so that a program's allocators are never asked for any.

use core::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use freeflow_abi::*;
use freeflow_client::Errno;

use crate::objects::{Base, Parent, Pd, Td, give, status};

/// `ibv_alloc_td(3)`.
pub(crate) unsafe extern "C" fn alloc_td(
    ctx: *mut ibv_context,
    init: *mut ibv_td_init_attr,
) -> *mut ibv_td {
    // SAFETY: the caller gives attributes.
    if unsafe { (*init).comp_mask } != 0 {
        return give(Err(Errno::OPNOTSUPP));
    }
    give(Ok(Box::new(Td {
        c: ibv_td { context: ctx },
        users: Arc::new(AtomicU32::new(0)),
    })))
}

/// `ibv_dealloc_td(3)`: 0 or errno; EBUSY while a parent domain uses it.
pub(crate) unsafe extern "C" fn dealloc_td(td: *mut ibv_td) -> c_int {
    // SAFETY: the caller gives a live domain; only one that nobody uses is dropped.
    unsafe {
        if is_used(&ibv_td::object(td).users) {
            return libc::EBUSY;
        }
        drop(ibv_td::take(td));
    }
    0
}

/// `ibv_alloc_parent_domain(3)`: a domain that stands for another one.
pub(crate) unsafe extern "C" fn alloc_parent_domain(
    ctx: *mut ibv_context,
    attr: *mut ibv_parent_domain_init_attr,
) -> *mut ibv_pd {
    const KNOWN: u32 =
        IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS | IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT;
    // SAFETY: the caller gives attributes; the domains in them are live.
    unsafe {
        let attr = &*attr;
        if attr.comp_mask & !KNOWN != 0 {
            return give(Err(Errno::OPNOTSUPP));
        }
        if attr.pd.is_null() {
            return give(Err(Errno::INVAL));
        }
        let of = ibv_pd::object(attr.pd);
        let mut uses = vec![of.users.clone()];
        uses.extend(
            attr.td
                .as_ref()
                .map(|_| ibv_td::object(attr.td).users.clone()),
        );
        for users in &uses {
            // Relaxed: creating and freeing the same domain at once is the program's error.
            users.fetch_add(1, Ordering::Relaxed);
        }
        give(Ok(Box::new(Pd {
            c: ibv_pd {
                context: ctx,
                handle: (*attr.pd).handle,
            },
            client: of.client.clone(),
            users: Arc::new(AtomicU32::new(0)),
            parent: Some(Parent { uses }),
        })))
    }
}

/// Frees a domain of either kind: EBUSY while it is used.
pub(crate) unsafe extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: the caller gives a live domain; only one that is gone is dropped.
    unsafe {
        let object = ibv_pd::object(pd);
        let result = match &object.parent {
            _ if is_used(&object.users) => Err(Errno::BUSY),
            Some(parent) => {
                for users in &parent.uses {
                    users.fetch_sub(1, Ordering::Relaxed);
                }
                Ok(())
            }
            None => object.client.dealloc(),
        };
        if result.is_ok() {
            drop(ibv_pd::take(pd));
        }
        status(result)
    }
}

fn is_used(users: &AtomicU32) -> bool {
    users.load(Ordering::Relaxed) != 0
}

/// Whether a completion queue may be created in this domain: it must be a parent domain.
///
/// # Safety
///
/// A live domain or null.
pub(crate) unsafe fn is_parent(pd: *mut ibv_pd) -> bool {
    // SAFETY: by the caller's promise.
    !pd.is_null() && unsafe { ibv_pd::object(pd).parent.is_some() }
}
