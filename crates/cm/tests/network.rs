//! Two managers with a bad network between them, in virtual time: messages are lost, doubled,
//! late and out of order. However that goes, each id is told one verdict and one end, nothing
//! waits for ever, and nothing is left behind.

use std::collections::{BTreeMap, BTreeSet};

use freeflow_cm::{Arrival, Event, Manager, Output, Port};
use freeflow_session::{CmDetail, CmEventType as Kind, CmParam, CmQp, Handle, PortSpace};
use freeflow_types::{Gid, Mtu, QpType, Qpn, VirtualIp};
use freeflow_wire::cm::{Mad, Message, Mra, Rejected};
use proptest::prelude::*;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
const PORT: u16 = 7471;
const LISTENER: Handle = Handle(1);

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Copy, Debug)]
struct Network {
    /// Percent of the messages.
    lost: u64,
    doubled: u64,
    longest: u64,
}

/// What happens at some time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Message { to: usize, mad: Vec<u8> },
    Accept { side: usize, id: u32 },
    Reject { side: usize, id: u32 },
    Destroy { side: usize, id: u32 },
    Disconnect { side: usize, id: u32 },
    Notify { side: usize, id: u32 },
}

struct Side {
    manager: Manager,
    port: Port,
    ids: u32,
    told: BTreeMap<u32, Vec<(Kind, i32)>>,
    destroyed: BTreeSet<u32>,
}

struct World {
    now: u64,
    rng: Rng,
    network: Network,
    sides: [Side; 2],
    /// Ids of side 0, and those of side 1 that they were asked for by last.
    peers: BTreeMap<u32, u32>,
    /// Requests that were taken for new ones although there had been an answer.
    repeats: u32,
    due: BTreeSet<(u64, u64, Due)>,
    count: u64,
}

fn address(side: usize) -> std::net::IpAddr {
    std::net::Ipv4Addr::new(10, 0, 0, side as u8 + 1).into()
}

fn param(qpn: u32) -> CmParam {
    CmParam {
        qp: CmQp {
            qpn: Qpn::new(qpn),
            qp_type: QpType::Rc,
            srq: false,
        },
        private_data: vec![7; 5],
        responder_resources: 1,
        initiator_depth: 1,
        flow_control: false,
        retry_count: 7,
        rnr_retry_count: 7,
        qkey: None,
        ece: None,
    }
}

impl World {
    fn new(seed: u64, network: Network) -> World {
        let side = |n| Side {
            manager: Manager::new(16),
            port: Port {
                endpoint: Handle(n as u32 + 1),
                gid: Gid::from(VirtualIp(address(n))),
                index: 0,
                mtu: Mtu::B1024,
                guid: n as u64 + 1,
            },
            ids: 1,
            told: BTreeMap::new(),
            destroyed: BTreeSet::new(),
        };
        let mut world = World {
            now: 0,
            rng: Rng(seed),
            network,
            sides: [side(0), side(1)],
            peers: BTreeMap::new(),
            repeats: 0,
            due: BTreeSet::new(),
            count: 0,
        };
        let entropy = world.rng.next();
        let Side { manager, port, .. } = &mut world.sides[1];
        manager.create(LISTENER, port.endpoint, PortSpace::Tcp, QpType::Rc, entropy);
        let addr = (address(1), PORT).into();
        manager.bind(LISTENER, addr, Some(*port)).unwrap();
        manager.listen(LISTENER, 0).unwrap();
        world
    }

    fn later(&mut self, most: u64, due: Due) {
        let at = self.now + self.rng.below(most);
        self.count += 1;
        self.due.insert((at, self.count, due));
    }

    /// Side 0 connects.
    fn connect(&mut self) {
        let entropy = self.rng.next();
        let side = &mut self.sides[0];
        side.ids += 1;
        let id = Handle(side.ids);
        let m = &mut side.manager;
        m.create(id, side.port.endpoint, PortSpace::Tcp, QpType::Rc, entropy);
        let to = (address(1), PORT).into();
        let way = Ok((side.port, address(0)));
        m.resolve_addr(id, (None, None), to, way).unwrap();
        m.resolve_route(id).unwrap();
        m.connect(self.now, self.now, id, &param(id.0)).unwrap();
        if self.rng.chance(10) {
            self.later(10 * SECOND, Due::Destroy { side: 0, id: id.0 });
        }
        self.collect();
    }

    /// Takes up what the managers have said.
    fn collect(&mut self) {
        for from in [0, 1] {
            for output in self.sides[from].manager.take_output() {
                match output {
                    Output::Send { mad, .. } => {
                        let copies = u64::from(!self.rng.chance(self.network.lost))
                            + u64::from(self.rng.chance(self.network.doubled));
                        for _ in 0..copies {
                            let mad = mad.clone();
                            self.later(self.network.longest, Due::Message { to: 1 - from, mad });
                        }
                    }
                    Output::Tell { id, event } => self.told(from, id.0, &event),
                }
            }
            if self.rng.chance(5) {
                // A manager's state is a value: it goes on elsewhere as if nothing had been.
                let side = &mut self.sides[from];
                let bytes = postcard::to_stdvec(&side.manager).unwrap();
                side.manager = postcard::from_bytes(&bytes).unwrap();
            }
        }
    }

    /// What programs do when they are told something.
    fn told(&mut self, side: usize, id: u32, event: &Event) {
        let id = event.new_id.map_or(id, |new| new.0);
        let told = self.sides[side].told.entry(id).or_default();
        told.push((event.event, event.status));
        match event.event {
            Kind::ConnectRequest => {
                self.sides[1].manager.request_taken(LISTENER);
                if let CmDetail::Connection { qpn, .. } = event.detail
                    && let Some(before) = self.peers.insert(qpn.get(), id)
                {
                    // It is asked again if the answer was no, and that was lost.
                    let Side {
                        told, destroyed, ..
                    } = &self.sides[1];
                    let refused = told[&before].contains(&(Kind::User, 0));
                    self.repeats += u32::from(!refused && !destroyed.contains(&before));
                }
                let due = match self.rng.below(10) {
                    0 => Due::Reject { side, id },
                    1 => Due::Destroy { side, id },
                    _ => Due::Accept { side, id },
                };
                let patient = if self.rng.chance(10) { 100 } else { 2 };
                self.later(patient * SECOND, due);
            }
            Kind::ConnectResponse => {
                let due = match self.rng.below(10) {
                    0 => Due::Reject { side, id },
                    1 => Due::Destroy { side, id },
                    _ => Due::Accept { side, id },
                };
                self.later(SECOND, due);
            }
            // Sometimes both at once.
            Kind::Established if self.rng.chance(50) => {
                self.later(SECOND, Due::Disconnect { side, id });
            }
            Kind::Disconnected => self.later(SECOND, Due::Disconnect { side, id }),
            _ => {}
        }
    }

    fn happen(&mut self, due: Due) {
        let now = self.now;
        match due {
            Due::Message { to, mad } => {
                let (from, entropy) = (1 - to, self.rng.next());
                let source = self.sides[from].port.gid;
                let Side {
                    manager, port, ids, ..
                } = &mut self.sides[to];
                let arrival = Arrival {
                    ports: vec![*port],
                    source,
                };
                let new_id = &mut |_| {
                    *ids += 1;
                    Some((Handle(*ids), entropy))
                };
                manager.receive(now, &arrival, &mad, new_id).unwrap();
            }
            Due::Accept { side, id } => {
                let param = (side == 1).then(|| param(id));
                let manager = &mut self.sides[side].manager;
                let accepted = manager.accept(now, Handle(id), param.as_ref());
                if accepted.is_err() {
                    // The other side has given up in the meantime, and this is how one learns it.
                    return self.happen(Due::Destroy { side, id });
                }
                if side == 0 {
                    self.later(20 * SECOND, Due::Disconnect { side, id });
                }
                // What it sends may come before it says that it is ready.
                if side == 0
                    && self.rng.chance(20)
                    && let Some(&id) = self.peers.get(&id)
                {
                    self.later(3 * SECOND, Due::Notify { side: 1, id });
                }
            }
            Due::Reject { side, id } => {
                let rejected = self.sides[side]
                    .manager
                    .reject(now, Handle(id), b"no", false);
                let told = self.sides[side].told.entry(id).or_default();
                if rejected.is_ok() {
                    told.push((Kind::User, 0));
                } else {
                    self.happen(Due::Destroy { side, id });
                }
            }
            Due::Destroy { side, id } => {
                self.sides[side].destroyed.insert(id);
                self.sides[side].manager.destroy(now, Handle(id));
            }
            Due::Disconnect { side, id } => {
                let disconnected = self.sides[side].manager.disconnect(now, Handle(id));
                let gone = self.sides[side].destroyed.contains(&id);
                assert_eq!(disconnected.is_err(), gone);
            }
            Due::Notify { side, id } => {
                let event = freeflow_types::AsyncEventType::CommEst;
                let _ = self.sides[side].manager.notify(Handle(id), event);
            }
        }
    }

    /// Runs until nothing is due any more.
    fn run(&mut self) {
        for _ in 0..1_000_000 {
            self.collect();
            let timer = |s: &Side| s.manager.next_timeout();
            let timers = self.sides.iter().filter_map(timer).min();
            let first = self.due.first().map(|(at, ..)| *at);
            let Some(next) = timers.into_iter().chain(first).min() else {
                return;
            };
            assert!(next < 3600 * SECOND, "something waits for ever");
            self.now = self.now.max(next);
            while let Some((at, ..)) = self.due.first()
                && *at <= self.now
            {
                if let Some((.., due)) = self.due.pop_first() {
                    self.happen(due);
                }
            }
            for side in &mut self.sides {
                side.manager.on_timeout(self.now);
            }
        }
        panic!("it does not end");
    }

    /// Destroys all ids; then nothing may be left.
    fn end(&mut self) {
        for side in &mut self.sides {
            for id in 1..=side.ids {
                side.manager.destroy(self.now, Handle(id));
            }
        }
        self.run();
        for side in &self.sides {
            assert_eq!(side.manager.connections(), 0);
        }
    }
}

/// Whether an id was told one verdict and, if it was connected, one end. [`Kind::User`] stands for
/// the program's own rejection.
fn is_complete(told: &[(Kind, i32)]) -> bool {
    use Kind::{
        ConnectRequest, ConnectResponse, Disconnected, Established, Rejected, TimewaitExit,
        Unreachable, User,
    };
    let kinds: Vec<_> = told.iter().map(|&(kind, _)| kind).collect();
    let rest = match &kinds[..] {
        [Kind::AddrResolved, Kind::RouteResolved, rest @ ..] | [ConnectRequest, rest @ ..] => rest,
        _ => return false,
    };
    matches!(
        rest,
        [ConnectResponse, rest @ ..] | [Established, rest @ ..] | rest
            if matches!(rest, [Disconnected, TimewaitExit] | [Rejected] | [Unreachable] | [User])
    )
}

fn play(seed: u64, network: Network, connections: u32) -> World {
    let mut world = World::new(seed, network);
    for _ in 0..connections {
        world.connect();
    }
    world.run();
    for side in &world.sides {
        for (id, told) in &side.told {
            if *id != LISTENER.0 && !side.destroyed.contains(id) {
                assert!(is_complete(told), "{id}: {told:?}");
            }
        }
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_side_gets_one_verdict_and_one_end(
        seed in any::<u64>(), lost in 0u64..30, doubled in 0u64..30, longest in 1u64..1500,
    ) {
        let network = Network { lost, doubled, longest: longest * MS };
        let mut world = play(seed, network, 6);
        assert_eq!(world.repeats, 0);
        world.end();
    }

    #[test]
    fn messages_that_come_very_late_end_too(
        seed in any::<u64>(), lost in 0u64..30, doubled in 0u64..60, longest in 2u64..60,
    ) {
        let network = Network { lost, doubled, longest: longest * SECOND };
        play(seed, network, 4).end();
    }
}

#[test]
fn a_network_that_carries_nothing_is_found_out() {
    let network = Network {
        lost: 100,
        doubled: 0,
        longest: 1,
    };
    let mut world = play(1, network, 20);
    let told = world.sides[0].told.values();
    let verdicts: Vec<_> = told.filter_map(|told| told.last()).collect();
    assert!(verdicts.iter().any(|v| **v == (Kind::Unreachable, -110)));
    world.end();
}

#[test]
fn who_asks_for_time_again_and_again_does_not_get_it_for_ever() {
    let network = Network {
        lost: 100,
        doubled: 0,
        longest: 1,
    };
    let mut world = World::new(2, network);
    let side = &mut world.sides[0];
    let (id, m, port) = (Handle(2), &mut side.manager, side.port);
    m.create(id, port.endpoint, PortSpace::Tcp, QpType::Rc, 1 << 40);
    let to = (address(1), PORT).into();
    let way = Ok((port, address(0)));
    m.resolve_addr(id, (None, None), to, way).unwrap();
    m.resolve_route(id).unwrap();
    m.connect(0, 0, id, &param(5)).unwrap();
    let arrival = Arrival {
        ports: vec![port],
        source: world.sides[1].port.gid,
    };
    let mra = Mra {
        local_id: 9,
        remote_id: 1 << 8,
        message: Rejected::Req,
        service_timeout: 31,
        private: [0; 222],
    };
    let mad = Mad {
        transaction: 0,
        modifier: 0,
        message: Message::Mra(mra),
    };
    let mad = mad.emit().unwrap();
    let mut now = 0;
    let m = &mut world.sides[0].manager;
    while let Some(due) = m.next_timeout() {
        now += 20 * SECOND;
        assert!(now < 3600 * SECOND, "it is asked to wait for ever");
        m.receive(now, &arrival, &mad, &mut |_| None).unwrap();
        if due <= now {
            m.on_timeout(now);
        }
    }
    let told = m.take_output();
    let last = told.iter().rev().find_map(|output| match output {
        Output::Tell { event, .. } => Some((event.event, event.status)),
        Output::Send { .. } => None,
    });
    assert_eq!(last, Some((Kind::Unreachable, -110)));
}
