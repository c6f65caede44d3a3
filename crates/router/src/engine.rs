//! The engine: owns every object, and executes work requests when it is polled.
//!
//! One thread at a time holds it. It knows no sockets but those it sends events to, and no clock:
//! the time comes in with each call.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_session::{Event, Handle};
use freeflow_shm::CompletionEntry;
use freeflow_types::{AsyncEventType, DeviceLimits, Gid, QpState, TenantId, WcStatus};
use rustc_hash::FxHashMap;

use crate::EndReason;
use crate::data::Span;
use crate::events::StreamId;
use crate::exec::{Request, Step};
use crate::foreign::Opener;
use crate::objects::{
    Channel, Context, Cq, Dm, Endpoint, Mr, Pd, QpObject, Session, Slot, Waiting,
};
use crate::srq::Srq;
use crate::table::Table;
use crate::watch::Progress;
use crate::windows::Window;
use crate::xrc::XrcState;

/// Messages and bytes that one queue pair may have executed before the next one's turn.
const TURN_MESSAGES: u32 = 64;
pub(crate) const TURN_BYTES: u64 = 256 << 10;

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
    /// Nanoseconds that a session is watched after its last work.
    pub(crate) spin: u64,
    pub(crate) opener: Opener,
    pub(crate) doorbells: Arc<OwnedFd>,
    pub(crate) tenants: FxHashMap<String, TenantId>,
    pub(crate) endpoints: Table<Endpoint>,
    pub(crate) by_gid: FxHashMap<(TenantId, Gid), Handle>,
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
    hot: Vec<Handle>,
    ready: VecDeque<Handle>,
    timers: BinaryHeap<Reverse<(u64, u32, u32)>>,
    /// Sessions that must end, found in the data path.
    pub(crate) ending: Vec<Handle>,
    pub(crate) ended: VecDeque<freeflow_api::EndedSession>,
    pub(crate) now: u64,
    pub(crate) request: Request,
    pub(crate) spans: (Vec<Span>, Vec<Span>),
    pub(crate) bounce: Vec<u8>,
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
            spin,
            opener,
            doorbells,
            tenants: FxHashMap::default(),
            endpoints: Table::default(),
            by_gid: FxHashMap::default(),
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
            hot: Vec::new(),
            ready: VecDeque::new(),
            timers: BinaryHeap::new(),
            ending: Vec::new(),
            ended: VecDeque::new(),
            now: 0,
            request: Request::default(),
            spans: Default::default(),
            bounce: Vec::new(),
            marks: Vec::new(),
        }
    }

    /// One round: collects marks of watched sessions, gives every ready queue pair a turn, fires
    /// timers.
    pub(crate) fn poll(&mut self, now: u64, progress: &Progress) -> Polled {
        self.now = now;
        self.collect();
        self.fire_timers();
        let turns = self.ready.len();
        for _ in 0..turns {
            let Some(qp) = self.ready.pop_front() else {
                break;
            };
            if let Some(q) = self.qps.get(qp) {
                progress.at(q.qpn.get());
            }
            self.turn(qp);
        }
        if turns != 0 || !self.ready.is_empty() || !self.ending.is_empty() {
            return Polled::Busy;
        }
        self.cool_down();
        if self.hot.is_empty() {
            Polled::Asleep {
                until: self.next_due(),
            }
        } else {
            Polled::Idle
        }
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
        for at in 0..self.hot.len() {
            let session = self.hot[at];
            let Some(s) = self.sessions.get_mut(session) else {
                continue;
            };
            let mut marks = std::mem::take(&mut self.marks);
            if let Some(map) = s.dirty_map()
                && map.is_dirty()
            {
                map.take(|slot| marks.push(slot));
                s.last_active = self.now;
            }
            for slot in marks.drain(..) {
                self.marked(session, slot);
            }
            self.marks = marks;
        }
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
        // Its peer may wait for a receive request.
        if let Some(peer) = self.peer(qp)
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
        if let Some(q) = self.qps.get_mut(qp)
            && !std::mem::replace(&mut q.queued, true)
        {
            self.ready.push_back(qp);
        }
    }

    /// What a queue pair waited for is there, or its time is over.
    pub(crate) fn resume(&mut self, qp: Handle) {
        if let Some(q) = self.qps.get_mut(qp) {
            q.waiting = Waiting::No;
            q.timer_epoch = q.timer_epoch.wrapping_add(1);
            self.make_ready(qp);
        }
    }

    /// Starts a queue pair's timer.
    pub(crate) fn start_timer(&mut self, qp: Handle, at: u64) {
        if let Some(q) = self.qps.get_mut(qp) {
            q.timer_epoch = q.timer_epoch.wrapping_add(1);
            self.timers.push(Reverse((at, qp.0, q.timer_epoch)));
        }
    }

    fn fire_timers(&mut self) {
        while let Some(&Reverse((at, qp, epoch))) = self.timers.peek() {
            if at > self.now {
                break;
            }
            self.timers.pop();
            let due = |q: &QpObject| q.timer_epoch == epoch && q.waiting != Waiting::No;
            if self.qps.get(Handle(qp)).is_some_and(due) {
                self.resume(Handle(qp));
            }
        }
    }

    fn next_due(&mut self) -> Option<u64> {
        // Void timers must not keep the router awake.
        while let Some(&Reverse((_, qp, epoch))) = self.timers.peek() {
            if self
                .qps
                .get(Handle(qp))
                .is_some_and(|q| q.timer_epoch == epoch)
            {
                break;
            }
            self.timers.pop();
        }
        self.timers.peek().map(|&Reverse((at, ..))| at)
    }

    /// Stops watching sessions that have had nothing to do for a while.
    fn cool_down(&mut self) {
        let (now, spin) = (self.now, self.spin);
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

    fn turn(&mut self, qp: Handle) {
        let Some(q) = self.qps.get_mut(qp) else {
            return;
        };
        q.queued = false;
        let mut bytes = 0;
        for _ in 0..TURN_MESSAGES {
            match self.step(qp) {
                Step::Done(n) => bytes += n,
                Step::Nothing => return,
            }
            if bytes >= TURN_BYTES {
                break;
            }
        }
        self.make_ready(qp);
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

    /// Adds a completion.
    pub(crate) fn complete(&mut self, cq: Handle, entry: &CompletionEntry, solicited: bool) {
        let Some(c) = self.cqs.get_mut(cq) else {
            return;
        };
        let index = c.produced;
        let Some(ring) = c.ring() else { return };
        if c.overrun || ring.is_full(index) {
            if !c.overrun {
                ring.set_overrun();
                self.overrun(cq);
            }
            return;
        }
        ring.produce(index, entry);
        let event = c.channel.is_some()
            && ring.take_arming(solicited || entry.status != WcStatus::Success.raw() as u8);
        c.produced = index.wrapping_add(1);
        if event && let Some(channel) = c.channel {
            self.send_event(StreamId::Channel(channel), Event::Completion(cq));
        }
    }

    /// A completion is lost: the CQ is unusable, and so are its queue pairs (IBTA volume 1,
    /// 11.6.3.4).
    fn overrun(&mut self, cq: Handle) {
        let Some(c) = self.cqs.get_mut(cq) else {
            return;
        };
        c.overrun = true;
        let (session, context) = (c.session, c.context);
        self.async_event(context, Event::Cq(AsyncEventType::CqErr, cq));
        let slots = self
            .sessions
            .get(session)
            .map(|s| s.slots.clone())
            .unwrap_or_default();
        for slot in slots.into_iter().flatten() {
            let Slot::Qp(qp) = slot else { continue };
            let uses = |q: &QpObject| q.send_cq == cq || q.recv_cq == cq;
            if self.qps.get(qp).is_some_and(uses) {
                self.enter_error(qp, None);
            }
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
