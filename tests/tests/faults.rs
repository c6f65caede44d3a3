//! Clients and routers that die, with real programs.

use std::process::Command;
use std::time::Duration;

use freeflow_tests::{Bed, DEADLINE, Running, free_port, have, wait_for_listener};
use rustix::process::{Pid, Signal, kill_process};

/// What a process holds of the router's: descriptors, and mappings of shared memory.
fn held(pid: u32) -> (usize, usize) {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    (fds, maps.matches("memfd:freeflow").count())
}

/// The programs that `freeflow run` has started.
fn children(run: &Running) -> Vec<u32> {
    let pid = run.pid();
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    list.unwrap_or_default()
        .split_ascii_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn kill_children(run: &Running) {
    for pid in children(run) {
        if let Some(pid) = Pid::from_raw(pid as i32) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn has_no_endpoints(status: &serde_json::Value) -> bool {
    status["endpoints"].as_array().is_some_and(Vec::is_empty)
}

/// A server and a client that would go on for long, on two endpoints.
fn long(bed: &Bed, program: &str, args: &[&str]) -> (Running, Running) {
    let port = free_port();
    let text = port.to_string();
    let mut all = vec!["-n", "100000000", "-p", &text];
    all.extend(args);
    let mut server = bed.endpoint().start(program, &all).unwrap();
    assert!(wait_for_listener(port, DEADLINE, || server.is_alive()));
    all.push("127.0.0.1");
    let client = bed.endpoint().start(program, &all).unwrap();
    (server, client)
}

/// Waits until one of the endpoints has sent many messages.
fn wait_for_traffic(bed: &Bed) {
    let sent = |e: &serde_json::Value| e["counters"]["sent_messages"].as_u64() > Some(1000);
    let any = |status: &serde_json::Value| {
        status["endpoints"]
            .as_array()
            .is_some_and(|all| all.iter().any(sent))
    };
    bed.wait_for_status(any, DEADLINE).unwrap();
}

/// One side sends without a pause; waiting for completions by polling, or for their events.
const SENDERS: [(&str, &[&str]); 3] = [
    ("ib_write_bw", &[]),
    ("ib_send_bw", &[]),
    ("ib_send_bw", &["-e"]),
];

/// Numbers that differ from run to run: which instruction a kill meets is a matter of chance.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

#[test]
fn killed_clients_leave_nothing_behind() {
    const ROUNDS: u32 = 50;
    const AT_ONCE: usize = 4;
    if !have("ibv_rc_pingpong") {
        return;
    }
    let mut bed = Bed::new().unwrap();
    let router = bed.router().pid();
    let before = held(router);
    for _ in 0..ROUNDS {
        let pairs: Vec<_> = (0..AT_ONCE)
            .map(|n| {
                let args: &[&str] = if n % 2 == 0 {
                    &["-g", "0"]
                } else {
                    &["-g", "0", "-e"]
                };
                long(&bed, "ibv_rc_pingpong", args)
            })
            .collect();
        std::thread::sleep(Duration::from_millis(random() % 120));
        // One side first, the other when the first may or may not have been missed.
        for (server, client) in &pairs {
            kill_children(if random().is_multiple_of(2) {
                server
            } else {
                client
            });
        }
        std::thread::sleep(Duration::from_millis(random() % 20));
        for (server, client) in pairs {
            kill_children(&server);
            kill_children(&client);
            for side in [server, client] {
                side.wait(DEADLINE).unwrap();
            }
        }
        bed.wait_for_status(has_no_endpoints, DEADLINE).unwrap();
    }
    let after = held(router);
    assert_eq!(after.1, before.1, "mappings of shared memory");
    assert!(
        after.0 <= before.0 + 1,
        "descriptors: {before:?}, now {after:?}"
    );
    bed.pair("ibv_rc_pingpong", &["-g", "0"]).unwrap();
}

#[test]
fn the_peer_of_a_killed_client_runs_out_of_retries() {
    if !have("ib_send_bw") {
        return;
    }
    let bed = Bed::new().unwrap();
    for (program, args) in SENDERS {
        let (server, client) = long(&bed, program, args);
        wait_for_traffic(&bed);
        kill_children(&server);
        let ended = client.wait(DEADLINE).unwrap();
        assert_ne!(ended.code(), 0, "{ended}");
        // IBV_WC_RETRY_EXC_ERR
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(said.contains("Failed status 12"), "{ended}");
        server.wait(DEADLINE).unwrap();
        bed.wait_for_status(has_no_endpoints, DEADLINE).unwrap();
    }
}

#[test]
fn programs_end_when_their_router_is_killed_and_another_serves() {
    if !have("ib_send_bw") {
        return;
    }
    for (program, args) in SENDERS {
        let mut bed = Bed::new().unwrap();
        let (server, client) = long(&bed, program, args);
        wait_for_traffic(&bed);
        bed.router().signal(Signal::KILL);
        let ended = client.wait(DEADLINE).unwrap();
        assert_ne!(ended.code(), 0, "{ended}");
        // A server that only waits to be told is told by its peer's end, or not at all.
        drop(server);
        let again = Running::start(bed.freeflow().arg("router")).unwrap();
        again.wait_for("router serves", DEADLINE).unwrap();
        let said = bed.endpoint().run("ibv_devices", &[]).unwrap();
        assert!(said.stdout.contains("freeflow0"), "{said}");
    }
}

#[test]
fn garbage_on_an_endpoints_socket_harms_nobody() {
    use rustix::net::*;
    let bed = Bed::new().unwrap();
    let args = ["endpoint", "create", "target", "--ip", "10.77.0.9"];
    bed.call(&args).unwrap().success().unwrap();
    let path = bed.dir().join("endpoints/target.sock");
    let address = SocketAddrUnix::new(&path).unwrap();
    let dial = || {
        let kind = SocketType::SEQPACKET;
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &address).map(|()| socket)
    };
    for n in 0..300u64 {
        let Ok(socket) = dial() else { continue };
        let len = random() as usize % if n % 10 == 0 { 100_000 } else { 64 };
        let bytes: Vec<u8> = (0..len).map(|_| random() as u8).collect();
        let _ = send(&socket, &bytes, SendFlags::NOSIGNAL);
    }
    // Connections that say nothing are bounded and do not keep others out for ever.
    let silent: Vec<_> = (0..200).map(|_| dial()).collect();
    drop(silent);
    let mut command = Command::new("ibv_devices");
    if have("ibv_devices") {
        let lib = freeflow_tests::dist().join("lib");
        command
            .env("FREEFLOW_ENDPOINT", &path)
            .env("LD_LIBRARY_PATH", lib);
        let ended = Running::start(&mut command)
            .unwrap()
            .wait(DEADLINE)
            .unwrap();
        assert!(ended.stdout.contains("freeflow0"), "{ended}");
        bed.pair("ibv_rc_pingpong", &["-g", "0"]).unwrap();
    }
}
