//! A process that executes itself anew while its threads use devices: see `c/execs.c`.

use std::path::Path;
use std::process::Command;

use freeflow_tests::{Bed, DEADLINE, Running, dist, have};
use serde_json::Value;

#[test]
fn each_program_image_of_a_process_has_its_own_session() {
    if !have("gcc") {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = dir.path().join("execs");
    let mut gcc = Command::new("gcc");
    gcc.args(["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("c/execs.c"))
        .args(["-libverbs", "-lpthread"]);
    let compiled = Running::start(&mut gcc).and_then(|gcc| gcc.wait(DEADLINE)?.success());
    compiled.expect("the program compiles");
    let bed = Bed::new().expect("a router starts");
    let endpoint = bed.lasting_endpoint("execs").unwrap();
    let mut command = Command::new(program);
    command
        .env("LD_LIBRARY_PATH", dist().join("lib"))
        .env("FREEFLOW_ENDPOINT", &endpoint.socket);
    let said = Running::start(&mut command)
        .and_then(|running| running.wait(DEADLINE)?.success())
        .unwrap();
    assert_eq!(said.stdout, "execs hold\n", "{said}");
    // Nothing of any image is left, and none was ended for what it did.
    let used = |quota: &Value| quota["used"].as_u64().unwrap_or(0);
    bed.wait_for_status(
        |status| {
            let all = status["endpoints"].as_array().into_iter().flatten();
            let quotas = all
                .clone()
                .flat_map(|e| e["quota"].as_array().into_iter().flatten());
            all.clone().count() == 1
                && all
                    .clone()
                    .all(|e| e["sessions"].as_array().is_some_and(Vec::is_empty))
                && quotas.map(used).sum::<u64>() == 0
        },
        DEADLINE,
    )
    .unwrap();
    let status = bed.status().unwrap();
    let reasons = status["ended_sessions"].as_array().unwrap();
    for ended in reasons {
        let reason = ended["reason"].as_str().unwrap_or_default();
        let expected = ["connection closed", "process exited"];
        assert!(expected.contains(&reason), "{status:#}");
    }
}
