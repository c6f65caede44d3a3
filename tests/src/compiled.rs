//! Programs in C, compiled against the installed headers.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::{DEADLINE, Running, have};

/// The program of `c/NAME.c`, which is compiled when it is first asked for; none, and that is said,
/// if there is no compiler.
pub fn compiled(name: &'static str) -> Option<String> {
    static PROGRAMS: Mutex<Option<HashMap<&str, String>>> = Mutex::new(None);
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    if !have("gcc") {
        return None;
    }
    // A test that failed to compile has nothing half done in there.
    let mut programs = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
    let programs = programs.get_or_insert_default();
    if let Some(program) = programs.get(name) {
        return Some(program.clone());
    }
    let directory = DIRECTORY.get_or_init(|| tempfile::tempdir().expect("a temporary directory"));
    let program = directory.path().join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("c/{name}.c"));
    let mut gcc = Command::new("gcc");
    gcc.args([
        "-std=gnu11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-o",
    ])
    .args([&program, &source])
    .args(["-libverbs", "-lrdmacm", "-ldl", "-lpthread"]);
    let done = Running::start(&mut gcc).and_then(|gcc| gcc.wait(DEADLINE)?.success());
    done.expect("the program compiles");
    let program = program.to_str().expect("a path of text").to_owned();
    programs.insert(name, program.clone());
    Some(program)
}
