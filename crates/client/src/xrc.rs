//! XRC domains, and receive queue pairs in them.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use freeflow_session::{FileId, Handle, OpenXrcQp, OpenXrcd, Reply, Request};
use freeflow_types::Qpn;
use rustix::io::Errno;

use crate::context::Context;
use crate::qp::Qp;
use crate::session::{Session, created};

/// An open XRC domain.
#[derive(Debug)]
pub struct Xrcd {
    session: Arc<Session>,
    pub(crate) handle: Handle,
}

impl Context {
    /// Opens an XRC domain: that of a file, or one of its own (`ibv_open_xrcd(3)`). EAGAIN: there
    /// is none and it is not to be made; EINVAL: there is one and it must not be.
    pub fn open_xrcd(
        &self,
        file: Option<BorrowedFd<'_>>,
        create: bool,
        exclusive: bool,
    ) -> Result<Xrcd, Errno> {
        let file = match file {
            Some(fd) => {
                let stat = rustix::fs::fstat(fd)?;
                Some(FileId {
                    dev: stat.st_dev,
                    ino: stat.st_ino,
                })
            }
            None => None,
        };
        let (reply, _) = self.session.call(&Request::OpenXrcd(OpenXrcd {
            context: self.handle,
            file,
            create,
            exclusive,
        }))?;
        Ok(Xrcd {
            session: self.session.clone(),
            handle: created(reply)?,
        })
    }

    /// Creates an XRC receive queue pair (`ibv_create_qp_ex(3)`), or opens the one with this
    /// number (`ibv_open_qp(3)`; EINVAL: the domain has none). It is destroyed with the last
    /// opening. `user` is what events name it by.
    pub fn open_xrc_qp(
        &self,
        xrcd: &Xrcd,
        qpn: Option<u32>,
        user: usize,
    ) -> Result<Arc<Qp>, Errno> {
        let request = Request::OpenXrcQp(OpenXrcQp {
            context: self.handle,
            xrcd: xrcd.handle,
            qpn: qpn.map(Qpn::new),
        });
        let (Reply::XrcQp(made), _) = self.session.call(&request)? else {
            return Err(Errno::PROTO);
        };
        Ok(Qp::receiver(&self.session, &made, user))
    }
}

impl Xrcd {
    /// Closes it. EBUSY: something of this process uses it.
    pub fn close(&self) -> Result<(), Errno> {
        self.session
            .destroy(&Request::CloseXrcd { xrcd: self.handle })
    }
}
