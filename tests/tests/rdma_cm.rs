//! The connection manager: librdmacm's functions as C programs see them, and unmodified programs
//! that connect by it, on one host.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use freeflow_tests::{
    Bed, Checker, DEADLINE, Ended, Endpoint, Hosts, Running, count, free_port, have, skip,
    wait_for_listener_of,
};
use rustix::process::Signal;
use serde_json::Value;

fn bed() -> Bed {
    Bed::new().expect("a router starts")
}

fn checker() -> Option<Checker> {
    Checker::new("rdma_cm")
}

macro_rules! cases {
    ($($case:ident)*) => {
        $(#[test]
        fn $case() {
            if let Some(checker) = checker() {
                checker.holds(None, stringify!($case));
            }
        })*
    };
}

cases! {
    connection both_disconnect destroyed_end rejection nobody_listens synchronous names errors
    devices nonblocking migration acknowledgements own_queue_pairs datagrams multicast
    shared_receives forks
}

#[test]
fn a_thread_that_waits_for_events_is_told_that_the_router_died() {
    if let Some(checker) = checker() {
        checker.outlives_router(None, "router_dies");
    }
}

/// Starts a server, and waits until it is the bed's only listener. `IP` is its address.
fn serve(bed: &Bed, endpoint: &Endpoint<'_>, program: &str, args: &str) -> Running {
    let ip = endpoint.ip.to_string();
    let args = args.replace("IP", &ip);
    let args: Vec<_> = args.split_ascii_whitespace().collect();
    let mut server = endpoint.start(program, &args).unwrap();
    let listens = bed.wait_for_status(|status| count(status, "cm_listeners") != 0, DEADLINE);
    if let Err(e) = listens {
        server.signal(Signal::KILL);
        let _ = server.reap(DEADLINE);
        panic!(
            "{program} does not listen: {e:#}\n{}",
            server.wait(DEADLINE).unwrap()
        );
    }
    server
}

/// Starts a client. `PEER` is the server's address, `IP` its own.
fn start_client(at: &Endpoint<'_>, server: &Endpoint<'_>, program: &str, args: &str) -> Running {
    let args = args
        .replace("PEER", &server.ip.to_string())
        .replace("IP", &at.ip.to_string());
    let args: Vec<_> = args.split_ascii_whitespace().collect();
    at.start(program, &args).unwrap_or_else(|e| panic!("{e:#}"))
}

/// Runs a client to its end, which must be a good one; as [`start_client`].
fn client(bed: &Bed, server: &Endpoint<'_>, program: &str, args: &str) -> Ended {
    let running = start_client(&bed.endpoint(), server, program, args);
    let said = running.wait(DEADLINE).and_then(Ended::success);
    said.unwrap_or_else(|e| panic!("{e:#}"))
}

/// Both, to their ends; on the same host or on two.
fn pair_on(
    [there, here]: [&Bed; 2],
    programs: [&str; 2],
    server_args: &str,
    client_args: &str,
) -> [Ended; 2] {
    let endpoint = there.endpoint();
    let server = serve(there, &endpoint, programs[0], server_args);
    let client = client(here, &endpoint, programs[1], client_args);
    let server = server.wait(DEADLINE).and_then(Ended::success);
    let server = server.unwrap_or_else(|e| panic!("{e:#}\nclient: {client}"));
    [server, client]
}

/// As [`pair_on`], on one host of their own.
fn pair(programs: [&str; 2], server_args: &str, client_args: &str) -> [Ended; 2] {
    let bed = bed();
    pair_on([&bed, &bed], programs, server_args, client_args)
}

#[test]
fn rping_with_data_of_all_sizes() {
    if !have("rping") {
        return;
    }
    for size in [64, 100, 4096, 65_535] {
        let both = format!("-v -V -C 50 -S {size}");
        let [_, client] = pair(
            ["rping", "rping"],
            &format!("-s -a IP {both}"),
            &format!("-c -a PEER {both}"),
        );
        let pings = client
            .stdout
            .lines()
            .filter(|line| line.contains("ping data: rdma-ping"));
        assert_eq!(pings.count(), 50, "{client}");
    }
}

#[test]
fn rping_on_every_address_and_with_queue_pairs_of_its_own() {
    if !have("rping") {
        return;
    }
    pair(
        ["rping", "rping"],
        "-s -C 20 -V",
        "-c -a PEER -I IP -C 20 -V",
    );
    pair(
        ["rping", "rping"],
        "-s -a IP -q -C 20 -V",
        "-c -a PEER -q -C 20 -V",
    );
}

#[test]
fn endpoints_with_ipv6_addresses() {
    for (programs, server, client) in [
        (
            ["rping"; 2],
            "-s -a :: -C 20 -V",
            "-c -a PEER -I IP -C 20 -V",
        ),
        (
            ["rping"; 2],
            "-s -a IP -q -C 20 -V",
            "-c -a PEER -q -C 20 -V",
        ),
        (
            ["ucmatose"; 2],
            "-b IP -f ip6 -c 4",
            "-s PEER -b IP -f ip6 -c 4",
        ),
        (["udaddy"; 2], "-b IP -c 4", "-s PEER -b IP -c 4"),
        (["rdma_server", "rdma_client"], "-s IP", "-s PEER"),
    ] {
        if !programs.into_iter().all(have) {
            continue;
        }
        let bed = bed();
        let [mut there, mut here] = [bed.endpoint(), bed.endpoint()];
        (there.ip, here.ip) = ("fd00:77::1".parse().unwrap(), "fd00:77::2".parse().unwrap());
        let served = serve(&bed, &there, programs[0], server);
        for side in [start_client(&here, &there, programs[1], client), served] {
            let said = side.wait(DEADLINE).and_then(Ended::success);
            said.unwrap_or_else(|e| panic!("{programs:?}: {e:#}"));
        }
    }
}

/// A client that says what it does when it does it.
fn pinging(endpoint: &Endpoint<'_>, peer: &Endpoint<'_>, more: &[&str]) -> Running {
    let peer = peer.ip.to_string();
    let args = ["-oL", "rping", "-c", "-v", "-V", "-a", &peer];
    let running = endpoint
        .start("stdbuf", &[&args[..], more].concat())
        .unwrap();
    running.wait_for("ping data", DEADLINE).unwrap();
    running
}

/// One after the other connects: the program forgets a request if another comes at once.
#[test]
fn rping_with_several_clients_and_one_of_them_killed() {
    if !have("rping") || !have("stdbuf") {
        return;
    }
    let bed = bed();
    let endpoint = bed.endpoint();
    let mut server = serve(&bed, &endpoint, "rping", "-s -P -a IP -V");
    let others: Vec<_> = (0..4).map(|_| bed.endpoint()).collect();
    let running: Vec<_> = others
        .iter()
        .map(|e| pinging(e, &endpoint, &["-C", "3000"]))
        .collect();
    let mut victim = pinging(&bed.endpoint(), &endpoint, &[]);
    victim.kill_program().unwrap();
    for client in running {
        let client = client.wait(DEADLINE).and_then(Ended::success);
        client.unwrap_or_else(|e| panic!("{e:#}"));
    }
    // The server goes on.
    client(&bed, &endpoint, "rping", "-c -a PEER -V -C 10");
    assert!(server.is_alive());
}

/// The client of a server that is killed is told so.
fn killed([there, here]: [&Bed; 2]) {
    let endpoint = there.endpoint();
    let mut server = serve(there, &endpoint, "rping", "-s -a IP");
    let client = pinging(&here.endpoint(), &endpoint, &[]);
    server.kill_program().unwrap();
    let said = client.wait(DEADLINE).unwrap();
    let all = format!("{}{}", said.stdout, said.stderr);
    assert!(all.contains("DISCONNECT"), "{said}");
}

#[test]
fn a_server_that_is_killed_is_disconnected() {
    if have("rping") && have("stdbuf") {
        let bed = bed();
        killed([&bed, &bed]);
    }
}

#[test]
fn nobody_is_there() {
    if !have("rping") {
        return;
    }
    let bed = bed();
    let (there, here) = (bed.endpoint(), bed.endpoint());
    let try_to = |to: &str| {
        let args = ["-c", "-a", to, "-C", "1"];
        here.start("rping", &args).unwrap().wait(DEADLINE).unwrap()
    };
    // An endpoint where nobody listens.
    let lasting = ["sleep", "1000"];
    let _alive = there.start(lasting[0], &lasting[1..]).unwrap();
    bed.wait_for_status(
        |status| status.to_string().contains(&there.ip.to_string()),
        DEADLINE,
    )
    .unwrap();
    let said = try_to(&there.ip.to_string());
    assert!(
        said.stderr.contains("RDMA_CM_EVENT_REJECTED, error 8"),
        "{said}"
    );
    // An address that no endpoint has, and one outside.
    for address in [bed.endpoint().ip.to_string(), "192.0.2.77".to_owned()] {
        let said = try_to(&address);
        assert!(!said.status.success(), "{said}");
        assert!(said.stderr.contains("cma event RDMA_CM_EVENT_"), "{said}");
    }
}

#[test]
fn ucmatose() {
    if !have("ucmatose") {
        return;
    }
    for more in ["", "-m", "-P ib", "-a 14"] {
        let both = format!("-c 8 -C 50 -S 3000 {more}");
        let [server, client] = pair(["ucmatose", "ucmatose"], &both, &format!("{both} -s PEER"));
        for side in [server, client] {
            assert!(side.stdout.contains("return status 0"), "{side}");
        }
    }
}

#[test]
fn udaddy() {
    if !have("udaddy") {
        return;
    }
    for more in ["", "-P ipoib"] {
        let both = format!("-c 4 -C 20 -S 1000 {more}");
        let [server, client] = pair(["udaddy", "udaddy"], &both, &format!("{both} -s PEER"));
        for side in [server, client] {
            assert!(side.stdout.contains("return status 0"), "{side}");
        }
    }
}

#[test]
fn mckey() {
    if !have("mckey") || !have("stdbuf") {
        return;
    }
    let bed = bed();
    let (receiver, sender) = (bed.endpoint(), bed.endpoint());
    let start = |endpoint: &Endpoint<'_>, more: &[&str]| {
        let ip = endpoint.ip.to_string();
        let group = ["-oL", "mckey", "-m", "239.255.7.9", "-b", &ip];
        let load = ["-c", "2", "-C", "20", "-S", "900"];
        let args = [&group[..], &load, more].concat();
        endpoint.start("stdbuf", &args).unwrap()
    };
    let mut receiving = start(&receiver, &[]);
    receiving
        .wait_for("receiving data transfers", DEADLINE)
        .unwrap();
    // It ends without a look whether its datagrams have left: so again, until all have come.
    let until = Instant::now() + DEADLINE;
    while receiving.is_alive() && Instant::now() < until {
        let sending = start(&sender, &["-s", "-o"]).wait(DEADLINE).unwrap();
        assert!(sending.stdout.contains("return status 0"), "{sending}");
    }
    let said = receiving.wait(DEADLINE).and_then(Ended::success);
    let said = said.unwrap_or_else(|e| panic!("{e:#}"));
    assert!(said.stdout.contains("return status 0"), "{said}");
}

#[test]
fn endpoints_and_shared_receive_queues() {
    for (server, client, how) in [
        ("rdma_server", "rdma_client", ""),
        ("rdma_xserver", "rdma_xclient", "-c r"),
        ("rdma_xserver", "rdma_xclient", "-c x"),
    ] {
        if !have(server) || !have(client) {
            continue;
        }
        let [served, ended] = pair([server, client], how, &format!("-s PEER {how}"));
        for (side, name) in [(served, server), (ended, client)] {
            assert!(side.stdout.contains(&format!("{name}: end 0")), "{side}");
        }
    }
}

#[test]
fn cmtime() {
    if !have("cmtime") {
        return;
    }
    let bed = bed();
    let endpoint = bed.endpoint();
    // It serves until it is killed.
    let mut server = serve(&bed, &endpoint, "cmtime", "-b IP");
    let said = client(&bed, &endpoint, "cmtime", "-s PEER -b IP -c 200");
    assert!(!said.stdout.contains("error"), "{said}");
    assert!(said.stdout.contains("disconnect   :"), "{said}");
    // The other sides of the connections are gone too.
    bed.wait_for_status(|status| count(status, "cm_ids") == 1, DEADLINE)
        .unwrap();
    assert!(server.is_alive());
}

/// Runs both sides of a program of perftest's. Its client does not wait until its server listens
/// for the connections to measure, and does not survive being refused: then it is run again.
fn perftest([there, here]: [&Bed; 2], program: &str, way: &str) {
    const TRIES: usize = 20;
    let both = format!("-R {way}");
    for _ in 0..TRIES {
        let endpoint = there.endpoint();
        let server = serve(there, &endpoint, program, &both);
        let peer = endpoint.ip.to_string();
        let args: Vec<_> = both.split_ascii_whitespace().chain([&peer[..]]).collect();
        let client = here.endpoint().start(program, &args).unwrap();
        let client = client.wait(DEADLINE).unwrap();
        let refused = ["REJECTED; error: 8.", "UNREACHABLE; error: 1."];
        let refused = refused.map(|how| format!("Event: RDMA_CM_EVENT_{how}"));
        if refused.iter().any(|how| client.stderr.contains(how)) {
            drop(server);
            // The next client must not take its listener for the next server's.
            let none = |status: &Value| count(status, "cm_listeners") == 0;
            there.wait_for_status(none, DEADLINE).unwrap();
            continue;
        }
        let client = client.success().unwrap_or_else(|e| panic!("{e:#}"));
        assert!(client.stdout.contains("rdma_cm QPs\t : ON"), "{client}");
        let server = server.wait(DEADLINE).and_then(Ended::success);
        server.unwrap_or_else(|e| panic!("{e:#}"));
        return;
    }
    panic!("{program} {both}: its client was refused {TRIES} times");
}

#[test]
fn perftest_connects_by_the_connection_manager() {
    for (program, ways) in [
        (
            "ib_write_bw",
            &["-n 500", "-a -n 100", "-q 4 -n 200", "-T 104 -n 200"][..],
        ),
        ("ib_send_lat", &["-n 200", "-c UD -n 200", "-s 2048 -n 100"]),
        (
            "ib_send_bw",
            &["-c UD -s 1024 -n 500 -r 600", "-b -n 300", "-x 0 -n 200"],
        ),
        ("ib_read_lat", &["-n 200", "-o 1 -n 100"]),
        ("ib_atomic_bw", &["-n 200"]),
    ] {
        if !have(program) {
            continue;
        }
        for way in ways {
            let bed = bed();
            perftest([&bed, &bed], program, way);
        }
    }
}

#[test]
fn fio_reads_writes_and_sends() {
    if !have("fio") {
        return;
    }
    let port = free_port();
    let both = format!("--ioengine=rdma --port={port} --bs=16k --size=4m --name=x");
    for verb in ["write", "read", "send"] {
        // Its senders do not wait for receive requests, and do not repeat what found none: there
        // must be one for each message from the start.
        let [server, client] = pair(
            ["fio", "fio"],
            &format!("{both} --rw=read --iodepth=256"),
            &format!("{both} --hostname=PEER --verb={verb} --rw=write --iodepth=8"),
        );
        for side in [server, client] {
            assert!(side.stdout.contains("err= 0"), "{side}");
        }
    }
}

/// The router keeps nothing of programs that are gone.
fn nothing_is_left(bed: &Bed) {
    let gone = |status: &Value| count(status, "cm_ids") + count(status, "qps") == 0;
    bed.wait_for_status(gone, DEADLINE).unwrap();
}

/// It looks at no events of its connection: who sends finds out by its requests, when their retries
/// are exhausted. What it does then is its own affair.
#[test]
fn fio_whose_peer_is_killed_in_the_middle() {
    if !have("fio") {
        return;
    }
    let port = free_port();
    let both = format!("--ioengine=rdma --port={port} --bs=16k --size=64g --name=x");
    for verb in ["write", "read", "send"] {
        for server_dies in [true, false] {
            let bed = bed();
            let (there, here) = (bed.endpoint(), bed.endpoint());
            let receive = format!("{both} --rw=read --iodepth=256");
            let mut server = serve(&bed, &there, "fio", &receive);
            let send = format!("{both} --hostname=PEER --verb={verb} --rw=write --iodepth=8");
            let mut client = start_client(&here, &there, "fio", &send);
            let busy = |status: &Value| count(status, "sent_messages") > 100;
            bed.wait_for_status(busy, DEADLINE).unwrap();
            if server_dies {
                server.kill_program().unwrap();
                let told = client.wait_for("cq completion status", DEADLINE);
                told.unwrap_or_else(|e| panic!("{verb}: {e:#}"));
                client.kill_program().unwrap();
            } else {
                client.kill_program().unwrap();
                // The server's two are left.
                let two = |status: &Value| count(status, "cm_ids") <= 2;
                bed.wait_for_status(two, DEADLINE).unwrap();
                server.kill_program().unwrap();
            }
            nothing_is_left(&bed);
        }
    }
}

/// A program that runs as an endpoint in a network of its own.
fn private(bed: &Bed, ip: &str, command: &[&str]) -> Running {
    let network = ["run", "--network", "private", "--ip", ip, "--"];
    Running::start(bed.freeflow().args(network).args(command)).unwrap()
}

/// Its providers for connections ask for addresses of localhost, its datagrams for none.
#[test]
fn libfabric_over_each_of_its_endpoint_types() {
    if !have("fi_pingpong") {
        return;
    }
    let bed = bed();
    if !bed.has_private_networks("libfabric") {
        return;
    }
    for (provider, kind, more) in [
        ("verbs", "msg", &[][..]),
        ("verbs;ofi_rxm", "rdm", &[]),
        ("verbs;ofi_rxm", "rdm", &["-m", "tagged"]),
        ("verbs;ofi_rxd", "rdm", &[]),
        ("verbs", "dgram", &[]),
    ] {
        let port = free_port();
        let number = port.to_string();
        let common = ["fi_pingpong", "-p", provider, "-e", kind, "-I", "20", "-c"];
        let common = [&common[..], more].concat();
        let serve = [&common[..], &["-B", &number]].concat();
        let mut server = private(&bed, "10.78.2.1", &serve);
        assert!(wait_for_listener_of(&mut server, port, DEADLINE));
        let connect = [&common[..], &["-P", &number, "10.78.2.1"]].concat();
        let client = private(&bed, "10.78.2.2", &connect);
        for end in [client, server] {
            let said = end.wait(DEADLINE).unwrap();
            assert!(said.stdout.contains("4k "), "{provider} {kind}: {said}");
            // To a side that hears of the other's end before it has asked for its last completion,
            // rxm says that this was flushed: it destroys the queue pair first, and the completions
            // of that go with it.
            let late = provider.ends_with("rxm") && said.stderr.contains("Flushed Error");
            assert!(said.status.success() || late, "{provider} {kind}: {said}");
            assert!(!said.stdout.contains("rror"), "{provider} {kind}: {said}");
        }
    }
}

/// It measures datagrams by LIDs, which RoCE has not.
#[test]
fn qperf_connects_by_the_connection_manager() {
    if !have("qperf") {
        return;
    }
    let bed = bed();
    if !bed.has_private_networks("qperf by the connection manager") {
        return;
    }
    let port = free_port().to_string();
    let run = |ip, args: &[&str]| private(&bed, ip, &[&["qperf", "-lp", &port], args].concat());
    let mut server = run("10.78.1.1", &[]);
    let listening = port.parse().expect("a port");
    assert!(wait_for_listener_of(&mut server, listening, DEADLINE));
    let tests = [
        "-t",
        "1",
        "-cm",
        "1",
        "10.78.1.1",
        "rc_bw",
        "rc_lat",
        "rc_rdma_read_bw",
    ];
    let said = run("10.78.1.2", &tests)
        .wait(DEADLINE)
        .and_then(Ended::success);
    let said = said.unwrap_or_else(|e| panic!("{e:#}"));
    for test in &tests[5..] {
        assert!(said.stdout.contains(&format!("{test}:")), "{said}");
    }
    assert_eq!(said.stderr, "", "{said}");
}

/// How to run UCX's own example of a client and a server, over RC and UD with their addresses
/// exchanged by the connection manager. It is compiled into a directory; none if it cannot be here.
fn ucx(dir: &Path) -> Option<String> {
    const EXAMPLE: &str = "/usr/share/doc/libucx-dev/examples/ucp_client_server.c";
    if !have("gcc") {
        return None;
    }
    if !Path::new(EXAMPLE).is_file() {
        skip(
            "UCX by the connection manager",
            "libucx-dev is not installed",
        );
        return None;
    }
    let program = dir.join("ucp_client_server");
    let mut gcc = Command::new("gcc");
    gcc.arg("-O1")
        .arg("-o")
        .arg(&program)
        .args([EXAMPLE, "-lucp", "-lucs"]);
    let compiled = Running::start(&mut gcc).and_then(|gcc| gcc.wait(DEADLINE)?.success());
    compiled.expect("the example compiles");
    let program = program.to_str().expect("a path of text");
    let settings = [
        "UCX_SOCKADDR_TLS_PRIORITY=rdmacm",
        "UCX_TLS=rc,ud,self",
        "UCX_NET_DEVICES=freeflow0:1",
    ]
    .join(" ");
    Some(format!("{settings} {program}"))
}

#[test]
fn ucx_whose_peer_is_killed_in_the_middle() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let Some(program) = ucx(dir.path()) else {
        return;
    };
    if !have("stdbuf") {
        return;
    }
    let both = format!("-oL env {program} -c tag -i 100000000");
    for server_dies in [true, false] {
        let bed = bed();
        let (there, here) = (bed.endpoint(), bed.endpoint());
        let mut server = serve(&bed, &there, "stdbuf", &both);
        let mut client = start_client(&here, &there, "stdbuf", &format!("{both} -a PEER"));
        let busy = |status: &Value| count(status, "sent_messages") > 100;
        bed.wait_for_status(busy, DEADLINE).unwrap();
        let (victim, left) = if server_dies {
            (&mut server, &mut client)
        } else {
            (&mut client, &mut server)
        };
        victim.kill_program().unwrap();
        let told = left.wait_for("error handling callback was invoked", DEADLINE);
        told.unwrap_or_else(|e| panic!("server dies: {server_dies}: {e:#}"));
        if server_dies {
            assert!(!left.reap(DEADLINE).unwrap().success());
        } else {
            // It waits for the next client.
            let rest = |status: &Value| count(status, "cm_ids") == count(status, "cm_listeners");
            bed.wait_for_status(rest, DEADLINE).unwrap();
            left.kill_program().unwrap();
        }
        nothing_is_left(&bed);
    }
}

#[test]
fn ucx_wires_up_by_the_connection_manager() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let Some(program) = ucx(dir.path()) else {
        return;
    };
    for way in ["stream", "tag", "am"] {
        let bed = bed();
        let endpoint = bed.endpoint();
        let both = format!("{program} -c {way} -i 50");
        let mut server = serve(&bed, &endpoint, "env", &both);
        let said = client(&bed, &endpoint, "env", &format!("{both} -a PEER"));
        assert!(said.stdout.contains("Client: iteration #50"), "{said}");
        assert!(server.is_alive());
    }
}

/// Two hosts, with the server's first.
fn hosts(test: &str) -> Option<Hosts> {
    Hosts::can(test).then(|| Hosts::new(1500).expect("two hosts"))
}

#[test]
fn programs_on_two_hosts() {
    let Some(hosts) = hosts("the connection manager between hosts") else {
        return;
    };
    let beds = [hosts.bed(0), hosts.bed(1)];
    for (programs, server, client, said) in [
        (
            ["rping"; 2],
            "-s -a IP -C 30 -V -S 4000",
            "-c -a PEER -C 30 -V -S 4000",
            "",
        ),
        (
            ["ucmatose"; 2],
            "-c 8 -C 20 -S 3000",
            "-c 8 -C 20 -S 3000 -s PEER",
            "return status 0",
        ),
        (
            ["udaddy"; 2],
            "-c 4 -C 20 -S 900",
            "-c 4 -C 20 -S 900 -s PEER",
            "return status 0",
        ),
        (["rdma_server", "rdma_client"], "", "-s PEER", "end 0"),
        (
            ["rdma_xserver", "rdma_xclient"],
            "-c x",
            "-c x -s PEER",
            "end 0",
        ),
    ] {
        if programs.into_iter().all(have) {
            for side in pair_on(beds, programs, server, client) {
                assert!(side.stdout.contains(said), "{side}");
            }
        }
    }
    for (program, way) in [("ib_write_bw", "-n 300"), ("ib_send_lat", "-c UD -n 200")] {
        if have(program) {
            perftest(beds, program, way);
        }
    }
}

#[test]
fn nobody_listens_on_another_host() {
    let Some(hosts) = hosts("a closed port on another host") else {
        return;
    };
    if !have("rping") {
        return;
    }
    let there = hosts.bed(0).lasting_endpoint("default").unwrap();
    let ip = hosts.bed(0).status().unwrap()["endpoints"][0]["ip"].clone();
    let ip = ip
        .as_str()
        .unwrap_or_else(|| panic!("no address of {}", there.name));
    let args = ["-c", "-a", ip, "-C", "1"];
    let said = hosts.bed(1).endpoint().start("rping", &args).unwrap();
    let said = said.wait(DEADLINE).unwrap();
    assert!(
        said.stderr.contains("RDMA_CM_EVENT_REJECTED, error 8"),
        "{said}"
    );
}

#[test]
fn a_server_on_another_host_that_is_killed_is_disconnected() {
    let Some(hosts) = hosts("a killed server on another host") else {
        return;
    };
    if have("rping") && have("stdbuf") {
        killed([hosts.bed(0), hosts.bed(1)]);
    }
}
