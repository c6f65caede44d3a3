//! C programs, compiled against the installed headers, on the virtual device.

use std::process::Command;

use freeflow_tests::{Bed, DEADLINE, Ended, Running, dist, skip};
use rustix::process::Signal;

use crate::support::{compile, headers, installed, printed, run, scratch, source};

fn bed() -> Bed {
    Bed::new().expect("a router starts")
}

/// Runs a program of tests/c on an endpoint; it checks by itself.
fn on_an_endpoint(test: &str, name: &str, args: &[&str]) {
    if !headers(test) {
        return;
    }
    let program = compile(name, &source(&format!("{name}.c")), &["-libverbs"]);
    let bed = bed();
    let said = bed.endpoint().run(&program.to_string_lossy(), args);
    let said = said.unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(said.stderr, "", "{said}");
}

#[test]
fn every_wrapper_of_the_header_answers() {
    on_an_endpoint("every_wrapper_of_the_header_answers", "verbs", &[]);
}

#[test]
fn the_device_is_found_and_the_process_is_left_alone() {
    on_an_endpoint(
        "the_device_is_found_and_the_process_is_left_alone",
        "device",
        &["present"],
    );
}

#[test]
fn a_router_that_dies_takes_the_device_with_it_and_no_more() {
    if !headers("a_router_that_dies_takes_the_device_with_it_and_no_more") {
        return;
    }
    let program = compile("dying", &source("device.c"), &["-libverbs"]);
    let mut bed = bed();
    let program = bed.endpoint().start(&program.to_string_lossy(), &["dying"]);
    let program = program.expect("the program starts");
    program
        .wait_for("ready", DEADLINE)
        .expect("it has a device");
    bed.router().signal(Signal::KILL);
    let said = program.wait(DEADLINE).and_then(Ended::success);
    let said = said.unwrap_or_else(|e| panic!("{e:#}"));
    complains_once(&said, "endpoint");
}

/// What programs do with `cmd_fd` keeps no session alive.
#[test]
fn a_session_ends_with_its_program_image() {
    if !headers("a_session_ends_with_its_program_image") {
        return;
    }
    let program = compile("handing-on", &source("device.c"), &["-libverbs"]);
    let bed = bed();
    let endpoint = bed.lasting_endpoint("images").expect("an endpoint");
    let mut command = Command::new(program);
    command
        .arg("handing-on")
        .env("LD_LIBRARY_PATH", dist().join("lib"))
        .env("FREEFLOW_ENDPOINT", &endpoint.socket);
    let mut next = Running::start_piped(&mut command).expect("the program starts");
    next.enter("the next one runs").expect("it is written");
    next.wait_for("the next one runs", DEADLINE)
        .expect("cat writes what it reads");
    let ended = |status: &serde_json::Value| status["ended_sessions"].as_array().map(Vec::len);
    bed.wait_for_status(|status| ended(status) == Some(1), DEADLINE)
        .unwrap_or_else(|e| panic!("its session is still there: {e:#}"));
    assert!(next.is_alive(), "cat was to read on");
}

/// Runs the program that expects no device, outside of any endpoint.
fn without_device(test: &str, endpoint: Option<&str>) -> Option<Ended> {
    if !headers(test) {
        return None;
    }
    // Tests run at the same time: each its own file.
    let program = compile(test, &source("device.c"), &["-libverbs"]);
    let mut command = Command::new(program);
    command
        .arg("absent")
        .env("LD_LIBRARY_PATH", dist().join("lib"))
        .env_remove("FREEFLOW_ENDPOINT");
    if let Some(endpoint) = endpoint {
        command.env("FREEFLOW_ENDPOINT", endpoint);
    }
    let said = run(&mut command).success();
    Some(said.unwrap_or_else(|e| panic!("{e:#}")))
}

#[test]
fn without_an_endpoint_there_is_no_device_and_no_noise() {
    if let Some(said) = without_device("without_an_endpoint", None) {
        assert_eq!(said.stderr, "", "{said}");
    }
}

/// One line that names the socket, once, however often the program asks.
fn complains_once(said: &Ended, socket: &str) {
    assert_eq!(said.stderr.lines().count(), 1, "{said}");
    assert!(said.stderr.starts_with("freeflow: "), "{said}");
    assert!(said.stderr.contains(socket), "{said}");
}

#[test]
fn an_endpoint_that_is_gone_is_named_once() {
    let path = scratch("no-such-endpoint.sock");
    let socket = path.to_string_lossy();
    if let Some(said) = without_device("endpoint_gone", Some(&socket)) {
        complains_once(&said, &socket);
    }
}

#[test]
fn an_endpoint_without_a_router_is_named_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("endpoint.sock");
    // A socket file whose owner is gone.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    let socket = path.to_string_lossy();
    if let Some(said) = without_device("endpoint_without_router", Some(&socket)) {
        complains_once(&said, &socket);
    }
}

/// The stock library gives the same words, rates and conversions for every input.
#[test]
fn words_and_rates_are_the_installed_librarys() {
    const TEST: &str = "words_and_rates_are_the_installed_librarys";
    /// What newer releases than the installed one know.
    const NEWER: [&str; 4] = [
        "event_type 20: Device link speed change",
        "cm_event 16: RDMA_CM_EVENT_ADDRINFO_RESOLVED",
        "cm_event 17: RDMA_CM_EVENT_ADDRINFO_ERROR",
        "cm_event 18: RDMA_CM_EVENT_USER",
    ];
    if !headers(TEST) {
        return;
    }
    if installed("libibverbs.so.1").is_none() || installed("librdmacm.so.1").is_none() {
        return skip(TEST, "libibverbs and librdmacm are not installed");
    }
    let program = compile("words", &source("words.c"), &["-libverbs", "-lrdmacm"]);
    let dir = tempfile::tempdir().expect("a directory");
    let stock = printed(
        Command::new(&program)
            .arg(dir.path())
            .env_remove("LD_LIBRARY_PATH"),
    );
    let lib = dist().join("lib");
    let ours = printed(
        Command::new(&program)
            .arg(dir.path())
            .env("LD_LIBRARY_PATH", lib),
    );
    assert!(stock.lines().count() > 1000);
    assert_eq!(stock.lines().count(), ours.lines().count());
    let differ: Vec<_> = stock
        .lines()
        .zip(ours.lines())
        .filter(|(stock, ours)| stock != ours && !NEWER.contains(ours))
        .collect();
    assert!(differ.is_empty(), "installed, ours: {differ:#?}");
}

/// Libraries that stand before libc's sockets (librspreload is one) must not see ours.
#[test]
fn libc_is_not_asked_for_what_others_intercept() {
    /// On descriptors of our own, which those who intercept pass on: the standard library closes
    /// them, and the process's memory map is asked for and read. Signals of the calling thread
    /// wait while its memory is converted.
    const ALLOWED: [&str; 4] = ["close", "ioctl", "pthread_sigmask", "read"];
    if !headers("libc_is_not_asked_for_what_others_intercept") {
        return;
    }
    let preload = compile(
        "intercept.so",
        &source("intercept.c"),
        &["-shared", "-fPIC", "-ldl"],
    );
    let program = compile("intercepted", &source("verbs.c"), &["-libverbs"]);
    let dir = tempfile::tempdir().expect("a directory");
    let report = dir.path().join("called");
    let bed = bed();
    let said = bed.endpoint().run(
        "env",
        &[
            &format!("INTERCEPTED={}", report.display()),
            &format!("LD_PRELOAD={}", preload.display()),
            &program.to_string_lossy(),
        ],
    );
    said.unwrap_or_else(|e| panic!("{e:#}"));
    let called = std::fs::read_to_string(&report).expect("the program reported");
    assert!(called.lines().any(|name| name == "close"), "{called:?}");
    let more: Vec<_> = called
        .lines()
        .filter(|name| !ALLOWED.contains(name))
        .collect();
    assert!(more.is_empty(), "called by our library: {more:?}");
}

#[test]
fn librspreload_does_not_disturb() {
    const TEST: &str = "librspreload_does_not_disturb";
    if !headers(TEST) {
        return;
    }
    let Some(preload) = installed("rsocket/librspreload.so") else {
        return skip(TEST, "librspreload is not installed");
    };
    let program = compile("rspreloaded", &source("verbs.c"), &["-libverbs"]);
    let bed = bed();
    let said = bed.endpoint().run(
        "env",
        &[
            &format!("LD_PRELOAD={}", preload.display()),
            &program.to_string_lossy(),
        ],
    );
    let said = said.unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(said.stderr, "", "{said}");
}
