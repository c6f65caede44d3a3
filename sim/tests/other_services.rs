//! Unreliable connections lose whole messages and nothing else; extended reliable connections are
//! reliable ones with a receiver's queue in each request.

use fastrand::Rng;
use freeflow_sim::{BASE, KEY, Network, SEC, Sim, US, seeds};
use freeflow_transport::{Connection, Work};
use freeflow_types::{Opcode, QpAttr, QpType, WcStatus};

const MEMORY: usize = 1 << 16;

fn connection(qp_type: QpType, rng: &mut Rng) -> Connection {
    Connection {
        segment: *rng.choice(&[256, 1024]).unwrap(),
        sq_psn: 0xFF_FFFF - rng.u32(0..50),
        rq_psn: rng.u32(0..1 << 24),
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        min_rnr_timer: 5,
        max_rd_atomic: 4,
        max_dest_rd_atomic: 4,
        ..Connection::new(qp_type, &QpAttr::default())
    }
}

#[test]
fn unreliable_connections_deliver_whole_messages_in_order_or_none() {
    seeds(1000, |seed| {
        let mut rng = Rng::with_seed(seed);
        let faulty = rng.bool();
        let network = Network {
            loss: if faulty { rng.f64() * 0.2 } else { 0.0 },
            duplicate: if faulty { rng.f64() * 0.1 } else { 0.0 },
            reorder: if faulty { rng.f64() * 0.1 } else { 0.0 },
            late: 300 * US,
            queue: 10 << 20,
            ..Network::default()
        };
        let mut sim = Sim::new(seed, 2, network);
        let connection = connection(QpType::Uc, &mut rng);
        let (a, b) = sim.connect((0, 1), connection, MEMORY);
        let count = 100;
        let mut sent = Vec::new();
        for i in 0..count {
            let writes = rng.u8(0..4) == 0;
            let opcode = if writes {
                Opcode::RdmaWriteImm
            } else {
                Opcode::SendImm
            };
            let len = rng.usize(0..4000);
            let mut data = vec![0; len];
            rng.fill(&mut data);
            let work = Work {
                va: BASE,
                rkey: KEY,
                imm: u32::to_ne_bytes(i),
                ..Work::new(opcode, len as u32)
            };
            sim.qps[a].post(work, data.clone());
            sent.push((opcode, data));
        }
        // Some messages find no receive: they are lost as well.
        let few = rng.bool();
        sim.post_receives(b, 0, if few { 20 } else { 100 }, 4000);
        sim.step(0);
        sim.pump(a);
        sim.run(SEC);
        let done = &sim.qps[a].completions;
        assert_eq!(done.len(), count as usize);
        assert!(done.iter().all(|c| c.status == WcStatus::Success));
        let mut last = None;
        for got in &sim.qps[b].received {
            let i = u32::from_ne_bytes(got.end.imm.unwrap());
            assert!(last < Some(i), "{i} after {last:?}");
            last = Some(i);
            let (opcode, data) = &sent[i as usize];
            assert_eq!(
                (got.end.opcode, got.end.len as usize),
                (*opcode, data.len())
            );
            assert!(got.end.opcode == Opcode::RdmaWriteImm || &got.data == data);
        }
        let received = sim.qps[b].received.len();
        if !faulty {
            assert_eq!(received, if few { 20 } else { 100 });
        }
        assert_eq!(sim.qps[b].requester.next_timeout(), None);
    });
}

#[test]
fn extended_connections_carry_the_receivers_queue() {
    seeds(300, |seed| {
        let mut rng = Rng::with_seed(seed);
        let network = Network {
            loss: rng.f64() * 0.05,
            reorder: rng.f64() * 0.05,
            ..Network::default()
        };
        let mut sim = Sim::new(seed, 2, network);
        let connection = Connection {
            selective: rng.bool(),
            ..connection(QpType::XrcSend, &mut rng)
        };
        let (a, b) = sim.connect((0, 1), connection, MEMORY);
        let mut want = Vec::new();
        for i in 0..50u32 {
            let opcode = *rng
                .choice(&[Opcode::Send, Opcode::RdmaWriteImm, Opcode::RdmaRead])
                .unwrap();
            let srq = rng.u32(0..1 << 24);
            let work = Work {
                va: BASE,
                rkey: KEY,
                xrc_srq: srq,
                imm: u32::to_ne_bytes(i),
                ..Work::new(opcode, 3000)
            };
            sim.qps[a].post(work, vec![i as u8; 3000]);
            if opcode.consumes_recv() {
                want.push((opcode, Some(srq)));
                sim.post_receives(b, 0, 1, 3000);
            }
        }
        sim.pump(a);
        sim.run(60 * SEC);
        let got: Vec<_> = sim.qps[b]
            .received
            .iter()
            .map(|r| (r.end.opcode, r.srq))
            .collect();
        assert_eq!(got, want);
        assert_eq!(sim.qps[a].completions.len(), 50);
    });
}

#[test]
fn a_hundred_hosts_finish_what_they_began() {
    let network = Network {
        loss: 0.002,
        ..Network::default()
    };
    let mut sim = Sim::new(5, 100, network);
    let mut rng = Rng::with_seed(5);
    let mut senders = Vec::new();
    for from in 0..100 {
        for to in [rng.usize(0..100), rng.usize(0..100), 0] {
            if from == to {
                continue;
            }
            let connection = Connection {
                selective: rng.bool(),
                ..connection(QpType::Rc, &mut rng)
            };
            let (a, b) = sim.connect((from, to), connection, MEMORY);
            sim.post_receives(b, 0, 10, 20_000);
            for opcode in [Opcode::RdmaWrite, Opcode::RdmaRead, Opcode::Send] {
                let work = Work {
                    va: BASE,
                    rkey: KEY,
                    ..Work::new(opcode, 20_000)
                };
                sim.qps[a].post(work, vec![1; 20_000]);
            }
            senders.push(a);
        }
    }
    for &a in &senders {
        sim.pump(a);
    }
    sim.run(100 * SEC);
    for &a in &senders {
        let done: Vec<_> = sim.qps[a].completions.iter().map(|c| c.status).collect();
        assert_eq!(done, [WcStatus::Success; 3]);
    }
}
