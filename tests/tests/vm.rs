//! Guests with a kernel RDMA device, and FreeFlow on the older kernel that they have.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use freeflow_tests::{Bed, DEADLINE, Ended, dist, free_port, have, skip, wait_for_listener};
use freeflow_vm::{End, Machine, Vm, VmError};

/// Guests emulate two CPUs each: one test has guests at a time.
fn machine(test: &str) -> Option<(Machine, MutexGuard<'static, ()>)> {
    static ONE: Mutex<()> = Mutex::new(());
    match Machine::find() {
        Ok(machine) => Some((machine, ONE.lock().unwrap_or_else(PoisonError::into_inner))),
        Err(why @ VmError::Unavailable(_)) => {
            skip(test, &why.to_string());
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("guest")
        .join(name)
}

/// A row of perftest's figures for messages of 4096 bytes.
fn measured(output: &str) -> bool {
    output
        .lines()
        .any(|line| line.split_ascii_whitespace().next() == Some("4096"))
}

#[test]
fn a_guest_has_two_rxe_devices() {
    let Some((_, _one)) = machine("a_guest_has_two_rxe_devices") else {
        return;
    };
    if !["ib_send_bw", "ibv_devices", "rdma"].into_iter().all(have) {
        return;
    }
    let outcome = freeflow_vm::run(&script("rxe.sh"), &["one", "two words"]).unwrap();
    let host = &outcome.hosts[0];
    assert_eq!(host.end, End::Exited(7), "{outcome}");
    assert!(!outcome.success());
    for wanted in [
        "link rxe0/1 state ACTIVE physical_state LINK_UP netdev v0",
        "link rxe1/1 state ACTIVE physical_state LINK_UP netdev v1",
        "args: one two words\n",
    ] {
        assert!(host.output.contains(wanted), "no {wanted:?} in {outcome}");
    }
    // In the columns of ibv_devices.
    for device in ["rxe0", "rxe1"] {
        let listed = |line: &str| line.split_ascii_whitespace().next() == Some(device);
        assert!(host.output.lines().any(listed), "no {device} in {outcome}");
    }
    assert!(measured(&host.output), "{outcome}");
    let server = std::fs::read_to_string(outcome.out().join("server")).unwrap();
    assert!(measured(&server), "{server}");
}

/// The conformance suite holds on the reference too, but for the differences that it knows. Themes
/// where rxe differs by never answering are left out: each waits for half a minute.
#[test]
fn the_reference_conforms() {
    let Some((machine, _one)) = machine("the_reference_conforms") else {
        return;
    };
    let suite = dist().join("bin/ff-conform");
    let themes =
        "device data post inline completions access order extended regions windows threads";
    let filters: Vec<_> = themes
        .split(' ')
        .map(|theme| format!("--filter {theme}::"))
        .collect();
    let script = format!(
        ". \"$VM_LIB\"; rxe_pair; {} --device rxe0 --device2 rxe1 --gid-index 1 --shorter 500 {}",
        suite.display(),
        filters.join(" ")
    );
    let outcome = Vm::new(&machine)
        .limit(Duration::from_secs(900))
        .run(&["bash", "-c", &script])
        .unwrap();
    assert!(outcome.success(), "{outcome}");
    let output = &outcome.hosts[0].output;
    let summary = output.lines().last().unwrap_or_default();
    let passed = summary.split(' ').next().and_then(|n| n.parse().ok());
    assert!(passed.is_some_and(|n: u32| n >= 68), "{outcome}");
    assert!(summary.contains(" 0 failed"), "{outcome}");
}

#[test]
fn two_hosts_meet_and_may_die() {
    let Some((machine, _one)) = machine("two_hosts_meet_and_may_die") else {
        return;
    };
    if !have("ib_send_bw") {
        return;
    }
    let script = script("hosts.sh");
    let outcome = Vm::new(&machine)
        .two_hosts(true)
        .run(&[Path::new("bash"), &script])
        .unwrap();
    let [first, second] = &outcome.hosts[..] else {
        panic!("{outcome}");
    };
    assert_eq!(
        (first.end, second.end),
        (End::Stopped, End::Died),
        "{outcome}"
    );
    assert!(second.console.contains("Kernel panic"), "{outcome}");
    assert!(
        measured(&first.output) && measured(&second.output),
        "{outcome}"
    );
    // Each prints the other's words.
    assert!(first.output.contains("ready\n"), "{outcome}");
    assert!(second.output.contains("listening\n"), "{outcome}");
}

#[test]
fn a_command_that_hangs_is_ended() {
    let Some((machine, _one)) = machine("a_command_that_hangs_is_ended") else {
        return;
    };
    let limit = Duration::from_secs(2);
    let mut said = Vec::new();
    let outcome = Vm::new(&machine)
        .limit(limit)
        .run_with(
            &["sh", "-c", "echo begun; exec sleep infinity"],
            |_, bytes| {
                said.extend_from_slice(bytes);
            },
        )
        .unwrap();
    assert_eq!(outcome.hosts[0].end, End::TimedOut(limit), "{outcome}");
    assert_eq!(outcome.hosts[0].output, "begun\n", "{outcome}");
    assert_eq!(said, b"begun\n");
    let dir = outcome.dir().to_owned();
    drop(outcome);
    assert!(!dir.exists());
}

/// Linux 6.1 tells less of memory, and its userfaultfd cannot protect what does not exist.
#[test]
fn freeflow_on_an_old_kernel() {
    let name = "freeflow_on_an_old_kernel";
    if let Some(library) = std::env::var_os("TEST_SECOND_THREAD") {
        return in_the_guest(&library.to_string_lossy());
    }
    let Some((machine, _one)) = machine(name) else {
        return;
    };
    let programs = ["ibv_devinfo", "ibv_rc_pingpong", "ib_send_bw", "gcc"];
    if !programs.into_iter().all(have) {
        return;
    }
    let dir = tempfile::tempdir_in(dist()).unwrap();
    let library = dir.path().join("thread.so");
    let compiled = Command::new("gcc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(script("thread.c"))
        .status();
    assert!(compiled.is_ok_and(|status| status.success()));
    // This test again, there.
    let this = std::env::current_exe().unwrap();
    let command = [
        "env".into(),
        format!("TEST_SECOND_THREAD={}", library.display()).into(),
        format!("FREEFLOW_DIST={}", dist().display()).into(),
        this.into_os_string(),
        "--exact".into(),
        name.into(),
        "--nocapture".into(),
    ];
    let outcome = Vm::new(&machine).run(&command).unwrap();
    assert!(outcome.success(), "{outcome}");
    let output = &outcome.hosts[0].output;
    assert!(output.contains("test result: ok. 1 passed"), "{outcome}");
    let release = machine.kernel_release().unwrap();
    assert!(output.contains(&format!("Linux {release}")), "{outcome}");
}

/// What the guest runs.
fn in_the_guest(library: &str) {
    let bed = Bed::new().unwrap();
    let said = bed.call(&["doctor", "-o", "json"]).unwrap();
    println!("{}", said.stdout);
    let said = said.success().unwrap();
    let findings: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    let userfaultfd = findings
        .as_array()
        .and_then(|list| list.iter().find(|f| f["what"] == "userfaultfd"))
        .unwrap();

    let endpoint = bed.endpoint();
    let said = endpoint.run("ibv_devinfo", &["-v"]).unwrap();
    for wanted in [
        "hca_id:\tfreeflow0".to_owned(),
        "PORT_ACTIVE (4)".to_owned(),
        format!("GID[  0]:\t\t::ffff:{}, RoCE v2", endpoint.ip),
    ] {
        assert!(said.stdout.contains(&wanted), "no {wanted:?} in {said}");
    }

    // Memory of a program with one thread can always be shared; of others as the doctor says.
    let second_thread = format!("LD_PRELOAD={library}");
    for (environment, shared, programs) in [
        (
            "ONE=1",
            true,
            ["ib_send_bw -s 4096 -n 100 -e", "ib_atomic_bw -n 50"],
        ),
        (
            &second_thread,
            userfaultfd["verdict"] == "ok",
            ["ib_write_bw -s 1048576 -n 5 -b", "ib_read_bw -s 4096 -n 50"],
        ),
    ] {
        let (registered, foreign) = pingpong(&bed, environment);
        assert!(registered > 0);
        let wanted = if shared { 0 } else { registered };
        assert_eq!(foreign, wanted, "{environment} {userfaultfd}");
        for program in programs {
            let mut args = vec![environment];
            args.extend(program.split_ascii_whitespace());
            bed.pair("env", &args).unwrap();
        }
    }
}

/// Runs a pair that checks the data; returns how many bytes the server had registered, and how
/// many of them could not be shared.
fn pingpong(bed: &Bed, environment: &str) -> (u64, u64) {
    let port = free_port();
    let port_text = port.to_string();
    let mut args = vec![
        environment,
        "ibv_rc_pingpong",
        "-g",
        "0",
        "-c",
        "-n",
        "100",
        "-p",
        &port_text,
    ];
    let (server, client) = (bed.endpoint(), bed.endpoint());
    let mut server = server.start("env", &args).unwrap();
    // It has registered its memory when it listens.
    assert!(wait_for_listener(port, DEADLINE, || server.is_alive()));
    let status = bed.status().unwrap();
    let sessions = status["endpoints"].as_array().unwrap();
    let sessions = sessions.iter().filter_map(|e| e["sessions"].as_array());
    let session = sessions.flatten().next().unwrap();
    let bytes = |what: &str| session[what].as_u64().unwrap();
    let bytes = (bytes("registered_bytes"), bytes("foreign_bytes"));
    args.push("127.0.0.1");
    let good = |side: Ended| {
        assert!(side.stdout.contains("100 iters in"), "{side}");
        assert!(!side.stdout.contains("invalid data"), "{side}");
    };
    good(client.run("env", &args).unwrap());
    good(server.wait(DEADLINE).unwrap().success().unwrap());
    bytes
}

/// Runs parts of the script that has programs on the kernel's rxe and on an endpoint that has the
/// underlay's GID, each the other's server in turn: so many checks must hold.
fn stock(test: &str, programs: &[&str], parts: &[&str], checks: u32) {
    let Some((machine, _one)) = machine(test) else {
        return;
    };
    if !programs.iter().all(|program| have(program)) {
        return;
    }
    let (script, dist) = (script("stock.sh"), dist());
    let mut command = vec![Path::new("bash"), &script, &dist];
    command.extend(parts.iter().map(Path::new));
    let outcome = Vm::new(&machine)
        .limit(Duration::from_secs(1200))
        .run(&command)
        .unwrap();
    assert!(outcome.success(), "{outcome}");
    let output = &outcome.hosts[0].output;
    let summary = output.lines().last().unwrap_or_default();
    let passed = summary.split(' ').next().and_then(|n| n.parse().ok());
    assert!(passed.is_some_and(|n: u32| n >= checks), "{outcome}");
}

#[test]
fn freeflow_and_the_reference_are_peers() {
    let programs = [
        "ibv_devinfo",
        "ibv_rc_pingpong",
        "ib_send_bw",
        "rping",
        "tc",
    ];
    let parts = [
        "devinfo",
        "pingpongs",
        "connected",
        "unreliable",
        "loss",
        "manager",
    ];
    stock(
        "freeflow_and_the_reference_are_peers",
        &programs,
        &parts,
        60,
    );
}

#[test]
fn rsockets_and_the_references_are_peers() {
    let programs = ["rstream", "riostream", "rcopy", "rdma", "killall", "pgrep"];
    let test = "rsockets_and_the_references_are_peers";
    stock(test, &programs, &["streams"], 30);
}

/// Nothing that FreeFlow waits for is measured by the time of day.
#[test]
fn the_clock_may_jump() {
    let Some((machine, _one)) = machine("the_clock_may_jump") else {
        return;
    };
    if !have("ibv_rc_pingpong") {
        return;
    }
    let (script, dist) = (script("clock.sh"), dist());
    let command = [Path::new("bash"), &script, &dist, Path::new("5000")];
    let outcome = Vm::new(&machine).run(&command).unwrap();
    assert!(outcome.success(), "{outcome}");
}
