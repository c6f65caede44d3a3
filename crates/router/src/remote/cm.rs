//! The connection manager's datagrams to and from other hosts: between queue pairs 1, which are
//! nobody's. To a FreeFlow router they have the endpoints' addresses and the tenant's name in
//! front, as multicast datagrams have; to others, nothing.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};

use freeflow_cm::{Arrival, Port, answer_for_the_gone};
use freeflow_fabric_udp::{Ecn, Received, To};
use freeflow_transport::{Datagrams, Destination, Work, accept_datagram};
use freeflow_types::{AddressVector, GRH_BYTES, Gid, Opcode, VirtualIp};
use freeflow_wire::cm::{QKEY, QPN};

use super::{Network, Payload};
use crate::datagram::{grh_addresses, grh_bytes};
use crate::engine::Engine;
use crate::remote::datagrams::{tag, untag};

/// Datagrams that wait to be sent; more are lost, and will be repeated.
const MAX_WAITING: usize = 4096;

/// The name in front of a datagram that is of no tenant: between underlay's addresses.
const NO_TENANT: &str = "";

/// A message as it goes to another router: behind its ends' addresses, and the tenant's name.
fn in_front(from: Gid, to: Gid, tenant: &str, mad: &[u8]) -> Vec<u8> {
    let av = AddressVector {
        dgid: to,
        ..AddressVector::default()
    };
    let grh = grh_bytes(from, &av, mad.len() as u64);
    [&grh[..], &tag(tenant), mad].concat()
}

/// Datagrams on their way to other hosts.
pub(crate) struct Abroad {
    datagrams: Datagrams,
    waiting: VecDeque<Waiting>,
}

/// A datagram that waits until the sockets are at hand.
pub(crate) struct Waiting {
    pub(crate) host: IpAddr,
    /// Addresses, tenant and message.
    pub(crate) payload: Vec<u8>,
}

impl Default for Abroad {
    fn default() -> Self {
        Abroad {
            datagrams: Datagrams::new(0),
            waiting: VecDeque::new(),
        }
    }
}

impl Abroad {
    fn push(&mut self, host: IpAddr, payload: Vec<u8>) {
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push_back(Waiting { host, payload });
        }
    }

    /// What waits, in place of its being sent.
    #[cfg(test)]
    pub(crate) fn take(&mut self) -> Vec<Waiting> {
        self.waiting.drain(..).collect()
    }
}

impl Network {
    /// Whether another host has an endpoint of a tenant, as far as the map tells.
    pub(crate) fn has_way(&self, tenant: &str, gid: Gid) -> bool {
        self.map.find(tenant, gid).is_some()
    }

    /// Whether an endpoint of a tenant, if there is one, is on this host: no map that may have changed
    /// can have had it elsewhere.
    pub(crate) fn is_own(&self, tenant: &str, gid: Gid) -> bool {
        !self.had_others || self.map.gives_here(tenant, gid)
    }
}

impl Engine {
    /// Sends a message of the connection manager to a port that is not here, if it is known where
    /// that is.
    pub(crate) fn cm_abroad(&mut self, from: &Port, to: Gid, mad: &[u8]) {
        let Some(e) = self.endpoints.get(from.endpoint) else {
            return;
        };
        let (host, tenant) = if from.index == 0 {
            let tenant = e.tenant_name.as_str();
            (self.network.map.find(tenant, to), tenant)
        } else {
            let ip = Ipv6Addr::from(to.0).to_canonical();
            let host = VirtualIp(ip).is_assignable().then_some(ip);
            (host, NO_TENANT)
        };
        let Some(host) = host else { return };
        // It is repeated; until then there may be a link.
        if from.index == 0 && !self.network.peers.believes(host) {
            return;
        }
        let payload = if self.network.map.segments.contains_key(&host) {
            in_front(from.gid, to, tenant, mad)
        } else {
            mad.to_vec()
        };
        self.cm.abroad.push(host, payload);
    }

    /// Whether there is something that can be sent now.
    pub(crate) fn has_cm_mail(&self) -> bool {
        !self.network.full && self.network.fabric.is_some() && !self.cm.abroad.waiting.is_empty()
    }

    /// Sends what waits, unless packets are just being received: then it is sent after that.
    pub(crate) fn flush_cm(&mut self) {
        if self.cm.abroad.waiting.is_empty() {
            return;
        }
        let Some(mut fabric) = self.network.fabric.take() else {
            return;
        };
        // What there is no room for goes with a later round.
        while !self.network.full
            && let Some(one) = self.cm.abroad.waiting.pop_front()
        {
            let len = one.payload.len() as u32;
            let work = Work::new(Opcode::Send, len);
            let to = Destination {
                qpn: QPN,
                qkey: QKEY,
            };
            let Ok(headers) = self.cm.abroad.datagrams.send(&work, QPN, to, len) else {
                continue;
            };
            let way = To {
                dst: one.host,
                flow: QPN,
                ecn: Ecn::NotCapable,
            };
            // Its bytes are at hand.
            let _ = self.push(&mut fabric, &way, &headers, Payload::Bytes(&one.payload));
        }
        self.network.fabric = Some(fabric);
    }

    /// A datagram to queue pair 1 has come. Its CRC is right, and nothing else is certain.
    pub(super) fn on_cm_datagram(&mut self, packet: &Received<'_>) {
        let of_manager = accept_datagram(&packet.headers, QKEY).is_some_and(|d| d.src_qp == QPN);
        if !of_manager {
            self.network.drops.not_taken += 1;
            return;
        }
        let of_router = self.network.map.segments.contains_key(&packet.src);
        let host = Gid::from(VirtualIp(packet.src));
        let (arrival, mad) = if of_router {
            match self.addressed(packet, host) {
                Some(found) => found,
                None => return,
            }
        } else {
            let ports = self.underlay_ports();
            let source = host;
            (Arrival { ports, source }, packet.payload)
        };
        if arrival.ports.is_empty() {
            self.network.drops.unknown_qp += 1;
        } else if !self.receive_cm(&arrival, mad) {
            self.network.drops.not_taken += 1;
        }
        self.run_cm();
    }

    /// Nobody has the address that a message is for.
    fn answer_for_the_gone(&mut self, host: IpAddr, tenant: &str, ends: (Gid, Gid), mad: &[u8]) {
        if let Some(mad) = answer_for_the_gone(mad, true) {
            let (from, to) = ends;
            self.cm.abroad.push(host, in_front(from, to, tenant, &mad));
        }
    }

    /// For whom a datagram of another router is, by what stands in front of it.
    fn addressed<'p>(&mut self, packet: &Received<'p>, host: Gid) -> Option<(Arrival, &'p [u8])> {
        const GRH: usize = GRH_BYTES as usize;
        let front = packet.payload.split_first_chunk::<GRH>();
        let front = front.and_then(|(grh, rest)| Some((grh_addresses(grh)?, untag(rest)?)));
        let Some(((source, to), (tenant, mad))) = front else {
            self.network.drops.no_address += 1;
            return None;
        };
        if tenant == NO_TENANT {
            // Of the hosts' own addresses.
            if source != host {
                self.network.drops.wrong_host += 1;
                return None;
            }
            let mut ports = self.underlay_ports();
            ports.retain(|port| port.gid == to);
            return Some((Arrival { ports, source }, mad));
        }
        if !self.network.peers.believes(packet.src) {
            self.network.drops.no_link += 1;
            return None;
        }
        // None: no endpoint of the tenant was ever here.
        let id = self.tenants.get(tenant).copied();
        let believed = match id {
            Some(id) => self.speaks_for(packet.src, (id, tenant), source),
            None => self.network.map.find(tenant, source) == Some(packet.src),
        };
        if !believed {
            match id {
                Some(_) => self.network.drops.wrong_host += 1,
                None => self.network.drops.unknown_qp += 1,
            }
            return None;
        }
        let here = id.and_then(|id| self.by_gid.get(&(id, to)).copied());
        if here.is_none() {
            self.answer_for_the_gone(packet.src, tenant, (to, source), mad);
        }
        let ports = here.and_then(|e| self.cm_port(e, 0)).into_iter().collect();
        Some((Arrival { ports, source }, mad))
    }
}
