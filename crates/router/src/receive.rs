//! The receiving side of the routed placement, and flushing.

use freeflow_session::Handle;
use freeflow_shm::{CompletionEntry, RecvEntry, SendEntry};
use freeflow_transport::{Nak, Outcome};
use freeflow_types::{
    Access, AsyncEventType, Opcode, QpState, QpType, SendFlags, WcFlags, WcOpcode, WcStatus,
};

use crate::EndReason;
use crate::data::Span;
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
    pub(crate) fn finish_recv(
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
