//! The RDMA IP CM service (annex A11): ports as service ids, and addresses in private data.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::bytes::{Reader, Writer};

/// What ports are of (`enum rdma_port_space`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum PortSpace {
    /// Multicast over IP over InfiniBand.
    Ipoib = 0x0002,
    /// Connections.
    Tcp = 0x0106,
    /// Datagrams.
    Udp = 0x0111,
    /// Of InfiniBand's own addresses.
    Ib = 0x013F,
}

/// The service id of a port.
pub fn service_id(space: PortSpace, port: u16) -> u64 {
    (space as u64) << 16 | u64::from(port)
}

/// The port that has a service id; `None` if no port has it.
pub fn port_of(service_id: u64) -> Option<(PortSpace, u16)> {
    let space = match service_id >> 16 {
        0x0002 => PortSpace::Ipoib,
        0x0106 => PortSpace::Tcp,
        0x0111 => PortSpace::Udp,
        0x013F => PortSpace::Ib,
        _ => return None,
    };
    Some((space, service_id as u16))
}

/// What the service puts in the first [`IpCm::BYTES`] of the private data of REQ and SIDR_REQ.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IpCm {
    /// The sender's port.
    pub src_port: u16,
    /// The sender.
    pub src: IpAddr,
    /// The receiver, of the same family.
    pub dst: IpAddr,
}

/// Why private data does not begin with addresses, or cannot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum IpCmError {
    /// Too short.
    #[error("private data of {0} bytes, which cannot hold the 36 of the IP service")]
    Length(usize),
    /// A version of the service that is not known.
    #[error("version {0:#04x} of the IP service, not 0")]
    Version(u8),
    /// Neither IPv4 nor IPv6.
    #[error("IP version {0}")]
    IpVersion(u8),
    /// One address is of IPv4 and one of IPv6.
    #[error("the addresses are of different families")]
    Families,
}

impl IpCm {
    /// Bytes that it takes of the private data, and leaves the application so many fewer.
    pub const BYTES: usize = 36;

    /// Reads the beginning of private data.
    pub fn parse(private: &[u8]) -> Result<IpCm, IpCmError> {
        if private.len() < Self::BYTES {
            return Err(IpCmError::Length(private.len()));
        }
        let r = &mut Reader::new(private);
        let [version, ip] = r.array();
        if version != 0 {
            return Err(IpCmError::Version(version));
        }
        let src_port = r.u16_or_0();
        let addresses = [r.array::<16>(), r.array()];
        let [src, dst] = match ip >> 4 {
            // In the last four bytes.
            4 => addresses.map(|[.., a, b, c, d]| Ipv4Addr::new(a, b, c, d).into()),
            6 => addresses.map(|a| Ipv6Addr::from(a).into()),
            other => return Err(IpCmError::IpVersion(other)),
        };
        Ok(IpCm { src_port, src, dst })
    }

    /// Writes it at the beginning of private data.
    pub fn emit(&self, private: &mut [u8]) -> Result<(), IpCmError> {
        if private.len() < Self::BYTES {
            return Err(IpCmError::Length(private.len()));
        }
        let (version, src, dst) = match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => (4, widen(src), widen(dst)),
            (IpAddr::V6(src), IpAddr::V6(dst)) => (6, src.octets(), dst.octets()),
            _ => return Err(IpCmError::Families),
        };
        let w = &mut Writer::new(private);
        w.u8(0);
        w.u8(version << 4);
        w.u16(self.src_port);
        w.put(&src);
        w.put(&dst);
        Ok(())
    }
}

fn widen(address: Ipv4Addr) -> [u8; 16] {
    // Compatible, not mapped: the other bytes are zero.
    address.to_ipv6_compatible().octets()
}
