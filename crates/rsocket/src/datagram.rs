//! Headers in front of datagrams.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Marks a UDP datagram of the protocol.
const TAG: u32 = 0x5555_5555;

const UDP_V4_BYTES: usize = 16;
const UDP_V6_BYTES: usize = 28;
const V4_BYTES: usize = 8;
const V6_BYTES: usize = 24;

/// What a UDP datagram of the protocol is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UdpOp {
    /// It carries a datagram of the program's, and asks for the receiver's queue pair.
    Data,
    /// It tells the sender's queue pair.
    Control,
}

/// Header of a UDP datagram (`struct ds_udp_header`): the first datagrams to an address go this
/// way, until its queue pair is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UdpHeader {
    /// What it is for.
    pub op: UdpOp,
    /// The sender's queue pair.
    pub qpn: u32,
    /// The address that queue pair is bound to.
    pub addr: IpAddr,
}

impl UdpHeader {
    /// Most bytes of one.
    pub const MAX_BYTES: usize = UDP_V6_BYTES;

    /// Appends it.
    pub fn write(&self, to: &mut Vec<u8>) {
        let (version, length) = match self.addr {
            IpAddr::V4(_) => (4, UDP_V4_BYTES),
            IpAddr::V6(_) => (6, UDP_V6_BYTES),
        };
        let op = match self.op {
            UdpOp::Data => 0,
            UdpOp::Control => 7,
        };
        to.extend_from_slice(&TAG.to_be_bytes());
        to.extend_from_slice(&[version, op, length as u8, 0]);
        to.extend_from_slice(&(self.qpn & 0xFF_FFFF).to_be_bytes());
        match self.addr {
            IpAddr::V4(addr) => to.extend_from_slice(&addr.octets()),
            IpAddr::V6(addr) => to.extend_from_slice(&addr.octets()),
        }
    }

    /// The header of a datagram, and what is behind it. `None`: it is none of the protocol.
    pub fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (&[t0, t1, t2, t3, version, op, length, _, q0, q1, q2, q3], _) =
            bytes.split_first_chunk()?;
        if u32::from_be_bytes([t0, t1, t2, t3]) != TAG {
            return None;
        }
        let (header, payload) = bytes.split_at_checked(length.into())?;
        let addr = match (version, header.len()) {
            (4, UDP_V4_BYTES) => Ipv4Addr::from(*header.last_chunk::<4>()?).into(),
            (6, UDP_V6_BYTES) => Ipv6Addr::from(*header.last_chunk::<16>()?).into(),
            _ => return None,
        };
        let op = match op {
            0 => UdpOp::Data,
            7 => UdpOp::Control,
            _ => return None,
        };
        let qpn = u32::from_be_bytes([q0, q1, q2, q3]) & 0xFF_FFFF;
        Some((UdpHeader { op, qpn, addr }, payload))
    }
}

/// Header of a datagram between queue pairs (`struct ds_header`): where it comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DatagramHeader(pub SocketAddr);

impl DatagramHeader {
    /// Most bytes of one.
    pub const MAX_BYTES: usize = V6_BYTES;

    /// Appends it.
    pub fn write(&self, to: &mut Vec<u8>) {
        let port = self.0.port().to_be_bytes();
        match self.0 {
            SocketAddr::V4(addr) => {
                to.extend_from_slice(&[4, V4_BYTES as u8, port[0], port[1]]);
                to.extend_from_slice(&addr.ip().octets());
            }
            SocketAddr::V6(addr) => {
                to.extend_from_slice(&[6, V6_BYTES as u8, port[0], port[1]]);
                to.extend_from_slice(&addr.flowinfo().to_be_bytes());
                to.extend_from_slice(&addr.ip().octets());
            }
        }
    }

    /// The header of a datagram, and what is behind it. `None`: there is none.
    pub fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let &[version, length, p0, p1] = bytes.first_chunk()?;
        let (header, payload) = bytes.split_at_checked(length.into())?;
        let port = u16::from_be_bytes([p0, p1]);
        let addr = match (version, header.len()) {
            (4, V4_BYTES) => (Ipv4Addr::from(*header.last_chunk::<4>()?), port).into(),
            (6, V6_BYTES) => (Ipv6Addr::from(*header.last_chunk::<16>()?), port).into(),
            _ => return None,
        };
        Some((DatagramHeader(addr), payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_udp_datagrams_are_laid_out_as_the_structure() {
        let header = UdpHeader {
            op: UdpOp::Data,
            qpn: 0x12_3456,
            addr: [10, 77, 0, 1].into(),
        };
        let mut bytes = Vec::new();
        header.write(&mut bytes);
        assert_eq!(
            bytes,
            [
                0x55, 0x55, 0x55, 0x55, 4, 0, 16, 0, 0, 0x12, 0x34, 0x56, 10, 77, 0, 1
            ]
        );
        bytes.extend_from_slice(b"data");
        assert_eq!(UdpHeader::split(&bytes), Some((header, &b"data"[..])));
        let header = UdpHeader {
            op: UdpOp::Control,
            qpn: 1,
            addr: "fd00::1".parse().unwrap(),
        };
        let mut bytes = Vec::new();
        header.write(&mut bytes);
        assert_eq!(bytes.len(), 28);
        assert_eq!(UdpHeader::split(&bytes), Some((header, &b""[..])));
    }

    #[test]
    fn headers_between_queue_pairs_are_laid_out_as_the_structure() {
        let header = DatagramHeader(([10, 77, 0, 1], 0x1234).into());
        let mut bytes = Vec::new();
        header.write(&mut bytes);
        assert_eq!(bytes, [4, 8, 0x12, 0x34, 10, 77, 0, 1]);
        bytes.push(9);
        assert_eq!(DatagramHeader::split(&bytes), Some((header, &[9][..])));
        let header = DatagramHeader("[fd00::1]:7".parse().unwrap());
        let mut bytes = Vec::new();
        header.write(&mut bytes);
        assert_eq!(bytes.len(), 24);
        assert_eq!(DatagramHeader::split(&bytes), Some((header, &b""[..])));
    }

    /// Whatever comes is taken apart without a panic, and only what is whole is taken.
    #[test]
    fn damaged_headers_are_refused() {
        let mut udp = Vec::new();
        let addr = IpAddr::from([10, 77, 0, 1]);
        let op = UdpOp::Data;
        UdpHeader { op, qpn: 5, addr }.write(&mut udp);
        let mut between = Vec::new();
        DatagramHeader((addr, 5).into()).write(&mut between);
        for len in 0..udp.len() {
            assert_eq!(UdpHeader::split(&udp[..len]), None);
        }
        for len in 0..between.len() {
            assert_eq!(DatagramHeader::split(&between[..len]), None);
        }
        for (at, byte) in [(0, 0), (4, 5), (4, 6), (5, 1), (6, 15), (6, 255)] {
            let mut damaged = udp.clone();
            damaged[at] = byte;
            assert_eq!(UdpHeader::split(&damaged), None, "{at}: {byte}");
        }
        for (at, byte) in [(0, 6), (1, 7), (1, 24)] {
            let mut damaged = between.clone();
            damaged[at] = byte;
            assert_eq!(DatagramHeader::split(&damaged), None, "{at}: {byte}");
        }
    }
}
