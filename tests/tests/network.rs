//! `freeflow run --network private`: a network of its own for each program.

use std::process::Command;

use freeflow_tests::{
    DEADLINE, Ended, Place, Running, descendants, have, wait_for_listener_of, wait_until,
};
use rustix::process::Signal;

const PORT: u16 = 18_515;

fn private<'a>(options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    [&["run", "--network", "private"], options, &["--"], command].concat()
}

/// A program that stays, and that is there.
fn start(place: &Place, options: &[&str], script: &str) -> Running {
    let script = format!("echo is there; {script}");
    let args = private(options, &["sh", "-c", &script]);
    let running = Running::start(&mut place.freeflow(args)).unwrap();
    running.wait_for("is there", DEADLINE).unwrap();
    running
}

/// What bash says of a connection from an endpoint to an address where nobody listens.
fn connect(place: &Place, options: &[&str], to: &str) -> Ended {
    let script = format!("exec 3<>/dev/tcp/{to}/9");
    place
        .call(&private(options, &["bash", "-c", &script]))
        .unwrap()
}

#[test]
fn perftest_bootstraps_on_the_endpoints_own_addresses() {
    if !have("ib_write_bw") {
        return;
    }
    for place in Place::private("perftest on private networks") {
        let server = private(&["--ip", "10.77.0.1"], &["ib_write_bw", "-n", "500"]);
        let mut server = Running::start(&mut place.freeflow(server)).unwrap();
        if !wait_for_listener_of(&mut server, PORT, DEADLINE) {
            panic!(
                "the server does not listen: {}",
                server.wait(DEADLINE).unwrap()
            );
        }
        let client = ["ib_write_bw", "-n", "500", "10.77.0.1"];
        let client = place
            .clean(&private(&["--ip", "10.77.0.2"], &client))
            .unwrap();
        assert!(client.stdout.contains(" 65536      500 "), "{client}");
        let server = server.wait(DEADLINE).unwrap().success().unwrap();
        assert_eq!(server.stderr, "");
    }
}

#[test]
fn endpoints_of_a_tenant_reach_each_other_whatever_their_addresses() {
    if !have("bash") {
        return;
    }
    for place in Place::private("addresses of private networks") {
        for (a, b) in [
            ("10.77.0.1", "10.77.200.7"),
            ("10.77.0.3", "192.168.3.255"),
            ("fd77::1", "fd77::2"),
            ("fd77::3", "2001:db8::9"),
        ] {
            let _there = start(&place, &["--ip", a], "exec sleep 1000");
            // Somebody answered that there is no such port.
            let said = connect(&place, &["--ip", b], a);
            assert!(said.stderr.contains("refused"), "{b} to {a}: {said}");
        }
    }
}

#[test]
fn tenants_do_not_reach_each_other() {
    if !have("bash") {
        return;
    }
    for place in Place::private("tenants' private networks") {
        let _there = start(&place, &["--ip", "10.77.0.1"], "exec sleep 1000");
        let other = ["--tenant", "other", "--ip"];
        let said = connect(&place, &[&other[..], &["10.77.0.2"]].concat(), "10.77.0.1");
        assert!(said.stderr.contains("No route to host"), "{said}");
        // The same address in two tenants is two hosts.
        let twin = start(
            &place,
            &[&other[..], &["10.77.0.1"]].concat(),
            "exec sleep 1000",
        );
        let said = connect(&place, &[&other[..], &["10.77.0.2"]].concat(), "10.77.0.1");
        assert!(said.stderr.contains("refused"), "{said}");
        drop(twin);
    }
}

#[test]
fn the_program_sees_its_own_network_and_its_own_user() {
    for place in Place::private("view of a private network") {
        let id = Running::start(place.program("/bin/sh").args(["-c", "id -u; id -g"]))
            .and_then(|id| id.wait(DEADLINE))
            .unwrap();
        let script = "echo $(ls /sys/class/net); echo $(cat /sys/class/net/eth0/mtu); \
                      echo $(cat /sys/class/net/lo/operstate /sys/class/net/eth0/operstate); \
                      cat /sys/class/infiniband/freeflow0/ports/1/gid_attrs/ndevs/0; \
                      cat /sys/class/infiniband/freeflow0/ports/1/gids/0; \
                      test -c /dev/infiniband/uverbs0 && id -u && id -g";
        let said = place
            .clean(&private(&["--ip", "10.77.3.4"], &["sh", "-c", script]))
            .unwrap();
        let expected = "eth0 lo\n9000\nunknown up\neth0\n\
                        0000:0000:0000:0000:0000:ffff:0a4d:0304\n";
        assert_eq!(said.stdout, format!("{expected}{}", id.stdout), "{said}");
    }
}

#[test]
fn many_start_at_the_same_time() {
    for place in Place::private("many private networks") {
        let args = private(&[], &["sh", "-c", "test -e /sys/class/net/eth0 && echo up"]);
        let all: Vec<_> = (0..12)
            .map(|_| Running::start(&mut place.freeflow(args.iter().copied())).unwrap())
            .collect();
        for one in all {
            let ended = one.wait(DEADLINE).unwrap().success().unwrap();
            assert_eq!((&*ended.stdout, &*ended.stderr), ("up\n", ""), "{ended}");
        }
    }
}

/// Interfaces of a process's network namespace.
fn interfaces(pid: u32) -> Vec<String> {
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    let names = table
        .lines()
        .skip(2)
        .filter_map(|l| Some(l.split_once(':')?.0.trim().to_owned()));
    names.collect()
}

/// The program itself: the child that is no longer `freeflow`, as its embedded router is.
fn program_of(run: &Running) -> u32 {
    let is_program = |pid: &u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name.trim() != "freeflow")
    };
    let family = descendants(run.pid());
    family
        .into_iter()
        .find(is_program)
        .expect("the program lives")
}

#[test]
fn nothing_is_left_of_what_is_killed() {
    for place in Place::private("killing with private networks") {
        let keeper = start(&place, &["--ip", "10.77.0.1"], "exec sleep 1000");
        let router = place.status().unwrap()["pid"].as_u64().unwrap() as u32;
        let descriptors = || {
            std::fs::read_dir(format!("/proc/{router}/fd"))
                .unwrap()
                .count()
        };
        let before = descriptors();

        // The program.
        let other = ["--tenant", "other", "--ip", "10.77.0.2"];
        let run = start(&place, &other, "exec sleep 1000");
        assert!(interfaces(program_of(&run)).contains(&"eth0".to_owned()));
        kill(program_of(&run));
        assert_eq!(run.wait(DEADLINE).unwrap().code(), 128 + 9);
        // With the tenant's last program its bridge is gone: all that holds it is a descriptor.
        let what = "the router has closed the bridge";
        wait_until(what, DEADLINE, || descriptors() <= before).unwrap();

        // `freeflow run`: its program ends, and the endpoint is free.
        let run = start(&place, &other, "exec sleep 1000");
        let program = program_of(&run);
        run.signal(Signal::KILL);
        let gone = || !std::path::Path::new(&format!("/proc/{program}/exe")).exists();
        wait_until("the program has ended", DEADLINE, gone).unwrap();
        let free = || place.call(&private(&other, &["true"])).unwrap().code() == 0;
        wait_until("the address is free", DEADLINE, free).unwrap();
        wait_until(what, DEADLINE, || descriptors() <= before).unwrap();

        // The router: the program stays, alone with its loopback interface.
        let program = program_of(&keeper);
        assert!(interfaces(program).contains(&"eth0".to_owned()));
        kill(router);
        let alone = || interfaces(program) == ["lo"];
        wait_until("the bridge is gone", DEADLINE, alone).unwrap();
        // The next one begins anew.
        place
            .clean(&private(&["--ip", "10.77.0.1"], &["true"]))
            .unwrap();
    }
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
}

#[test]
fn a_program_in_a_private_network_can_run_another() {
    for place in Place::private("private networks inside of each other") {
        let freeflow = place.binary();
        let inner = ["--ip", "10.77.0.2"];
        let script = [
            "sh",
            "-c",
            "grep -o eth0 /proc/net/dev; ls /sys/class/infiniband",
        ];
        let inner = private(&inner, &script);
        let outer = [&[freeflow.to_str().unwrap()], &inner[..]].concat();
        for network in ["host", "private"] {
            let args = ["run", "--network", network, "--ip", "10.77.0.1", "--"];
            let said = place.clean(&[&args[..], &outer].concat()).unwrap();
            assert_eq!(said.stdout, "eth0\nfreeflow0\n", "{said}");
        }
    }
}

#[test]
fn memory_that_cannot_be_shared_is_reached_in_user_namespaces() {
    if !have("ib_write_bw") {
        return;
    }
    let place = Place::ordinary().unwrap();
    let mut networks = vec!["host"];
    if place.has_private_networks("files as buffers in a private network") {
        networks.push("private");
    }
    for network in networks {
        let (port, address) = match network {
            "host" => (freeflow_tests::free_port(), "127.0.0.1"),
            _ => (PORT, "10.77.0.1"),
        };
        let port_text = port.to_string();
        let program = |name: &str| {
            let file = place.file(name, 1 << 20).unwrap();
            let mmap = format!("--mmap={}", file.display());
            ["ib_write_bw", "-D", "4", "-p", &port_text, &mmap].map(str::to_owned)
        };
        let side = |ip: &str, command: &[String], peer: Option<&str>| {
            let mut all = place.freeflow(["run", "--network", network, "--ip", ip, "--"]);
            all.args(command).args(peer);
            Running::start(&mut all).unwrap()
        };
        let mut server = side("10.77.0.1", &program("server"), None);
        let listens = match network {
            "host" => freeflow_tests::wait_for_listener(port, DEADLINE, || server.is_alive()),
            _ => wait_for_listener_of(&mut server, port, DEADLINE),
        };
        assert!(listens, "the server does not listen");
        let client = side("10.77.0.2", &program("client"), Some(address));
        let copied = || {
            let status = place.status().unwrap();
            let endpoints = status["endpoints"].as_array().unwrap();
            let foreign = |e: &serde_json::Value| {
                let sessions = e["sessions"].as_array().unwrap();
                sessions
                    .iter()
                    .any(|s| s["foreign_bytes"].as_u64() > Some(0))
            };
            endpoints.iter().filter(|e| foreign(e)).count() == 2
        };
        wait_until("both files are registered", DEADLINE, copied).unwrap();
        client.wait(DEADLINE).unwrap().success().unwrap();
        server.wait(DEADLINE).unwrap().success().unwrap();
    }
}

#[test]
fn where_it_cannot_be_had_one_line_says_what_to_do() {
    if !have("unshare") || !have("setpriv") {
        return;
    }
    let place = Place::ordinary().unwrap();
    if !place.has_private_networks("forbidden user namespaces") {
        return;
    }
    // A user namespace in which nobody has a privilege, nor can get one in another.
    let script = format!(
        "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -all {} \"$@\"",
        place.binary().display()
    );
    let forbidden = |args: &[&str]| {
        let mut command: Command = place.program("unshare");
        command
            .args(["-U", "-r", "sh", "-c", &script, "sh"])
            .args(args);
        Running::start(&mut command)
            .unwrap()
            .wait(DEADLINE)
            .unwrap()
    };
    let said = forbidden(&private(&[], &["true"]));
    assert_eq!(said.code(), 125, "{said}");
    assert_eq!(said.stderr.lines().count(), 1, "{said}");
    assert!(
        said.stderr.contains("user.max_user_namespaces is 0"),
        "{said}"
    );
    let said = forbidden(&["doctor"]).success().unwrap();
    let line = said.stdout.lines().find(|l| l.contains("private network"));
    assert!(line.is_some_and(|l| l.starts_with("warn")), "{said}");
    // The host's network needs none of it.
    forbidden(&["run", "--", "true"]).success().unwrap();
}

/// Who installs a new version does not disturb the router that runs.
#[test]
fn a_tenant_comes_after_the_command_was_replaced() {
    for place in Place::private("private networks of a replaced command") {
        let first = start(&place, &["--tenant", "first"], "sleep 1000");
        let (old, new) = (place.binary(), place.binary().with_extension("new"));
        std::fs::copy(&old, &new).unwrap();
        std::fs::rename(&new, &old).unwrap();
        place
            .clean(&private(&["--tenant", "second"], &["true"]))
            .unwrap();
        drop(first);
    }
}
