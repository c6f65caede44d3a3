//! Programs of two endpoints and the connection manager between them, in virtual time.

use freeflow_session::{
    CmBringUp, CmDetail, CmEventType as Kind, CmOption, CmParam, CmRequest, PortSpace, Reply,
    Request,
};
use freeflow_types::{Access, AsyncEventType, QpAttrMask as Mask, QpState, QpType, Qpn, VirtualIp};
use rustix::io::Errno;

use super::programs::{
    A, B, PORT, Program, SECOND, address, channel, connected, disconnect, gid, param, program,
    resolve, two,
};
use crate::EndReason;
use crate::engine::Polled;
use crate::testbed::{Host, Made};

fn invalid(got: Result<Reply, Errno>) {
    assert_eq!(got, Err(Errno::INVAL));
}

#[test]
fn two_programs_connect_and_disconnect() {
    let (mut host, a, b) = two();
    let host = &mut host;
    let listener = b.listener(host, PortSpace::Tcp, "0.0.0.0", 0);
    assert_eq!(
        b.info(host, CmRequest::QueryId { id: listener })
            .unwrap()
            .port,
        None
    );
    let (qa, qb) = (a.qp(host), b.qp(host));
    let id = a.routed(host, PortSpace::Tcp, B);
    let info = a.info(host, CmRequest::QueryId { id }).unwrap();
    let port = info.port.unwrap();
    assert_eq!((port.sgid, port.sgid_index), (gid(A), 0));
    assert_eq!(port.dgid, Some(gid(B)));
    // Before there is a connection a queue pair has no rights.
    let first = a.modify(host, id, qa, QpState::Init);
    assert_eq!(first.attr.access, Access::empty());
    let asked = CmParam {
        responder_resources: 3,
        initiator_depth: 4,
        ece: Some((0x15B3, 7)),
        ..param(qa.qpn, b"hello")
    };
    a.connect(host, id, asked);
    let event = b.expect(host, Kind::ConnectRequest, 0);
    assert_eq!(event.id, listener);
    let peer = event.new_id.unwrap();
    assert_eq!(event.private_data.len(), 56);
    assert_eq!(event.private_data[..6], *b"hello\0");
    assert_eq!(event.ece, Some((0x15B3, 7)));
    assert_eq!(event.info.src, address(B, PORT));
    assert_eq!(event.info.dst, Some(info.src));
    assert_eq!(event.info.port.unwrap().dgid, Some(gid(A)));
    let CmDetail::Connection {
        responder_resources,
        initiator_depth,
        retry_count,
        rnr_retry_count,
        qpn,
        ..
    } = event.detail
    else {
        panic!("{event:?}");
    };
    assert_eq!((responder_resources, initiator_depth), (4, 3));
    assert_eq!((retry_count, rnr_retry_count), (6, 5));
    assert_eq!(qpn.get(), qa.qpn);
    // As the library does before it accepts.
    let [i, rtr, rts] =
        [QpState::Init, QpState::Rtr, QpState::Rts].map(|s| b.modify(host, peer, qb, s));
    let all = Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC;
    assert_eq!(i.attr.access, all);
    assert_eq!((rtr.attr.dest_qpn, rtr.attr.av.dgid), (qa.qpn, gid(A)));
    assert_eq!(rtr.attr.max_dest_rd_atomic, 4);
    assert_eq!((rts.attr.max_rd_atomic, rts.attr.timeout), (3, 19));
    assert_eq!((rts.attr.retry_cnt, rts.attr.rnr_retry), (6, 5));
    let depths = CmParam {
        responder_resources: 2,
        initiator_depth: 0xFF,
        ..param(qb.qpn, b"welcome")
    };
    b.accept(host, peer, depths);
    b.quiet(host);
    let event = a.expect(host, Kind::ConnectResponse, 0);
    assert_eq!(event.private_data.len(), 196);
    assert_eq!(event.private_data[..8], *b"welcome\0");
    assert!(matches!(
        event.detail,
        CmDetail::Connection {
            responder_resources: 3,
            initiator_depth: 2,
            ..
        }
    ));
    let [_, to_rtr, to_rts] =
        [QpState::Init, QpState::Rtr, QpState::Rts].map(|s| a.modify(host, id, qa, s));
    assert_eq!(to_rtr.attr.rq_psn, rts.attr.sq_psn);
    assert_eq!(to_rts.attr.sq_psn, rtr.attr.rq_psn);
    assert_eq!(to_rts.attr.max_rd_atomic, 2);
    a.finish(host, id);
    a.quiet(host);
    b.expect(host, Kind::Established, 0);
    // The end: both hear of it, and of the end of the time to wait.
    a.done(host, disconnect(id));
    a.quiet(host);
    b.expect(host, Kind::Disconnected, 0);
    b.done(host, disconnect(peer));
    a.expect(host, Kind::Disconnected, 0);
    for p in [&a, &b] {
        p.quiet(host);
    }
    host.now += 3 * SECOND;
    host.settle();
    for p in [&a, &b] {
        p.expect(host, Kind::TimewaitExit, 0);
        p.quiet(host);
    }
    for (program, id) in [(&a, id), (&b, peer), (&b, listener)] {
        assert_eq!(program.destroy(host, id), 0);
    }
    assert_eq!(host.engine.cm.manager.connections(), 0);
    assert_eq!(host.engine.cm.next_timeout(), None);
}

#[test]
fn ids_are_refused_what_their_state_does_not_allow() {
    let (mut host, a, b) = two();
    let host = &mut host;
    let id = a.id(host, PortSpace::Tcp);
    let timeout_ms = 1;
    invalid(a.ask(host, CmRequest::ResolveRoute { id, timeout_ms }));
    let p = param(1, b"");
    invalid(a.ask(
        host,
        CmRequest::Connect {
            id,
            param: p.clone(),
        },
    ));
    let accept = CmRequest::Accept {
        id,
        param: Some(p.clone()),
        up: None,
    };
    invalid(a.ask(host, accept));
    invalid(a.ask(host, disconnect(id)));
    assert_eq!(a.attr(host, id, QpState::Init), Err(Errno::INVAL));
    // Another session's ids and channels are none.
    invalid(b.ask(host, CmRequest::QueryId { id }));
    invalid(b.ask(host, CmRequest::DestroyId { id }));
    let channel = a.channel;
    invalid(b.ask(host, CmRequest::GetEvent { channel }));
    invalid(b.ask(host, CmRequest::DestroyChannel { channel }));
    let busy = a.ask(host, CmRequest::DestroyChannel { channel });
    assert_eq!(busy, Err(Errno::BUSY));
    // Private data that no request takes leaves it as it was.
    let id = a.routed(host, PortSpace::Tcp, B);
    let long = param(1, &[0; 57]);
    invalid(a.ask(host, CmRequest::Connect { id, param: long }));
    let deep = CmParam {
        initiator_depth: 17,
        ..p.clone()
    };
    invalid(a.ask(host, CmRequest::Connect { id, param: deep }));
    let code = CmOption::AckTimeout(20);
    a.done(host, CmRequest::SetOption { id, option: code });
    a.connect(host, id, param(1, &[0; 56]));
    invalid(a.ask(host, CmRequest::Connect { id, param: p }));
    assert_eq!(a.attr(host, id, QpState::Rtr), Err(Errno::INVAL));
}

#[test]
fn addresses_are_the_endpoints_own_and_of_its_tenant() {
    let (mut host, a, b) = two();
    let host = &mut host;
    for other in [B, "192.0.2.9"] {
        let id = a.id(host, PortSpace::Tcp);
        let addr = address(other, PORT);
        let bound = a.info(host, CmRequest::BindAddr { id, addr });
        assert_eq!(bound, Err(Errno::NODEV), "{other}");
    }
    for (other, status) in [("192.0.2.9", -113), ("fd00::9", -113)] {
        let id = a.id(host, PortSpace::Tcp);
        a.done(host, resolve(id, other));
        a.expect(host, Kind::AddrError, status);
        // It may try another one, of the same family.
        if other.contains('.') {
            a.route(host, id, B);
        }
    }
    let id = a.id(host, PortSpace::Tcp);
    let src = Some(address(A, 4000));
    let dst = address(B, PORT);
    let timeout_ms = 1;
    let request = CmRequest::ResolveAddr {
        id,
        src,
        dst,
        timeout_ms,
    };
    a.done(host, request);
    let resolved = a.expect(host, Kind::AddrResolved, 0);
    assert_eq!(resolved.info.src, address(A, 4000));
    b.quiet(host);
}

/// As the kernel's manager has it.
#[test]
fn loopback_means_any_address_and_the_endpoint_itself() {
    let (mut host, a, b) = two();
    let host = &mut host;
    for (listens, to) in [
        ("127.0.0.1", A),
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.2"),
        (A, "0.0.0.0"),
        ("::1", "::1"),
        ("::", "::"),
    ] {
        let listener = a.id(host, PortSpace::Tcp);
        let addr = address(listens, PORT);
        let bound = a.info(host, CmRequest::BindAddr { id: listener, addr });
        assert_eq!(bound.unwrap().port.is_some(), listens == A);
        let request = CmRequest::Listen {
            id: listener,
            backlog: 0,
        };
        a.info(host, request).unwrap();
        let id = a.routed(host, PortSpace::Tcp, to);
        a.connect(host, id, param(1, b""));
        let event = a.expect(host, Kind::ConnectRequest, 0);
        assert_eq!(event.info.port.unwrap().sgid, gid(A), "{to}");
        assert_eq!(event.info.port.unwrap().dgid, Some(gid(A)), "{to}");
        let peer = event.new_id.unwrap();
        a.accept(host, peer, param(2, b""));
        a.expect(host, Kind::ConnectResponse, 0);
        a.finish(host, id);
        a.expect(host, Kind::Established, 0);
        for id in [peer, listener, id] {
            a.destroy(host, id);
        }
    }
    // It is nobody else's.
    b.listener(host, PortSpace::Tcp, "127.0.0.1", 0);
    let id = a.routed(host, PortSpace::Tcp, "127.0.0.1");
    a.connect(host, id, param(1, b""));
    a.expect(host, Kind::Rejected, 8);
    // From its own address it goes there too, and stays what it is.
    let id = a.id(host, PortSpace::Tcp);
    let request = CmRequest::ResolveAddr {
        id,
        src: Some(address(A, 0)),
        dst: address("127.0.0.1", PORT),
        timeout_ms: 1,
    };
    a.done(host, request);
    let resolved = a.expect(host, Kind::AddrResolved, 0);
    assert_eq!(resolved.info.src.ip(), address(A, 0).ip());
}

#[test]
fn who_does_not_want_a_connection_says_why() {
    let (mut host, a, b) = two();
    let host = &mut host;
    // Nobody listens.
    let id = a.routed(host, PortSpace::Tcp, B);
    a.connect(host, id, param(1, b""));
    a.expect(host, Kind::Rejected, 8);
    // The program does not want it.
    let listener = b.listener(host, PortSpace::Tcp, B, 0);
    let id = a.routed(host, PortSpace::Tcp, B);
    a.connect(host, id, param(1, b""));
    let peer = b.expect(host, Kind::ConnectRequest, 0).new_id.unwrap();
    let request = CmRequest::Reject {
        id: peer,
        private_data: b"no".to_vec(),
        for_ece: false,
    };
    b.done(host, request.clone());
    let event = a.expect(host, Kind::Rejected, 28);
    assert_eq!(event.private_data.len(), 148);
    assert_eq!(event.private_data[..3], *b"no\0");
    assert_eq!(b.ask(host, request), Err(Errno::INVAL));
    // It goes without an answer: its requests with it, taken or not.
    let ids = [(); 2].map(|()| {
        let id = a.routed(host, PortSpace::Tcp, B);
        a.connect(host, id, param(id.0, b""));
        id
    });
    let taken = b.expect(host, Kind::ConnectRequest, 0).new_id.unwrap();
    b.destroy(host, taken);
    assert_eq!(a.expect(host, Kind::Rejected, 28).id, ids[0]);
    b.destroy(host, listener);
    assert_eq!(a.expect(host, Kind::Rejected, 28).id, ids[1]);
    // Who asked gives up: who accepts then finds that out.
    b.packets();
    b.listener(host, PortSpace::Tcp, B, 0);
    let id = a.routed(host, PortSpace::Tcp, B);
    a.connect(host, id, param(9, b""));
    let peer = b.expect(host, Kind::ConnectRequest, 0).new_id.unwrap();
    a.destroy(host, id);
    let late = CmRequest::Accept {
        id: peer,
        param: Some(param(2, b"")),
        up: None,
    };
    assert_eq!(b.ask(host, late), Err(Errno::INVAL));
    b.quiet(host);
}

#[test]
fn a_full_backlog_drops_and_the_request_comes_again() {
    let (mut host, a, b) = two();
    let host = &mut host;
    b.listener(host, PortSpace::Tcp, B, 2);
    for n in 0..3 {
        let id = a.routed(host, PortSpace::Tcp, B);
        a.connect(host, id, param(n + 1, b""));
    }
    for _ in 0..2 {
        b.expect(host, Kind::ConnectRequest, 0);
    }
    b.quiet(host);
    host.now += 7 * SECOND;
    host.settle();
    b.expect(host, Kind::ConnectRequest, 0);
    b.quiet(host);
    a.quiet(host);
}

#[test]
fn whose_peer_has_gone_is_told_at_once() {
    let (mut host, a, b) = two();
    let host = &mut host;
    let id = a.routed(host, PortSpace::Tcp, B);
    host.remove_endpoint_of(&b.process);
    a.connect(host, id, param(1, b""));
    // The address is nobody's (IBTA volume 1, 12.6.7.2: invalid GID).
    a.expect(host, Kind::Rejected, 12);
    assert_eq!(host.engine.cm.next_timeout(), None);
}

#[test]
fn the_death_of_a_process_is_told() {
    let (mut host, a, b) = two();
    let host = &mut host;
    let (id, _) = connected(host, &a, &b);
    let waiting = a.routed(host, PortSpace::Tcp, B);
    b.listener(host, PortSpace::Tcp, B, 0);
    a.connect(host, waiting, param(5, b""));
    host.engine
        .end_session(b.process.session, EndReason::ProcessExited);
    let got = [(); 2].map(|()| a.event(host).unwrap());
    let told = |of, event| got.iter().any(|e| e.id == of && e.event == event);
    assert!(told(id, Kind::Disconnected), "{got:?}");
    assert!(told(waiting, Kind::Rejected), "{got:?}");
    // Its port is free, and nothing of it is left.
    let again = a.routed(host, PortSpace::Tcp, B);
    a.connect(host, again, param(6, b""));
    a.expect(host, Kind::Rejected, 8);
    a.done(host, disconnect(id));
    for id in [id, waiting, again] {
        a.destroy(host, id);
    }
    host.now += 200 * SECOND;
    host.settle();
    assert_eq!(host.engine.cm.manager.connections(), 0);
    assert_eq!(host.engine.cm.next_timeout(), None);
}

#[test]
fn what_a_queue_pair_received_counts_as_the_last_message() {
    let (mut host, a, b) = two();
    let host = &mut host;
    b.listener(host, PortSpace::Tcp, B, 0);
    let id = a.routed(host, PortSpace::Tcp, B);
    a.connect(host, id, param(1, b""));
    let peer = b.expect(host, Kind::ConnectRequest, 0).new_id.unwrap();
    let notify = CmRequest::Notify {
        id: peer,
        event: AsyncEventType::CommEst,
    };
    assert_eq!(b.ask(host, notify.clone()), Err(Errno::INVAL));
    b.accept(host, peer, param(2, b""));
    b.done(host, notify.clone());
    b.expect(host, Kind::Established, 0);
    assert_eq!(b.ask(host, notify), Err(Errno::ISCONN));
    a.expect(host, Kind::ConnectResponse, 0);
    a.finish(host, id);
    b.quiet(host);
}

#[test]
fn datagram_services_are_looked_up() {
    let (mut host, a, b) = two();
    let host = &mut host;
    let udp = PortSpace::Udp;
    let id = a.routed(host, udp, B);
    a.connect(host, id, param(0, b""));
    a.expect(host, Kind::Unreachable, 1);
    b.listener(host, udp, "0.0.0.0", 0);
    // A connection's port is another one.
    let tcp = a.routed(host, PortSpace::Tcp, B);
    a.connect(host, tcp, param(1, b""));
    a.expect(host, Kind::Rejected, 8);
    let id = a.routed(host, udp, B);
    a.connect(host, id, param(0, b"who?"));
    let event = b.expect(host, Kind::ConnectRequest, 0);
    assert_eq!(
        (event.private_data.len(), &event.private_data[..4]),
        (180, &b"who?"[..])
    );
    let peer = event.new_id.unwrap();
    let answer = CmParam {
        qkey: Some(0x55),
        ..param(0x333, b"me")
    };
    b.accept(host, peer, answer);
    let event = a.expect(host, Kind::Established, 0);
    assert_eq!(event.private_data.len(), 136);
    assert!(matches!(
        event.detail,
        CmDetail::Datagram { qpn, qkey: 0x55, gid: to, sgid_index: 0, .. }
            if qpn.get() == 0x333 && to == gid(B)
    ));
    let attr = b.attr(host, peer, QpState::Init).unwrap();
    let mask = Mask::STATE | Mask::PKEY_INDEX | Mask::PORT | Mask::QKEY;
    assert_eq!((attr.attr.qkey, attr.mask), (0x55, mask));
    let id = a.routed(host, udp, B);
    a.connect(host, id, param(0, b""));
    let peer = b.expect(host, Kind::ConnectRequest, 0).new_id.unwrap();
    let request = CmRequest::Reject {
        id: peer,
        private_data: Vec::new(),
        for_ece: false,
    };
    b.done(host, request);
    a.expect(host, Kind::Unreachable, 2);
}

#[test]
fn groups_are_joined_by_ids_that_have_an_address() {
    let (mut host, a, _b) = two();
    let host = &mut host;
    let id = a.id(host, PortSpace::Udp);
    let join = |id, ip| CmRequest::Join {
        id,
        addr: address(ip, 0),
        send_only: false,
        cookie: 42,
    };
    assert_eq!(a.ask(host, join(id, "239.1.1.1")), Err(Errno::INVAL));
    let addr = address(A, 0);
    a.info(host, CmRequest::BindAddr { id, addr }).unwrap();
    assert_eq!(a.ask(host, join(id, "0.0.0.0")), Err(Errno::INVAL));
    assert_eq!(a.ask(host, join(id, B)), Err(Errno::INVAL));
    a.done(host, join(id, "239.1.1.1"));
    let event = a.expect(host, Kind::MulticastJoin, 0);
    assert_eq!(
        event.detail,
        CmDetail::Datagram {
            qpn: Qpn::MULTICAST,
            qkey: 0x0123_4567,
            gid: gid("239.1.1.1"),
            sgid_index: 0,
            cookie: 42,
        }
    );
    let leave = CmRequest::Leave { id, cookie: 42 };
    let left = a.ask(host, leave.clone());
    assert_eq!(left, Ok(Reply::CmDestroyed { events: 0 }));
    assert_eq!(a.ask(host, leave), Err(Errno::INVAL));
}

#[test]
fn events_move_with_their_id_and_go_with_it() {
    let (mut host, a, b) = two();
    let host = &mut host;
    let listener = b.listener(host, PortSpace::Tcp, B, 0);
    let mut ids = Vec::new();
    for n in 0..20 {
        let id = a.routed(host, PortSpace::Tcp, B);
        a.connect(host, id, param(n + 1, b""));
        ids.push(id);
    }
    let (channel, packets) = channel(host, b.process.session);
    let request = CmRequest::MigrateId {
        id: listener,
        channel,
    };
    let moved = b.ask(host, request);
    assert_eq!(moved, Ok(Reply::CmMigrated { events: 20 }));
    // Packets for which there is no room follow when there is.
    let mut void = 0;
    while void < 20 {
        void += b.packets();
        host.engine.show_cm_events(b.channel);
    }
    assert_eq!(void, 20);
    b.quiet(host);
    let old = b.channel;
    b.done(host, CmRequest::DestroyChannel { channel: old });
    let b = Program {
        channel,
        packets,
        ..b
    };
    for n in 0..3 {
        let event = b.expect(host, Kind::ConnectRequest, 0);
        assert_eq!(event.id, listener, "{n}");
    }
    assert_eq!(b.destroy(host, listener), 17);
    for id in &ids[3..] {
        assert_eq!(a.expect(host, Kind::Rejected, 28).id, *id);
    }
    a.quiet(host);
}

#[test]
fn a_request_that_was_not_taken_is_not_the_programs() {
    let (mut host, a, b) = two();
    let host = &mut host;
    let listener = b.listener(host, PortSpace::Tcp, B, 0);
    let id = a.routed(host, PortSpace::Tcp, B);
    a.connect(host, id, param(1, b""));
    let mut ids = host.engine.cm.ids.of(b.process.session);
    ids.retain(|&id| id != listener);
    let [offered] = ids[..] else {
        panic!("{ids:?}")
    };
    let channel = b.channel;
    for request in [
        CmRequest::DestroyId { id: offered },
        CmRequest::MigrateId {
            id: offered,
            channel,
        },
        CmRequest::QueryId { id: offered },
    ] {
        assert_eq!(b.ask(host, request), Err(Errno::INVAL));
    }
    // The other side gives up: that too moves with the listener.
    a.done(host, disconnect(id));
    a.destroy(host, id);
    let (channel, packets) = self::channel(host, b.process.session);
    let request = CmRequest::MigrateId {
        id: listener,
        channel,
    };
    let Ok(Reply::CmMigrated { events }) = b.ask(host, request) else {
        panic!("it does not move")
    };
    let void = b.packets();
    assert_eq!(void as u32, events);
    let old = b.channel;
    b.done(host, CmRequest::DestroyChannel { channel: old });
    let b = Program {
        channel,
        packets,
        ..b
    };
    let event = b.expect(host, Kind::ConnectRequest, 0);
    assert_eq!(event.new_id, Some(offered));
    for _ in 1..events {
        assert_eq!(b.event(host).unwrap().id, offered);
    }
    b.quiet(host);
    b.destroy(host, offered);
    b.destroy(host, listener);
}

#[test]
fn quotas_limit_ids_and_the_rate_of_connecting() {
    let (mut host, a, b) = two();
    let host = &mut host;
    let endpoint = |host: &Host, p: &Program| {
        host.engine
            .sessions
            .get(p.process.session)
            .unwrap()
            .endpoint
    };
    let settings = ["connects=2/s", "cm_ids=6"].map(|s| s.parse().unwrap());
    let ea = endpoint(host, &a);
    host.engine.set_quota(ea, &settings);
    let eb = endpoint(host, &b);
    host.engine.set_quota(eb, &["cm_ids=2".parse().unwrap()]);
    b.listener(host, PortSpace::Tcp, B, 0);
    let ids: Vec<_> = (0..6).map(|_| a.routed(host, PortSpace::Tcp, B)).collect();
    let request = CmRequest::CreateId {
        channel: a.channel,
        port_space: PortSpace::Tcp,
        qp_type: QpType::Rc,
    };
    assert_eq!(a.ask(host, request), Err(Errno::NOMEM));
    for id in &ids[..4] {
        a.connect(host, *id, param(id.0, b""));
    }
    // Two at once, the others one after the other. The listener may have one more id.
    let peer = b.expect(host, Kind::ConnectRequest, 0).new_id.unwrap();
    b.quiet(host);
    b.destroy(host, peer);
    a.expect(host, Kind::Rejected, 28);
    host.now += SECOND / 2;
    host.settle();
    let peer = b.expect(host, Kind::ConnectRequest, 0).new_id.unwrap();
    b.quiet(host);
    b.destroy(host, peer);
    a.expect(host, Kind::Rejected, 28);
}

#[test]
fn tenants_do_not_meet() {
    let mut host = Host::new();
    let a = host.endpoint(A);
    let spec = crate::EndpointSpec {
        name: "other".to_owned(),
        tenant: "u".to_owned(),
        ip: VirtualIp(B.parse().unwrap()),
        socket: "/nowhere".into(),
        quota: Vec::new(),
        underlay_gid: false,
    };
    let b = host.engine.add_endpoint(&spec).unwrap();
    let (a, b) = (program(&mut host, a), program(&mut host, b));
    let host = &mut host;
    b.listener(host, PortSpace::Tcp, B, 0);
    let id = a.id(host, PortSpace::Tcp);
    a.done(host, resolve(id, B));
    a.expect(host, Kind::AddrError, -113);
    b.quiet(host);
}

#[test]
fn only_so_many_events_wait_that_a_program_makes_itself() {
    let (mut host, a, _b) = two();
    let host = &mut host;
    let id = a.id(host, PortSpace::Tcp);
    let write = |arg| CmRequest::WriteEvent { id, status: 3, arg };
    for arg in 0..256 {
        a.done(host, write(arg));
    }
    assert_eq!(a.ask(host, write(256)), Err(Errno::NOMEM));
    assert_eq!(a.ask(host, resolve(id, B)), Err(Errno::NOMEM));
    let event = a.expect(host, Kind::User, 3);
    assert_eq!(event.detail, CmDetail::User { arg: 0 });
    a.done(host, write(256));
    assert_eq!(a.destroy(host, id), 256);
    let session = host.engine.sessions.get(a.process.session).unwrap();
    assert_eq!(session.counts.cm_events, 0);
}

#[test]
fn many_may_share_a_port_but_not_without_end() {
    let (mut host, a, _b) = two();
    let host = &mut host;
    let bind = |host: &mut Host| {
        let id = a.id(host, PortSpace::Tcp);
        let option = CmOption::ReuseAddr(true);
        a.done(host, CmRequest::SetOption { id, option });
        let addr = address(A, PORT);
        a.info(host, CmRequest::BindAddr { id, addr })
    };
    for _ in 0..64 {
        bind(host).unwrap();
    }
    assert_eq!(bind(host), Err(Errno::ADDRNOTAVAIL));
}

/// The state of a queue pair, and whose it says the other is.
fn queue_pair(host: &mut Host, of: &Program, qp: Made) -> (QpState, u32) {
    match host.ask(of.process.session, Request::QueryQp { qp: qp.handle }) {
        Ok(Reply::QpQueried(now)) => (now.attr.state, now.attr.dest_qpn),
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_answers_has_its_queue_pair_brought_up_with_it() {
    let (mut host, a, b) = two();
    let host = &mut host;
    let (qa, qb) = (a.qp(host), b.qp(host));
    let up = |qp: Made, state| CmBringUp {
        qp: qp.handle,
        state,
        max_dest_rd_atomic: None,
        max_rd_atomic: Some(1),
    };
    b.listener(host, PortSpace::Tcp, B, 0);
    let id = a.routed(host, PortSpace::Tcp, B);
    let bring = |up| CmRequest::BringUp { id, up };
    invalid(a.ask(host, bring(up(qb, QpState::Init))));
    a.done(host, bring(up(qa, QpState::Init)));
    // There is nobody yet whom it could receive from.
    invalid(a.ask(host, bring(up(qa, QpState::Rtr))));
    assert_eq!(queue_pair(host, &a, qa).0, QpState::Init);
    invalid(a.ask(host, bring(up(qa, QpState::Err))));

    a.connect(host, id, param(qa.qpn, b""));
    let peer = b.expect(host, Kind::ConnectRequest, 0).new_id.unwrap();
    let accept = |id, qp: Option<u32>, up| CmRequest::Accept {
        id,
        param: qp.map(|qpn| param(qpn, b"")),
        up,
    };
    // With a queue pair that is not its own, or in a state that there is not, nothing is accepted.
    for other in [up(qa, QpState::Rts), up(qb, QpState::Sqd)] {
        invalid(b.ask(host, accept(peer, Some(qb.qpn), Some(other))));
    }
    let rts = Some(up(qb, QpState::Rts));
    b.done(host, accept(peer, Some(qb.qpn), rts));
    a.expect(host, Kind::ConnectResponse, 0);
    a.done(host, accept(id, None, Some(up(qa, QpState::Rts))));
    b.expect(host, Kind::Established, 0);
    assert_eq!(queue_pair(host, &a, qa), (QpState::Rts, qb.qpn));
    assert_eq!(queue_pair(host, &b, qb), (QpState::Rts, qa.qpn));
    // Once more is refused, and harms nobody.
    invalid(b.ask(host, accept(peer, Some(qb.qpn), rts)));
    assert_eq!(queue_pair(host, &b, qb).0, QpState::Rts);

    let end = |id, qp: Made| CmRequest::Disconnect {
        id,
        fail: Some(qp.handle),
    };
    invalid(b.ask(host, end(peer, qa)));
    a.done(host, end(id, qa));
    b.expect(host, Kind::Disconnected, 0);
    assert_eq!(queue_pair(host, &a, qa).0, QpState::Err);
    assert_eq!(queue_pair(host, &b, qb).0, QpState::Rts);
    b.done(host, end(peer, qb));
    assert_eq!(queue_pair(host, &b, qb).0, QpState::Err);
}

#[test]
fn a_polling_thread_that_sleeps_is_not_woken_for_what_is_done() {
    let (mut host, a, b) = two();
    let host = &mut host;
    b.listener(host, PortSpace::Tcp, B, 0);
    let sleep = |host: &mut Host| {
        let until = (0..100).find_map(|_| {
            host.now += SECOND / 1000;
            match host.round() {
                Polled::Asleep { until } => Some(until),
                _ => None,
            }
        });
        host.engine.sleeps_until = until.expect("it sleeps when there is nothing to do");
    };
    sleep(host);
    let id = a.routed(host, PortSpace::Tcp, B);
    let qp = a.qp(host);
    a.modify(host, id, qp, QpState::Init);
    assert!(!host.engine.wants_a_round());
    // A request waits for its answer, and has a timer.
    a.connect(host, id, param(qp.qpn, b""));
    assert!(host.engine.wants_a_round());
    sleep(host);
    assert!(!host.engine.wants_a_round());
    a.destroy(host, id);
    host.engine.wake(a.process.session);
    assert!(host.engine.wants_a_round());
}
