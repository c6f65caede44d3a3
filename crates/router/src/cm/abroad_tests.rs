//! The connection manager between hosts: two engines, or an engine and a manager that stands for
//! a host without FreeFlow, and a network that carries what one has for the other.

use std::net::IpAddr;

use freeflow_cm::{Arrival, Manager, Output, Port};
use freeflow_fabric_udp::{Ecn, Received};
use freeflow_session::{CmDetail, CmEventType as Kind, CmRequest, Handle, PortSpace};
use freeflow_transport::{Datagrams, Destination, Work};
use freeflow_types::{Mtu, Opcode, QpState, QpType};
use freeflow_wire::cm::{QKEY, QPN};

use super::programs::{A, B, PORT, Program, SECOND, address, disconnect, gid, param, program};
use crate::remote::{Drops, Map};
use crate::testbed::Host;
use crate::{EndReason, Hosts};

const HERE: &str = "192.0.2.1";
const THERE: &str = "192.0.2.2";
const STOCK: &str = "192.0.2.7";
/// The map's lines of the other host.
const OTHERS: &str = "t 10.77.0.2 192.0.2.2\nu 10.77.0.2 192.0.2.2";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A host at an address, with the map of both.
fn host(own: &str) -> Host {
    let mut host = Host::new();
    set_map(&mut host, own, &format!("t {A} {HERE}\n{OTHERS}"));
    host
}

fn set_map(host: &mut Host, own: &str, map: &str) {
    let map = Map::new(Hosts::parse(map).unwrap(), ip(own));
    host.engine.network.set_map(map);
}

/// Gives a host a datagram of another one.
fn give(host: &mut Host, from: &str, payload: &[u8], qkey: u32) -> Drops {
    let work = Work::new(Opcode::Send, payload.len() as u32);
    let to = Destination { qpn: QPN, qkey };
    let headers = Datagrams::new(0).send(&work, QPN, to, 4096).unwrap();
    host.engine.network.drops = Drops::default();
    let packet = Received {
        src: ip(from),
        ecn: Ecn::NotCapable,
        ip_id: 0,
        headers,
        payload,
    };
    host.engine.on_packet(&packet, None);
    host.engine.network.drops
}

/// Two hosts with an endpoint and a program each.
struct Pair {
    hosts: [Host; 2],
    programs: [Program; 2],
}

impl Pair {
    fn new() -> Pair {
        let mut hosts = [host(HERE), host(THERE)];
        let [here, there] = &mut hosts;
        let (a, b) = (here.endpoint(A), there.endpoint(B));
        let programs = [program(here, a), program(there, b)];
        Pair { hosts, programs }
    }

    /// Carries datagrams until there are none; how many.
    fn carry(&mut self) -> usize {
        let mut carried = 0;
        loop {
            let before = carried;
            let [here, there] = &mut self.hosts;
            for one in here.engine.cm.abroad.take() {
                assert_eq!(one.host, ip(THERE));
                assert_eq!(give(there, HERE, &one.payload, QKEY), Drops::default());
                carried += 1;
            }
            for one in there.engine.cm.abroad.take() {
                assert_eq!(one.host, ip(HERE));
                assert_eq!(give(here, THERE, &one.payload, QKEY), Drops::default());
                carried += 1;
            }
            if carried == before {
                return carried;
            }
        }
    }

    fn later(&mut self, ns: u64) {
        for host in &mut self.hosts {
            host.now += ns;
            host.settle();
        }
    }

    /// A connection: the ids on both hosts.
    fn connected(&mut self) -> (Handle, Handle) {
        let id = {
            let ([here, there], [a, b]) = (&mut self.hosts, &self.programs);
            b.listener(there, PortSpace::Tcp, "0.0.0.0", 0);
            let id = a.routed(here, PortSpace::Tcp, B);
            a.connect(here, id, param(0x111, b"hi"));
            id
        };
        assert_eq!(self.carry(), 1);
        let peer = {
            let ([_, there], [_, b]) = (&mut self.hosts, &self.programs);
            let event = b.expect(there, Kind::ConnectRequest, 0);
            assert_eq!(event.info.src, address(B, PORT));
            assert_eq!(event.info.port.unwrap().dgid, Some(gid(A)));
            let peer = event.new_id.unwrap();
            b.accept(there, peer, param(0x222, b""));
            peer
        };
        assert_eq!(self.carry(), 1);
        {
            let ([here, _], [a, _]) = (&mut self.hosts, &self.programs);
            a.expect(here, Kind::ConnectResponse, 0);
            a.finish(here, id);
        }
        assert_eq!(self.carry(), 1);
        let ([_, there], [_, b]) = (&mut self.hosts, &self.programs);
        b.expect(there, Kind::Established, 0);
        (id, peer)
    }
}

#[test]
fn programs_of_two_hosts_connect_and_disconnect() {
    let mut pair = Pair::new();
    let (id, peer) = pair.connected();
    {
        let ([here, there], [a, b]) = (&mut pair.hosts, &pair.programs);
        let [ra, rb] = [
            a.attr(here, id, QpState::Rtr).unwrap().attr,
            b.attr(there, peer, QpState::Rtr).unwrap().attr,
        ];
        assert_eq!((ra.dest_qpn, ra.av.dgid), (0x222, gid(B)));
        assert_eq!((rb.dest_qpn, rb.av.dgid), (0x111, gid(A)));
        assert_eq!(ra.path_mtu, rb.path_mtu);
        a.done(here, disconnect(id));
    }
    pair.carry();
    let ([here, there], [a, b]) = (&mut pair.hosts, &pair.programs);
    b.expect(there, Kind::Disconnected, 0);
    b.done(there, disconnect(peer));
    a.quiet(here);
    pair.carry();
    let ([here, _], [a, _]) = (&mut pair.hosts, &pair.programs);
    a.expect(here, Kind::Disconnected, 0);
}

#[test]
fn a_process_that_dies_is_told_of_on_the_other_host() {
    let mut pair = Pair::new();
    pair.connected();
    let dead = pair.programs[1].process.session;
    pair.hosts[1]
        .engine
        .end_session(dead, EndReason::ProcessExited);
    // The first word of it is lost.
    pair.hosts[1].engine.cm.abroad.take();
    pair.later(5 * SECOND);
    pair.carry();
    let ([here, _], [a, _]) = (&mut pair.hosts, &pair.programs);
    let id = a.expect(here, Kind::Disconnected, 0).id;
    a.done(here, disconnect(id));
    pair.carry();
    pair.later(5 * SECOND);
    assert_eq!(pair.hosts[1].engine.cm.manager.connections(), 0);
}

#[test]
fn who_disconnects_from_an_endpoint_that_is_gone_is_answered() {
    let mut pair = Pair::new();
    let (id, _) = pair.connected();
    let [here, there] = &mut pair.hosts;
    there.remove_endpoint_of(&pair.programs[1].process);
    // What it said in the end is lost.
    there.engine.cm.abroad.take();
    let a = &pair.programs[0];
    a.done(here, disconnect(id));
    for one in here.engine.cm.abroad.take() {
        let drops = give(there, HERE, &one.payload, QKEY);
        assert_eq!(drops.unknown_qp, 1);
    }
    for one in there.engine.cm.abroad.take() {
        assert_eq!(give(here, THERE, &one.payload, QKEY), Drops::default());
    }
    a.expect(here, Kind::Disconnected, 0);
}

#[test]
fn an_address_that_another_host_has_not_is_told_of_at_once() {
    // It has gone there, or a new router there has never had one of the tenant's.
    for new_router in [false, true] {
        let mut pair = Pair::new();
        let [here, there] = &mut pair.hosts;
        let [a, b] = &pair.programs;
        let endpoint = there
            .engine
            .sessions
            .get(b.process.session)
            .unwrap()
            .endpoint;
        there.engine.remove_endpoint(endpoint);
        if new_router {
            *there = host(THERE);
        }
        let id = a.routed(here, PortSpace::Tcp, B);
        a.connect(here, id, param(3, b""));
        for one in here.engine.cm.abroad.take() {
            assert_eq!(give(there, HERE, &one.payload, QKEY).unknown_qp, 1);
        }
        for one in there.engine.cm.abroad.take() {
            assert_eq!(give(here, THERE, &one.payload, QKEY), Drops::default());
        }
        a.expect(here, Kind::Rejected, 12);
        a.quiet(here);
    }
}

/// A map without a host says nothing of what was connected with it.
#[test]
fn who_disconnects_from_a_host_that_the_map_has_lost_goes_on_trying() {
    let mut pair = Pair::new();
    let (id, peer) = pair.connected();
    let own = format!("t {A} {HERE}");
    let [here, _] = &mut pair.hosts;
    let [a, _] = &pair.programs;
    set_map(here, HERE, &own);
    a.done(here, disconnect(id));
    a.quiet(here);
    set_map(here, HERE, &format!("{own}\n{OTHERS}"));
    pair.later(10 * SECOND);
    pair.carry();
    let ([_, there], [_, b]) = (&mut pair.hosts, &pair.programs);
    b.expect(there, Kind::Disconnected, 0);
    b.done(there, disconnect(peer));
    pair.carry();
}

#[test]
fn a_host_that_dies_is_found_out() {
    let mut pair = Pair::new();
    let (id, _) = pair.connected();
    let ([here, _], [a, _]) = (&mut pair.hosts, &pair.programs);
    let waiting = a.routed(here, PortSpace::Tcp, B);
    a.connect(here, waiting, param(3, b""));
    a.done(here, disconnect(id));
    let start = here.now;
    let mut told = Vec::new();
    while let Some(due) = here.engine.cm.next_timeout() {
        here.now = due;
        here.settle();
        here.engine.cm.abroad.take();
        while let Some(event) = a.event(here) {
            told.push((event.event, event.status, (here.now - start) / SECOND));
        }
    }
    let timeout = -110;
    assert_eq!(
        told,
        [
            (Kind::Disconnected, timeout, 65),
            (Kind::TimewaitExit, 0, 67),
            (Kind::Unreachable, timeout, 98),
        ]
    );
}

#[test]
fn only_a_router_that_has_the_sender_is_believed() {
    let mut pair = Pair::new();
    let request = {
        let ([here, there], [a, b]) = (&mut pair.hosts, &pair.programs);
        b.listener(there, PortSpace::Tcp, "0.0.0.0", 0);
        let id = a.routed(here, PortSpace::Tcp, B);
        a.connect(here, id, param(1, b""));
        here.engine.cm.abroad.take().remove(0).payload
    };
    let ([_, there], [_, b]) = (&mut pair.hosts, &pair.programs);
    // Another key, or another queue pair's.
    assert_eq!(give(there, HERE, &request, QKEY - 1).not_taken, 1);
    // Another host, of the map or not; the endpoint itself.
    assert_eq!(give(there, STOCK, &request, QKEY).unknown_qp, 1);
    assert_eq!(give(there, THERE, &request, QKEY).unknown_qp, 1);
    // Another tenant, which has the same address there.
    let at = 41;
    let mut other = request.clone();
    other[at] = b'u';
    assert_eq!(give(there, HERE, &other, QKEY).unknown_qp, 1);
    let mut nobody = request.clone();
    nobody[32..36].copy_from_slice(&[10, 77, 0, 9]);
    assert_eq!(give(there, HERE, &nobody, QKEY).wrong_host, 1);
    for len in [0, 39, 40, 41, 43, request.len() - 1] {
        let drops = give(there, HERE, &request[..len], QKEY);
        assert_ne!(drops, Drops::default(), "{len}");
    }
    b.quiet(there);
    assert_eq!(give(there, HERE, &request, QKEY), Drops::default());
    b.expect(there, Kind::ConnectRequest, 0);
}

/// A host without FreeFlow: a manager with one port.
struct Stock {
    manager: Manager,
    port: Port,
    ids: u32,
}

impl Stock {
    fn new() -> Stock {
        let port = Port {
            endpoint: Handle(1),
            gid: gid(STOCK),
            index: 0,
            mtu: Mtu::B1024,
            guid: 77,
        };
        let manager = Manager::new(16);
        Stock {
            manager,
            port,
            ids: 0,
        }
    }

    fn id(&mut self) -> Handle {
        self.ids += 1;
        let id = Handle(self.ids);
        let entropy = u64::from(self.ids) << 40;
        let endpoint = self.port.endpoint;
        self.manager
            .create(id, endpoint, PortSpace::Tcp, QpType::Rc, entropy);
        id
    }

    /// Asks the host for a connection, from a queue pair of the id's own number.
    fn connect(&mut self) -> Handle {
        let id = self.id();
        let way = Ok((self.port, ip(STOCK)));
        let m = &mut self.manager;
        m.resolve_addr(id, (None, None), address(HERE, PORT), way)
            .unwrap();
        m.resolve_route(id).unwrap();
        m.connect(0, 0, id, &param(id.0, b"")).unwrap();
        id
    }

    /// Exchanges datagrams with a host until there are none; what its ids are told.
    fn talk(&mut self, host: &mut Host) -> Vec<freeflow_cm::Event> {
        let mut told = Vec::new();
        loop {
            let mut quiet = true;
            for one in host.engine.cm.abroad.take() {
                assert_eq!(one.host, ip(STOCK));
                let arrival = Arrival {
                    ports: vec![self.port],
                    source: gid(HERE),
                };
                let ids = &mut self.ids;
                let new_id = &mut |_| {
                    *ids += 1;
                    Some((Handle(*ids), u64::from(*ids) << 40))
                };
                let got = self
                    .manager
                    .receive(host.now, &arrival, &one.payload, new_id);
                got.unwrap();
                quiet = false;
            }
            for output in self.manager.take_output() {
                quiet = false;
                match output {
                    Output::Tell { event, .. } => told.push(*event),
                    Output::Send { to, mad, .. } => {
                        assert_eq!(to, gid(HERE));
                        assert_eq!(give(host, STOCK, &mad, QKEY), Drops::default());
                    }
                }
            }
            if quiet {
                return told;
            }
        }
    }
}

/// A host with a program whose endpoint has the underlay's GID.
fn underlay() -> (Host, Program) {
    let mut host = host(HERE);
    let endpoint = host.endpoint(A);
    host.engine.share_address(endpoint, ip(HERE));
    let program = program(&mut host, endpoint);
    (host, program)
}

#[test]
fn a_program_connects_to_a_host_without_freeflow() {
    let (mut host, a) = underlay();
    let host = &mut host;
    let mut stock = Stock::new();
    let listener = stock.id();
    let addr = address(STOCK, PORT);
    stock
        .manager
        .bind(listener, addr, Some(stock.port))
        .unwrap();
    stock.manager.listen(listener, 0).unwrap();
    let id = a.routed(host, PortSpace::Tcp, STOCK);
    a.connect(host, id, param(0x111, b""));
    let told = stock.talk(host);
    let [request] = &told[..] else {
        panic!("{told:?}")
    };
    let peer = request.new_id.unwrap();
    let now = host.now;
    let accepted = stock.manager.accept(now, peer, Some(&param(0x999, b"")));
    accepted.unwrap();
    assert!(stock.talk(host).is_empty());
    let event = a.expect(host, Kind::ConnectResponse, 0);
    let port = event.info.port.unwrap();
    assert_eq!((port.sgid, port.sgid_index), (gid(HERE), 1));
    let attr = a.attr(host, id, QpState::Rtr).unwrap().attr;
    assert_eq!((attr.av.dgid, attr.av.sgid_index), (gid(STOCK), 1));
    assert_eq!(attr.dest_qpn, 0x999);
    a.finish(host, id);
    let told = stock.talk(host);
    assert_eq!(told[0].event, Kind::Established);
    // A port that nobody listens at.
    let id = a.routed(host, PortSpace::Udp, STOCK);
    a.connect(host, id, param(0, b""));
    stock.talk(host);
    a.expect(host, Kind::Unreachable, 1);
}

#[test]
fn a_host_without_freeflow_reaches_who_has_the_underlays_gid_alone() {
    let (mut host, a) = underlay();
    let host = &mut host;
    let other = host.endpoint("10.77.0.3");
    let other = program(host, other);
    other.listener(host, PortSpace::Tcp, "0.0.0.0", 0);
    let mut stock = Stock::new();
    stock.connect();
    let told = stock.talk(host);
    let last = told.last().unwrap();
    assert_eq!((last.event, last.status), (Kind::Rejected, 8));
    other.quiet(host);
    let listener = a.id(host, PortSpace::Tcp);
    let addr = address(HERE, PORT);
    let info = a.info(host, CmRequest::BindAddr { id: listener, addr });
    assert_eq!(info.unwrap().port.unwrap().sgid_index, 1);
    let backlog = 0;
    a.info(
        host,
        CmRequest::Listen {
            id: listener,
            backlog,
        },
    )
    .unwrap();
    let id = stock.connect();
    stock.talk(host);
    let event = a.expect(host, Kind::ConnectRequest, 0);
    assert!(matches!(event.detail, CmDetail::Connection { qpn, .. } if qpn.get() == id.0));
    assert_eq!(event.info.dst.map(|dst| dst.ip()), Some(ip(STOCK)));
    let peer = event.new_id.unwrap();
    a.accept(host, peer, param(0x88, b""));
    let told = stock.talk(host);
    assert_eq!(told[0].event, Kind::ConnectResponse);
    stock.manager.accept(0, id, None).unwrap();
    stock.talk(host);
    a.expect(host, Kind::Established, 0);
}
