//! Children of a process that opens devices in another thread: see `c/forks.c`.

use std::path::Path;
use std::process::Command;

use freeflow_tests::{Bed, DEADLINE, Running, have};

#[test]
fn a_child_opens_the_device_whatever_its_parent_was_doing() {
    if !have("gcc") {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = dir.path().join("forks");
    let mut gcc = Command::new("gcc");
    gcc.args(["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("c/forks.c"))
        .args(["-libverbs", "-lpthread"]);
    let compiled = Running::start(&mut gcc).and_then(|gcc| gcc.wait(DEADLINE)?.success());
    compiled.expect("the program compiles");
    let bed = Bed::new().expect("a router starts");
    let program = program.to_str().expect("a path of text");
    let said = bed.endpoint().run(program, &[]).unwrap();
    assert_eq!(said.stdout, "forks hold\n", "{said}");
}
