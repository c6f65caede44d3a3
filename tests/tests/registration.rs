//! Pages that are registered and deregistered again and again, without asking the router.

use std::path::Path;
use std::process::Command;

use freeflow_router::{Config, EndpointSpec, Router};
use freeflow_tests::{Bed, DEADLINE, Running};
use freeflow_types::{DeviceLimits, VirtualIp};
use rustix::process::Signal;

fn program(endpoint: &Path, args: &[&str]) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_register-again"));
    command.env("FREEFLOW_ENDPOINT", endpoint).args(args);
    Running::start_piped(&mut command).unwrap()
}

/// Regions of the only session.
fn regions(status: &serde_json::Value) -> Option<(u64, u64)> {
    let session = &status["endpoints"][0]["sessions"][0];
    Some((
        session["mrs"].as_u64()?,
        session["registered_bytes"].as_u64()?,
    ))
}

#[test]
fn nothing_is_written_after_deregistration() {
    let bed = Bed::new().unwrap();
    let endpoint = bed.lasting_endpoint("t").unwrap();
    let ended = program(&endpoint.socket, &["storm"]).wait(DEADLINE);
    println!("{}", ended.unwrap().success().unwrap().stdout);
}

#[test]
fn a_dead_router_is_noticed() {
    let mut bed = Bed::new().unwrap();
    let endpoint = bed.lasting_endpoint("t").unwrap();
    let running = program(&endpoint.socket, &["death"]);
    running.wait_for("ready", DEADLINE).unwrap();
    bed.router().signal(Signal::KILL);
    let ended = running.wait(DEADLINE).unwrap().success().unwrap();
    assert!(ended.stdout.contains("registering: EIO"), "{ended}");
}

#[test]
fn a_removed_endpoint_is_noticed() {
    let bed = Bed::new().unwrap();
    let endpoint = bed.lasting_endpoint("t").unwrap();
    let running = program(&endpoint.socket, &["death"]);
    running.wait_for("ready", DEADLINE).unwrap();
    let name = endpoint.name;
    bed.control(freeflow_api::Operation::RemoveEndpoint { name })
        .unwrap();
    let ended = running.wait(DEADLINE).unwrap().success().unwrap();
    assert!(ended.stdout.contains("registering: EIO"), "{ended}");
}

#[test]
fn children_of_fork_leave_regions_alone() {
    let bed = Bed::new().unwrap();
    let endpoint = bed.lasting_endpoint("t").unwrap();
    let ended = program(&endpoint.socket, &["fork"]).wait(DEADLINE);
    ended.unwrap().success().unwrap();
}

#[test]
fn the_status_counts_them_until_their_context_is_closed() {
    let bed = Bed::new().unwrap();
    let endpoint = bed.lasting_endpoint("t").unwrap();
    // More than one message gives out.
    let mut running = program(&endpoint.socket, &["held", "700"]);
    running.wait_for("holding", DEADLINE).unwrap();
    let (count, bytes) = regions(&bed.status().unwrap()).unwrap();
    assert_eq!((count, bytes), (700, 700 * 65_536));
    running.enter("close").unwrap();
    running.wait_for("closed", DEADLINE).unwrap();
    assert_eq!(regions(&bed.status().unwrap()), Some((0, 0)));
    running.enter("end").unwrap();
    running.wait(DEADLINE).unwrap().success().unwrap();
}

#[test]
fn a_session_has_as_many_regions_as_it_may() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let limits = DeviceLimits {
        max_mr: 40,
        ..DeviceLimits::default()
    };
    let router = Router::start(Config {
        limits,
        sandbox: false,
        ..Config::default()
    });
    let socket = dir.path().join("endpoint.sock");
    let endpoint = EndpointSpec {
        quota: Vec::new(),
        name: "e".to_owned(),
        tenant: "t".to_owned(),
        ip: VirtualIp("10.79.0.1".parse().unwrap()),
        socket: socket.clone(),
        underlay_gid: false,
    };
    let router = router.unwrap();
    router.add_endpoint(endpoint).unwrap();
    let ended = program(&socket, &["limited", "40"]).wait(DEADLINE);
    ended.unwrap().success().unwrap();
}
