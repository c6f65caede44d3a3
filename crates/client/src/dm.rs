//! Device memory: shared pages that the program reaches by copying alone.

use std::sync::Arc;

use freeflow_session::{Handle, RegDmMr, Reply, Request};
use freeflow_shm::Mapping;
use freeflow_types::Access;
use rustix::io::Errno;

use crate::context::{Context, Pd};
use crate::mr::Mr;
use crate::session::{Pages, Session};

/// Unit of offsets and lengths in device memory, as programs know it from hardware.
const UNIT: u64 = 4;

/// Device memory.
#[derive(Debug)]
pub struct Dm {
    session: Arc<Session>,
    handle: Handle,
    len: u64,
    memory: Mapping,
}

impl Context {
    /// Allocates device memory of zeroes (`ibv_alloc_dm(3)`), which begins on a page. ENOMEM: more
    /// than is left of the session's.
    pub fn alloc_dm(&self, len: u64) -> Result<Dm, Errno> {
        let session = &self.session;
        let context = self.handle;
        session.check_own()?;
        // Held over the call: who learns of a new segment is the first to use it.
        let mut pages = Pages::of(session);
        let (Reply::Dm(made), fds) = session.call(&Request::AllocDm { context, len })? else {
            return Err(Errno::PROTO);
        };
        match pages.map(made.segment, made.offset, len, fds) {
            Ok(memory) => Ok(Dm {
                session: session.clone(),
                handle: made.dm,
                len,
                memory,
            }),
            Err(errno) => {
                let _ = session.tell(&Request::FreeDm { dm: made.dm });
                Err(errno)
            }
        }
    }
}

impl Pd {
    /// Registers a part of device memory; its first byte has address 0 (`ibv_reg_dm_mr(3)`).
    /// EINVAL: it is not inside, or not asked for with [`Access::ZERO_BASED`].
    pub fn reg_dm_mr(&self, dm: &Dm, offset: u64, len: u64, access: Access) -> Result<Mr, Errno> {
        self.make(&Request::RegDmMr(RegDmMr {
            pd: self.handle,
            dm: dm.handle,
            offset,
            len,
            access,
        }))
    }
}

impl Dm {
    /// Its number at the router.
    pub fn number(&self) -> u32 {
        self.handle.0
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), Errno> {
        let len = len as u64;
        if !offset.is_multiple_of(UNIT) || !len.is_multiple_of(UNIT) {
            return Err(Errno::INVAL);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Errno::FAULT),
        }
    }

    /// Copies to it (`ibv_memcpy_to_dm(3)`). EFAULT: it ends before; EINVAL: offset or length are
    /// not multiples of 4.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.check(offset, bytes.len())?;
        self.memory.write(offset, bytes).map_err(|_| Errno::FAULT)
    }

    /// Copies from it; errors as of [`Dm::write`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Errno> {
        self.check(offset, out.len())?;
        self.memory.read(offset, out).map_err(|_| Errno::FAULT)
    }

    /// Frees it. EBUSY: a region is in it.
    pub fn free(&self) -> Result<(), Errno> {
        self.session.destroy(&Request::FreeDm { dm: self.handle })
    }
}
