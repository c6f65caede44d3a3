//! Memory windows.

use std::sync::Arc;

use freeflow_session::{AllocMw, Handle, Reply, Request};
use freeflow_types::{Key, MwType};
use rustix::io::Errno;

use crate::context::Pd;
use crate::session::Session;

/// Memory window. Binding it is a work request: see [`crate::Bind`].
#[derive(Debug)]
pub struct Mw {
    session: Arc<Session>,
    handle: Handle,
    kind: MwType,
    key: Key,
}

impl Pd {
    /// Allocates a window that shows nothing yet (`ibv_alloc_mw(3)`). ENOMEM: the session has as
    /// many as it may.
    pub fn alloc_mw(&self, kind: MwType) -> Result<Mw, Errno> {
        let session = &self.context.session;
        let pd = self.handle;
        match session.call(&Request::AllocMw(AllocMw { pd, kind }))? {
            (Reply::Mw(made), _) => Ok(Mw {
                session: session.clone(),
                handle: made.mw,
                kind,
                key: made.key,
            }),
            _ => Err(Errno::PROTO),
        }
    }
}

impl Mw {
    /// What work requests that bind it name it by.
    pub fn number(&self) -> u32 {
        self.handle.0
    }

    /// Its kind.
    pub fn kind(&self) -> MwType {
        self.kind
    }

    /// Its key before it is bound for the first time.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Unbinds and frees it.
    pub fn dealloc(&self) -> Result<(), Errno> {
        self.session
            .destroy(&Request::DeallocMw { mw: self.handle })
    }
}
