//! A process that executes itself anew while its threads use devices: see `c/execs.c`.

use std::process::Command;

use freeflow_tests::{Bed, DEADLINE, Running, compiled, dist};
use serde_json::Value;

#[test]
fn each_program_image_of_a_process_has_its_own_session() {
    let Some(program) = compiled("execs") else {
        return;
    };
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
