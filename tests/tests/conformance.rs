//! The conformance suite of the verbs, on FreeFlow: both ends in one process, in two processes of
//! one endpoint, and on two endpoints.

use std::time::Duration;

use anyhow::{Context, Result};
use freeflow_tests::{Bed, DEADLINE, Ended, Endpoint, Running, dist};

/// The whole suite, on a slow machine.
const LIMIT: Duration = Duration::from_secs(900);

fn suite(endpoint: &Endpoint<'_>, args: &[&str]) -> Result<Running> {
    let program = dist().join("bin/ff-conform");
    let program = program.to_str().context("the path of ff-conform")?;
    endpoint.start(program, args)
}

/// The line `N passed, N failed, N skipped` of a suite that ran, of which none may have failed.
fn passed(said: Ended, at_least: u32) {
    let summary = said.stdout.lines().last().unwrap_or_default();
    let mut words = summary.split(' ');
    let n: u32 = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    assert_eq!(words.next(), Some("passed,"), "{said}");
    assert_eq!(words.next(), Some("0"), "{said}");
    assert!(n >= at_least, "only {n} tests passed: {said}");
    assert!(said.status.success(), "{said}");
    // What the device does not offer is told.
    for line in said.stdout.lines().filter(|line| !line.starts_with("ok")) {
        println!("{line}");
    }
}

#[test]
fn both_ends_in_one_process() {
    let bed = Bed::new().unwrap();
    let endpoint = bed.endpoint();
    let running = suite(&endpoint, &["--shorter", "10"]).unwrap();
    passed(running.wait(LIMIT).unwrap(), 150);
}

#[test]
fn two_processes_of_one_endpoint() {
    let bed = Bed::new().unwrap();
    let endpoint = bed.endpoint();
    let running = suite(&endpoint, &["--shorter", "10", "--two"]).unwrap();
    passed(running.wait(LIMIT).unwrap(), 75);
}

#[test]
fn two_endpoints() {
    let bed = Bed::new().unwrap();
    let (near, far) = (bed.endpoint(), bed.endpoint());
    let socket = bed.dir().join("conformance");
    let socket = socket.to_str().unwrap();
    let server = suite(&far, &["--serve", socket]).unwrap();
    server.wait_for("serving at", DEADLINE).unwrap();
    let running = suite(&near, &["--shorter", "10", "--peer", socket]).unwrap();
    passed(running.wait(LIMIT).unwrap(), 75);
}
