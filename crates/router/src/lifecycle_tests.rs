//! What a session with very many queue pairs leaves to do is done bit by bit, and seen by others as
//! if it were done at once. Against an engine without threads, in virtual time.

use freeflow_policy::Resource;
use freeflow_session::{Event, Handle};
use freeflow_shm::CompletionEntry;
use freeflow_types::{AsyncEventType, QpState, QpType, WcStatus};

use crate::EndReason;
use crate::testbed::{Cq, Host, Made, Process};

/// More than is removed, or looked at, at once.
const MANY: usize = 3000;

fn many(host: &mut Host, p: &Process, cq: Cq) -> Vec<Made> {
    (0..MANY)
        .map(|_| host.qp(p, QpType::Rc, (cq, Some(cq)), None))
        .collect()
}

fn qps_against_quota(host: &Host, endpoint: Handle) -> u64 {
    let status = host.engine.endpoints.get(endpoint).unwrap().quota_status();
    let qps = status.iter().find(|q| q.resource == Resource::Qps);
    qps.unwrap().used
}

#[test]
fn nothing_of_a_session_that_has_ended_works_while_it_is_removed() {
    let mut host = Host::new();
    let (a, b) = (host.endpoint("10.0.0.1"), host.endpoint("10.0.0.2"));
    let (here, there) = (host.process(a, 0), host.process(b, 0));
    let mut cqs = [host.cq(&here), host.cq(&there)];
    let mut srqs = [host.srq(&here, 16, None), host.srq(&there, 16, None)];
    many(&mut host, &here, cqs[0]);
    // The last ones to be removed.
    let pair = [(&here, 0), (&there, 1)]
        .map(|(p, i)| host.qp(p, QpType::Rc, (cqs[i], Some(cqs[i])), Some(srqs[i])));
    host.connect_own(&here, pair[0], (there.gid, pair[1].qpn));
    host.connect_own(&there, pair[1], (here.gid, pair[0].qpn));
    host.settle();
    for (p, srq) in [&here, &there].into_iter().zip(&mut srqs) {
        host.post(p, srq, 7);
    }
    host.send(&here, pair[0], 1, &[], 0);
    host.send(&there, pair[1], 2, &[], 0);
    host.engine.end_session(here.session, EndReason::Closed);

    // Each side has a request that could be executed, and a round to do that in.
    for _ in 0..2 {
        host.round();
        assert!(host.engine.qps.get(pair[0].handle).is_some());
        assert_eq!(host.completions(&mut cqs[0]), []);
        assert_eq!(host.completions(&mut cqs[1]), []);
    }
    // What is left counts; nobody sees it.
    assert_eq!(qps_against_quota(&host, a), MANY as u64 + 1);
    let status = host.engine.status();
    let sessions: Vec<_> = status.iter().map(|(e, _)| e.sessions.len()).collect();
    assert_eq!(sessions, [0, 1]);

    host.settle();
    assert!(host.engine.sessions.get(here.session).is_none());
    assert_eq!(host.engine.qps.iter().count(), 1);
    assert_eq!(host.engine.take_dead().len(), 1);
    assert_eq!(qps_against_quota(&host, a), 0);
    let held = host.engine.endpoints.get(a).unwrap().held;
    assert_eq!(held, Default::default());
    // The peer finds that nobody answers.
    for _ in 0..20 {
        host.now += 100_000_000;
        host.settle();
    }
    let all = host.completions(&mut cqs[1]);
    let all: Vec<_> = all.iter().map(|c| (c.wr_id, c.status)).collect();
    assert_eq!(all, [(2, WcStatus::RetryExcErr.raw() as u8)]);
}

#[test]
fn an_endpoint_can_be_made_anew_while_its_last_session_is_removed() {
    let mut host = Host::new();
    let first = host.endpoint("10.0.0.1");
    let p = host.process(first, 0);
    let cq = host.cq(&p);
    many(&mut host, &p, cq);
    host.engine.remove_endpoint(first);
    assert!(host.engine.sessions.get(p.session).is_some());
    let second = host.endpoint("10.0.0.1");
    assert_ne!(first, second);
    assert_eq!(host.engine.status().len(), 1);
    host.settle();
    let left: Vec<_> = host.engine.endpoints.iter().map(|(e, _)| e).collect();
    assert_eq!(left, [second]);
    assert!(host.engine.qps.iter().next().is_none());
    host.process(second, 0);
}

#[test]
fn sessions_that_end_together_are_all_removed() {
    let mut host = Host::new();
    let endpoint = host.endpoint("10.0.0.1");
    let all: Vec<_> = (0..3).map(|_| host.process(endpoint, 0)).collect();
    for p in &all {
        let cq = host.cq(p);
        many(&mut host, p, cq);
    }
    for p in &all {
        host.engine.end_session(p.session, EndReason::Closed);
        host.engine.end_session(p.session, EndReason::Closed);
    }
    assert_eq!(host.engine.leaving.len(), 3);
    host.settle();
    assert!(host.engine.sessions.iter().next().is_none());
    assert_eq!(host.engine.ended.len(), 3);
    assert!(host.engine.leaving.is_empty());
}

#[test]
fn all_queue_pairs_of_queues_that_overran_fail() {
    let mut host = Host::new();
    let endpoint = host.endpoint("10.0.0.1");
    let p = host.process(endpoint, 0);
    let cqs = [host.cq(&p), host.cq(&p), host.cq(&p)];
    let qps: Vec<_> = (0..MANY)
        .map(|n| {
            let cq = cqs[n % cqs.len()];
            host.qp(&p, QpType::Rc, (cq, Some(cq)), None)
        })
        .collect();
    let overrun = |host: &mut Host, cq: Cq| {
        for _ in 0..300 {
            let entry = CompletionEntry::default();
            host.engine.complete(cq.handle, &entry, false);
        }
    };
    let failed = |host: &Host| {
        let failed = |n: usize| {
            let state = |qp: &Made| host.engine.qps.get(qp.handle).unwrap().transport.state();
            let all = qps.iter().skip(n).step_by(cqs.len());
            all.filter(|qp| state(qp) == QpState::Err).count()
        };
        [failed(0), failed(1), failed(2)]
    };
    overrun(&mut host, cqs[0]);
    let [some, ..] = failed(&host);
    assert!(some > 0 && some < MANY / cqs.len(), "{some}");
    // While the queue pairs of the first are looked for.
    host.round();
    overrun(&mut host, cqs[1]);
    host.settle();
    let each = MANY / cqs.len();
    assert_eq!(failed(&host), [each, each, 0]);
    let error = |cq: Cq| Event::Cq(AsyncEventType::CqErr, cq.handle);
    assert_eq!(p.events(), [error(cqs[0]), error(cqs[1])]);
    // The looking has ended, and begins anew if need be.
    overrun(&mut host, cqs[2]);
    host.settle();
    assert_eq!(failed(&host), [each, each, each]);
    assert!(host.engine.overrun.is_empty());
}
