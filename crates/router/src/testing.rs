//! The engine without threads and in virtual time, for tests and fuzzing alone: a session is a
//! handle, and what a program could write is at hand.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_fabric_udp::{Fabric, Link};
use freeflow_link::Agreed;
use freeflow_policy::Usage;
use freeflow_session::{Handle, Reply, Request, Welcome};
use freeflow_shm::{Mapping, Region, event_pair};
use freeflow_types::{DeviceLimits, VirtualIp};
use rustix::event::epoll;
use rustix::io::Errno;

use crate::engine::{Engine, Polled};
use crate::foreign::Opener;
use crate::held::Held;
use crate::objects::Peer;
use crate::posted::Posted;
use crate::remote::Map;
use crate::table::{Owned, Table};
use crate::watch::Progress;
use crate::{EndReason, EndpointSpec, Hosts};

/// Rounds in which everything that can be done without time passing is done.
const SETTLED: u32 = 10_000;

/// A router's engine.
pub struct Host {
    engine: Engine,
    progress: Progress,
    now: u64,
}

/// A session, with what a program holds of it.
pub struct Process {
    /// Its handle.
    pub session: Handle,
    /// What it was told.
    pub welcome: Welcome,
    /// Its end of the connection.
    _socket: OwnedFd,
}

impl Host {
    /// An engine without endpoints.
    pub fn new(limits: DeviceLimits) -> Result<Host, Errno> {
        let set = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        Ok(Host {
            engine: Engine::new(limits, 0, Opener::Direct, set),
            progress: Progress::default(),
            now: 0,
        })
    }

    /// Joins the network between hosts by a link, with a map of who is where; all of them are known
    /// to each other.
    pub fn join(&mut self, link: Box<dyn Link + Send>, hosts: Hosts) -> Result<(), Errno> {
        let (map, checked) = (Map::new(hosts, link.local()), link.has_checksum());
        let peers: Vec<_> = map.peers().map(|(host, _, n)| (host, n)).collect();
        self.engine.network.set_map(map);
        for (host, segment) in peers {
            let agreed = Agreed {
                incarnation: 1,
                version: 1,
                segment,
                selective: true,
                header_crc: checked,
            };
            self.engine.peer_up(host, agreed);
        }
        self.engine.join(Fabric::new(link))
    }

    /// Adds an endpoint.
    pub fn endpoint(&mut self, name: &str, tenant: &str, ip: VirtualIp) -> Option<Handle> {
        self.add(name, tenant, ip, false)
    }

    /// Adds an endpoint that has the underlay's GID beside its own.
    pub fn underlay_endpoint(&mut self, name: &str, tenant: &str, ip: VirtualIp) -> Option<Handle> {
        self.add(name, tenant, ip, true)
    }

    fn add(&mut self, name: &str, tenant: &str, ip: VirtualIp, underlay: bool) -> Option<Handle> {
        let spec = EndpointSpec {
            name: name.to_owned(),
            tenant: tenant.to_owned(),
            ip,
            socket: "/nowhere".into(),
            quota: Vec::new(),
            underlay_gid: underlay,
        };
        self.engine.add_endpoint(&spec).ok()
    }

    /// Removes an endpoint.
    pub fn remove_endpoint(&mut self, endpoint: Handle) {
        self.engine.remove_endpoint(endpoint);
        self.engine.take_dead();
    }

    /// Begins a session of a process whose memory cannot be reached.
    pub fn process(&mut self, endpoint: Handle) -> Result<Process, Errno> {
        let (router, program) = event_pair()?;
        let peer = Peer { pid: 0, uid: 0 };
        let begun = self
            .engine
            .begin_session(endpoint, peer, Arc::new(router))?;
        let (session, welcome, _) = begun;
        Ok(Process {
            session,
            welcome,
            _socket: program,
        })
    }

    /// Executes a request; the descriptors that would go with the answer.
    pub fn ask(
        &mut self,
        session: Handle,
        request: Request,
    ) -> (Result<Reply, Errno>, Vec<Arc<OwnedFd>>) {
        self.engine.now = self.now;
        let answer = self.engine.handle(session, request);
        while self.engine.work_off(session) {}
        self.engine.reap();
        let reply = answer.reply.map_err(|e| Errno::from_raw_os_error(e.0));
        (reply, answer.fds)
    }

    /// Runs one round after some nanoseconds.
    pub fn round(&mut self, later: u64) {
        self.now = self.now.saturating_add(later);
        self.engine.poll(self.now, &self.progress);
        self.engine.reap();
        self.engine.take_dead();
    }

    /// Watches all sessions and runs rounds until there is nothing to do at this time. False if
    /// there is no end of it.
    pub fn settle(&mut self) -> bool {
        let all: Vec<_> = self.engine.sessions.iter().map(|(s, _)| s).collect();
        self.engine.now = self.now;
        for session in all {
            self.engine.wake(session);
        }
        (0..SETTLED).any(|_| {
            let polled = self.engine.poll(self.now, &self.progress);
            self.engine.reap();
            matches!(polled, Polled::Asleep { .. })
        })
    }

    /// Whether a session goes on.
    pub fn is_alive(&self, session: Handle) -> bool {
        self.engine.sessions.get(session).is_some()
    }

    /// Ends a session as the end of its connection does.
    pub fn close(&mut self, session: Handle) {
        self.engine.end_session(session, EndReason::Closed);
        while self.engine.see_some_off() {}
        self.engine.take_dead();
    }

    /// Ring memory of a session: a slab.
    pub fn slab(&self, session: Handle, slab: u32) -> Option<Arc<Mapping>> {
        let s = self.engine.sessions.get(session)?;
        s.slabs.mapping(slab).cloned()
    }

    /// Registered memory of a session: a segment.
    pub fn segment(&self, session: Handle, segment: u32) -> Option<Arc<Mapping>> {
        let s = self.engine.sessions.get(session)?;
        s.segments.mapping(segment).cloned()
    }

    /// The dirty map of a session.
    pub fn dirty(&self, session: Handle) -> Option<Region> {
        Some(self.engine.sessions.get(session)?.dirty.clone())
    }

    /// Why the sessions ended that ended last.
    pub fn ended(&self) -> Vec<String> {
        self.engine.ended.iter().map(|e| e.reason.clone()).collect()
    }

    /// Looks whether everything the engine holds fits together: what a session counts with what
    /// there is, users with uses, ring memory with rings, timers and indices with queue pairs.
    pub fn check(&self) -> Result<(), String> {
        let e = &self.engine;
        for (session, s) in e.sessions.iter() {
            fn of<T: Owned>(table: &Table<T>, session: Handle, owner: fn(&T) -> Handle) -> u32 {
                table.iter().filter(|(_, t)| owner(t) == session).count() as u32
            }
            let rings: u64 = e
                .qps
                .iter()
                .filter(|(_, q)| q.session == session)
                .filter_map(|(_, q)| q.rings.as_ref())
                .map(|r| r.memory.len)
                .sum();
            let cqs: u64 = e
                .cqs
                .iter()
                .filter(|(_, c)| c.session == session)
                .map(|(_, c)| c.memory.len + c.before.map_or(0, |r| r.len))
                .sum();
            let page = crate::memory::page_size();
            let map = s.dirty.words().len() as u64 * 8;
            let slots = |slot: &&Option<_>| slot.is_some();
            let pairs = [
                (
                    "contexts",
                    s.counts.contexts,
                    of(&e.contexts, session, |c| c.session),
                ),
                ("domains", s.counts.pds, of(&e.pds, session, |p| p.session)),
                ("regions", s.counts.mrs, of(&e.mrs, session, |m| m.session)),
                (
                    "windows",
                    s.counts.mws,
                    of(&e.windows, session, |w| w.session),
                ),
                (
                    "slots of regions",
                    s.counts.slots,
                    s.posted.as_ref().map_or(0, |p| p.given() as u32),
                ),
                (
                    "keys",
                    s.counts.mrs + s.counts.slots + s.counts.mws,
                    s.keys.len() as u32,
                ),
                (
                    "channels",
                    s.counts.channels,
                    of(&e.channels, session, |c| c.session),
                ),
                ("ids", s.counts.cm_ids, e.cm.counts(session).0),
                ("events", s.counts.cm_events, e.cm.waiting(session)),
                (
                    "event channels",
                    s.counts.cm_channels,
                    e.cm.counts(session).1,
                ),
                (
                    "completion queues",
                    s.counts.cqs,
                    of(&e.cqs, session, |c| c.session),
                ),
                (
                    "slots",
                    s.slots.iter().filter(slots).count() as u32,
                    (s.slots.len() - s.free_slots.len()) as u32,
                ),
                (
                    "slots",
                    s.slots.iter().filter(slots).count() as u32,
                    of(&e.qps, session, |q| q.session) + s.counts.srqs,
                ),
            ];
            for (what, counted, found) in pairs {
                if counted != found {
                    return Err(format!("{what}: {counted} counted, {found} found"));
                }
            }
            let used = s.slabs.used() - map.next_multiple_of(page);
            let table = s.posted.as_ref().map_or(0, Posted::memory);
            let found = cqs + rings + table + e.srq_memory(session);
            if used != found {
                return Err(format!("{used} bytes of rings handed out, {found} used"));
            }
        }
        for (endpoint, at) in e.endpoints.iter() {
            let own = e.sessions.iter().filter(|(_, s)| s.endpoint == endpoint);
            let held = own.fold(Held::default(), |sum, (_, s)| sum + s.held());
            if at.held != held {
                return Err(format!("{:?} counted, {held:?} held", at.held));
            }
            let own = e.sessions.iter().filter(|(_, s)| s.endpoint == endpoint);
            let mut usage = Usage::default();
            own.for_each(|(_, s)| usage.replace(&Usage::default(), &s.usage()));
            if at.usage() != usage {
                return Err(format!("{:?} counted, {usage:?} used", at.usage()));
            }
        }
        for (pd, p) in e.pds.iter() {
            let mrs = e.mrs.iter().filter(|(_, m)| m.pd == pd).count();
            let qps = e.qps.iter().filter(|(_, q)| q.pd == pd).count();
            let srqs = e.srqs.iter().filter(|(_, s)| s.pd == pd).count();
            let windows = e.windows.iter().filter(|(_, w)| w.pd == pd).count();
            let users = mrs + qps + srqs + windows;
            if p.users as usize != users {
                return Err(format!("a domain has {} users, not {users}", p.users));
            }
        }
        for (mr, m) in e.mrs.iter() {
            let bound = e.windows.iter().filter(|(_, w)| w.is_bound_to(mr));
            if m.windows as usize != bound.count() {
                return Err(format!("a region has {} windows, not as many", m.windows));
            }
        }
        for (dm, d) in e.dms.iter() {
            let mrs = e.mrs.iter().filter(|(_, m)| m.dm == Some(dm)).count();
            if d.users as usize != mrs {
                return Err(format!("device memory has {} users, not {mrs}", d.users));
            }
        }
        for (ch, c) in e.channels.iter() {
            let cqs = e.cqs.iter().filter(|(_, q)| q.channel == Some(ch)).count();
            if c.users as usize != cqs {
                return Err(format!("a channel has {} users, not {cqs}", c.users));
            }
        }
        e.cm.check()?;
        for (qp, q) in e.qps.iter() {
            if e.by_qpn.get(&q.qpn.get()) != Some(&qp) {
                return Err(format!("{} is not found by its number", q.qpn));
            }
            if q.timer.is_some_and(|at| !e.timers.contains(&(at, qp.0))) {
                return Err(format!("the timer of {} is lost", q.qpn));
            }
        }
        let held = e.cqs.iter().filter(|(cq, c)| {
            let held = c.held_back.as_ref();
            held.is_some_and(|held| e.event_timers.contains(&(held.due, cq.0)))
        });
        let timers = e.qps.iter().filter(|(_, q)| q.timer.is_some()).count();
        for (what, has, needs) in [
            ("numbers", e.by_qpn.len(), e.qps.iter().count()),
            ("timers", e.timers.len(), timers),
            ("held events", e.event_timers.len(), held.count()),
        ] {
            if has != needs {
                return Err(format!("{has} {what}, {needs} belong to something"));
            }
        }
        Ok(())
    }

    /// Whether nothing of any session is left.
    pub fn is_empty(&self) -> bool {
        fn none<T: Owned>(table: &Table<T>) -> bool {
            table.iter().next().is_none()
        }
        let e = &self.engine;
        none(&e.sessions)
            && none(&e.contexts)
            && none(&e.pds)
            && none(&e.mrs)
            && none(&e.channels)
            && none(&e.cqs)
            && none(&e.qps)
            && none(&e.srqs)
            && none(&e.windows)
            && none(&e.dms)
            && e.xrc.is_empty()
            && e.cm.is_empty()
            && e.by_qpn.is_empty()
            && e.timers.is_empty()
            && e.event_timers.is_empty()
    }
}
