//! Programs in C, compiled against the installed headers.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::{DEADLINE, Running, have};

/// The program of `c/NAME.c`, which is compiled when it is first asked for; none, and that is said,
/// if there is no compiler.
pub fn compiled(name: &'static str) -> Option<String> {
    compiled_by("gcc", name, &["-libverbs", "-lrdmacm", "-ldl", "-lpthread"])
}

/// As [`compiled()`], by another compiler, with its libraries.
pub fn compiled_by(
    compiler: &'static str,
    name: &'static str,
    libraries: &[&str],
) -> Option<String> {
    type Key = (&'static str, &'static str);
    static PROGRAMS: Mutex<Option<HashMap<Key, String>>> = Mutex::new(None);
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    if !have(compiler) {
        return None;
    }
    // A test that failed to compile has nothing half done in there.
    let mut programs = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
    let programs = programs.get_or_insert_default();
    if let Some(program) = programs.get(&(compiler, name)) {
        return Some(program.clone());
    }
    let directory = DIRECTORY.get_or_init(|| tempfile::tempdir().expect("a temporary directory"));
    let program = directory.path().join(format!("{name}-{compiler}"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("c/{name}.c"));
    let mut compile = Command::new(compiler);
    compile
        .args([
            "-std=gnu11",
            "-O1",
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-o",
        ])
        .args([&program, &source])
        .args(libraries);
    let done = Running::start(&mut compile).and_then(|run| run.wait(DEADLINE)?.success());
    done.expect("the program compiles");
    let program = program.to_str().expect("a path of text").to_owned();
    programs.insert((compiler, name), program.clone());
    Some(program)
}
