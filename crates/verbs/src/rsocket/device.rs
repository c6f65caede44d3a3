//! The device that all rsockets of the process share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freeflow_client::{Context, Errno, Pd};

/// An open device, and a protection domain in it.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) context: Arc<Context>,
    pub(super) pd: Arc<Pd>,
}

static SHARED: Mutex<Option<Shared>> = Mutex::new(None);

/// The device; opened anew if its router is gone. ENODEV: there is no endpoint here.
pub(super) fn shared() -> Result<Shared, Errno> {
    let mut shared = hold();
    if let Some(shared) = &*shared
        && shared.context.is_current()
    {
        return Ok(shared.clone());
    }
    let context = Context::open()?;
    let pd = context.alloc_pd()?;
    let opened = Shared { context, pd };
    *shared = Some(opened.clone());
    Ok(opened)
}

pub(super) type Held = MutexGuard<'static, Option<Shared>>;

/// Nobody else opens the device.
pub(super) fn hold() -> Held {
    SHARED.lock().unwrap_or_else(PoisonError::into_inner)
}
