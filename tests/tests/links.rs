//! Routers that know each other, and what goes wrong between them.

use std::time::{Duration, Instant, SystemTime};

use freeflow_link::pki::{Authority, Validity};
use freeflow_shm::SendEntry;
use freeflow_tests::rig::{CAP, Patience, RawQp, Rig, datagrams, path_to_rts};
use freeflow_tests::{DEADLINE, Hosts, Trust, dist, have, skip, wait_until};
use freeflow_types::{
    Access, AddressVector, Gid, Mtu, Opcode, QpAttrMask as Mask, QpType, WcStatus,
};
use rustix::process::Signal;
use serde_json::Value;

const PAGES: u64 = 1 << 20;

/// TCP port of control connections.
const PORT: u16 = 4792;

fn hosts(test: &str) -> Option<Hosts> {
    Hosts::can(test).then(|| Hosts::new(9000).unwrap())
}

fn apart(test: &str, trust: Trust) -> Option<Hosts> {
    Hosts::can(test).then(|| Hosts::apart(9000, trust, &[]).unwrap())
}

fn rig(hosts: &Hosts, host: usize) -> Rig {
    let lasting = hosts.bed(host).lasting_endpoint("default").unwrap();
    Rig::new(&lasting.socket, PAGES).unwrap()
}

fn send(wr_id: u64) -> SendEntry {
    SendEntry {
        wr_id,
        opcode: Opcode::Send as u8,
        num_sge: 1,
        ..SendEntry::default()
    }
}

/// Two programs on two hosts, connected.
struct Pair {
    near: (Rig, RawQp),
    far: (Rig, RawQp),
}

impl Pair {
    fn new(hosts: &Hosts, qp_type: QpType, timers: &Patience) -> Pair {
        let (mut a, mut b) = (rig(hosts, 0), rig(hosts, 1));
        let (qa, qb) = (a.qp(qp_type, CAP).unwrap(), b.qp(qp_type, CAP).unwrap());
        connect(&a, &qa, (b.gid(), qb.qpn()), qp_type, timers);
        connect(&b, &qb, (a.gid(), qa.qpn()), qp_type, timers);
        Pair {
            near: (a, qa),
            far: (b, qb),
        }
    }

    /// Sends a message from the near end to the far one; how the near end's request ended.
    fn pass(&mut self, len: u32) -> WcStatus {
        self.begin(len);
        self.ended()
    }

    fn begin(&mut self, len: u32) {
        let (b, qb) = &mut self.far;
        let into = b.sge(0, len);
        b.recv(qb, 1, &[into]).unwrap();
        let (a, qa) = &mut self.near;
        let from = a.sge(0, len);
        a.send(qa, &send(2), &[from]).unwrap();
    }

    fn ended(&mut self) -> WcStatus {
        status(&mut self.near.0)
    }
}

fn connect(rig: &Rig, qp: &RawQp, to: (Gid, u32), qp_type: QpType, timers: &Patience) {
    let reliable = Mask::MAX_DEST_RD_ATOMIC
        | Mask::MIN_RNR_TIMER
        | Mask::TIMEOUT
        | Mask::RETRY_CNT
        | Mask::RNR_RETRY
        | Mask::MAX_QP_RD_ATOMIC;
    for (mut attr, mut mask) in path_to_rts(to.0, to.1, timers) {
        attr.path_mtu = Mtu::B1024;
        if qp_type == QpType::Uc {
            attr.access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
            mask -= reliable;
        }
        rig.modify(qp, attr, mask).unwrap();
    }
}

fn status(rig: &mut Rig) -> WcStatus {
    let done = rig.completion(DEADLINE).unwrap();
    WcStatus::from_raw(done.status.into()).unwrap()
}

/// Waits until a host's link is down for a reason that says so.
fn down(hosts: &Hosts, host: usize, said: &str) {
    let is = |status: &Value| {
        let link = &status["fabric"]["links"][0];
        let reason = link["reason"].as_str().unwrap_or_default();
        link["up"] == false && reason.contains(said)
    };
    hosts.bed(host).wait_for_status(is, DEADLINE).unwrap();
}

/// Has a host drop all that comes to or from control ports; whether it can.
fn cut(test: &str, hosts: &Hosts, host: usize) -> bool {
    let rule = format!(
        "nft add table inet cut && nft add chain inet cut input \
         '{{ type filter hook input priority 0; }}' && \
         nft add rule inet cut input tcp dport {PORT} drop && \
         nft add rule inet cut input tcp sport {PORT} drop"
    );
    if !have("nft") {
        return false;
    }
    let done = hosts.shell(host, &rule);
    if let Err(e) = &done {
        skip(test, &format!("{e:#}"));
    }
    done.is_ok()
}

fn mend(hosts: &Hosts, host: usize) {
    hosts.shell(host, "nft delete table inet cut").unwrap();
}

#[test]
fn routers_that_know_each_other_say_so() {
    let Some(hosts) = hosts("routers_that_know_each_other_say_so") else {
        return;
    };
    for (host, other) in [(0, 1), (1, 0)] {
        let fabric = hosts.bed(host).status().unwrap()["fabric"].clone();
        let theirs = hosts.bed(other).status().unwrap()["fabric"].clone();
        let link = &fabric["links"][0];
        assert_eq!(fabric["authenticated"], true);
        assert_eq!(link["incarnation"], theirs["incarnation"], "{link}");
        assert_eq!(link["host"], Hosts::ADDRESSES[other]);
        assert_eq!(
            (&link["version"], &link["selective"], &link["header_crc"]),
            (&1.into(), &true.into(), &true.into())
        );
        assert!(link["segment"].as_u64() > Some(8192), "{link}");
        let incarnation = link["incarnation"].as_str().unwrap();
        for command in [&["status"][..], &["host", "ls"]] {
            let said = hosts.bed(host).call(command).unwrap().success().unwrap();
            assert!(said.stdout.contains(incarnation), "{said}");
        }
    }
}

#[test]
fn hosts_that_do_not_believe_each_other_carry_nothing() {
    const QKEY: u32 = 0x1111;
    let test = "hosts_that_do_not_believe_each_other_carry_nothing";
    let Some(hosts) = apart(test, Trust::Strangers) else {
        return;
    };
    down(&hosts, 0, "another authority");
    down(&hosts, 1, "refuses this one's certificate");
    // As silence would, in the time that was asked for.
    let timers = Patience {
        timeout: 14,
        retry_cnt: 3,
        rnr_retry: 7,
    };
    let mut pair = Pair::new(&hosts, QpType::Rc, &timers);
    let begun = Instant::now();
    assert_eq!(pair.pass(64), WcStatus::RetryExcErr);
    let least = Duration::from_nanos(4096 << timers.timeout) * u32::from(timers.retry_cnt + 1);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    // What is not reliable is lost.
    let mut pair = Pair::new(&hosts, QpType::Uc, &Patience::default());
    assert_eq!(pair.pass(64), WcStatus::Success);
    assert!(pair.far.0.cq.poll().unwrap().is_none());
    let datagram = |rig: &mut Rig, to: (Gid, u32)| {
        let mut ud = rig.qp(QpType::Ud, CAP).unwrap();
        for (attr, mask) in datagrams(QKEY) {
            rig.modify(&ud, attr, mask).unwrap();
        }
        let entry = SendEntry {
            av: AddressVector {
                dgid: to.0,
                is_global: true,
                port_num: 1,
                hop_limit: 64,
                ..AddressVector::default()
            },
            remote_qpn: to.1,
            remote_qkey: QKEY,
            ..send(3)
        };
        let from = rig.sge(0, 64);
        rig.send(&mut ud, &entry, &[from]).unwrap();
        assert_eq!(status(rig), WcStatus::Success);
    };
    let to = (pair.far.0.gid(), 0x1234);
    datagram(&mut pair.near.0, to);
    for host in [0, 1] {
        let fabric = hosts.bed(host).status().unwrap()["fabric"].clone();
        assert_eq!(fabric["sent_packets"], 0, "{fabric}");
    }
}

#[test]
fn certificates_are_read_again() {
    let test = "certificates_are_read_again";
    let Some(mut hosts) = apart(test, Trust::Strangers) else {
        return;
    };
    down(&hosts, 0, "another authority");
    let freeflow = dist().join("bin/freeflow");
    let (freeflow, dir) = (freeflow.display(), hosts.dir().display());
    let [_, second] = Hosts::ADDRESSES;
    let moves =
        format!("cp {dir}/ca0/ca.* {dir}/ca1 && {freeflow} host cert {second} --ca {dir}/ca1");
    hosts.shell(1, &moves).unwrap();
    hosts.bed_mut(1).router().signal(Signal::HUP);
    hosts.wait_for_links().unwrap();
    let mut pair = Pair::new(&hosts, QpType::Rc, &Patience::default());
    assert_eq!(pair.pass(PAGES as u32), WcStatus::Success);
}

#[test]
fn hosts_may_be_known_by_their_addresses() {
    let test = "hosts_may_be_known_by_their_addresses";
    let Some(mut hosts) = apart(test, Trust::Addresses) else {
        return;
    };
    hosts.wait_for_links().unwrap();
    assert_eq!(
        hosts.bed(0).status().unwrap()["fabric"]["authenticated"],
        false
    );
    let mut pair = Pair::new(&hosts, QpType::Rc, &Patience::default());
    assert_eq!(pair.pass(PAGES as u32), WcStatus::Success);
    hosts.bed_mut(1).restart().unwrap();
    let mut pair = Pair::new(&hosts, QpType::Rc, &Patience::default());
    assert_eq!(pair.pass(PAGES as u32), WcStatus::Success);
}

#[test]
fn requests_wait_for_the_link() {
    let test = "requests_wait_for_the_link";
    let Some(mut hosts) = hosts(test) else { return };
    if !cut(test, &hosts, 1) {
        return;
    }
    hosts.bed_mut(1).restart().unwrap();
    down(&hosts, 0, "");
    let timers = Patience {
        timeout: 20,
        ..Patience::default()
    };
    let mut pair = Pair::new(&hosts, QpType::Rc, &timers);
    pair.begin(PAGES as u32);
    assert!(pair.near.0.cq.poll().unwrap().is_none());
    mend(&hosts, 1);
    assert_eq!(pair.ended(), WcStatus::Success);
    assert_eq!(status(&mut pair.far.0), WcStatus::Success);
    assert_eq!(pair.pass(PAGES as u32), WcStatus::Success);
}

#[test]
fn data_goes_on_while_the_link_is_lost() {
    let test = "data_goes_on_while_the_link_is_lost";
    if !have("ib_write_bw") {
        return;
    }
    let Some(hosts) = hosts(test) else { return };
    let mut pair = Pair::new(&hosts, QpType::Rc, &Patience::default());
    assert_eq!(pair.pass(64), WcStatus::Success);
    let incarnation = hosts.link(0).unwrap()["incarnation"].clone();
    let (mut server, mut client) = hosts.start("ib_write_bw", &["-D", "1000"]).unwrap();
    let received = || {
        let status = hosts.bed(0).status().unwrap();
        status["fabric"]["received_packets"].as_u64().unwrap()
    };
    let flows = || {
        let before = received();
        wait_until("data flows", DEADLINE, || received() > before + 1000).unwrap();
    };
    flows();
    if !cut(test, &hosts, 1) {
        return;
    }
    for host in [0, 1] {
        down(&hosts, host, "");
    }
    flows();
    assert_eq!(pair.pass(PAGES as u32), WcStatus::Success);
    mend(&hosts, 1);
    hosts.wait_for_links().unwrap();
    flows();
    assert!(server.is_alive() && client.is_alive());
    assert_eq!(pair.pass(PAGES as u32), WcStatus::Success);
    assert_eq!(hosts.link(0).unwrap()["incarnation"], incarnation);
}

#[test]
fn a_router_that_does_not_answer_is_noticed() {
    let Some(mut hosts) = hosts("a_router_that_does_not_answer_is_noticed") else {
        return;
    };
    hosts.bed_mut(1).router().signal(Signal::STOP);
    down(&hosts, 0, "");
    hosts.bed_mut(1).router().signal(Signal::CONT);
    hosts.wait_for_links().unwrap();
    let mut pair = Pair::new(&hosts, QpType::Rc, &Patience::default());
    assert_eq!(pair.pass(PAGES as u32), WcStatus::Success);
}

#[test]
fn packets_are_as_long_as_both_ends_can_bear() {
    let Some(mut hosts) = hosts("packets_are_as_long_as_both_ends_can_bear") else {
        return;
    };
    // One end of the link takes less than the other sends.
    hosts.shell(1, "ip link set ff1 mtu 1500").unwrap();
    hosts.bed_mut(0).restart().unwrap();
    hosts.bed_mut(1).restart().unwrap();
    hosts.wait_for_links().unwrap();
    for host in [0, 1] {
        let link = hosts.link(host).unwrap();
        assert!(link["segment"].as_u64() < Some(1500), "{link}");
    }
    let mut pair = Pair::new(&hosts, QpType::Rc, &Patience::default());
    assert_eq!(pair.pass(PAGES as u32), WcStatus::Success);
}

#[test]
fn what_is_said_to_the_control_port_by_others_changes_nothing() {
    let test = "what_is_said_to_the_control_port_by_others_changes_nothing";
    let Some(hosts) = hosts(test) else { return };
    if !have("bash") {
        return;
    }
    let mut pair = Pair::new(&hosts, QpType::Rc, &Patience::default());
    let incarnation = hosts.link(1).unwrap()["incarnation"].clone();
    let [low, high] = Hosts::ADDRESSES;
    for (host, to) in [(0, high), (1, low), (0, low)] {
        let garbage = format!(
            "bash -c 'for n in {{1..60}}; do exec {{fd}}<>/dev/tcp/{to}/{PORT} || exit 1; \
             head -c 300 /dev/urandom >&$fd 2>/dev/null || true; done; true'"
        );
        hosts.shell(host, &garbage).unwrap();
    }
    assert_eq!(pair.pass(PAGES as u32), WcStatus::Success);
    hosts.wait_for_links().unwrap();
    assert_eq!(hosts.link(1).unwrap()["incarnation"], incarnation);
}

#[test]
fn a_router_without_a_certificate_that_others_believe_does_not_start() {
    let test = "a_router_without_a_certificate_that_others_believe_does_not_start";
    let Some(hosts) = apart(test, Trust::Addresses) else {
        return;
    };
    let freeflow = dist().join("bin/freeflow");
    let (freeflow, dir) = (freeflow.to_str().unwrap(), hosts.dir().to_str().unwrap());
    let call = |args: &str| {
        let script = format!("{freeflow} --runtime-dir {dir}/run {args}");
        let mut command = hosts.command(0, "sh", &["-c", &script]);
        let running = freeflow_tests::Running::start(&mut command).unwrap();
        running.wait(DEADLINE).unwrap()
    };
    let refused = |args: &str, said: &str| {
        let ended = call(args);
        assert_eq!(ended.status.code(), Some(125), "{ended}");
        assert!(ended.stderr.contains(said), "{ended}");
    };
    let ca = format!("{dir}/ca");
    call(&format!("host ca {ca}")).success().unwrap();
    refused(&format!("host ca {ca}"), "is there already");
    refused(
        &format!("host cert ca --ca {ca} --out {ca}/."),
        "is the authority's",
    );
    let own = format!("router --underlay 192.0.2.9 --hosts {dir}/hosts");
    refused(&own, "--tls-cert");
    let with = |name: &str| {
        format!("--tls-ca {ca}/ca.pem --tls-cert {ca}/{name}.pem --tls-key {ca}/{name}.key")
    };
    call(&format!("host cert 192.0.2.8 --ca {ca}"))
        .success()
        .unwrap();
    refused(&format!("{own} {}", with("192.0.2.8")), "name or address");
    let doctor = format!("doctor --underlay 192.0.2.9 {}", with("192.0.2.9"));
    let day = Duration::from_secs(86_400);
    let good_until = |to: SystemTime| {
        let read = |name: &str| std::fs::read_to_string(format!("{ca}/{name}")).unwrap();
        let authority = Authority::load(&read("ca.pem"), &read("ca.key")).unwrap();
        let from = SystemTime::now() - 2 * day;
        let made = authority.issue(&["192.0.2.9"], Validity { from, to });
        let made = made.unwrap();
        std::fs::write(format!("{ca}/192.0.2.9.pem"), made.cert).unwrap();
        std::fs::write(format!("{ca}/192.0.2.9.key"), made.key).unwrap();
    };
    good_until(SystemTime::now() - day);
    let said = call(&doctor);
    assert_eq!(said.status.code(), Some(1), "{said}");
    assert!(said.stdout.contains("renew it"), "{said}");
    assert!(said.stdout.contains("own certificate"), "{said}");
    refused(&format!("{own} {}", with("192.0.2.9")), "renew it");
    call(&format!("host cert 192.0.2.9 --ca {ca}"))
        .success()
        .unwrap();
    let certificates = || {
        let said = call(&doctor).success().unwrap();
        let mut lines = said.stdout.lines().map(str::to_owned);
        let line = lines.find(|line| line.contains(" certificates "));
        line.unwrap_or_else(|| panic!("{said}"))
    };
    let said = certificates();
    assert!(said.starts_with("ok "), "{said}");
    assert!(said.contains("believe that this is 192.0.2.9"), "{said}");
    assert!(said.contains(", until 2"), "{said}");
    good_until(SystemTime::now() + 29 * day);
    let said = certificates();
    assert!(said.starts_with("warn "), "{said}");
    assert!(said.contains("expires on 2"), "{said}");
}

#[test]
fn an_address_that_the_map_gives_to_another_host_is_told_of() {
    let test = "an_address_that_the_map_gives_to_another_host_is_told_of";
    let Some(mut hosts) = apart(test, Trust::Addresses) else {
        return;
    };
    let [_, other] = Hosts::ADDRESSES;
    let said = |args: &[&str]| hosts.bed(0).call(args).unwrap().success().unwrap();
    for (args, ip) in [
        (&["endpoint", "create", "one", "--ip"][..], "10.82.0.9"),
        (&["run", "--name", "two", "--ip"], "10.82.0.8"),
    ] {
        let program: &[&str] = if args[0] == "run" {
            &["--", "true"]
        } else {
            &[]
        };
        let said = said(&[args, &[ip], program].concat());
        assert_eq!(said.stderr.lines().count(), 1, "{said}");
        for word in ["warning: ", ip, other, "--hosts"] {
            assert!(said.stderr.contains(word), "no {word:?} in {said}");
        }
    }
    for own in ["10.81.0.9", "10.83.0.9"] {
        let said = said(&["endpoint", "create", "--ip", own]);
        assert_eq!(said.stderr, "", "{said}");
    }
    for name in ["one", "two"] {
        let line = format!("warning: endpoint \"{name}\"");
        hosts.bed_mut(0).router().wait_for(&line, DEADLINE).unwrap();
    }
}

#[test]
fn what_a_router_cannot_use_is_named() {
    let place = freeflow_tests::Place::ordinary().unwrap();
    for args in [
        &["host", "ca"][..],
        &["host", "cert", "192.0.2.1"],
        &["host", "cert", "192.0.2.2"],
    ] {
        place.clean(args).unwrap();
    }
    let map = place.file("hosts", 0).unwrap();
    let map = map.to_str().unwrap();
    let ca = |name: &str| format!("freeflow-ca/{name}");
    let refused = |lines: &str, cert: &str, key: &str, words: &[&str]| {
        std::fs::write(map, lines).unwrap();
        let (authority, cert, key) = (ca("ca.pem"), ca(cert), ca(key));
        let said = place.call(&[
            "router",
            "--underlay",
            "192.0.2.1",
            "--hosts",
            map,
            "--tls-ca",
            &authority,
            "--tls-cert",
            &cert,
            "--tls-key",
            &key,
        ]);
        let said = said.unwrap();
        assert_eq!(said.code(), 125, "{said}");
        for word in words {
            assert!(said.stderr.contains(word), "no {word:?} in {said}");
        }
        said.stderr
    };
    let (cert, key) = ("192.0.2.1.pem", "192.0.2.1.key");
    let good = "default 10.0.1.0/24 192.0.2.1\n";
    let other = "freeflow-ca/192.0.2.2.key is not the key of freeflow-ca/192.0.2.1.pem";
    refused(good, cert, "192.0.2.2.key", &[other]);
    let none = "freeflow-ca/192.0.2.1.pem holds no private key";
    let said = refused(good, cert, cert, &[none]);
    assert!(!said.contains("ca.pem"), "{said}");
    for (line, words) in [
        ("bad..name@192.0.2.2", ["line 2", "bad..name@192.0.2.2"]),
        ("@192.0.2.2", ["line 2", "\"@192.0.2.2\""]),
        ("2001:db8::2", ["line 2", "2001:db8::2"]),
    ] {
        let lines = format!("{good}default 10.0.2.0/24 {line}\n");
        refused(&lines, cert, key, &[&words[..], &[map]].concat());
    }
}
