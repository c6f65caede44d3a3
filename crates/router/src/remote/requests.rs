//! This host's requests: from the send ring to the wire, and their answers.

use freeflow_session::Handle;
use freeflow_transport::{Outcome, Part, PostError, RequesterEvent, Transmit, Work, check_send};
use freeflow_types::{Access, FlushSpec, MAX_MESSAGE, Opcode, QpState, SendFlags, WcStatus};
use freeflow_wire::Headers;

use crate::EndReason;
use crate::data::Source;
use crate::engine::{Engine, TURN_BYTES};
use crate::exec::{Request, Step};
use crate::remote::{MAX_SPARE, MAX_UNDER_WAY, PACKETS_PER_STEP, Payload, Remote, RoceFabric};

/// A part of a message whose spans are known. Keys may become invalid at any time; what is found
/// may be accessed until the turn is over ([`Engine::posted_region`]).
struct Located {
    message: u64,
    start: u64,
    end: u64,
}

impl Located {
    /// How far into the spans a packet's part of the message begins, if they have all of it.
    fn skip(&self, part: &Part) -> Option<u64> {
        let start = u64::from(part.offset);
        let inside = self.message == part.message.seq && start + u64::from(part.len) <= self.end;
        start.checked_sub(self.start).filter(|_| inside)
    }
}

impl Step {
    /// This, or another one if this is nothing.
    pub(super) fn or(self, other: Step) -> Step {
        match (self, other) {
            (Step::Nothing, other) => other,
            (Step::Done(a), Step::Done(b)) => Step::Done(a + b),
            (done, Step::Nothing) => done,
        }
    }
}

impl Engine {
    /// Tells the requester of a time that has come.
    pub(super) fn time_out(&mut self, qp: Handle, remote: &mut Remote) -> Step {
        let sends = |state| matches!(state, QpState::Rts | QpState::Sqd);
        let now = self.now;
        let Some(requester) = (self.qps.get(qp))
            .filter(|q| sends(q.transport.state()))
            .and(remote.requester.as_mut())
            .filter(|r| r.next_timeout().is_some_and(|at| at <= now))
        else {
            return Step::Nothing;
        };
        requester.on_timeout(now, &mut remote.events);
        if remote.events.is_empty() {
            return Step::Nothing;
        }
        self.take_events(qp, remote, &[]);
        Step::Done(0)
    }

    /// Posts what is in the send ring, and sends packets.
    pub(super) fn request(
        &mut self,
        qp: Handle,
        remote: &mut Remote,
        fabric: &mut RoceFabric,
    ) -> Step {
        let now = self.now;
        let Some(q) = self.qps.get(qp) else {
            return Step::Nothing;
        };
        let posts = match q.transport.state() {
            QpState::Rts => true,
            QpState::Sqd => false,
            _ => return Step::Nothing,
        };
        let done = posts && self.post(qp, remote);
        let (mut packets, mut bytes) = (0, 0);
        let mut located = None;
        while packets < PACKETS_PER_STEP && bytes < TURN_BYTES && !self.network.full {
            let mut events = std::mem::take(&mut remote.events);
            let next = remote.requester.as_mut();
            let next = next.and_then(|r| r.next_packet(now, &mut events));
            remote.events = events;
            let Some(transmit) = next else { break };
            packets += 1;
            bytes += transmit.payload.map_or(0, |part| u64::from(part.len));
            if self
                .transmit(qp, remote, fabric, &transmit, &mut located)
                .is_none()
                && let (Some(part), Some(requester)) = (transmit.payload, &mut remote.requester)
            {
                let status = WcStatus::LocProtErr;
                requester.abort(part.message.seq, status, &mut remote.events);
            }
        }
        self.take_events(qp, remote, &[]);
        if done || packets != 0 {
            Step::Done(bytes)
        } else {
            Step::Nothing
        }
    }

    /// Sends one packet; `None` if its payload cannot be read. `located` is what of a message was
    /// found for packets before it in this turn.
    fn transmit(
        &mut self,
        qp: Handle,
        remote: &Remote,
        fabric: &mut RoceFabric,
        transmit: &Transmit,
        located: &mut Option<Located>,
    ) -> Option<()> {
        if !remote.may_send() {
            return Some(());
        }
        let len = transmit.payload.map_or(0, |part| part.len as usize);
        let (to, headers) = (remote.to(), remote.stamp(&transmit.headers, len));
        let Some(part) = transmit.payload else {
            return self.push(fabric, &to, &headers, Payload::Bytes(&[])).ok();
        };
        let at = part.message.seq.checked_sub(remote.first)?;
        let request = remote.requests.get(at as usize)?;
        let from = part.offset as usize;
        if request.flags.contains(SendFlags::INLINE) {
            let bytes = request.inline.get(from..from + len)?;
            return self.push(fabric, &to, &headers, Payload::Bytes(bytes)).ok();
        }
        let pd = self.qps.get(qp)?.pd;
        let (mut near, far) = std::mem::take(&mut self.spans);
        let skip = located.as_ref().and_then(|located| located.skip(&part));
        let skip = skip.or_else(|| {
            near.clear();
            *located = None;
            let start = u64::from(part.offset);
            let len = request.len.saturating_sub(start).min(TURN_BYTES);
            let range = (start, len);
            self.local_spans(pd, &request.sges, Access::empty(), range, &mut near)?;
            *located = Some(Located {
                message: part.message.seq,
                start,
                end: start + len,
            });
            Some(0)
        });
        let sent = skip.and_then(|skip| {
            let payload = Payload::Spans(&near, skip, len);
            self.push(fabric, &to, &headers, payload).ok()
        });
        self.spans = (near, far);
        sent
    }

    /// Gives the requester what the program has posted; whether anything was done.
    fn post(&mut self, qp: Handle, remote: &mut Remote) -> bool {
        let mut done = false;
        while remote.requester.is_some() && remote.requests.len() < MAX_UNDER_WAY {
            let Some(q) = self.qps.get(qp) else { break };
            let Some(rings) = q.rings() else { break };
            if q.transport.state() != QpState::Rts {
                break;
            }
            // Read once: the program may write it meanwhile.
            let waiting = rings.send_produced().wrapping_sub(q.send_head);
            if waiting > q.send_entries() {
                let (session, qpn) = (q.session, q.qpn.get());
                self.condemn(session, EndReason::SendIndex { qpn, waiting });
                break;
            }
            if remote.next.wrapping_sub(q.send_head) >= waiting {
                break;
            }
            let mut request = self.network.spare.pop().unwrap_or_default();
            request.load(q.qp_type, rings.send_slot(remote.next), rings.inline());
            let posted = self.post_one(qp, remote, &request);
            let last = match posted {
                Ok(work) => remote
                    .requester
                    .as_mut()
                    .map(|requester| requester.post(work))
                    .is_none_or(|posted| posted.is_err())
                    .then_some(Outcome::LocalQpOperation),
                Err(outcome) => Some(outcome),
            };
            let Some(outcome) = last else {
                remote.next = remote.next.wrapping_add(1);
                remote.requests.push_back(request);
                done = true;
                continue;
            };
            // What is not sent is done here, when all before it is done.
            if !remote.requests.is_empty() {
                self.network.spare.push(request);
                break;
            }
            let outcome = match (outcome, request.opcode) {
                (Outcome::Delivered, Some(opcode)) => self.local_operation(qp, opcode, &request),
                (outcome, _) => outcome,
            };
            remote.next = remote.next.wrapping_add(1);
            self.conclude(qp, &request, outcome, 0);
            self.network.spare.push(request);
            done = true;
        }
        done
    }

    /// What a request asks of the requester; else what becomes of it here: `Delivered` of a local
    /// operation, which is still to be done.
    pub(super) fn post_one(
        &mut self,
        qp: Handle,
        remote: &Remote,
        request: &Request,
    ) -> Result<Work, Outcome> {
        let q = self.qps.get(qp).ok_or(Outcome::LocalQpOperation)?;
        let opcode = request.opcode.ok_or(Outcome::LocalQpOperation)?;
        let (attr, entry) = (q.transport.attr(), &request.entry);
        let n = entry.num_sge.into();
        check_send(
            q.qp_type,
            &attr.cap,
            opcode,
            request.flags,
            n,
            request.len,
            attr.path_mtu,
        )
        .map_err(PostError::outcome)?;
        if opcode.is_local() {
            return Err(Outcome::Delivered);
        }
        let len = u32::try_from(request.len).map_err(|_| Outcome::LocalLength)?;
        if request.len > MAX_MESSAGE {
            return Err(Outcome::LocalLength);
        }
        if !request.flags.contains(SendFlags::INLINE) {
            let need = if opcode.is_read_like() {
                Access::LOCAL_WRITE
            } else {
                Access::empty()
            };
            let (mut near, far) = std::mem::take(&mut self.spans);
            near.clear();
            let pd = q.pd;
            let all = (0, request.len);
            let found = self.local_spans(pd, &request.sges, need, all, &mut near);
            self.spans = (near, far);
            found.ok_or(Outcome::LocalProtection)?;
        }
        let mut work = Work::new(opcode, len);
        work.va = entry.remote_addr;
        work.rkey = entry.rkey;
        (work.swap_add, work.compare) = match opcode {
            Opcode::FetchAdd => (entry.compare_add, 0),
            _ => (entry.swap, entry.compare_add),
        };
        if opcode == Opcode::Flush {
            FlushSpec::from_raw(entry.swap).ok_or(Outcome::LocalQpOperation)?;
            work.flush_len = u32::try_from(entry.compare_add).map_err(|_| Outcome::LocalLength)?;
            work.len = 0;
        }
        work.imm = entry.imm.to_ne_bytes();
        work.invalidate = entry.imm;
        work.solicited = request.flags.contains(SendFlags::SOLICITED);
        work.fence = request.flags.contains(SendFlags::FENCE);
        work.xrc_srq = entry.remote_srqn;
        work.id = remote.next;
        Ok(work)
    }

    /// An answer has come for the requester.
    pub(super) fn on_answer(
        &mut self,
        qp: Handle,
        remote: &mut Remote,
        headers: &Headers,
        payload: &[u8],
    ) {
        let now = self.now;
        let Some(requester) = &mut remote.requester else {
            return;
        };
        requester.on_response(headers, payload.len(), now, &mut remote.events);
        self.take_events(qp, remote, payload);
    }

    /// Does what the requester says; `payload` is that of the packet that it says it of.
    fn take_events(&mut self, qp: Handle, remote: &mut Remote, payload: &[u8]) {
        let mut at = 0;
        while let Some(&event) = remote.events.get(at) {
            at += 1;
            match event {
                RequesterEvent::Place(part) => {
                    if self.place(qp, remote, part, payload).is_none() {
                        self.abort(remote, part.message.seq);
                    }
                }
                RequesterEvent::Atomic { message, value } => {
                    let part = Part {
                        message,
                        offset: 0,
                        len: 8,
                    };
                    let bytes = value.to_ne_bytes();
                    if self.place(qp, remote, part, &bytes).is_none() {
                        self.abort(remote, message.seq);
                    }
                }
                RequesterEvent::Complete(_) => {
                    if let Some(request) = self.next_done(qp, remote) {
                        self.succeed(qp, &request);
                        self.spare(request);
                    }
                }
                RequesterEvent::Failed(_, status) => {
                    if let Some(request) = self.next_done(qp, remote) {
                        self.fail_request(qp, &request, status);
                        self.spare(request);
                        self.resume(qp);
                    }
                }
            }
        }
        remote.events.clear();
    }

    /// The request that is done now.
    fn next_done(&mut self, qp: Handle, remote: &mut Remote) -> Option<Request> {
        let request = remote.requests.pop_front()?;
        remote.first += 1;
        self.qps.get_mut(qp)?.under_way = remote.requests.len();
        Some(request)
    }

    fn spare(&mut self, request: Request) {
        if self.network.spare.len() < MAX_SPARE {
            self.network.spare.push(request);
        }
    }

    fn abort(&mut self, remote: &mut Remote, message: u64) {
        if let Some(requester) = &mut remote.requester {
            requester.abort(message, WcStatus::LocProtErr, &mut remote.events);
        }
    }

    /// Puts a part of an answer where its request wants it.
    fn place(&mut self, qp: Handle, remote: &Remote, part: Part, bytes: &[u8]) -> Option<()> {
        let at = part.message.seq.checked_sub(remote.first)?;
        let request = remote.requests.get(at as usize)?;
        let pd = self.qps.get(qp)?.pd;
        let (mut near, far) = std::mem::take(&mut self.spans);
        near.clear();
        let range = (part.offset.into(), part.len.into());
        let placed = self
            .local_spans(pd, &request.sges, Access::LOCAL_WRITE, range, &mut near)
            .and_then(|()| self.copy(&near, Source::Bytes(bytes)).ok());
        self.spans = (near, far);
        placed
    }
}

#[cfg(test)]
mod tests {
    use freeflow_transport::Message;

    use super::*;

    #[test]
    fn parts_are_found_only_in_what_was_located() {
        let part = |seq, offset, len| Part {
            message: Message { seq, id: 0 },
            offset,
            len,
        };
        let located = Located {
            message: 7,
            start: 1000,
            end: 3000,
        };
        assert_eq!(located.skip(&part(7, 1000, 2000)), Some(0));
        assert_eq!(located.skip(&part(7, 2500, 500)), Some(1500));
        assert_eq!(located.skip(&part(7, 2500, 501)), None);
        assert_eq!(located.skip(&part(7, 999, 1)), None);
        assert_eq!(located.skip(&part(8, 1000, 1)), None);
    }
}
