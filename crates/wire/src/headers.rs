//! The transport headers of one packet.

use core::ops::Range;

use freeflow_types::{FlushSpec, Psn};

use crate::bytes::{Reader, Writer};
use crate::{BthOpcode, DEFAULT_PKEY};

/// Of fields of 24 bits.
const MASK24: u32 = 0x00FF_FFFF;

/// Bit of the base header's third word, of those that the standard reserves.
const HEADER_CRC: u32 = 30;

/// Base transport header, 12 bytes (IBTA volume 1, 9.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bth {
    /// What the packet is.
    pub opcode: BthOpcode,
    /// The responder is to raise a solicited event.
    pub solicited: bool,
    /// Migration state: true when migrated, which is what connections without an alternate path
    /// have.
    pub migrated: bool,
    /// Bytes from 0 to 3 that follow the payload, so that it is a multiple of 4.
    pub pad: u8,
    /// Partition.
    pub pkey: u16,
    /// Forward explicit congestion notification.
    pub fecn: bool,
    /// Backward explicit congestion notification.
    pub becn: bool,
    /// Destination queue pair, 24 bits.
    pub dest_qp: u32,
    /// The responder is to acknowledge.
    pub ack_req: bool,
    /// The packet's CRC covers its headers alone, see the module `icrc`: of FreeFlow routers that
    /// agreed on it. In the standard the bit is reserved, and 0.
    pub header_crc: bool,
    /// Packet sequence number.
    pub psn: Psn,
}

impl Bth {
    /// A header of the default partition, without flags and pad.
    pub fn new(opcode: BthOpcode, dest_qp: u32, psn: Psn) -> Self {
        Bth {
            opcode,
            solicited: false,
            migrated: true,
            pad: 0,
            pkey: DEFAULT_PKEY,
            fecn: false,
            becn: false,
            dest_qp,
            ack_req: false,
            header_crc: false,
            psn,
        }
    }
}

/// RDMA extended transport header, 16 bytes (IBTA volume 1, 9.3.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reth {
    /// Address at the responder.
    pub va: u64,
    /// Key of the responder's memory.
    pub rkey: u32,
    /// Bytes of the whole message.
    pub len: u32,
}

/// Atomic extended transport header, 28 bytes (IBTA volume 1, 9.3.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AtomicEth {
    /// Address at the responder, a multiple of 8.
    pub va: u64,
    /// Key of the responder's memory.
    pub rkey: u32,
    /// What to swap in, or to add.
    pub swap_add: u64,
    /// What to compare with.
    pub compare: u64,
}

/// ACK extended transport header, 4 bytes (IBTA volume 1, 9.3.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Aeth {
    /// What is answered.
    pub syndrome: Syndrome,
    /// Message sequence number, 24 bits: how many messages the responder has completed.
    pub msn: u32,
}

/// What an acknowledgement says (IBTA volume 1, table 44).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Syndrome {
    /// Done.
    Ack {
        /// Code of the receives that the responder has left, 5 bits (table 46); 0x1f: it does not
        /// count.
        credits: u8,
    },
    /// The responder has no receive yet.
    RnrNak {
        /// Code of the time to wait, 5 bits (table 45).
        timer: u8,
    },
    /// Refused.
    Nak(NakCode),
    /// A value that the standard reserves: the whole byte.
    Reserved(u8),
}

/// Why a request is refused (IBTA volume 1, table 47).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NakCode {
    /// Packets are missing.
    PsnSequence,
    /// The request is not one that the responder may be sent.
    InvalidRequest,
    /// The memory may not be accessed so.
    RemoteAccess,
    /// The responder failed.
    RemoteOperation,
    /// Of reliable datagrams only.
    InvalidRdRequest,
}

impl Syndrome {
    /// Acknowledges, and counts no credits.
    pub const ACK: Syndrome = Syndrome::Ack { credits: 0x1F };

    /// From its byte.
    pub const fn from_byte(byte: u8) -> Self {
        let value = byte & 0x1F;
        match (byte >> 5, value) {
            (0, credits) => Syndrome::Ack { credits },
            (1, timer) => Syndrome::RnrNak { timer },
            (3, 0) => Syndrome::Nak(NakCode::PsnSequence),
            (3, 1) => Syndrome::Nak(NakCode::InvalidRequest),
            (3, 2) => Syndrome::Nak(NakCode::RemoteAccess),
            (3, 3) => Syndrome::Nak(NakCode::RemoteOperation),
            (3, 4) => Syndrome::Nak(NakCode::InvalidRdRequest),
            _ => Syndrome::Reserved(byte),
        }
    }

    /// Its byte; of codes, the low 5 bits.
    pub const fn byte(self) -> u8 {
        match self {
            Syndrome::Ack { credits } => credits & 0x1F,
            Syndrome::RnrNak { timer } => 0x20 | timer & 0x1F,
            Syndrome::Nak(code) => 0x60 | code as u8,
            Syndrome::Reserved(byte) => byte,
        }
    }
}

/// Datagram extended transport header, 8 bytes (IBTA volume 1, 9.3.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Deth {
    /// Key that must be the receiving queue pair's.
    pub qkey: u32,
    /// The sender, 24 bits.
    pub src_qp: u32,
}

/// FLUSH extended transport header, 4 bytes (IBTA volume 1, annex A19): placement types in bits
/// 3-0, selectivity level in bits 5-4.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Feth(pub u32);

impl Feth {
    /// What to flush; `None` if it is nothing that the standard names.
    pub fn spec(self) -> Option<FlushSpec> {
        FlushSpec::new(self.0 & 0xF, self.0 >> 4 & 3)
    }
}

impl From<FlushSpec> for Feth {
    fn from(spec: FlushSpec) -> Self {
        let types = spec.types.bits() >> 8 & 3;
        Feth(types | u32::from(spec.whole_region) << 4)
    }
}

/// All transport headers of one packet; which of them are present follows from the opcode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Headers {
    /// Of every packet.
    pub bth: Bth,
    /// XRC SRQ at the responder, 24 bits: of requests of XRC.
    pub xrc_srq: Option<u32>,
    /// Of datagrams.
    pub deth: Option<Deth>,
    /// Of FLUSH.
    pub feth: Option<Feth>,
    /// Of READ requests, FLUSH, ATOMIC WRITE and the first packet of a WRITE.
    pub reth: Option<Reth>,
    /// Of compare and swap and fetch and add.
    pub atomic: Option<AtomicEth>,
    /// Of responses but the middle packets of a READ's.
    pub aeth: Option<Aeth>,
    /// What the memory held before the atomic operation.
    pub atomic_ack: Option<u64>,
    /// Immediate data, as the applications see it.
    pub imm: Option<[u8; 4]>,
    /// Key to invalidate.
    pub ieth: Option<u32>,
}

/// Why bytes are not a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum ParseError {
    /// Shorter than its headers.
    #[error("the packet is shorter than its headers")]
    Truncated,
    /// A transport header version other than 0.
    #[error("transport header version {0}, not 0")]
    Version(u8),
    /// An opcode that no packet has.
    #[error("unknown opcode {0:#04x}")]
    Opcode(u8),
    /// The data with its pad is no multiple of 4, or is shorter than the pad.
    #[error("{data} bytes of data of which {pad} are pad")]
    Pad {
        /// Bytes after the headers.
        data: usize,
        /// How many of them are pad.
        pad: u8,
    },
    /// Data of a length that such a packet cannot have.
    #[error("{opcode} with {data} bytes of data")]
    Data {
        /// What the packet is.
        opcode: BthOpcode,
        /// Bytes of data, without pad.
        data: usize,
    },
}

/// Why headers cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum EmitError {
    /// The buffer is too small.
    #[error("the headers take {need} bytes, and there is room for {room}")]
    Room {
        /// Bytes of the headers.
        need: usize,
        /// Bytes of the buffer.
        room: usize,
    },
    /// An opcode that no packet has.
    #[error("unknown opcode {0:#04x}")]
    Opcode(u8),
    /// Headers that such a packet does not have, or lack of one that it has.
    #[error("the headers are not those of {0}")]
    Mismatch(BthOpcode),
    /// A field that has more bits than the header has for it.
    #[error("{field} {value:#x} does not fit in its header")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u32,
    },
}

impl Headers {
    /// A packet with a base header only: the caller adds the other headers.
    pub fn new(bth: Bth) -> Self {
        Headers {
            bth,
            xrc_srq: None,
            deth: None,
            feth: None,
            reth: None,
            atomic: None,
            aeth: None,
            atomic_ack: None,
            imm: None,
            ieth: None,
        }
    }

    /// Sets the pad that a payload of `len` bytes needs.
    #[must_use]
    pub fn with_payload(mut self, len: usize) -> Self {
        self.bth.pad = (len.wrapping_neg() & 3) as u8;
        self
    }

    /// Bytes that [`emit`](Self::emit) writes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "every packet has a base header"
    )]
    pub fn len(&self) -> usize {
        self.bth.opcode.header_len()
    }

    /// Reads the headers of a packet without its ICRC, and says where the payload is, without pad.
    pub fn parse(packet: &[u8]) -> Result<(Headers, Range<usize>), ParseError> {
        let mut r = Reader::new(packet);
        let word = r.take::<4>().ok_or(ParseError::Truncated)?;
        let [opcode, flags, pkey @ ..] = word;
        let opcode = BthOpcode(opcode);
        if flags & 0xF != 0 {
            return Err(ParseError::Version(flags & 0xF));
        }
        if !opcode.is_known() {
            return Err(ParseError::Opcode(opcode.0));
        }
        let headers = Self::read(opcode, flags, u16::from_be_bytes(pkey), &mut r)
            .ok_or(ParseError::Truncated)?;
        let pad = headers.bth.pad;
        let left = r.left();
        let data = left
            .checked_sub(pad.into())
            .filter(|_| left.is_multiple_of(4));
        let data = data.ok_or(ParseError::Pad { data: left, pad })?;
        let fits = match opcode {
            BthOpcode::RC_ATOMIC_WRITE | BthOpcode::XRC_ATOMIC_WRITE => data == 8,
            _ => data == 0 || opcode.has_payload(),
        };
        if !fits {
            return Err(ParseError::Data { opcode, data });
        }
        let start = packet.len() - left;
        Ok((headers, start..start + data))
    }

    fn read(opcode: BthOpcode, flags: u8, pkey: u16, r: &mut Reader<'_>) -> Option<Headers> {
        let dest = r.u32()?;
        let psn = r.u32()?;
        let mut h = Headers::new(Bth {
            opcode,
            solicited: flags & 0x80 != 0,
            migrated: flags & 0x40 != 0,
            pad: flags >> 4 & 3,
            pkey,
            fecn: dest & 1 << 31 != 0,
            becn: dest & 1 << 30 != 0,
            dest_qp: dest & MASK24,
            ack_req: psn & 1 << 31 != 0,
            header_crc: psn & 1 << HEADER_CRC != 0,
            psn: Psn::new(psn),
        });
        if opcode.has_xrc_srq() {
            h.xrc_srq = Some(r.u32()? & MASK24);
        }
        if opcode.has_deth() {
            h.deth = Some(Deth {
                qkey: r.u32()?,
                src_qp: r.u32()? & MASK24,
            });
        }
        if opcode.has_feth() {
            h.feth = Some(Feth(r.u32()? & 0x3F));
        }
        if opcode.has_reth() {
            h.reth = Some(Reth {
                va: r.u64()?,
                rkey: r.u32()?,
                len: r.u32()?,
            });
        }
        if opcode.has_atomic() {
            h.atomic = Some(AtomicEth {
                va: r.u64()?,
                rkey: r.u32()?,
                swap_add: r.u64()?,
                compare: r.u64()?,
            });
        }
        if opcode.has_aeth() {
            let word = r.u32()?;
            h.aeth = Some(Aeth {
                syndrome: Syndrome::from_byte((word >> 24) as u8),
                msn: word & MASK24,
            });
        }
        if opcode.has_atomic_ack() {
            h.atomic_ack = Some(r.u64()?);
        }
        if opcode.has_imm() {
            h.imm = Some(r.take()?);
        }
        if opcode.has_ieth() {
            h.ieth = Some(r.u32()?);
        }
        if opcode == BthOpcode::CNP {
            r.take::<16>()?;
        }
        Some(h)
    }

    /// Whether the headers are those of the opcode, and every field fits.
    fn check(&self) -> Result<(), EmitError> {
        let opcode = self.bth.opcode;
        if !opcode.is_known() {
            return Err(EmitError::Opcode(opcode.0));
        }
        let matches = self.xrc_srq.is_some() == opcode.has_xrc_srq()
            && self.deth.is_some() == opcode.has_deth()
            && self.feth.is_some() == opcode.has_feth()
            && self.reth.is_some() == opcode.has_reth()
            && self.atomic.is_some() == opcode.has_atomic()
            && self.aeth.is_some() == opcode.has_aeth()
            && self.atomic_ack.is_some() == opcode.has_atomic_ack()
            && self.imm.is_some() == opcode.has_imm()
            && self.ieth.is_some() == opcode.has_ieth();
        if !matches {
            return Err(EmitError::Mismatch(opcode));
        }
        for (field, value, max) in [
            ("pad", self.bth.pad.into(), 3),
            ("destination QP", self.bth.dest_qp, MASK24),
            ("XRC SRQ", self.xrc_srq.unwrap_or(0), MASK24),
            ("source QP", self.deth.map_or(0, |d| d.src_qp), MASK24),
            ("MSN", self.aeth.map_or(0, |a| a.msn), MASK24),
            ("FETH", self.feth.map_or(0, |f| f.0), 0x3F),
        ] {
            if value > max {
                return Err(EmitError::Field { field, value });
            }
        }
        Ok(())
    }

    /// Writes the headers at the beginning of `out`; returns their length. The payload follows,
    /// then the pad that the base header tells, of zeroes, then the ICRC.
    pub fn emit(&self, out: &mut [u8]) -> Result<usize, EmitError> {
        self.check()?;
        let need = self.len();
        let room = out.len();
        let out = out.get_mut(..need).ok_or(EmitError::Room { need, room })?;
        let mut w = Writer::new(out);
        let bth = &self.bth;
        let bit = |flag: bool, at: u32| u32::from(flag) << at;
        w.u8(bth.opcode.0);
        w.u8((bit(bth.solicited, 7) | bit(bth.migrated, 6)) as u8 | bth.pad << 4);
        w.u16(bth.pkey);
        w.u32(bit(bth.fecn, 31) | bit(bth.becn, 30) | bth.dest_qp);
        w.u32(bit(bth.ack_req, 31) | bit(bth.header_crc, HEADER_CRC) | bth.psn.get());
        if let Some(srq) = self.xrc_srq {
            w.u32(srq);
        }
        if let Some(deth) = self.deth {
            w.u32(deth.qkey);
            w.u32(deth.src_qp);
        }
        if let Some(feth) = self.feth {
            w.u32(feth.0);
        }
        if let Some(reth) = self.reth {
            w.u64(reth.va);
            w.u32(reth.rkey);
            w.u32(reth.len);
        }
        if let Some(atomic) = self.atomic {
            w.u64(atomic.va);
            w.u32(atomic.rkey);
            w.u64(atomic.swap_add);
            w.u64(atomic.compare);
        }
        if let Some(aeth) = self.aeth {
            w.u32(u32::from(aeth.syndrome.byte()) << 24 | aeth.msn);
        }
        if let Some(value) = self.atomic_ack {
            w.u64(value);
        }
        if let Some(imm) = self.imm {
            w.put(&imm);
        }
        if let Some(key) = self.ieth {
            w.u32(key);
        }
        if bth.opcode == BthOpcode::CNP {
            w.put(&[0; 16]);
        }
        Ok(need)
    }
}
