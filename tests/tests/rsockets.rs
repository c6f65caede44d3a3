//! Rsockets: librdmacm's functions as C programs see them, unmodified programs over them, and
//! programs of TCP's that librspreload puts on them.

use std::path::Path;

use freeflow_tests::{
    Bed, Checker, DEADLINE, Ended, Endpoint, Hosts, Place, Running, count, have, held, skip,
    wait_for_listener_of, wait_until,
};

/// Debian's library that puts rsockets in place of sockets.
const PRELOAD: &str = "/usr/lib/x86_64-linux-gnu/rsocket/librspreload.so";

fn bed() -> Bed {
    Bed::new().expect("a router starts")
}

fn checker() -> Option<Checker> {
    Checker::new("rsockets")
}

/// Every endpoint has it, and so has this machine: datagrams begin over UDP.
const LOOPBACK: &str = "127.0.0.1";

macro_rules! cases {
    ($address:expr; $($case:ident)*) => {
        $(#[test]
        fn $case() {
            if let Some(checker) = checker() {
                checker.holds($address, stringify!($case));
            }
        })*
    };
}

cases! {
    None;
    stream threads single_bytes small_buffers backpressure half_close nobody_listens
    flags_and_vectors options mixed_polling waiting_threads epoll epoll_tells_hang_ups_once
    direct_writes forks exits errors listeners_sleep
}

cases! {
    Some(LOOPBACK);
    sleepers timeouts newcomers forks_close_all forks_beside_threads
    forks_leave_what_is_not_theirs strangers_in_turn
}

#[test]
fn loopback() {
    if let Some(checker) = checker() {
        for case in ["stream", "nobody_listens", "datagrams"] {
            checker.holds(Some(LOOPBACK), case);
        }
    }
}

#[test]
fn strangers() {
    if let Some(checker) = checker() {
        let said = checker.holds(Some(LOOPBACK), "strangers");
        if let Some(lack) = said.stdout.lines().find(|l| l.starts_with("no address")) {
            skip("strangers from where no endpoint is", lack);
        }
    }
}

#[test]
fn streams_end_when_the_router_dies() {
    if let Some(checker) = checker() {
        checker.outlives_router(None, "router_dies");
        checker.outlives_router(None, "hung_up_router_dies");
    }
}

#[test]
fn datagram_sockets_fail_when_the_router_dies() {
    if let Some(checker) = checker() {
        checker.outlives_router(Some(LOOPBACK), "datagrams_router_dies");
    }
}

#[test]
fn exits_beside_a_stopped_router() {
    let Some(checker) = checker() else {
        return;
    };
    let mut bed = bed();
    let router = bed.router().pid().to_string();
    let endpoint = bed.endpoint();
    let args = [LOOPBACK, "exits_beside_a_stopped_router", &router];
    let running = endpoint.start(&checker.program, &args);
    held(running.and_then(|running| running.wait(DEADLINE)));
}

/// In a network of its own: there, sockets that are none of ours go from endpoint to endpoint too.
fn private<'a>(ip: &'a str, command: &[&'a str]) -> Vec<&'a str> {
    [&["run", "--network", "private", "--ip", ip, "--"], command].concat()
}

/// They begin over UDP.
#[test]
fn datagrams() {
    let Some(checker) = checker() else {
        return;
    };
    for place in Place::private("datagrams") {
        // Where every user may read it.
        let dir = tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir_in("/tmp")
            .unwrap();
        let program = dir.path().join("rsockets");
        std::fs::copy(&checker.program, &program).unwrap();
        let program = program.to_str().unwrap();
        let ip = "10.77.0.1";
        let said = place.clean(&private(ip, &[program, ip, "datagrams"]));
        held(said);
    }
}

/// They connect by TCP, and by rsockets once they have forked. librspreload has them take turns by a
/// semaphore of the whole machine, which belongs to whoever was first.
#[test]
fn forking_servers_under_librspreload() {
    const PORT: u16 = 7471;
    const SEMAPHORE: &str = "/dev/shm/sem.rsocket_fork";
    if !have("rstream") || !preloads() {
        return;
    }
    for place in Place::private("forking servers under librspreload") {
        // One that was killed in its turn keeps it.
        let _ = std::fs::remove_file(SEMAPHORE);
        // The router stays to be asked.
        let stays = private("10.77.0.9", &["sh", "-c", "echo is there; sleep 1000"]);
        let stays = Running::start(&mut place.freeflow(stays)).unwrap();
        stays.wait_for("is there", DEADLINE).unwrap();
        let preload = format!("LD_PRELOAD={PRELOAD}");
        let program = ["env", "RDMAV_FORK_SAFE=1", &preload, "rstream"];
        let both = [
            "-T", "s", "-T", "f", "-T", "v", "-S", "5000", "-C", "20", "-I", "20",
        ];
        let server = [&program[..], &both].concat();
        let mut server =
            Running::start(&mut place.freeflow(private("10.77.0.1", &server))).unwrap();
        if !wait_for_listener_of(&mut server, PORT, DEADLINE) {
            panic!("no listener: {}", server.wait(DEADLINE).unwrap());
        }
        let client = [&program[..], &["-s", "10.77.0.1"], &both].concat();
        let client = place.call(&private("10.77.0.2", &client)).unwrap();
        let server = server.wait(DEADLINE).unwrap();
        for said in [client, server] {
            assert!(said.status.success(), "{said}");
            assert!(said.stdout.contains("custom"), "{said}");
        }
        // Both were the router's.
        let status = place.call(&["status", "-o", "json"]).unwrap();
        let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
        let ended = status["ended_sessions"].as_array().map_or(0, Vec::len);
        assert_eq!(ended, 2, "{status:#}");
    }
    let _ = std::fs::remove_file(SEMAPHORE);
}

/// Starts a server, and waits until it listens.
fn serve(endpoint: &Endpoint<'_>, command: &[&str]) -> Running {
    let server = endpoint.serve(command[0], &command[1..]);
    server.unwrap_or_else(|e| panic!("{e:#}"))
}

/// A client's command line: `PEER` is the server's address.
fn towards(endpoint: &Endpoint<'_>, args: &str) -> Vec<String> {
    let args = args.replace("PEER", &endpoint.ip.to_string());
    args.split_ascii_whitespace().map(str::to_owned).collect()
}

fn start_client(bed: &Bed, server: &Endpoint<'_>, command: &str) -> Running {
    let words = towards(server, command);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    bed.endpoint().start(words[0], &words[1..]).unwrap()
}

/// A server and a client, to their good ends.
fn pair(server: &str, client: &str) -> [Ended; 2] {
    let bed = bed();
    pair_on([&bed, &bed], server, client)
}

fn pair_on([here, there]: [&Bed; 2], server: &str, client: &str) -> [Ended; 2] {
    let endpoint = here.endpoint();
    let words: Vec<_> = server.split_ascii_whitespace().collect();
    let server = serve(&endpoint, &words);
    let client = start_client(there, &endpoint, client).wait(DEADLINE);
    let client = client.and_then(Ended::success);
    let client = client.unwrap_or_else(|e| panic!("{e:#}"));
    let server = server.wait(DEADLINE).and_then(Ended::success);
    let server = server.unwrap_or_else(|e| panic!("{e:#}\nclient: {client}"));
    [server, client]
}

/// Its streams are checked byte by byte with `-T v`.
#[test]
fn rstream_in_all_its_modes() {
    if !have("rstream") {
        return;
    }
    for mode in ["", "-T a", "-T b", "-T n", "-T a -T n", "-T r", "-k 1"] {
        let both = format!("-T v {mode} -C 50 -I 20");
        for size in ["1", "64", "5000", "300000"] {
            let both = format!("{both} -S {size}");
            let client = format!("rstream -s PEER {both}");
            let said = pair(&format!("rstream {both}"), &client);
            for side in said {
                assert!(side.stdout.contains("custom"), "{side}");
                assert!(!side.stdout.contains("error"), "{side}");
            }
        }
    }
}

#[test]
fn rstream_with_buffers_and_inline_data_of_other_sizes() {
    if !have("rstream") {
        return;
    }
    for sizes in ["-B 2048", "-B 4000000", "-i 1", "-i 200", "-B 1 -i 0"] {
        let both = format!("-T v {sizes} -C 20 -I 20 -S 20000");
        pair(
            &format!("rstream {both}"),
            &format!("rstream -s PEER {both}"),
        );
    }
}

#[test]
fn streams_between_hosts() {
    if !have("rstream") || !Hosts::can("rsockets between hosts") {
        return;
    }
    for (mtu, loss) in [(9000, 0), (1500, 20)] {
        let hosts = Hosts::new(mtu).unwrap();
        hosts.lose(0, loss).unwrap();
        hosts.lose(1, loss).unwrap();
        let beds = [hosts.bed(0), hosts.bed(1)];
        for more in ["-S 1", "-S 5000 -T a", "-S 300000 -T b"] {
            let both = format!("-T v -C 20 -I 10 {more}");
            let client = format!("rstream -s PEER {both}");
            pair_on(beds, &format!("rstream {both}"), &client);
        }
    }
}

#[test]
fn riostream() {
    if !have("riostream") {
        return;
    }
    for mode in ["", "-T a", "-T b", "-T n"] {
        for size in ["64", "5000", "200000"] {
            let both = format!("-T v {mode} -C 20 -I 20 -S {size}");
            pair(
                &format!("riostream {both}"),
                &format!("riostream -s PEER {both}"),
            );
        }
    }
}

#[test]
fn rcopy_copies_a_large_file() {
    if !have("rcopy") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let mut state = 1_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        // Knuth's generator: no two pages are alike.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_le_bytes()
    })
    .take(8 << 20)
    .flatten()
    .collect();
    std::fs::write(&from, &bytes).unwrap();
    let bed = bed();
    let endpoint = bed.endpoint();
    // It serves until it is killed.
    let _server = serve(&endpoint, &["rcopy"]);
    let client = format!("rcopy {} PEER:{}", from.display(), to.display());
    let client = start_client(&bed, &endpoint, &client).wait(DEADLINE);
    let said = client.and_then(Ended::success);
    let said = said.unwrap_or_else(|e| panic!("{e:#}"));
    let copied = std::fs::read(&to).unwrap();
    assert!(copied == bytes, "{} bytes arrived: {said}", copied.len());
}

/// Kills one of two, to the end of the other.
fn kill(mut victim: Running, other: Running) -> Ended {
    victim.kill_program().unwrap();
    other.wait(DEADLINE).unwrap()
}

/// (Without blocking, rstream takes the end of a stream for one that has nothing yet.)
fn rstream_is_killed([here, there]: [&Bed; 2]) {
    if !have("rstream") {
        return;
    }
    for mode in ["-T a", "-T b"] {
        for kill_server in [false, true] {
            let endpoint = here.endpoint();
            let both = format!("{mode} -C 1000 -I 1000000000 -S 5000");
            let server = format!("rstream {both}");
            let words: Vec<_> = server.split_ascii_whitespace().collect();
            let server = serve(&endpoint, &words);
            let client = start_client(there, &endpoint, &format!("rstream -s PEER {both}"));
            // A server is not told of one that goes before they are connected.
            endpoint.wait_for_some("received_messages").unwrap();
            let said = match kill_server {
                true => kill(server, client),
                false => kill(client, server),
            };
            assert!(!said.status.success(), "{said}");
        }
    }
}

/// A server is told, and there for the next client: to say that it is busy, as rcopy lets go of a
/// file at the client's word alone.
fn rcopy_is_killed([here, there]: [&Bed; 2]) {
    if !have("rcopy") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // It is not to arrive.
    let huge = std::fs::File::create(path("huge")).unwrap();
    huge.set_len(1 << 30).unwrap();
    for kill_server in [false, true] {
        let endpoint = here.endpoint();
        let server = serve(&endpoint, &["rcopy"]);
        let start = |to: &Path| {
            let command = format!("rcopy {} PEER:{}", path("huge").display(), to.display());
            start_client(there, &endpoint, &command)
        };
        let to = path(&format!("to{kill_server}"));
        let mut client = start(&to);
        let begun = || std::fs::metadata(&to).is_ok_and(|file| file.len() != 0);
        wait_until("the copy has begun", DEADLINE, begun).unwrap();
        if kill_server {
            let said = kill(server, client);
            assert!(!said.status.success(), "{said}");
        } else {
            client.kill_program().unwrap();
            let said = start(&path("next")).wait(DEADLINE).unwrap();
            assert_eq!(said.status.code(), Some(libc::EBUSY), "{said}");
        }
    }
}

fn iperf3_is_killed([here, there]: [&Bed; 2]) {
    if !have("iperf3") || !preloads() {
        return;
    }
    let preload = format!("LD_PRELOAD={PRELOAD}");
    for kill_server in [false, true] {
        let endpoint = here.endpoint();
        let server = ["env", &preload, "iperf3", "-s", "-1"];
        let server = serve(&endpoint, &server);
        let client = format!("env {preload} iperf3 -c PEER -t 1000 --forceflush");
        let client = start_client(there, &endpoint, &client);
        client.wait_for("0.00-1.0", DEADLINE).unwrap();
        let (said, of) = match kill_server {
            true => (kill(server, client), "error"),
            false => (kill(client, server), "the client has"),
        };
        assert!(said.stderr.contains(of), "{said}");
    }
}

/// Whichever side is killed, the other one is told soon.
fn killed(beds: [&Bed; 2]) {
    rstream_is_killed(beds);
    rcopy_is_killed(beds);
    iperf3_is_killed(beds);
}

#[test]
fn the_peer_of_a_program_that_is_killed_ends() {
    let bed = bed();
    killed([&bed, &bed]);
}

#[test]
fn the_peer_on_another_host_of_a_program_that_is_killed_ends() {
    if Hosts::can("killing rsockets between hosts") {
        let hosts = Hosts::new(9000).unwrap();
        killed([hosts.bed(0), hosts.bed(1)]);
    }
}

fn preloads() -> bool {
    let there = Path::new(PRELOAD).exists();
    if !there {
        skip("librspreload", &format!("there is no {PRELOAD}"));
    }
    there
}

#[test]
fn iperf3_under_librspreload() {
    if !have("iperf3") || !preloads() {
        return;
    }
    for more in ["", "-R", "-P 4", "-w 4096 -l 1000", "--bidir"] {
        let [_, client] = pair(
            &format!("env LD_PRELOAD={PRELOAD} iperf3 -s -1"),
            &format!("env LD_PRELOAD={PRELOAD} iperf3 -c PEER -n 4M {more}"),
        );
        for end in ["sender", "receiver"] {
            assert!(client.stdout.contains(end), "{client}");
        }
    }
}

/// Both ends on one endpoint, whose counters say that it was no socket of the kernel's.
#[test]
fn iperf3_at_loopback_under_librspreload() {
    const PORT: u16 = 5201;
    const BYTES: u64 = 4 << 20;
    if !have("iperf3") || !preloads() {
        return;
    }
    let bed = bed();
    let endpoint = bed.endpoint();
    let iperf3 = format!("env LD_PRELOAD={PRELOAD} iperf3 -p {PORT}");
    // The client tries until the server listens; the endpoint stays until it has been looked at.
    let script = format!(
        "{iperf3} -s -1 >/dev/null & server=$!; \
         until {iperf3} -c {LOOPBACK} -n {BYTES}; do sleep 0.1; done; \
         wait $server; echo server: $?; read line"
    );
    let mut both = endpoint.command("sh", &["-c", &script]);
    let mut both = Running::start_piped(&mut both).unwrap();
    both.wait_for("server: 0\n", DEADLINE).unwrap();
    let sent = count(&bed.status().unwrap(), "sent_bytes");
    assert!(sent >= BYTES, "{sent} bytes were sent");
    both.enter("").unwrap();
    let said = both.wait(DEADLINE).and_then(Ended::success).unwrap();
    for end in ["sender", "receiver"] {
        assert!(said.stdout.contains(end), "{said}");
    }
}

/// A client in Python; its server is the checker, as Python accepts by `accept4`, which
/// librspreload of rdma-core 44 leaves to the system.
#[test]
fn python_under_librspreload() {
    const PYTHON: &str = "/usr/bin/python3";
    const SCRIPT: &str = "
import hashlib, os, socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
data = os.urandom(1 << 20) * 8
s.sendall(data)
s.shutdown(socket.SHUT_WR)
back = b''
while True:
    part = s.recv(100000)
    if not part:
        break
    back += part
print('same' if back == data else f'{len(back)} bytes')
";
    let Some(checker) = checker() else {
        return;
    };
    if !Path::new(PYTHON).exists() {
        return skip("python under librspreload", "python3 is not installed");
    }
    if !preloads() {
        return;
    }
    let bed = bed();
    let endpoint = bed.endpoint();
    let port = "4711";
    let ip = endpoint.ip.to_string();
    let server = serve(&endpoint, &[&checker.program, &ip, "echo", port]);
    let preload = format!("LD_PRELOAD={PRELOAD}");
    let client = bed.endpoint();
    let args = [&preload, PYTHON, "-c", SCRIPT, &ip, port];
    let said = client.run("env", &args).unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(said.stdout.trim(), "same", "{said}");
    held(server.wait(DEADLINE));
}
