//! What goes wrong between two hosts: routers that die, packets that nobody sent, paths that do
//! not carry what they should.

use std::time::{Duration, Instant};

use freeflow_session::Request;
use freeflow_shm::SendEntry;
use freeflow_tests::packets::{packet, say};
use freeflow_tests::rig::{CAP, Pair, Patience, RawQp, Rig, datagrams};
use freeflow_tests::{DEADLINE, Hosts, Lasting, have, skip, wait_until};
use freeflow_types::{AddressVector, Gid, Opcode, Psn, QpType, Qpn, VirtualIp, WcStatus};
use freeflow_wire::{Bth, BthOpcode, Deth, Headers, tenant_pkey};
use rustix::process::Signal;

const PAGES: u64 = 1 << 20;

fn hosts(test: &str) -> Option<Hosts> {
    Hosts::can(test).then(|| Hosts::new(9000).unwrap())
}

fn endpoint(hosts: &Hosts, host: usize) -> Lasting {
    hosts.bed(host).lasting_endpoint("default").unwrap()
}

fn rig(hosts: &Hosts, host: usize) -> Rig {
    Rig::new(&endpoint(hosts, host).socket, PAGES).unwrap()
}

fn send(wr_id: u64) -> SendEntry {
    SendEntry {
        wr_id,
        opcode: Opcode::Send as u8,
        num_sge: 1,
        ..SendEntry::default()
    }
}

fn drops(hosts: &Hosts, host: usize) -> serde_json::Value {
    hosts.bed(host).status().unwrap()["fabric"]["drops"].clone()
}

#[test]
fn silence_ends_requests_in_the_time_that_was_asked_for() {
    let Some(mut hosts) = hosts("silence_ends_requests_in_the_time_that_was_asked_for") else {
        return;
    };
    let timers = Patience {
        timeout: 14,
        retry_cnt: 3,
        rnr_retry: 7,
    };
    let mut pair = Pair::new(&hosts, &timers).unwrap();
    assert_eq!(pair.pass(PAGES as u32).unwrap(), WcStatus::Success);
    hosts.bed_mut(1).router().signal(Signal::KILL);
    hosts.bed_mut(1).router().reap(DEADLINE).unwrap();
    let begun = Instant::now();
    assert_eq!(pair.send(64).unwrap(), WcStatus::RetryExcErr);
    // The timer runs for one to four times the time that it is set to (IBTA volume 1, 9.7.6.1.3).
    let least = Duration::from_nanos(4096 << timers.timeout) * u32::from(timers.retry_cnt + 1);
    let took = begun.elapsed();
    assert!(took >= least, "{took:?} is less than {least:?}");
    let most = 4 * least + Duration::from_secs(10);
    assert!(took <= most, "{took:?} is more than {most:?}");
}

#[test]
fn a_new_router_does_not_take_the_old_ones_packets() {
    let Some(mut hosts) = hosts("a_new_router_does_not_take_the_old_ones_packets") else {
        return;
    };
    let timers = Patience {
        timeout: 17,
        ..Patience::default()
    };
    let mut pair = Pair::new(&hosts, &timers).unwrap();
    assert_eq!(pair.pass(64).unwrap(), WcStatus::Success);
    hosts.bed_mut(1).restart().unwrap();
    hosts.wait_for_links().unwrap();
    // Another program of the same endpoint, connected to the same queue pair.
    let lasting = endpoint(&hosts, 1);
    let mut other = Rig::new(&lasting.socket, PAGES).unwrap();
    let mut qp = other.qp(QpType::Rc, CAP).unwrap();
    other
        .connect_with(&qp, pair.near.0.gid(), pair.near.1.qpn(), &timers)
        .unwrap();
    let into = other.sge(0, 64);
    other.recv(&mut qp, 1, &[into]).unwrap();
    let (victim, old) = &mut pair.near;
    let into = victim.sge(0, 64);
    victim.recv(old, 7, &[into]).unwrap();
    let from = other.sge(0, 64);
    other.send(&mut qp, &send(8), &[from]).unwrap();
    // Neither hears the other.
    assert_eq!(pair.send(64).unwrap(), WcStatus::RetryExcErr);
    let done = other.completion(DEADLINE).unwrap();
    let status = WcStatus::from_raw(done.status.into());
    assert_eq!((done.wr_id, status), (8, Some(WcStatus::RetryExcErr)));
    assert_ne!(drops(&hosts, 0)["old_incarnation"], 0);
    let done = pair.near.0.completion(DEADLINE).unwrap();
    let status = WcStatus::from_raw(done.status.into());
    assert_eq!((done.wr_id, status), (7, Some(WcStatus::WrFlushErr)));
    let done = other.completion(DEADLINE).unwrap();
    let status = WcStatus::from_raw(done.status.into());
    assert_eq!((done.wr_id, status), (1, Some(WcStatus::WrFlushErr)));
    let mut again = Pair::new(&hosts, &Patience::default()).unwrap();
    assert_eq!(again.pass(PAGES as u32).unwrap(), WcStatus::Success);
}

#[test]
fn programs_end_when_the_other_hosts_router_is_killed() {
    if !have("ib_write_bw") {
        return;
    }
    let Some(mut hosts) = hosts("programs_end_when_the_other_hosts_router_is_killed") else {
        return;
    };
    for (program, args) in [("ib_write_bw", &[][..]), ("ib_send_bw", &["-e"])] {
        let all = [args, &["-n", "100000000"]].concat();
        let (server, client) = hosts.start(program, &all).unwrap();
        let busy =
            |status: &serde_json::Value| status["fabric"]["received_packets"].as_u64() > Some(1000);
        hosts.bed(0).wait_for_status(busy, DEADLINE).unwrap();
        hosts.bed_mut(0).router().signal(Signal::KILL);
        let ended = client.wait(DEADLINE).unwrap();
        let said = format!("{}{}", ended.stdout, ended.stderr);
        // IBV_WC_RETRY_EXC_ERR
        assert!(said.contains("Failed status 12"), "{ended}");
        drop(server);
        hosts.bed_mut(0).restart().unwrap();
        hosts.pair(program, &["-n", "100"]).unwrap();
    }
}

/// What stands in front of a datagram between IPv4 addresses.
fn grh(source: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut grh = vec![0; 40];
    grh[20] = 0x45;
    grh[32..36].copy_from_slice(&source);
    grh[36..].copy_from_slice(&to);
    grh
}

fn ip(gid: Gid) -> [u8; 4] {
    let mut ip = [0; 4];
    ip.copy_from_slice(&gid.0[12..]);
    ip
}

/// Who sends what, why that is dropped, and how many drops there are.
type Said<'a> = ((&'a str, u16), &'a str, u64, Vec<Vec<u8>>);

#[test]
fn what_nobody_sent_is_dropped_and_counted() {
    const QKEY: u32 = 0x1111;
    const PORT: u16 = 50_000;
    const STRANGER: &str = "192.0.2.77";
    let Some(hosts) = hosts("what_nobody_sent_is_dropped_and_counted") else {
        return;
    };
    hosts
        .shell(1, &format!("ip addr add {STRANGER}/24 dev ff1"))
        .unwrap();
    let mut pair = Pair::new(&hosts, &Patience::default()).unwrap();
    assert_eq!(pair.pass(64).unwrap(), WcStatus::Success);
    let (victim, qp) = &mut pair.near;
    let into = victim.sge(0, 64);
    victim.recv(qp, 7, &[into]).unwrap();
    let mut ud = victim.qp(QpType::Ud, CAP).unwrap();
    for (attr, mask) in datagrams(QKEY) {
        victim.modify(&ud, attr, mask).unwrap();
    }
    let into = victim.sge(4096, 256);
    victim.recv(&mut ud, 8, &[into]).unwrap();

    let owner = (Hosts::ADDRESSES[1], PORT);
    let stranger = (STRANGER, PORT);
    let here = Hosts::ADDRESSES[0];
    let rc =
        |qpn: u32, psn: u32| Headers::new(Bth::new(BthOpcode::RC_SEND_ONLY, qpn, Psn::new(psn)));
    let to_ud = |qpn: u32, qkey: u32| {
        let mut headers = Headers::new(Bth::new(BthOpcode::UD_SEND_ONLY, qpn, Psn::new(0)));
        headers.deth = Some(Deth { qkey, src_qp: 1 });
        headers
    };
    let (own, peer) = (ip(victim.gid()), ip(pair.far.0.gid()));
    let from_peer = [grh(peer, own), b"hello".to_vec()].concat();
    let ours = |qpn: u32, psn: u32| {
        let mut headers = rc(qpn, psn);
        headers.bth.pkey = tenant_pkey("default");
        headers
    };
    let mut theirs = rc(qp.qpn(), 0);
    theirs.bth.pkey = tenant_pkey("other");
    let free = (1..)
        .find(|qpn| ![qp.qpn(), ud.qpn()].contains(qpn))
        .unwrap();
    let mut broken = packet(owner, here, &rc(qp.qpn(), 0), b"data");
    *broken.last_mut().unwrap() ^= 1;
    let noise: Vec<u8> = (0..1400u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let forged = [grh([10, 99, 0, 1], own), b"hello".to_vec()].concat();
    let ourselves = [grh(own, own), b"hello".to_vec()].concat();
    let elsewhere = [grh(peer, [10, 81, 99, 99]), b"hello".to_vec()].concat();
    let said: &[Said<'_>] = &[
        (
            owner,
            "bad_icrc",
            5,
            vec![vec![], vec![0; 3], noise, broken, vec![0xA5; 60_000]],
        ),
        (
            owner,
            "unknown_qp",
            2,
            vec![
                packet(owner, here, &rc(free, 0), b"data"),
                packet(owner, here, &to_ud(ud.qpn(), QKEY), &elsewhere),
            ],
        ),
        (
            stranger,
            "wrong_host",
            2,
            vec![
                packet(stranger, here, &rc(qp.qpn(), 0), b"data"),
                packet(stranger, here, &to_ud(ud.qpn(), QKEY), &from_peer),
            ],
        ),
        (
            owner,
            "wrong_host",
            3,
            vec![
                packet(owner, here, &rc(ud.qpn(), 0), b"data"),
                packet(owner, here, &to_ud(ud.qpn(), QKEY), &forged),
                packet(owner, here, &to_ud(ud.qpn(), QKEY), &ourselves),
            ],
        ),
        (
            owner,
            "no_address",
            2,
            vec![
                packet(owner, here, &to_ud(ud.qpn(), QKEY), b"short"),
                packet(owner, here, &to_ud(ud.qpn(), QKEY), &[0; 200]),
            ],
        ),
        (
            owner,
            "not_taken",
            2,
            vec![
                packet(owner, here, &to_ud(ud.qpn(), QKEY + 1), &from_peer),
                packet(owner, here, &to_ud(qp.qpn(), QKEY), &from_peer),
            ],
        ),
        (
            owner,
            "wrong_tenant",
            2,
            vec![
                packet(owner, here, &rc(qp.qpn(), 0), b"data"),
                packet(owner, here, &theirs, b"data"),
            ],
        ),
        // More than the path MTU, far from what is due.
        (
            owner,
            "useless",
            1,
            vec![packet(owner, here, &ours(qp.qpn(), 0x40_0000), &[0; 8000])],
        ),
    ];
    for (from, reason, n, packets) in said {
        let before = drops(&hosts, 0);
        say(&hosts, env!("CARGO_BIN_EXE_say-udp"), *from, packets).unwrap();
        let count = |drops: &serde_json::Value| drops[*reason].as_u64().unwrap();
        let mut now = drops(&hosts, 0);
        wait_until(&format!("{n} dropped as {reason}"), DEADLINE, || {
            now = drops(&hosts, 0);
            count(&now) >= count(&before) + n
        })
        .unwrap_or_else(|e| panic!("{e}: {before} became {now}"));
        let others = |drops: &serde_json::Value| -> u64 {
            let all = drops.as_object().unwrap();
            all.values().filter_map(serde_json::Value::as_u64).sum()
        };
        assert_eq!(
            others(&now),
            others(&before) + n,
            "{reason}: {before} became {now}"
        );
    }
    let (victim, _) = &mut pair.near;
    assert!(
        victim.cq.poll().unwrap().is_none(),
        "something was received"
    );
    // The connection is as it was.
    assert_eq!(pair.pass(PAGES as u32).unwrap(), WcStatus::Success);
}

#[test]
fn a_path_that_swallows_large_packets_ends_requests() {
    let test = "a_path_that_swallows_large_packets_ends_requests";
    if !have("nft") {
        return;
    }
    let Some(hosts) = hosts(test) else { return };
    let mut pair = Pair::new(
        &hosts,
        &Patience {
            timeout: 12,
            retry_cnt: 3,
            rnr_retry: 7,
        },
    )
    .unwrap();
    let rule = "nft add table inet hole && nft add chain inet hole input \
                '{ type filter hook input priority 0; }' && \
                nft add rule inet hole input udp dport 4791 meta length '>' 1500 drop";
    if let Err(e) = hosts.shell(1, rule) {
        return skip(test, &format!("{e:#}"));
    }
    assert_eq!(pair.pass(512).unwrap(), WcStatus::Success);
    assert_eq!(pair.pass(PAGES as u32).unwrap(), WcStatus::RetryExcErr);
}

#[test]
fn a_host_that_does_not_keep_up_loses_datagrams_and_nothing_else() {
    const QKEY: u32 = 0x1111;
    const LEN: u32 = 4096;
    /// More than a socket's buffer.
    const FLOOD: u32 = 32_768;
    let Some(mut hosts) = hosts("a_host_that_does_not_keep_up_loses_datagrams_and_nothing_else")
    else {
        return;
    };
    let timers = Patience {
        timeout: 18,
        ..Patience::default()
    };
    let mut pair = Pair::new(&hosts, &timers).unwrap();
    assert_eq!(pair.pass(64).unwrap(), WcStatus::Success);
    let mut sender = rig(&hosts, 0);
    let mut ud = sender.qp(QpType::Ud, CAP).unwrap();
    for (attr, mask) in datagrams(QKEY) {
        sender.modify(&ud, attr, mask).unwrap();
    }
    let entry = SendEntry {
        av: AddressVector {
            dgid: pair.far.0.gid(),
            is_global: true,
            port_num: 1,
            hop_limit: 64,
            ..AddressVector::default()
        },
        remote_qpn: 0x1234,
        remote_qkey: QKEY,
        ..send(3)
    };
    hosts.bed_mut(1).router().signal(Signal::STOP);
    for _ in 0..FLOOD {
        let from = sender.sge(0, LEN);
        sender.send(&mut ud, &entry, &[from]).unwrap();
        let done = sender.completion(DEADLINE).unwrap();
        assert_eq!(done.status, WcStatus::Success.raw() as u8);
    }
    hosts.bed_mut(1).router().signal(Signal::CONT);
    assert_eq!(pair.pass(PAGES as u32).unwrap(), WcStatus::Success);
    let dropped = drops(&hosts, 1);
    assert_ne!(dropped["overflow"], 0, "{dropped}");
    assert_ne!(dropped["unknown_qp"], 0, "{dropped}");
}

/// A datagram queue pair that is ready, with a receive posted.
fn listening(rig: &mut Rig, qkey: u32) -> RawQp {
    let mut qp = rig.qp(QpType::Ud, CAP).unwrap();
    for (attr, mask) in datagrams(qkey) {
        rig.modify(&qp, attr, mask).unwrap();
    }
    let into = rig.sge(4096, 4096);
    rig.recv(&mut qp, 5, &[into]).unwrap();
    qp
}

#[test]
fn a_group_has_members_on_other_hosts_and_in_no_other_tenant() {
    const QKEY: u32 = 0x1111;
    let Some(hosts) = hosts("a_group_has_members_on_other_hosts_and_in_no_other_tenant") else {
        return;
    };
    let group = Gid::from(VirtualIp("239.1.2.3".parse().unwrap()));
    let mut sender = rig(&hosts, 0);
    let mut ud = listening(&mut sender, QKEY);
    let member = |host: usize, tenant: &str| {
        let lasting = hosts.bed(host).lasting_endpoint(tenant).unwrap();
        let mut rig = Rig::new(&lasting.socket, PAGES).unwrap();
        let qp = listening(&mut rig, QKEY);
        let (qp, gid) = (qp.made.qp, group);
        rig.raw
            .call(&Request::Multicast {
                qp,
                gid,
                attach: true,
            })
            .unwrap();
        rig
    };
    let mut stranger = member(1, "other");
    let mut members = [
        member(0, "default"),
        member(1, "default"),
        member(1, "default"),
    ];
    sender.fill(0, b"to all of you").unwrap();
    let entry = SendEntry {
        av: AddressVector {
            dgid: group,
            is_global: true,
            port_num: 1,
            hop_limit: 64,
            ..AddressVector::default()
        },
        remote_qpn: Qpn::MULTICAST.get(),
        remote_qkey: QKEY,
        ..send(3)
    };
    let from = sender.sge(0, 13);
    sender.send(&mut ud, &entry, &[from]).unwrap();
    for member in &mut members {
        let got = member.completion(DEADLINE).unwrap();
        assert_eq!((got.wr_id, got.byte_len, got.src_qp), (5, 53, ud.qpn()));
        let bytes = member.bytes(4096, 53).unwrap();
        assert_eq!(&bytes[40..], b"to all of you");
        assert_eq!(bytes[32..36], ip(sender.gid()));
        assert_eq!(bytes[36..40], ip(group));
    }
    assert!(stranger.cq.poll().unwrap().is_none());
    // What is for nobody is counted.
    let other = Gid::from(VirtualIp("239.9.9.9".parse().unwrap()));
    let av = AddressVector {
        dgid: other,
        ..entry.av
    };
    let from = sender.sge(0, 13);
    sender
        .send(&mut ud, &SendEntry { av, ..entry }, &[from])
        .unwrap();
    let counted = || drops(&hosts, 1)["not_taken"] == 1;
    wait_until("the datagram for nobody is dropped", DEADLINE, counted).unwrap();
    assert!(stranger.cq.poll().unwrap().is_none());
}
