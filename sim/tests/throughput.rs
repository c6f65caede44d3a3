//! Throughput against loss, and shares of a link: what the simulator says is compared with what is
//! committed, so that a change of either is seen. `FREEFLOW_UPDATE=1` writes the table anew.

use std::fmt::Write;

use freeflow_sim::{BASE, KEY, MS, Network, QpId, SEC, Sim};
use freeflow_transport::{Connection, Work};
use freeflow_types::{Opcode, QpAttr, QpType};

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/throughput.txt");
const MEMORY: usize = 64 << 10;
const LOSSES: [f64; 5] = [0.0, 0.0001, 0.001, 0.01, 0.05];

fn connection(segment: u32, selective: bool) -> Connection {
    Connection {
        segment,
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        min_rnr_timer: 12,
        max_rd_atomic: 16,
        max_dest_rd_atomic: 16,
        selective,
        ..Connection::new(QpType::Rc, &QpAttr::default())
    }
}

/// A queue pair that always has work.
struct Flow {
    from: QpId,
    to: QpId,
    opcode: Opcode,
    len: u32,
}

impl Flow {
    fn fill(&self, sim: &mut Sim) {
        let mut posted = false;
        let depth = if self.len < 4096 { 256 } else { 16 };
        while sim.qps[self.from].requester.outstanding() < depth {
            let work = Work {
                va: BASE,
                rkey: KEY,
                ..Work::new(self.opcode, self.len)
            };
            if self.opcode == Opcode::Send {
                sim.qps[self.to].receives.push_back(self.len as usize);
            }
            let seq = sim.qps[self.from].post(work, vec![0; self.len as usize]);
            sim.qps[self.from]
                .buffers
                .remove(&(seq.wrapping_sub(2 * depth as u64)));
            posted = true;
        }
        if posted {
            sim.pump(self.from);
        }
    }

    fn delivered(&self, sim: &Sim) -> u64 {
        match self.opcode {
            Opcode::RdmaRead => sim.qps[self.from].delivered,
            _ => sim.qps[self.to].delivered,
        }
    }
}

/// Bytes that each flow delivers from `warm_up` to `until`.
fn run(sim: &mut Sim, flows: &[Flow], warm_up: u64, until: u64) -> Vec<u64> {
    let mut before = Vec::new();
    for end in [warm_up, until] {
        for flow in flows {
            flow.fill(sim);
        }
        while sim.step(end) {
            for flow in flows {
                flow.fill(sim);
            }
        }
        let now: Vec<u64> = flows.iter().map(|f| f.delivered(sim)).collect();
        if end == until {
            return now.iter().zip(&before).map(|(a, b)| a - b).collect();
        }
        before = now;
    }
    Vec::new()
}

/// Bits per second of one flow.
fn rate(opcode: Opcode, len: u32, connection: Connection, loss: f64) -> f64 {
    let network = Network {
        loss,
        ..Network::default()
    };
    let mut sim = Sim::new(7, 2, network);
    let (from, to) = sim.connect((0, 1), connection, MEMORY);
    let flows = [Flow {
        from,
        to,
        opcode,
        len,
    }];
    let (warm_up, until) = (5 * MS, 35 * MS);
    let bytes = run(&mut sim, &flows, warm_up, until)[0];
    bytes as f64 * 8.0 * SEC as f64 / (until - warm_up) as f64
}

#[test]
fn goodput_against_loss_is_as_committed() {
    let mut table = String::from(
        "Goodput in Gbit/s of one queue pair over 10 Gbit/s, 20 us round trip, against packet loss.\n\n",
    );
    write!(table, "{:<34}", "").unwrap();
    for loss in LOSSES {
        write!(table, "{:>8}", format!("{}%", loss * 100.0)).unwrap();
    }
    table.push('\n');
    for (name, segment, selective) in [
        ("standard, 1024", 1024, false),
        ("standard, 4096", 4096, false),
        ("selective, 4096", 4096, true),
        ("selective, 8192", 8192, true),
    ] {
        for (what, opcode, len) in [
            ("WRITE of 64 KiB", Opcode::RdmaWrite, 64 << 10),
            ("READ of 64 KiB", Opcode::RdmaRead, 64 << 10),
            ("SEND of 256 B", Opcode::Send, 256),
        ] {
            let rates = LOSSES.map(|loss| rate(opcode, len, connection(segment, selective), loss));
            write!(table, "{:<34}", format!("{name}: {what}")).unwrap();
            for rate in rates {
                write!(table, "{:>8.2}", rate / 1e9).unwrap();
            }
            table.push('\n');
            if selective {
                for (rate, least) in rates.iter().zip([1.0, 0.9, 0.9, 0.7, 0.2]) {
                    let part = rate / rates[0];
                    assert!(part >= least, "{name}: {what}: {part} of {}", rates[0]);
                }
            }
        }
    }
    if std::env::var_os("FREEFLOW_UPDATE").is_some() {
        std::fs::write(TABLE, &table).expect("the table can be written");
    }
    let committed = std::fs::read_to_string(TABLE).unwrap_or_default();
    assert!(
        table == committed,
        "it is now, where FREEFLOW_UPDATE=1 writes it:\n{table}"
    );
}

/// Jain's index of fairness: 1 if all have the same.
fn jain(shares: &[u64]) -> f64 {
    let sum: f64 = shares.iter().map(|&s| s as f64).sum();
    let squares: f64 = shares.iter().map(|&s| (s as f64).powi(2)).sum();
    sum * sum / (shares.len() as f64 * squares)
}

/// Bytes of each of `hosts` that send to one.
fn incast(hosts: usize, opcode: Opcode, selective: bool, mark: u64, time: u64) -> (Vec<u64>, Sim) {
    let network = Network {
        queue: 500_000,
        jitter: 5_000,
        mark,
        ..Network::default()
    };
    let mut sim = Sim::new(3, hosts + 1, network);
    let flows: Vec<Flow> = (0..hosts)
        .map(|host| {
            let (from, to) = if opcode == Opcode::RdmaRead {
                (hosts, host)
            } else {
                (host, hosts)
            };
            let (from, to) = sim.connect((from, to), connection(4096, selective), MEMORY);
            let len = 64 << 10;
            Flow {
                from,
                to,
                opcode,
                len,
            }
        })
        .collect();
    let shares = run(&mut sim, &flows, time / 3, time);
    (shares, sim)
}

#[test]
fn many_senders_share_a_receiver_fairly() {
    for (opcode, selective) in [
        (Opcode::RdmaWrite, false),
        (Opcode::RdmaWrite, true),
        (Opcode::RdmaRead, true),
    ] {
        let time = 900 * MS;
        let (shares, _) = incast(32, opcode, selective, u64::MAX, time);
        let fairness = jain(&shares);
        assert!(
            fairness >= 0.95,
            "{opcode:?}, {selective}: {fairness} of {shares:?}"
        );
        let rate = shares.iter().sum::<u64>() as f64 * 8e9 / (time * 2 / 3) as f64;
        assert!(rate >= 7e9, "{opcode:?}, {selective}: {rate} bit/s in all");
    }
}

#[test]
fn marks_spare_losses() {
    let time = 150 * MS;
    for opcode in [Opcode::RdmaWrite, Opcode::RdmaRead] {
        let (_, unmarked) = incast(8, opcode, true, u64::MAX, time);
        let (shares, marked) = incast(8, opcode, true, 100_000, time);
        let (many, few) = (unmarked.stats.overflowed, marked.stats.overflowed);
        assert!(few * 10 <= many, "{opcode:?}: {few} and {many} overflows");
        let rate = shares.iter().sum::<u64>() as f64 * 8e9 / (time * 2 / 3) as f64;
        assert!(rate >= 9e9, "{opcode:?}: {rate} bit/s in all");
        let fairness = jain(&shares);
        assert!(fairness >= 0.95, "{opcode:?}: {fairness} of {shares:?}");
    }
}
