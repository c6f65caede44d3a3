//! Opcodes of the base transport header, and what follows from each.

use core::fmt;

/// Opcode of the base transport header: transport service in bits 7-5, operation in bits 4-0
/// (IBTA volume 1, 9.2.1, table 38).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct BthOpcode(pub u8);

/// Transport service of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Service {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
    /// Reliable datagram, which nobody offers: no packet of it is known here.
    Rd,
    /// Unreliable datagram.
    Ud,
    /// Congestion notification (annex A17.9).
    Cnp,
    /// Extended reliable connection (annex A14).
    Xrc,
    /// Left to manufacturers: nothing follows the base header but what they say.
    Manufacturer,
    /// Reserved: the last service code.
    Reserved,
}

/// What an operation is and which headers its packets have.
#[derive(Clone, Copy)]
struct Facts(u32);

impl Facts {
    const NONE: Facts = Facts(0);
    const REQUEST: u32 = 1;
    const RESPONSE: u32 = 1 << 1;
    const STARTS: u32 = 1 << 2;
    const ENDS: u32 = 1 << 3;
    const RETH: u32 = 1 << 4;
    const ATOMIC: u32 = 1 << 5;
    const AETH: u32 = 1 << 6;
    const ATOMIC_ACK: u32 = 1 << 7;
    const IMM: u32 = 1 << 8;
    const IETH: u32 = 1 << 9;
    const FETH: u32 = 1 << 10;
    /// Data may follow the headers.
    const DATA: u32 = 1 << 11;
    /// What the message does: one of these.
    const SEND: u32 = 1 << 12;
    const WRITE: u32 = 1 << 13;
    const READ_RESPONSE: u32 = 1 << 14;
    /// Services that have the operation.
    const UC: u32 = 1 << 15;
    const UD: u32 = 1 << 16;
    /// Sixteen reserved bytes after the base header.
    const CNP: u32 = 1 << 17;
    /// XRCETH.
    const XRC_SRQ: u32 = 1 << 18;
    /// DETH.
    const DETH: u32 = 1 << 19;
    const KNOWN: u32 = 1 << 20;

    const FIRST: u32 = Self::STARTS;
    const MIDDLE: u32 = 0;
    const LAST: u32 = Self::ENDS;
    const ONLY: u32 = Self::STARTS | Self::ENDS;

    const fn has(self, fact: u32) -> bool {
        self.0 & fact != 0
    }

    const fn send(part: u32) -> Facts {
        let ud = if part == Self::ONLY { Self::UD } else { 0 };
        Facts(Self::REQUEST | Self::SEND | Self::DATA | Self::UC | ud | part)
    }

    const fn write(part: u32) -> Facts {
        let reth = if part & Self::STARTS != 0 {
            Self::RETH
        } else {
            0
        };
        Facts(Self::REQUEST | Self::WRITE | Self::DATA | Self::UC | reth | part)
    }

    const fn read_response(part: u32) -> Facts {
        // Only the middle ones have no AETH.
        let aeth = if part == Self::MIDDLE { 0 } else { Self::AETH };
        Facts(Self::RESPONSE | Self::READ_RESPONSE | Self::DATA | aeth | part)
    }

    const fn request(headers: u32) -> Facts {
        Facts(Self::REQUEST | Self::ONLY | headers)
    }

    const fn response(headers: u32) -> Facts {
        Facts(Self::RESPONSE | Self::ONLY | Self::AETH | headers)
    }

    const fn with(self, headers: u32) -> Facts {
        Facts(self.0 | headers)
    }

    const fn without(self, fact: u32) -> Facts {
        Facts(self.0 & !fact)
    }
}

/// By operation, as the reliable connection has it: the other services have parts of this.
const OPERATIONS: [Facts; 32] = {
    let mut t = [Facts::NONE; 32];
    t[0x00] = Facts::send(Facts::FIRST);
    t[0x01] = Facts::send(Facts::MIDDLE);
    t[0x02] = Facts::send(Facts::LAST);
    t[0x03] = Facts::send(Facts::LAST).with(Facts::IMM);
    t[0x04] = Facts::send(Facts::ONLY);
    t[0x05] = Facts::send(Facts::ONLY).with(Facts::IMM);
    t[0x06] = Facts::write(Facts::FIRST);
    t[0x07] = Facts::write(Facts::MIDDLE);
    t[0x08] = Facts::write(Facts::LAST);
    t[0x09] = Facts::write(Facts::LAST).with(Facts::IMM);
    t[0x0A] = Facts::write(Facts::ONLY);
    t[0x0B] = Facts::write(Facts::ONLY).with(Facts::IMM);
    t[0x0C] = Facts::request(Facts::RETH);
    t[0x0D] = Facts::read_response(Facts::FIRST);
    t[0x0E] = Facts::read_response(Facts::MIDDLE);
    t[0x0F] = Facts::read_response(Facts::LAST);
    t[0x10] = Facts::read_response(Facts::ONLY);
    t[0x11] = Facts::response(0);
    t[0x12] = Facts::response(Facts::ATOMIC_ACK);
    t[0x13] = Facts::request(Facts::ATOMIC);
    t[0x14] = Facts::request(Facts::ATOMIC);
    t[0x16] = Facts::send(Facts::LAST)
        .with(Facts::IETH)
        .without(Facts::UC);
    t[0x17] = Facts::send(Facts::ONLY)
        .with(Facts::IETH)
        .without(Facts::UC | Facts::UD);
    t[0x1C] = Facts::request(Facts::FETH | Facts::RETH);
    t[0x1D] = Facts::request(Facts::RETH | Facts::DATA);
    t
};

/// By opcode byte.
const FACTS: [Facts; 256] = {
    let mut t = [Facts::NONE; 256];
    let mut code = 0;
    while code < 256 {
        let op = OPERATIONS[code & 0x1F];
        let exists = op.0 != 0;
        t[code] = match code >> 5 {
            0 if exists => op.with(Facts::KNOWN),
            1 if op.has(Facts::UC) => op.with(Facts::KNOWN),
            3 if op.has(Facts::UD) => op.with(Facts::KNOWN | Facts::DETH),
            5 if op.has(Facts::REQUEST) => op.with(Facts::KNOWN | Facts::XRC_SRQ),
            5 if exists => op.with(Facts::KNOWN),
            6 => Facts(Facts::KNOWN | Facts::DATA | Facts::ONLY),
            _ => Facts::NONE,
        };
        code += 1;
    }
    t[0x81] = Facts(Facts::KNOWN | Facts::CNP | Facts::ONLY);
    t
};

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $value:expr,)*) => {
        impl BthOpcode {
            $($(#[$doc])* pub const $name: BthOpcode = BthOpcode($value);)*
        }
        const NAMES: &[(BthOpcode, &str)] = &[$((BthOpcode::$name, stringify!($name))),*];
    };
}

opcodes! {
    /// First packet of a SEND of several.
    RC_SEND_FIRST = 0x00,
    /// Neither first nor last packet of a SEND.
    RC_SEND_MIDDLE = 0x01,
    /// Last packet of a SEND.
    RC_SEND_LAST = 0x02,
    /// Last packet of a SEND with immediate.
    RC_SEND_LAST_IMM = 0x03,
    /// SEND of one packet.
    RC_SEND_ONLY = 0x04,
    /// SEND of one packet with immediate.
    RC_SEND_ONLY_IMM = 0x05,
    /// First packet of an RDMA WRITE of several.
    RC_WRITE_FIRST = 0x06,
    /// Neither first nor last packet of an RDMA WRITE.
    RC_WRITE_MIDDLE = 0x07,
    /// Last packet of an RDMA WRITE.
    RC_WRITE_LAST = 0x08,
    /// Last packet of an RDMA WRITE with immediate.
    RC_WRITE_LAST_IMM = 0x09,
    /// RDMA WRITE of one packet.
    RC_WRITE_ONLY = 0x0A,
    /// RDMA WRITE of one packet with immediate.
    RC_WRITE_ONLY_IMM = 0x0B,
    /// RDMA READ request.
    RC_READ_REQUEST = 0x0C,
    /// First packet of an RDMA READ response of several.
    RC_READ_RESPONSE_FIRST = 0x0D,
    /// Neither first nor last packet of an RDMA READ response.
    RC_READ_RESPONSE_MIDDLE = 0x0E,
    /// Last packet of an RDMA READ response.
    RC_READ_RESPONSE_LAST = 0x0F,
    /// RDMA READ response of one packet.
    RC_READ_RESPONSE_ONLY = 0x10,
    /// Acknowledge, positive or negative.
    RC_ACK = 0x11,
    /// Result of an atomic operation.
    RC_ATOMIC_ACK = 0x12,
    /// Compare and swap.
    RC_COMPARE_SWAP = 0x13,
    /// Fetch and add.
    RC_FETCH_ADD = 0x14,
    /// Last packet of a SEND that invalidates a key.
    RC_SEND_LAST_INV = 0x16,
    /// SEND of one packet that invalidates a key.
    RC_SEND_ONLY_INV = 0x17,
    /// FLUSH (annex A19).
    RC_FLUSH = 0x1C,
    /// ATOMIC WRITE of 8 bytes (annex A19).
    RC_ATOMIC_WRITE = 0x1D,

    /// As the RC one.
    UC_SEND_FIRST = 0x20,
    /// As the RC one.
    UC_SEND_MIDDLE = 0x21,
    /// As the RC one.
    UC_SEND_LAST = 0x22,
    /// As the RC one.
    UC_SEND_LAST_IMM = 0x23,
    /// As the RC one.
    UC_SEND_ONLY = 0x24,
    /// As the RC one.
    UC_SEND_ONLY_IMM = 0x25,
    /// As the RC one.
    UC_WRITE_FIRST = 0x26,
    /// As the RC one.
    UC_WRITE_MIDDLE = 0x27,
    /// As the RC one.
    UC_WRITE_LAST = 0x28,
    /// As the RC one.
    UC_WRITE_LAST_IMM = 0x29,
    /// As the RC one.
    UC_WRITE_ONLY = 0x2A,
    /// As the RC one.
    UC_WRITE_ONLY_IMM = 0x2B,

    /// A datagram.
    UD_SEND_ONLY = 0x64,
    /// A datagram with immediate.
    UD_SEND_ONLY_IMM = 0x65,

    /// Congestion notification.
    CNP = 0x81,

    /// As the RC one.
    XRC_SEND_FIRST = 0xA0,
    /// As the RC one.
    XRC_SEND_MIDDLE = 0xA1,
    /// As the RC one.
    XRC_SEND_LAST = 0xA2,
    /// As the RC one.
    XRC_SEND_LAST_IMM = 0xA3,
    /// As the RC one.
    XRC_SEND_ONLY = 0xA4,
    /// As the RC one.
    XRC_SEND_ONLY_IMM = 0xA5,
    /// As the RC one.
    XRC_WRITE_FIRST = 0xA6,
    /// As the RC one.
    XRC_WRITE_MIDDLE = 0xA7,
    /// As the RC one.
    XRC_WRITE_LAST = 0xA8,
    /// As the RC one.
    XRC_WRITE_LAST_IMM = 0xA9,
    /// As the RC one.
    XRC_WRITE_ONLY = 0xAA,
    /// As the RC one.
    XRC_WRITE_ONLY_IMM = 0xAB,
    /// As the RC one.
    XRC_READ_REQUEST = 0xAC,
    /// As the RC one.
    XRC_READ_RESPONSE_FIRST = 0xAD,
    /// As the RC one.
    XRC_READ_RESPONSE_MIDDLE = 0xAE,
    /// As the RC one.
    XRC_READ_RESPONSE_LAST = 0xAF,
    /// As the RC one.
    XRC_READ_RESPONSE_ONLY = 0xB0,
    /// As the RC one.
    XRC_ACK = 0xB1,
    /// As the RC one.
    XRC_ATOMIC_ACK = 0xB2,
    /// As the RC one.
    XRC_COMPARE_SWAP = 0xB3,
    /// As the RC one.
    XRC_FETCH_ADD = 0xB4,
    /// As the RC one.
    XRC_SEND_LAST_INV = 0xB6,
    /// As the RC one.
    XRC_SEND_ONLY_INV = 0xB7,
    /// As the RC one.
    XRC_FLUSH = 0xBC,
    /// As the RC one.
    XRC_ATOMIC_WRITE = 0xBD,
}

impl BthOpcode {
    /// The opcode of operation `op` (bits 4-0, those of the `RC_` constants) in a service.
    #[must_use]
    pub const fn new(service: Service, op: u8) -> Self {
        BthOpcode((service as u8) << 5 | op & 0x1F)
    }

    /// The same operation in another service.
    #[must_use]
    pub const fn with_service(self, service: Service) -> Self {
        Self::new(service, self.op())
    }

    /// Its transport service.
    pub const fn service(self) -> Service {
        match self.0 >> 5 {
            0 => Service::Rc,
            1 => Service::Uc,
            2 => Service::Rd,
            3 => Service::Ud,
            4 => Service::Cnp,
            5 => Service::Xrc,
            6 => Service::Manufacturer,
            _ => Service::Reserved,
        }
    }

    /// Its operation: bits 4-0, which mean the same in all services that have the operation.
    pub const fn op(self) -> u8 {
        self.0 & 0x1F
    }

    const fn is(self, fact: u32) -> bool {
        FACTS[self.0 as usize].has(fact)
    }

    /// Whether there is such a packet; of manufacturers' opcodes, all are taken for known.
    pub const fn is_known(self) -> bool {
        self.is(Facts::KNOWN)
    }

    /// From a requester to a responder.
    pub const fn is_request(self) -> bool {
        self.is(Facts::REQUEST)
    }

    /// From a responder to a requester.
    pub const fn is_response(self) -> bool {
        self.is(Facts::RESPONSE)
    }

    /// A packet of a SEND, of any kind.
    pub const fn is_send(self) -> bool {
        self.is(Facts::SEND)
    }

    /// A packet of an RDMA WRITE.
    pub const fn is_write(self) -> bool {
        self.is(Facts::WRITE)
    }

    /// A packet of the response to an RDMA READ.
    pub const fn is_read_response(self) -> bool {
        self.is(Facts::READ_RESPONSE)
    }

    /// A request for an atomic operation with a result: compare and swap, fetch and add.
    pub const fn is_atomic(self) -> bool {
        self.is(Facts::ATOMIC)
    }

    /// First or only packet of a message.
    pub const fn starts_message(self) -> bool {
        self.is(Facts::STARTS)
    }

    /// Last or only packet of a message.
    pub const fn ends_message(self) -> bool {
        self.is(Facts::ENDS)
    }

    /// Whether data may follow the headers.
    pub const fn has_payload(self) -> bool {
        self.is(Facts::DATA)
    }

    /// XRC extended transport header: the receiver's SRQ.
    pub const fn has_xrc_srq(self) -> bool {
        self.is(Facts::XRC_SRQ)
    }

    /// Datagram extended transport header.
    pub const fn has_deth(self) -> bool {
        self.is(Facts::DETH)
    }

    /// RDMA extended transport header.
    pub const fn has_reth(self) -> bool {
        self.is(Facts::RETH)
    }

    /// Atomic extended transport header.
    pub const fn has_atomic(self) -> bool {
        self.is(Facts::ATOMIC)
    }

    /// ACK extended transport header.
    pub const fn has_aeth(self) -> bool {
        self.is(Facts::AETH)
    }

    /// Atomic ACK extended transport header.
    pub const fn has_atomic_ack(self) -> bool {
        self.is(Facts::ATOMIC_ACK)
    }

    /// Immediate data.
    pub const fn has_imm(self) -> bool {
        self.is(Facts::IMM)
    }

    /// Invalidate extended transport header.
    pub const fn has_ieth(self) -> bool {
        self.is(Facts::IETH)
    }

    /// FLUSH extended transport header.
    pub const fn has_feth(self) -> bool {
        self.is(Facts::FETH)
    }

    /// Bytes of all transport headers of such a packet.
    pub const fn header_len(self) -> usize {
        HEADER_LENGTHS[self.0 as usize] as usize
    }

    const fn sum_of_headers(self) -> usize {
        const SIZES: [(u32, usize); 10] = [
            (Facts::XRC_SRQ, 4),
            (Facts::DETH, 8),
            (Facts::FETH, 4),
            (Facts::RETH, 16),
            (Facts::ATOMIC, 28),
            (Facts::AETH, 4),
            (Facts::ATOMIC_ACK, 8),
            (Facts::IMM, 4),
            (Facts::IETH, 4),
            (Facts::CNP, 16),
        ];
        let mut len = 12;
        let mut i = 0;
        while i < SIZES.len() {
            if self.is(SIZES[i].0) {
                len += SIZES[i].1;
            }
            i += 1;
        }
        len
    }
}

/// Looked up several times for each packet.
static HEADER_LENGTHS: [u8; 256] = {
    let mut lengths = [0; 256];
    let mut opcode = 0;
    while opcode < lengths.len() {
        lengths[opcode] = BthOpcode(opcode as u8).sum_of_headers() as u8;
        opcode += 1;
    }
    lengths
};

impl fmt::Debug for BthOpcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(opcode, _)| opcode == self) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "opcode {:#04x}", self.0),
        }
    }
}

impl fmt::Display for BthOpcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_known_opcodes() {
        for code in 0..=255 {
            let opcode = BthOpcode(code);
            let named = NAMES.iter().any(|&(o, _)| o == opcode);
            let manufacturer = opcode.service() == Service::Manufacturer;
            assert_eq!(opcode.is_known(), named || manufacturer, "{code:#04x}");
            assert_eq!(BthOpcode::new(opcode.service(), opcode.op()), opcode);
        }
    }

    #[test]
    fn every_packet_has_one_direction_and_services_differ_in_the_prefix_only() {
        for &(opcode, name) in NAMES {
            if opcode == BthOpcode::CNP {
                continue;
            }
            assert!(opcode.is_request() != opcode.is_response(), "{name}");
            let rc = opcode.with_service(Service::Rc);
            assert!(rc.is_known(), "{name}");
            assert_eq!(rc.ends_message(), opcode.ends_message(), "{name}");
            let more = match opcode.service() {
                Service::Ud => 8,
                Service::Xrc if opcode.is_request() => 4,
                _ => 0,
            };
            assert_eq!(opcode.header_len(), rc.header_len() + more, "{name}");
            assert!(opcode.header_len() <= crate::MAX_HEADER_BYTES, "{name}");
        }
    }

    #[test]
    fn header_lengths_are_the_standards() {
        for (opcode, len) in [
            (BthOpcode::RC_SEND_MIDDLE, 12),
            (BthOpcode::RC_WRITE_FIRST, 28),
            (BthOpcode::RC_WRITE_ONLY_IMM, 32),
            (BthOpcode::RC_READ_REQUEST, 28),
            (BthOpcode::RC_READ_RESPONSE_MIDDLE, 12),
            (BthOpcode::RC_ACK, 16),
            (BthOpcode::RC_ATOMIC_ACK, 24),
            (BthOpcode::RC_COMPARE_SWAP, 40),
            (BthOpcode::RC_FLUSH, 32),
            (BthOpcode::UD_SEND_ONLY_IMM, 24),
            (BthOpcode::CNP, 28),
            (BthOpcode::XRC_FETCH_ADD, 44),
        ] {
            assert_eq!(opcode.header_len(), len, "{opcode}");
        }
    }
}
