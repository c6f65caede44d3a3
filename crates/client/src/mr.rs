//! Memory regions.

use std::sync::Arc;

use freeflow_convert::{Backing, Registration};
use freeflow_session::{Handle, MAX_PIECES, PieceDesc, PieceKind, RegMr, Reply, Request};
use freeflow_types::{Access, Key};
use rustix::io::Errno;

use crate::context::Pd;
use crate::session::{Pages, Session, unpoisoned};

/// Memory region.
#[derive(Debug)]
pub struct Mr {
    session: Arc<Session>,
    handle: Handle,
    key: Key,
    registration: std::sync::Mutex<Option<Registration>>,
}

impl Pd {
    /// Registers `len` bytes at `addr`; work requests name the first one `iova`.
    pub fn reg_mr(
        self: &Arc<Self>,
        addr: u64,
        len: u64,
        iova: u64,
        access: Access,
    ) -> Result<Mr, Errno> {
        if len == 0 {
            return Err(Errno::INVAL);
        }
        let session = &self.context.session;
        if !session.is_own() {
            return Err(Errno::INVAL);
        }
        let writes =
            Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC | Access::MW_BIND;
        let need_write = access.intersects(writes);
        let registration = freeflow_convert::lock()
            .register(&mut Pages::of(session), addr, len, need_write)
            .map_err(|e| e.errno())?;
        let request = self.describe(&registration, iova, access);
        match request.and_then(|request| session.call(&request)) {
            Ok((Reply::Mr(made), _)) => Ok(Mr {
                session: session.clone(),
                handle: made.mr,
                key: made.key,
                registration: std::sync::Mutex::new(Some(registration)),
            }),
            other => {
                freeflow_convert::lock().deregister(&mut Pages::of(session), registration);
                Err(other.err().unwrap_or(Errno::PROTO))
            }
        }
    }

    fn describe(&self, made: &Registration, iova: u64, access: Access) -> Result<Request, Errno> {
        if made.pieces().len() > MAX_PIECES {
            return Err(Errno::NOMEM);
        }
        let mut foreign = false;
        let describe = |piece: &freeflow_convert::Piece| {
            let kind = match piece.backing {
                Backing::Pool { segment, offset } => PieceKind::Pool { segment, offset },
                Backing::Foreign => {
                    foreign = true;
                    PieceKind::Foreign { addr: piece.addr }
                }
            };
            PieceDesc {
                len: piece.len,
                kind,
            }
        };
        let pieces = made.pieces().iter().map(describe).collect();
        if foreign {
            self.context.session.attach_memory()?;
        }
        let len = made.len();
        Ok(Request::RegMr(RegMr {
            pd: self.handle,
            iova,
            len,
            access,
            pieces,
        }))
    }
}

impl Mr {
    /// Its key, local and remote.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Deregisters it.
    pub fn dereg(&self) -> Result<(), Errno> {
        self.session
            .destroy(&Request::DeregMr { mr: self.handle })?;
        if let Some(registration) = unpoisoned(&self.registration).take()
            && self.session.is_own()
        {
            freeflow_convert::lock().deregister(&mut Pages::of(&self.session), registration);
        }
        Ok(())
    }
}
