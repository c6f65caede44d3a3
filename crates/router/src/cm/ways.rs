//! Addresses: which are an endpoint's own, and how it reaches others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use freeflow_cm::{Port, is_any, status};
use freeflow_session::Handle;
use freeflow_types::{Gid, VirtualIp};

use crate::control::node_guid;
use crate::engine::Engine;

/// Indices of the GIDs.
const VIRTUAL: u8 = 0;
const UNDERLAY: u8 = 1;

impl Engine {
    /// A port of an endpoint, by its GID's index.
    pub(crate) fn cm_port(&self, endpoint: Handle, index: u8) -> Option<Port> {
        let e = self.endpoints.get(endpoint)?;
        let gid = match index {
            VIRTUAL => e.gid,
            _ => e.underlay_gid()?,
        };
        Some(Port {
            endpoint,
            gid,
            index,
            mtu: self.network.mtu(),
            guid: node_guid(e.gid.0),
        })
    }

    /// The ports of all endpoints that share this host's address.
    pub(crate) fn underlay_ports(&self) -> Vec<Port> {
        let sharing = self.sharing.iter();
        sharing.filter_map(|&e| self.cm_port(e, UNDERLAY)).collect()
    }

    /// The port that has an address.
    pub(super) fn cm_own(&self, endpoint: Handle, ip: IpAddr) -> Option<Port> {
        let gid = Gid::from(VirtualIp(ip));
        let ports = [VIRTUAL, UNDERLAY].map(|index| self.cm_port(endpoint, index));
        ports.into_iter().flatten().find(|port| port.gid == gid)
    }

    /// The port that leads to an address, with its own address in the form of that one; `from` is
    /// the port that the program has chosen, if it has. Or the status that says why there is none.
    pub(super) fn cm_way(
        &self,
        endpoint: Handle,
        from: Option<Port>,
        to: SocketAddr,
    ) -> Result<(Port, IpAddr), i32> {
        let e = self.endpoints.get(endpoint).ok_or(status::ENODEV)?;
        if is_any(to.ip()) {
            // The endpoint itself, which the host's address is not.
            let port = self.cm_port(endpoint, VIRTUAL).ok_or(status::ENODEV)?;
            let own = match from {
                None => loopback(to.ip()),
                Some(from) if from.index == VIRTUAL => {
                    alike(e.ip.0, to.ip()).unwrap_or_else(|| loopback(to.ip()))
                }
                Some(_) => return Err(status::ENETUNREACH),
            };
            return Ok((port, own));
        }
        let gid = Gid::from(VirtualIp(to.ip()));
        let group = gid.is_multicast();
        if !group && !VirtualIp(to.ip()).is_assignable() {
            return Err(status::ENODEV);
        }
        let known = group
            || self.by_gid.contains_key(&(e.tenant, gid))
            || self.network.has_way(&e.tenant_name, gid);
        let port = match from {
            Some(port) => port,
            None if known => self.cm_port(endpoint, VIRTUAL).ok_or(status::ENODEV)?,
            // Not the tenant's: the network between hosts has it, if the endpoint may go there.
            None => {
                let underlay = self.cm_port(endpoint, UNDERLAY);
                underlay.ok_or(status::EHOSTUNREACH)?
            }
        };
        let own = if port.index == VIRTUAL {
            e.ip.0
        } else {
            e.underlay.ok_or(status::ENODEV)?
        };
        let own = alike(own, to.ip()).ok_or(status::ENETUNREACH)?;
        if port.index == VIRTUAL && !known {
            return Err(status::EHOSTUNREACH);
        }
        Ok((port, own))
    }
}

/// The address that leads to itself, in the family of another one.
fn loopback(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// An own address in the form of another one: of IPv4, mapped to IPv6, or of IPv6. None if these
/// two have no network in common.
fn alike(own: IpAddr, to: IpAddr) -> Option<IpAddr> {
    match (own.to_canonical(), to) {
        (IpAddr::V4(own), IpAddr::V6(to)) => {
            let mapped = to.to_ipv4_mapped().is_some() || to.is_multicast();
            mapped.then(|| own.to_ipv6_mapped().into())
        }
        (IpAddr::V6(_), to) if to.is_ipv4() || to.to_canonical().is_ipv4() => None,
        (own, _) => Some(own),
    }
}
