//! The memory verbs as an unmodified C program sees them: see `c/memory_verbs.c`.

use freeflow_tests::{Bed, DEADLINE, Running, compiled};

fn holds(case: &str) {
    holds_with(case, &[]);
}

/// It holds on an endpoint that `freeflow run` makes with these options.
fn holds_with(case: &str, options: &[&str]) {
    let Some(program) = compiled("memory_verbs") else {
        return;
    };
    let bed = Bed::new().expect("a router starts");
    let mut command = bed.freeflow();
    command.args(["run", "--ip", "10.77.0.1"]).args(options);
    command.args(["--", &program, case]);
    let said = Running::start(&mut command)
        .and_then(|running| running.wait(DEADLINE)?.success())
        .unwrap();
    assert_eq!(said.stdout, format!("{case} holds\n"), "{said}");
    assert_eq!(said.stderr, "", "{said}");
    // It broke no rule: its session ended as that of any program does.
    let status = bed.status().unwrap();
    let ended = status["ended_sessions"].as_array().expect("a list");
    for session in ended {
        let reason = session["reason"].as_str().unwrap_or_default();
        let good = ["connection closed", "process exited", "endpoint removed"];
        assert!(good.contains(&reason), "{status:#}");
    }
}

macro_rules! cases {
    ($($case:ident)*) => {
        $(#[test]
        fn $case() {
            holds(stringify!($case));
        })*
    };
}

cases! {
    rereg window_type_1 window_type_2 windows_over_xrc bind_errors extended_posting atomic_write zero_based
    null_region on_demand implicit device_memory buffers rings_made_by_threads capabilities
}

#[test]
fn limited() {
    holds_with("limited", &["--quota", "registered=1M"]);
}
