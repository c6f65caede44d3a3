//! Shared receive queues and XRC against an engine without threads, in virtual time: nothing
//! here happens because a timer fired unless a test says so.

use freeflow_session::{
    Event, FileId, Handle, ModifySrq, OpenXrcQp, OpenXrcd, Reply, Request, XrcSrq,
};
use freeflow_shm::{CompletionEntry, RecvEntry, Sge};
use freeflow_types::{AsyncEventType, Key, QpState, QpType, Qpn, WcStatus, rnr_timer_ns};
use rustix::io::Errno;

use crate::engine::TURN_BYTES;

use crate::testbed::{Cq, Host, Made, Process, RNR_RETRIES, RNR_TIMER, Srq};

const BIG: u64 = 4 * TURN_BYTES;

/// A process with a queue and `n` queue pairs on it, each with a completion queue of its own, and
/// a process with a sender for each of them.
struct Field {
    host: Host,
    here: Process,
    there: Process,
    srq: Srq,
    cqs: Vec<Cq>,
    receivers: Vec<Made>,
    senders: Vec<Made>,
    sent: Cq,
}

fn field(n: usize, max_wr: u32) -> Field {
    let mut host = Host::new();
    let (a, b) = (host.endpoint("10.0.0.1"), host.endpoint("10.0.0.2"));
    let (here, there) = (host.process(a, 0), host.process(b, 0));
    let srq = host.srq(&here, max_wr, None);
    let sent = host.cq(&there);
    let (mut cqs, mut receivers, mut senders) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..n {
        let cq = host.cq(&here);
        let to = host.qp(&here, QpType::Rc, (cq, Some(cq)), Some(srq));
        let from = host.qp(&there, QpType::Rc, (sent, Some(sent)), None);
        host.connect_own(&here, to, (there.gid, from.qpn));
        host.connect_own(&there, from, (here.gid, to.qpn));
        cqs.push(cq);
        receivers.push(to);
        senders.push(from);
    }
    Field {
        host,
        here,
        there,
        srq,
        cqs,
        receivers,
        senders,
        sent,
    }
}

impl Field {
    fn received(&mut self) -> Vec<Vec<u64>> {
        let host = &mut self.host;
        self.cqs.iter_mut().map(|cq| host.ids(cq)).collect()
    }

    fn send_empty(&mut self, sender: usize, wr_id: u64) {
        let qp = self.senders[sender];
        self.host.send(&self.there, qp, wr_id, &[], 0);
    }
}

#[test]
fn all_who_wait_are_served_in_turn_without_a_timer() {
    const N: usize = 24;
    const ROUNDS: u64 = 4;
    let mut f = field(N, 8);
    for sender in 0..N {
        for _ in 0..ROUNDS {
            f.send_empty(sender, sender as u64);
        }
    }
    f.host.settle();
    assert!(f.received().concat().is_empty());
    // One at a time: each is taken at once, by whoever has waited longest. Being called in vain
    // would use up the few retries that a sender has.
    let mut order = Vec::new();
    for round in 0..ROUNDS {
        for k in 0..N as u64 {
            let (here, srq) = (&f.here, &mut f.srq);
            f.host.post(here, srq, round * 100 + k);
            f.host.settle();
            let got = f.received();
            let who = got.iter().position(|ids| !ids.is_empty());
            assert_eq!(got.concat(), [round * 100 + k]);
            order.push(who.unwrap());
        }
    }
    let once: Vec<_> = (0..N).collect();
    for turn in order.chunks(N) {
        let mut who = turn.to_vec();
        who.sort_unstable();
        assert_eq!(who, once, "somebody was served twice before another once");
    }
    let sent = f.host.ids(&mut f.sent);
    assert_eq!(sent.len(), N * ROUNDS as usize);
}

#[test]
fn several_requests_serve_several_at_once() {
    let mut f = field(10, 16);
    for sender in 0..10 {
        // Who is served takes what others were called for: that is none of their retries.
        let qp = f.senders[sender];
        f.host.set_rnr_retry(&f.there, qp, 1);
        f.host.set_state(&f.there, qp, QpState::Rts);
        f.send_empty(sender, 0);
        f.send_empty(sender, 1);
    }
    f.host.settle();
    for wr_id in 0..7 {
        f.host.post(&f.here, &mut f.srq, wr_id);
    }
    f.host.settle();
    assert_eq!(f.received().concat().len(), 7);
    for wr_id in 7..20 {
        f.host.post(&f.here, &mut f.srq, wr_id);
        f.host.settle();
    }
    assert_eq!(f.received().concat().len(), 13);
    assert_eq!(f.host.ids(&mut f.sent).len(), 20);
}

#[test]
fn who_leaves_the_line_lets_the_next_one_forward() {
    let mut f = field(4, 4);
    for sender in 0..4 {
        f.send_empty(sender, sender as u64);
        f.host.settle();
    }
    // The first is called, but gone before its turn; the second is in error by then; the third's
    // peer is destroyed while it waits.
    let srq = f.host.engine.srqs.get(f.srq.handle).unwrap();
    let ring = srq.ring().unwrap();
    RecvEntry::store(8, &[], ring.slot(0));
    ring.publish(1);
    f.srq.posted = 1;
    f.host.engine.serve_line(f.srq.handle);
    let destroy = |qp| Request::DestroyQp { qp };
    let first = f.senders[0].handle;
    f.host.ask(f.there.session, destroy(first)).unwrap();
    f.host.set_state(&f.there, f.senders[1], QpState::Err);
    let third = f.receivers[2].handle;
    f.host.ask(f.here.session, destroy(third)).unwrap();
    f.host.settle();
    // The third finds that nobody answers, and the fourth takes it.
    let got = f.received();
    assert_eq!((got[3].as_slice(), got.concat().len()), (&[8][..], 1));
    f.host
        .engine
        .end_session(f.there.session, crate::EndReason::Closed);
    f.host.settle();
}

#[test]
fn a_sender_that_nobody_serves_gives_up_after_its_retries() {
    let mut f = field(2, 4);
    f.send_empty(0, 1);
    f.host.settle();
    // Each retry has its time, and after the last one's there is an end.
    for retry in 1..=u64::from(RNR_RETRIES) {
        f.host.now = retry * rnr_timer_ns(RNR_TIMER) - 1;
        f.host.settle();
        assert_eq!(f.host.completions(&mut f.sent), []);
        f.host.now += 1;
        f.host.settle();
    }
    let got = f.host.completions(&mut f.sent);
    let status: Vec<_> = got.iter().map(|c| u32::from(c.status)).collect();
    assert_eq!(status, [WcStatus::RnrRetryExcErr.raw()]);
    // It stands in nobody's way.
    f.send_empty(1, 2);
    f.host.settle();
    f.host.post(&f.here, &mut f.srq, 5);
    f.host.settle();
    assert_eq!(f.received(), [vec![], vec![5]]);
}

#[test]
fn a_retry_does_not_cost_a_sender_its_place() {
    let mut f = field(2, 4);
    f.send_empty(1, 1);
    f.host.settle();
    f.host.now = rnr_timer_ns(RNR_TIMER) / 2;
    f.send_empty(0, 2);
    f.host.settle();
    f.host.now = rnr_timer_ns(RNR_TIMER);
    f.host.settle();
    f.host.post(&f.here, &mut f.srq, 5);
    f.host.settle();
    assert_eq!(f.received(), [vec![], vec![5]]);
}

#[test]
fn a_slot_is_free_as_soon_as_it_is_taken() {
    let mut f = field(3, 4);
    // Nobody polls, several take, and completions lie in several queues: still there is room for
    // as many requests as the queue holds, and no more.
    for i in 0..50 {
        for k in 0..4 {
            assert!(f.host.try_post(&f.here, &mut f.srq, i * 4 + k, &[]));
        }
        assert!(!f.host.try_post(&f.here, &mut f.srq, 999, &[]));
        for k in 0..4 {
            f.send_empty(((i + k) % 3) as usize, 0);
            f.host.settle();
        }
        let _ = f.host.completions(&mut f.sent);
    }
    let mut all = f.received().concat();
    all.sort_unstable();
    assert_eq!(all, (0..200).collect::<Vec<_>>());
}

#[test]
fn an_index_that_runs_away_ends_that_session_alone() {
    let mut f = field(1, 4);
    let other = f.host.endpoint("10.0.0.3");
    let other = f.host.process(other, 0);
    let ring = f.host.engine.srqs.get(f.srq.handle).unwrap();
    ring.ring().unwrap().publish(1 << 40);
    f.send_empty(0, 1);
    f.host.settle();
    f.host.engine.reap();
    assert!(f.host.engine.sessions.get(f.here.session).is_none());
    let ended = f.host.engine.ended.back().unwrap();
    assert!(ended.reason.contains("shared receive queue"), "{ended:?}");
    assert!(f.host.engine.sessions.get(other.session).is_some());
    assert!(f.host.engine.sessions.get(f.there.session).is_some());
    // The sender finds that nobody answers.
    f.host.now += 1_000_000_000_000;
    for _ in 0..10 {
        f.host.settle();
        f.host.now += 1_000_000_000_000;
    }
    let got = f.host.completions(&mut f.sent);
    let status: Vec<_> = got.iter().map(|c| u32::from(c.status)).collect();
    assert_eq!(status, [WcStatus::RetryExcErr.raw()]);
}

#[test]
fn a_queue_grows_and_shrinks_with_requests_in_it() {
    let mut f = field(2, 4);
    for wr_id in 0..4 {
        f.host.post(&f.here, &mut f.srq, wr_id);
    }
    f.send_empty(0, 0);
    f.host.settle();
    let srq = f.srq.handle;
    let resize = |max_wr, limit| {
        Request::ModifySrq(ModifySrq {
            srq,
            max_wr: Some(max_wr),
            limit,
        })
    };
    let session = f.here.session;
    assert_eq!(
        f.host.ask(session, resize(2, None)).err(),
        Some(Errno::INVAL)
    );
    assert_eq!(
        f.host.ask(session, resize(16, Some(17))).err(),
        Some(Errno::INVAL)
    );
    let Ok(Reply::Srq(made)) = f.host.ask(session, resize(16, Some(1))) else {
        panic!("not resized");
    };
    assert_eq!((made.max_wr, made.srq), (16, srq));
    f.srq.max_wr = 16;
    for wr_id in 4..17 {
        f.host.post(&f.here, &mut f.srq, wr_id);
    }
    assert!(!f.host.try_post(&f.here, &mut f.srq, 99, &[]));
    for i in 1..17 {
        f.send_empty(i % 2, 0);
        f.host.settle();
    }
    let mut all = f.received().concat();
    all.sort_unstable();
    assert_eq!(all, (0..17).collect::<Vec<_>>());
    // Senders that wait know of the new ring.
    f.send_empty(0, 0);
    f.host.settle();
    assert!(f.host.ask(session, resize(1, None)).is_ok());
    f.srq.max_wr = 1;
    f.host.post(&f.here, &mut f.srq, 50);
    f.host.settle();
    assert_eq!(f.received().concat(), [50]);
    let limit = Event::Srq(AsyncEventType::SrqLimitReached, srq);
    assert_eq!(f.here.events(), [limit]);
}

#[test]
fn the_last_request_that_was_taken_completes_before_the_event() {
    let mut f = field(2, 4);
    let (near, far) = (f.host.reg(&f.there, BIG), f.host.reg(&f.here, BIG));
    let sge = |key: Key| Sge {
        addr: 0,
        length: BIG as u32,
        lkey: key.0,
    };
    f.host.try_post(&f.here, &mut f.srq, 1, &[sge(far)]);
    f.host.post(&f.here, &mut f.srq, 2);
    f.host.send(&f.there, f.senders[0], 0, &[sge(near)], 0);
    // A part of the message, then the receiver's error.
    f.host.round();
    assert_eq!(f.host.completions(&mut f.cqs[0]), []);
    f.host.set_state(&f.here, f.receivers[0], QpState::Err);
    assert_eq!(f.here.events(), []);
    f.host.settle();
    let got = f.host.completions(&mut f.cqs[0]);
    let got: Vec<_> = got.iter().map(|c| (c.wr_id, c.status)).collect();
    // What it had not taken is still there for the others.
    assert_eq!(got, [(1, WcStatus::WrFlushErr.raw() as u8)]);
    let last = |qp: Made| Event::Qp(AsyncEventType::QpLastWqeReached, qp.handle);
    assert_eq!(f.here.events(), [last(f.receivers[0])]);
    f.send_empty(1, 0);
    f.host.settle();
    assert_eq!(f.host.ids(&mut f.cqs[1]), [2]);
    // Once for each time it goes to error.
    f.host.set_state(&f.here, f.receivers[0], QpState::Err);
    f.host.settle();
    assert_eq!(f.here.events(), []);
    f.host.set_state(&f.here, f.receivers[1], QpState::Reset);
    f.host.set_state(&f.here, f.receivers[1], QpState::Reset);
    f.host.settle();
    assert_eq!(f.here.events(), []);
}

#[test]
fn a_message_to_a_receiver_that_was_reset_begins_anew() {
    let mut f = field(1, 4);
    let (near, far) = (f.host.reg(&f.there, BIG), f.host.reg(&f.here, 2 * BIG));
    let sge = |key: Key, addr| Sge {
        addr,
        length: BIG as u32,
        lkey: key.0,
    };
    let memory = |f: &Field, p: &Process| {
        let s = f.host.engine.sessions.get(p.session).unwrap();
        s.segments.mapping(0).unwrap().clone()
    };
    let data: Vec<u8> = (0..BIG).map(|at| (at >> 16) as u8 | 1).collect();
    memory(&f, &f.there).write(0, &data).unwrap();
    f.host.try_post(&f.here, &mut f.srq, 1, &[sge(far, 0)]);
    f.host.send(&f.there, f.senders[0], 0, &[sge(near, 0)], 0);
    f.host.round();
    // A part has arrived. The receiver forgets it and is connected again.
    f.host.set_state(&f.here, f.receivers[0], QpState::Reset);
    let (qpn, gid) = (f.senders[0].qpn, f.there.gid);
    f.host.connect_own(&f.here, f.receivers[0], (gid, qpn));
    f.host.try_post(&f.here, &mut f.srq, 2, &[sge(far, BIG)]);
    f.host.settle();
    f.host.now += 1_000_000_000;
    f.host.settle();
    assert_eq!(f.host.ids(&mut f.cqs[0]), [2]);
    let mut got = vec![0; BIG as usize];
    memory(&f, &f.here).read(BIG, &mut got).unwrap();
    assert!(got == data, "a message without its first part");
}

#[test]
fn a_queue_is_busy_while_queue_pairs_use_it_and_leaves_nothing() {
    let mut f = field(2, 4);
    let destroy = Request::DestroySrq { srq: f.srq.handle };
    let (here, there) = (f.here.session, f.there.session);
    assert_eq!(f.host.ask(here, destroy.clone()), Err(Errno::BUSY));
    assert_eq!(f.host.ask(there, destroy.clone()), Err(Errno::INVAL));
    let pd = f.here.pd;
    for qp in f.receivers.clone() {
        let qp = qp.handle;
        f.host.ask(here, Request::DestroyQp { qp }).unwrap();
    }
    let dealloc = Request::DeallocPd { pd };
    assert_eq!(f.host.ask(here, dealloc.clone()), Err(Errno::BUSY));
    assert_eq!(f.host.ask(here, destroy.clone()), Ok(Reply::Done));
    assert_eq!(f.host.ask(here, destroy), Err(Errno::INVAL));
    assert_eq!(f.host.ask(here, dealloc), Ok(Reply::Done));
    let s = f.host.engine.sessions.get(here).unwrap();
    assert_eq!((s.counts.srqs, s.counts.qps), (0, 0));
    assert!(s.slots.iter().all(Option::is_none));
}

const FILE: FileId = FileId { dev: 8, ino: 77 };

fn domain(
    host: &mut Host,
    p: &Process,
    file: Option<FileId>,
    create: bool,
    exclusive: bool,
) -> Result<Handle, Errno> {
    let context = p.context;
    let request = OpenXrcd {
        context,
        file,
        create,
        exclusive,
    };
    match host.ask(p.session, Request::OpenXrcd(request))? {
        Reply::Created(xrcd) => Ok(xrcd),
        other => panic!("{other:?}"),
    }
}

fn open(
    host: &mut Host,
    p: &Process,
    xrcd: Handle,
    qpn: Option<u32>,
) -> Result<(Handle, u32), Errno> {
    let request = OpenXrcQp {
        context: p.context,
        xrcd,
        qpn: qpn.map(Qpn::new),
    };
    match host.ask(p.session, Request::OpenXrcQp(request))? {
        Reply::XrcQp(made) => Ok((made.open, made.qpn.get())),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_domain_is_shared_within_an_endpoint_and_a_user() {
    let mut host = Host::new();
    let (a, b) = (host.endpoint("10.0.0.1"), host.endpoint("10.0.0.2"));
    let (p, q) = (host.process(a, 1000), host.process(a, 1000));
    let (other_user, elsewhere) = (host.process(a, 1001), host.process(b, 1000));
    let file = Some(FILE);
    assert_eq!(domain(&mut host, &p, file, false, false), Err(Errno::AGAIN));
    let first = domain(&mut host, &p, file, true, true).unwrap();
    assert_eq!(domain(&mut host, &q, file, true, true), Err(Errno::INVAL));
    let second = domain(&mut host, &q, file, false, false).unwrap();
    // Others meet nobody there.
    for stranger in [&other_user, &elsewhere] {
        let got = domain(&mut host, stranger, file, false, false);
        assert_eq!(got, Err(Errno::AGAIN));
    }
    let third = domain(&mut host, &other_user, file, true, false).unwrap();
    let private = domain(&mut host, &q, None, true, false).unwrap();
    let (opened, qpn) = open(&mut host, &p, first, None).unwrap();
    assert_eq!(
        open(&mut host, &other_user, third, Some(qpn)),
        Err(Errno::INVAL)
    );
    assert_eq!(open(&mut host, &q, private, Some(qpn)), Err(Errno::INVAL));
    assert_eq!(open(&mut host, &q, first, Some(qpn)), Err(Errno::INVAL));
    let (again, same) = open(&mut host, &q, second, Some(qpn)).unwrap();
    assert_eq!(same, qpn);
    // Another's opening is no handle of ours.
    let close = |open| Request::CloseXrcQp { open };
    assert_eq!(host.ask(q.session, close(opened)), Err(Errno::INVAL));
    let shut = Request::CloseXrcd { xrcd: second };
    assert_eq!(host.ask(q.session, shut.clone()), Err(Errno::BUSY));
    // It lives as long as somebody has it open, also after its maker.
    host.engine.end_session(p.session, crate::EndReason::Closed);
    let query = Request::QueryXrcQp { open: again };
    assert!(host.ask(q.session, query).is_ok());
    assert_eq!(host.engine.qps.iter().count(), 1);
    host.ask(q.session, close(again)).unwrap();
    assert_eq!(host.engine.qps.iter().count(), 0);
    assert!(host.engine.by_qpn.is_empty());
    assert_eq!(host.ask(q.session, shut), Ok(Reply::Done));
    // With the last one who had it open the domain is gone.
    assert_eq!(domain(&mut host, &q, file, false, false), Err(Errno::AGAIN));
}

/// Two processes of one endpoint in one domain, each with a queue, and a sender elsewhere whose
/// connection ends in the first one's queue pair.
struct Xrc {
    host: Host,
    processes: [Process; 2],
    xrcds: [Handle; 2],
    srqs: [Srq; 2],
    cqs: [Cq; 2],
    open: Handle,
    there: Process,
    sender: Made,
    sent: Cq,
}

fn xrc() -> Xrc {
    let mut host = Host::new();
    let (a, b) = (host.endpoint("10.0.0.1"), host.endpoint("10.0.0.2"));
    let processes = [host.process(a, 0), host.process(a, 0)];
    let there = host.process(b, 0);
    let xrcds = [0, 1].map(|i| domain(&mut host, &processes[i], Some(FILE), true, false).unwrap());
    let cqs = [0, 1].map(|i| host.cq(&processes[i]));
    let srqs = [0, 1].map(|i| {
        let xrc = XrcSrq {
            xrcd: xrcds[i],
            cq: cqs[i].handle,
        };
        host.srq(&processes[i], 8, Some(xrc))
    });
    let (open, qpn) = open(&mut host, &processes[0], xrcds[0], None).unwrap();
    let sent = host.cq(&there);
    let sender = host.qp(&there, QpType::XrcSend, (sent, None), None);
    let (p, to) = (&processes[0], (there.gid, sender.qpn));
    host.connect(p, to, |attr, mask| Request::ModifyXrcQp {
        open,
        attr,
        mask,
    });
    host.connect_own(&there, sender, (processes[0].gid, qpn));
    Xrc {
        host,
        processes,
        xrcds,
        srqs,
        cqs,
        open,
        there,
        sender,
        sent,
    }
}

#[test]
fn one_connection_reaches_the_queues_of_all_processes_in_the_domain() {
    let mut x = xrc();
    for i in 0..6 {
        let k = (i % 2) as usize;
        x.host.post(&x.processes[k], &mut x.srqs[k], 10 + i);
        let number = x.srqs[k].number.unwrap();
        x.host.send(&x.there, x.sender, i, &[], number);
        x.host.settle();
        assert_eq!(x.host.ids(&mut x.cqs[k]), [10 + i]);
    }
    assert_eq!(x.host.ids(&mut x.sent), [0, 1, 2, 3, 4, 5]);
    // An empty queue is not ready; the wait ends with a post to that very queue.
    x.host
        .send(&x.there, x.sender, 6, &[], x.srqs[1].number.unwrap());
    x.host.settle();
    x.host.post(&x.processes[0], &mut x.srqs[0], 50);
    x.host.settle();
    assert_eq!(x.host.completions(&mut x.sent), []);
    x.host.post(&x.processes[1], &mut x.srqs[1], 51);
    x.host.settle();
    assert_eq!(x.host.ids(&mut x.cqs[1]), [51]);
    assert_eq!(x.host.ids(&mut x.sent), [6]);
}

#[test]
fn a_queue_that_is_not_in_the_domain_is_an_invalid_request() {
    for other_domain in [true, false] {
        let mut x = xrc();
        let number = if other_domain {
            let p = &x.processes[1];
            let xrcd = domain(&mut x.host, p, None, true, false).unwrap();
            let cq = x.cqs[1].handle;
            let mut srq = x.host.srq(p, 4, Some(XrcSrq { xrcd, cq }));
            x.host.post(p, &mut srq, 1);
            srq.number.unwrap()
        } else {
            x.srqs[1].number.unwrap() ^ 1
        };
        x.host.send(&x.there, x.sender, 1, &[], number);
        x.host.settle();
        let got = x.host.completions(&mut x.sent);
        let status: Vec<_> = got.iter().map(|c| u32::from(c.status)).collect();
        assert_eq!(status, [WcStatus::RemInvReqErr.raw()]);
        assert_eq!(x.host.completions(&mut x.cqs[1]), []);
        let error = Event::XrcQp(AsyncEventType::QpReqErr, x.open);
        assert_eq!(x.processes[0].events(), [error]);
        let query = Request::QueryXrcQp { open: x.open };
        let Ok(Reply::QpQueried(now)) = x.host.ask(x.processes[0].session, query) else {
            panic!("no attributes");
        };
        assert_eq!(now.attr.state, QpState::Err);
    }
}

#[test]
fn a_queue_destroyed_amid_a_message_completes_no_more() {
    let mut x = xrc();
    let (near, far) = (x.host.reg(&x.there, BIG), x.host.reg(&x.processes[1], BIG));
    let sge = |key: Key| Sge {
        addr: 0,
        length: BIG as u32,
        lkey: key.0,
    };
    let number = x.srqs[1].number.unwrap();
    x.host
        .try_post(&x.processes[1], &mut x.srqs[1], 1, &[sge(far)]);
    x.host.send(&x.there, x.sender, 1, &[sge(near)], number);
    x.host.round();
    let session = x.processes[1].session;
    let shut = Request::CloseXrcd { xrcd: x.xrcds[1] };
    assert_eq!(x.host.ask(session, shut.clone()), Err(Errno::BUSY));
    let cq = Request::DestroyCq {
        cq: x.cqs[1].handle,
    };
    assert_eq!(x.host.ask(session, cq), Err(Errno::BUSY));
    let destroy = Request::DestroySrq {
        srq: x.srqs[1].handle,
    };
    assert_eq!(x.host.ask(session, destroy), Ok(Reply::Done));
    x.host.settle();
    assert_eq!(x.host.completions(&mut x.cqs[1]), []);
    let got = x.host.completions(&mut x.sent);
    let status: Vec<_> = got.iter().map(|c| u32::from(c.status)).collect();
    assert_eq!(status, [WcStatus::RemInvReqErr.raw()]);
    assert_eq!(x.host.ask(session, shut), Ok(Reply::Done));
}

#[test]
fn a_request_half_filled_is_not_filled_by_a_message_for_another_queue() {
    let mut x = xrc();
    let (near, far) = (x.host.reg(&x.there, BIG), x.host.reg(&x.processes[1], BIG));
    let sge = |key: Key| Sge {
        addr: 0,
        length: BIG as u32,
        lkey: key.0,
    };
    let [first, second] = x.srqs.map(|srq| srq.number.unwrap());
    x.host
        .try_post(&x.processes[1], &mut x.srqs[1], 1, &[sge(far)]);
    x.host.post(&x.processes[0], &mut x.srqs[0], 2);
    x.host.send(&x.there, x.sender, 1, &[sge(near)], second);
    x.host.round();
    // The sender starts anew in the middle of it.
    x.host.set_state(&x.there, x.sender, QpState::Reset);
    let to = {
        let q = x.host.engine.qps.iter().find(|(_, q)| q.xrc.is_some());
        (x.processes[0].gid, q.unwrap().1.qpn.get())
    };
    x.host.connect_own(&x.there, x.sender, to);
    x.host.send(&x.there, x.sender, 2, &[], first);
    x.host.settle();
    let status = |all: Vec<CompletionEntry>| -> Vec<(u64, u32)> {
        all.iter().map(|c| (c.wr_id, c.status.into())).collect()
    };
    let sent = x.host.completions(&mut x.sent);
    assert_eq!(status(sent), [(2, WcStatus::RemInvReqErr.raw())]);
    assert_eq!(x.host.completions(&mut x.cqs[0]), []);
    let flushed = x.host.completions(&mut x.cqs[1]);
    assert_eq!(status(flushed), [(1, WcStatus::WrFlushErr.raw())]);
}

#[test]
fn an_event_comes_to_all_who_have_the_queue_pair_open() {
    let mut x = xrc();
    let qpn = {
        let q = x.host.engine.qps.iter().find(|(_, q)| q.xrc.is_some());
        q.unwrap().1.qpn.get()
    };
    let (again, _) = open(&mut x.host, &x.processes[1], x.xrcds[1], Some(qpn)).unwrap();
    x.host.send(&x.there, x.sender, 1, &[], 1);
    x.host.settle();
    let error = |open| [Event::XrcQp(AsyncEventType::QpReqErr, open)];
    assert_eq!(x.processes[0].events(), error(x.open));
    assert_eq!(x.processes[1].events(), error(again));
}
