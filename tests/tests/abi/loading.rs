//! Programs and vendors' libraries load with our files without a word, and get our symbols.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use freeflow_tests::{Bed, dist, have, skip};

use crate::support::{compile, headers, installed, library, run, source};

/// A program with our directory first, as `freeflow run` starts it, all symbols bound at once.
fn with_ours(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .env("LD_LIBRARY_PATH", dist().join("lib"))
        .env("LD_BIND_NOW", "1")
        .env_remove("FREEFLOW_ENDPOINT");
    command
}

/// What the dynamic loader says when it is not content.
fn complaint(stderr: &str) -> Option<&str> {
    const WORDS: [&str; 6] = [
        "no version information available",
        "symbol lookup error",
        "version `",
        "undefined symbol",
        "cannot open shared object",
        "error while loading",
    ];
    stderr
        .lines()
        .find(|line| WORDS.iter().any(|word| line.contains(word)))
}

#[test]
fn programs_load_silently() {
    let programs: [(&str, &[&str]); 12] = [
        ("ib_write_bw", &["--version"]),
        ("ib_send_lat", &["--version"]),
        ("raw_ethernet_bw", &["--version"]),
        ("ibv_devinfo", &["-v"]),
        ("ibv_devices", &[]),
        ("ibv_rc_pingpong", &["-h"]),
        ("rping", &[]),
        ("ucmatose", &["-?"]),
        ("rstream", &["-?"]),
        ("ucx_info", &["-d"]),
        ("qperf", &["--version"]),
        ("fi_info", &["-p", "verbs"]),
    ];
    for (program, args) in programs {
        if !have(program) {
            continue;
        }
        let said = run(with_ours(program).args(args));
        assert_eq!(complaint(&said.stderr), None, "{said}");
        // The loader's own exit code.
        assert_ne!(said.code(), 127, "{said}");
    }
}

/// Every library that has to do with libibverbs is loaded into one program after the other.
#[test]
fn vendors_libraries_load_silently() {
    const VENDORS: [&str; 4] = [
        "libmlx5.so.1",
        "libmlx4.so.1",
        "libefa.so.1",
        "libmana.so.1",
    ];
    let mut loaded = 0;
    for path in VENDORS.iter().filter_map(|name| installed(name)) {
        let said = run(with_ours("true").env("LD_PRELOAD", &path));
        assert_eq!(said.stderr, "", "{}: {said}", path.display());
        assert!(said.status.success(), "{said}");
        loaded += 1;
    }
    let drivers = installed("libibverbs.so.1")
        .and_then(|path| path.parent()?.join("libibverbs").read_dir().ok());
    for driver in drivers.into_iter().flatten() {
        let path = driver.expect("the directory can be read").path();
        let said = run(with_ours("true").env("LD_PRELOAD", &path));
        assert_eq!(said.stderr, "", "{}: {said}", path.display());
        assert!(said.status.success(), "{said}");
        loaded += 1;
    }
    if loaded == 0 {
        skip(
            "vendors_libraries_load_silently",
            "no vendor's library is installed",
        );
    }
}

#[test]
fn vendors_libraries_know_that_the_device_is_not_theirs() {
    const TEST: &str = "vendors_libraries_know_that_the_device_is_not_theirs";
    if !headers(TEST) {
        return;
    }
    if installed("libmlx5.so").is_none() || installed("libefa.so").is_none() {
        return skip(TEST, "libmlx5 and libefa are not installed");
    }
    let program = compile(
        "vendors",
        &source("vendors.c"),
        &["-libverbs", "-lmlx5", "-lefa"],
    );
    let bed = Bed::new().expect("a router starts");
    let said = bed.endpoint().run(&program.to_string_lossy(), &[]).unwrap();
    assert_eq!(said.stderr, "", "{said}");
}

/// Asks a library, opened by `name`, for versioned symbols: all must come from our one file.
fn resolve(program: &Path, name: &str, symbols: &str) {
    let ours = library("libibverbs.so.1")
        .canonicalize()
        .expect("it is there");
    let mut child = with_ours(program)
        .arg(name)
        .arg(ours)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program can be started");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin
        .write_all(symbols.as_bytes())
        .expect("the program reads");
    drop(stdin);
    let said = child.wait_with_output().expect("the program ends");
    let (out, err) = (
        String::from_utf8_lossy(&said.stdout),
        String::from_utf8_lossy(&said.stderr),
    );
    assert!(said.status.success(), "{name}: {out}{err}");
    assert_eq!(err, "", "{name}");
}

#[test]
fn versioned_symbols_are_found_by_name() {
    if !headers("versioned_symbols_are_found_by_name") {
        return;
    }
    let program = compile("load", &source("load.c"), &["-ldl"]);
    let all: Vec<_> = include_str!("exports.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('@'))
        .map(|(name, node)| (name, node.trim_start_matches('@')))
        .collect();
    let lines = |prefix: &str| -> String {
        let chosen = all.iter().filter(|(_, node)| node.starts_with(prefix));
        chosen
            .map(|(name, node)| format!("{name} {node}\n"))
            .collect()
    };
    let (verbs, rdmacm) = (lines("IBVERBS_"), lines("RDMACM_"));
    assert!(verbs.contains("ibv_get_device_list IBVERBS_1.1\n"));
    assert!(rdmacm.contains("rdma_create_id RDMACM_1.0\n"));
    // NCCL tries the name without a number first.
    for name in ["libibverbs.so", "libibverbs.so.1"] {
        resolve(&program, name, &verbs);
    }
    for name in ["librdmacm.so", "librdmacm.so.1"] {
        resolve(&program, name, &rdmacm);
    }
}
