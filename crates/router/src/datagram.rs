//! Datagrams: to whom they go, and how they are received.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use freeflow_session::Handle;
use freeflow_shm::CompletionEntry;
use freeflow_transport::Outcome;
use freeflow_types::{
    AddressVector, GRH_BYTES, Gid, Opcode, QpType, Qpn, SendFlags, VirtualIp, WcFlags, WcOpcode,
    WcStatus,
};

use crate::data::{Fault, Source, Span};
use crate::engine::Engine;
use crate::exec::Request;
use crate::objects::QpObject;

/// What stands in front of each datagram that is received.
pub(crate) type Grh = [u8; GRH_BYTES as usize];

/// A datagram that arrives at queue pairs of this host.
pub(crate) struct Arrival<'a> {
    pub(crate) source: Gid,
    pub(crate) to: Gid,
    pub(crate) src_qpn: u32,
    pub(crate) qkey: u32,
    /// As the completion has it.
    pub(crate) imm: Option<u32>,
    pub(crate) solicited: bool,
    pub(crate) grh: &'a Grh,
    pub(crate) len: u64,
    pub(crate) data: Source<'a>,
}

impl Engine {
    /// Sends a datagram to whom it is for, on this host or another one, or drops it without a word
    /// (IBTA volume 1, 9.8.3).
    pub(crate) fn datagram(
        &mut self,
        qp: Handle,
        request: &Request,
        near: &[Span],
        far: &mut Vec<Span>,
    ) -> Result<Outcome, Outcome> {
        let q = self.qps.get(qp).ok_or(Outcome::LocalQpOperation)?;
        let (from, entry, to) = (q.endpoint, &request.entry, request.entry.av.dgid);
        let e = self.endpoints.get(from).ok_or(Outcome::LocalQpOperation)?;
        // A Q_Key with its high bit set means that of the QP (IBTA volume 1, 10.2.5).
        let qkey = if entry.remote_qkey >> 31 != 0 {
            q.transport.attr().qkey
        } else {
            entry.remote_qkey
        };
        let grh = grh_bytes(e.gid, &entry.av, request.len);
        let arrival = Arrival {
            source: e.gid,
            to,
            src_qpn: q.qpn.get(),
            qkey,
            imm: (request.opcode == Some(Opcode::SendImm)).then_some(entry.imm),
            solicited: request.flags.contains(SendFlags::SOLICITED),
            grh: &grh,
            len: request.len,
            data: if request.flags.contains(SendFlags::INLINE) {
                Source::Bytes(&request.inline)
            } else {
                Source::Spans(near)
            },
        };
        let mut delivered = false;
        if entry.av.sgid_index != 0 {
            delivered = self.datagram_to_stock(qp, entry.remote_qpn, &entry.av, &arrival)?;
        } else if to.is_multicast() && entry.remote_qpn == Qpn::MULTICAST.get() {
            for member in self.groups.members(e.tenant, to).to_vec() {
                delivered |= self.deliver(member, &arrival, far)?;
            }
            delivered |= self.multicast_abroad(qp, &arrival)?;
        } else if self.by_gid.contains_key(&(e.tenant, to)) {
            if let Some(to) = self.find(from, to, entry.remote_qpn) {
                delivered = self.deliver(to, &arrival, far)?;
            }
        } else {
            delivered = self.datagram_abroad(qp, entry.remote_qpn, &arrival)?;
        }
        if !delivered && let Some(e) = self.endpoints.get_mut(from) {
            e.counters.dropped_datagrams += 1;
        }
        Ok(Outcome::Delivered)
    }

    /// Delivers a datagram to one queue pair; false if it does not take it.
    pub(crate) fn deliver(
        &mut self,
        to: Handle,
        arrival: &Arrival<'_>,
        far: &mut Vec<Span>,
    ) -> Result<bool, Outcome> {
        let takes = |p: &QpObject| {
            let attr = p.transport.attr();
            !self.has_ended(p.session)
                && p.qp_type == QpType::Ud
                && p.transport.may_receive()
                && attr.qkey == arrival.qkey
        };
        let srq = self.qps.get(to).and_then(|p| p.srq);
        if !self.qps.get(to).is_some_and(takes) || self.take_recv(to, srq).is_err() {
            return Ok(false);
        }
        let (grh, len) = (u64::from(GRH_BYTES), arrival.len);
        far.clear();
        if self
            .recv_spans(QpType::Ud, to, len, 0, len, grh, far)
            .is_err()
        {
            // The buffer was too short, or not the receiver's to write: its request has failed.
            return Ok(false);
        }
        let copied = self.copy(far, arrival.data);
        if copied == Err(Fault::Source) {
            return Err(Outcome::LocalProtection);
        }
        let mut header = Vec::new();
        let fits = self.recv_spans(QpType::Ud, to, 0, 0, grh, 0, &mut header);
        if copied.is_ok() && fits.is_ok() {
            let _ = self.copy(&header, Source::Bytes(arrival.grh));
        }
        let imm = match arrival.imm {
            Some(_) => WcFlags::WITH_IMM,
            None => WcFlags::empty(),
        };
        let with = CompletionEntry {
            byte_len: GRH_BYTES + len as u32,
            imm: arrival.imm.unwrap_or(0),
            wc_flags: (WcFlags::GRH | imm).bits(),
            src_qp: arrival.src_qpn,
            sl: packet_type(arrival.source, arrival.to),
            ..CompletionEntry::default()
        };
        let status = match copied {
            Ok(()) => WcStatus::Success,
            Err(_) => WcStatus::LocProtErr,
        };
        self.finish_recv(to, status, WcOpcode::Recv, &with, arrival.solicited);
        let endpoint = self.qps.get(to).map(|p| p.endpoint);
        if let Some(e) = endpoint.and_then(|e| self.endpoints.get_mut(e)) {
            e.counters.received_messages += 1;
            e.counters.received_bytes += len;
        }
        Ok(copied.is_ok())
    }
}

fn v4(gid: Gid) -> Option<Ipv4Addr> {
    Ipv6Addr::from(gid.0).to_ipv4_mapped()
}

/// What the completion of a datagram says in place of a service level, which RoCEv2's packets do
/// not carry: the type of the packet (IBTA annex A17.4.5.1). The verbs have no field for it; it
/// stands where mlx5 puts it and UCX looks for it: bit 3 for UDP, then 1 for IPv6, 2 for IPv4.
fn packet_type(source: Gid, to: Gid) -> u8 {
    let is_v4 = v4(source).is_some() && v4(to).is_some();
    8 | if is_v4 { 2 } else { 1 }
}

/// The 40 bytes in front of a datagram: for IPv4 20 bytes of zeroes and the IPv4 header, for IPv6
/// its header (IBTA annex A17, RoCEv2).
pub(crate) fn grh_bytes(source: Gid, av: &AddressVector, payload: u64) -> Grh {
    /// BTH, DETH, the payload's padding and ICRC, behind a UDP header.
    const UDP_AND_TRANSPORT: u64 = 8 + 12 + 8 + 4;
    let mut grh = [0; GRH_BYTES as usize];
    let to = av.dgid;
    let length = UDP_AND_TRANSPORT + payload.next_multiple_of(4);
    let hops = if av.hop_limit == 0 { 64 } else { av.hop_limit };
    const UDP: u8 = 17;
    if let (Some(from), Some(to)) = (v4(source), v4(to)) {
        let ip = &mut grh[20..];
        ip[0] = 0x45;
        ip[1] = av.traffic_class;
        ip[2..4].copy_from_slice(&((length + 20) as u16).to_be_bytes());
        ip[6] = 0x40;
        ip[8] = hops;
        ip[9] = UDP;
        ip[12..16].copy_from_slice(&from.octets());
        ip[16..20].copy_from_slice(&to.octets());
        let sum: u32 = ip
            .chunks(2)
            .map(|b| u32::from(u16::from_be_bytes([b[0], b[1]])))
            .sum();
        let folded = (sum & 0xFFFF) + (sum >> 16);
        let folded = (folded & 0xFFFF) + (folded >> 16);
        ip[10..12].copy_from_slice(&(!folded as u16).to_be_bytes());
    } else {
        let label = 6 << 28 | u32::from(av.traffic_class) << 20 | av.flow_label & 0xF_FFFF;
        grh[..4].copy_from_slice(&label.to_be_bytes());
        grh[4..6].copy_from_slice(&(length as u16).to_be_bytes());
        grh[6] = UDP;
        grh[7] = hops;
        grh[8..24].copy_from_slice(&source.0);
        grh[24..40].copy_from_slice(&to.0);
    }
    grh
}

/// Source and destination of such a header; `None` if it is none.
pub(crate) fn grh_addresses(grh: &Grh) -> Option<(Gid, Gid)> {
    let gid = |at: usize| {
        let bytes = grh.get(at..at + 16)?.try_into();
        bytes.ok().map(Gid)
    };
    let v4 = |at: usize| {
        let bytes: [u8; 4] = grh.get(at..at + 4)?.try_into().ok()?;
        Some(Gid::from(VirtualIp(IpAddr::from(bytes))))
    };
    let (front, ip) = grh.split_at(20);
    match (grh[0] >> 4, ip[0]) {
        (6, _) => Some((gid(8)?, gid(24)?)),
        (0, 0x45) if front.iter().all(|&b| b == 0) => Some((v4(32)?, v4(36)?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_types::VirtualIp;

    fn gid(ip: &str) -> Gid {
        VirtualIp(ip.parse().unwrap()).into()
    }

    #[test]
    fn ipv4_header_sits_in_the_last_20_bytes() {
        let av = AddressVector {
            dgid: gid("10.0.0.2"),
            traffic_class: 4,
            ..Default::default()
        };
        let grh = grh_bytes(gid("10.0.0.1"), &av, 5);
        assert_eq!(packet_type(gid("10.0.0.1"), av.dgid), 10);
        assert_eq!(grh[..20], [0; 20]);
        let ip = &grh[20..];
        assert_eq!((ip[0], ip[1], ip[8], ip[9]), (0x45, 4, 64, 17));
        assert_eq!(ip[12..], [10, 0, 0, 1, 10, 0, 0, 2]);
        assert_eq!(u16::from_be_bytes([ip[2], ip[3]]), 20 + 8 + 12 + 8 + 8 + 4);
        let sum: u32 = ip
            .chunks(2)
            .map(|b| u32::from(u16::from_be_bytes([b[0], b[1]])))
            .sum();
        assert_eq!((sum & 0xFFFF) + (sum >> 16), 0xFFFF);
        let both = (gid("10.0.0.1"), gid("10.0.0.2"));
        assert_eq!(grh_addresses(&grh), Some(both));
    }

    #[test]
    fn ipv6_header_fills_it() {
        let av = AddressVector {
            dgid: gid("fd00::2"),
            hop_limit: 9,
            ..Default::default()
        };
        let grh = grh_bytes(gid("fd00::1"), &av, 0);
        assert_eq!(packet_type(gid("fd00::1"), av.dgid), 9);
        assert_eq!((grh[0] >> 4, grh[6], grh[7]), (6, 17, 9));
        assert_eq!(Gid(grh[8..24].try_into().unwrap()), gid("fd00::1"));
        let both = (gid("fd00::1"), gid("fd00::2"));
        assert_eq!(grh_addresses(&grh), Some(both));
        assert_eq!(grh_addresses(&[0x41; 40]), None);
        assert_eq!(grh_addresses(&[0; 40]), None);
    }
}
