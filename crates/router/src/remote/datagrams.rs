//! Datagrams to and from other hosts: one packet each, with the endpoints' addresses, as the
//! receiver is to see them, in front of its data.

use std::net::IpAddr;

use freeflow_fabric_udp::{Ecn, Received, To};
use freeflow_session::Handle;
use freeflow_transport::{Datagrams, Destination, Outcome, Work, accept_datagram};
use freeflow_types::{GRH_BYTES, Gid, Opcode, Qpn, TenantId};

use crate::data::Source;
use crate::datagram::{Arrival, Grh, grh_addresses};
use crate::engine::Engine;
use crate::remote::Payload;

impl Engine {
    /// Sends a datagram to a queue pair of an endpoint that is not here; whether it went.
    pub(crate) fn datagram_abroad(
        &mut self,
        qp: Handle,
        to: u32,
        arrival: &Arrival<'_>,
    ) -> Result<bool, Outcome> {
        let endpoint = self.qps.get(qp).map(|q| q.endpoint);
        let e = endpoint.and_then(|e| self.endpoints.get(e));
        let host = e.and_then(|e| self.network.find(&e.tenant_name, arrival.to));
        match host {
            Some(host) => self.send_addressed(qp, host, to, &[], arrival),
            None => Ok(false),
        }
    }

    /// Sends a datagram to the other hosts that may have members of its group; whether it went to
    /// any.
    pub(crate) fn multicast_abroad(
        &mut self,
        qp: Handle,
        arrival: &Arrival<'_>,
    ) -> Result<bool, Outcome> {
        let endpoint = self.qps.get(qp).map(|q| q.endpoint);
        let Some(e) = endpoint.and_then(|e| self.endpoints.get(e)) else {
            return Ok(false);
        };
        if self.network.fabric.is_none() {
            return Ok(false);
        }
        let tag = tag(&e.tenant_name);
        let hosts: Vec<_> = self.network.map.others(&e.tenant_name).collect();
        let mut sent = false;
        for host in hosts {
            sent |= self.send_addressed(qp, host, Qpn::MULTICAST.get(), &tag, arrival)?;
        }
        Ok(sent)
    }

    /// Sends a datagram to another router, with its addresses and a tag in front.
    fn send_addressed(
        &mut self,
        qp: Handle,
        host: IpAddr,
        to: u32,
        tag: &[u8],
        arrival: &Arrival<'_>,
    ) -> Result<bool, Outcome> {
        let head = [&arrival.grh[..], tag].concat();
        let network = &self.network;
        let len = head.len() + arrival.len as usize;
        if !network.map.carries(host, len) || !network.peers.takes(host, len) {
            return Ok(false);
        }
        self.send_datagram(qp, host, to, &head, arrival)
    }

    /// Sends a datagram with something in front of its data; whether it went.
    pub(super) fn send_datagram(
        &mut self,
        qp: Handle,
        host: IpAddr,
        to: u32,
        head: &[u8],
        arrival: &Arrival<'_>,
    ) -> Result<bool, Outcome> {
        let len = arrival.len as usize;
        let longest = self.network.mtu().bytes();
        let q = self.qps.get_mut(qp).ok_or(Outcome::LocalQpOperation)?;
        let sq_psn = q.transport.attr().sq_psn;
        let opcode = match arrival.imm {
            Some(_) => Opcode::SendImm,
            None => Opcode::Send,
        };
        let mut work = Work::new(opcode, arrival.len as u32);
        work.imm = arrival.imm.unwrap_or(0).to_ne_bytes();
        work.solicited = arrival.solicited;
        let destination = Destination {
            qpn: to,
            qkey: arrival.qkey,
        };
        let headers = q
            .datagrams
            .get_or_insert_with(|| Datagrams::new(sq_psn))
            .send(&work, arrival.src_qpn, destination, longest)
            .map_err(|_| Outcome::LocalLength)?;
        let Some(mut fabric) = self.network.fabric.take() else {
            return Ok(false);
        };
        let way = To {
            dst: host,
            flow: arrival.src_qpn ^ to,
            ecn: Ecn::NotCapable,
        };
        let data = match arrival.data {
            Source::Bytes(bytes) => Payload::Bytes(bytes),
            Source::Spans(spans) => Payload::Spans(spans, 0, len),
        };
        let pushed = self.push(&mut fabric, &way, &headers, Payload::Behind(head, &data));
        self.network.fabric = Some(fabric);
        pushed.map_err(|_| Outcome::LocalProtection).map(|()| true)
    }

    /// A datagram has come. Its CRC is right, and nothing else is certain.
    pub(super) fn on_datagram(&mut self, packet: &Received<'_>) {
        const GRH: usize = GRH_BYTES as usize;
        if packet.headers.bth.dest_qp == freeflow_wire::cm::QPN {
            return self.on_cm_datagram(packet);
        }
        if !self.network.map.segments.contains_key(&packet.src) {
            return self.on_stock_datagram(packet);
        }
        if !self.network.peers.believes(packet.src) {
            self.network.drops.no_link += 1;
            return;
        }
        let Some((grh, data)) = packet.payload.split_first_chunk::<GRH>() else {
            self.network.drops.no_address += 1;
            return;
        };
        let Some((source, to)) = grh_addresses(grh) else {
            self.network.drops.no_address += 1;
            return;
        };
        let dest_qp = packet.headers.bth.dest_qp;
        if dest_qp == Qpn::MULTICAST.get() {
            return self.on_multicast(packet, (source, to), grh, data);
        }
        let qp = self.by_qpn.get(&dest_qp).copied();
        let found = qp.and_then(|qp| Some((qp, self.qps.get(qp)?.endpoint)));
        let Some((qp, e)) = found.and_then(|(qp, e)| Some((qp, self.endpoints.get(e)?))) else {
            self.network.drops.unknown_qp += 1;
            return;
        };
        if e.gid != to {
            self.network.drops.unknown_qp += 1;
        } else if !self.speaks_for(packet.src, (e.tenant, &e.tenant_name), source) {
            self.network.drops.wrong_host += 1;
        } else if !self.on_arrival(qp, packet, (source, to), grh, data) {
            self.network.drops.not_taken += 1;
        }
    }

    fn on_multicast(
        &mut self,
        packet: &Received<'_>,
        addresses: (Gid, Gid),
        grh: &Grh,
        data: &[u8],
    ) {
        let (source, to) = addresses;
        let Some((tenant, data)) = untag(data).filter(|_| to.is_multicast()) else {
            self.network.drops.no_address += 1;
            return;
        };
        // Of a tenant that nobody here belongs to, nobody here is a member.
        let Some(&id) = self.tenants.get(tenant) else {
            self.network.drops.not_taken += 1;
            return;
        };
        if !self.speaks_for(packet.src, (id, tenant), source) {
            self.network.drops.wrong_host += 1;
            return;
        }
        let mut taken = false;
        for member in self.groups.members(id, to).to_vec() {
            taken |= self.on_arrival(member, packet, addresses, grh, data);
        }
        if !taken {
            self.network.drops.not_taken += 1;
        }
    }

    /// Whether the packets that an endpoint of a tenant sends come from this host.
    pub(super) fn speaks_for(
        &self,
        host: IpAddr,
        (tenant, name): (TenantId, &str),
        source: Gid,
    ) -> bool {
        let here = self.by_gid.contains_key(&(tenant, source));
        !here && self.network.map.find(name, source) == Some(host)
    }

    /// Gives a packet to a queue pair; whether it takes it.
    pub(super) fn on_arrival(
        &mut self,
        qp: Handle,
        packet: &Received<'_>,
        (source, to): (Gid, Gid),
        grh: &Grh,
        data: &[u8],
    ) -> bool {
        let Some(q) = self.qps.get(qp) else {
            return false;
        };
        let qkey = q.transport.attr().qkey;
        let Some(datagram) = accept_datagram(&packet.headers, qkey) else {
            return false;
        };
        let arrival = Arrival {
            source,
            to,
            src_qpn: datagram.src_qp,
            qkey,
            imm: datagram.imm.map(u32::from_ne_bytes),
            solicited: datagram.solicited,
            grh,
            len: data.len() as u64,
            data: Source::Bytes(data),
        };
        let (near, mut far) = std::mem::take(&mut self.spans);
        let taken = self.deliver(qp, &arrival, &mut far);
        self.spans = (near, far);
        taken == Ok(true)
    }
}

/// Which tenant's group a multicast datagram is for: its name, behind one byte that says how long
/// that is. Of other datagrams the receiver's endpoint tells it.
pub(super) fn tag(tenant: &str) -> Vec<u8> {
    let name = tenant.as_bytes();
    let len = u8::try_from(name.len()).unwrap_or(u8::MAX);
    let mut tag = vec![len];
    tag.extend(name.iter().take(len.into()));
    tag
}

/// The tenant's name, and what follows it.
pub(super) fn untag(data: &[u8]) -> Option<(&str, &[u8])> {
    let (&len, rest) = data.split_first()?;
    let (name, rest) = rest.split_at_checked(len.into())?;
    Some((std::str::from_utf8(name).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tenant_stands_in_front() {
        let packet = [&tag("default")[..], b"data"].concat();
        assert_eq!(untag(&packet), Some(("default", &b"data"[..])));
        assert_eq!(untag(&[]), None);
        assert_eq!(untag(b"\x05four"), None);
        assert_eq!(untag(b"\x02\xFF\xFF"), None);
    }
}
