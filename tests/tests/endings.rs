//! Ends of routers, endpoints, connections and processes, seen by clients of all kinds.

use std::process::Command;

use freeflow_api::{ControlAnswer, Operation};
use freeflow_shm::SendEntry;
use freeflow_tests::raw::{Answer, Raw};
use freeflow_tests::rig::{CAP, Patience, Rig, join};
use freeflow_tests::{
    Bed, DEADLINE, Footprint, Lasting, Running, Victim, free_port, have, wait_for_listener,
};
use freeflow_types::{Opcode, QpType, WcStatus, timeout_ns};
use rustix::process::{Pid, Signal, kill_process};

fn outlive(endpoint: &Lasting) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outlive-router"));
    command.env("FREEFLOW_ENDPOINT", &endpoint.socket);
    let running = Running::start(&mut command).unwrap();
    running.wait_for("ready", DEADLINE).unwrap();
    running
}

#[test]
fn a_router_that_ends_leaves_no_thread_waiting() {
    for signal in [Signal::KILL, Signal::TERM] {
        let mut bed = Bed::new().unwrap();
        let endpoint = bed.lasting_endpoint("t").unwrap();
        let running = outlive(&endpoint);
        bed.router().signal(signal);
        let ended = running.wait(DEADLINE).unwrap().success().unwrap();
        for said in [
            "completion event: flushed",
            "asynchronous event: device fatal",
            "polling: flushed",
            "control verb: EIO",
            "destroyed everything",
        ] {
            assert!(ended.stdout.contains(said), "no {said:?}: {ended}");
        }
        let status = bed.router().reap(DEADLINE).unwrap();
        assert_eq!(status.success(), signal == Signal::TERM, "{status}");
        // Another one serves the same directory.
        bed.restart().unwrap();
        let again = bed.lasting_endpoint("t").unwrap();
        drop(Rig::new(&again.socket, 4096).unwrap());
    }
}

#[test]
fn an_endpoint_that_is_removed_ends_its_programs_device() {
    let bed = Bed::new().unwrap();
    let endpoint = bed.lasting_endpoint("t").unwrap();
    let running = outlive(&endpoint);
    let name = endpoint.name;
    let removed = bed.control(Operation::RemoveEndpoint { name }).unwrap();
    assert_eq!(removed, ControlAnswer::Done);
    let ended = running.wait(DEADLINE).unwrap().success().unwrap();
    assert!(ended.stdout.contains("device fatal"), "{ended}");
}

/// The peer of a session that ended in any way gets what a dead NIC would give: after all retries
/// the error, then flushes.
#[test]
fn a_peer_that_is_gone_costs_all_retries_and_no_more() {
    let bed = Bed::new().unwrap();
    let (here, there) = (
        bed.lasting_endpoint("t").unwrap(),
        bed.lasting_endpoint("t").unwrap(),
    );
    let patience = Patience {
        timeout: 14,
        retry_cnt: 3,
        rnr_retry: 0,
    };
    let mut rig = Rig::new(&here.socket, 4096).unwrap();
    let mut peer = Rig::new(&there.socket, 4096).unwrap();
    let mut a = rig.qp(QpType::Rc, CAP).unwrap();
    let b = peer.qp(QpType::Rc, CAP).unwrap();
    rig.connect_with(&a, peer.gid(), b.qpn(), &patience)
        .unwrap();
    peer.connect(&b, rig.gid(), a.qpn()).unwrap();
    drop(peer);
    let gone = |status: &serde_json::Value| {
        let all = status["endpoints"].as_array();
        all.is_some_and(|all| {
            all.iter()
                .filter(|e| e["name"] == there.name.as_str())
                .all(|e| e["sessions"].as_array().is_some_and(Vec::is_empty))
        })
    };
    bed.wait_for_status(gone, DEADLINE).unwrap();
    let entry = SendEntry {
        opcode: Opcode::Send.raw() as u8,
        num_sge: 1,
        ..SendEntry::default()
    };
    let began = std::time::Instant::now();
    for _ in 0..3 {
        let sge = rig.sge(0, 64);
        rig.send(&mut a, &entry, &[sge]).unwrap();
    }
    let statuses: Vec<_> = (0..3)
        .map(|_| rig.completion(DEADLINE).unwrap().status)
        .collect();
    let expected = [
        WcStatus::RetryExcErr,
        WcStatus::WrFlushErr,
        WcStatus::WrFlushErr,
    ];
    assert_eq!(statuses, expected.map(|s| s.raw() as u8));
    // Not before each attempt had its time; how long after is the machine's affair.
    let least = timeout_ns(patience.timeout).unwrap() * (u64::from(patience.retry_cnt) + 1);
    let took = began.elapsed().as_nanos();
    assert!(took >= u128::from(least), "{took} ns, at least {least}");
}

#[test]
fn a_thousand_sessions_leave_nothing() {
    let mut bed = Bed::new().unwrap();
    let (a, b) = (
        bed.lasting_endpoint("t").unwrap(),
        bed.lasting_endpoint("t").unwrap(),
    );
    let victim = Victim::start(&a, &b).unwrap();
    victim.goes_on(3).unwrap();
    let pid = bed.router().pid();
    let before = Footprint::of(pid).unwrap();
    for round in 0..1000 {
        let raw = Raw::connect(&a.socket).unwrap();
        if round % 10 == 0 {
            let mut rig = Rig::new(&b.socket, 1 << 16).unwrap();
            let (x, y) = (
                rig.qp(QpType::Rc, CAP).unwrap(),
                rig.qp(QpType::Rc, CAP).unwrap(),
            );
            join((&rig, &x), (&rig, &y)).unwrap();
        }
        drop(raw);
    }
    before.wait_back(pid, DEADLINE).unwrap();
    victim.finish().unwrap();
}

/// A child holds the socket of its parent: the parent's death ends the session all the same.
#[test]
fn a_session_ends_with_its_process_though_a_child_holds_its_socket() {
    if !have("ib_send_bw") {
        return;
    }
    let bed = Bed::new().unwrap();
    let port = free_port().to_string();
    let endpoint = bed.lasting_endpoint("t").unwrap();
    let lib = freeflow_tests::dist().join("lib");
    let mut command = Command::new("ib_send_bw");
    command
        .args(["-p", &port])
        .env("FREEFLOW_ENDPOINT", &endpoint.socket)
        .env("LD_LIBRARY_PATH", lib);
    let mut server = Running::start(&mut command).unwrap();
    let port = port.parse().unwrap();
    assert!(wait_for_listener(port, DEADLINE, || server.is_alive()));
    let pid = server.pid();
    // This process holds every descriptor of the program, as a child of its `fork` would.
    let holder = hold_descriptors(pid);
    server.signal(Signal::KILL);
    server.reap(DEADLINE).unwrap();
    let gone = |status: &serde_json::Value| {
        let ended = status["ended_sessions"].as_array();
        ended.is_some_and(|all| all.iter().any(|e| e["reason"] == "process exited"))
    };
    bed.wait_for_status(gone, DEADLINE).unwrap();
    drop(holder);
}

/// Copies of all descriptors of a process, by pidfd.
fn hold_descriptors(pid: u32) -> Vec<std::os::fd::OwnedFd> {
    let process = Pid::from_raw(pid as i32).unwrap();
    let pidfd = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()).unwrap();
    let numbers = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let copy = |entry: std::io::Result<std::fs::DirEntry>| {
        let number: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let none = rustix::process::PidfdGetfdFlags::empty();
        rustix::process::pidfd_getfd(&pidfd, number, none).ok()
    };
    numbers.filter_map(copy).collect()
}

#[test]
fn a_client_that_is_stopped_for_a_while_goes_on() {
    if !have("ib_send_bw") {
        return;
    }
    let bed = Bed::new().unwrap();
    let port = free_port();
    let text = port.to_string();
    let args = ["-n", "20000", "-s", "4096", "-p", &text];
    let mut server = bed.endpoint().start("ib_send_bw", &args).unwrap();
    assert!(wait_for_listener(port, DEADLINE, || server.is_alive()));
    let mut all = args.to_vec();
    all.push("127.0.0.1");
    let client = bed.endpoint().start("ib_send_bw", &all).unwrap();
    let sent = |status: &serde_json::Value| {
        let all = status["endpoints"].as_array();
        let sent = |e: &serde_json::Value| e["counters"]["sent_messages"].as_u64() > Some(100);
        all.is_some_and(|all| all.iter().any(sent))
    };
    bed.wait_for_status(sent, DEADLINE).unwrap();
    let stop = |signal| {
        for pid in freeflow_tests::descendants(server.pid()) {
            if let Some(pid) = Pid::from_raw(pid as i32) {
                let _ = kill_process(pid, signal);
            }
        }
    };
    stop(Signal::STOP);
    // Others are served meanwhile.
    let other = bed.lasting_endpoint("t").unwrap();
    let raw = Raw::connect(&other.socket).unwrap();
    let answer = raw.ask(&freeflow_session::Request::OpenContext).unwrap();
    assert!(matches!(answer, Answer::Reply(..)), "{answer:?}");
    std::thread::sleep(std::time::Duration::from_secs(2));
    stop(Signal::CONT);
    client.wait(DEADLINE).unwrap().success().unwrap();
    server.wait(DEADLINE).unwrap().success().unwrap();
}
