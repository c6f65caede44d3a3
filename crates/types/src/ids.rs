//! Identifiers: queue pair numbers, packet sequence numbers, GIDs, keys, tenants.

use core::fmt;
use std::net::{IpAddr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Queue pair number, 24 bits. 0 and 1 are the management QPs and 0xFFFFFF is multicast.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
pub struct Qpn(u32);

impl Qpn {
    /// Largest value of a 24-bit field.
    pub const MASK: u32 = 0x00FF_FFFF;
    /// Destination of a multicast datagram (IBTA volume 1, 9.5.2).
    pub const MULTICAST: Qpn = Qpn(Self::MASK);

    /// Keeps the low 24 bits, as the wire does.
    pub const fn new(v: u32) -> Self {
        Qpn(v & Self::MASK)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qpn {:#08x}", self.0)
    }
}

impl fmt::Display for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#08x}", self.0)
    }
}

/// Packet sequence number: 24 bits, serial arithmetic (IBTA volume 1, 9.7.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, Default)]
pub struct Psn(u32);

impl Psn {
    /// Keeps the low 24 bits.
    pub const fn new(v: u32) -> Self {
        Psn(v & Qpn::MASK)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// This PSN plus `n`, modulo 2^24.
    #[must_use]
    pub const fn add(self, n: u32) -> Self {
        Psn(self.0.wrapping_add(n) & Qpn::MASK)
    }

    /// Signed distance `self - other`, in -2^23 .. 2^23.
    pub const fn distance(self, other: Psn) -> i32 {
        ((self.0.wrapping_sub(other.0) << 8) as i32) >> 8
    }
}

/// Local or remote key of a memory region or window, 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, Default)]
pub struct Key(pub u32);

/// Global identifier, 16 bytes in network order. FreeFlow's are RoCEv2's: an IPv6 address, or
/// an IPv4 address mapped into IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The unspecified GID.
    pub const ZERO: Gid = Gid([0; 16]);

    /// Whether this is a multicast GID (`ff00::/8`, or an IPv4 multicast address mapped).
    pub fn is_multicast(self) -> bool {
        let a = Ipv6Addr::from(self.0);
        a.is_multicast() || a.to_ipv4_mapped().is_some_and(|v4| v4.is_multicast())
    }
}

impl From<VirtualIp> for Gid {
    fn from(ip: VirtualIp) -> Self {
        match ip.0 {
            IpAddr::V4(v4) => Gid(v4.to_ipv6_mapped().octets()),
            IpAddr::V6(v6) => Gid(v6.octets()),
        }
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Ipv6Addr::from(self.0), f)
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Ipv6Addr::from(self.0), f)
    }
}

/// An endpoint's address in its tenant's network.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VirtualIp(pub IpAddr);

impl VirtualIp {
    /// Whether an endpoint may own this address: neither unspecified, loopback, multicast nor
    /// broadcast, nor of IPv4's networks 0.0.0.0/8 and 240.0.0.0/4, which no host may use
    /// (RFC 1122, section 3.2.1.3; RFC 1112, section 4).
    pub fn is_assignable(self) -> bool {
        let ip = self.0.to_canonical();
        let reserved = match ip {
            IpAddr::V4(v4) => matches!(v4.octets()[0], 0 | 240..),
            IpAddr::V6(v6) => v6.is_unspecified(),
        };
        !(reserved || ip.is_loopback() || ip.is_multicast())
    }
}

impl fmt::Display for VirtualIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A tenant: endpoints of different tenants never reach each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TenantId(pub u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn psn_wraps_in_24_bits() {
        assert_eq!(Psn::new(0xFF_FFFF).add(1), Psn::new(0));
        assert_eq!(Psn::new(2).distance(Psn::new(0xFF_FFFE)), 4);
        assert_eq!(Psn::new(0xFF_FFFE).distance(Psn::new(2)), -4);
        assert_eq!(Psn::new(0x80_0000).distance(Psn::new(0)), -0x80_0000);
    }

    #[test]
    fn gid_of_ipv4_is_mapped() {
        let gid = Gid::from(VirtualIp("10.1.2.3".parse().unwrap()));
        assert_eq!(gid.to_string(), "::ffff:10.1.2.3");
        assert!(!gid.is_multicast());
        assert!(Gid::from(VirtualIp("224.0.0.5".parse().unwrap())).is_multicast());
    }

    #[test]
    fn only_unicast_addresses_are_assignable() {
        for bad in [
            "0.0.0.0",
            "127.0.0.1",
            "224.1.1.1",
            "255.255.255.255",
            "0.0.0.7",
            "240.0.0.1",
            "::ffff:127.0.0.1",
            "::",
            "::1",
            "ff02::1",
        ] {
            assert!(!VirtualIp(bad.parse().unwrap()).is_assignable(), "{bad}");
        }
        assert!(VirtualIp("10.0.0.1".parse().unwrap()).is_assignable());
    }
}
