//! Shared receive queues and XRC, by unmodified programs: Debian's pingpongs and perftest, and
//! UCX, whose reliable connections all receive from one queue.

use freeflow_tests::{Bed, DEADLINE, Ended, Running, free_port, have, wait_for_listener};

fn bed() -> Bed {
    Bed::new().expect("a router starts")
}

/// Neither side says that anything went wrong.
fn assert_content(what: &str, sides: &[&Ended]) {
    for side in sides {
        let said = format!("{}{}", side.stdout, side.stderr).to_lowercase();
        for bad in [
            "failed",
            "error",
            "couldn't",
            "unable",
            "invalid data",
            "no version information",
        ] {
            assert!(!said.contains(bad), "{what}: {side}");
        }
    }
}

#[test]
fn srq_pingpong() {
    let program = "ibv_srq_pingpong";
    if !have(program) {
        return;
    }
    let bed = bed();
    for way in [
        "-n 5000",
        "-n 5000 -e",
        "-n 1000 -q 1",
        "-n 3000 -q 32",
        "-n 3000 -q 32 -e",
        "-n 500 -s 1048576",
        "-n 2000 -q 100 -r 200 -s 1",
    ] {
        let mut args = vec!["-g", "0", "-c"];
        args.extend(way.split_ascii_whitespace());
        let (server, client) = bed.pair(program, &args).unwrap();
        assert_content(way, &[&server, &client]);
        for side in [server, client] {
            assert!(side.stdout.contains("iters in"), "{way}: {side}");
        }
    }
}

/// The server answers each client's queue over the connections of all of them in turn, so that
/// messages for one process's queue arrive at another process's queue pair.
fn xsrq(bed: &Bed, clients: u32, more: &str) {
    let program = "ibv_xsrq_pingpong";
    let port = free_port().to_string();
    let (near, far) = (bed.endpoint(), bed.endpoint());
    let clients = clients.to_string();
    let mut args = vec!["-g", "0", "-p", &port, "-c", &clients];
    args.extend(more.split_ascii_whitespace());
    let mut server = near.start(program, &args).unwrap();
    let listens = wait_for_listener(port.parse().unwrap(), DEADLINE, || server.is_alive());
    assert!(listens, "{}", server.wait(DEADLINE).unwrap());
    // They share one domain: one endpoint, and a file that the program names.
    let script = format!(
        "for i in $(seq {clients}); do {program} -g 0 -p {port} {more} 127.0.0.1 & \
         all=\"$all $!\"; done; for one in $all; do wait $one || exit 1; done"
    );
    let all = far.start("sh", &["-c", &script]).unwrap().wait(DEADLINE);
    if all.is_err() {
        server.signal(rustix::process::Signal::TERM);
    }
    let server = server.wait(DEADLINE).unwrap();
    let all = all.unwrap_or_else(|e| panic!("{e}\nserver: {server}"));
    assert_content(more, &[&server, &all]);
    let successes = all.stdout.matches("success").count();
    assert_eq!(successes.to_string(), clients, "{all}");
    assert!(server.stdout.contains("success"), "{server}");
    assert!(server.status.success() && all.status.success());
}

#[test]
fn xsrq_pingpong() {
    if have("ibv_xsrq_pingpong") {
        let bed = bed();
        xsrq(&bed, 1, "-n 3000");
        xsrq(&bed, 1, "-n 1000 -e");
        xsrq(&bed, 2, "-n 500 -s 100000");
        xsrq(&bed, 5, "-n 1000");
        xsrq(&bed, 5, "-n 300 -e");
    }
}

/// Runs a program of perftest in all these ways.
fn perftest(program: &str, ways: &[&str]) {
    if !have(program) {
        return;
    }
    let bed = bed();
    for way in ways {
        let args: Vec<_> = way.split_ascii_whitespace().collect();
        let (server, client) = bed.pair(program, &args).unwrap();
        let figures = client.stdout.lines().any(|line| {
            let mut words = line.split_ascii_whitespace();
            words.next().is_some_and(|w| w.parse::<u64>().is_ok()) && words.count() >= 4
        });
        assert!(figures, "{program} {way}: no figures in {client}");
        assert_content(&format!("{program} {way}"), &[&server, &client]);
    }
}

#[test]
fn perftest_with_a_shared_queue() {
    perftest(
        "ib_send_bw",
        &[
            "--use-srq -s 1048576 -n 100",
            "--use-srq -q 16 -s 4096 -n 500",
            "--use-srq -q 16 -b -s 1024 -n 300",
            "--use-srq -q 4 -e -s 4096 -n 500",
            "--use-srq -r 1024 -s 64 -n 5000",
            "--use-srq -c UD -s 1024 -n 1000",
        ],
    );
    perftest(
        "ib_send_lat",
        &[
            "--use-srq -s 4096 -n 500",
            "--use-srq -e -s 64 -n 1000",
            "--use-srq -c UD -s 64 -n 1000",
        ],
    );
}

#[test]
fn perftest_over_xrc() {
    perftest(
        "ib_send_bw",
        &[
            "-c XRC -s 1048576 -n 100",
            "-c XRC -q 8 -s 4096 -n 500",
            "-c XRC -q 4 -b -n 300",
            "-c XRC -e -n 500",
        ],
    );
    perftest(
        "ib_send_lat",
        &["-c XRC -s 1048576 -n 100", "-c XRC -e -s 64 -n 200"],
    );
    perftest(
        "ib_write_bw",
        &["-c XRC -s 1048576 -n 100", "-c XRC -q 8 -b -n 300"],
    );
    perftest("ib_write_lat", &["-c XRC -s 64 -n 500"]);
    perftest(
        "ib_read_bw",
        &["-c XRC -s 1048576 -n 100", "-c XRC -q 4 -n 200"],
    );
    perftest("ib_read_lat", &["-c XRC -s 64 -n 1000"]);
    perftest(
        "ib_atomic_bw",
        &["-c XRC -n 1000", "-c XRC -A CMP_AND_SWAP -n 500"],
    );
    perftest("ib_atomic_lat", &["-c XRC -n 500"]);
}

/// Nobody waits for a dead router, although nobody flushes what is posted on a shared queue.
#[test]
fn programs_end_when_the_router_dies() {
    for (program, more) in [
        ("ib_send_lat", "--use-srq"),
        ("ib_send_lat", "--use-srq -e"),
        ("ib_send_bw", "--use-srq -q 4"),
        ("ib_send_lat", "-c XRC"),
    ] {
        if !have(program) {
            continue;
        }
        let mut bed = bed();
        let port = free_port().to_string();
        // More than the longest wait has time for.
        let mut args = vec!["-n", "100000000", "-s", "64", "-p", &port];
        args.extend(more.split_ascii_whitespace());
        let (near, far) = (bed.endpoint(), bed.endpoint());
        let mut server = near.start(program, &args).unwrap();
        let listens = wait_for_listener(port.parse().unwrap(), DEADLINE, || server.is_alive());
        assert!(listens, "{}", server.wait(DEADLINE).unwrap());
        args.push("127.0.0.1");
        let client = far.start(program, &args).unwrap();
        let flows = |status: &serde_json::Value| {
            let sent = |e: &serde_json::Value| e["counters"]["sent_messages"].as_u64();
            let all = status["endpoints"].as_array();
            all.is_some_and(|all| all.iter().any(|e| sent(e).is_some_and(|n| n > 1000)))
        };
        bed.wait_for_status(flows, DEADLINE).unwrap();
        bed.router().signal(rustix::process::Signal::KILL);
        for side in [client, server] {
            let ended = side.wait(DEADLINE).unwrap();
            assert!(!ended.status.success(), "{program} {more}: {ended}");
        }
    }
}

/// UCX on the endpoint's device alone. `rc_v` is its name for rc_verbs with the datagrams that its
/// connections are set up by.
fn ucx(bed: &Bed, transports: &str, args: &[&str]) {
    let (near, far) = (bed.endpoint(), bed.endpoint());
    let port = free_port().to_string();
    let start = |endpoint: &freeflow_tests::Endpoint<'_>, args: &[&str]| -> Running {
        let mut command = endpoint.command("ucx_perftest", args);
        command
            .env("UCX_TLS", transports)
            .env("UCX_NET_DEVICES", "freeflow0:1");
        Running::start(&mut command).unwrap()
    };
    let mut server = start(&near, &["-p", &port]);
    let listens = wait_for_listener(port.parse().unwrap(), DEADLINE, || server.is_alive());
    assert!(listens, "{}", server.wait(DEADLINE).unwrap());
    let mut all = vec!["127.0.0.1", "-p", &port];
    all.extend(args);
    let client = start(&far, &all).wait(DEADLINE);
    let what = format!("{transports} {args:?}");
    if client.as_ref().is_ok_and(|c| c.status.success()) {
        let (client, server) = (client.unwrap(), server.wait(DEADLINE).unwrap());
        assert!(client.stdout.contains("Final:"), "{what}: {client}");
        assert!(server.status.success(), "{what}: {server}");
        assert_content(&what, &[&client]);
        return;
    }
    server.signal(rustix::process::Signal::TERM);
    let server = server.wait(DEADLINE).unwrap();
    match client {
        Ok(client) => panic!("{what}: {client}\nserver: {server}"),
        Err(e) => panic!("{what}: {e}\nserver: {server}"),
    }
}

#[test]
fn ucx_finds_the_device() {
    if !have("ucx_info") {
        return;
    }
    let bed = bed();
    let said = bed.endpoint().run("ucx_info", &["-d"]).unwrap();
    for transport in ["rc_verbs", "ud_verbs"] {
        let device = format!("Transport: {transport}\n#         Device: freeflow0:1");
        assert!(said.stdout.contains(&device), "no {transport} in {said}");
    }
}

/// UCP's tests; the second figure of each is for a size at which data goes by another protocol.
const UCP: [&str; 15] = [
    "tag_lat",
    "tag_bw",
    "tag_sync_lat",
    "tag_sync_bw",
    "ucp_put_lat",
    "ucp_put_bw",
    "ucp_get",
    "ucp_add",
    "ucp_fadd",
    "ucp_swap",
    "ucp_cswap",
    "stream_bw",
    "stream_lat",
    "ucp_am_lat",
    "ucp_am_bw",
];

fn ucp(transports: &str) {
    if !have("ucx_perftest") {
        return;
    }
    let bed = bed();
    for test in UCP {
        ucx(&bed, transports, &["-t", test, "-n", "500", "-w", "20"]);
        let atomic = test.contains("add") || test.contains("swap");
        if !atomic {
            for size in ["8192", "262144"] {
                let args = ["-t", test, "-s", size, "-n", "50", "-w", "5"];
                ucx(&bed, transports, &args);
            }
        }
    }
}

#[test]
fn ucp_over_reliable_connections() {
    ucp("rc_v");
}

#[test]
fn ucp_over_datagrams() {
    ucp("ud_verbs");
}

/// UCT's tests of what the transport has: verbs have no remote swap, and datagrams no remote
/// memory at all.
#[test]
fn uct() {
    if !have("ucx_perftest") {
        return;
    }
    let bed = bed();
    let rc = [
        "am_lat",
        "am_lat -D bcopy -s 1024",
        "am_lat -D zcopy -s 1024",
        "am_bw",
        "am_bw -D bcopy -s 4096",
        "am_bw -D zcopy -s 4096",
        "put_lat",
        "put_bw",
        "put_bw -D bcopy -s 4096",
        "put_bw -D zcopy -s 65536",
        "get -D bcopy -s 1024",
        "get -D zcopy -s 65536",
        "add_lat",
        "add_mr",
        "fadd",
        "cswap",
    ];
    let ud = [
        "am_lat",
        "am_lat -D bcopy -s 1024",
        "am_lat -D zcopy -s 1024",
        "am_bw",
        "am_bw -D bcopy -s 1024",
        "am_bw -D zcopy -s 1024",
    ];
    for (transport, tests) in [("rc_verbs", &rc[..]), ("ud_verbs", &ud[..])] {
        for test in tests {
            let mut args = vec![
                "-d",
                "freeflow0:1",
                "-x",
                transport,
                "-n",
                "500",
                "-w",
                "20",
                "-t",
            ];
            args.extend(test.split_ascii_whitespace());
            ucx(&bed, transport, &args);
        }
    }
}
