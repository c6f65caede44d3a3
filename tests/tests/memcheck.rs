//! Valgrind's memcheck over the network library, in programs that use it. What the router writes
//! into shared memory is initialised from the start to it; and where it does not know userfaultfd,
//! of which it warns, the pages of a large region are not converted but copied.

use std::time::Duration;

use freeflow_tests::{Bed, dist, have};

/// Errors, and memory that nothing points to any more, end a program with another status.
const VALGRIND: [&str; 5] = [
    "--quiet",
    "--error-exitcode=99",
    "--leak-check=full",
    "--show-leak-kinds=definite",
    "--errors-for-leak-kinds=definite",
];

/// One program, some fifty times slower than alone, on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

#[test]
fn pingpong_has_no_memory_errors() {
    if !have("valgrind") {
        return;
    }
    let bed = Bed::new().unwrap();
    for (program, more) in [
        ("ibv_rc_pingpong", &["-e"][..]),
        ("ibv_rc_pingpong", &["-N"]),
        ("ibv_rc_pingpong", &["-o"]),
        ("ibv_uc_pingpong", &[]),
        ("ibv_ud_pingpong", &["-s", "1024"]),
        ("ibv_srq_pingpong", &["-q", "2"]),
    ] {
        if !have(program) {
            continue;
        }
        let mut args = VALGRIND.to_vec();
        args.extend([program, "-g", "0", "-n", "20"]);
        args.extend(more);
        let (server, client) = bed.pair("valgrind", &args).unwrap();
        for side in [server, client] {
            assert!(side.stdout.contains("20 iters in"), "{side}");
        }
    }
}

/// Tests of the conformance suite that together use most of the library.
const CONFORMANCE: [&str; 12] = [
    "device::attributes",
    "post::bad_third_send",
    "post::sends_in_error_are_flushed",
    "inline::with_every_operation",
    "completions::all_signaled",
    "data::every_operation_rc",
    "regions::",
    "windows::",
    "srq::",
    "xrc::",
    "events::",
    "extended::",
];

#[test]
fn the_conformance_suite_has_no_memory_errors() {
    if !have("valgrind") {
        return;
    }
    let bed = Bed::new().unwrap();
    let endpoint = bed.endpoint();
    let suite = dist().join("bin/ff-conform");
    let suite = suite.to_str().unwrap();
    let list = endpoint.run(suite, &["--list"]).unwrap().stdout;
    for wanted in CONFORMANCE {
        // The first of a group stands for it.
        let mut names = list
            .lines()
            .filter_map(|l| l.split_ascii_whitespace().next());
        let name = names.find(|name| name.starts_with(wanted));
        let name = name.unwrap_or_else(|| panic!("no test {wanted} in {list}"));
        let mut args = VALGRIND.to_vec();
        args.extend([
            suite,
            "--one",
            name,
            "--gid-index",
            "0",
            "--shorter",
            "1000",
        ]);
        let ended = endpoint.start("valgrind", &args).unwrap().wait(LIMIT);
        let ended = ended.unwrap().success();
        assert!(ended.is_ok(), "{name}: {}", ended.unwrap_err());
    }
}
