//! The receiving side of the routed placement, and flushing.

use std::net::{Ipv4Addr, Ipv6Addr};

use freeflow_session::Handle;
use freeflow_shm::{CompletionEntry, RecvEntry, SendEntry};
use freeflow_transport::{Nak, Outcome};
use freeflow_types::{
    Access, AsyncEventType, GRH_BYTES, Gid, Opcode, QpState, QpType, Qpn, SendFlags, WcFlags,
    WcOpcode, WcStatus,
};

use crate::EndReason;
use crate::data::{Fault, Source, Span};
use crate::engine::Engine;
use crate::exec::{Request, Step};
use crate::objects::{QpObject, TakenRecv};

impl Engine {
    /// Takes the next receive request of a queue pair, or of a shared receive queue for it,
    /// unless one is taken already.
    pub(crate) fn take_recv(&mut self, qp: Handle, srq: Option<Handle>) -> Result<(), Outcome> {
        let q = self.qps.get_mut(qp).ok_or(Outcome::NoResponse)?;
        if q.taken.is_some() {
            return Ok(());
        }
        if let Some(srq) = srq {
            return self.take_shared(qp, srq);
        }
        let timer_code = q.transport.attr().min_rnr_timer;
        let Some(rings) = q.rings() else {
            return Err(Outcome::NoResponse);
        };
        let head = q.recv_head;
        if rings.recv_produced() == head && !rings.want_recv(head) {
            return Err(Outcome::ReceiverNotReady { timer_code });
        }
        match q.next_recv() {
            Ok(Some(taken)) => {
                q.taken = Some(taken);
                Ok(())
            }
            Ok(None) => Err(Outcome::ReceiverNotReady { timer_code }),
            Err(waiting) => {
                let (session, qpn) = (q.session, q.qpn.get());
                self.condemn(session, EndReason::RecvIndex { qpn, waiting });
                Err(Outcome::NoResponse)
            }
        }
    }

    /// Spans of the receive request that was taken, for a part of a message of `total` bytes, as
    /// far as is known, that starts `headroom` bytes into the buffer. If the buffer will not do, the receive request fails,
    /// and the sender learns so.
    #[expect(
        clippy::too_many_arguments,
        reason = "one call site each for RC/UC and UD"
    )]
    pub(crate) fn recv_spans(
        &mut self,
        sender: QpType,
        qp: Handle,
        total: u64,
        done: u64,
        part: u64,
        headroom: u64,
        out: &mut Vec<Span>,
    ) -> Result<(), Outcome> {
        let q = self.qps.get(qp).ok_or(Outcome::NoResponse)?;
        let taken = q.taken.as_ref().ok_or(Outcome::NoResponse)?;
        let room: u64 = taken.sges.iter().map(|s| u64::from(s.length)).sum();
        let shared = taken.slot == CompletionEntry::SHARED;
        if room < headroom + total && !sender.is_reliable() && !shared {
            // Anybody may send a datagram: one that does not fit must not stop its receiver. The
            // request stays for the next message (IBTA volume 1, 9.9.3, class D).
            return Err(Outcome::Delivered);
        }
        let (status, outcome) = if room < headroom + total {
            (WcStatus::LocLenErr, Outcome::RemoteInvalidRequest)
        } else {
            let range = (headroom + done, part);
            match self.taken_spans(qp, range, out) {
                Some(()) => return Ok(()),
                None => (WcStatus::LocProtErr, Outcome::RemoteOperation),
            }
        };
        self.finish_recv(
            qp,
            status,
            WcOpcode::Recv,
            &CompletionEntry::default(),
            false,
        );
        self.enter_error(qp, None);
        // Only a reliable sender is told.
        Err(if sender.is_reliable() {
            outcome
        } else {
            Outcome::Delivered
        })
    }

    /// Spans of a part of the receive request that was taken.
    fn taken_spans(&mut self, qp: Handle, range: (u64, u64), out: &mut Vec<Span>) -> Option<()> {
        // To look for its regions may change the engine.
        let taken = self.qps.get_mut(qp)?.taken.take()?;
        let found = self.local_spans(taken.pd, &taken.sges, Access::LOCAL_WRITE, range, out);
        self.qps.get_mut(qp)?.taken = Some(taken);
        found
    }

    /// Completes the receive request that was taken.
    fn finish_recv(
        &mut self,
        qp: Handle,
        status: WcStatus,
        opcode: WcOpcode,
        with: &CompletionEntry,
        solicited: bool,
    ) {
        let now = self.now;
        let Some(q) = self.qps.get_mut(qp) else {
            return;
        };
        let Some(taken) = q.taken.take() else { return };
        let entry = CompletionEntry {
            wr_id: taken.wr_id,
            status: status.raw() as u8,
            opcode: opcode.raw() as u8,
            qpn: q.qpn.get(),
            slot: taken.slot,
            is_send: false,
            retired: taken.retired,
            timestamp: now,
            ..*with
        };
        if taken.slot == CompletionEntry::SHARED && !self.is_srq(taken.retired) {
            // Its queue is destroyed, and its completions with it.
            return;
        }
        self.complete(taken.cq, &entry, solicited);
    }

    /// A message of a connected peer has arrived in full.
    pub(crate) fn accept(&mut self, qp: Handle, request: &Request, opcode: Opcode) {
        let Some(q) = self.qps.get_mut(qp) else {
            return;
        };
        q.transport.received(opcode, request.len);
        let endpoint = q.endpoint;
        let first = !std::mem::replace(&mut q.established, true);
        let early = first && q.transport.state() == QpState::Rtr;
        if opcode.consumes_recv() {
            let mut with = CompletionEntry {
                byte_len: request.len as u32,
                ..Default::default()
            };
            if opcode.has_imm() {
                with.imm = request.entry.imm;
                with.wc_flags = WcFlags::WITH_IMM.bits();
            }
            let mut status = WcStatus::Success;
            if opcode == Opcode::SendInv {
                if self.invalidate(qp, request.entry.imm).is_some() {
                    with.imm = request.entry.imm;
                    with.wc_flags = WcFlags::WITH_INV.bits();
                } else {
                    status = WcStatus::RemInvReqErr;
                }
            }
            let wc = if opcode == Opcode::RdmaWriteImm {
                WcOpcode::RecvRdmaWithImm
            } else {
                WcOpcode::Recv
            };
            let solicited = request.flags.contains(SendFlags::SOLICITED);
            self.finish_recv(qp, status, wc, &with, solicited);
            if status != WcStatus::Success {
                // The message itself is acknowledged (IBTA volume 1, 9.9.3.1, class J).
                self.enter_error(qp, None);
            }
        }
        if early {
            self.qp_event(qp, AsyncEventType::CommEst);
        }
        if let Some(e) = self.endpoints.get_mut(endpoint) {
            e.counters.received_messages += 1;
            e.counters.received_bytes += request.len;
        }
    }

    /// A responder refuses a request. Of an unreliable sender's it drops it without a word: the
    /// sender has sent it, and the next message finds the responder as it was (IBTA volume 1,
    /// 9.9.3.1, class D).
    pub(crate) fn refuse(&mut self, sender: QpType, qp: Handle, nak: Nak) -> Outcome {
        if !sender.is_reliable() {
            return Outcome::Delivered;
        }
        self.nak(qp, nak.event());
        nak.outcome()
    }

    /// A request was refused at the responder; a reliable one enters the error state (IBTA
    /// volume 1, 9.9.3.1, class C).
    pub(crate) fn nak(&mut self, qp: Handle, event: Option<AsyncEventType>) {
        let Some(q) = self.qps.get(qp) else { return };
        if q.qp_type.is_reliable() {
            if q.taken.is_some() {
                self.finish_recv(
                    qp,
                    WcStatus::WrFlushErr,
                    WcOpcode::Recv,
                    &CompletionEntry::default(),
                    false,
                );
            }
            self.enter_error(qp, event);
        }
    }

    /// Delivers a datagram to whom it is for, or drops it without a word (IBTA volume 1, 9.8.3).
    pub(crate) fn datagram(
        &mut self,
        qp: Handle,
        request: &Request,
        near: &[Span],
        far: &mut Vec<Span>,
    ) -> Result<Outcome, Outcome> {
        let q = self.qps.get(qp).ok_or(Outcome::LocalQpOperation)?;
        let (from, to) = (q.endpoint, request.entry.av.dgid);
        let mut delivered = false;
        if to.is_multicast() && request.entry.remote_qpn == Qpn::MULTICAST.get() {
            let tenant = self.endpoints.get(from).map(|e| e.tenant);
            let members = tenant.map(|t| self.groups.members(t, to).to_vec());
            for member in members.unwrap_or_default() {
                delivered |= self.deliver(qp, member, request, near, far)?;
            }
        } else if let Some(to) = self.find(from, to, request.entry.remote_qpn) {
            delivered = self.deliver(qp, to, request, near, far)?;
        }
        if !delivered && let Some(e) = self.endpoints.get_mut(from) {
            e.counters.dropped_datagrams += 1;
        }
        Ok(Outcome::Delivered)
    }

    /// Delivers a datagram to one queue pair; false if it does not take it.
    fn deliver(
        &mut self,
        qp: Handle,
        to: Handle,
        request: &Request,
        near: &[Span],
        far: &mut Vec<Span>,
    ) -> Result<bool, Outcome> {
        let q = self.qps.get(qp).ok_or(Outcome::LocalQpOperation)?;
        let (from, qpn, own_qkey) = (q.endpoint, q.qpn.get(), q.transport.attr().qkey);
        let entry = &request.entry;
        // A Q_Key with its high bit set means that of the QP (IBTA volume 1, 10.2.5).
        let qkey = if entry.remote_qkey >> 31 != 0 {
            own_qkey
        } else {
            entry.remote_qkey
        };
        let takes = |p: &QpObject| {
            let attr = p.transport.attr();
            p.qp_type == QpType::Ud && p.transport.may_receive() && attr.qkey == qkey
        };
        let srq = self.qps.get(to).and_then(|p| p.srq);
        if !self.qps.get(to).is_some_and(takes) || self.take_recv(to, srq).is_err() {
            return Ok(false);
        }
        let source = self.endpoints.get(from).map(|e| e.gid).unwrap_or_default();
        let grh = u64::from(GRH_BYTES);
        far.clear();
        if self
            .recv_spans(QpType::Ud, to, request.len, 0, request.len, grh, far)
            .is_err()
        {
            // The buffer was too short, or not the receiver's to write: its request has failed.
            return Ok(false);
        }
        let copied = if request.flags.contains(SendFlags::INLINE) {
            self.copy(far, Source::Bytes(&request.inline))
        } else {
            self.copy(far, Source::Spans(near))
        };
        if copied == Err(Fault::Source) {
            return Err(Outcome::LocalProtection);
        }
        let mut header = Vec::new();
        let fits = self.recv_spans(QpType::Ud, to, 0, 0, grh, 0, &mut header);
        if copied.is_ok() && fits.is_ok() {
            let bytes = grh_bytes(source, entry, request.len);
            let _ = self.copy(&header, Source::Bytes(&bytes));
        }
        let imm = if request.opcode == Some(Opcode::SendImm) {
            WcFlags::WITH_IMM
        } else {
            WcFlags::empty()
        };
        let with = CompletionEntry {
            byte_len: GRH_BYTES + request.len as u32,
            imm: entry.imm,
            wc_flags: (WcFlags::GRH | imm).bits(),
            src_qp: qpn,
            sl: packet_type(source, entry.av.dgid),
            ..CompletionEntry::default()
        };
        let solicited = request.flags.contains(SendFlags::SOLICITED);
        let status = match copied {
            Ok(()) => WcStatus::Success,
            Err(_) => WcStatus::LocProtErr,
        };
        self.finish_recv(to, status, WcOpcode::Recv, &with, solicited);
        let endpoint = self.qps.get(to).map(|p| p.endpoint);
        if let Some(e) = endpoint.and_then(|e| self.endpoints.get_mut(e)) {
            e.counters.received_messages += 1;
            e.counters.received_bytes += request.len;
        }
        Ok(copied.is_ok())
    }

    /// Flushes one request of a queue pair in error: receive requests too, if `both`.
    pub(crate) fn flush(&mut self, qp: Handle, both: bool) -> Step {
        let now = self.now;
        let Some(q) = self.qps.get_mut(qp) else {
            return Step::Nothing;
        };
        q.current = None;
        let flushed = CompletionEntry {
            status: WcStatus::WrFlushErr.raw() as u8,
            qpn: q.qpn.get(),
            slot: q.slot,
            timestamp: now,
            ..CompletionEntry::default()
        };
        let Some(rings) = q.rings() else {
            return self.flush_taken(qp);
        };
        let waiting = rings.send_produced().wrapping_sub(q.send_head);
        if waiting > q.send_entries() {
            let (session, qpn) = (q.session, q.qpn.get());
            self.condemn(session, EndReason::SendIndex { qpn, waiting });
            return Step::Nothing;
        }
        if waiting != 0 {
            let request = SendEntry::load(q.qp_type, rings.send_slot(q.send_head));
            let opcode = Opcode::from_raw(request.opcode.into()).unwrap_or(Opcode::Send);
            q.send_head = q.send_head.wrapping_add(1);
            let entry = CompletionEntry {
                wr_id: request.wr_id,
                opcode: opcode.wc().raw() as u8,
                is_send: true,
                retired: q.send_head,
                ..flushed
            };
            let cq = q.send_cq;
            self.complete(cq, &entry, false);
            return Step::Done(0);
        }
        if !both {
            return Step::Nothing;
        }
        if q.taken.is_some() {
            return self.flush_taken(qp);
        }
        if q.srq.is_some() {
            return self.tell_last_wqe(qp);
        }
        let head = q.recv_head;
        if rings.recv_produced() == head && !rings.want_recv(head) {
            return Step::Nothing;
        }
        match q.next_recv() {
            Ok(Some(taken)) => {
                let (wr_id, retired) = (taken.wr_id, taken.retired);
                let opcode = WcOpcode::Recv.raw() as u8;
                let entry = CompletionEntry {
                    wr_id,
                    opcode,
                    retired,
                    ..flushed
                };
                let cq = q.recv_cq;
                self.complete(cq, &entry, false);
                Step::Done(0)
            }
            Ok(None) => Step::Nothing,
            Err(waiting) => {
                let (session, qpn) = (q.session, q.qpn.get());
                self.condemn(session, EndReason::RecvIndex { qpn, waiting });
                Step::Nothing
            }
        }
    }

    /// Flushes the receive request that a message had begun to fill.
    fn flush_taken(&mut self, qp: Handle) -> Step {
        if self.qps.get(qp).is_none_or(|q| q.taken.is_none()) {
            return Step::Nothing;
        }
        let with = CompletionEntry::default();
        self.finish_recv(qp, WcStatus::WrFlushErr, WcOpcode::Recv, &with, false);
        Step::Done(0)
    }
}

impl QpObject {
    /// Copies the next receive request; the error is an impossible number of them.
    fn next_recv(&mut self) -> Result<Option<TakenRecv>, u64> {
        let (Some(rings), Some(at)) = (self.rings(), &self.rings) else {
            return Ok(None);
        };
        let waiting = rings.recv_produced().wrapping_sub(self.recv_head);
        if waiting > u64::from(at.geometry.recv_entries()) {
            return Err(waiting);
        }
        if waiting == 0 {
            return Ok(None);
        }
        let mut sges = Vec::new();
        let entry = RecvEntry::load(rings.recv_slot(self.recv_head), &mut sges);
        self.recv_head = self.recv_head.wrapping_add(1);
        Ok(Some(TakenRecv {
            wr_id: entry.wr_id,
            pd: self.pd,
            cq: self.recv_cq,
            slot: self.slot,
            retired: self.recv_head,
            sges,
        }))
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
fn grh_bytes(source: Gid, entry: &SendEntry, payload: u64) -> [u8; GRH_BYTES as usize] {
    /// BTH, DETH, the payload's padding and ICRC, behind a UDP header.
    const UDP_AND_TRANSPORT: u64 = 8 + 12 + 8 + 4;
    let mut grh = [0; GRH_BYTES as usize];
    let (to, av) = (entry.av.dgid, &entry.av);
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

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_types::{AddressVector, VirtualIp};

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
        let entry = SendEntry {
            av,
            ..SendEntry::default()
        };
        let grh = grh_bytes(gid("10.0.0.1"), &entry, 5);
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
    }

    #[test]
    fn ipv6_header_fills_it() {
        let av = AddressVector {
            dgid: gid("fd00::2"),
            hop_limit: 9,
            ..Default::default()
        };
        let entry = SendEntry {
            av,
            ..SendEntry::default()
        };
        let grh = grh_bytes(gid("fd00::1"), &entry, 0);
        assert_eq!(packet_type(gid("fd00::1"), av.dgid), 9);
        assert_eq!((grh[0] >> 4, grh[6], grh[7]), (6, 17, 9));
        assert_eq!(Gid(grh[8..24].try_into().unwrap()), gid("fd00::1"));
    }
}
