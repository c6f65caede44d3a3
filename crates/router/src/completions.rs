//! Completions: into their queue, and the events that they raise.
//!
//! The events of a queue may be moderated (`ibv_modify_cq(3)`). The first completion that an armed
//! queue waits for then starts a timer; the event comes with the last one that is needed, or when the
//! timer fires. The arming stays in the ring until then, so that the library may take it back.

use freeflow_session::{Event, Handle};
use freeflow_shm::CompletionEntry;
use freeflow_types::{AsyncEventType, WcStatus};

use crate::engine::Engine;
use crate::events::StreamId;
use crate::lifecycle::SLOTS_AT_ONCE;
use crate::objects::{Overruns, Slot};

/// When an armed queue raises its event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Moderation {
    /// Completions that are enough: at least 2.
    count: u32,
    /// Nanoseconds after the first of them: not 0.
    period: u64,
}

impl Moderation {
    /// `None` if there is nothing to wait for: one completion is enough, or the period, in
    /// microseconds, is none.
    pub(crate) fn new(count: u16, period: u16) -> Option<Self> {
        (count > 1 && period != 0).then(|| Moderation {
            count: count.into(),
            period: u64::from(period) * 1000,
        })
    }
}

/// Completions whose event is held back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeldBack {
    count: u32,
    /// Whether one of them is solicited, or an error.
    solicited: bool,
    /// When the event is due.
    pub(crate) due: u64,
}

impl Engine {
    /// Adds a completion.
    pub(crate) fn complete(&mut self, cq: Handle, entry: &CompletionEntry, solicited: bool) {
        // What the library finds in the rings of a session that has ended does not change any more.
        let session = self.cqs.get(cq).map(|c| c.session);
        if session.is_none_or(|session| self.has_ended(session)) {
            return;
        }
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
        let solicited = solicited || entry.status != WcStatus::Success.raw() as u8;
        let event = c.channel.filter(|_| match c.moderation {
            None => ring.take_arming(solicited),
            Some(_) => ring.is_armed(solicited),
        });
        c.produced = index.wrapping_add(1);
        match (event, c.moderation) {
            (None, _) => {}
            (Some(channel), None) => {
                self.send_event(StreamId::Channel(channel), Event::Completion(cq));
            }
            (Some(_), Some(moderation)) => self.hold_back(cq, moderation, solicited),
        }
    }

    /// An armed queue has one more completion: its event comes now, if that makes enough.
    fn hold_back(&mut self, cq: Handle, moderation: Moderation, solicited: bool) {
        let Some(c) = self.cqs.get_mut(cq) else {
            return;
        };
        if let Some(held) = &mut c.held_back {
            held.count += 1;
            held.solicited |= solicited;
            if held.count >= moderation.count {
                self.tell(cq);
            }
            return;
        }
        let due = self.now.saturating_add(moderation.period);
        c.held_back = Some(HeldBack {
            count: 1,
            solicited,
            due,
        });
        self.event_timers.insert((due, cq.0));
    }

    /// Raises the event that was held back, unless the library has taken the arming back.
    pub(crate) fn tell(&mut self, cq: Handle) {
        let Some(held) = self.cancel_event(cq) else {
            return;
        };
        if let Some(c) = self.cqs.get(cq)
            && let Some(channel) = c.channel
            && c.ring()
                .is_some_and(|ring| ring.take_arming(held.solicited))
        {
            self.send_event(StreamId::Channel(channel), Event::Completion(cq));
        }
    }

    /// Forgets an event that was held back.
    pub(crate) fn cancel_event(&mut self, cq: Handle) -> Option<HeldBack> {
        let held = self.cqs.get_mut(cq)?.held_back.take()?;
        self.event_timers.remove(&(held.due, cq.0));
        Some(held)
    }

    /// Changes how a queue's events are moderated; what was held back by the old rule is told now.
    pub(crate) fn moderate(&mut self, cq: Handle, moderation: Option<Moderation>) {
        if let Some(c) = self.cqs.get_mut(cq) {
            c.moderation = moderation;
            self.tell(cq);
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
        let Some(s) = self.sessions.get_mut(session) else {
            return;
        };
        if let Some(overruns) = &mut s.overruns {
            overruns.again = true;
            return;
        }
        s.overruns = Some(Overruns::default());
        self.overrun.push_back(session);
        self.fail_users(session);
    }

    /// Goes on to look for queue pairs of completion queues that overran; false if none is looked
    /// for.
    pub(crate) fn fail_some(&mut self) -> bool {
        let Some(&session) = self.overrun.front() else {
            return false;
        };
        self.fail_users(session);
        // Many do so in turn.
        if !self.overrun.is_empty() {
            self.overrun.rotate_left(1);
        }
        true
    }

    /// Moves some of a session's queue pairs to the error state, if their completion queue overran.
    fn fail_users(&mut self, session: Handle) {
        let mut some = Vec::new();
        let more = self.sessions.get_mut(session).is_some_and(|s| {
            let Some(overruns) = &mut s.overruns else {
                return false;
            };
            let end = s.slots.len().min(overruns.next + SLOTS_AT_ONCE);
            let slots = s.slots.get(overruns.next..end).unwrap_or_default();
            some.extend(slots.iter().flatten().filter_map(|slot| match slot {
                Slot::Qp(qp) => Some(*qp),
                Slot::Srq(_) => None,
            }));
            overruns.next = end;
            if end == s.slots.len() && std::mem::take(&mut overruns.again) {
                overruns.next = 0;
            }
            let more = overruns.next < s.slots.len() && !s.ended;
            if !more {
                s.overruns = None;
            }
            more
        });
        if !more {
            self.overrun.retain(|&other| other != session);
        }
        for qp in some {
            let Some(q) = self.qps.get(qp) else { continue };
            let mut cqs = [q.send_cq, q.recv_cq].into_iter();
            if cqs.any(|cq| self.cqs.get(cq).is_some_and(|c| c.overrun)) {
                self.enter_error(qp, None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use freeflow_session::{CreateCq, Reply, Request};
    use freeflow_shm::{ARM_ANY, ARM_SOLICITED};
    use rustix::net::RecvFlags;

    use super::*;
    use crate::engine::Polled;
    use crate::testbed::{Host, Process};

    const US: u64 = 1000;

    /// A queue with a channel.
    struct Field {
        host: Host,
        process: Process,
        events: Arc<OwnedFd>,
        cq: Handle,
    }

    impl Field {
        fn new() -> Field {
            let mut host = Host::new();
            let endpoint = host.endpoint("10.0.0.1");
            let process = host.process(endpoint, 0);
            let context = process.context;
            let create = Request::CreateChannel { context };
            let answer = host.engine.handle(process.session, create);
            let Ok(Reply::Created(channel)) = answer.reply else {
                panic!("{:?}", answer.reply);
            };
            let request = CreateCq {
                context,
                cqe: 16,
                channel: Some(channel),
                comp_vector: 0,
            };
            let Ok(Reply::Cq(made)) = host.ask(process.session, Request::CreateCq(request)) else {
                panic!("no queue");
            };
            Field {
                events: answer.fds.into_iter().next().unwrap(),
                cq: made.cq,
                host,
                process,
            }
        }

        fn moderated(count: u16, period: u16) -> Field {
            let mut f = Field::new();
            f.moderate(count, period);
            f
        }

        fn moderate(&mut self, count: u16, period: u16) {
            let cq = self.cq;
            let request = Request::ModifyCq { cq, count, period };
            assert_eq!(
                self.host.ask(self.process.session, request),
                Ok(Reply::Done)
            );
        }

        fn arm(&self, kind: u64) {
            self.host
                .engine
                .cqs
                .get(self.cq)
                .unwrap()
                .ring()
                .unwrap()
                .arm(kind);
        }

        fn complete(&mut self, status: WcStatus, solicited: bool) {
            let entry = CompletionEntry {
                status: status.raw() as u8,
                ..CompletionEntry::default()
            };
            self.host.engine.now = self.host.now;
            self.host.engine.complete(self.cq, &entry, solicited);
        }

        fn complete_some(&mut self, n: u32) {
            (0..n).for_each(|_| self.complete(WcStatus::Success, false));
        }

        /// Lets so many microseconds pass; how many events came.
        fn after(&mut self, us: u64) -> usize {
            self.host.now += us * US;
            self.host.settle();
            self.events()
        }

        fn events(&self) -> usize {
            let mut bytes = [0; Event::BYTES];
            let mut n = 0;
            while let Ok((_, len)) =
                rustix::net::recv(&*self.events, &mut bytes[..], RecvFlags::DONTWAIT)
                && len != 0
            {
                assert_eq!(Event::decode(&bytes), Some(Event::Completion(self.cq)));
                n += 1;
            }
            n
        }

        fn nothing_is_due(&mut self) {
            assert!(self.host.engine.event_timers.is_empty());
        }
    }

    #[test]
    fn an_event_comes_with_the_last_completion_that_is_needed() {
        let mut f = Field::moderated(4, 1000);
        f.arm(ARM_ANY);
        f.complete_some(3);
        assert_eq!(f.after(999), 0);
        f.complete_some(1);
        assert_eq!(f.events(), 1);
        f.nothing_is_due();
        // One for each arming.
        f.complete_some(8);
        assert_eq!(f.after(100_000), 0);
        f.arm(ARM_ANY);
        f.complete_some(3);
        assert_eq!(f.events(), 0);
        f.complete_some(1);
        assert_eq!(f.events(), 1);
    }

    #[test]
    fn an_event_comes_when_the_period_is_over() {
        let mut f = Field::moderated(4, 1000);
        // The time before the first completion does not count.
        f.arm(ARM_ANY);
        assert_eq!(f.after(5000), 0);
        f.complete_some(1);
        assert_eq!(f.after(500), 0);
        f.complete_some(2);
        let due = f.host.now + 500 * US;
        assert_eq!(f.host.round(), Polled::Asleep { until: Some(due) });
        assert_eq!(f.after(499), 0);
        assert_eq!(f.after(1), 1);
        f.nothing_is_due();
        assert_eq!(f.after(100_000), 0);
    }

    #[test]
    fn what_the_arming_does_not_ask_for_does_not_count() {
        let mut f = Field::moderated(2, 1000);
        f.arm(ARM_SOLICITED);
        f.complete_some(5);
        f.nothing_is_due();
        f.complete(WcStatus::Success, true);
        assert_eq!(f.after(999), 0);
        f.complete_some(3);
        assert_eq!(f.events(), 0);
        assert_eq!(f.after(1), 1);
        // Errors count as solicited, and make up the count.
        f.arm(ARM_SOLICITED);
        f.complete(WcStatus::RetryExcErr, false);
        assert_eq!(f.events(), 0);
        f.complete(WcStatus::Success, true);
        assert_eq!(f.events(), 1);
    }

    #[test]
    fn an_arming_that_is_taken_back_gives_no_event() {
        let mut f = Field::moderated(4, 1000);
        f.arm(ARM_ANY);
        f.complete_some(2);
        let ring = f.host.engine.cqs.get(f.cq).unwrap().ring().unwrap();
        assert!(ring.disarm());
        assert_eq!(f.after(2000), 0);
        f.nothing_is_due();
    }

    #[test]
    fn a_new_rule_holds_nothing_back_that_the_old_one_did() {
        let mut f = Field::moderated(4, 60_000);
        f.arm(ARM_ANY);
        f.complete_some(2);
        f.moderate(8, 60_000);
        assert_eq!(f.events(), 1);
        // A count of one and a period of nothing: as if there were no moderation.
        for (count, period) in [(0, 0), (1, 1000), (4, 0)] {
            f.moderate(count, period);
            f.arm(ARM_ANY);
            f.complete_some(1);
            assert_eq!(f.events(), 1, "{count} {period}");
        }
    }

    #[test]
    fn an_overrun_and_a_resized_ring_do_not_lose_the_event() {
        let mut f = Field::moderated(1000, 1000);
        f.arm(ARM_ANY);
        f.complete_some(1);
        let request = Request::ResizeCq { cq: f.cq, cqe: 16 };
        assert!(f.host.ask(f.process.session, request).is_ok());
        f.complete_some(100);
        assert_eq!(f.after(1000), 1);
    }

    #[test]
    fn a_queue_that_is_gone_leaves_no_timer() {
        let mut f = Field::moderated(4, 1000);
        f.arm(ARM_ANY);
        f.complete_some(1);
        let destroy = Request::DestroyCq { cq: f.cq };
        assert_eq!(f.host.ask(f.process.session, destroy), Ok(Reply::Done));
        f.nothing_is_due();
        assert_eq!(f.after(2000), 0);
    }
}
