//! Two hosts: unmodified programs over RoCEv2 between two routers.

use std::time::Duration;

use freeflow_tests::{DEADLINE, Ended, Hosts, Running, Underlay, dist, have, perftest, skip};

/// The whole conformance suite, on a slow machine.
const LIMIT: Duration = Duration::from_secs(900);

/// What the hosts are connected by: addresses of the routers, and bytes of IP packets.
const LINKS: [(Underlay, u32); 3] = [
    (Underlay::V4, 1500),
    (Underlay::V4, 9000),
    (Underlay::V6, 1500),
];

fn hosts(test: &str, (underlay, mtu): (Underlay, u32)) -> Option<Hosts> {
    Hosts::can(test).then(|| Hosts::over(underlay, mtu, &[]).unwrap())
}

fn pingpong(hosts: &Hosts, program: &str, args: &[&str]) {
    let mut all = vec!["-g", "0", "-c"];
    all.extend(args);
    let (_, client) = hosts.pair(program, &all).unwrap();
    assert!(client.stdout.contains(" iters in "), "{client}");
}

fn ways(hosts: &Hosts, program: &str, ways: &[&str]) {
    perftest::ways(program, ways, |program, args| hosts.pair(program, args));
}

/// A test over each of the links.
macro_rules! each_link {
    ($name:ident, $hosts:ident => $body:block) => {
        #[test]
        fn $name() {
            for link in LINKS {
                println!("{link:?}");
                let Some($hosts) = hosts(stringify!($name), link) else {
                    return;
                };
                $body
            }
        }
    };
}

each_link!(pingpongs, hosts => {
    for program in ["ibv_rc_pingpong", "ibv_uc_pingpong"] {
        if have(program) {
            for args in [&[][..], &["-e"], &["-s", "1048576", "-n", "50"], &["-m", "256"]] {
                pingpong(&hosts, program, args);
            }
        }
    }
});

each_link!(shared_queues, hosts => {
    for (program, said) in [("ibv_srq_pingpong", " iters in "), ("ibv_xsrq_pingpong", "success")] {
        if have(program) {
            let (_, client) = hosts.pair(program, &["-g", "0", "-n", "500"]).unwrap();
            assert!(client.stdout.contains(said), "{client}");
        }
    }
});

each_link!(sends, hosts => {
    ways(&hosts, "ib_send_bw", &[
        "-a -n 100",
        "-c UC -s 4096 -n 1000 -r 1024",
        "-b -n 300",
        "-e -n 300",
        "-q 8 -n 200",
        "-q 8 -b -e -s 1024 -n 300",
        "-I 64 -s 64 -n 2000",
        "-l 8 -s 512 -n 2000",
        "-l 32 --recv_post_list=32 -s 64 -n 3200",
        "-s 1048576 -n 50",
    ]);
    ways(&hosts, "ib_send_lat", &["-a -n 50", "-c UC -a -n 50", "-e -s 64 -n 500", "-I 220 -s 220 -n 500"]);
});

each_link!(writes, hosts => {
    ways(&hosts, "ib_write_bw", &[
        "-a -n 100",
        "-c UC -a -n 100",
        "-b -a -n 20",
        "-q 8 -n 200",
        "-I 64 -s 64 -n 2000",
        "-l 16 -s 64 -n 2000",
        "-s 1048576 -n 50",
    ]);
    ways(&hosts, "ib_write_lat", &["-a -n 50", "-I 64 -s 64 -n 500"]);
});

each_link!(reads_and_atomics, hosts => {
    ways(&hosts, "ib_read_bw", &["-a -n 100", "-b -n 300", "-e -n 300", "-q 8 -n 100", "-o 1 -s 64 -n 500", "-l 4 -s 64 -n 1000"]);
    ways(&hosts, "ib_atomic_bw", &["-n 1000", "-A CMP_AND_SWAP -n 1000", "-b -n 500", "-q 8 -n 200"]);
    ways(&hosts, "ib_read_lat", &["-a -n 50", "-e -s 64 -n 500"]);
    ways(&hosts, "ib_atomic_lat", &["-n 500", "-A CMP_AND_SWAP -n 500", "-e -n 500"]);
});

each_link!(nothing_is_lost_when_packets_are, hosts => {
    if !have("nft") {
        return;
    }
    for (n, of_1000) in [10, 50].into_iter().enumerate() {
        for host in [0, 1] {
            if n != 0 {
                hosts.shell(host, "nft delete table inet loss").unwrap();
            }
            if let Err(e) = hosts.lose(host, of_1000) {
                return skip("loss between hosts", &format!("{e:#}"));
            }
        }
        pingpong(&hosts, "ibv_rc_pingpong", &["-n", "300", "-s", "65536"]);
        pingpong(&hosts, "ibv_rc_pingpong", &["-n", "1000"]);
        ways(&hosts, "ib_write_bw", &["-n 200 -s 65536"]);
        ways(&hosts, "ib_read_bw", &["-n 200 -s 65536"]);
        ways(&hosts, "ib_atomic_bw", &["-n 300"]);
        for host in [0, 1] {
            assert_ne!(hosts.lost(host).unwrap(), 0);
        }
    }
});

each_link!(datagrams, hosts => {
    if have("ibv_ud_pingpong") {
        // A datagram is as long as the link's packets allow.
        pingpong(&hosts, "ibv_ud_pingpong", &["-s", "1024"]);
        pingpong(&hosts, "ibv_ud_pingpong", &["-s", "1", "-e"]);
    }
    ways(&hosts, "ib_send_lat", &["-c UD -s 64 -n 500", "-c UD -s 1024 -n 500", "-c UD -e -s 64 -n 300", "-c UD -I 64 -s 64 -n 300"]);
    // No more than the receiver has room for from the beginning: nothing holds a sender back.
    ways(&hosts, "ib_send_bw", &["-c UD -s 64 -n 400 -r 512 -N", "-c UD -s 1024 -n 400 -r 512 -N"]);
});

#[test]
fn the_port_is_as_wide_as_the_link() {
    if !have("ibv_devinfo") {
        return;
    }
    for (underlay, mtu, active, status) in [
        (Underlay::V4, 1500, "1024 (3)", 1024),
        (Underlay::V4, 9000, "4096 (5)", 4096),
        (Underlay::V6, 1500, "1024 (3)", 1024),
        // What the headers of IPv4 leave room for, and those of IPv6 do not.
        (Underlay::V4, 4180, "4096 (5)", 4096),
        (Underlay::V6, 4180, "2048 (4)", 2048),
    ] {
        let test = "the_port_is_as_wide_as_the_link";
        let Some(hosts) = hosts(test, (underlay, mtu)) else {
            return;
        };
        let said = hosts.bed(0).endpoint().run("ibv_devinfo", &[]).unwrap();
        let line = said.stdout.lines().find(|l| l.contains("active_mtu:"));
        assert!(line.is_some_and(|l| l.ends_with(active)), "{said}");
        assert_eq!(hosts.bed(0).status().unwrap()["fabric"]["mtu"], status);
    }
}

#[test]
fn the_status_tells_the_path() {
    let test = "the_status_tells_the_path";
    if !have("ib_write_bw") {
        return;
    }
    LINKS.into_iter().for_each(|link| {
        if let Some(hosts) = hosts(test, link) {
            tells_the_path(&hosts, link.0.addresses());
        }
    });
}

fn tells_the_path(hosts: &Hosts, addresses: [&str; 2]) {
    let args = ["-q", "3", "-D", "1000", "-s", "4096"];
    let (server, client) = hosts.start("ib_write_bw", &args).unwrap();
    let sent = |status: &serde_json::Value| status["fabric"]["sent_packets"].as_u64() > Some(1000);
    for (host, other) in [(0, 1), (1, 0)] {
        let bed = hosts.bed(host);
        bed.wait_for_status(sent, DEADLINE).unwrap();
        let status = bed.status().unwrap();
        let paths = &status["endpoints"][0]["sessions"][0]["paths"];
        let wanted = serde_json::json!([{ "host": addresses[other], "qps": 3 }]);
        assert_eq!(*paths, wanted, "{status:#}");
        assert_eq!(status["fabric"]["address"], addresses[host]);
        assert_eq!(
            status["fabric"]["hosts"],
            serde_json::json!([addresses[other]])
        );
        let text = bed.call(&["status"]).unwrap().success().unwrap().stdout;
        let path = format!("RoCEv2 to {}", addresses[other]);
        assert!(text.contains(&path), "{text}");
        assert!(
            text.contains(&format!("underlay: {}", addresses[host])),
            "{text}"
        );
    }
    drop((server, client));
    // On one host it is shared memory.
    let bed = hosts.bed(0);
    let port = freeflow_tests::free_port().to_string();
    let args = ["-g", "0", "-n", "100000000", "-p", &port];
    let address = Hosts::ADDRESSES[0];
    let mut server = bed.endpoint().start("ibv_rc_pingpong", &args).unwrap();
    assert!(freeflow_tests::wait_for_listener_with(
        &mut server,
        port.parse().unwrap(),
        DEADLINE
    ));
    let _client = bed
        .endpoint()
        .start("ibv_rc_pingpong", &[&args[..], &[address]].concat())
        .unwrap();
    let local = |status: &serde_json::Value| {
        let all = status["endpoints"].as_array();
        all.is_some_and(|all| {
            all.len() == 2
                && all.iter().all(|e| {
                    let paths = &e["sessions"][0]["paths"];
                    *paths == serde_json::json!([{ "host": null, "qps": 1 }])
                })
        })
    };
    bed.wait_for_status(local, DEADLINE).unwrap();
}

fn suite(hosts: &Hosts, host: usize, args: &[&str]) -> Running {
    let program = dist().join("bin/ff-conform");
    let endpoint = hosts.bed(host).endpoint();
    endpoint.start(program.to_str().unwrap(), args).unwrap()
}

fn passed(said: Ended, at_least: u32) {
    let summary = said.stdout.lines().last().unwrap_or_default();
    let mut words = summary.split(' ');
    let n: u32 = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let ended = (words.next(), words.next());
    assert_eq!(ended, (Some("passed,"), Some("0")), "{said}");
    assert!(n >= at_least, "only {n} tests passed: {said}");
    said.success().unwrap();
}

each_link!(the_verbs_do_what_they_promise, hosts => {
    let socket = hosts.bed(1).dir().join("conformance");
    let socket = socket.to_str().unwrap();
    let far = suite(&hosts, 1, &["--serve", socket]);
    far.wait_for("serving at", DEADLINE).unwrap();
    let near = suite(&hosts, 0, &["--shorter", "10", "--peer", socket]);
    passed(near.wait(LIMIT).unwrap(), 75);
});
