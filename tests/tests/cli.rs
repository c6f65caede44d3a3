//! The command line: what it says, its exit codes, and how it starts and ends routers.

use std::os::unix::fs::PermissionsExt;

use freeflow_tests::{
    DEADLINE, Ended, Place, Running, descendants, have, is_root, skip, wait_until,
};
use rustix::process::Signal;

fn run<'a>(options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    [&["run"], options, &["--"], command].concat()
}

/// It fails with a code and one line that contains some words.
fn fails(said: &Ended, code: i32, words: &[&str]) {
    assert_eq!(said.code(), code, "{said}");
    assert_eq!(said.stderr.lines().count(), 1, "{said}");
    assert_eq!(said.stdout, "", "{said}");
    for word in words {
        assert!(said.stderr.contains(word), "no {word:?} in {said}");
    }
}

#[test]
fn without_a_router_there_is_an_exit_code_of_its_own() {
    let place = Place::ordinary().unwrap();
    for args in [
        &["status"][..],
        &["status", "-o", "json"],
        &["endpoint", "ls"],
        &["endpoint", "inspect", "a"],
        &["endpoint", "create"],
        &["endpoint", "rm", "a"],
    ] {
        fails(
            &place.call(args).unwrap(),
            3,
            &["no router runs in", "freeflow router"],
        );
    }
}

#[test]
fn bad_usage_is_not_taken_for_the_programs_failure() {
    let place = Place::ordinary().unwrap();
    for (args, code) in [
        (&["no-such-command"][..], 2),
        (&["status", "--no-such-option"], 2),
        (&["endpoint", "rm"], 2),
        (
            &[
                "router",
                "--tls-cert",
                "a",
                "--tls-key",
                "b",
                "--tls-ca",
                "c",
            ],
            2,
        ),
        (&["router", "--insecure"], 2),
        (&["router", "--control-port", "4793"], 2),
        (&["host", "ca", "--days", "4294967295"], 2),
        (&["host", "ca", "--days", "0"], 2),
        (&["host", "cert", "192.0.2.1", "--days", "36501"], 2),
        (&["host", "cert", "192.0.2.1", "--days", "0"], 2),
        (&["run"], 125),
        (&["run", "--no-such-option", "--", "true"], 125),
        (&["run", "--ip", "10.77.0", "--", "true"], 125),
        (&["run", "--network", "other", "--", "true"], 125),
    ] {
        let said = place.call(args).unwrap();
        assert_eq!(said.code(), code, "{said}");
        assert!(said.stderr.starts_with("error: "), "{said}");
    }
    for args in [&["--help"][..], &["run", "--help"], &["endpoint", "--help"]] {
        let said = place.clean(args).unwrap();
        assert!(said.stdout.contains("Usage:"), "{said}");
    }
    let help = place.clean(&["--help"]).unwrap().stdout;
    for code in ["125", "126", "127"] {
        assert!(help.contains(code), "{help}");
    }
}

#[test]
fn the_exit_code_is_the_programs() {
    let place = Place::ordinary().unwrap();
    for (script, code) in [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 77", 77),
        ("exit 255", 255),
        ("kill -KILL $$", 128 + 9),
        ("kill -SEGV $$", 128 + 11),
    ] {
        let said = place.call(&run(&[], &["sh", "-c", script])).unwrap();
        assert_eq!((said.code(), &*said.stderr), (code, ""), "{said}");
    }
    // Options of the program are its own.
    let said = place.clean(&["run", "echo", "--name", "-v"]).unwrap();
    assert_eq!(said.stdout, "--name -v\n");
}

#[test]
fn a_program_that_cannot_run_is_told_apart() {
    let place = Place::ordinary().unwrap();
    let script = |name: &str, text: &str, mode: u32| {
        let path = place.file(name, 0).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = script("plain", "#!/bin/sh\n", 0o644);
    let lost = script("lost", "#!/no/such/interpreter\n", 0o755);
    let old = script("old", "echo ran\n", 0o755);
    for (program, code, words) in [
        ("no-such-program-here", 127, "no-such-program-here"),
        ("/no/such/file", 127, "/no/such/file"),
        ("/", 126, "directory"),
        (&plain, 126, "Permission denied"),
        (&lost, 126, "interpreter"),
    ] {
        fails(
            &place.call(&run(&[], &[program])).unwrap(),
            code,
            &[program, words],
        );
    }
    // As the shell does: a script without an interpreter's line is the shell's.
    assert_eq!(place.clean(&run(&[], &[&old])).unwrap().stdout, "ran\n");
}

#[test]
fn addresses_and_names_are_checked() {
    let place = Place::ordinary().unwrap();
    for ip in [
        "0.0.0.0",
        "0.1.2.3",
        "10.77.0.0",
        "10.77.255.255",
        "127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "ff02::1",
        "::ffff:127.0.0.1",
    ] {
        let said = place.call(&run(&["--ip", ip], &["true"])).unwrap();
        fails(
            &said,
            125,
            &["is not an address that an endpoint can own", "--ip"],
        );
    }
    let long = "x".repeat(64);
    for name in ["", ".hidden", "a/b", "a b", &long] {
        let said = place.call(&run(&["--name", name], &["true"])).unwrap();
        fails(&said, 125, &["is no name for an endpoint", name]);
    }
    for tenant in ["", "a b", "a#b"] {
        let said = place.call(&run(&["--tenant", tenant], &["true"])).unwrap();
        fails(&said, 125, &["is no name for a tenant", tenant]);
    }
    let freeflow = place.binary();
    let inner = |options: &str| {
        let script = format!("exec {} run {options} -- echo ran", freeflow.display());
        let outer = ["--name", "one", "--ip", "10.77.1.1"];
        place.call(&run(&outer, &["sh", "-c", &script])).unwrap()
    };
    fails(&inner("--name one"), 125, &["\"one\"", "exists", "--name"]);
    let in_use = ["10.77.1.1", "in use by endpoint \"one\"", "--ip"];
    fails(&inner("--ip 10.77.1.1"), 125, &in_use);
    fails(&inner("--ip ::ffff:10.77.1.1"), 125, &in_use);
    let no_underlay = ["no address in the network between hosts", "--underlay "];
    fails(&inner("--underlay-gid"), 125, &no_underlay);
    let other = inner("--tenant other --ip 10.77.1.1");
    assert_eq!((other.code(), &*other.stdout), (0, "ran\n"), "{other}");
}

#[test]
fn runtime_directories_that_cannot_be_used() {
    let place = Place::ordinary().unwrap();
    let in_dir = |dir: &str, args: &[&str]| {
        place
            .call(&[&["--runtime-dir", dir], args].concat())
            .unwrap()
    };
    let run = ["run", "--", "true"];
    fails(
        &in_dir("/proc/nowhere", &run),
        125,
        &["/proc/nowhere", "--runtime-dir"],
    );
    let own = place.own();
    let long = format!("{}/{}", own.display(), "x".repeat(100));
    for args in [&run[..], &["status"]] {
        fails(&in_dir(&long, args), 125, &["too long", "--runtime-dir"]);
    }
    // Long enough for the router's socket, too long for this endpoint's.
    let long = format!(
        "{}/{}",
        own.display(),
        "x".repeat(94 - own.as_os_str().len())
    );
    let named = ["run", "--name", "a-name-that-is-long", "--", "true"];
    fails(
        &in_dir(&long, &named),
        125,
        &["a-name-that-is-long", "too long"],
    );
    let file = place.file("file", 0).unwrap();
    fails(&in_dir(file.to_str().unwrap(), &run), 125, &["file"]);
    let said = Running::start(place.freeflow(run).env("FREEFLOW_LIB_DIR", "/no/lib"));
    let said = said.unwrap().wait(DEADLINE).unwrap();
    fails(&said, 125, &["/no/lib", "FREEFLOW_LIB_DIR"]);
}

#[test]
fn a_router_of_another_user_is_refused() {
    if !is_root() {
        return skip("a router of another user", "needs root to have one");
    }
    let (ours, other) = (Place::ours().unwrap(), Place::ordinary().unwrap());
    let router = Running::start(&mut ours.freeflow(["router"])).unwrap();
    router.wait_for("router serves", DEADLINE).unwrap();
    let dir = ours.runtime_dir();
    let dir = dir.to_str().unwrap();
    let as_other = |args: &[&str]| {
        other
            .call(&[&["--runtime-dir", dir], args].concat())
            .unwrap()
    };
    for args in [&["status"][..], &["run", "--", "true"]] {
        fails(
            &as_other(args),
            125,
            &[dir, "another user's", "--runtime-dir"],
        );
    }
    fails(
        &as_other(&["router"]),
        125,
        &[dir, "belongs to user 0", "--runtime-dir"],
    );
    // Nor does root make files in a directory that another user may change under its feet.
    let theirs = other.own();
    let args = [
        "--runtime-dir",
        theirs.to_str().unwrap(),
        "run",
        "--",
        "true",
    ];
    fails(
        &ours.call(&args).unwrap(),
        125,
        &["belongs to user", "--runtime-dir"],
    );
}

#[test]
fn one_of_many_starts_the_router_and_the_last_ends_it() {
    let place = Place::ordinary().unwrap();
    const MANY: usize = 30;
    let go = place.own().join("go");
    let script = format!("until test -e {}; do sleep 0.05; done", go.display());
    let args = run(&["-v"], &["sh", "-c", &script]);
    let start = |_| Running::start(&mut place.freeflow(args.iter().copied())).unwrap();
    let all: Vec<_> = (0..MANY).map(start).collect();
    let endpoints = || {
        let status = place.status().ok()?;
        Some(status["endpoints"].as_array()?.len())
    };
    wait_until("all have an endpoint", DEADLINE, || {
        endpoints() == Some(MANY)
    })
    .unwrap();
    place.file("go", 0).unwrap();
    let mut started = 0;
    for one in all {
        let ended = one.wait(DEADLINE).unwrap().success().unwrap();
        started += usize::from(ended.stderr.contains("started an embedded router"));
    }
    assert_eq!(started, 1);
    let gone = || place.call(&["status"]).unwrap().code() == 3;
    wait_until("the router has ended", DEADLINE, gone).unwrap();
    assert!(!place.runtime_dir().join("router.sock").exists());
}

#[test]
fn an_endpoint_is_free_when_its_program_has_ended() {
    let place = Place::ordinary().unwrap();
    let again = format!(
        "{} run --name one --ip 10.77.0.1 -- true",
        place.binary().display()
    );
    let script = format!("for i in 1 2 3 4 5 6 7 8; do {again} || exit; done");
    let mut shell = place.program("/bin/sh");
    let ended = Running::start(shell.args(["-c", &script])).unwrap();
    let ended = ended.wait(DEADLINE).unwrap().success().unwrap();
    assert_eq!(ended.stderr, "");
}

#[test]
fn an_endpoint_that_was_replaced_does_not_end_with_the_first() {
    let place = Place::ordinary().unwrap();
    let router = Running::start(&mut place.freeflow(["router"])).unwrap();
    router.wait_for("router serves", DEADLINE).unwrap();
    let command = run(
        &["--name", "one"],
        &["sh", "-c", "echo ready; exec sleep 1000"],
    );
    let first = Running::start(&mut place.freeflow(command)).unwrap();
    first.wait_for("ready", DEADLINE).unwrap();
    place.clean(&["endpoint", "rm", "one"]).unwrap();
    place.clean(&["endpoint", "create", "one"]).unwrap();
    first.signal(Signal::TERM);
    assert_eq!(first.wait(DEADLINE).unwrap().code(), 128 + 15);
    place.clean(&["endpoint", "inspect", "one"]).unwrap();
}

#[test]
fn a_router_that_is_about_to_end_is_replaced() {
    let place = Place::ordinary().unwrap();
    // Its last endpoint is gone for just about as long as it waits for another.
    for extra in 0..8 {
        place.clean(&run(&[], &["true"])).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(980 + extra * 5));
    }
}

#[test]
fn a_router_with_nothing_to_read_again_says_so_and_goes_on() {
    let place = Place::ordinary().unwrap();
    let router = Running::start(&mut place.freeflow(["router"])).unwrap();
    router.wait_for("router serves", DEADLINE).unwrap();
    router.signal(Signal::HUP);
    router.wait_for("nothing to read again", DEADLINE).unwrap();
    place.clean(&["endpoint", "create"]).unwrap();
    // Nor does it end when there is no place for what it says, as after its terminal has gone.
    drop(router);
    let script = format!("exec {} router 2>/dev/full", place.binary().display());
    let router = Running::start(place.program("/bin/sh").args(["-c", &script])).unwrap();
    let serves = || place.call(&["status"]).unwrap().code() == 0;
    wait_until("it serves", DEADLINE, serves).unwrap();
    router.signal(Signal::HUP);
    router.signal(Signal::TERM);
    let ended = router.wait(DEADLINE).unwrap();
    assert_eq!(ended.code(), 0, "{ended}");
}

#[test]
fn a_router_that_stays_follows_one_that_ends() {
    let place = Place::ordinary().unwrap();
    let program = run(&["-v"], &["sh", "-c", "echo ready; exec sleep 1000"]);
    let program = Running::start(&mut place.freeflow(program)).unwrap();
    program.wait_for("ready", DEADLINE).unwrap();
    assert_eq!(place.status().unwrap()["embedded"], true);
    let said = place.call(&["router"]).unwrap();
    fails(&said, 125, &["embedded router", "--runtime-dir"]);
    program.signal(Signal::TERM);
    assert_eq!(program.wait(DEADLINE).unwrap().code(), 128 + 15);
    // The embedded one waits a while for another endpoint.
    let router = Running::start(&mut place.freeflow(["router"])).unwrap();
    router.wait_for("router serves", DEADLINE).unwrap();
    let status = place.status().unwrap();
    assert_eq!(
        (&status["embedded"], &status["pid"]),
        (&false.into(), &router.pid().into())
    );
}

#[test]
fn a_router_that_is_stopped_is_not_waited_for() {
    let place = Place::ordinary().unwrap();
    let first = Running::start(&mut place.freeflow(["router"])).unwrap();
    first.wait_for("router serves", DEADLINE).unwrap();
    first.signal(Signal::STOP);
    let second = place.call(&["router"]).unwrap();
    fails(&second, 125, &["already serves", "is it stopped?"]);
    first.signal(Signal::CONT);
    first.signal(Signal::TERM);
    assert_eq!(first.wait(DEADLINE).unwrap().code(), 0);
}

#[test]
fn what_a_killed_router_left_is_no_obstacle() {
    let place = Place::ordinary().unwrap();
    let mut first = Running::start(&mut place.freeflow(["router"])).unwrap();
    first.wait_for("router serves", DEADLINE).unwrap();
    let second = place.call(&["router"]).unwrap();
    fails(
        &second,
        125,
        &[
            "a router already serves",
            place.runtime_dir().to_str().unwrap(),
        ],
    );
    place
        .clean(&["endpoint", "create", "old", "--ip", "10.77.0.1"])
        .unwrap();
    first.signal(Signal::KILL);
    wait_until("the router is dead", DEADLINE, || !first.is_alive()).unwrap();
    fails(&place.call(&["status"]).unwrap(), 3, &["no router"]);
    place
        .clean(&run(&["--name", "old", "--ip", "10.77.0.1"], &["true"]))
        .unwrap();
    let endpoints = place.runtime_dir().join("endpoints");
    assert_eq!(std::fs::read_dir(endpoints).map_or(0, |d| d.count()), 0);
}

fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
    mask >> (signal.as_raw() - 1) & 1 != 0
}

#[test]
fn signals_reach_the_program() {
    let place = Place::ordinary().unwrap();
    for (name, signal) in [
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("QUIT", Signal::QUIT),
        ("TERM", Signal::TERM),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
    ] {
        if is_ignored(signal) {
            // As by a shell's background job: then no shell can set a trap for it.
            skip(
                "a signal that reaches the program",
                &format!("SIG{name} is ignored"),
            );
            continue;
        }
        let script =
            format!("trap 'echo got it; kill $!; exit 42' {name}; sleep 1000 & echo ready; wait");
        let running = run(&[], &["sh", "-c", &script]);
        let running = Running::start(&mut place.freeflow(running)).unwrap();
        running.wait_for("ready", DEADLINE).unwrap();
        running.signal(signal);
        let ended = running.wait(DEADLINE).unwrap();
        assert_eq!(
            (ended.code(), &*ended.stdout),
            (42, "ready\ngot it\n"),
            "{name}: {ended}"
        );
        // Without a handler the code says which signal it was.
        let running = run(&[], &["sh", "-c", "echo ready; exec sleep 1000"]);
        let running = Running::start(&mut place.freeflow(running)).unwrap();
        running.wait_for("ready", DEADLINE).unwrap();
        running.signal(signal);
        let ended = running.wait(DEADLINE).unwrap();
        assert_eq!(ended.code(), 128 + signal.as_raw(), "{name}: {ended}");
    }
}

#[test]
fn what_is_ignored_stays_ignored() {
    let place = Place::ordinary().unwrap();
    let script = format!(
        "trap '' HUP; exec {} run -- sh -c 'echo ready; exec sleep 1000'",
        place.binary().display()
    );
    let running = Running::start(place.program("/bin/sh").args(["-c", &script])).unwrap();
    running.wait_for("ready", DEADLINE).unwrap();
    // Of two pending signals the lower one comes first: the program would die of it.
    running.signal(Signal::HUP);
    running.signal(Signal::TERM);
    let ended = running.wait(DEADLINE).unwrap();
    assert_eq!(ended.code(), 128 + Signal::TERM.as_raw(), "{ended}");
}

#[test]
fn standard_input_and_output_are_the_programs() {
    let place = Place::ordinary().unwrap();
    let script = format!(
        "echo in | {} run -- sed s/in/out/",
        place.binary().display()
    );
    let running = Running::start(place.program("/bin/sh").args(["-c", &script])).unwrap();
    let ended = running.wait(DEADLINE).unwrap().success().unwrap();
    assert_eq!((&*ended.stdout, &*ended.stderr), ("out\n", ""));
}

#[test]
fn a_program_by_hand_uses_an_endpoint_that_stays() {
    if !have("ibv_devinfo") {
        return;
    }
    let place = Place::ordinary().unwrap();
    let router = Running::start(&mut place.freeflow(["router"])).unwrap();
    router.wait_for("router serves", DEADLINE).unwrap();
    let json = |args: &[&str]| {
        let said = place.clean(&[args, &["-o", "json"]].concat()).unwrap();
        serde_json::from_str::<serde_json::Value>(&said.stdout).unwrap()
    };
    let made = json(&["endpoint", "create", "web", "--ip", "fd77::1"]);
    assert_eq!(
        (&made["name"], &made["ip"]),
        (&"web".into(), &"fd77::1".into())
    );
    assert_eq!(json(&["endpoint", "ls"])[0]["name"], "web");
    assert_eq!(
        json(&["endpoint", "inspect", "web"])["socket"],
        made["socket"]
    );
    assert_eq!(json(&["status"])["endpoints"][0]["name"], "web");
    assert!(json(&["doctor"]).as_array().unwrap().len() > 5);
    let mut devinfo = place.program(freeflow_tests::program("ibv_devinfo").unwrap());
    devinfo
        .arg("-v")
        .env("FREEFLOW_ENDPOINT", made["socket"].as_str().unwrap())
        .env("LD_LIBRARY_PATH", place.lib());
    let said = Running::start(&mut devinfo)
        .unwrap()
        .wait(DEADLINE)
        .unwrap()
        .success()
        .unwrap();
    assert!(said.stdout.contains("fd77::1, RoCE v2"), "{said}");
    for args in [
        &["endpoint", "rm", "no"][..],
        &["endpoint", "inspect", "no"],
        &["endpoint", "set", "no", "--quota", "qps=1"],
    ] {
        fails(
            &place.call(args).unwrap(),
            125,
            &["there is no endpoint \"no\"", "freeflow endpoint ls"],
        );
    }
    fails(
        &place.call(&["endpoint", "create", "web"]).unwrap(),
        125,
        &["\"web\" exists", "endpoint create NAME"],
    );
    place.clean(&["endpoint", "rm", "web"]).unwrap();
    assert_eq!(json(&["endpoint", "ls"]), serde_json::json!([]));
}

/// Debian's library under another name, as Python's wheels carry it.
fn renamed_copy(place: &Place) -> Option<String> {
    let stock = "/usr/lib/x86_64-linux-gnu/libibverbs.so.1";
    if !std::path::Path::new(stock).exists() {
        skip("another libibverbs", &format!("there is no {stock}"));
        return None;
    }
    let copy = place.file("libibverbs-0a1b2c3d.so.1", 0).unwrap();
    std::fs::copy(stock, &copy).unwrap();
    Some(copy.to_str().unwrap().to_owned())
}

#[test]
fn a_program_that_loads_another_library_is_told_of_once() {
    let place = Place::ordinary().unwrap();
    let Some(copy) = renamed_copy(&place) else {
        return;
    };
    // A child of the program loads it; nothing shows that beforehand.
    let script =
        format!("LD_PRELOAD={copy} sleep 1000 & trap \"kill $!; exit 5\" TERM; echo ready; wait");
    let command = run(&[], &["sh", "-c", &script]);
    let running = Running::start(&mut place.freeflow(command)).unwrap();
    running.wait_for("--preload", DEADLINE).unwrap();
    running.signal(Signal::TERM);
    let said = running.wait(DEADLINE).unwrap();
    assert_eq!(said.code(), 5, "{said}");
    assert_eq!(said.stderr.lines().count(), 1, "{said}");
    for words in ["warning", "sleep (pid", &copy] {
        assert!(said.stderr.contains(words), "{said}");
    }
}

#[test]
fn another_library_is_foreseen_or_preceded() {
    if !have("ibv_devices") {
        return;
    }
    let place = Place::ordinary().unwrap();
    let Some(copy) = renamed_copy(&place) else {
        return;
    };
    let devices = |options: &[&str]| {
        let mut command = place.freeflow(run(options, &["ibv_devices"]));
        let running = Running::start(command.env("LD_PRELOAD", &copy)).unwrap();
        running.wait(DEADLINE).unwrap().success().unwrap()
    };
    let said = devices(&[]);
    assert!(
        said.stderr.contains(&copy) && said.stderr.contains("--preload"),
        "{said}"
    );
    assert_eq!(said.stderr.lines().count(), 1, "{said}");
    assert!(!said.stdout.contains("freeflow0"), "{said}");
    let said = devices(&["--preload"]);
    assert!(said.stdout.contains("freeflow0"), "{said}");
    assert_eq!(said.stderr, "", "{said}");
}

#[test]
fn a_router_without_descriptors_refuses_and_goes_on() {
    if !have("ibv_rc_pingpong") {
        return;
    }
    let place = Place::ordinary().unwrap();
    let mut router = place.program("/bin/sh");
    let script = format!("ulimit -n 64; exec {} router", place.binary().display());
    let router = Running::start(router.args(["-c", &script])).unwrap();
    router.wait_for("router serves", DEADLINE).unwrap();
    // An endpoint has a share of them alone: several use them all up.
    let sockets = ["a", "b", "c", "d", "e", "f"].map(|name| {
        let made = place.clean(&["endpoint", "create", name]).unwrap().stdout;
        made.split_ascii_whitespace().nth(2).unwrap().to_owned()
    });
    let program = freeflow_tests::program("ibv_rc_pingpong").unwrap();
    // A server that waits for a client, or how it ended because it found no room.
    let serve = |socket: &str| {
        let port = freeflow_tests::free_port();
        let mut command = place.program(&program);
        command
            .args(["-g", "0", "-p", &port.to_string()])
            .env("FREEFLOW_ENDPOINT", socket)
            .env("LD_LIBRARY_PATH", place.lib());
        let mut running = Running::start(&mut command).unwrap();
        if freeflow_tests::wait_for_listener(port, DEADLINE, || running.is_alive()) {
            Ok(running)
        } else {
            Err(running.wait(DEADLINE).unwrap())
        }
    };
    // Each endpoint takes what it can have, until one that has nothing is refused.
    let mut waiting = Vec::new();
    let (socket, refused) = sockets
        .iter()
        .find_map(|socket| {
            let before = waiting.len();
            loop {
                match serve(socket) {
                    Ok(running) => waiting.push(running),
                    Err(refused) if waiting.len() == before => break Some((socket, refused)),
                    Err(refused) => {
                        assert!(!refused.status.success(), "{refused}");
                        break None;
                    }
                }
                assert!(
                    waiting.len() < 64,
                    "64 descriptors are enough for 64 sessions"
                );
            }
        })
        .expect("64 descriptors are enough for six endpoints' shares");
    assert!(!refused.status.success(), "{refused}");
    assert!(waiting.len() > 2, "{refused}");
    // They end, and there is room again.
    drop(waiting);
    let again = || {
        let mut command = place.program(freeflow_tests::program("ibv_devinfo").unwrap());
        command
            .env("FREEFLOW_ENDPOINT", socket)
            .env("LD_LIBRARY_PATH", place.lib());
        let said = Running::start(&mut command)
            .unwrap()
            .wait(DEADLINE)
            .unwrap();
        said.stdout.contains("PORT_ACTIVE")
    };
    wait_until("a session is possible again", DEADLINE, again).unwrap();
}

#[test]
fn the_program_ends_with_freeflow_run() {
    let place = Place::ordinary().unwrap();
    let running = run(&[], &["sh", "-c", "echo ready; exec sleep 1000"]);
    let running = Running::start(&mut place.freeflow(running)).unwrap();
    running.wait_for("ready", DEADLINE).unwrap();
    let family = descendants(running.pid());
    running.signal(Signal::KILL);
    let gone = |pid: &u32| !std::path::Path::new(&format!("/proc/{pid}/exe")).exists();
    // The embedded router, too, as its last endpoint is gone.
    wait_until("all have ended", DEADLINE, || family.iter().all(gone)).unwrap();
}

#[test]
fn a_router_without_a_map_knows_the_mtu_of_its_link() {
    let test = "a router without a map";
    if !is_root() {
        return skip(test, "only root makes network namespaces here");
    }
    if !["unshare", "ip", "ibv_devinfo"].into_iter().all(have) {
        return;
    }
    let place = Place::ours().unwrap();
    for (mtu, active) in [(1500, "1024 (3)"), (9000, "4096 (5)")] {
        let dir = tempfile::tempdir().unwrap();
        let freeflow = format!(
            "{} --runtime-dir {}",
            place.binary().display(),
            dir.path().display()
        );
        let script = format!(
            "set -e
             ip link add d0 mtu {mtu} type veth peer name d1 mtu {mtu}
             ip addr add 192.0.2.9/24 dev d0
             ip link set d0 up; ip link set d1 up
             {freeflow} router --underlay 192.0.2.9 > /dev/null &
             router=$!
             trap 'kill $router' EXIT
             until {freeflow} status > /dev/null 2>&1; do kill -0 $router; sleep 0.1; done
             {freeflow} run --underlay-gid -- ibv_devinfo"
        );
        let mut command = std::process::Command::new("unshare");
        command.args(["-n", "sh", "-c", &script]);
        let said = Running::start(&mut command).unwrap().wait(DEADLINE);
        let said = said.and_then(Ended::success);
        let said = said.unwrap_or_else(|e| panic!("{e:#}"));
        let line = said.stdout.lines().find(|l| l.contains("active_mtu"));
        assert!(line.is_some_and(|l| l.contains(active)), "{said}");
    }
}
