//! What other hosts ask for: packets from the wire, executed against this host's memory.

use freeflow_fabric_udp::{Ecn, Received};
use freeflow_session::Handle;
use freeflow_shm::SendEntry;
use freeflow_transport::{
    Action, Execution, MessageEnd, Nak, Outcome, Refusal, Reply, Verdict, selective,
};
use freeflow_types::{Access, Opcode, QpState, QpType, SendFlags};
use freeflow_wire::{Headers, Service};

use crate::data::{Atomic, Source, Span};
use crate::engine::{Engine, TURN_BYTES};
use crate::exec::{Request, Step};
use crate::remote::{PACKETS_PER_STEP, Payload, ROUTERS_IDS, Remote, RoceFabric};

impl Engine {
    /// A packet has come. Its CRC is right, and nothing else is certain.
    pub(crate) fn on_packet(&mut self, packet: &Received<'_>, fabric: Option<&mut RoceFabric>) {
        let (headers, now) = (&packet.headers, self.now);
        if headers.bth.opcode.service() == Service::Ud {
            if headers.bth.header_crc {
                self.network.drops.damaged += 1;
                return;
            }
            return self.on_datagram(packet);
        }
        let Some(&qp) = self.by_qpn.get(&headers.bth.dest_qp) else {
            let late = fabric.is_some_and(|fabric| self.on_late_packet(packet, fabric));
            self.network.drops.unknown_qp += u64::from(!late);
            return;
        };
        let ended = self.qps.get(qp).is_none_or(|q| self.has_ended(q.session));
        let Some(q) = self.qps.get_mut(qp).filter(|_| !ended) else {
            return;
        };
        // Only the host that the peer's address belongs to speaks for it.
        let Some(mut remote) = q.remote.take_if(|r| r.host == packet.src) else {
            self.network.drops.wrong_host += 1;
            return;
        };
        if !self.network.hears(&remote) {
            q.remote = Some(remote);
            return;
        }
        // Limited members talk to full ones (IBTA volume 1, 10.9.3).
        if (headers.bth.pkey ^ remote.pkey) & 0x7FFF != 0 {
            q.remote = Some(remote);
            self.network.drops.wrong_tenant += 1;
            return;
        }
        let foreign = remote.is_router && packet.src.is_ipv4() && packet.ip_id >= ROUTERS_IDS;
        if foreign || headers.bth.header_crc && !remote.may_leave_payload_uncovered() {
            q.remote = Some(remote);
            self.network.drops.damaged += 1;
            return;
        }
        remote.heard = true;
        let receives = q.transport.may_receive();
        let marked = packet.ecn == Ecn::Congested;
        if headers.bth.opcode.is_response() {
            if matches!(q.transport.state(), QpState::Rts | QpState::Sqd) {
                if marked && let Some(requester) = &mut remote.requester {
                    requester.on_congestion();
                }
                self.on_answer(qp, &mut remote, headers, packet.payload);
            } else {
                self.network.drops.not_receiving += 1;
            }
        } else if receives || remote.responder.has_failed() {
            if marked {
                remote.responder.on_mark(now);
            }
            self.on_request(qp, &mut remote, headers, packet.payload);
        } else {
            self.network.drops.not_receiving += 1;
        }
        if let Some(q) = self.qps.get_mut(qp) {
            q.remote = Some(remote);
        }
        self.make_ready(qp);
    }

    fn on_request(&mut self, qp: Handle, remote: &mut Remote, headers: &Headers, payload: &[u8]) {
        self.judge(qp, remote, headers, payload);
        while let Some(number) = remote.responder.next_held() {
            let due = remote.held.remove(&number);
            let later = remote.held.split_off(&number);
            let passed = std::mem::replace(&mut remote.held, later);
            let gone = passed.values().chain(&due);
            remote.held_bytes -= gone.map(|(_, payload)| payload.len()).sum::<usize>();
            let Some((headers, payload)) = due else {
                break;
            };
            self.judge(qp, remote, &headers, &payload);
        }
    }

    fn judge(&mut self, qp: Handle, remote: &mut Remote, headers: &Headers, payload: &[u8]) {
        match remote.responder.on_request(headers, payload.len()) {
            Verdict::Execute(execution) => {
                let outcome = self.run(qp, &execution, payload);
                let refused = outcome.is_err_and(|why| why != Refusal::NotReady);
                self.network.drops.refused += u64::from(refused);
                remote.responder.finish(&execution, outcome);
            }
            Verdict::Hold(number)
                if remote.held.len() < selective::WINDOW as usize
                    && remote.held_bytes + payload.len() <= selective::HELD_BYTES as usize =>
            {
                remote.held_bytes += payload.len();
                let before = remote.held.insert(number, (*headers, payload.to_vec()));
                remote.held_bytes -= before.map_or(0, |(_, payload)| payload.len());
                remote.responder.hold(number);
            }
            Verdict::Invalid => {
                self.network.drops.refused += 1;
                self.nak(qp, Nak::InvalidRequest.event());
            }
            Verdict::Hold(_) | Verdict::Drop(_) => self.network.drops.useless += 1,
        }
    }

    /// Executes one packet's request.
    fn run(&mut self, qp: Handle, execution: &Execution, payload: &[u8]) -> Result<u64, Refusal> {
        let opcode = execution.opcode;
        let q = self.qps.get(qp).ok_or(Refusal::RemoteOperation)?;
        let qp_type = match q.qp_type {
            QpType::XrcRecv => QpType::XrcSend,
            same => same,
        };
        let rights = match execution.action {
            Action::Flush { spec, .. } => spec.types,
            _ => opcode.remote_rights(),
        };
        let takes = q.transport.check_request(opcode, rights);
        if execution.starts
            && let Err(nak) = takes
        {
            return Err(refusal(self.refuse(qp_type, qp, nak)));
        }
        let request = message(execution);
        let (pd, srq) = self.target(qp, &request).map_err(refusal)?;
        if execution.take_recv {
            self.take_recv(qp, srq).map_err(refusal)?;
        }
        let (near, mut far) = std::mem::take(&mut self.spans);
        far.clear();
        let done = self.act(qp, qp_type, pd, execution, payload, &mut far);
        self.spans = (near, far);
        let value = done?;
        if let Some(end) = execution.end {
            self.accept(qp, &request, end.opcode);
        }
        Ok(value)
    }

    /// Moves a packet's bytes, or runs its atomic.
    fn act(
        &mut self,
        qp: Handle,
        qp_type: QpType,
        pd: Handle,
        execution: &Execution,
        payload: &[u8],
        far: &mut Vec<Span>,
    ) -> Result<u64, Refusal> {
        let responder = (qp, pd);
        let word = |va: u64| (va, 8);
        let rights = execution.opcode.remote_rights();
        match execution.action {
            Action::Nothing => Ok(0),
            Action::Recv { offset, len } => {
                let (offset, len) = (u64::from(offset), u64::from(len));
                self.recv_spans(qp_type, qp, offset + len, offset, len, 0, far)
                    .map_err(refusal)?;
                self.place_bytes(qp, far, payload)
            }
            Action::Write {
                va,
                rkey,
                total,
                offset,
                len,
            } => {
                let part = (u64::from(offset), u64::from(len));
                if total != 0 {
                    self.remote_spans(responder, rkey, (va, total.into()), rights, part, far)
                        .ok_or(())
                        .or_else(|()| self.access(qp, qp_type))?;
                }
                self.place_bytes(qp, far, payload)
            }
            Action::Read { va, rkey, len } => {
                let range = Some((va, u64::from(len)));
                if len != 0 && self.remote_region(responder, rkey, range, rights).is_none() {
                    self.access(qp, qp_type)?;
                }
                Ok(0)
            }
            Action::Atomic {
                va,
                rkey,
                swap_add,
                compare,
            } => {
                self.word_at(responder, qp_type, rkey, word(va), rights, far)?;
                let update = match compare {
                    Some(compare) => Atomic::CompareSwap {
                        compare,
                        swap: swap_add,
                    },
                    None => Atomic::FetchAdd { add: swap_add },
                };
                self.update(qp, far, update)
            }
            Action::AtomicWrite { va, rkey } => {
                self.word_at(responder, qp_type, rkey, word(va), rights, far)?;
                let bytes = payload.try_into().map_err(|_| Refusal::InvalidRequest)?;
                let value = u64::from_ne_bytes(bytes);
                self.update(qp, far, Atomic::Write { value }).map(|_| 0)
            }
            Action::Flush {
                va,
                rkey,
                len,
                spec,
            } => {
                // What was written before is as visible as it will be; only the right to ask is
                // left to look at.
                let range = (!spec.whole_region).then_some((va, u64::from(len)));
                if self
                    .remote_region(responder, rkey, range, spec.types)
                    .is_none()
                {
                    self.access(qp, qp_type)?;
                }
                Ok(0)
            }
        }
    }

    fn place_bytes(&mut self, qp: Handle, far: &[Span], payload: &[u8]) -> Result<u64, Refusal> {
        if self.copy(far, Source::Bytes(payload)).is_err() {
            self.nak(qp, None);
            return Err(Refusal::RemoteOperation);
        }
        Ok(0)
    }

    /// A key does not allow it.
    fn access(&mut self, qp: Handle, qp_type: QpType) -> Result<(), Refusal> {
        let outcome = self.refuse(qp_type, qp, Nak::RemoteAccess);
        Err(match refusal(outcome) {
            Refusal::NotReady => Refusal::RemoteAccess,
            refused => refused,
        })
    }

    fn word_at(
        &mut self,
        responder: (Handle, Handle),
        qp_type: QpType,
        rkey: u32,
        range: (u64, u64),
        rights: Access,
        far: &mut Vec<Span>,
    ) -> Result<(), Refusal> {
        let aligned = range.0.is_multiple_of(8);
        if aligned
            && self
                .remote_spans(responder, rkey, range, rights, (0, 8), far)
                .is_none()
        {
            self.access(responder.0, qp_type)?;
        }
        if !aligned || !far.first().is_some_and(Span::is_word) {
            return Err(refusal(self.refuse(
                qp_type,
                responder.0,
                Nak::InvalidRequest,
            )));
        }
        Ok(())
    }

    fn update(&mut self, qp: Handle, far: &[Span], update: Atomic) -> Result<u64, Refusal> {
        let old = far.first().and_then(|word| self.atomic(word, update));
        if old.is_none() {
            self.nak(qp, None);
        }
        old.ok_or(Refusal::RemoteOperation)
    }

    /// Sends what this host owes the peer.
    pub(super) fn answer(
        &mut self,
        qp: Handle,
        remote: &mut Remote,
        fabric: &mut RoceFabric,
    ) -> Step {
        let (mut packets, mut bytes) = (0, 0);
        while packets < PACKETS_PER_STEP && bytes < TURN_BYTES && !self.network.full {
            let Some(reply) = remote.responder.next_reply() else {
                break;
            };
            packets += 1;
            bytes += reply.data.map_or(0, |data| u64::from(data.len));
            if self.reply(qp, remote, fabric, &reply).is_none() {
                remote.responder.read_failed(&reply);
                self.nak(qp, Nak::RemoteAccess.event());
            }
        }
        if packets == 0 {
            Step::Nothing
        } else {
            Step::Done(bytes)
        }
    }

    /// Sends one answer; `None` if its data may not be read any more.
    fn reply(
        &mut self,
        qp: Handle,
        remote: &Remote,
        fabric: &mut RoceFabric,
        reply: &Reply,
    ) -> Option<()> {
        if !remote.may_send() {
            return Some(());
        }
        let len = reply.data.map_or(0, |data| data.len as usize);
        let (to, headers) = (remote.to(), remote.stamp(&reply.headers, len));
        let Some(data) = reply.data.filter(|data| data.len != 0) else {
            let none = Payload::Bytes(&[]);
            return self.push(fabric, &to, &headers, none).ok();
        };
        let pd = self.qps.get(qp)?.pd;
        let (near, mut far) = std::mem::take(&mut self.spans);
        far.clear();
        let rights = Access::REMOTE_READ;
        let range = (data.va, u64::from(data.len));
        let sent = self
            .remote_spans((qp, pd), data.rkey, range, rights, (0, range.1), &mut far)
            .and_then(|()| {
                let payload = Payload::Spans(&far, 0, len);
                self.push(fabric, &to, &headers, payload).ok()
            });
        self.spans = (near, far);
        sent
    }
}

/// What the receiver's side of a message needs to know of its request.
fn message(execution: &Execution) -> Request {
    let mut request = Request {
        entry: SendEntry {
            remote_srqn: execution.xrc_srq.unwrap_or(0),
            ..SendEntry::default()
        },
        opcode: Some(execution.opcode),
        ..Request::default()
    };
    let Some(MessageEnd {
        opcode,
        len,
        imm,
        invalidate,
        solicited,
    }) = execution.end
    else {
        return request;
    };
    request.opcode = Some(opcode);
    request.len = len.into();
    request.entry.imm = match opcode {
        Opcode::SendInv => invalidate.unwrap_or(0),
        _ => u32::from_ne_bytes(imm.unwrap_or_default()),
    };
    request.flags.set(SendFlags::SOLICITED, solicited);
    request
}

/// What the peer is told of an outcome.
fn refusal(outcome: Outcome) -> Refusal {
    match outcome {
        Outcome::RemoteAccess => Refusal::RemoteAccess,
        Outcome::RemoteInvalidRequest => Refusal::InvalidRequest,
        Outcome::ReceiverNotReady { .. } => Refusal::NotReady,
        // Of an unreliable sender's, whatever it is called, the message is dropped.
        _ => Refusal::RemoteOperation,
    }
}
