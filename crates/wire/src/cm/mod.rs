//! Datagrams of the communication manager (IBTA volume 1, chapter 12), which queue pairs 1 of two
//! hosts exchange to set up connections, and what the RDMA IP CM service puts in their private
//! data (annex A11).
//!
//! A datagram is [`MAD_BYTES`] of payload to [`QPN`] with [`QKEY`]. Messages that change a
//! connection's path (LAP, APR) are not spoken: parsing them is [`CmError::AlternatePath`].

mod connection;
mod ip;
mod sidr;

pub use connection::{
    Drep, Dreq, ExtendedTransport, Mra, Path, Rej, Rejected, Rep, Req, Rtu, TransportType,
};
pub use ip::{IpCm, IpCmError, PortSpace, port_of, service_id};
pub use sidr::{SidrRep, SidrReq};

use crate::bytes::{Reader, Writer};

/// The queue pair of each host that receives these datagrams (general services).
pub const QPN: u32 = 1;

/// Its Q_Key (IBTA volume 1, 3.5.3).
pub const QKEY: u32 = 0x8001_0000;

/// Bytes of a datagram.
pub const MAD_BYTES: usize = 256;

/// Bytes of the header that all management datagrams have (IBTA volume 1, 13.4.3).
const HEADER_BYTES: usize = 24;
const BODY_BYTES: usize = MAD_BYTES - HEADER_BYTES;

/// Base version, class (communication management), class version, method (send).
const FIRST_BYTES: [u8; 4] = [1, 7, 2, 3];

/// Of fields of 24 bits.
const MASK24: u32 = 0x00FF_FFFF;

/// A datagram.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mad {
    /// Chosen by who begins an exchange; the answers have the same.
    pub transaction: u64,
    /// The attribute modifier: which of a vendor's enhancements the sender offers (IBTA volume 1,
    /// 12.6.5); of most messages, 0.
    pub modifier: u32,
    /// What it says.
    pub message: Message,
}

/// The messages of the communication manager.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// Request for communication.
    Req(Req),
    /// Message receipt acknowledgement: an answer takes longer.
    Mra(Mra),
    /// Reject.
    Rej(Rej),
    /// Reply to a request.
    Rep(Rep),
    /// Ready to use.
    Rtu(Rtu),
    /// Disconnection request.
    Dreq(Dreq),
    /// Reply to a disconnection request.
    Drep(Drep),
    /// Service id resolution request.
    SidrReq(SidrReq),
    /// Service id resolution response.
    SidrRep(SidrRep),
}

/// Attribute ids (IBTA volume 1, table 99).
mod attribute {
    pub(super) const REQ: u16 = 0x10;
    pub(super) const MRA: u16 = 0x11;
    pub(super) const REJ: u16 = 0x12;
    pub(super) const REP: u16 = 0x13;
    pub(super) const RTU: u16 = 0x14;
    pub(super) const DREQ: u16 = 0x15;
    pub(super) const DREP: u16 = 0x16;
    pub(super) const SIDR_REQ: u16 = 0x17;
    pub(super) const SIDR_REP: u16 = 0x18;
    pub(super) const LAP: u16 = 0x19;
    pub(super) const APR: u16 = 0x1A;
}

/// Why bytes are not a message of the communication manager, or a message cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum CmError {
    /// Not 256 bytes.
    #[error("a management datagram of {0} bytes, not 256")]
    Length(usize),
    /// Of another management class, version or method.
    #[error("base version, class, class version and method are {0:?}, not [1, 7, 2, 3]")]
    Class([u8; 4]),
    /// An attribute that the communication manager does not have.
    #[error("attribute {0:#06x} is not of the communication manager")]
    Attribute(u16),
    /// A message about alternate paths (LAP, APR), which RoCE does not have.
    #[error("messages about alternate paths are not supported")]
    AlternatePath,
    /// A field has a value that the standard does not name, or more bits than there is room for.
    #[error("{field} has the value {value:#x}")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u32,
    },
}

impl Mad {
    /// Reads a datagram.
    pub fn parse(bytes: &[u8]) -> Result<Mad, CmError> {
        let bytes: &[u8; MAD_BYTES] = bytes.try_into().map_err(|_| CmError::Length(bytes.len()))?;
        let r = &mut Reader::new(bytes);
        let first = r.array::<4>();
        if first != FIRST_BYTES {
            return Err(CmError::Class(first));
        }
        // Status and what classes have for themselves.
        r.skip(4);
        let transaction = r.u64_or_0();
        let attribute = r.u16_or_0();
        r.skip(2);
        let modifier = r.u32_or_0();
        let message = match attribute {
            attribute::REQ => Message::Req(Req::read(r)?),
            attribute::MRA => Message::Mra(Mra::read(r)?),
            attribute::REJ => Message::Rej(Rej::read(r)?),
            attribute::REP => Message::Rep(Rep::read(r)),
            attribute::RTU => Message::Rtu(Rtu::read(r)),
            attribute::DREQ => Message::Dreq(Dreq::read(r)),
            attribute::DREP => Message::Drep(Drep::read(r)),
            attribute::SIDR_REQ => Message::SidrReq(SidrReq::read(r)),
            attribute::SIDR_REP => Message::SidrRep(SidrRep::read(r)),
            attribute::LAP | attribute::APR => return Err(CmError::AlternatePath),
            other => return Err(CmError::Attribute(other)),
        };
        Ok(Mad {
            transaction,
            modifier,
            message,
        })
    }

    /// Writes the datagram.
    pub fn emit(&self) -> Result<[u8; MAD_BYTES], CmError> {
        let mut bytes = [0; MAD_BYTES];
        let (header, body) = bytes.split_at_mut(HEADER_BYTES);
        let w = &mut Writer::new(body);
        let attribute = match &self.message {
            Message::Req(m) => m.write(w).map(|()| attribute::REQ),
            Message::Mra(m) => m.write(w).map(|()| attribute::MRA),
            Message::Rej(m) => m.write(w).map(|()| attribute::REJ),
            Message::Rep(m) => m.write(w).map(|()| attribute::REP),
            Message::Rtu(m) => m.write(w).map(|()| attribute::RTU),
            Message::Dreq(m) => m.write(w).map(|()| attribute::DREQ),
            Message::Drep(m) => m.write(w).map(|()| attribute::DREP),
            Message::SidrReq(m) => m.write(w).map(|()| attribute::SIDR_REQ),
            Message::SidrRep(m) => m.write(w).map(|()| attribute::SIDR_REP),
        }?;
        debug_assert_eq!(w.written(), BODY_BYTES);
        let w = &mut Writer::new(header);
        w.put(&FIRST_BYTES);
        w.u32(0);
        w.u64(self.transaction);
        w.u16(attribute);
        w.u16(0);
        w.u32(self.modifier);
        Ok(bytes)
    }
}

/// A field that shares its word with others: `value` if it fits in `bits`.
fn fits(field: &'static str, value: impl Into<u32>, bits: u32) -> Result<u32, CmError> {
    let value = value.into();
    if value >> bits == 0 {
        Ok(value)
    } else {
        Err(CmError::Field { field, value })
    }
}
