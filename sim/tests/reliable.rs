//! Random work over bad networks, against an oracle: each message is executed once, in order, with
//! its data intact, and completes in order.

use fastrand::Rng;
use freeflow_sim::{BASE, KEY, MS, Network, QpId, Received, SEC, Sim, US, seeds};
use freeflow_transport::{Connection, MessageEnd, Work};
use freeflow_types::{FlushSpec, Opcode, QpAttr, QpType, WcStatus};
use serde::{Serialize, de::DeserializeOwned};

/// A queue pair's memory: words for atomics, what is only read, what is written.
const WORDS: usize = 64;
const CONSTANT: usize = 16 << 10;
const WRITTEN: usize = 16 << 10;
const MEMORY: usize = WORDS + CONSTANT + WRITTEN;
const LONGEST: usize = 8 << 10;

/// What must come of one side's work.
#[derive(Default)]
struct Expected {
    /// The peer's memory in the end.
    memory: Vec<u8>,
    /// Buffers of READs and atomics.
    buffers: Vec<(u64, Vec<u8>)>,
    received: Vec<Received>,
    messages: u64,
    needs_recv: usize,
}

fn bytes(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    rng.fill(&mut data);
    data
}

fn connection(rng: &mut Rng, selective: bool) -> Connection {
    let wraps = rng.bool();
    let mut psn = || {
        let near = 0xFF_FFFF - rng.u32(0..40);
        if wraps { near } else { rng.u32(0..1 << 24) }
    };
    let (sq_psn, rq_psn) = (psn(), psn());
    let max_rd_atomic = rng.u8(1..=16);
    Connection {
        segment: if selective {
            *rng.choice(&[1024, 4096, 6000]).unwrap()
        } else {
            *rng.choice(&[256, 1024, 4096]).unwrap()
        },
        sq_psn,
        rq_psn,
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        min_rnr_timer: rng.u8(1..=14),
        max_rd_atomic,
        max_dest_rd_atomic: max_rd_atomic,
        selective,
        ..Connection::new(QpType::Rc, &QpAttr::default())
    }
}

fn post(
    sim: &mut Sim,
    rng: &mut Rng,
    from: QpId,
    to: QpId,
    count: usize,
    longest: usize,
) -> Expected {
    let mut expected = Expected {
        memory: sim.qps[to].memory.clone(),
        ..Expected::default()
    };
    for _ in 0..count {
        let opcode = *rng
            .choice(&[
                Opcode::Send,
                Opcode::Send,
                Opcode::SendImm,
                Opcode::SendInv,
                Opcode::RdmaWrite,
                Opcode::RdmaWrite,
                Opcode::RdmaWriteImm,
                Opcode::RdmaRead,
                Opcode::RdmaRead,
                Opcode::CompareSwap,
                Opcode::FetchAdd,
                Opcode::AtomicWrite,
                Opcode::Flush,
            ])
            .unwrap();
        let len = match rng.u8(0..4) {
            0 => 0,
            1 => rng.usize(0..100),
            _ => rng.usize(0..=longest),
        };
        let mut work = Work::new(opcode, len as u32);
        work.rkey = KEY;
        work.fence = rng.u8(0..8) == 0;
        work.solicited = rng.bool();
        work.imm = rng.u32(..).to_ne_bytes();
        work.invalidate = rng.u32(..);
        let mut data = Vec::new();
        let seq = expected.messages;
        let memory = &mut expected.memory;
        match opcode {
            Opcode::RdmaWrite | Opcode::RdmaWriteImm => {
                data = bytes(rng, len);
                let at = WORDS + CONSTANT + rng.usize(0..=WRITTEN - len);
                work.va = BASE + at as u64;
                memory[at..at + len].copy_from_slice(&data);
            }
            Opcode::RdmaRead => {
                data = vec![0; len];
                let at = WORDS + rng.usize(0..=CONSTANT - len);
                work.va = BASE + at as u64;
                expected.buffers.push((seq, memory[at..at + len].to_vec()));
            }
            Opcode::CompareSwap | Opcode::FetchAdd | Opcode::AtomicWrite => {
                let at = rng.usize(0..WORDS / 8) * 8;
                work.va = BASE + at as u64;
                work.len = 8;
                work.swap_add = rng.u64(0..4);
                work.compare = rng.u64(0..4);
                data = bytes(rng, 8);
                data[1..].fill(0);
                data[0] &= 3;
                let word = &mut memory[at..at + 8];
                let before = u64::from_ne_bytes((&*word).try_into().unwrap());
                let new = match opcode {
                    Opcode::CompareSwap if before == work.compare => work.swap_add,
                    Opcode::CompareSwap => before,
                    Opcode::FetchAdd => before.wrapping_add(work.swap_add),
                    _ => u64::from_ne_bytes(data[..].try_into().unwrap()),
                };
                word.copy_from_slice(&new.to_ne_bytes());
                if opcode != Opcode::AtomicWrite {
                    expected.buffers.push((seq, before.to_ne_bytes().to_vec()));
                }
            }
            Opcode::Flush => {
                work.len = 0;
                work.va = BASE;
                work.flush_len = 100;
                work.swap_add = FlushSpec::new(1, 0).unwrap().raw();
            }
            _ => data = bytes(rng, len),
        }
        if opcode.consumes_recv() {
            expected.needs_recv += 1;
            expected.received.push(Received {
                end: MessageEnd {
                    opcode,
                    len: len as u32,
                    imm: opcode.has_imm().then_some(work.imm),
                    invalidate: (opcode == Opcode::SendInv).then_some(work.invalidate),
                    solicited: work.solicited,
                },
                data: if opcode.has_remote() {
                    Vec::new()
                } else {
                    data.clone()
                },
                srq: None,
            });
        }
        assert_eq!(sim.qps[from].post(work, data), seq);
        expected.messages += 1;
    }
    expected
}

fn check(sim: &Sim, from: QpId, to: QpId, expected: &Expected) {
    let (sender, receiver) = (&sim.qps[from], &sim.qps[to]);
    let completed: Vec<_> = sender
        .completions
        .iter()
        .map(|c| (c.seq, c.status))
        .collect();
    let all: Vec<_> = (0..expected.messages)
        .map(|seq| (seq, WcStatus::Success))
        .collect();
    assert_eq!(completed, all);
    assert!(receiver.memory == expected.memory, "memory differs");
    for (seq, data) in &expected.buffers {
        assert!(
            &sender.buffers[seq] == data,
            "message {seq} read something else"
        );
    }
    assert_eq!(receiver.received.len(), expected.received.len());
    for (got, want) in receiver.received.iter().zip(&expected.received) {
        assert_eq!(got.end, want.end);
        assert!(got.data == want.data, "a message differs");
    }
    assert!(sender.requester.is_idle());
    assert_eq!(sender.requester.next_timeout(), None);
}

fn bad_network(rng: &mut Rng) -> Network {
    let some = |rng: &mut Rng, p: f64| if rng.bool() { 0.0 } else { rng.f64() * p };
    Network {
        rate: *rng.choice(&[1_000_000_000, 10_000_000_000]).unwrap(),
        delay: rng.u64(1..200) * US,
        jitter: rng.u64(0..50) * US,
        queue: rng.u64(10_000..500_000),
        mark: rng.u64(0..1_000_000),
        loss: some(rng, 0.08),
        damage: some(rng, 0.01),
        duplicate: some(rng, 0.05),
        reorder: some(rng, 0.1),
        late: rng.u64(1..2000) * US,
        ..Network::default()
    }
}

fn moved<T: Serialize + DeserializeOwned>(state: &T) -> T {
    let bytes = postcard::to_stdvec(state).unwrap();
    postcard::from_bytes(&bytes).unwrap()
}

fn run(seed: u64, selective: bool) {
    let mut rng = Rng::with_seed(seed);
    let mut sim = Sim::new(seed, 2, bad_network(&mut rng));
    let connection = connection(&mut rng, selective);
    let (a, b) = sim.connect((0, 1), connection, MEMORY);
    for qp in [a, b] {
        rng.fill(&mut sim.qps[qp].memory[WORDS..]);
        sim.qps[qp].hold_limit = rng.usize(0..300);
    }
    let count = rng.usize(1..30);
    let longest = rng.usize(0..=LONGEST);
    let forth = post(&mut sim, &mut rng, a, b, count, longest);
    let back = if rng.bool() {
        post(&mut sim, &mut rng, b, a, count, longest)
    } else {
        Expected {
            memory: sim.qps[a].memory.clone(),
            ..Expected::default()
        }
    };
    for (qp, expected) in [(b, &forth), (a, &back)] {
        for _ in 0..expected.needs_recv {
            let slow = rng.u8(0..4) == 0;
            let after = if slow { rng.u64(0..20 * MS) } else { 0 };
            sim.post_receives(qp, after, 1, LONGEST);
        }
    }
    if rng.u8(0..4) == 0 {
        sim.cut(1, rng.u64(0..100 * MS));
    }
    sim.pump(a);
    sim.pump(b);
    // The state is data: it may move to another process at any moment.
    while rng.bool() {
        for _ in 0..rng.u8(..) {
            sim.step(60 * SEC);
        }
        for qp in [a, b] {
            let qp = &mut sim.qps[qp];
            qp.requester = moved(&qp.requester);
            qp.responder = moved(&qp.responder);
        }
    }
    sim.run(60 * SEC);
    check(&sim, a, b, &forth);
    check(&sim, b, a, &back);
}

#[test]
fn standard_connections_keep_every_promise() {
    seeds(1500, |seed| run(seed, false));
}

#[test]
fn selective_connections_keep_every_promise() {
    seeds(1500, |seed| run(seed, true));
}

/// Writes so much over a long, fast network that loses packets; how many packets are sent more
/// often than once, for each one that was lost.
fn copies(seed: u64, segment: u32, loss: f64) -> f64 {
    const MESSAGE: u32 = 1 << 20;
    const MESSAGES: u64 = 300;
    let network = Network {
        rate: 100_000_000_000,
        delay: 200 * US,
        queue: 64 << 20,
        loss,
        ..Network::default()
    };
    let mut sim = Sim::new(seed, 2, network);
    let connection = Connection {
        segment,
        timeout: 14,
        retry_cnt: 7,
        ..self::connection(&mut Rng::with_seed(seed), true)
    };
    let (a, b) = sim.connect((0, 1), connection, MESSAGE as usize);
    let mut posted = 0;
    while posted < MESSAGES || sim.qps[a].requester.outstanding() != 0 {
        while posted < MESSAGES && sim.qps[a].requester.outstanding() < 5 {
            let work = Work {
                va: BASE,
                rkey: KEY,
                ..Work::new(Opcode::RdmaWrite, MESSAGE)
            };
            sim.qps[a].post(work, vec![0; MESSAGE as usize]);
            posted += 1;
        }
        sim.pump(a);
        sim.step(60 * SEC);
    }
    assert_eq!(sim.qps[b].delivered, MESSAGES * u64::from(MESSAGE));
    let needed = MESSAGES * u64::from(MESSAGE.div_ceil(segment));
    assert_ne!(sim.stats.lost, 0, "seed {seed}");
    (sim.qps[a].requests - needed) as f64 / sim.stats.lost as f64
}

#[test]
fn a_loss_in_a_large_window_costs_what_its_peer_cannot_hold() {
    // Five messages are under way, at most; what of these the peer cannot hold is sent again once.
    for (segment, most) in [(8896, 200.0), (1408, 130.0)] {
        let all: f64 = (1..4).map(|seed| copies(seed, segment, 2e-4)).sum();
        assert!(all / 3.0 <= most, "{segment}: {} a loss", all / 3.0);
    }
}
