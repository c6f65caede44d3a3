//! Which host has whose endpoints, and how much goes into a packet to it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use freeflow_fabric_udp::{largest_payload, path_mtu};
use freeflow_transport::MAX_SEGMENT;
use freeflow_types::{Gid, Mtu};

use crate::hosts::Hosts;

/// Bytes of a packet on most links.
const ETHERNET_MTU: usize = 1500;

/// The hosts of endpoints, with the longest payload of a packet to each.
pub(crate) struct Map {
    hosts: Hosts,
    local: Option<IpAddr>,
    pub(super) segments: BTreeMap<IpAddr, u32>,
    pub(super) mtu: Mtu,
}

impl Default for Map {
    fn default() -> Self {
        Map {
            hosts: Hosts::default(),
            local: None,
            segments: BTreeMap::new(),
            // Nothing goes over a network then.
            mtu: Mtu::B4096,
        }
    }
}

impl Map {
    /// Looks up the path to each host; `local` is this host's address.
    pub(crate) fn new(hosts: Hosts, local: IpAddr) -> Self {
        let segment = |host| {
            // A host that cannot be reached now may be so later, on a path like most.
            let mtu = path_mtu(local, host).unwrap_or(ETHERNET_MTU);
            let fits = largest_payload(mtu, host).min(MAX_SEGMENT as usize);
            u32::try_from(fits).unwrap_or(MAX_SEGMENT)
        };
        let others = hosts.routers().filter(|&host| host != local);
        let segments: BTreeMap<_, _> = others.map(|host| (host, segment(host))).collect();
        let least = segments.values().copied().min();
        let mtu = largest_mtu(least.unwrap_or_else(|| segment(neighbour(local))));
        Map {
            hosts,
            local: Some(local),
            segments,
            mtu,
        }
    }

    pub(super) fn find(&self, tenant: &str, gid: Gid) -> Option<IpAddr> {
        let found = self.hosts.find(tenant, gid);
        found.filter(|&host| Some(host) != self.local)
    }

    /// Whether the map says that an endpoint is on this host.
    pub(super) fn gives_here(&self, tenant: &str, gid: Gid) -> bool {
        let found = self.hosts.find(tenant, gid);
        found.is_some() && found == self.local
    }

    /// The other hosts that may have endpoints of a tenant.
    pub(super) fn others(&self, tenant: &str) -> impl Iterator<Item = IpAddr> {
        let all = self.hosts.of_tenant(tenant);
        all.filter(|&host| Some(host) != self.local)
    }

    /// The other hosts, with their names, and the longest payload of a packet to each.
    pub(crate) fn peers(&self) -> impl Iterator<Item = (IpAddr, Option<&str>, u32)> {
        let all = self.segments.iter();
        all.map(|(&host, &segment)| (host, self.hosts.name(host), segment))
    }

    /// Whether a packet takes so many bytes to a host.
    pub(super) fn carries(&self, host: IpAddr, payload: usize) -> bool {
        let segment = self.segments.get(&host);
        segment.is_some_and(|&segment| payload <= segment as usize)
    }
}

/// An address on this host's own link, most likely: by it the link's MTU is found.
fn neighbour(local: IpAddr) -> IpAddr {
    match local {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() ^ 1).into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() ^ 1).into(),
    }
}

/// The largest MTU whose packets fit.
fn largest_mtu(segment: u32) -> Mtu {
    let all = [Mtu::B4096, Mtu::B2048, Mtu::B1024, Mtu::B512];
    let fits = all.into_iter().find(|mtu| mtu.bytes() <= segment);
    fits.unwrap_or(Mtu::B256)
}
