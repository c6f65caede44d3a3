//! Shares of a link that is too slow for all, with a queue that drops its tail.

use freeflow_sim::{BASE, KEY, MS, Network, QpId, SEC, Sim, seeds};
use freeflow_transport::{Connection, Work};
use freeflow_types::{Opcode, QpAttr, QpType, WcStatus};

const MESSAGE: u32 = 16 << 10;
const MEMORY: usize = MESSAGE as usize;
/// What all need to find their rates.
const BEGIN: u64 = SEC;
/// What is measured.
const TIME: u64 = 3 * SEC;
/// Runs of each kind.
const SEEDS: u64 = 4;
/// Messages that each queue pair has outstanding.
const DEPTH: usize = 48;

/// The two hosts of the benchmark `fairness`.
fn slow() -> Network {
    Network {
        rate: 400_000_000,
        haste: 25,
        queue: 1_000_000,
        jitter: 20_000,
        scatter: 100_000,
        ..Network::default()
    }
}

fn connection(segment: u32) -> Connection {
    Connection {
        segment,
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        min_rnr_timer: 12,
        selective: true,
        ..Connection::new(QpType::Rc, &QpAttr::default())
    }
}

struct Load {
    sim: Sim,
    flows: Vec<(QpId, QpId)>,
}

impl Load {
    fn new(seed: u64, n: usize, segment: u32, network: Network) -> Load {
        let mut sim = Sim::new(seed, 2, network);
        let flows = (0..n)
            .map(|_| sim.connect((1, 0), connection(segment), MEMORY))
            .collect();
        Load { sim, flows }
    }

    fn fill(&mut self) {
        for &(from, _) in &self.flows {
            let qp = &mut self.sim.qps[from];
            for done in qp.completions.drain(..) {
                assert_eq!(done.status, WcStatus::Success, "{from} at {}", done.at);
                qp.buffers.remove(&done.seq);
            }
            while qp.requester.outstanding() < DEPTH {
                let work = Work {
                    va: BASE,
                    rkey: KEY,
                    ..Work::new(Opcode::RdmaWrite, MESSAGE)
                };
                qp.post(work, vec![0; MESSAGE as usize]);
            }
            self.sim.pump(from);
        }
    }

    /// Bytes that queue pairs, and streams, deliver in so much time.
    fn run(&mut self, time: u64) -> (Vec<u64>, Vec<u64>) {
        let before = self.delivered();
        let end = self.sim.now() + time;
        while self.sim.now() < end {
            self.fill();
            let until = self.sim.now() + MS;
            while self.sim.step(until) {}
        }
        let after = self.delivered();
        let less = |a: Vec<u64>, b: Vec<u64>| a.iter().zip(b).map(|(a, b)| a - b).collect();
        (less(after.0, before.0), less(after.1, before.1))
    }

    fn delivered(&self) -> (Vec<u64>, Vec<u64>) {
        let qps = self.flows.iter();
        (
            qps.map(|&(_, to)| self.sim.qps[to].delivered).collect(),
            self.sim.streams.iter().map(|s| s.delivered()).collect(),
        )
    }
}

fn jain(shares: &[u64]) -> f64 {
    let sum: f64 = shares.iter().map(|&s| s as f64).sum();
    let squares: f64 = shares.iter().map(|&s| (s as f64).powi(2)).sum();
    sum * sum / (shares.len() as f64 * squares)
}

/// In millions of bits a second of `TIME`.
fn mbit(bytes: &[u64]) -> f64 {
    bytes.iter().sum::<u64>() as f64 * 8e3 / TIME as f64
}

#[test]
fn connections_share_a_slow_link_fairly() {
    // With 64 segments of 9 KB the queue is more than half full.
    for (n, segment) in [(64, 8896), (2, 1408), (64, 1408)] {
        seeds(SEEDS, |seed| {
            let mut load = Load::new(seed, n, segment, slow());
            load.run(BEGIN);
            let (qps, _) = load.run(TIME);
            let (fairness, rate) = (jain(&qps), mbit(&qps));
            assert!(
                fairness >= 0.95,
                "{n} with {segment}: {fairness} of {qps:?}"
            );
            assert!(rate >= 360.0, "{n} with {segment}: {rate} Mbit/s");
        });
    }
}

#[test]
fn a_tcp_stream_gets_its_share_beside_connections() {
    for n in [1, 2, 8] {
        seeds(SEEDS, |seed| {
            let mut load = Load::new(seed, n, 1408, slow());
            load.run(BEGIN);
            load.sim.stream(1, 0);
            load.run(BEGIN);
            let (qps, tcp) = load.run(2 * TIME);
            let (qps, tcp) = (mbit(&qps) / 2.0, mbit(&tcp) / 2.0);
            let share = tcp * (n + 1) as f64 / (qps + tcp);
            assert!((0.5..=2.0).contains(&share), "{tcp} beside {n} with {qps}");
            assert!(qps + tcp >= 360.0, "{tcp} beside {n} with {qps}");
        });
    }
}
