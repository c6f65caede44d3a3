//! Two hosts whose link fails for a while or for good, and peers that do not do their part.

use std::time::{Duration, Instant};

use freeflow_tests::rig::{Pair, Patience};
use freeflow_tests::{DEADLINE, Hosts, descendants, have, skip, wait_until};
use freeflow_types::WcStatus;
use rustix::process::{Pid, Signal, kill_process};

const ALL: u32 = Pair::PAGES as u32;

/// One that waits for long.
const PATIENT: Patience = Patience {
    timeout: 18,
    retry_cnt: 7,
    rnr_retry: 7,
};

fn hosts(test: &str) -> Option<Hosts> {
    Hosts::can(test).then(|| Hosts::new(9000).unwrap())
}

fn drops(hosts: &Hosts, host: usize, reason: &str) -> u64 {
    let status = hosts.bed(host).status().unwrap();
    status["fabric"]["drops"][reason].as_u64().unwrap()
}

/// Sets the MTU of both ends of the link.
fn set_mtu(hosts: &Hosts, mtu: u32) {
    for host in [0, 1] {
        let script = format!("ip link set ff{host} mtu {mtu}");
        hosts.shell(host, &script).unwrap();
    }
}

#[test]
fn a_link_that_becomes_narrower_ends_requests_until_it_is_wide_again() {
    let test = "a_link_that_becomes_narrower_ends_requests_until_it_is_wide_again";
    let Some(hosts) = hosts(test) else { return };
    let timers = Patience {
        timeout: 12,
        retry_cnt: 3,
        rnr_retry: 7,
    };
    let mut pair = Pair::new(&hosts, &timers).unwrap();
    assert_eq!(pair.pass(ALL).unwrap(), WcStatus::Success);
    set_mtu(&hosts, 1500);
    // What still fits passes.
    assert_eq!(pair.pass(1024).unwrap(), WcStatus::Success);
    assert_eq!(pair.pass(ALL).unwrap(), WcStatus::RetryExcErr);
    assert_ne!(drops(&hosts, 0, "too_big"), 0);
    // What routers have agreed on counts as long as they live.
    set_mtu(&hosts, 9000);
    let mut pair = Pair::new(&hosts, &timers).unwrap();
    assert_eq!(pair.pass(ALL).unwrap(), WcStatus::Success);
}

#[test]
fn a_link_that_is_down_ends_requests_in_their_time() {
    let test = "a_link_that_is_down_ends_requests_in_their_time";
    let Some(hosts) = hosts(test) else { return };
    let timers = Patience {
        timeout: 17,
        retry_cnt: 2,
        rnr_retry: 7,
    };
    // The sender's end, which knows it, and the other, which does not come back with answers.
    for host in [0, 1] {
        let mut pair = Pair::new(&hosts, &timers).unwrap();
        assert_eq!(pair.pass(ALL).unwrap(), WcStatus::Success);
        let set = |state: &str| {
            let script = format!("ip link set ff{host} {state}");
            hosts.shell(host, &script).unwrap();
        };
        set("down");
        let begun = Instant::now();
        assert_eq!(pair.send(64).unwrap(), WcStatus::RetryExcErr);
        // The timer runs for one to four times the time that it is set to (IBTA volume 1,
        // 9.7.6.1.3).
        let least = Duration::from_nanos(4096 << timers.timeout) * u32::from(timers.retry_cnt + 1);
        let took = begun.elapsed();
        assert!(took >= least, "{took:?} is less than {least:?}");
        // A busy machine may take its time.
        let most = 4 * least + Duration::from_secs(10);
        assert!(took <= most, "{took:?} is more than {most:?}");
        set("up");
        let mut again = Pair::new(&hosts, &PATIENT).unwrap();
        assert_eq!(again.pass(ALL).unwrap(), WcStatus::Success);
    }
}

#[test]
fn an_outage_that_ends_in_time_is_not_seen() {
    let test = "an_outage_that_ends_in_time_is_not_seen";
    if !have("nft") {
        return;
    }
    let Some(hosts) = hosts(test) else { return };
    let mut pair = Pair::new(&hosts, &PATIENT).unwrap();
    let data: Vec<u8> = (0..ALL).map(|at| (at * 7 + at / 251) as u8).collect();
    // No request arrives, or no answer.
    for host in [1, 0] {
        assert_eq!(pair.pass(64).unwrap(), WcStatus::Success);
        pair.near.0.fill(0, &data).unwrap();
        pair.far.0.fill(0, &vec![0; data.len()]).unwrap();
        if let Err(e) = hosts.lose(host, 1000) {
            return skip(test, &format!("{e:#}"));
        }
        pair.expect(ALL).unwrap();
        pair.post(ALL).unwrap();
        wait_until("the hole has swallowed something", DEADLINE, || {
            hosts.lost(host).unwrap() >= 3
        })
        .unwrap();
        hosts.shell(host, "nft delete table inet loss").unwrap();
        assert_eq!(pair.outcome().unwrap(), WcStatus::Success);
        assert!(pair.far.0.bytes(0, data.len()).unwrap() == data, "the data");
    }
}

#[test]
fn a_peer_that_posts_no_receives_ends_requests_or_is_waited_for() {
    let test = "a_peer_that_posts_no_receives_ends_requests_or_is_waited_for";
    let Some(hosts) = hosts(test) else { return };
    let timers = Patience {
        rnr_retry: 2,
        ..PATIENT
    };
    let mut ends = Pair::new(&hosts, &timers).unwrap();
    assert_eq!(ends.send(64).unwrap(), WcStatus::RnrRetryExcErr);
    // 7 is for ever.
    let mut waits = Pair::new(&hosts, &PATIENT).unwrap();
    waits.post(ALL).unwrap();
    let mut other = Pair::new(&hosts, &PATIENT).unwrap();
    for _ in 0..50 {
        assert_eq!(other.pass(4096).unwrap(), WcStatus::Success);
    }
    assert!(waits.near.0.cq.poll().unwrap().is_none(), "nobody took it");
    waits.expect(ALL).unwrap();
    assert_eq!(waits.outcome().unwrap(), WcStatus::Success);
}

#[test]
fn a_program_that_is_stopped_holds_up_nobody_else() {
    let test = "a_program_that_is_stopped_holds_up_nobody_else";
    if !["ib_send_bw", "ib_write_bw"].into_iter().all(have) {
        return;
    }
    let Some(hosts) = hosts(test) else { return };
    let (server, client) = hosts.start("ib_send_bw", &["-n", "100000000"]).unwrap();
    let received = || {
        let status = hosts.bed(0).status().unwrap();
        status["fabric"]["received_bytes"].as_u64().unwrap()
    };
    let more = |than: u64| {
        wait_until("data flows", DEADLINE, || received() > than + (1 << 20)).unwrap();
    };
    more(0);
    let signal = |signal: Signal| {
        for pid in descendants(server.pid()) {
            let pid = Pid::from_raw(pid as i32).unwrap();
            kill_process(pid, signal).unwrap();
        }
    };
    signal(Signal::STOP);
    hosts.pair("ib_write_bw", &["-n", "500"]).unwrap();
    hosts.pair("ib_send_bw", &["-n", "500"]).unwrap();
    signal(Signal::CONT);
    more(received());
    drop((server, client));
}

#[test]
fn a_slow_link_is_no_failure() {
    let test = "a_slow_link_is_no_failure";
    if !["ib_write_bw", "tc"].into_iter().all(have) {
        return;
    }
    let Some(hosts) = hosts(test) else { return };
    // More waits in the socket than in the device.
    let shape = "tc qdisc add dev ff1 root tbf rate 400mbit burst 128kb limit 64mb";
    if let Err(e) = hosts.shell(1, shape) {
        return skip(test, &format!("no link can be made slow: {e:#}"));
    }
    for args in [
        &["-s", "65536", "-n", "400"][..],
        &["-s", "65536", "-n", "50", "-q", "16"],
        &["-s", "1048576", "-n", "30"],
    ] {
        hosts.pair("ib_write_bw", args).unwrap();
    }
}
