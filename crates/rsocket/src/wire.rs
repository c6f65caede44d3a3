//! What goes over the wire: `struct rs_conn_data`, `rs_sge`, `rs_iomap`, and immediate data, as
//! rdma-core's `librdmacm/docs/rsocket` describes them.

/// Order of the bytes of what peers write into each other's memory: the reader's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ByteOrder {
    /// Least significant first.
    Little,
    /// Most significant first; `RS_CONN_FLAG_NET`.
    Big,
}

impl ByteOrder {
    /// This host's.
    pub const NATIVE: ByteOrder = if cfg!(target_endian = "big") {
        ByteOrder::Big
    } else {
        ByteOrder::Little
    };

    fn u64(self, n: u64) -> [u8; 8] {
        match self {
            ByteOrder::Little => n.to_le_bytes(),
            ByteOrder::Big => n.to_be_bytes(),
        }
    }

    fn u32(self, n: u32) -> [u8; 4] {
        match self {
            ByteOrder::Little => n.to_le_bytes(),
            ByteOrder::Big => n.to_be_bytes(),
        }
    }
}

/// Part of a buffer that the peer may write (`struct rs_sge`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Address of the first byte.
    pub addr: u64,
    /// Remote key.
    pub key: u32,
    /// Bytes; of the table of segments, entries.
    pub length: u32,
}

impl Segment {
    /// Bytes of one in memory.
    pub const BYTES: usize = 16;

    /// As it is in the memory of a peer of that byte order.
    pub fn to_bytes(self, order: ByteOrder) -> [u8; Segment::BYTES] {
        let mut bytes = [0; Segment::BYTES];
        bytes[..8].copy_from_slice(&order.u64(self.addr));
        bytes[8..12].copy_from_slice(&order.u32(self.key));
        bytes[12..].copy_from_slice(&order.u32(self.length));
        bytes
    }

    fn from_be_bytes(bytes: &[u8; Segment::BYTES]) -> Self {
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            k0,
            k1,
            k2,
            k3,
            l0,
            l1,
            l2,
            l3,
        ] = *bytes;
        Segment {
            addr: u64::from_be_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            key: u32::from_be_bytes([k0, k1, k2, k3]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        }
    }
}

/// A buffer of the peer's that is written directly (`struct rs_iomap`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IoMap {
    /// The program's name for its first byte.
    pub offset: u64,
    /// Where it is.
    pub segment: Segment,
}

impl IoMap {
    /// Bytes of one in memory.
    pub const BYTES: usize = 8 + Segment::BYTES;

    /// As it is in the memory of a peer of that byte order.
    pub fn to_bytes(self, order: ByteOrder) -> [u8; IoMap::BYTES] {
        let mut bytes = [0; IoMap::BYTES];
        bytes[..8].copy_from_slice(&order.u64(self.offset));
        bytes[8..].copy_from_slice(&self.segment.to_bytes(order));
        bytes
    }
}

/// Why a peer's [`ConnData`] is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    /// Too short.
    #[error("the peer's connection data has {0} bytes, not {len}", len = ConnData::BYTES)]
    Short(usize),
    /// Of another version.
    #[error("the peer speaks version {0} of the rsocket protocol, not 1")]
    Version(u8),
    /// It cannot be told of one buffer while it uses another.
    #[error("the peer has a table of {0} segments, not at least 2")]
    Table(u32),
}

/// Private data of a connection's request and reply (`struct rs_conn_data`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnData {
    /// Byte order of the sender's memory.
    pub order: ByteOrder,
    /// Messages that the sender takes before it grants more.
    pub credits: u16,
    /// Entries of the sender's table of directly written buffers; `None`: it knows none.
    pub maps: Option<u16>,
    /// The sender's table of segments; its length is in entries. Behind it is that of [`IoMap`].
    pub table: Segment,
    /// First part of the sender's receive buffer.
    pub buffer: Segment,
}

const FLAG_NET: u8 = 1;
const FLAG_IOMAP: u8 = 2;

impl ConnData {
    /// Bytes of it.
    pub const BYTES: usize = 40;

    /// As private data.
    pub fn to_bytes(&self) -> [u8; ConnData::BYTES] {
        let mut bytes = [0; ConnData::BYTES];
        bytes[0] = 1;
        if self.order == ByteOrder::Big {
            bytes[1] |= FLAG_NET;
        }
        bytes[2..4].copy_from_slice(&self.credits.to_be_bytes());
        if let Some(maps) = self.maps {
            bytes[1] |= FLAG_IOMAP;
            bytes[7] = scale(maps);
        }
        bytes[8..24].copy_from_slice(&self.table.to_bytes(ByteOrder::Big));
        bytes[24..].copy_from_slice(&self.buffer.to_bytes(ByteOrder::Big));
        bytes
    }

    /// From private data, which may be longer.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Refused> {
        let Some(&[version, flags, c0, c1, _, _, _, maps, ref segments @ ..]) =
            bytes.first_chunk::<{ ConnData::BYTES }>()
        else {
            return Err(Refused::Short(bytes.len()));
        };
        if version != 1 {
            return Err(Refused::Version(version));
        }
        let segment = |at: usize| {
            let bytes = segments.get(at..).and_then(|s| s.first_chunk());
            Segment::from_be_bytes(bytes.unwrap_or(&[0; Segment::BYTES]))
        };
        let table = segment(0);
        if table.length < 2 {
            return Err(Refused::Table(table.length));
        }
        Ok(ConnData {
            order: if flags & FLAG_NET != 0 {
                ByteOrder::Big
            } else {
                ByteOrder::Little
            },
            credits: u16::from_be_bytes([c0, c1]),
            maps: (flags & FLAG_IOMAP != 0).then(|| unscale(maps)),
            table,
            buffer: segment(Segment::BYTES),
        })
    }
}

/// A size up to 2^15 in 8 bits: above 128, multiples of 256.
fn scale(n: u16) -> u8 {
    match u8::try_from(n) {
        Ok(n) if n <= 128 => n,
        _ => 128 | (n >> 8).min(127) as u8,
    }
}

fn unscale(n: u8) -> u16 {
    if n <= 128 {
        n.into()
    } else {
        u16::from(n & 127) << 8
    }
}

/// The number of entries that the peer is told of if so many are asked for.
pub fn map_entries(asked: u16) -> u16 {
    unscale(scale(asked))
}

/// A message about the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Control {
    /// The sender neither sends nor receives any more.
    Disconnect,
    /// The sender is alive.
    KeepAlive,
    /// The sender sends no more.
    Shutdown,
}

/// Immediate data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    /// So many bytes were written behind the last ones.
    Data(u32),
    /// Messages may be sent up to this one, counted from the first; the table of segments may have
    /// changed.
    Credits(u16),
    /// This entry of the table of directly written buffers has changed.
    Map(u16),
    /// About the connection.
    Control(Control),
}

const OP_DATA: u32 = 0;
const OP_CREDITS: u32 = 4;
const OP_MAP: u32 = 6;
const OP_CONTROL: u32 = 7;

impl Message {
    /// Most bytes that one message announces.
    pub const MAX_DATA: u32 = (1 << 29) - 1;

    /// As immediate data, in the host's order.
    pub fn encode(self) -> u32 {
        let (op, data) = match self {
            Message::Data(bytes) => (OP_DATA, bytes & Message::MAX_DATA),
            Message::Credits(limit) => (OP_CREDITS, limit.into()),
            Message::Map(index) => (OP_MAP, index.into()),
            Message::Control(control) => (
                OP_CONTROL,
                match control {
                    Control::Disconnect => 0,
                    Control::KeepAlive => 1,
                    Control::Shutdown => 2,
                },
            ),
        };
        op << 29 | data
    }

    /// From immediate data. `None`: nothing that version 1 knows.
    pub fn decode(imm: u32) -> Option<Self> {
        let data = imm & Message::MAX_DATA;
        Some(match (imm >> 29, data) {
            (OP_DATA, bytes) => Message::Data(bytes),
            // The peer adds up to 65535 + 65535, and means it modulo 2^16.
            (OP_CREDITS, limit) => Message::Credits(limit as u16),
            (OP_MAP, index) => Message::Map(index as u16),
            (OP_CONTROL, 0) => Message::Control(Control::Disconnect),
            (OP_CONTROL, 1) => Message::Control(Control::KeepAlive),
            (OP_CONTROL, 2) => Message::Control(Control::Shutdown),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: ConnData = ConnData {
        order: ByteOrder::Little,
        credits: 384,
        maps: Some(3),
        table: Segment {
            addr: 0x1122_3344_5566_7788,
            key: 0x99AA_BBCC,
            length: 2,
        },
        buffer: Segment {
            addr: 0x0102_0304_0506_0708,
            key: 0x090A_0B0C,
            length: 65536,
        },
    };

    /// Offsets of the C structure.
    #[test]
    fn connection_data_is_laid_out_as_the_structure() {
        let expected: [u8; 40] = [
            1, 2, 1, 0x80, 0, 0, 0, 3, // version, flags, credits, reserved, entries
            0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, // table: address
            0x99, 0xAA, 0xBB, 0xCC, 0, 0, 0, 2, // key, entries
            1, 2, 3, 4, 5, 6, 7, 8, // buffer: address
            9, 10, 11, 12, 0, 1, 0, 0, // key, bytes
        ];
        assert_eq!(DATA.to_bytes(), expected);
        let mut padded = expected.to_vec();
        padded.resize(56, 0);
        assert_eq!(ConnData::from_bytes(&padded), Ok(DATA));
    }

    #[test]
    fn connection_data_that_is_not_ours_is_refused() {
        let bytes = DATA.to_bytes();
        assert_eq!(ConnData::from_bytes(&bytes[..39]), Err(Refused::Short(39)));
        let mut other = bytes;
        other[0] = 2;
        assert_eq!(ConnData::from_bytes(&other), Err(Refused::Version(2)));
        let mut other = bytes;
        other[23] = 1;
        assert_eq!(ConnData::from_bytes(&other), Err(Refused::Table(1)));
    }

    #[test]
    fn the_order_of_bytes_is_the_readers() {
        let segment = Segment {
            addr: 1,
            key: 2,
            length: 3,
        };
        let little = segment.to_bytes(ByteOrder::Little);
        assert_eq!(little, [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
        let big = segment.to_bytes(ByteOrder::Big);
        assert_eq!(big, [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3]);
    }

    #[test]
    fn immediate_data_has_the_operation_in_its_upper_three_bits() {
        for (message, imm) in [
            (Message::Data(0x1000), 0x0000_1000),
            (Message::Credits(384), 0x8000_0180),
            (Message::Map(7), 0xC000_0007),
            (Message::Control(Control::Disconnect), 0xE000_0000),
            (Message::Control(Control::KeepAlive), 0xE000_0001),
            (Message::Control(Control::Shutdown), 0xE000_0002),
        ] {
            assert_eq!(message.encode(), imm);
            assert_eq!(Message::decode(imm), Some(message));
        }
        assert_eq!(Message::decode(0x8001_0005), Some(Message::Credits(5)));
        for unknown in [
            0x2000_0000,
            0x4000_0000,
            0x6000_0000,
            0xA000_0000,
            0xE000_0003,
        ] {
            assert_eq!(Message::decode(unknown), None);
        }
    }

    #[test]
    fn sizes_above_128_are_told_in_multiples_of_256() {
        for (asked, told) in [
            (0, 0),
            (128, 128),
            (129, 128),
            (255, 128),
            (256, 256),
            (700, 512),
        ] {
            assert_eq!(map_entries(asked), told);
        }
        assert_eq!(map_entries(u16::MAX), 127 << 8);
    }
}
