//! Peers that are no FreeFlow: whatever speaks RoCEv2 at an address of the network between hosts.
//!
//! An endpoint may have that network's address of this host as its second GID. What its queue
//! pairs send from there goes to the host that the destination GID names, as the standard has it.
//! A FreeFlow router there takes connections like any other; its datagrams have virtual addresses,
//! so that hosts of the map neither send nor get those of this kind.

use std::net::{IpAddr, Ipv6Addr};

use freeflow_fabric_udp::Received;
use freeflow_session::Handle;
use freeflow_transport::Outcome;
use freeflow_types::{AddressVector, Gid, VirtualIp};

use crate::datagram::{Arrival, grh_bytes};
use crate::engine::Engine;
use crate::objects::Endpoint;

/// Index of the underlay's GID, if an endpoint has it.
pub(super) const GID_INDEX: u8 = 1;

/// The host that an address names to an endpoint that has the underlay's GID.
pub(super) fn host(endpoint: &Endpoint, av: &AddressVector) -> Option<IpAddr> {
    endpoint.underlay?;
    let ip = Ipv6Addr::from(av.dgid.0).to_canonical();
    VirtualIp(ip).is_assignable().then_some(ip)
}

impl Engine {
    /// Sends a datagram from the underlay's GID; whether it went.
    pub(crate) fn datagram_to_stock(
        &mut self,
        qp: Handle,
        to: u32,
        av: &AddressVector,
        arrival: &Arrival<'_>,
    ) -> Result<bool, Outcome> {
        let endpoint = self.qps.get(qp).map(|q| q.endpoint);
        let endpoint = endpoint.and_then(|e| self.endpoints.get(e));
        let Some(endpoint) = endpoint.filter(|e| e.underlay.is_some()) else {
            return Err(Outcome::LocalQpOperation);
        };
        if av.sgid_index != GID_INDEX {
            return Err(Outcome::LocalQpOperation);
        }
        let host = host(endpoint, av);
        match host.filter(|host| !self.network.map.segments.contains_key(host)) {
            Some(host) => self.send_datagram(qp, host, to, &[], arrival),
            None => Ok(false),
        }
    }

    /// A datagram has come from a host that is not of the map.
    pub(super) fn on_stock_datagram(&mut self, packet: &Received<'_>) {
        let qp = self.by_qpn.get(&packet.headers.bth.dest_qp).copied();
        let Some((qp, q)) = qp.and_then(|qp| Some((qp, self.qps.get(qp)?))) else {
            self.network.drops.unknown_qp += 1;
            return;
        };
        let endpoint = self.endpoints.get(q.endpoint);
        let Some(to) = endpoint.and_then(Endpoint::underlay_gid) else {
            self.network.drops.wrong_host += 1;
            return;
        };
        let source = Gid::from(VirtualIp(packet.src));
        let av = AddressVector {
            dgid: to,
            ..AddressVector::default()
        };
        let grh = grh_bytes(source, &av, packet.payload.len() as u64);
        if !self.on_arrival(qp, packet, (source, to), &grh, packet.payload) {
            self.network.drops.not_taken += 1;
        }
    }
}
