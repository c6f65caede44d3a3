//! Debian's verbs programs, unmodified, between two endpoints of one router.

use freeflow_tests::{Bed, DEADLINE, Running, have};

fn bed() -> Bed {
    Bed::new().expect("a router starts")
}

/// Both sides check the data and say how long it took.
fn pingpong(bed: &Bed, program: &str, iterations: &str, args: &[&str]) {
    let mut all = vec!["-g", "0", "-c", "-n", iterations];
    all.extend(args);
    let (server, client) = bed.pair(program, &all).unwrap();
    for side in [server, client] {
        assert!(
            side.stdout.contains(&format!("{iterations} iters in")),
            "{side}"
        );
        assert!(!side.stdout.contains("invalid data"), "{side}");
        assert_eq!(side.stderr, "", "{side}");
    }
}

#[test]
fn ibv_devices_lists_the_device() {
    if have("ibv_devices") {
        let bed = bed();
        let said = bed.endpoint().run("ibv_devices", &[]).unwrap();
        assert!(said.stdout.contains("freeflow0"), "{said}");
        assert_eq!(said.stderr, "", "{said}");
    }
}

#[test]
fn ibv_devinfo_shows_the_endpoints_address() {
    if have("ibv_devinfo") {
        let bed = bed();
        let endpoint = bed.endpoint();
        let said = endpoint.run("ibv_devinfo", &["-v"]).unwrap();
        for wanted in [
            "hca_id:\tfreeflow0".to_owned(),
            "PORT_ACTIVE (4)".to_owned(),
            "active_mtu:\t\t4096 (5)".to_owned(),
            "link_layer:\t\tEthernet".to_owned(),
            format!("GID[  0]:\t\t::ffff:{}, RoCE v2", endpoint.ip),
        ] {
            assert!(said.stdout.contains(&wanted), "no {wanted:?} in {said}");
        }
        assert_eq!(said.stderr, "", "{said}");
    }
}

#[test]
fn connected_pingpong() {
    for program in ["ibv_rc_pingpong", "ibv_uc_pingpong"] {
        if !have(program) {
            continue;
        }
        let bed = bed();
        pingpong(&bed, program, "10000", &[]);
        pingpong(&bed, program, "10000", &["-e"]);
        for size in ["1", "255", "65537", "1048576"] {
            pingpong(&bed, program, "500", &["-s", size]);
            pingpong(&bed, program, "500", &["-s", size, "-e"]);
        }
    }
}

#[test]
fn rc_pingpong_with_the_extended_interfaces() {
    if have("ibv_rc_pingpong") {
        let bed = bed();
        // The new post interface, and completion timestamps (the extended CQ). With timestamps and
        // events the program takes it for an error that an event's completion was polled before.
        pingpong(&bed, "ibv_rc_pingpong", "10000", &["-N"]);
        pingpong(&bed, "ibv_rc_pingpong", "10000", &["-N", "-e"]);
        pingpong(&bed, "ibv_rc_pingpong", "1000", &["-N", "-s", "1048576"]);
        pingpong(&bed, "ibv_rc_pingpong", "1000", &["-t"]);
        pingpong(&bed, "ibv_rc_pingpong", "1000", &["-t", "-N"]);
    }
}

#[test]
fn rc_pingpong_on_demand_and_in_device_memory() {
    if have("ibv_rc_pingpong") {
        let bed = bed();
        for args in [
            &["-o"][..],
            &["-o", "-P", "-e"],
            &["-j"],
            &["-j", "-N", "-e"],
        ] {
            pingpong(&bed, "ibv_rc_pingpong", "1000", args);
            let mut large = args.to_vec();
            large.extend(["-s", "1048576"]);
            pingpong(&bed, "ibv_rc_pingpong", "200", &large);
        }
    }
}

#[test]
fn datagram_pingpong() {
    let program = "ibv_ud_pingpong";
    if have(program) {
        let bed = bed();
        pingpong(&bed, program, "10000", &[]);
        pingpong(&bed, program, "10000", &["-e"]);
        for size in ["1", "255", "2048", "4096"] {
            pingpong(&bed, program, "500", &["-s", size]);
            pingpong(&bed, program, "500", &["-s", size, "-e"]);
        }
    }
}

#[test]
fn ibv_asyncwatch_sees_the_router_die() {
    if have("ibv_asyncwatch") {
        let mut bed = bed();
        let endpoint = bed.endpoint();
        let watch = Running::start(&mut endpoint.command("ibv_asyncwatch", &[])).unwrap();
        watch.wait_for("async event FD", DEADLINE).unwrap();
        drop(endpoint);
        bed.router().signal(rustix::process::Signal::KILL);
        watch.wait_for("IBV_EVENT_DEVICE_FATAL", DEADLINE).unwrap();
        watch.wait(DEADLINE).unwrap();
    }
}
