//! The memory verbs as an unmodified C program sees them: see `c/memory_verbs.c`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use freeflow_tests::{Bed, DEADLINE, Running, have};

/// The program, compiled against the installed header.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = PROGRAM.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let program = dir.path().join("memory_verbs");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("c/memory_verbs.c");
        let mut gcc = Command::new("gcc");
        gcc.args(["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&program)
            .arg(source)
            .args(["-libverbs", "-ldl", "-lpthread"]);
        Running::start(&mut gcc)
            .and_then(|gcc| gcc.wait(DEADLINE)?.success())
            .expect("the program compiles");
        (dir, program)
    });
    program
}

fn holds(case: &str) {
    if !have("gcc") {
        return;
    }
    let program = program().to_str().expect("a path of text");
    let bed = Bed::new().expect("a router starts");
    let said = bed.endpoint().run(program, &[case]).unwrap();
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
    null_region on_demand device_memory buffers rings_made_by_threads capabilities
}
