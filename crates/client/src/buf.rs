//! Buffers that are shared with the router from the start: registering them converts nothing.

use std::sync::{Arc, Mutex};

use freeflow_convert::Buffer;
use rustix::io::Errno;

use crate::context::Pd;
use crate::session::{Pages, Session, unpoisoned};

/// A buffer (`ibv_alloc_buf(3)`).
#[derive(Debug)]
pub struct Buf {
    session: Arc<Session>,
    addr: u64,
    size: u64,
    pages: Mutex<Option<Buffer>>,
}

impl Pd {
    /// Allocates a buffer of zeroes that begins on a page.
    pub fn alloc_buf(&self, size: u64) -> Result<Buf, Errno> {
        let session = &self.context.session;
        if !session.is_own() || size == 0 {
            return Err(Errno::INVAL);
        }
        let pages = freeflow_convert::lock().allocate(&mut Pages::of(session), size)?;
        Ok(Buf {
            session: session.clone(),
            addr: pages.addr(),
            size,
            pages: Mutex::new(Some(pages)),
        })
    }
}

impl Buf {
    /// Its address.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Whether a range lies in it.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        let offset = addr.checked_sub(self.addr);
        offset.is_some_and(|offset| offset <= self.size && len <= self.size - offset)
    }

    /// Unmaps it. Regions that are left in it stay what they are until they are deregistered. A
    /// child of `fork` has a copy of its own, which stays until it ends.
    pub fn free(&self) {
        if let Some(pages) = unpoisoned(&self.pages).take()
            && self.session.is_own()
        {
            freeflow_convert::lock().release(&mut Pages::of(&self.session), pages);
        }
    }
}
