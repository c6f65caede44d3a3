//! Extended reliable connections: domains, their shared receive queues by number, and receive
//! queue pairs that several processes hold.
//!
//! A domain lies within one endpoint and one user, whatever numbers name its file: who gives the
//! numbers of a file that it cannot open meets processes of its own user alone, whose memory it
//! could reach anyway.

use std::collections::VecDeque;

use freeflow_policy::Resource;
use freeflow_session::{
    Event, FileId, Handle, OpenXrcQp, OpenXrcd, QpQueried, Reply, XrcQpOpened, XrcSrq,
};
use freeflow_transport::{Nak, Outcome as SendOutcome, Qp};
use freeflow_types::{AsyncEventType, QpAttr, QpAttrMask, QpCap, QpType, Qpn};
use rustc_hash::FxHashMap;
use rustix::io::Errno;

use crate::control::{Outcome, QPNS_AT_REST, created, done, random_u32};
use crate::engine::Engine;
use crate::exec::Request;
use crate::objects::{QpObject, Waiting};
use crate::table::{NONE, Owned, Table};

/// All state of XRC.
#[derive(Debug, Default)]
pub(crate) struct XrcState {
    domains: Table<Domain>,
    by_file: FxHashMap<SharedFile, Handle>,
    pub(crate) xrcds: Table<Xrcd>,
    pub(crate) opens: Table<Open>,
    pub(crate) by_srqn: FxHashMap<u32, Handle>,
    recent_srqns: VecDeque<u32>,
}

#[cfg(feature = "testing")]
impl XrcState {
    pub(crate) fn is_empty(&self) -> bool {
        self.domains.iter().next().is_none()
            && self.xrcds.iter().next().is_none()
            && self.opens.iter().next().is_none()
            && self.by_file.is_empty()
            && self.by_srqn.is_empty()
    }
}

impl Owned for Domain {
    /// It ends with the last who has it open.
    fn owner(&self) -> Handle {
        NONE
    }
}

impl Owned for Xrcd {
    fn owner(&self) -> Handle {
        self.context
    }
}

impl Owned for Open {
    fn owner(&self) -> Handle {
        self.context
    }
}

/// What names a domain that is shared.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct SharedFile {
    endpoint: Handle,
    uid: u32,
    file: FileId,
}

/// XRC domain.
#[derive(Debug)]
struct Domain {
    shared: Option<SharedFile>,
    /// How often it is open.
    opened: u32,
}

/// A session's opening of a domain.
#[derive(Debug)]
pub(crate) struct Xrcd {
    session: Handle,
    context: Handle,
    domain: Handle,
    users: u32,
}

/// A session's opening of a receive queue pair.
#[derive(Debug)]
pub(crate) struct Open {
    session: Handle,
    context: Handle,
    xrcd: Handle,
    qp: Handle,
}

/// What a receive queue pair is in its domain.
#[derive(Debug)]
pub(crate) struct XrcRecv {
    domain: Handle,
    /// It lives as long as somebody has it open.
    opens: Vec<Handle>,
}

/// What a shared receive queue is in its domain.
#[derive(Debug)]
pub(crate) struct XrcMember {
    pub(crate) srqn: u32,
    pub(crate) cq: Handle,
    xrcd: Handle,
    domain: Handle,
}

impl Engine {
    fn own_xrcd(&mut self, session: Handle, xrcd: Handle) -> Result<&mut Xrcd, Errno> {
        self.xrc
            .xrcds
            .get_mut(xrcd)
            .filter(|x| x.session == session)
            .ok_or(Errno::INVAL)
    }

    fn own_open(&self, session: Handle, open: Handle) -> Result<&Open, Errno> {
        self.xrc
            .opens
            .get(open)
            .filter(|o| o.session == session)
            .ok_or(Errno::INVAL)
    }

    pub(crate) fn open_xrcd(&mut self, session: Handle, request: &OpenXrcd) -> Outcome {
        self.own_context(session, request.context)?;
        self.check_quota(session, Resource::Xrcds, 1)?;
        let limit = self.limits.max_xrcd;
        let s = self.session_mut(session)?;
        if s.counts.xrcds >= limit {
            return Err(Errno::NOMEM);
        }
        let shared = request.file.map(|file| SharedFile {
            endpoint: s.endpoint,
            uid: s.peer.uid,
            file,
        });
        let known = shared.and_then(|f| self.xrc.by_file.get(&f).copied());
        let domain = match known {
            Some(_) if request.exclusive => return Err(Errno::INVAL),
            None if shared.is_some() && !request.create => return Err(Errno::AGAIN),
            Some(domain) => domain,
            None => {
                let opened = 0;
                let made = self.xrc.domains.insert(Domain { shared, opened });
                made.ok_or(Errno::NOMEM)?
            }
        };
        let xrcd = self.xrc.xrcds.insert(Xrcd {
            session,
            context: request.context,
            domain,
            users: 0,
        });
        let Some(xrcd) = xrcd else {
            if known.is_none() {
                self.xrc.domains.remove(domain);
            }
            return Err(Errno::NOMEM);
        };
        if let Some(file) = shared {
            self.xrc.by_file.insert(file, domain);
        }
        if let Some(d) = self.xrc.domains.get_mut(domain) {
            d.opened += 1;
        }
        self.session_mut(session)?.counts.xrcds += 1;
        created(xrcd, None)
    }

    pub(crate) fn close_xrcd(&mut self, session: Handle, xrcd: Handle) -> Outcome {
        if self.own_xrcd(session, xrcd)?.users != 0 {
            return Err(Errno::BUSY);
        }
        self.remove_xrcd(xrcd);
        done()
    }

    pub(crate) fn remove_xrcd(&mut self, xrcd: Handle) {
        let Some(x) = self.xrc.xrcds.remove(xrcd) else {
            return;
        };
        if let Some(s) = self.sessions.get_mut(x.session) {
            s.counts.xrcds -= 1;
        }
        let Some(d) = self.xrc.domains.get_mut(x.domain) else {
            return;
        };
        d.opened -= 1;
        if d.opened == 0
            && let Some(d) = self.xrc.domains.remove(x.domain)
            && let Some(file) = d.shared
        {
            self.xrc.by_file.remove(&file);
        }
    }

    /// What a new shared receive queue is to be in its domain.
    pub(crate) fn xrc_member(
        &mut self,
        session: Handle,
        context: Handle,
        request: &XrcSrq,
    ) -> Result<XrcMember, Errno> {
        let xrcd = self.own_xrcd(session, request.xrcd)?;
        let (domain, of) = (xrcd.domain, xrcd.context);
        if of != context || self.own_cq(session, request.cq)?.context != context {
            return Err(Errno::INVAL);
        }
        let srqn = loop {
            let srqn = random_u32()? & Qpn::MASK;
            let used = self.xrc.by_srqn.contains_key(&srqn);
            if srqn != 0 && !used && !self.xrc.recent_srqns.contains(&srqn) {
                break srqn;
            }
        };
        Ok(XrcMember {
            srqn,
            cq: request.cq,
            xrcd: request.xrcd,
            domain,
        })
    }

    /// A shared receive queue exists from now on.
    pub(crate) fn join_xrc(&mut self, srq: Handle) {
        let Some(member) = self.srqs.get(srq).and_then(|s| s.xrc.as_ref()) else {
            return;
        };
        self.xrc.by_srqn.insert(member.srqn, srq);
        if let Some(xrcd) = self.xrc.xrcds.get_mut(member.xrcd) {
            xrcd.users += 1;
        }
        if let Some(cq) = self.cqs.get_mut(member.cq) {
            cq.users += 1;
        }
    }

    /// A shared receive queue is gone.
    pub(crate) fn leave_xrc(&mut self, member: &XrcMember) {
        self.xrc.by_srqn.remove(&member.srqn);
        self.xrc.recent_srqns.push_back(member.srqn);
        if self.xrc.recent_srqns.len() > QPNS_AT_REST {
            self.xrc.recent_srqns.pop_front();
        }
        if let Some(xrcd) = self.xrc.xrcds.get_mut(member.xrcd) {
            xrcd.users -= 1;
        }
        if let Some(cq) = self.cqs.get_mut(member.cq) {
            cq.users -= 1;
        }
    }

    /// Creates a receive queue pair, or opens one of the same domain.
    pub(crate) fn open_xrc_qp(&mut self, session: Handle, request: &OpenXrcQp) -> Outcome {
        self.own_context(session, request.context)?;
        let xrcd = self.own_xrcd(session, request.xrcd)?;
        let domain = xrcd.domain;
        if xrcd.context != request.context {
            return Err(Errno::INVAL);
        }
        self.check_quota(session, Resource::Qps, 1)?;
        let limit = self.limits.max_qp;
        let s = self.session_mut(session)?;
        if s.counts.qps >= limit {
            return Err(Errno::NOMEM);
        }
        let endpoint = s.endpoint;
        let qp = match request.qpn {
            Some(qpn) => {
                let qp = *self.by_qpn.get(&qpn.get()).ok_or(Errno::INVAL)?;
                let found = self.qps.get(qp).and_then(|q| q.xrc.as_ref());
                found.filter(|x| x.domain == domain).ok_or(Errno::INVAL)?;
                qp
            }
            None => self.create_xrc_qp(endpoint, domain)?,
        };
        let open = self.xrc.opens.insert(Open {
            session,
            context: request.context,
            xrcd: request.xrcd,
            qp,
        });
        let q = self.qps.get_mut(qp).ok_or(Errno::INVAL)?;
        let qpn = q.qpn;
        let (Some(open), Some(xrc)) = (open, q.xrc.as_mut()) else {
            if request.qpn.is_none() {
                self.remove_qp(qp);
            }
            return Err(Errno::NOMEM);
        };
        xrc.opens.push(open);
        self.own_xrcd(session, request.xrcd)?.users += 1;
        self.session_mut(session)?.counts.qps += 1;
        Ok((Reply::XrcQp(XrcQpOpened { open, qpn }), Vec::new()))
    }

    fn create_xrc_qp(&mut self, endpoint: Handle, domain: Handle) -> Result<Handle, Errno> {
        let qpn = self.new_qpn()?;
        let opens = Vec::new();
        let qp = QpObject {
            session: NONE,
            endpoint,
            context: NONE,
            pd: NONE,
            qp_type: QpType::XrcRecv,
            qpn,
            slot: 0,
            send_cq: NONE,
            recv_cq: NONE,
            srq: None,
            xrc: Some(XrcRecv { domain, opens }),
            sq_sig_all: false,
            transport: Qp::new(QpType::XrcRecv, QpCap::default()),
            rings: None,
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
        let qp = self.qps.insert(qp).ok_or(Errno::NOMEM)?;
        self.by_qpn.insert(qpn.get(), qp);
        Ok(qp)
    }

    pub(crate) fn modify_xrc_qp(
        &mut self,
        session: Handle,
        open: Handle,
        attr: &QpAttr,
        mask: QpAttrMask,
    ) -> Outcome {
        let qp = self.own_open(session, open)?.qp;
        self.apply_modify(qp, attr, mask)
    }

    pub(crate) fn query_xrc_qp(&mut self, session: Handle, open: Handle) -> Outcome {
        let qp = self.own_open(session, open)?.qp;
        let attr = self.qps.get(qp).ok_or(Errno::INVAL)?.transport.query();
        Ok((Reply::QpQueried(QpQueried { attr }), Vec::new()))
    }

    pub(crate) fn close_xrc_qp(&mut self, session: Handle, open: Handle) -> Outcome {
        self.own_open(session, open)?;
        self.remove_open(open);
        done()
    }

    pub(crate) fn remove_open(&mut self, open: Handle) {
        let Some(o) = self.xrc.opens.remove(open) else {
            return;
        };
        if let Some(s) = self.sessions.get_mut(o.session) {
            s.counts.qps -= 1;
        }
        if let Some(xrcd) = self.xrc.xrcds.get_mut(o.xrcd) {
            xrcd.users -= 1;
        }
        if let Some(xrc) = self.qps.get_mut(o.qp).and_then(|q| q.xrc.as_mut()) {
            xrc.opens.retain(|&other| other != open);
            if xrc.opens.is_empty() {
                self.remove_qp(o.qp);
            }
        }
    }

    /// Reports an event to all who have a receive queue pair open.
    pub(crate) fn xrc_event(&mut self, qp: Handle, event: AsyncEventType) {
        let opens = self.qps.get(qp).and_then(|q| q.xrc.as_ref());
        for open in opens.map(|x| x.opens.clone()).unwrap_or_default() {
            if let Some(context) = self.xrc.opens.get(open).map(|o| o.context) {
                self.async_event(context, Event::XrcQp(event, open));
            }
        }
    }

    /// The protection domain that a responder's keys belong to, and the shared receive queue that
    /// a message's receive request comes from. With XRC the request names the queue, whatever
    /// its operation (IBTA volume 1, annex A14): one that is not there, or in another domain, is
    /// an invalid request.
    pub(crate) fn target(
        &mut self,
        responder: Handle,
        request: &Request,
    ) -> Result<(Handle, Option<Handle>), SendOutcome> {
        let p = self.qps.get(responder).ok_or(SendOutcome::NoResponse)?;
        let Some(xrc) = &p.xrc else {
            return Ok((p.pd, p.srq));
        };
        let found = self.xrc.by_srqn.get(&request.entry.remote_srqn).copied();
        let found = found.and_then(|srq| {
            let s = self.srqs.get(srq)?;
            let member = s.xrc.as_ref()?;
            (member.domain == xrc.domain).then_some((s.pd, srq, member.cq))
        });
        // A message for another queue than the one whose request is half filled is not its rest.
        let begun = p.taken.as_ref().map(|taken| taken.retired);
        let found = found.filter(|&(_, srq, _)| begun.is_none_or(|b| b == u64::from(srq.0)));
        let Some((pd, srq, cq)) = found else {
            let nak = Nak::InvalidRequest;
            self.nak(responder, nak.event());
            return Err(nak.outcome());
        };
        // Where receives can complete no more, none are taken.
        if self.cqs.get(cq).is_none_or(|cq| cq.overrun) {
            self.nak(responder, Some(AsyncEventType::QpFatal));
            return Err(SendOutcome::RemoteOperation);
        }
        Ok((pd, Some(srq)))
    }
}
