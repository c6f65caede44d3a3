//! The engine: owns every object, and executes work requests when it is polled.
//!
//! One thread at a time holds it. It knows no sockets but those it sends events to, and no clock:
//! the time comes in with each call.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use freeflow_session::{Event, Handle};
use freeflow_shm::DirtyMap;
use freeflow_types::{AsyncEventType, DeviceLimits, Gid, QpState, TenantId};
use rustc_hash::FxHashMap;

use crate::EndReason;
use crate::cm::Cm;
use crate::copier::Copiers;
use crate::data::Span;
use crate::events::StreamId;
use crate::exec::{Request, Step};
use crate::foreign::Opener;
use crate::held::MAX_PIECES;
use crate::lifecycle::Leaving;
use crate::notices::Notices;
use crate::objects::{
    Channel, Context, Cq, Dm, Endpoint, Mr, Pd, QpObject, Session, Slot, Waiting,
};
use crate::remote::Network;
use crate::srq::Srq;
use crate::table::Table;
use crate::watch::Progress;
use crate::windows::Window;
use crate::xrc::XrcState;

/// Bytes that one endpoint may have moved before the next one's turn, and that one step moves.
pub(crate) const TURN_BYTES: u64 = 256 << 10;

/// An endpoint's turn ends when the engine has waited so long for memory that cannot be shared.
const WAIT_PER_TURN: Duration = Duration::from_millis(1);

/// Slots of a session's dirty map that are looked at in one round.
const MARKS_PER_ROUND: u32 = 256;

/// What is left of an endpoint's turn.
struct Budget {
    queue_pairs: u32,
    messages: u32,
    bytes: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Budget {
            queue_pairs: 64,
            messages: 64,
            bytes: TURN_BYTES,
        }
    }
}

impl Budget {
    fn is_left(&self) -> bool {
        self.queue_pairs != 0 && self.messages != 0 && self.bytes != 0
    }
}

/// What a poll found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Polled {
    /// Work was done; there may be more.
    Busy,
    /// Nothing to do now, but sessions are watched.
    Idle,
    /// Nothing is watched: doorbells will ring, and nothing is due before this time.
    Asleep { until: Option<u64> },
}

/// All state of a router.
pub(crate) struct Engine {
    pub(crate) limits: DeviceLimits,
    /// Descriptors that all sessions of an endpoint may hold together.
    pub(crate) max_descriptors: u64,
    /// Pieces of memory regions, and free ranges, that all sessions of an endpoint may have.
    pub(crate) max_pieces: u64,
    /// Nanoseconds that a session is watched after its last work.
    pub(crate) spin: u64,
    /// The same while other hosts talk to us.
    pub(crate) network_spin: u64,
    pub(crate) opener: Opener,
    pub(crate) copiers: Copiers,
    /// How long the engine waited for memory in the present turn.
    pub(crate) waited: Duration,
    /// What the operator is to know.
    pub(crate) notices: Notices,
    pub(crate) doorbells: Arc<OwnedFd>,
    pub(crate) tenants: FxHashMap<String, TenantId>,
    pub(crate) endpoints: Table<Endpoint>,
    pub(crate) by_gid: FxHashMap<(TenantId, Gid), Handle>,
    /// Endpoints that share this host's address in the network between hosts, longest first.
    pub(crate) sharing: Vec<Handle>,
    pub(crate) sessions: Table<Session>,
    pub(crate) contexts: Table<Context>,
    pub(crate) pds: Table<Pd>,
    pub(crate) mrs: Table<Mr>,
    pub(crate) windows: Table<Window>,
    pub(crate) dms: Table<Dm>,
    pub(crate) channels: Table<Channel>,
    pub(crate) cqs: Table<Cq>,
    pub(crate) qps: Table<QpObject>,
    pub(crate) by_qpn: FxHashMap<u32, Handle>,
    pub(crate) recent_qpns: VecDeque<u32>,
    pub(crate) groups: crate::mcast::Groups,
    pub(crate) srqs: Table<Srq>,
    pub(crate) xrc: XrcState,
    pub(crate) network: Network,
    pub(crate) cm: Cm,
    hot: Vec<Handle>,
    /// When the polling thread looks again, if it sleeps; none: when it is woken.
    pub(crate) sleeps_until: Option<u64>,
    /// Endpoints with queue pairs that have something to do.
    line: VecDeque<Handle>,
    /// When a queue pair's timer fires: at most one of each.
    pub(crate) timers: BTreeSet<(u64, u32)>,
    /// When a completion queue's event is due that was held back: at most one of each.
    pub(crate) event_timers: BTreeSet<(u64, u32)>,
    /// When sessions without work are looked for, even if others are busy.
    cool_due: u64,
    pub(crate) dead: Vec<Session>,
    /// Sessions that have ended, in turn.
    pub(crate) leaving: VecDeque<Leaving>,
    /// Sessions with completion queues that overran, in turn.
    pub(crate) overrun: VecDeque<Handle>,
    /// Sessions that must end, found in the data path.
    pub(crate) ending: Vec<Handle>,
    pub(crate) ended: VecDeque<freeflow_api::EndedSession>,
    pub(crate) now: u64,
    pub(crate) request: Request,
    pub(crate) spans: (Vec<Span>, Vec<Span>),
    /// Sessions whose tables of regions are in use.
    pub(crate) using: Vec<Handle>,
    pub(crate) bounce: Vec<u8>,
    pub(crate) foreign_bytes: Vec<u8>,
    marks: Vec<u32>,
}

impl Engine {
    /// `doorbells` is the epoll set of the thread that polls.
    pub(crate) fn new(
        limits: DeviceLimits,
        spin: u64,
        opener: Opener,
        doorbells: Arc<OwnedFd>,
    ) -> Self {
        Engine {
            limits,
            max_descriptors: u64::MAX,
            max_pieces: MAX_PIECES,
            spin,
            copiers: opener.copiers(),
            waited: Duration::ZERO,
            notices: Notices::default(),
            network_spin: spin,
            opener,
            doorbells,
            tenants: FxHashMap::default(),
            endpoints: Table::default(),
            by_gid: FxHashMap::default(),
            sharing: Vec::new(),
            sessions: Table::default(),
            contexts: Table::default(),
            pds: Table::default(),
            mrs: Table::default(),
            windows: Table::default(),
            dms: Table::default(),
            channels: Table::default(),
            cqs: Table::default(),
            qps: Table::default(),
            by_qpn: FxHashMap::default(),
            recent_qpns: VecDeque::new(),
            groups: Default::default(),
            srqs: Table::default(),
            xrc: XrcState::default(),
            network: Network::default(),
            cm: Cm::new(limits.max_rd_atomic),
            hot: Vec::new(),
            sleeps_until: None,
            line: VecDeque::new(),
            timers: BTreeSet::new(),
            event_timers: BTreeSet::new(),
            cool_due: 0,
            dead: Vec::new(),
            leaving: VecDeque::new(),
            overrun: VecDeque::new(),
            ending: Vec::new(),
            ended: VecDeque::new(),
            now: 0,
            request: Request::default(),
            spans: Default::default(),
            using: Vec::new(),
            bounce: Vec::new(),
            foreign_bytes: Vec::new(),
            marks: Vec::new(),
        }
    }

    /// One round: collects marks of watched sessions, gives every ready queue pair a turn, fires
    /// timers.
    pub(crate) fn poll(&mut self, now: u64, progress: &Progress) -> Polled {
        self.now = now;
        self.collect();
        let received = self.receive_network();
        self.fire_timers();
        self.fire_cm_timers();
        let turns = self.line.len();
        for _ in 0..turns {
            let Some(endpoint) = self.line.pop_front() else {
                break;
            };
            self.endpoint_turn(endpoint, progress);
            self.end_uses();
        }
        self.flush_network();
        let more = self.see_some_off() | self.fail_some();
        let left = !self.line.is_empty() || !self.ending.is_empty() || self.has_cm_mail();
        let busy = more || turns != 0 || received || left;
        if !busy || now >= self.cool_due {
            self.cool_down();
            self.cool_due = now.saturating_add(self.patience());
        }
        if busy {
            return Polled::Busy;
        }
        if self.hot.is_empty() && !self.network.is_hot(now, self.patience()) {
            Polled::Asleep {
                until: self.next_due(),
            }
        } else {
            Polled::Idle
        }
    }

    /// Whether the polling thread, if it sleeps, has to wake up before its time: after a change that
    /// was made meanwhile, [`Self::poll`] would find something to do, or something to watch, or a
    /// timer is due earlier.
    pub(crate) fn wants_a_round(&self) -> bool {
        let work = !self.line.is_empty() || !self.hot.is_empty() || self.has_cm_mail();
        let ends = !self.leaving.is_empty() || !self.overrun.is_empty() || !self.ending.is_empty();
        let earlier = |at| self.sleeps_until.is_none_or(|until| at < until);
        work || ends || self.network.wants_a_round() || self.next_due().is_some_and(earlier)
    }

    /// A session's doorbell rang, or it has just begun: watch it.
    pub(crate) fn wake(&mut self, session: Handle) {
        let now = self.now;
        let Some(s) = self.sessions.get_mut(session) else {
            return;
        };
        s.last_active = now;
        if !std::mem::replace(&mut s.hot, true) {
            if let Some(map) = s.dirty_map() {
                map.disarm();
            }
            self.hot.push(session);
        }
    }

    fn collect(&mut self) {
        let hot = std::mem::take(&mut self.hot);
        for &session in &hot {
            let Some(s) = self.sessions.get_mut(session).filter(|s| !s.ended) else {
                continue;
            };
            let Some(map) = DirtyMap::new(s.dirty.words()) else {
                continue;
            };
            if !map.is_dirty() {
                continue;
            }
            let mut marks = std::mem::take(&mut self.marks);
            map.take_some(MARKS_PER_ROUND, &mut s.marks_from, |slot| marks.push(slot));
            s.last_active = self.now;
            for slot in marks.drain(..) {
                self.marked(session, slot);
            }
            self.marks = marks;
        }
        self.hot = hot;
    }

    /// The library marked one of its queues.
    fn marked(&mut self, session: Handle, slot: u32) {
        let Some(s) = self.sessions.get(session) else {
            return;
        };
        let qp = match s.slots.get(slot as usize) {
            Some(&Some(Slot::Qp(qp))) => qp,
            Some(&Some(Slot::Srq(srq))) => return self.serve_line(srq),
            _ => return,
        };
        self.make_ready(qp);
        // Its peer may wait for a receive request, unless it is on another host.
        if self.qps.get(qp).is_some_and(|q| q.remote.is_none())
            && let Some(peer) = self.peer(qp)
            && let Some(p) = self.qps.get(peer)
            && p.waiting == Waiting::Receiver
            && let Some(rings) = self.qps.get(qp).and_then(QpObject::rings)
            && self
                .qps
                .get(qp)
                .is_some_and(|q| q.recv_head != rings.recv_produced())
        {
            self.resume(peer);
        }
    }

    /// Puts a queue pair in line for a turn.
    pub(crate) fn make_ready(&mut self, qp: Handle) {
        let Some(q) = self.qps.get_mut(qp) else {
            return;
        };
        if !q.queued
            && let Some(e) = self.endpoints.get_mut(q.endpoint)
        {
            q.queued = true;
            e.ready.push_back(qp);
            if !std::mem::replace(&mut e.in_line, true) {
                self.line.push_back(q.endpoint);
            }
        }
    }

    /// What a queue pair waited for is there, or its time is over.
    pub(crate) fn resume(&mut self, qp: Handle) {
        self.end_wait(qp);
        self.make_ready(qp);
    }

    fn end_wait(&mut self, qp: Handle) {
        self.cancel_timer(qp);
        if let Some(q) = self.qps.get_mut(qp) {
            q.waiting = Waiting::No;
        }
    }

    /// As [`Self::resume`], of a queue pair that may have nothing to do.
    pub(crate) fn stir(&mut self, qp: Handle) {
        let Some(q) = self.qps.get(qp) else {
            return;
        };
        let posted = || q.rings().is_some_and(|r| r.send_produced() != q.send_head);
        let busy = q.remote.is_some()
            || match q.transport.state() {
                QpState::Reset | QpState::Init | QpState::Rtr => false,
                QpState::Rts => q.current.is_some() || posted(),
                QpState::Sqd | QpState::Sqe | QpState::Err => true,
            };
        self.end_wait(qp);
        if busy {
            self.make_ready(qp);
        }
    }

    /// Starts a queue pair's timer, in place of the one that it has.
    pub(crate) fn start_timer(&mut self, qp: Handle, at: u64) {
        self.cancel_timer(qp);
        if let Some(q) = self.qps.get_mut(qp) {
            q.timer = Some(at);
            self.timers.insert((at, qp.0));
        }
    }

    /// Stops a queue pair's timer, if it has one.
    pub(crate) fn cancel_timer(&mut self, qp: Handle) {
        if let Some(q) = self.qps.get_mut(qp)
            && let Some(at) = q.timer.take()
        {
            self.timers.remove(&(at, qp.0));
        }
    }

    fn fire_timers(&mut self) {
        while let Some(&(at, qp)) = self.timers.first()
            && at <= self.now
        {
            self.timers.pop_first();
            self.resume(Handle(qp));
        }
        while let Some(&(at, cq)) = self.event_timers.first()
            && at <= self.now
        {
            self.event_timers.pop_first();
            self.tell(Handle(cq));
        }
    }

    fn next_due(&self) -> Option<u64> {
        let timers = [self.timers.first(), self.event_timers.first()];
        let timers = timers.into_iter().flatten().map(|&(at, _)| at);
        let others = [self.network.next_timeout(), self.cm.next_timeout()];
        timers.chain(others.into_iter().flatten()).min()
    }

    /// Nanoseconds for which what has nothing to do is watched. While other hosts talk to us, their
    /// packets wake us as soon as they come; on few processors they would have to wait for one that
    /// polls with others in turn.
    fn patience(&self) -> u64 {
        if self.network.is_lively(self.now) {
            self.spin.min(self.network_spin)
        } else {
            self.spin
        }
    }

    /// Stops watching sessions that have had nothing to do for a while.
    fn cool_down(&mut self) {
        let (now, spin) = (self.now, self.patience());
        let sessions = &mut self.sessions;
        self.hot.retain(|&session| {
            let Some(s) = sessions.get_mut(session) else {
                return false;
            };
            if now.saturating_sub(s.last_active) < spin {
                return true;
            }
            let asleep = s.dirty_map().is_none_or(|map| map.arm());
            s.hot = !asleep;
            !asleep
        });
    }

    /// An endpoint's turn: its queue pairs that have something to do, one after the other, until
    /// enough is done that it is another endpoint's turn.
    fn endpoint_turn(&mut self, endpoint: Handle, progress: &Progress) {
        let mut budget = Budget::default();
        self.waited = Duration::ZERO;
        while budget.is_left() {
            let Some(e) = self.endpoints.get_mut(endpoint) else {
                return;
            };
            let Some(qp) = e.ready.pop_front() else {
                break;
            };
            if let Some(q) = self.qps.get_mut(qp) {
                progress.at(q.qpn.get());
                q.queued = false;
                let session = q.session;
                if self.has_ended(session) {
                    continue;
                }
                if self.turn(qp, &mut budget)
                    && let Some(s) = self.sessions.get_mut(session)
                {
                    // Who has much to do need not ring for more.
                    s.last_active = self.now;
                }
            }
        }
        if let Some(e) = self.endpoints.get_mut(endpoint) {
            e.in_line = !e.ready.is_empty();
            if e.in_line {
                self.line.push_back(endpoint);
            }
        }
    }

    /// A queue pair's turn; whether it did something.
    fn turn(&mut self, qp: Handle, budget: &mut Budget) -> bool {
        budget.queue_pairs = budget.queue_pairs.saturating_sub(1);
        let mut worked = false;
        while let Step::Done(bytes) = self.step(qp) {
            worked = true;
            budget.messages = budget.messages.saturating_sub(1);
            budget.bytes = budget.bytes.saturating_sub(bytes);
            if self.waited >= WAIT_PER_TURN {
                budget.messages = 0;
            }
            if budget.messages == 0 || budget.bytes == 0 {
                self.make_ready(qp);
                break;
            }
        }
        worked
    }

    /// The session of a queue pair broke a rule: it ends after this round.
    pub(crate) fn condemn(&mut self, session: Handle, reason: EndReason) {
        if let Some(s) = self.sessions.get_mut(session)
            && s.ending.is_none()
        {
            s.ending = Some(reason);
            self.ending.push(session);
        }
    }

    /// Moves a queue pair to the error state; its requests will be flushed.
    pub(crate) fn enter_error(&mut self, qp: Handle, event: Option<AsyncEventType>) {
        let Some(q) = self.qps.get_mut(qp) else {
            return;
        };
        if q.transport.state() != QpState::Err {
            q.transport.fail();
            self.leave_line(qp);
            self.resume(qp);
        }
        if let Some(event) = event {
            self.qp_event(qp, event);
        }
    }

    /// Reports an asynchronous event of a queue pair to all who hold it.
    pub(crate) fn qp_event(&mut self, qp: Handle, event: AsyncEventType) {
        let Some(q) = self.qps.get(qp) else { return };
        if q.xrc.is_some() {
            return self.xrc_event(qp, event);
        }
        self.async_event(q.context, Event::Qp(event, qp));
    }

    /// Reports an asynchronous event to a context's program.
    pub(crate) fn async_event(&mut self, context: Handle, event: Event) {
        self.send_event(StreamId::Context(context), event);
    }
}
