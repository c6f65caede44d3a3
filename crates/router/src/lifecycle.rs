//! Endpoints and sessions: how they begin and end.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use freeflow_session::{Handle, Welcome};
use freeflow_shm::{DirtyMap, Doorbell, Region};
use freeflow_types::{Gid, TenantId};
use rustix::io::Errno;

use crate::control::REMOVED_AT_ONCE;
use crate::copier::Patience;
use crate::engine::Engine;
use crate::held::Held;
use crate::memory::Areas;
use crate::objects::{Counts, Endpoint, Peer, Session, Slot, Watched, bytes_of_words};
use crate::posted::Posted;
use crate::quota::Allowance;
use crate::{EndReason, EndpointSpec, RouterError};

/// Sessions that ended and are still told of in the status.
const ENDED_KEPT: usize = 64;

/// Steps of removing what a session had, of at most [`REMOVED_AT_ONCE`] objects each, when it ends:
/// all that most sessions have, in some hundred microseconds.
const STEPS_AT_ONCE: usize = 32;

/// The same in one of the engine's rounds.
const STEPS_PER_ROUND: usize = 8;

/// Slots of a session's queues that are looked at in a row.
pub(crate) const SLOTS_AT_ONCE: usize = 1024;

/// A session that has ended, and its memory.
#[derive(Debug)]
pub(crate) struct Leaving {
    session: Handle,
    slabs: Areas,
    segments: Areas,
}

impl Engine {
    /// Adds an endpoint.
    pub(crate) fn add_endpoint(&mut self, spec: &EndpointSpec) -> Result<Handle, RouterError> {
        if !spec.ip.is_assignable() {
            return Err(RouterError::BadAddress { ip: spec.ip });
        }
        if self.present().any(|(_, e)| e.name == spec.name) {
            return Err(RouterError::NameInUse {
                name: spec.name.clone(),
            });
        }
        let next = TenantId(self.tenants.len() as u32 + 1);
        let tenant = *self.tenants.entry(spec.tenant.clone()).or_insert(next);
        let gid = Gid::from(spec.ip);
        if let Some(by) = self
            .by_gid
            .get(&(tenant, gid))
            .and_then(|&e| self.endpoints.get(e))
        {
            return Err(RouterError::AddressInUse {
                ip: spec.ip,
                by: by.name.clone(),
            });
        }
        let underlay = match (spec.underlay_gid, self.network.local()) {
            (false, _) => None,
            (true, None) => return Err(RouterError::NoUnderlay),
            (true, local) => local,
        };
        let endpoint = Endpoint {
            name: spec.name.clone(),
            tenant,
            tenant_name: spec.tenant.clone(),
            ip: spec.ip,
            gid,
            underlay: None,
            socket: spec.socket.clone(),
            counters: Default::default(),
            ready: VecDeque::new(),
            in_line: false,
            held: Held::default(),
            patience: Patience::new(Instant::now()),
            late: false,
            removed: false,
            allowance: Allowance::default(),
        };
        let handle = self
            .endpoints
            .insert(endpoint)
            .ok_or(RouterError::TooMany)?;
        self.by_gid.insert((tenant, gid), handle);
        if let Some(ip) = underlay {
            self.share_address(handle, ip);
        }
        self.set_quota(handle, &spec.quota);
        Ok(handle)
    }

    /// Gives an endpoint this host's address as a second GID.
    pub(crate) fn share_address(&mut self, endpoint: Handle, ip: IpAddr) {
        if let Some(e) = self.endpoints.get_mut(endpoint) {
            e.underlay = Some(ip);
            self.sharing.push(endpoint);
        }
    }

    /// Tenant of an endpoint.
    pub(crate) fn tenant(&self, endpoint: &str) -> Option<String> {
        let (_, found) = self.present().find(|(_, e)| e.name == endpoint)?;
        Some(found.tenant_name.clone())
    }

    /// Endpoints that were not removed.
    fn present(&self) -> impl Iterator<Item = (Handle, &Endpoint)> {
        self.endpoints.iter().filter(|(_, e)| !e.removed)
    }

    /// Removes an endpoint and ends its sessions.
    pub(crate) fn remove_endpoint(&mut self, endpoint: Handle) {
        for session in self.sessions.of(endpoint) {
            self.end_session(session, EndReason::EndpointRemoved);
        }
        if let Some(e) = self.endpoints.get_mut(endpoint) {
            // Nobody is at its addresses any more.
            e.removed = true;
            e.underlay = None;
            self.by_gid.remove(&(e.tenant, e.gid));
            self.sharing.retain(|&sharing| sharing != endpoint);
        }
        self.forget(endpoint);
    }

    /// Removes an endpoint from the table, if it is to go and nothing of its sessions is left.
    fn forget(&mut self, endpoint: Handle) {
        if self.endpoints.get(endpoint).is_some_and(|e| e.removed)
            && self.sessions.some_of(endpoint, 1).is_empty()
        {
            self.forget_cm(endpoint);
            self.endpoints.remove(endpoint);
        }
    }

    /// Begins a session: its handle, what it is told, and the descriptors beside that: the
    /// doorbell and the first slab. ENODEV: the endpoint is gone.
    pub(crate) fn begin_session(
        &mut self,
        endpoint: Handle,
        peer: Peer,
        socket: Arc<OwnedFd>,
    ) -> Result<(Handle, Welcome, Vec<Arc<OwnedFd>>), Errno> {
        if self.endpoints.get(endpoint).is_none_or(|e| e.removed) {
            return Err(Errno::NODEV);
        }
        let mut slabs = Areas::slabs();
        self.check_held(endpoint, Held::session(&slabs))?;
        let len = bytes_of_words(DirtyMap::WORDS);
        let range = slabs.alloc(len)?;
        let mapping = slabs.mapping(range.area).ok_or(Errno::NOMEM)?.clone();
        let dirty = Region::new(mapping, range.offset, len).map_err(|_| Errno::NOMEM)?;
        let session = Session {
            endpoint,
            peer,
            since: Instant::now(),
            socket,
            doorbell: None,
            dirty,
            marks_from: 0,
            slabs,
            segments: Areas::segments(),
            memory: None,
            memory_gone: false,
            slots: Vec::new(),
            free_slots: VecDeque::new(),
            keys: Default::default(),
            posted: None,
            events_waiting: 0,
            counts: Counts::default(),
            closing: None,
            held: Held::default(),
            usage: Default::default(),
            hot: false,
            last_active: 0,
            ending: None,
            ended: false,
            overruns: None,
        };
        let handle = self.sessions.insert(session).ok_or(Errno::NOMEM)?;
        match self.introduce(handle) {
            Ok((welcome, fds)) => {
                // Watched at once: that puts its doorbell in order.
                self.wake(handle);
                self.account(handle);
                Ok((handle, welcome, fds))
            }
            Err(errno) => {
                self.sessions.remove(handle);
                Err(errno)
            }
        }
    }

    fn introduce(&mut self, session: Handle) -> Result<(Welcome, Vec<Arc<OwnedFd>>), Errno> {
        let welcome = self.welcome(session).ok_or(Errno::NODEV)?;
        let set = self.doorbells.clone();
        let s = self.sessions.get_mut(session).ok_or(Errno::NODEV)?;
        let watched = Watched::new(Doorbell::new()?, set, session.0.into())?;
        let doorbell = Arc::new(watched.share()?);
        s.doorbell = Some(watched);
        let fds = std::iter::once(doorbell).chain(s.slabs.show(0)).collect();
        Ok((welcome, fds))
    }

    /// Ends a session: from now on nothing of it does anything, and its peers find that nobody
    /// answers. All its objects go; of many, most go bit by bit with later rounds.
    pub(crate) fn end_session(&mut self, session: Handle, reason: EndReason) {
        let Some(s) = self.sessions.get(session).filter(|s| !s.ended) else {
            return;
        };
        let reason = s.ending.clone().unwrap_or(reason);
        let name = self
            .endpoints
            .get(s.endpoint)
            .map(|e| e.name.clone())
            .unwrap_or_default();
        let ended = freeflow_api::EndedSession {
            endpoint: name,
            pid: s.peer.pid,
            reason: reason.to_string(),
        };
        self.ended.push_back(ended);
        if self.ended.len() > ENDED_KEPT {
            self.ended.pop_front();
        }
        // Whoever still holds the socket sees its end; the control thread too.
        let _ = rustix::net::shutdown(&*s.socket, rustix::net::Shutdown::Both);
        // The library still reads its rings: what was completed, and what is to be flushed. They go
        // as a whole, when it lets go of them, and are not emptied one by one.
        let Some(s) = self.sessions.get_mut(session) else {
            return;
        };
        s.ended = true;
        let slabs = std::mem::replace(&mut s.slabs, Areas::slabs());
        let segments = std::mem::replace(&mut s.segments, Areas::segments());
        self.leaving.push_back(Leaving {
            session,
            slabs,
            segments,
        });
        self.see_off(session, STEPS_AT_ONCE);
    }

    /// Removes some more of what sessions that have ended had; false if nothing is left.
    pub(crate) fn see_some_off(&mut self) -> bool {
        let Some(first) = self.leaving.front() else {
            return false;
        };
        self.see_off(first.session, STEPS_PER_ROUND);
        // Many that leave do so in turn.
        if !self.leaving.is_empty() {
            self.leaving.rotate_left(1);
        }
        true
    }

    /// Removes some more of what a session had, and then the session. What it has against its
    /// quota, and holds of the router, counts until then.
    fn see_off(&mut self, session: Handle, steps: usize) {
        for _ in 0..steps {
            // Peers hear of it before their queue pairs find out.
            if self.remove_some_cm(session, REMOVED_AT_ONCE) {
                continue;
            }
            if let Some(&context) = self.contexts.some_of(session, 1).first() {
                self.remove_context(context, REMOVED_AT_ONCE);
                continue;
            }
            let at = self.leaving.iter().position(|l| l.session == session);
            let left = at.and_then(|at| self.leaving.remove(at));
            if let Some(mut s) = self.sessions.remove(session) {
                if let Some(left) = left {
                    (s.slabs, s.segments) = (left.slabs, left.segments);
                }
                self.settle(&s);
                self.forget(s.endpoint);
                self.dead.push(s);
            }
            return;
        }
    }

    /// Whether a session has ended and is being removed.
    pub(crate) fn has_ended(&self, session: Handle) -> bool {
        // Hardly ever does any.
        !self.leaving.is_empty() && self.sessions.get(session).is_some_and(|s| s.ended)
    }

    /// Sessions that have ended. To drop one unmaps and frees its memory, which takes its time:
    /// not while others wait for the engine.
    pub(crate) fn take_dead(&mut self) -> Vec<Session> {
        std::mem::take(&mut self.dead)
    }

    /// Ends the sessions that the data path condemned.
    pub(crate) fn reap(&mut self) {
        for session in std::mem::take(&mut self.ending) {
            self.end_session(session, EndReason::Closed);
        }
    }

    /// What `freeflow status` shows of the endpoints, and the handles of their sessions in the same
    /// order: the sessions' paths are still to be filled in, see [`Self::count_paths`].
    pub(crate) fn status(&self) -> Vec<(freeflow_api::EndpointStatus, Vec<Handle>)> {
        let one = |(handle, e): (Handle, &Endpoint)| {
            let mut sessions = self.sessions.of(handle);
            sessions.retain(|&session| !self.has_ended(session));
            let status = freeflow_api::EndpointStatus {
                name: e.name.clone(),
                tenant: e.tenant_name.clone(),
                ip: e.ip.0,
                gid: e.gid.to_string(),
                underlay_gid: e.underlay_gid().map(|gid| gid.to_string()),
                socket: e.socket.clone(),
                sessions: sessions
                    .iter()
                    .filter_map(|&session| Some(self.sessions.get(session)?.status()))
                    .collect(),
                counters: e.counters.clone(),
                quota: e.quota_status(),
            };
            (status, sessions)
        };
        let mut all: Vec<_> = self.present().map(one).collect();
        all.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        all
    }

    /// Counts how a session's connected queue pairs reach their peers, at most so many slots from
    /// the one given; the slot to go on with, if there are more.
    pub(crate) fn count_paths(
        &self,
        session: Handle,
        from: usize,
        paths: &mut BTreeMap<Option<IpAddr>, u32>,
    ) -> Option<usize> {
        let end = from + SLOTS_AT_ONCE;
        let slots = &self.sessions.get(session)?.slots;
        for slot in slots.get(from..end.min(slots.len()))?.iter().flatten() {
            let &Slot::Qp(qp) = slot else { continue };
            let Some(q) = self.qps.get(qp) else { continue };
            if q.qp_type.is_connected() && q.transport.may_receive() {
                let host = q.remote.as_ref().map(|remote| remote.host());
                *paths.entry(host).or_default() += 1;
            }
        }
        (end < slots.len()).then_some(end)
    }
}

impl Session {
    fn status(&self) -> freeflow_api::SessionStatus {
        let (posted, posted_bytes) = self.posted.as_ref().map_or((0, 0), Posted::weight);
        freeflow_api::SessionStatus {
            pid: self.peer.pid,
            uid: self.peer.uid,
            contexts: self.counts.contexts,
            pds: self.counts.pds,
            cqs: self.counts.cqs,
            qps: self.counts.qps,
            paths: Vec::new(),
            srqs: self.counts.srqs,
            cm_ids: self.counts.cm_ids,
            cm_listeners: self.counts.cm_listeners,
            mrs: self.counts.mrs + posted,
            registered_bytes: self.counts.registered.saturating_add(posted_bytes),
            foreign_bytes: self.counts.foreign,
            shared_bytes: self.segments.used(),
            connected_for_ms: self.since.elapsed().as_millis() as u64,
        }
    }
}
