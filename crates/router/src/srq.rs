//! Shared receive queues: their control verbs, taking from them, and the line of senders that
//! wait for a receive request.
//!
//! A request is copied when it is taken, and its slot is free from then on: with several queue
//! pairs taking, completions come in any order and in several completion queues, so that the
//! library could not tell from them which slots are done.
//!
//! A sender that found the queue empty has a ticket. When requests are posted, as many of those
//! who wait as there are requests get a turn, oldest ticket first; a ticket is kept until a
//! request was taken, so that who was served last is last in the line. All who wait keep the
//! timer of their RNR NAK: being called in vain is no retry.

use std::collections::BTreeMap;

use freeflow_policy::Resource;
use freeflow_session::{CreateSrq, Event, Handle, ModifySrq, Reply, SrqCreated, SrqQueried};
use freeflow_shm::{CompletionEntry, RecvEntry, Region, SrqGeometry, SrqRing};
use freeflow_transport::Outcome as SendOutcome;
use freeflow_types::AsyncEventType;
use rustix::io::Errno;

use crate::EndReason;
use crate::control::{Outcome, Ring, done};
use crate::engine::Engine;
use crate::exec::{Request, Step};
use crate::memory::Range;
use crate::objects::{Slot, TakenRecv, Waiting, bytes_of_words};
use crate::table::{NONE, Owned};
use crate::xrc::XrcMember;

/// Shared receive queue.
#[derive(Debug)]
pub(crate) struct Srq {
    pub(crate) session: Handle,
    pub(crate) context: Handle,
    /// Domain of its elements.
    pub(crate) pd: Handle,
    /// If it is one of XRC.
    pub(crate) xrc: Option<XrcMember>,
    slot: u32,
    memory: Range,
    region: Region,
    geometry: SrqGeometry,
    max_sge: u32,
    /// Index of the next request.
    head: u64,
    limit: u32,
    /// Queue pairs that were created on it.
    pub(crate) users: u32,
    line: BTreeMap<u64, Handle>,
    next_ticket: u64,
}

/// A place in a shared receive queue's line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    srq: Handle,
    number: u64,
}

impl Srq {
    pub(crate) fn ring(&self) -> Option<SrqRing<'_>> {
        SrqRing::new(self.region.words(), self.geometry)
    }

    /// Requests that wait to be taken; the error is an impossible number of them.
    fn waiting(&self) -> Result<u64, u64> {
        let Some(ring) = self.ring() else {
            return Ok(0);
        };
        let waiting = ring.produced().wrapping_sub(self.head);
        if waiting > self.geometry.entries().into() {
            Err(waiting)
        } else {
            Ok(waiting)
        }
    }

    /// Whether there is a request; if not, the library will say when there is.
    fn has_request(&self) -> bool {
        let Some(ring) = self.ring() else {
            return false;
        };
        ring.produced() != self.head || ring.want(self.head)
    }

    /// Copies the next request and frees its slot.
    fn take(&mut self, own: Handle) -> Option<TakenRecv> {
        let mut sges = Vec::new();
        let ring = self.ring()?;
        let entry = RecvEntry::load(ring.slot(self.head), &mut sges);
        let head = self.head.wrapping_add(1);
        ring.consume(head);
        self.head = head;
        Some(TakenRecv {
            wr_id: entry.wr_id,
            pd: self.pd,
            cq: NONE,
            slot: CompletionEntry::SHARED,
            retired: own.0.into(),
            sges,
        })
    }
}

impl Owned for Srq {
    fn owner(&self) -> Handle {
        self.context
    }
}

impl Engine {
    /// Bytes of the rings of a session's shared receive queues.
    #[cfg(feature = "testing")]
    pub(crate) fn srq_memory(&self, session: Handle) -> u64 {
        let own = self.srqs.iter().filter(|(_, s)| s.session == session);
        own.map(|(_, s)| s.memory.len).sum()
    }

    pub(crate) fn own_srq(&mut self, session: Handle, srq: Handle) -> Result<&mut Srq, Errno> {
        self.srqs
            .get_mut(srq)
            .filter(|s| s.session == session)
            .ok_or(Errno::INVAL)
    }

    /// Whether a completion's number is that of a queue that exists.
    pub(crate) fn is_srq(&self, number: u64) -> bool {
        u32::try_from(number).is_ok_and(|n| self.srqs.get(Handle(n)).is_some())
    }

    pub(crate) fn create_srq(&mut self, session: Handle, request: &CreateSrq) -> Outcome {
        let context = self.own_pd(session, request.pd)?.context;
        let xrc = match &request.xrc {
            Some(xrc) => Some(self.xrc_member(session, context, xrc)?),
            None => None,
        };
        let limit = self.limits.max_srq;
        if self.session_mut(session)?.counts.srqs >= limit {
            return Err(Errno::NOMEM);
        }
        self.check_quota(session, Resource::Srqs, 1)?;
        let max_sge = request.max_sge.max(1);
        let geometry = SrqGeometry::new(request.max_wr, max_sge);
        let requests = u64::from(geometry.entries());
        self.check_quota(session, Resource::Outstanding, requests)?;
        let Ring {
            range: memory,
            region,
            location: ring,
            fds,
        } = self.alloc_ring(session, bytes_of_words(geometry.words()))?;
        let s = self.session_mut(session)?;
        let Some(slot) = s.take_slot() else {
            let _ = s.slabs.free(memory);
            return Err(Errno::NOMEM);
        };
        let number = xrc.as_ref().map(|xrc| xrc.srqn);
        let srq = Srq {
            session,
            context,
            pd: request.pd,
            xrc,
            slot,
            memory,
            region,
            geometry,
            max_sge,
            head: 0,
            limit: 0,
            users: 0,
            line: BTreeMap::new(),
            next_ticket: 0,
        };
        let Some(srq) = self.srqs.insert(srq) else {
            let s = self.session_mut(session)?;
            s.free_slot(slot);
            let _ = s.slabs.free(memory);
            return Err(Errno::NOMEM);
        };
        let s = self.session_mut(session)?;
        s.set_slot(slot, Slot::Srq(srq));
        s.counts.srqs += 1;
        s.counts.outstanding += requests;
        self.own_pd(session, request.pd)?.users += 1;
        self.join_xrc(srq);
        let created = SrqCreated {
            srq,
            number,
            slot,
            max_wr: geometry.entries(),
            max_sge,
            ring,
        };
        Ok((Reply::Srq(created), fds))
    }

    pub(crate) fn modify_srq(&mut self, session: Handle, request: &ModifySrq) -> Outcome {
        let s = self.own_srq(session, request.srq)?;
        let geometry = request
            .max_wr
            .map_or(s.geometry, |wr| SrqGeometry::new(wr, s.max_sge));
        let limit = request.limit.unwrap_or(s.limit);
        if limit > geometry.entries() {
            return Err(Errno::INVAL);
        }
        let resized = match request.max_wr {
            Some(_) => Some(self.resize_srq(session, request.srq, geometry)?),
            None => None,
        };
        self.own_srq(session, request.srq)?.limit = limit;
        resized.map_or_else(done, Ok)
    }

    /// Moves the requests to a ring of another size. The library posts nothing meanwhile.
    fn resize_srq(&mut self, session: Handle, srq: Handle, geometry: SrqGeometry) -> Outcome {
        let s = self.own_srq(session, srq)?;
        let head = s.head;
        let waiting = match s.waiting() {
            Ok(waiting) if waiting <= geometry.entries().into() => waiting,
            Ok(_) => return Err(Errno::INVAL),
            Err(waiting) => {
                self.condemn(session, EndReason::SrqIndex { waiting });
                return Err(Errno::INVAL);
            }
        };
        let before = u64::from(s.geometry.entries());
        let after = u64::from(geometry.entries());
        let more = after.saturating_sub(before);
        self.check_quota(session, Resource::Outstanding, more)?;
        let new = self.alloc_ring(session, bytes_of_words(geometry.words()))?;
        let s = self.own_srq(session, srq)?;
        if let (Some(from), Some(to)) = (s.ring(), SrqRing::new(new.region.words(), geometry)) {
            from.copy_to(&to, head, head.wrapping_add(waiting));
        }
        let old = std::mem::replace(&mut s.memory, new.range);
        s.region = new.region;
        s.geometry = geometry;
        let resized = SrqCreated {
            srq,
            number: s.xrc.as_ref().map(|xrc| xrc.srqn),
            slot: s.slot,
            max_wr: geometry.entries(),
            max_sge: s.max_sge,
            ring: new.location,
        };
        // It was handed out by the same areas.
        let owner = self.session_mut(session)?;
        let _ = owner.slabs.free(old);
        owner.counts.outstanding = owner.counts.outstanding - before + after;
        self.serve_line(srq);
        Ok((Reply::Srq(resized), new.fds))
    }

    pub(crate) fn query_srq(&mut self, session: Handle, srq: Handle) -> Outcome {
        let s = self.own_srq(session, srq)?;
        let queried = SrqQueried {
            max_wr: s.geometry.entries(),
            max_sge: s.max_sge,
            limit: s.limit,
        };
        Ok((Reply::SrqQueried(queried), Vec::new()))
    }

    pub(crate) fn destroy_srq(&mut self, session: Handle, srq: Handle) -> Outcome {
        if self.own_srq(session, srq)?.users != 0 {
            return Err(Errno::BUSY);
        }
        self.remove_srq(srq);
        done()
    }

    /// Removes a queue; what is posted on it is forgotten. Who waits for it waits for the timer.
    pub(crate) fn remove_srq(&mut self, srq: Handle) {
        let Some(s) = self.srqs.remove(srq) else {
            return;
        };
        if let Some(pd) = self.pds.get_mut(s.pd) {
            pd.users -= 1;
        }
        if let Some(xrc) = &s.xrc {
            self.leave_xrc(xrc);
        }
        if let Some(session) = self.sessions.get_mut(s.session) {
            session.counts.srqs -= 1;
            session.counts.outstanding -= u64::from(s.geometry.entries());
            session.free_slot(s.slot);
            // It was handed out by the same areas.
            let _ = session.slabs.free(s.memory);
        }
    }

    /// Takes the next request of a queue for a queue pair.
    pub(crate) fn take_shared(&mut self, qp: Handle, srq: Handle) -> Result<(), SendOutcome> {
        let q = self.qps.get(qp).ok_or(SendOutcome::NoResponse)?;
        let (timer_code, recv_cq) = (q.transport.attr().min_rnr_timer, q.recv_cq);
        let s = self.srqs.get_mut(srq).ok_or(SendOutcome::RemoteOperation)?;
        if !s.has_request() {
            return Err(SendOutcome::ReceiverNotReady { timer_code });
        }
        let waiting = match s.waiting() {
            Ok(waiting) => waiting,
            Err(waiting) => {
                let session = s.session;
                self.condemn(session, EndReason::SrqIndex { waiting });
                return Err(SendOutcome::NoResponse);
            }
        };
        let mut taken = s.take(srq).ok_or(SendOutcome::NoResponse)?;
        taken.cq = s.xrc.as_ref().map_or(recv_cq, |xrc| xrc.cq);
        let reached = waiting.saturating_sub(1) < s.limit.into();
        if reached {
            // Once per arming (IBTA volume 1, 10.2.9.2).
            s.limit = 0;
            let context = s.context;
            let event = AsyncEventType::SrqLimitReached;
            self.async_event(context, Event::Srq(event, srq));
        }
        let q = self.qps.get_mut(qp).ok_or(SendOutcome::NoResponse)?;
        q.taken = Some(taken);
        Ok(())
    }

    /// The queue whose request a sender's message would take.
    fn awaited(&mut self, sender: Handle, request: &Request) -> Option<Handle> {
        let peer = self.peer(sender)?;
        let p = self.qps.get(peer)?;
        if p.xrc.is_some() {
            return self.xrc.by_srqn.get(&request.entry.remote_srqn).copied();
        }
        p.srq
    }

    /// A sender found the queue empty: it stands in line, where it was if it stood there before.
    pub(crate) fn stand_in_line(&mut self, sender: Handle, request: &Request) {
        let Some(srq) = self.awaited(sender, request) else {
            return;
        };
        if let Some(q) = self.qps.get(sender)
            && q.ticket.is_none_or(|t| t.srq != srq)
        {
            self.leave_line(sender);
            if let (Some(s), Some(q)) = (self.srqs.get_mut(srq), self.qps.get_mut(sender)) {
                let number = s.next_ticket;
                s.next_ticket += 1;
                s.line.insert(number, sender);
                q.ticket = Some(Ticket { srq, number });
            }
        }
        self.serve_line(srq);
    }

    /// A sender was served, or waits no more: it is the turn of those behind it.
    pub(crate) fn leave_line(&mut self, sender: Handle) {
        if let Some(q) = self.qps.get_mut(sender)
            && let Some(ticket) = q.ticket.take()
        {
            self.give_back(ticket);
        }
    }

    pub(crate) fn give_back(&mut self, ticket: Ticket) {
        if let Some(s) = self.srqs.get_mut(ticket.srq) {
            s.line.remove(&ticket.number);
            self.serve_line(ticket.srq);
        }
    }

    /// Gives as many waiting senders a turn as there are requests; if there are none, the library
    /// will say when there are.
    pub(crate) fn serve_line(&mut self, srq: Handle) {
        let Some(s) = self.srqs.get(srq) else { return };
        if s.line.is_empty() || !s.has_request() {
            return;
        }
        // An impossible number is found when one of them takes a request.
        let waiting = s.waiting().unwrap_or(1) as usize;
        let called: Vec<_> = s.line.values().copied().take(waiting).collect();
        for sender in called {
            self.make_ready(sender);
        }
    }

    /// Whether a sender that waits may try again before its timer: there is a request now.
    pub(crate) fn is_served(&mut self, sender: Handle) -> bool {
        let Some(q) = self.qps.get_mut(sender) else {
            return false;
        };
        let served = q.waiting == Waiting::Receiver
            && q.ticket
                .and_then(|t| self.srqs.get(t.srq))
                .is_some_and(Srq::has_request);
        if served {
            q.waiting = Waiting::No;
            self.cancel_timer(sender);
        }
        served
    }

    /// A queue pair in error has completed the last request that it took (IBTA volume 1, 11.6.2).
    pub(crate) fn tell_last_wqe(&mut self, qp: Handle) -> Step {
        if let Some(q) = self.qps.get_mut(qp)
            && !std::mem::replace(&mut q.last_wqe_told, true)
        {
            self.qp_event(qp, AsyncEventType::QpLastWqeReached);
        }
        Step::Nothing
    }
}
