//! What the links to other routers say, and what it means for queue pairs.
//!
//! A queue pair is bound to the incarnation of its peer's router: it is connected by what both agreed
//! on, and hears and says nothing but to that incarnation. Until there is a link it waits; its
//! requests do so too, for as long as its attributes have them tried.

use std::net::IpAddr;

use freeflow_link::Agreed;
use freeflow_session::Handle;
use freeflow_transport::Outcome;
use freeflow_types::{QpState, WcStatus, timeout_ns};
use rustc_hash::FxHashMap;

use crate::EndReason;
use crate::engine::Engine;
use crate::exec::Step;
use crate::remote::{Network, Remote};

/// Unreliable requests wait so long for a link, in nanoseconds, before they go on and are lost:
/// nobody would tell their sender.
const UNRELIABLE_NS: u64 = 2_000_000_000;

/// A queue pair's standing with its peer's router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// There is no link yet. What is posted is given up at this time; none if nothing is.
    Waiting { until: Option<u64> },
    /// Connected by what was agreed, or to a host that is no router.
    Bound,
    /// The host is not believed any more, unless its link comes back.
    Doubted,
    /// The peer's router is gone; there is another one.
    Orphaned,
}

#[derive(Clone, Copy, Debug)]
struct Peer {
    incarnation: u64,
    /// What was agreed, while the link is up.
    agreed: Option<Agreed>,
    believed: bool,
}

/// The routers of other hosts.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    all: FxHashMap<IpAddr, Peer>,
    /// Whether a host must prove that it is one.
    pub(crate) authenticated: bool,
}

impl Peers {
    /// What a queue pair that is connected now is connected by.
    pub(super) fn agreed(&self, host: IpAddr) -> Option<Agreed> {
        self.all.get(&host)?.agreed
    }

    /// Whether packets of so much data may go to a host of the map, and it takes them.
    pub(super) fn takes(&self, host: IpAddr, payload: usize) -> bool {
        let fits = |agreed: Agreed| payload <= agreed.segment as usize;
        self.believes(host) && self.agreed(host).is_none_or(fits)
    }

    /// Whether packets may come from a host of the map and go there.
    pub(super) fn believes(&self, host: IpAddr) -> bool {
        !self.authenticated || self.all.get(&host).is_some_and(|peer| peer.believed)
    }
}

impl Remote {
    /// Whether packets may go to the peer.
    pub(super) fn may_send(&self) -> bool {
        matches!(self.standing, Standing::Bound)
    }
}

impl Network {
    /// Whether a queue pair hears its peer; if not, that is counted.
    pub(super) fn hears(&mut self, remote: &Remote) -> bool {
        match remote.standing {
            Standing::Bound => return true,
            Standing::Waiting { .. } | Standing::Doubted => self.drops.no_link += 1,
            Standing::Orphaned => self.drops.old_incarnation += 1,
        }
        false
    }
}

impl Engine {
    /// A host's router has said which incarnation it is.
    pub(crate) fn peer_greeted(&mut self, host: IpAddr, incarnation: u64) {
        let peers = &mut self.network.peers.all;
        let known = peers.get(&host).map(|peer| peer.incarnation);
        if known == Some(incarnation) {
            return;
        }
        let new = Peer {
            incarnation,
            agreed: None,
            believed: false,
        };
        peers.insert(host, new);
        if known.is_none() {
            return;
        }
        self.network.departed.forget_host(host);
        for qp in self.queue_pairs_to(host) {
            let Some(q) = self.qps.get_mut(qp) else {
                continue;
            };
            match &mut q.remote {
                // Whoever is connected to the new router may have been so before we heard of it.
                Some(remote) if !remote.heard => self.connect_anew(qp),
                Some(remote) => remote.standing = Standing::Orphaned,
                None => {}
            }
        }
    }

    /// A host's link is up.
    pub(crate) fn peer_up(&mut self, host: IpAddr, agreed: Agreed) {
        let new = Peer {
            incarnation: agreed.incarnation,
            agreed: Some(agreed),
            believed: true,
        };
        self.network.peers.all.insert(host, new);
        for qp in self.queue_pairs_to(host) {
            let Some(remote) = self.qps.get_mut(qp).and_then(|q| q.remote.as_mut()) else {
                continue;
            };
            match remote.standing {
                Standing::Waiting { .. } => self.connect_anew(qp),
                Standing::Doubted => remote.standing = Standing::Bound,
                Standing::Bound | Standing::Orphaned => {}
            }
        }
    }

    /// A host's link is down: what is connected goes on, and what is not waits.
    pub(crate) fn peer_down(&mut self, host: IpAddr) {
        if let Some(peer) = self.network.peers.all.get_mut(&host) {
            peer.agreed = None;
        }
    }

    /// A host is not believed any more, if it has to prove anything.
    pub(crate) fn peer_lapsed(&mut self, host: IpAddr) {
        if let Some(peer) = self.network.peers.all.get_mut(&host) {
            peer.believed = false;
        }
        if !self.network.peers.authenticated {
            return;
        }
        self.network.departed.forget_host(host);
        for qp in self.queue_pairs_to(host) {
            if let Some(remote) = self.qps.get_mut(qp).and_then(|q| q.remote.as_mut())
                && remote.standing == Standing::Bound
            {
                remote.standing = Standing::Doubted;
            }
        }
    }

    /// Those whose peers are a router's.
    fn queue_pairs_to(&self, host: IpAddr) -> Vec<Handle> {
        let theirs = |r: &Remote| r.is_router && r.host == host;
        let all = self.qps.iter();
        let all = all.filter(|(_, q)| q.remote.as_ref().is_some_and(|r| theirs(r)));
        all.map(|(qp, _)| qp).collect()
    }

    /// Connects a queue pair that has not had to do with its peer yet: its requests are still in its
    /// ring.
    fn connect_anew(&mut self, qp: Handle) {
        if let Some(q) = self.qps.get_mut(qp) {
            q.remote = None;
            q.under_way = 0;
            self.connect_remote(qp);
            self.resume(qp);
        }
    }

    /// Does what can be done for a queue pair without a link: local operations, and what is wrong
    /// with a request. Anything else waits, and at last is lost.
    pub(super) fn wait_for_link(&mut self, qp: Handle, remote: &mut Remote) -> Step {
        let now = self.now;
        let Some(q) = self
            .qps
            .get(qp)
            .filter(|q| q.transport.state() == QpState::Rts)
        else {
            return Step::Nothing;
        };
        let Some(rings) = q.rings() else {
            return Step::Nothing;
        };
        // Read once: the program may write it meanwhile.
        let waiting = rings.send_produced().wrapping_sub(q.send_head);
        if waiting > q.send_entries() {
            let (session, qpn) = (q.session, q.qpn.get());
            self.condemn(session, EndReason::SendIndex { qpn, waiting });
            return Step::Nothing;
        }
        let known = match remote.standing {
            Standing::Waiting { until } => until,
            _ => None,
        };
        if waiting == 0 {
            // Who has waited in vain does not wait again.
            let until = known.filter(|&until| until <= now);
            remote.standing = Standing::Waiting { until };
            return Step::Nothing;
        }
        let (reliable, attr) = (q.qp_type.is_reliable(), q.transport.attr());
        let patience = match (reliable, timeout_ns(attr.timeout)) {
            (true, Some(once)) => once.saturating_mul(u64::from(attr.retry_cnt) + 1),
            (true, None) => u64::MAX,
            (false, _) => UNRELIABLE_NS,
        };
        let mut request = self.network.spare.pop().unwrap_or_default();
        request.load(q.qp_type, rings.send_slot(q.send_head), rings.inline());
        let step = match (self.post_one(qp, remote, &request), request.opcode) {
            (Err(Outcome::Delivered), Some(opcode)) => {
                let outcome = self.local_operation(qp, opcode, &request);
                self.conclude(qp, &request, outcome, 0)
            }
            (Err(outcome), _) => self.conclude(qp, &request, outcome, 0),
            (Ok(_), _) => {
                let until = known.unwrap_or(now.saturating_add(patience));
                remote.standing = Standing::Waiting { until: Some(until) };
                if until > now {
                    if until != u64::MAX {
                        self.start_timer(qp, until);
                    }
                    Step::Nothing
                } else if reliable {
                    self.fail_request(qp, &request, WcStatus::RetryExcErr);
                    Step::Done(0)
                } else {
                    self.conclude(qp, &request, Outcome::Delivered, 0)
                }
            }
        };
        self.network.spare.push(request);
        step
    }
}
