//! The connection manager between two hosts: unmodified programs that know each other by it alone.

use freeflow_tests::{DEADLINE, Ended, Endpoint, Hosts, Running, have};
use rustix::process::Signal;
use serde_json::Value;

const MTU: u32 = 1500;

fn hosts(test: &str) -> Option<Hosts> {
    Hosts::can(test).then(|| Hosts::new(MTU).unwrap())
}

fn listeners(status: &Value) -> u64 {
    let endpoints = status["endpoints"].as_array().into_iter().flatten();
    let sessions = endpoints.filter_map(|e| e["sessions"].as_array()).flatten();
    sessions.filter_map(|s| s["cm_listeners"].as_u64()).sum()
}

fn start(endpoint: &Endpoint<'_>, program: &str, args: &str, peer: &Endpoint<'_>) -> Running {
    let args = args
        .replace("PEER", &peer.ip.to_string())
        .replace("IP", &endpoint.ip.to_string());
    let args: Vec<_> = args.split_ascii_whitespace().collect();
    endpoint.start(program, &args).unwrap()
}

/// Starts a server on the first host, and waits until it listens. `IP` is its address.
fn serve(hosts: &Hosts, endpoint: &Endpoint<'_>, program: &str, args: &str) -> Running {
    // The one before is gone.
    let none = |status: &Value| listeners(status) == 0;
    hosts.bed(0).wait_for_status(none, DEADLINE).unwrap();
    let mut server = start(endpoint, program, args, endpoint);
    let listens = |status: &Value| listeners(status) != 0;
    if let Err(e) = hosts.bed(0).wait_for_status(listens, DEADLINE) {
        server.signal(Signal::KILL);
        let _ = server.reap(DEADLINE);
        panic!("{program}: {e:#}\n{}", server.wait(DEADLINE).unwrap());
    }
    server
}

fn good(what: &str, running: Running) -> Ended {
    let ended = running.wait(DEADLINE).and_then(Ended::success);
    ended.unwrap_or_else(|e| panic!("{what}: {e:#}"))
}

/// A server on the first host, a client on the second, both to their ends. `PEER` is the server's
/// address.
fn pair(hosts: &Hosts, program: &str, server: &str, client: &str) -> [Ended; 2] {
    let ends = [hosts.bed(0).endpoint(), hosts.bed(1).endpoint()];
    let serving = serve(hosts, &ends[0], program, server);
    let client = good(program, start(&ends[1], program, client, &ends[0]));
    [good(program, serving), client]
}

#[test]
fn programs_connect_and_exchange_datagrams() {
    let Some(hosts) = hosts("programs_connect_and_exchange_datagrams") else {
        return;
    };
    for (program, server, client) in [
        ("rping", "-s -a IP -V -C 50", "-c -a PEER -V -C 50"),
        (
            "rping",
            "-s -V -C 5 -S 65535",
            "-c -a PEER -V -C 5 -S 65535",
        ),
        (
            "ucmatose",
            "-c 8 -C 20 -S 3000",
            "-c 8 -C 20 -S 3000 -s PEER",
        ),
        ("udaddy", "-c 4 -C 20 -S 900", "-c 4 -C 20 -S 900 -s PEER"),
    ] {
        if have(program) {
            pair(&hosts, program, server, client);
        }
    }
}

#[test]
fn connections_come_about_although_packets_are_lost() {
    let Some(hosts) = hosts("connections_come_about_although_packets_are_lost") else {
        return;
    };
    if !have("ucmatose") || !have("nft") {
        return;
    }
    for host in [0, 1] {
        hosts.lose(host, 50).unwrap();
    }
    pair(&hosts, "ucmatose", "-c 10 -C 2", "-c 10 -C 2 -s PEER");
    assert_ne!(hosts.lost(0).unwrap() + hosts.lost(1).unwrap(), 0);
}

#[test]
fn nobody_listens() {
    let Some(hosts) = hosts("nobody_listens") else {
        return;
    };
    if !have("rping") {
        return;
    }
    let ends = [hosts.bed(0).endpoint(), hosts.bed(1).endpoint()];
    let mut alive = ends[0].start("sleep", &["1000"]).unwrap();
    let ip = ends[0].ip.to_string();
    let there = |status: &Value| status.to_string().contains(&ip);
    hosts.bed(0).wait_for_status(there, DEADLINE).unwrap();
    let client = start(&ends[1], "rping", "-c -a PEER -C 1", &ends[0]);
    let said = client.wait(DEADLINE).unwrap();
    let refused = "RDMA_CM_EVENT_REJECTED, error 8";
    assert!(said.stderr.contains(refused), "{said}");
    alive.signal(Signal::KILL);
    alive.reap(DEADLINE).unwrap();
}

#[test]
fn a_peer_that_is_killed_is_disconnected() {
    let Some(hosts) = hosts("a_peer_that_is_killed_is_disconnected") else {
        return;
    };
    if !have("rping") || !have("stdbuf") {
        return;
    }
    for victim in [0, 1] {
        let ends = [hosts.bed(0).endpoint(), hosts.bed(1).endpoint()];
        let server = serve(&hosts, &ends[0], "stdbuf", "-oL rping -s -a IP -v");
        let client = start(&ends[1], "stdbuf", "-oL rping -c -a PEER -v", &ends[0]);
        client.wait_for("ping data", DEADLINE).unwrap();
        let mut both = [server, client];
        both[victim].kill_program().unwrap();
        let [server, client] = both;
        let said = if victim == 0 { client } else { server }
            .wait(DEADLINE)
            .unwrap();
        let told = said.stdout.contains("DISCONNECT") || said.stderr.contains("DISCONNECT");
        assert!(told, "{said}");
    }
}
