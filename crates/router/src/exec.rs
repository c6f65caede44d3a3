//! Execution of send requests against queue pairs of this host: the routed placement.

use freeflow_session::Handle;
use freeflow_shm::{CompletionEntry, SendEntry, Sge};
use freeflow_transport::{Nak, Next, Outcome, PostError, check_send};
use freeflow_types::{
    Access, AsyncEventType, FlushSpec, Gid, Opcode, QpState, QpType, SendFlags, WcStatus,
};

use crate::EndReason;
use crate::data::{Atomic, Fault, Source, Span};
use crate::engine::{Engine, TURN_BYTES};
use crate::objects::{Current, QpObject, Waiting};

/// A send request, copied out of the ring once.
#[derive(Debug, Default)]
pub(crate) struct Request {
    pub(crate) entry: SendEntry,
    pub(crate) opcode: Option<Opcode>,
    pub(crate) flags: SendFlags,
    pub(crate) sges: Vec<Sge>,
    pub(crate) inline: Vec<u8>,
    pub(crate) len: u64,
}

/// What one step of a queue pair was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Something was done, this many bytes moved; there may be more.
    Done(u64),
    /// There is nothing to do until somebody says so.
    Nothing,
}

/// How far a request has come.
pub(crate) enum Progress {
    /// More turns are needed.
    Partial(u64),
    /// It is over.
    Over(Outcome),
}

impl Engine {
    /// Does the next thing there is to do for a queue pair.
    pub(crate) fn step(&mut self, qp: Handle) -> Step {
        let Some(q) = self.qps.get_mut(qp) else {
            return Step::Nothing;
        };
        if q.remote.is_some() {
            return self.remote_step(qp);
        }
        if q.qp_type == QpType::Ud && self.network.waits_for_room(qp) {
            return Step::Nothing;
        }
        match q.transport.state() {
            QpState::Rts => {}
            QpState::Sqd if q.current.is_some() => {}
            QpState::Err => return self.flush(qp, true),
            QpState::Sqe => return self.flush(qp, false),
            _ => return Step::Nothing,
        }
        if q.waiting != Waiting::No && !self.is_served(qp) {
            return Step::Nothing;
        }
        let current = self.qps.get_mut(qp).and_then(|q| q.current.take());
        let (request, mut done) = match current {
            Some(current) => (current.request, current.done),
            None => {
                let mut request = std::mem::take(&mut self.request);
                if !self.load(qp, &mut request) {
                    self.request = request;
                    return Step::Nothing;
                }
                (request, 0)
            }
        };
        let before = done;
        match self.execute(qp, &request, &mut done) {
            Progress::Partial(done) => {
                if let Some(q) = self.qps.get_mut(qp) {
                    q.current = Some(Box::new(Current { request, done }));
                }
                Step::Done(done - before)
            }
            Progress::Over(outcome) => {
                let moved = request.len.saturating_sub(before);
                let step = self.conclude(qp, &request, outcome, moved);
                self.request = request;
                step
            }
        }
    }

    /// Copies the request at the head of the send queue; false if there is none.
    fn load(&mut self, qp: Handle, request: &mut Request) -> bool {
        let Some(q) = self.qps.get(qp) else {
            return false;
        };
        let Some(rings) = q.rings() else { return false };
        let waiting = rings.send_produced().wrapping_sub(q.send_head);
        if waiting > q.send_entries() {
            let (session, qpn) = (q.session, q.qpn.get());
            self.condemn(session, EndReason::SendIndex { qpn, waiting });
            return false;
        }
        if waiting == 0 {
            return false;
        }
        request.load(q.qp_type, rings.send_slot(q.send_head), rings.inline());
        true
    }

    fn execute(&mut self, qp: Handle, request: &Request, done: &mut u64) -> Progress {
        let (mut near, mut far) = std::mem::take(&mut self.spans);
        near.clear();
        far.clear();
        let progress = self
            .try_execute(qp, request, done, &mut near, &mut far)
            .unwrap_or_else(Progress::Over);
        self.spans = (near, far);
        progress
    }

    fn try_execute(
        &mut self,
        qp: Handle,
        request: &Request,
        done: &mut u64,
        near: &mut Vec<Span>,
        far: &mut Vec<Span>,
    ) -> Result<Progress, Outcome> {
        let q = self.qps.get(qp).ok_or(Outcome::LocalQpOperation)?;
        let (pd, qp_type) = (q.pd, q.qp_type);
        let opcode = request.opcode.ok_or(Outcome::LocalQpOperation)?;
        let mtu = match qp_type {
            QpType::Ud => self.network.mtu(),
            _ => q.transport.attr().path_mtu,
        };
        let (n, cap) = (request.entry.num_sge.into(), &q.transport.attr().cap);
        check_send(qp_type, cap, opcode, request.flags, n, request.len, mtu)
            .map_err(PostError::outcome)?;
        if opcode.is_local() {
            return Ok(Progress::Over(self.local_operation(qp, opcode, request)));
        }
        let flush = match opcode {
            Opcode::Flush => {
                Some(FlushSpec::from_raw(request.entry.swap).ok_or(Outcome::LocalQpOperation)?)
            }
            _ => None,
        };
        let rights = flush.map_or(opcode.remote_rights(), |flush| flush.types);
        let part = (request.len - *done).min(TURN_BYTES);
        let need = if opcode.is_read_like() {
            Access::LOCAL_WRITE
        } else {
            Access::empty()
        };
        if !request.flags.contains(SendFlags::INLINE) {
            self.local_spans(pd, &request.sges, need, (*done, part), near)
                .ok_or(Outcome::LocalProtection)?;
        }
        if qp_type == QpType::Ud {
            return self.datagram(qp, request, near, far).map(Progress::Over);
        }
        let peer = self.peer(qp).ok_or(Outcome::NoResponse)?;
        let p = self.responder(qp, peer).ok_or(Outcome::NoResponse)?;
        if let Err(nak) = p.transport.check_request(opcode, rights) {
            return Err(self.refuse(qp_type, peer, nak));
        }
        let (responder_pd, srq) = self.target(peer, request)?;
        let responder = (peer, responder_pd);
        if opcode.consumes_recv() {
            let begun = self.qps.get(peer).is_some_and(|p| p.taken.is_some());
            if *done != 0 && !begun {
                // The peer was reset amid the message: its rest belongs to nothing that is there.
                return Err(Outcome::NoResponse);
            }
            self.take_recv(peer, srq)?;
            self.leave_line(qp);
        }
        let remote = (request.entry.remote_addr, request.len);
        let key = request.entry.rkey;
        let misaligned = opcode.is_word() && !request.entry.remote_addr.is_multiple_of(8);
        let allowed = if let Some(flush) = flush {
            // What was written before is in the memory that all share: it is as visible as it
            // will be. Only the right to ask is left to look at.
            let range = (request.entry.remote_addr, request.entry.compare_add);
            let range = (!flush.whole_region).then_some(range);
            self.remote_region(responder, key, range, rights).is_some()
        } else if !opcode.has_remote() {
            self.recv_spans(qp_type, peer, request.len, *done, part, 0, far)?;
            true
        } else {
            // The key of a request of no bytes is not looked at (IBTA volume 1, 9.7.5.1.1).
            request.len == 0
                || misaligned
                || self
                    .remote_spans(responder, key, remote, rights, (*done, part), far)
                    .is_some()
        };
        if !allowed {
            return Err(self.refuse(qp_type, peer, Nak::RemoteAccess));
        }
        if misaligned || opcode.is_word() && !far.first().is_some_and(Span::is_word) {
            return Err(self.refuse(qp_type, peer, Nak::InvalidRequest));
        }
        self.move_data(opcode, request, *done, part, near, far)
            .map_err(|fault| {
                let local = (fault == Fault::Source) != opcode.is_read_like();
                if local {
                    Outcome::LocalProtection
                } else if self.has_died(peer) {
                    Outcome::NoResponse
                } else if qp_type.is_reliable() {
                    self.nak(peer, None);
                    Outcome::RemoteOperation
                } else {
                    Outcome::Delivered
                }
            })?;
        *done += part;
        if *done < request.len {
            return Ok(Progress::Partial(*done));
        }
        self.accept(peer, request, opcode);
        Ok(Progress::Over(Outcome::Delivered))
    }

    /// Moves one part of a message, or runs an atomic.
    fn move_data(
        &mut self,
        opcode: Opcode,
        request: &Request,
        done: u64,
        part: u64,
        near: &[Span],
        far: &[Span],
    ) -> Result<(), Fault> {
        if opcode.is_atomic() {
            let entry = &request.entry;
            let update = if opcode == Opcode::CompareSwap {
                Atomic::CompareSwap {
                    compare: entry.compare_add,
                    swap: entry.swap,
                }
            } else {
                Atomic::FetchAdd {
                    add: entry.compare_add,
                }
            };
            let word = far.first().ok_or(Fault::Source)?;
            let old = self.atomic(word, update).ok_or(Fault::Source)?;
            return self.copy(near, Source::Bytes(&old.to_ne_bytes()));
        }
        if opcode.is_read_like() {
            return self.copy(near, Source::Spans(far));
        }
        if opcode == Opcode::AtomicWrite {
            let inline = request.inline.as_slice().try_into().map(u64::from_ne_bytes);
            let value = inline.ok().or_else(|| self.word(near));
            let value = value.ok_or(Fault::Source)?;
            let word = far.first().ok_or(Fault::Destination)?;
            let written = self.atomic(word, Atomic::Write { value });
            return written.map(|_| ()).ok_or(Fault::Destination);
        }
        if request.flags.contains(SendFlags::INLINE) {
            let bytes = request.inline.get(done as usize..(done + part) as usize);
            return self.copy(far, Source::Bytes(bytes.ok_or(Fault::Source)?));
        }
        self.copy(far, Source::Spans(near))
    }

    /// The queue pair that a connected one's attributes name, in the same tenant.
    pub(crate) fn peer(&mut self, qp: Handle) -> Option<Handle> {
        let q = self.qps.get(qp)?;
        if !q.qp_type.is_connected() {
            return None;
        }
        if let Some(path) = q.path
            && self.qps.get(path).is_some()
        {
            return Some(path);
        }
        let attr = q.transport.attr();
        let path = self.find(q.endpoint, attr.av.dgid, attr.dest_qpn)?;
        self.qps.get_mut(qp)?.path = Some(path);
        Some(path)
    }

    /// A queue pair by its virtual address, as this endpoint's tenant sees it.
    pub(crate) fn find(&self, from: Handle, gid: Gid, qpn: u32) -> Option<Handle> {
        let tenant = self.endpoints.get(from)?.tenant;
        let endpoint = *self.by_gid.get(&(tenant, gid))?;
        let qp = *self.by_qpn.get(&qpn)?;
        let q = self.qps.get(qp)?;
        (q.endpoint == endpoint && !self.has_ended(q.session)).then_some(qp)
    }

    /// The peer, if it listens to this queue pair: connected back to it, and able to receive.
    fn responder(&self, qp: Handle, peer: Handle) -> Option<&QpObject> {
        let (q, p) = (self.qps.get(qp)?, self.qps.get(peer)?);
        let back = p.transport.attr();
        let here = self.endpoints.get(q.endpoint)?.gid;
        let fits = match q.qp_type {
            QpType::XrcSend => p.qp_type == QpType::XrcRecv,
            same => p.qp_type == same,
        };
        let connected = !self.has_ended(p.session)
            && fits
            && back.dest_qpn == q.qpn.get()
            && back.av.dgid == here;
        (connected && p.remote.is_none() && p.transport.may_receive()).then_some(p)
    }

    /// Whether the process of a queue pair is dead, as its own memory has shown: its session will
    /// end.
    fn has_died(&self, qp: Handle) -> bool {
        let session = self.qps.get(qp).map(|q| q.session);
        let session = session.and_then(|s| self.sessions.get(s));
        session.is_some_and(|s| s.memory_gone)
    }

    /// The program asked the send queue to drain.
    pub(crate) fn drain(&mut self, qp: Handle) {
        if let Some(q) = self.qps.get_mut(qp) {
            q.draining = q.transport.attr().en_sqd_async_notify;
            self.drained(qp);
        }
    }

    /// Reports a drained send queue: no request is half done.
    fn drained(&mut self, qp: Handle) {
        if let Some(q) = self.qps.get_mut(qp)
            && q.draining
            && q.current.is_none()
            && q.under_way == 0
        {
            q.draining = false;
            self.qp_event(qp, AsyncEventType::SqDrained);
        }
    }

    /// Applies the outcome of a request to its queue pair.
    pub(crate) fn conclude(
        &mut self,
        qp: Handle,
        request: &Request,
        outcome: Outcome,
        moved: u64,
    ) -> Step {
        let now = self.now;
        let Some(q) = self.qps.get_mut(qp) else {
            return Step::Nothing;
        };
        let waiting = match outcome {
            Outcome::ReceiverNotReady { .. } => Waiting::Receiver,
            _ => Waiting::Peer,
        };
        let next = q.transport.conclude(outcome, now);
        if waiting == Waiting::Receiver && matches!(next, Next::RetryAt(_)) {
            self.stand_in_line(qp, request);
        } else {
            self.leave_line(qp);
        }
        let Some(q) = self.qps.get_mut(qp) else {
            return Step::Nothing;
        };
        match next {
            Next::Complete => {
                self.succeed(qp, request);
                Step::Done(moved)
            }
            Next::RetryAt(at) => {
                q.waiting = waiting;
                self.start_timer(qp, at);
                Step::Nothing
            }
            Next::Never => {
                q.waiting = waiting;
                Step::Nothing
            }
            Next::Fail(status) => {
                self.fail_request(qp, request, status);
                // What follows is flushed.
                Step::Done(0)
            }
        }
    }

    /// The request at the head of the send queue is done.
    pub(crate) fn succeed(&mut self, qp: Handle, request: &Request) {
        let now = self.now;
        let Some(q) = self.qps.get_mut(qp) else {
            return;
        };
        let opcode = request.opcode.unwrap_or(Opcode::Send);
        q.transport.sent(opcode, request.len);
        q.send_head = q.send_head.wrapping_add(1);
        let signaled = q.sq_sig_all || request.flags.contains(SendFlags::SIGNALED);
        let endpoint = q.endpoint;
        if signaled {
            let entry = q.send_completion(request, WcStatus::Success, now);
            let cq = q.send_cq;
            self.complete(cq, &entry, false);
        }
        if let Some(e) = self.endpoints.get_mut(endpoint)
            && !opcode.is_local()
        {
            e.counters.sent_messages += 1;
            e.counters.sent_bytes += request.len;
        }
        self.drained(qp);
    }

    /// The request at the head of the send queue failed, and with it the send queue.
    pub(crate) fn fail_request(&mut self, qp: Handle, request: &Request, status: WcStatus) {
        let now = self.now;
        let Some(q) = self.qps.get_mut(qp) else {
            return;
        };
        q.send_head = q.send_head.wrapping_add(1);
        let entry = q.send_completion(request, status, now);
        let (cq, endpoint) = (q.send_cq, q.endpoint);
        q.transport.fail_send();
        self.complete(cq, &entry, false);
        if let Some(e) = self.endpoints.get_mut(endpoint) {
            e.counters.failed_requests += 1;
        }
    }
}

impl Request {
    /// Copies a request out of its slot. `inline` is how many bytes a slot holds.
    pub(crate) fn load(&mut self, qp: QpType, slot: &[freeflow_shm::AtomicU64], inline: u32) {
        self.entry = SendEntry::load(qp, slot);
        self.opcode = Opcode::from_raw(self.entry.opcode.into());
        self.flags = SendFlags::from_bits_truncate(self.entry.flags);
        self.sges.clear();
        self.inline.clear();
        if self.flags.contains(SendFlags::INLINE) {
            let n = self.entry.inline_len.min(inline) as usize;
            SendEntry::load_inline(slot, n, &mut self.inline);
            self.len = self.inline.len() as u64;
        } else {
            SendEntry::load_sges(slot, self.entry.num_sge.into(), &mut self.sges);
            self.len = self.sges.iter().map(|s| u64::from(s.length)).sum();
        }
    }
}

impl QpObject {
    /// The completion of the request at the head of the send queue, which is behind us by now.
    fn send_completion(&self, request: &Request, status: WcStatus, now: u64) -> CompletionEntry {
        let opcode = request.opcode.unwrap_or(Opcode::Send);
        CompletionEntry {
            wr_id: request.entry.wr_id,
            status: status.raw() as u8,
            opcode: opcode.wc().raw() as u8,
            byte_len: request.len as u32,
            qpn: self.qpn.get(),
            slot: self.slot,
            is_send: true,
            retired: self.send_head,
            timestamp: now,
            ..CompletionEntry::default()
        }
    }
}
