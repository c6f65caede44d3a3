//! Messages about shared receive queues and XRC.

use freeflow_types::{DeviceLimits, Qpn};
use serde::{Deserialize, Serialize};

use crate::message::{Handle, Invalid, RingLocation, at_least_one, at_most};

/// What makes a shared receive queue one of XRC.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct XrcSrq {
    /// Domain.
    pub xrcd: Handle,
    /// Where its receives complete.
    pub cq: Handle,
}

/// Creates a shared receive queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CreateSrq {
    /// Protection domain of its receives.
    pub pd: Handle,
    /// Least number of requests.
    pub max_wr: u32,
    /// Elements of a request.
    pub max_sge: u32,
    /// If it is one of XRC.
    pub xrc: Option<XrcSrq>,
}

/// Modifies a shared receive queue: all of it, or nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModifySrq {
    /// The queue.
    pub srq: Handle,
    /// Least number of requests. The library posts nothing until it is answered.
    pub max_wr: Option<u32>,
    /// Requests left below which the limit event comes, once; 0 disarms it.
    pub limit: Option<u32>,
}

/// Answer to [`CreateSrq`], and to a [`ModifySrq`] that changes the size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SrqCreated {
    /// The queue.
    pub srq: Handle,
    /// Its number, if it is one of XRC.
    pub number: Option<u32>,
    /// Its slot in the session's dirty map.
    pub slot: u32,
    /// Requests it holds, a power of two.
    pub max_wr: u32,
    /// Elements of a request.
    pub max_sge: u32,
    /// Its ring.
    pub ring: RingLocation,
}

/// Attributes of a shared receive queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SrqQueried {
    /// Requests it holds.
    pub max_wr: u32,
    /// Elements of a request.
    pub max_sge: u32,
    /// The limit, 0 if disarmed.
    pub limit: u32,
}

/// A file, by the numbers that `fstat` gives. Taken at the session's word: a domain is shared by
/// processes of one user in one endpoint alone, who may reach each other's memory anyway.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct FileId {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
}

/// Opens an XRC domain (`ibv_open_xrcd(3)`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpenXrcd {
    /// Context.
    pub context: Handle,
    /// The file that names it, or none: then it is private.
    pub file: Option<FileId>,
    /// Make it if it does not exist; else EAGAIN.
    pub create: bool,
    /// EINVAL if it exists.
    pub exclusive: bool,
}

/// Creates or opens an XRC receive queue pair (`ibv_create_qp_ex(3)`, `ibv_open_qp(3)`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpenXrcQp {
    /// Context.
    pub context: Handle,
    /// Domain.
    pub xrcd: Handle,
    /// Number of the one to open; none makes a new one.
    pub qpn: Option<Qpn>,
}

/// Answer to [`OpenXrcQp`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct XrcQpOpened {
    /// This opening of it; requests and events name it by that.
    pub open: Handle,
    /// Its number.
    pub qpn: Qpn,
}

impl CreateSrq {
    pub(crate) fn validate(&self, limits: &DeviceLimits) -> Result<(), Invalid> {
        size(self.max_wr, limits)?;
        at_most("max_sge", self.max_sge.into(), limits.max_sge.into())
    }
}

impl ModifySrq {
    pub(crate) fn validate(&self, limits: &DeviceLimits) -> Result<(), Invalid> {
        if let Some(max_wr) = self.max_wr {
            size(max_wr, limits)?;
        }
        let limit = self.limit.unwrap_or(0);
        at_most("srq_limit", limit.into(), limits.max_srq_wr.into())
    }
}

fn size(max_wr: u32, limits: &DeviceLimits) -> Result<(), Invalid> {
    at_least_one("max_wr", max_wr.into())?;
    at_most("max_wr", max_wr.into(), limits.max_srq_wr.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Request;

    #[test]
    fn sizes_are_bounded() {
        let limits = DeviceLimits::default();
        let create = |max_wr, max_sge| {
            let (pd, xrc) = (Handle(1), None);
            let request = CreateSrq {
                pd,
                max_wr,
                max_sge,
                xrc,
            };
            Request::CreateSrq(request).validate(&limits).is_ok()
        };
        assert!(create(1, 0) && create(limits.max_srq_wr, limits.max_sge));
        assert!(!create(0, 1) && !create(limits.max_srq_wr + 1, 1));
        assert!(!create(1, limits.max_sge + 1));
        let modify = |max_wr, limit| {
            let srq = Handle(1);
            let request = ModifySrq { srq, max_wr, limit };
            Request::ModifySrq(request).validate(&limits).is_ok()
        };
        assert!(modify(None, Some(limits.max_srq_wr)) && modify(Some(1), None));
        assert!(!modify(Some(0), None) && !modify(None, Some(u32::MAX)));
    }
}
