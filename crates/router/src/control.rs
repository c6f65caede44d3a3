//! Control verbs: what a session's requests do to the engine's objects.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_policy::Resource;
use freeflow_session::{
    CqCreated, CreateCq, CreateQp, DeviceInfo, Errno as WireErrno, Handle, PROTOCOL_VERSION,
    QpCreated, QpQueried, Reply, Request, RingLocation, Welcome,
};
use freeflow_shm::{CqRing, QpGeometry, Region, event_pair};
use freeflow_transport::{ModifyLimits, Qp};
use freeflow_types::{QpAttr, QpAttrMask, QpCap, QpState, QpType, Qpn};
use rustix::io::Errno;

use crate::completions::Moderation;
use crate::engine::Engine;
use crate::events::Stream;
use crate::held::Held;
use crate::memory::Range;
use crate::objects::{
    Channel, Context, Cq, Pd, QpObject, Rings, Session, Slot, Waiting, bytes_of_words, capacity,
};
use crate::table::NONE;

/// QPNs that were freed lately and are not given again.
pub(crate) const QPNS_AT_REST: usize = 4096;

/// Objects that are removed at once, in some hundred microseconds.
pub(crate) const REMOVED_AT_ONCE: usize = 32;

/// An answer and the descriptors beside it.
pub(crate) struct Answer {
    pub(crate) reply: Result<Reply, WireErrno>,
    pub(crate) fds: Vec<Arc<OwnedFd>>,
}

/// Memory of a new ring: the range, its view, what the library must know, and the slab if it is
/// new to it.
pub(crate) struct Ring {
    pub(crate) range: Range,
    pub(crate) region: Region,
    pub(crate) location: RingLocation,
    pub(crate) fds: Vec<Arc<OwnedFd>>,
}

pub(crate) type Outcome = Result<(Reply, Vec<Arc<OwnedFd>>), Errno>;

pub(crate) fn done() -> Outcome {
    Ok((Reply::Done, Vec::new()))
}

pub(crate) fn created(handle: Handle, fd: Option<OwnedFd>) -> Outcome {
    Ok((
        Reply::Created(handle),
        fd.into_iter().map(Arc::new).collect(),
    ))
}

impl Engine {
    /// Executes one request of a session. The answer may be sent once [`Self::work_off`] has nothing
    /// left to do.
    pub(crate) fn handle(&mut self, session: Handle, request: Request) -> Answer {
        let result = match request.validate(&self.limits) {
            // What it asked for before it ended.
            Ok(()) if self.has_ended(session) => Err(Errno::NODEV),
            Ok(()) => self.dispatch(session, request),
            Err(_) => Err(Errno::INVAL),
        };
        self.account(session);
        match result {
            Ok((reply, fds)) => Answer {
                reply: Ok(reply),
                fds,
            },
            Err(errno) => {
                let reply = Err(WireErrno(errno.raw_os_error()));
                Answer {
                    reply,
                    fds: Vec::new(),
                }
            }
        }
    }

    fn dispatch(&mut self, session: Handle, request: Request) -> Outcome {
        match request {
            // The first hello is answered before the session exists.
            Request::Hello { .. } => Err(Errno::PROTO),
            Request::OpenContext => self.open_context(session),
            Request::CloseContext { context } => self.close_context(session, context),
            Request::AllocPd { context } => self.alloc_pd(session, context),
            Request::DeallocPd { pd } => self.dealloc_pd(session, pd),
            Request::AllocPages { len } => self.alloc_pages(session, len),
            Request::FreePages {
                segment,
                offset,
                len,
            } => {
                let area = segment;
                self.free_pages(session, Range { area, offset, len })
            }
            Request::AttachMemory => self.attach_memory(session),
            Request::RegMr(request) => self.reg_mr(session, &request),
            Request::ReregMr(request) => self.rereg_mr(session, &request),
            Request::AllocNullMr { pd } => self.alloc_null_mr(session, pd),
            Request::AdviseMr(request) => self.advise_mr(session, &request),
            Request::DeregMr { mr } => self.dereg_mr(session, mr),
            Request::ExchangeSlots(request) => self.exchange_slots(session, &request),
            Request::AdoptMr { slot } => self.adopt_mr(session, slot),
            // Whoever executes messages holds the engine, which is between two rounds then.
            Request::Settle => done(),
            Request::QueryDevice => {
                let device = self.device(session).ok_or(Errno::NODEV)?;
                Ok((Reply::Device(device), Vec::new()))
            }
            Request::AllocMw(request) => self.alloc_mw(session, &request),
            Request::DeallocMw { mw } => self.dealloc_mw(session, mw),
            Request::AllocDm { context, len } => self.alloc_dm(session, context, len),
            Request::FreeDm { dm } => self.free_dm(session, dm),
            Request::RegDmMr(request) => self.reg_dm_mr(session, &request),
            Request::CreateChannel { context } => self.create_channel(session, context),
            Request::DestroyChannel { channel } => self.destroy_channel(session, channel),
            Request::CreateCq(request) => self.create_cq(session, &request),
            Request::ResizeCq { cq, cqe } => self.resize_cq(session, cq, cqe),
            Request::ModifyCq { cq, count, period } => {
                self.own_cq(session, cq)?;
                self.moderate(cq, Moderation::new(count, period));
                done()
            }
            Request::DestroyCq { cq } => self.destroy_cq(session, cq),
            Request::CreateQp(request) => self.create_qp(session, &request),
            Request::ModifyQp { qp, attr, mask } => self.modify_qp(session, qp, &attr, mask),
            Request::QueryQp { qp } => {
                let q = self.own_qp(session, qp)?;
                Ok((
                    Reply::QpQueried(QpQueried {
                        attr: q.transport.query(),
                    }),
                    Vec::new(),
                ))
            }
            Request::DestroyQp { qp } => {
                self.own_qp(session, qp)?;
                self.remove_qp(qp);
                done()
            }
            Request::Multicast { qp, gid, attach } => {
                self.own_qp(session, qp)?;
                if attach {
                    self.attach_mcast(qp, gid)?;
                } else {
                    self.detach_mcast(qp, gid)?;
                }
                done()
            }
            Request::CreateSrq(request) => self.create_srq(session, &request),
            Request::ModifySrq(request) => self.modify_srq(session, &request),
            Request::QuerySrq { srq } => self.query_srq(session, srq),
            Request::DestroySrq { srq } => self.destroy_srq(session, srq),
            Request::OpenXrcd(request) => self.open_xrcd(session, &request),
            Request::CloseXrcd { xrcd } => self.close_xrcd(session, xrcd),
            Request::OpenXrcQp(request) => self.open_xrc_qp(session, &request),
            Request::ModifyXrcQp { open, attr, mask } => {
                self.modify_xrc_qp(session, open, &attr, mask)
            }
            Request::QueryXrcQp { open } => self.query_xrc_qp(session, open),
            Request::CloseXrcQp { open } => self.close_xrc_qp(session, open),
            Request::Cm(request) => self.handle_cm(session, request),
        }
    }

    pub(crate) fn session_mut(&mut self, session: Handle) -> Result<&mut Session, Errno> {
        self.sessions.get_mut(session).ok_or(Errno::INVAL)
    }

    pub(crate) fn own_qp(&self, session: Handle, qp: Handle) -> Result<&QpObject, Errno> {
        self.qps
            .get(qp)
            .filter(|q| q.session == session)
            .ok_or(Errno::INVAL)
    }

    pub(crate) fn own_pd(&mut self, session: Handle, pd: Handle) -> Result<&mut Pd, Errno> {
        self.pds
            .get_mut(pd)
            .filter(|p| p.session == session)
            .ok_or(Errno::INVAL)
    }

    pub(crate) fn own_cq(&mut self, session: Handle, cq: Handle) -> Result<&mut Cq, Errno> {
        self.cqs
            .get_mut(cq)
            .filter(|c| c.session == session)
            .ok_or(Errno::INVAL)
    }

    fn own_channel(&mut self, session: Handle, ch: Handle) -> Result<&mut Channel, Errno> {
        self.channels
            .get_mut(ch)
            .filter(|c| c.session == session)
            .ok_or(Errno::INVAL)
    }

    pub(crate) fn own_context(&self, session: Handle, context: Handle) -> Result<(), Errno> {
        let own = self
            .contexts
            .get(context)
            .is_some_and(|c| c.session == session);
        if own { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// What a session's device is.
    fn device(&self, session: Handle) -> Option<DeviceInfo> {
        let s = self.sessions.get(session)?;
        let endpoint = self.endpoints.get(s.endpoint)?;
        Some(DeviceInfo {
            node_guid: node_guid(endpoint.gid.0),
            gids: endpoint.gids(),
            limits: endpoint.limits(&self.limits),
            endpoint: endpoint.name.clone(),
            page_size: crate::memory::page_size(),
            mtu: self.network.mtu(),
            implicit_regions: endpoint.may_have_everything(),
        })
    }

    /// What a new session is told.
    pub(crate) fn welcome(&mut self, session: Handle) -> Option<Welcome> {
        let device = self.device(session)?;
        let s = self.sessions.get(session)?;
        let len = bytes_of_words(freeflow_shm::DirtyMap::WORDS);
        let region = RingLocation {
            slab: 0,
            slab_len: s.slabs.size(0),
            offset: 0,
            len,
        };
        Some(Welcome {
            version: PROTOCOL_VERSION,
            device,
            region,
        })
    }

    fn open_context(&mut self, session: Handle) -> Outcome {
        self.check_session(session, Held::DESCRIPTOR)?;
        let (router, program) = event_pair()?;
        let context = Context {
            session,
            events: Stream::new(router)?,
        };
        let context = self.contexts.insert(context).ok_or(Errno::NOMEM)?;
        self.session_mut(session)?.counts.contexts += 1;
        created(context, Some(program))
    }

    fn close_context(&mut self, session: Handle, context: Handle) -> Outcome {
        self.own_context(session, context)?;
        self.session_mut(session)?.closing = Some(context);
        done()
    }

    /// Goes on with what a request of a session left to be done, for as long as others may be kept
    /// waiting; false if nothing is left. The session's next request has to wait for that.
    pub(crate) fn work_off(&mut self, session: Handle) -> bool {
        let Some(s) = self.sessions.get_mut(session) else {
            return false;
        };
        if s.slabs.free_some() || s.segments.free_some() {
            return true;
        }
        let Some(context) = s.closing else {
            return false;
        };
        if self.remove_context(context, REMOVED_AT_ONCE)
            && let Some(s) = self.sessions.get_mut(session)
        {
            s.closing = None;
        }
        self.account(session);
        true
    }

    /// Removes what is left in a context, in the order that uses allow, at most so many objects;
    /// then the context. Whether it is gone.
    pub(crate) fn remove_context(&mut self, context: Handle, most: usize) -> bool {
        macro_rules! remove {
            ($($table:ident).+, $remove:ident) => {
                let some = self.$($table).+.some_of(context, most);
                if !some.is_empty() {
                    some.into_iter().for_each(|object| self.$remove(object));
                    return false;
                }
            };
        }
        remove!(qps, remove_qp);
        remove!(srqs, remove_srq);
        remove!(xrc.opens, remove_open);
        remove!(xrc.xrcds, remove_xrcd);
        remove!(cqs, remove_cq);
        remove!(windows, remove_window);
        remove!(mrs, remove_mr);
        remove!(dms, remove_dm);
        remove!(channels, remove_channel);
        remove!(pds, remove_pd);
        if let Some(c) = self.contexts.remove(context)
            && let Some(s) = self.sessions.get_mut(c.session)
        {
            s.counts.contexts -= 1;
            s.events_waiting = s.events_waiting.saturating_sub(c.events.waiting());
        }
        true
    }

    fn remove_channel(&mut self, channel: Handle) {
        if let Some(c) = self.channels.remove(channel)
            && let Some(s) = self.sessions.get_mut(c.session)
        {
            s.counts.channels -= 1;
            s.events_waiting = s.events_waiting.saturating_sub(c.events.waiting());
        }
    }

    fn remove_pd(&mut self, pd: Handle) {
        if let Some(p) = self.pds.remove(pd)
            && let Some(s) = self.sessions.get_mut(p.session)
        {
            s.counts.pds -= 1;
        }
    }

    fn alloc_pd(&mut self, session: Handle, context: Handle) -> Outcome {
        self.own_context(session, context)?;
        let limit = self.limits.max_pd;
        if self.session_mut(session)?.counts.pds >= limit {
            return Err(Errno::NOMEM);
        }
        self.check_quota(session, Resource::Pds, 1)?;
        let pd = Pd {
            session,
            context,
            users: 0,
        };
        let pd = self.pds.insert(pd).ok_or(Errno::NOMEM)?;
        self.session_mut(session)?.counts.pds += 1;
        created(pd, None)
    }

    fn dealloc_pd(&mut self, session: Handle, pd: Handle) -> Outcome {
        if self.own_pd(session, pd)?.users != 0 {
            return Err(Errno::BUSY);
        }
        self.remove_pd(pd);
        done()
    }

    fn alloc_pages(&mut self, session: Handle, len: u64) -> Outcome {
        let more = Held::range(&self.session_mut(session)?.segments, len);
        self.check_session(session, more)?;
        let s = self.session_mut(session)?;
        let range = s.segments.alloc(len)?;
        let segment_len = s.segments.size(range.area);
        let fds = s.segments.show(range.area).into_iter().collect();
        let reply = Reply::Pages {
            segment: range.area,
            segment_len,
            offset: range.offset,
        };
        Ok((reply, fds))
    }

    fn free_pages(&mut self, session: Handle, range: Range) -> Outcome {
        if self.session_mut(session)?.segments.adds_range(range)? {
            self.check_session(session, Held::pieces(1))?;
        }
        self.session_mut(session)?.segments.free(range)?;
        done()
    }

    fn attach_memory(&mut self, session: Handle) -> Outcome {
        let peer = {
            let s = self.session_mut(session)?;
            s.memory.is_none().then_some(s.peer)
        };
        if let Some(peer) = peer {
            let memory = self.opener.open(peer.pid, peer.uid)?;
            self.session_mut(session)?.memory = Some(memory);
        }
        done()
    }

    fn create_channel(&mut self, session: Handle, context: Handle) -> Outcome {
        self.own_context(session, context)?;
        let limit = self.limits.max_cq;
        if self.session_mut(session)?.counts.channels >= limit {
            return Err(Errno::NOMEM);
        }
        self.check_quota(session, Resource::Channels, 1)?;
        self.check_session(session, Held::DESCRIPTOR)?;
        let (router, program) = event_pair()?;
        let channel = Channel {
            session,
            context,
            events: Stream::new(router)?,
            users: 0,
        };
        let channel = self.channels.insert(channel).ok_or(Errno::NOMEM)?;
        self.session_mut(session)?.counts.channels += 1;
        created(channel, Some(program))
    }

    fn destroy_channel(&mut self, session: Handle, channel: Handle) -> Outcome {
        if self.own_channel(session, channel)?.users != 0 {
            return Err(Errno::BUSY);
        }
        self.remove_channel(channel);
        done()
    }

    /// Allocates ring memory: the range, its view, and what the library must know.
    pub(crate) fn alloc_ring(&mut self, session: Handle, len: u64) -> Result<Ring, Errno> {
        let more = Held::range(&self.session_mut(session)?.slabs, len);
        self.check_session(session, more)?;
        let s = self.session_mut(session)?;
        let range = s.slabs.alloc(len)?;
        let mapping = s.slabs.mapping(range.area).ok_or(Errno::NOMEM)?.clone();
        let region = Region::new(mapping, range.offset, len).map_err(|_| Errno::NOMEM)?;
        let location = RingLocation {
            slab: range.area,
            slab_len: s.slabs.size(range.area),
            offset: range.offset,
            len,
        };
        let fds = s.slabs.show(range.area).into_iter().collect();
        Ok(Ring {
            range,
            region,
            location,
            fds,
        })
    }

    fn create_cq(&mut self, session: Handle, request: &CreateCq) -> Outcome {
        self.own_context(session, request.context)?;
        if let Some(channel) = request.channel
            && self.own_channel(session, channel)?.context != request.context
        {
            return Err(Errno::INVAL);
        }
        let limit = self.limits.max_cq;
        if self.session_mut(session)?.counts.cqs >= limit {
            return Err(Errno::NOMEM);
        }
        self.check_quota(session, Resource::Cqs, 1)?;
        let entries = request.cqe.next_power_of_two();
        let len = bytes_of_words(CqRing::words(entries));
        let Ring {
            range: memory,
            region,
            location: ring,
            fds,
        } = self.alloc_ring(session, len)?;
        let cq = Cq {
            session,
            context: request.context,
            channel: request.channel,
            users: 0,
            memory,
            before: None,
            region,
            entries,
            produced: 0,
            overrun: false,
            moderation: None,
            held_back: None,
        };
        let Some(cq) = self.cqs.insert(cq) else {
            let _ = self.session_mut(session)?.slabs.free(memory);
            return Err(Errno::NOMEM);
        };
        self.session_mut(session)?.counts.cqs += 1;
        if let Some(channel) = request.channel {
            self.own_channel(session, channel)?.users += 1;
        }
        Ok((Reply::Cq(CqCreated { cq, entries, ring }), fds))
    }

    fn resize_cq(&mut self, session: Handle, cq: Handle, cqe: u32) -> Outcome {
        let c = self.own_cq(session, cq)?;
        let waiting = c.ring().map_or(0, |ring| ring.backlog(c.produced));
        if c.overrun || u64::from(cqe) < waiting {
            return Err(Errno::INVAL);
        }
        let entries = cqe.next_power_of_two();
        let Ring {
            range,
            region,
            location: ring,
            fds,
        } = self.alloc_ring(session, bytes_of_words(CqRing::words(entries)))?;
        let c = self.own_cq(session, cq)?;
        if let (Some(old), Some(new)) = (c.ring(), CqRing::new(region.words(), entries)) {
            old.hand_over_arming(&new);
        }
        (c.region, c.entries, c.produced) = (region, entries, 0);
        let old = std::mem::replace(&mut c.memory, range);
        if let Some(older) = c.before.replace(old) {
            // It was handed out by the same areas.
            let _ = self.session_mut(session)?.slabs.free(older);
        }
        Ok((Reply::Cq(CqCreated { cq, entries, ring }), fds))
    }

    fn destroy_cq(&mut self, session: Handle, cq: Handle) -> Outcome {
        if self.own_cq(session, cq)?.users != 0 {
            return Err(Errno::BUSY);
        }
        self.remove_cq(cq);
        done()
    }

    fn remove_cq(&mut self, cq: Handle) {
        self.cancel_event(cq);
        let Some(c) = self.cqs.remove(cq) else { return };
        if let Some(channel) = c.channel.and_then(|ch| self.channels.get_mut(ch)) {
            channel.users -= 1;
        }
        if let Some(s) = self.sessions.get_mut(c.session) {
            s.counts.cqs -= 1;
            for range in std::iter::once(c.memory).chain(c.before) {
                // It was handed out by the same areas.
                let _ = s.slabs.free(range);
            }
        }
    }

    fn create_qp(&mut self, session: Handle, request: &CreateQp) -> Outcome {
        // The sending side of XRC receives nothing, the receiving side has no queues.
        let xrc = match request.qp_type {
            QpType::Rc | QpType::Uc | QpType::Ud => false,
            QpType::XrcSend => true,
            QpType::XrcRecv => return Err(Errno::INVAL),
        };
        if xrc != request.recv_cq.is_none() || (xrc && request.srq.is_some()) {
            return Err(Errno::INVAL);
        }
        let context = self.own_pd(session, request.pd)?.context;
        for cq in [Some(request.send_cq), request.recv_cq]
            .into_iter()
            .flatten()
        {
            if self.own_cq(session, cq)?.context != context {
                return Err(Errno::INVAL);
            }
        }
        if let Some(srq) = request.srq {
            let s = self.own_srq(session, srq)?;
            if s.context != context || s.xrc.is_some() {
                return Err(Errno::INVAL);
            }
        }
        let limit = self.limits.max_qp;
        if self.session_mut(session)?.counts.qps >= limit {
            return Err(Errno::NOMEM);
        }
        self.check_quota(session, Resource::Qps, 1)?;
        let has_ring = !xrc && request.srq.is_none();
        let cap = &request.cap;
        let geometry = QpGeometry::new(
            cap.max_send_wr,
            if has_ring { cap.max_recv_wr } else { 0 },
            cap.max_send_sge.max(1),
            if has_ring { cap.max_recv_sge } else { 0 },
            cap.max_inline,
        );
        let cap = QpCap {
            max_send_wr: geometry.send_entries(),
            max_recv_wr: if has_ring { geometry.recv_entries() } else { 0 },
            max_send_sge: geometry.send_sge().min(self.limits.max_sge),
            max_recv_sge: if has_ring { cap.max_recv_sge.max(1) } else { 0 },
            max_inline: geometry.inline().min(self.limits.max_inline),
        };
        let requests = capacity(&geometry);
        self.check_quota(session, Resource::Outstanding, requests)?;
        let qpn = self.new_qpn()?;
        let endpoint = self.session_mut(session)?.endpoint;
        let len = bytes_of_words(geometry.words());
        let Ring {
            range: memory,
            region,
            location: ring,
            fds,
        } = self.alloc_ring(session, len)?;
        let s = self.session_mut(session)?;
        let Some(slot) = s.take_slot() else {
            let _ = s.slabs.free(memory);
            return Err(Errno::NOMEM);
        };
        let qp = QpObject {
            session,
            endpoint,
            context,
            pd: request.pd,
            qp_type: request.qp_type,
            qpn,
            slot,
            send_cq: request.send_cq,
            recv_cq: request.recv_cq.unwrap_or(NONE),
            srq: request.srq,
            xrc: None,
            sq_sig_all: request.sq_sig_all,
            transport: Qp::new(request.qp_type, cap),
            rings: Some(Rings {
                memory,
                region,
                geometry,
            }),
            send_head: 0,
            recv_head: 0,
            path: None,
            current: None,
            remote: None,
            datagrams: None,
            under_way: 0,
            taken: None,
            waiting: Waiting::No,
            ticket: None,
            timer: None,
            queued: false,
            established: false,
            last_wqe_told: false,
            draining: false,
            groups: Vec::new(),
        };
        let Some(qp) = self.qps.insert(qp) else {
            let s = self.session_mut(session)?;
            s.free_slot(slot);
            let _ = s.slabs.free(memory);
            return Err(Errno::NOMEM);
        };
        let s = self.session_mut(session)?;
        s.set_slot(slot, Slot::Qp(qp));
        s.counts.qps += 1;
        s.counts.outstanding += requests;
        self.by_qpn.insert(qpn.get(), qp);
        self.own_pd(session, request.pd)?.users += 1;
        self.own_cq(session, request.send_cq)?.users += 1;
        if let Some(cq) = request.recv_cq {
            self.own_cq(session, cq)?.users += 1;
        }
        if let Some(srq) = request.srq {
            self.own_srq(session, srq)?.users += 1;
        }
        Ok((
            Reply::Qp(QpCreated {
                qp,
                qpn,
                slot,
                cap,
                ring,
            }),
            fds,
        ))
    }

    /// A random QPN that nobody has and nobody had lately.
    pub(crate) fn new_qpn(&self) -> Result<Qpn, Errno> {
        loop {
            let qpn = random_u32()? & Qpn::MASK;
            let special = qpn < 16 || qpn == Qpn::MASK;
            if !special && !self.by_qpn.contains_key(&qpn) && !self.recent_qpns.contains(&qpn) {
                return Ok(Qpn::new(qpn));
            }
        }
    }

    pub(crate) fn modify_qp(
        &mut self,
        session: Handle,
        qp: Handle,
        attr: &QpAttr,
        mask: QpAttrMask,
    ) -> Outcome {
        self.own_qp(session, qp)?;
        self.apply_modify(qp, attr, mask)
    }

    /// Modifies a queue pair on behalf of somebody who may.
    pub(crate) fn apply_modify(&mut self, qp: Handle, attr: &QpAttr, mask: QpAttrMask) -> Outcome {
        let q = self.qps.get_mut(qp).ok_or(Errno::INVAL)?;
        let endpoint = self.endpoints.get(q.endpoint);
        let limits = ModifyLimits {
            max_rd_atomic: self.limits.max_rd_atomic,
            active_mtu: self.network.mtu(),
            gids: endpoint.map_or(0, |e| e.gids().len() as u8),
        };
        let was = q.transport.state();
        let change = q
            .transport
            .modify(attr, mask, &limits)
            .map_err(|_| Errno::INVAL)?;
        q.path = None;
        self.leave_line(qp);
        let q = self.qps.get_mut(qp).ok_or(Errno::INVAL)?;
        match change.to {
            QpState::Reset => {
                q.current = None;
                q.remote = None;
                q.datagrams = None;
                q.under_way = 0;
                q.taken = None;
                q.established = false;
                q.last_wqe_told = false;
                if let Some(rings) = q.rings() {
                    let heads = (rings.send_produced(), rings.recv_produced());
                    (q.send_head, q.recv_head) = heads;
                }
                self.stir(qp);
            }
            QpState::Rtr | QpState::Rts => {
                self.connect_remote(qp);
                self.stir(qp);
                // A peer that waits for us need not wait out its timer.
                if was != change.to
                    && let Some(peer) = self.peer(qp)
                    && self
                        .qps
                        .get(peer)
                        .is_some_and(|p| p.waiting == Waiting::Peer)
                {
                    self.resume(peer);
                }
            }
            QpState::Sqd if was == QpState::Rts => self.drain(qp),
            _ => self.stir(qp),
        }
        done()
    }

    /// Removes a queue pair; what is posted on it is forgotten without a completion.
    pub(crate) fn remove_qp(&mut self, qp: Handle) {
        let groups = self.qps.get(qp).map(|q| q.groups.clone());
        for gid in groups.unwrap_or_default() {
            let _ = self.detach_mcast(qp, gid);
        }
        self.cancel_timer(qp);
        let Some(mut q) = self.qps.remove(qp) else {
            return;
        };
        self.depart(q.qpn.get(), q.qp_type.is_reliable(), q.remote.take());
        if let Some(ticket) = q.ticket {
            self.give_back(ticket);
        }
        if let Some(srq) = q.srq.and_then(|srq| self.srqs.get_mut(srq)) {
            srq.users -= 1;
        }
        self.by_qpn.remove(&q.qpn.get());
        self.recent_qpns.push_back(q.qpn.get());
        if self.recent_qpns.len() > QPNS_AT_REST {
            self.recent_qpns.pop_front();
        }
        if let Some(pd) = self.pds.get_mut(q.pd) {
            pd.users -= 1;
        }
        for cq in [q.send_cq, q.recv_cq] {
            if let Some(cq) = self.cqs.get_mut(cq) {
                cq.users -= 1;
            }
        }
        let requests = q.capacity();
        if let Some(s) = self.sessions.get_mut(q.session) {
            s.counts.qps -= 1;
            s.counts.outstanding -= requests;
            s.free_slot(q.slot);
            if let Some(rings) = q.rings {
                // It was handed out by the same areas.
                let _ = s.slabs.free(rings.memory);
            }
        }
    }
}

/// A GUID of FreeFlow's own, local by its universal/local bit, from an endpoint's address.
pub(crate) fn node_guid(gid: [u8; 16]) -> u64 {
    let mut guid = [0; 8];
    guid.copy_from_slice(&gid[8..]);
    let mut bytes = [0x02, 0x46, 0x46, 0xFF, 0xFE, guid[5], guid[6], guid[7]];
    bytes[2] ^= guid[4];
    u64::from_be_bytes(bytes)
}

pub(crate) fn random_u32() -> Result<u32, Errno> {
    getrandom::u32().map_err(|_| Errno::AGAIN)
}
