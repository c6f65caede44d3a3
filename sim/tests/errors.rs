//! Requests that fail: the right one, with the right status, after all before it and before none.

use fastrand::Rng;
use freeflow_sim::{BASE, KEY, MS, Network, QpId, SEC, Sim, seeds};
use freeflow_transport::{Connection, Work};
use freeflow_types::{Opcode, QpAttr, QpType, WcStatus, rnr_timer_ns, timeout_ns};

const MEMORY: usize = 1 << 16;

fn connection(selective: bool) -> Connection {
    Connection {
        segment: 1024,
        timeout: 12,
        retry_cnt: 7,
        rnr_retry: 7,
        min_rnr_timer: 12,
        max_rd_atomic: 4,
        max_dest_rd_atomic: 4,
        selective,
        ..Connection::new(QpType::Rc, &QpAttr::default())
    }
}

fn pair(seed: u64, network: Network, connection: Connection) -> (Sim, QpId, QpId) {
    let mut sim = Sim::new(seed, 2, network);
    let (a, b) = sim.connect((0, 1), connection, MEMORY);
    (sim, a, b)
}

fn work(opcode: Opcode, len: u32) -> Work {
    let len = if opcode.is_word() { 8 } else { len };
    Work {
        va: BASE,
        rkey: KEY,
        ..Work::new(opcode, len)
    }
}

fn post(sim: &mut Sim, qp: QpId, work: Work) {
    sim.qps[qp].post(work, vec![7; work.len as usize]);
}

/// All before `bad` succeed, then it fails, and nothing comes after it.
fn failed_at(sim: &Sim, qp: QpId, bad: u64) -> WcStatus {
    let completions = &sim.qps[qp].completions;
    assert_eq!(completions.len() as u64, bad + 1);
    for (i, c) in completions.iter().enumerate() {
        assert_eq!(c.seq, i as u64);
        assert!(c.status == WcStatus::Success || c.seq == bad);
    }
    assert!(sim.qps[qp].requester.is_dead());
    completions[bad as usize].status
}

#[test]
fn a_lost_peer_is_noticed_in_time() {
    seeds(200, |seed| {
        let mut rng = Rng::with_seed(seed);
        let connection = Connection {
            timeout: rng.u8(9..=16),
            retry_cnt: rng.u8(0..=7),
            ..connection(rng.bool())
        };
        let (mut sim, a, b) = pair(seed, Network::default(), connection);
        sim.post_receives(b, 0, 1, 100);
        post(&mut sim, a, work(Opcode::Send, 100));
        sim.pump(a);
        sim.run(SEC);
        assert_eq!(sim.qps[a].completions.len(), 1);
        let start = sim.now();
        sim.cut(1, u64::MAX);
        post(&mut sim, a, work(Opcode::RdmaWrite, 5000));
        post(&mut sim, a, work(Opcode::RdmaRead, 50));
        sim.pump(a);
        sim.run(1000 * SEC);
        assert_eq!(failed_at(&sim, a, 1), WcStatus::RetryExcErr);
        let nominal =
            timeout_ns(connection.timeout).unwrap() * (u64::from(connection.retry_cnt) + 1);
        let took = sim.qps[a].completions[1].at - start;
        assert!(
            (nominal..=4 * nominal).contains(&took),
            "{took} of {nominal}"
        );
    });
}

#[test]
fn a_peer_that_comes_back_in_time_is_not_lost() {
    seeds(200, |seed| {
        let mut rng = Rng::with_seed(seed);
        let (mut sim, a, _) = pair(seed, Network::default(), connection(rng.bool()));
        sim.cut(1, rng.u64(0..7 * timeout_ns(12).unwrap()));
        for opcode in [Opcode::RdmaWrite, Opcode::RdmaRead, Opcode::FetchAdd] {
            post(&mut sim, a, work(opcode, 50_000));
        }
        sim.pump(a);
        sim.run(10 * SEC);
        let done = sim.qps[a].completions.iter();
        assert_eq!(done.filter(|c| c.status == WcStatus::Success).count(), 3);
    });
}

/// Work before and after a bad request, over a network that may lose packets.
fn refused(seed: u64, make: impl Fn(&mut Rng, &mut Sim, QpId) -> Work, status: WcStatus) {
    let mut rng = Rng::with_seed(seed);
    let network = Network {
        loss: if rng.bool() { 0.0 } else { 0.05 },
        ..Network::default()
    };
    let lossless = network.loss == 0.0;
    let (mut sim, a, b) = pair(seed, network, connection(rng.bool()));
    let before = rng.u64(0..10);
    for _ in 0..before {
        let opcode = *rng
            .choice(&[Opcode::RdmaWrite, Opcode::RdmaRead, Opcode::FetchAdd])
            .unwrap();
        post(&mut sim, a, work(opcode, rng.u32(0..20_000)));
    }
    let bad = make(&mut rng, &mut sim, b);
    post(&mut sim, a, bad);
    for _ in 0..5 {
        post(&mut sim, a, work(Opcode::RdmaWrite, 3000));
    }
    sim.pump(a);
    sim.run(100 * SEC);
    let got = if lossless {
        failed_at(&sim, a, before)
    } else {
        // The responder is in error and answers nothing that came before: if such an answer was
        // lost, silence is all that the requester learns.
        let last = sim.qps[a].completions.last().unwrap();
        assert!(last.seq <= before);
        let got = failed_at(&sim, a, last.seq);
        assert!(last.seq == before || got == WcStatus::RetryExcErr);
        got
    };
    assert!(
        got == status || (!lossless && got == WcStatus::RetryExcErr),
        "{got:?}"
    );
}

#[test]
fn foreign_memory_is_a_remote_access_error() {
    seeds(500, |seed| {
        let make = |rng: &mut Rng, _: &mut Sim, _| {
            let opcode = *rng
                .choice(&[
                    Opcode::RdmaWrite,
                    Opcode::RdmaRead,
                    Opcode::CompareSwap,
                    Opcode::AtomicWrite,
                ])
                .unwrap();
            let mut bad = work(opcode, 5000);
            if rng.bool() {
                bad.rkey = 1;
            } else {
                bad.va = BASE + MEMORY as u64;
            }
            bad
        };
        refused(seed, make, WcStatus::RemAccessErr);
    });
}

#[test]
fn a_receive_that_is_too_short_is_an_invalid_request() {
    seeds(500, |seed| {
        let make = |rng: &mut Rng, sim: &mut Sim, b| {
            let len = rng.u32(1..5000);
            sim.post_receives(b, 0, 1, rng.usize(0..len as usize));
            work(Opcode::Send, len)
        };
        refused(seed, make, WcStatus::RemInvReqErr);
    });
}

#[test]
fn an_unaligned_atomic_is_an_invalid_request() {
    seeds(100, |seed| {
        let make = |rng: &mut Rng, _: &mut Sim, _| Work {
            va: BASE + rng.u64(1..8),
            ..work(Opcode::FetchAdd, 8)
        };
        refused(seed, make, WcStatus::RemInvReqErr);
    });
}

#[test]
fn a_receiver_that_is_never_ready_exhausts_its_own_count() {
    for selective in [false, true] {
        for rnr_retry in 0..7 {
            let connection = Connection {
                rnr_retry,
                ..connection(selective)
            };
            let (mut sim, a, _) = pair(1, Network::default(), connection);
            post(&mut sim, a, work(Opcode::RdmaWrite, 1));
            post(&mut sim, a, work(Opcode::Send, 5000));
            post(&mut sim, a, work(Opcode::RdmaWrite, 1));
            sim.pump(a);
            sim.run(10 * SEC);
            assert_eq!(failed_at(&sim, a, 1), WcStatus::RnrRetryExcErr);
            let took = sim.qps[a].completions[1].at;
            let nominal = u64::from(rnr_retry) * rnr_timer_ns(12);
            assert!(
                (nominal..nominal + MS).contains(&took),
                "{took} of {nominal}"
            );
        }
    }
}

#[test]
fn a_receiver_that_is_ready_late_loses_nothing() {
    for selective in [false, true] {
        let (mut sim, a, b) = pair(1, Network::default(), connection(selective));
        for _ in 0..5 {
            post(&mut sim, a, work(Opcode::Send, 5000));
        }
        sim.post_receives(b, 900 * MS, 5, 5000);
        sim.pump(a);
        sim.run(10 * SEC);
        assert_eq!(sim.qps[a].completions.len(), 5);
        assert_eq!(sim.qps[b].received.len(), 5);
    }
}

#[test]
fn without_granted_resources_a_read_fails_rather_than_waits() {
    let connection = Connection {
        max_rd_atomic: 0,
        ..connection(false)
    };
    let (mut sim, a, _) = pair(1, Network::default(), connection);
    post(&mut sim, a, work(Opcode::RdmaWrite, 5000));
    post(&mut sim, a, work(Opcode::RdmaRead, 1));
    sim.pump(a);
    sim.run(SEC);
    assert_eq!(failed_at(&sim, a, 1), WcStatus::LocQpOpErr);
}
