//! Queue pairs and the links of their peers' routers, against an engine without threads, in virtual
//! time, over a network that swallows all.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use freeflow_fabric_udp::{Datagrams, Ecn, Fabric, Link, Progress, Received, SendCounters, Trains};
use freeflow_link::Agreed;
use freeflow_session::{Reply, Request};
use freeflow_shm::CompletionEntry;
use freeflow_types::{
    AddressVector, Gid, Mtu, Psn, QpAttr, QpAttrMask as Mask, QpType, VirtualIp, WcStatus,
    timeout_ns,
};
use freeflow_wire::{Aeth, Bth, BthOpcode, Headers, Syndrome, tenant_pkey};

use crate::Hosts;
use crate::engine::Polled;
use crate::remote::{Drops, Map, RoceFabric};
use crate::testbed::{Cq, Host, Made, Process, steps_to_rts};

const LOCAL: &str = "192.0.2.1";
const PEER: &str = "192.0.2.7";
/// What queue pairs have: the code of a timeout, and how often it is run.
const TIMEOUT: u8 = 10;
const TRIES: u64 = 8;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Counts what it is given, and drops it; or has no room for any of it, for ever.
struct Hole {
    fd: OwnedFd,
    sent: SendCounters,
    full: bool,
}

impl Link for Hole {
    fn local(&self) -> IpAddr {
        ip(LOCAL)
    }

    fn source_port(&self, _: u32) -> u16 {
        50_000
    }

    fn send(&mut self, _: u64, trains: &mut Trains) -> io::Result<Progress> {
        if self.full {
            return Ok(Progress::Blocked);
        }
        let all: Vec<_> = trains.left().map(|(at, t)| (at, t.packets())).collect();
        for (at, packets) in all {
            self.sent.packets += packets as u64;
            trains.finish(at);
        }
        Ok(Progress::Done)
    }

    fn receive(&mut self, _: u64, into: &mut Datagrams) -> io::Result<()> {
        into.clear();
        Ok(())
    }

    fn next_timeout(&self) -> Option<u64> {
        None
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn has_checksum(&self) -> bool {
        true
    }

    fn sent(&self) -> SendCounters {
        self.sent
    }

    fn overflows(&self) -> u64 {
        0
    }
}

struct Bench {
    host: Host,
    process: Process,
    cq: Cq,
    _other: OwnedFd,
}

impl Bench {
    fn new(authenticated: bool) -> Bench {
        Self::with(authenticated, false)
    }

    fn with(authenticated: bool, full: bool) -> Bench {
        let mut host = Host::new();
        let (fd, other) = freeflow_shm::event_pair().unwrap();
        let link: Box<dyn Link + Send> = Box::new(Hole {
            fd,
            sent: SendCounters::default(),
            full,
        });
        let fabric: RoceFabric = Fabric::new(link);
        host.engine.join(fabric).unwrap();
        let hosts = Hosts::parse(&format!("t 10.0.7.0/24 {PEER}")).unwrap();
        host.engine.network.set_map(Map::new(hosts, ip(LOCAL)));
        host.engine.network.peers.authenticated = authenticated;
        let endpoint = host.endpoint("10.0.0.1");
        let process = host.process(endpoint, 0);
        let cq = host.cq(&process);
        Bench {
            host,
            process,
            cq,
            _other: other,
        }
    }

    /// A queue pair that is connected to one of the peer's host.
    fn qp(&mut self, qp_type: QpType) -> Made {
        let cqs = (self.cq, Some(self.cq));
        let qp = self.host.qp(&self.process, qp_type, cqs, None);
        let attr = QpAttr {
            port_num: 1,
            path_mtu: Mtu::B256,
            dest_qpn: 0x77,
            av: AddressVector {
                dgid: Gid::from(VirtualIp(ip("10.0.7.1"))),
                is_global: true,
                port_num: 1,
                ..AddressVector::default()
            },
            max_dest_rd_atomic: 1,
            rnr_retry: 7,
            retry_cnt: TRIES as u8 - 1,
            timeout: TIMEOUT,
            ..QpAttr::default()
        };
        for (state, mask) in steps_to_rts(qp_type) {
            let request = Request::ModifyQp {
                qp: qp.handle,
                attr: QpAttr { state, ..attr },
                mask: mask | Mask::STATE,
            };
            let done = self.host.ask(self.process.session, request);
            assert_eq!(done, Ok(Reply::Done), "{state:?}");
        }
        qp
    }

    /// The peer's router has an incarnation, and its link comes up.
    fn link(&mut self, incarnation: u64) {
        self.link_with(incarnation, true);
    }

    fn link_with(&mut self, incarnation: u64, header_crc: bool) {
        self.host.engine.peer_greeted(ip(PEER), incarnation);
        let agreed = Agreed {
            incarnation,
            version: 1,
            segment: 2048,
            selective: true,
            header_crc,
        };
        self.host.engine.peer_up(ip(PEER), agreed);
        self.host.settle();
    }

    fn send(&mut self, qp: Made, wr_id: u64) {
        self.host.send(&self.process, qp, wr_id, &[], 0);
        self.host.settle();
    }

    /// How many packets have gone to the peer.
    fn sent(&self) -> u64 {
        self.host.engine.network.status().unwrap().sent_packets
    }

    /// A packet comes from the peer's host; what is dropped.
    fn hear(&mut self, qp: Made, opcode: BthOpcode) -> Drops {
        self.hear_bth(Bth::new(opcode, qp.qpn, Psn::new(0)))
    }

    fn hear_bth(&mut self, bth: Bth) -> Drops {
        let (mut headers, opcode) = (Headers::new(bth), bth.opcode);
        headers.bth.pkey = tenant_pkey("t");
        headers.aeth = (opcode == BthOpcode::RC_ACK).then_some(Aeth {
            syndrome: Syndrome::Ack { credits: 0x1F },
            msn: 1,
        });
        self.host.engine.network.drops = Drops::default();
        let packet = Received {
            src: ip(PEER),
            ecn: Ecn::NotCapable,
            ip_id: 0,
            headers,
            payload: &[],
        };
        self.host.engine.on_packet(&packet, None);
        self.host.settle();
        self.host.engine.network.drops
    }

    /// Lets a time pass, timer after timer.
    fn pass(&mut self, ns: u64) {
        let until = self.host.now + ns;
        while let Polled::Asleep { until: Some(at) } = self.host.round()
            && at <= until
        {
            self.host.now = at.max(self.host.now + 1);
            self.host.settle();
        }
        self.host.now = until;
        self.host.settle();
    }

    fn ended(&mut self) -> Vec<(u64, Option<WcStatus>)> {
        let all = self.host.completions(&mut self.cq);
        let end = |c: &CompletionEntry| (c.wr_id, WcStatus::from_raw(c.status.into()));
        all.iter().map(end).collect()
    }
}

const WRITE: BthOpcode = BthOpcode::RC_SEND_ONLY;

#[test]
fn payloads_are_covered_unless_that_is_agreed() {
    for agreed in [false, true] {
        let mut bench = Bench::new(true);
        bench.link_with(5, agreed);
        let qp = bench.qp(QpType::Rc);
        let mut bth = Bth::new(WRITE, qp.qpn, Psn::new(0));
        bth.header_crc = true;
        assert_eq!(bench.hear_bth(bth).damaged, u64::from(!agreed));
        assert_eq!(bench.hear(qp, WRITE).damaged, 0);
        for (len, uncovered) in [(0, false), (255, false), (256, agreed), (8192, agreed)] {
            let q = bench.host.engine.qps.get(qp.handle).unwrap();
            let stamped = q.remote.as_ref().unwrap().stamp(&Headers::new(bth), len);
            assert_eq!(stamped.bth.header_crc, uncovered, "{len} bytes");
        }
    }
}

#[test]
fn nothing_goes_either_way_before_there_is_a_link() {
    for authenticated in [false, true] {
        let mut bench = Bench::new(authenticated);
        let qp = bench.qp(QpType::Rc);
        bench.send(qp, 1);
        assert_eq!((bench.sent(), bench.hear(qp, WRITE).no_link), (0, 1));
        bench.link(5);
        assert_eq!((bench.sent(), bench.hear(qp, WRITE).no_link), (1, 0));
        // One that is connected later need not wait.
        let late = bench.qp(QpType::Rc);
        let before = bench.sent();
        bench.send(late, 2);
        assert_eq!(bench.sent(), before + 1);
        assert!(bench.ended().is_empty());
    }
}

#[test]
fn requests_without_a_link_end_in_their_time() {
    let mut bench = Bench::new(true);
    let qp = bench.qp(QpType::Rc);
    let time = timeout_ns(TIMEOUT).unwrap() * TRIES;
    // The time of a request begins when it is posted.
    bench.pass(10 * time);
    bench.send(qp, 1);
    bench.send(qp, 2);
    bench.pass(time - 1);
    assert!(bench.ended().is_empty());
    bench.pass(1);
    let ended = [
        (1, Some(WcStatus::RetryExcErr)),
        (2, Some(WcStatus::WrFlushErr)),
    ];
    assert_eq!((bench.ended(), bench.sent()), (ended.to_vec(), 0));
    // The link comes too late for it.
    bench.link(5);
    assert_eq!(bench.sent(), 0);
}

#[test]
fn requests_end_in_their_time_where_the_sockets_never_have_room() {
    let mut bench = Bench::with(true, true);
    bench.link(5);
    let qp = bench.qp(QpType::Rc);
    bench.send(qp, 1);
    bench.send(qp, 2);
    // Nothing is done until the next time has come.
    for _ in 0..3 {
        let round = bench.host.round();
        let now = bench.host.now;
        assert!(
            matches!(round, Polled::Asleep { until: Some(at) } if at > now),
            "{round:?} at {now}"
        );
    }
    let time = timeout_ns(TIMEOUT).unwrap() * TRIES;
    bench.pass(time / 2);
    assert!(bench.ended().is_empty());
    bench.pass(time);
    let ended = [
        (1, Some(WcStatus::RetryExcErr)),
        (2, Some(WcStatus::WrFlushErr)),
    ];
    assert_eq!((bench.ended(), bench.sent()), (ended.to_vec(), 0));
}

#[test]
fn unreliable_requests_without_a_link_are_lost() {
    let mut bench = Bench::new(true);
    let qp = bench.qp(QpType::Uc);
    bench.send(qp, 1);
    assert!(bench.ended().is_empty());
    bench.pass(10_000_000_000);
    bench.send(qp, 2);
    let good = Some(WcStatus::Success);
    assert_eq!(
        (bench.ended(), bench.sent()),
        (vec![(1, good), (2, good)], 0)
    );
    bench.link(5);
    bench.send(qp, 3);
    assert_eq!((bench.ended(), bench.sent()), (vec![(3, good)], 1));
}

#[test]
fn a_new_router_neither_hears_old_queue_pairs_nor_is_heard_by_them() {
    let mut bench = Bench::new(true);
    bench.link(5);
    let old = bench.qp(QpType::Rc);
    assert_eq!(bench.hear(old, WRITE).old_incarnation, 0);
    // The same one again changes nothing.
    bench.host.engine.peer_down(ip(PEER));
    bench.link(5);
    assert_eq!(bench.hear(old, WRITE).old_incarnation, 0);
    // From its word on, not only when the link is up.
    bench.host.engine.peer_down(ip(PEER));
    bench.host.engine.peer_greeted(ip(PEER), 6);
    assert_eq!(bench.hear(old, WRITE).old_incarnation, 1);
    let before = bench.sent();
    bench.send(old, 1);
    bench.link(6);
    assert_eq!(bench.hear(old, WRITE).old_incarnation, 1);
    bench.pass(100_000_000_000);
    assert_eq!(bench.ended(), [(1, Some(WcStatus::RetryExcErr))]);
    assert_eq!(bench.sent(), before);
    let new = bench.qp(QpType::Rc);
    assert_eq!(bench.hear(new, WRITE).old_incarnation, 0);
}

#[test]
fn who_has_not_heard_of_the_old_router_is_connected_to_the_new_one() {
    let mut bench = Bench::new(true);
    bench.link(5);
    let qp = bench.qp(QpType::Rc);
    bench.send(qp, 1);
    let before = bench.sent();
    assert_eq!(before, 1);
    bench.link(6);
    // Its request is in its ring, and goes again.
    assert_eq!(bench.sent(), before + 1);
    let drops = bench.hear(qp, BthOpcode::RC_ACK);
    assert_eq!(drops, Drops::default());
    assert_eq!(bench.ended(), [(1, Some(WcStatus::Success))]);
}

#[test]
fn a_host_that_has_to_prove_itself_is_doubted_until_it_does_again() {
    for authenticated in [false, true] {
        let mut bench = Bench::new(authenticated);
        bench.link(5);
        let qp = bench.qp(QpType::Rc);
        bench.host.engine.peer_down(ip(PEER));
        assert_eq!(bench.hear(qp, WRITE).no_link, 0);
        // A queue pair that is connected now waits: it may be another router.
        let new = bench.qp(QpType::Rc);
        assert_eq!(bench.hear(new, WRITE).no_link, 1);
        bench.host.engine.peer_lapsed(ip(PEER));
        let doubted = u64::from(authenticated);
        assert_eq!(bench.hear(qp, WRITE).no_link, doubted);
        let ud = Headers::new(Bth::new(BthOpcode::UD_SEND_ONLY, qp.qpn, Psn::new(0)));
        let packet = Received {
            src: ip(PEER),
            ecn: Ecn::NotCapable,
            ip_id: 0,
            headers: ud,
            payload: &[],
        };
        bench.host.engine.on_packet(&packet, None);
        assert_eq!(bench.host.engine.network.drops.no_link, 2 * doubted);
        bench.link(5);
        assert_eq!(bench.hear(qp, WRITE).no_link, 0);
        assert_eq!(bench.hear(new, WRITE).no_link, 0);
    }
}
