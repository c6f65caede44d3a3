//! Messages that find the queue pair of a service of datagrams.

use super::CmError;
use super::connection::{join24, split24};
use crate::bytes::{Reader, Writer};

/// Service id resolution request (IBTA volume 1, 12.11.1).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SidrReq {
    /// The sender's name for the request.
    pub request_id: u32,
    /// Partition.
    pub pkey: u16,
    /// Whom it wants.
    pub service_id: u64,
    /// The application's, after what the IP service has for itself.
    pub private: [u8; 216],
}

impl SidrReq {
    pub(super) fn read(r: &mut Reader<'_>) -> Self {
        let (request_id, pkey) = (r.u32_or_0(), r.u16_or_0());
        r.skip(2);
        SidrReq {
            request_id,
            pkey,
            service_id: r.u64_or_0(),
            private: r.array(),
        }
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u32(self.request_id);
        w.u16(self.pkey);
        w.u16(0);
        w.u64(self.service_id);
        w.put(&self.private);
        Ok(())
    }
}

/// Service id resolution response (IBTA volume 1, 12.11.2).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SidrRep {
    /// Of the request.
    pub request_id: u32,
    /// [`SidrRep::VALID`], or why there is no queue pair.
    pub status: u8,
    /// Bytes of `info` that count.
    pub info_len: u8,
    /// The queue pair, 24 bits.
    pub qpn: u32,
    /// Of the request.
    pub service_id: u64,
    /// Q_Key of the queue pair.
    pub qkey: u32,
    /// More about the status.
    pub info: [u8; 72],
    /// The application's.
    pub private: [u8; 136],
}

impl SidrRep {
    /// Here is the queue pair.
    pub const VALID: u8 = 0;
    /// Nobody listens there.
    pub const UNSUPPORTED: u8 = 1;
    /// The application does not want it.
    pub const REJECTED: u8 = 2;
    /// No queue pair can be had.
    pub const NO_QP: u8 = 3;
    /// Another address has it.
    pub const REDIRECT: u8 = 4;
    /// The request is not one that is supported.
    pub const UNSUPPORTED_VERSION: u8 = 5;

    /// An answer to a request that has no queue pair.
    pub fn without_qp(request: &SidrReq, status: u8) -> Self {
        SidrRep {
            request_id: request.request_id,
            status,
            info_len: 0,
            qpn: 0,
            service_id: request.service_id,
            qkey: 0,
            info: [0; 72],
            private: [0; 136],
        }
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Self {
        let request_id = r.u32_or_0();
        let [status, info_len] = r.array();
        r.skip(2);
        SidrRep {
            request_id,
            status,
            info_len,
            qpn: split24(r.u32_or_0()).0,
            service_id: r.u64_or_0(),
            qkey: r.u32_or_0(),
            info: r.array(),
            private: r.array(),
        }
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u32(self.request_id);
        w.u8(self.status);
        w.u8(self.info_len);
        w.u16(0);
        w.u32(join24("QPN", self.qpn, 0)?);
        w.u64(self.service_id);
        w.u32(self.qkey);
        w.put(&self.info);
        w.put(&self.private);
        Ok(())
    }
}
