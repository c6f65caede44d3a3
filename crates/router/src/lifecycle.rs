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

impl Engine {
    /// Adds an endpoint.
    pub(crate) fn add_endpoint(&mut self, spec: &EndpointSpec) -> Result<Handle, RouterError> {
        if !spec.ip.is_assignable() {
            return Err(RouterError::BadAddress { ip: spec.ip });
        }
        if self.endpoints.iter().any(|(_, e)| e.name == spec.name) {
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
            underlay,
            socket: spec.socket.clone(),
            counters: Default::default(),
            ready: VecDeque::new(),
            in_line: false,
            held: Held::default(),
            patience: Patience::new(Instant::now()),
            late: false,
            allowance: Allowance::default(),
        };
        let handle = self
            .endpoints
            .insert(endpoint)
            .ok_or(RouterError::TooMany)?;
        self.by_gid.insert((tenant, gid), handle);
        self.set_quota(handle, &spec.quota);
        Ok(handle)
    }

    /// Tenant of an endpoint.
    pub(crate) fn tenant(&self, endpoint: &str) -> Option<String> {
        let (_, found) = self.endpoints.iter().find(|(_, e)| e.name == endpoint)?;
        Some(found.tenant_name.clone())
    }

    /// Removes an endpoint and ends its sessions.
    pub(crate) fn remove_endpoint(&mut self, endpoint: Handle) {
        for session in self.sessions.of(endpoint) {
            self.end_session(session, EndReason::EndpointRemoved);
        }
        self.forget_cm(endpoint);
        if let Some(e) = self.endpoints.remove(endpoint) {
            self.by_gid.remove(&(e.tenant, e.gid));
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

    /// Ends a session: all its objects go, and its peers find that nobody answers.
    pub(crate) fn end_session(&mut self, session: Handle, reason: EndReason) {
        let Some(s) = self.sessions.get(session) else {
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
        let memory = self.sessions.get_mut(session).map(|s| {
            let (slabs, segments) = (Areas::slabs(), Areas::segments());
            let slabs = std::mem::replace(&mut s.slabs, slabs);
            (slabs, std::mem::replace(&mut s.segments, segments))
        });
        // Peers hear of it before their queue pairs find out.
        self.remove_cm_of(session);
        for context in self.contexts.of(session) {
            while !self.remove_context(context, usize::MAX) {}
        }
        if let Some(mut s) = self.sessions.remove(session) {
            if let Some((slabs, segments)) = memory {
                (s.slabs, s.segments) = (slabs, segments);
            }
            self.settle(&s);
            self.dead.push(s);
        }
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

    /// What `freeflow status` shows of the endpoints.
    pub(crate) fn status(&self) -> Vec<freeflow_api::EndpointStatus> {
        let mut all: Vec<_> = self
            .endpoints
            .iter()
            .map(|(handle, e)| freeflow_api::EndpointStatus {
                name: e.name.clone(),
                tenant: e.tenant_name.clone(),
                ip: e.ip.0,
                gid: e.gid.to_string(),
                underlay_gid: e.underlay_gid().map(|gid| gid.to_string()),
                socket: e.socket.clone(),
                sessions: self
                    .sessions
                    .of(handle)
                    .into_iter()
                    .filter_map(|session| {
                        let paths = self.paths(session);
                        let listeners = self.cm_listeners(session);
                        Some(self.sessions.get(session)?.status(paths, listeners))
                    })
                    .collect(),
                counters: e.counters.clone(),
                quota: e.quota_status(),
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// How a session's connected queue pairs reach their peers.
    fn paths(&self, session: Handle) -> Vec<freeflow_api::PathStatus> {
        let slots = self.sessions.get(session).map(|s| s.slots.iter());
        let mut by_host = BTreeMap::<Option<IpAddr>, u32>::new();
        for slot in slots.into_iter().flatten().flatten() {
            let &Slot::Qp(qp) = slot else { continue };
            let Some(q) = self.qps.get(qp) else { continue };
            if q.qp_type.is_connected() && q.transport.may_receive() {
                let host = q.remote.as_ref().map(|remote| remote.host());
                *by_host.entry(host).or_default() += 1;
            }
        }
        let path = |(host, qps)| freeflow_api::PathStatus { host, qps };
        by_host.into_iter().map(path).collect()
    }
}

impl Session {
    fn status(
        &self,
        paths: Vec<freeflow_api::PathStatus>,
        cm_listeners: u32,
    ) -> freeflow_api::SessionStatus {
        let (posted, posted_bytes) = self.posted.as_ref().map_or((0, 0), Posted::weight);
        freeflow_api::SessionStatus {
            pid: self.peer.pid,
            uid: self.peer.uid,
            contexts: self.counts.contexts,
            pds: self.counts.pds,
            cqs: self.counts.cqs,
            qps: self.counts.qps,
            paths,
            srqs: self.counts.srqs,
            cm_ids: self.counts.cm_ids,
            cm_listeners,
            mrs: self.counts.mrs + posted,
            registered_bytes: self.counts.registered.saturating_add(posted_bytes),
            foreign_bytes: self.counts.foreign,
            shared_bytes: self.segments.used(),
            connected_for_ms: self.since.elapsed().as_millis() as u64,
        }
    }
}
