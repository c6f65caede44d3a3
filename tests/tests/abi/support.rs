//! The C compiler, and what is installed.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use freeflow_tests::{DEADLINE, Ended, Running, dist, skip};

/// A file of ours.
pub(crate) fn library(name: &str) -> PathBuf {
    dist().join("lib").join(name)
}

/// Where the distribution has its libraries.
pub(crate) const SYSTEM: [&str; 3] = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"];

/// The distribution's file.
pub(crate) fn installed(name: &str) -> Option<PathBuf> {
    let mut paths = SYSTEM.iter().map(|dir| Path::new(dir).join(name));
    paths.find(|path| path.is_file())
}

/// Where the tests put what they compile.
pub(crate) fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// A C source of the tests.
pub(crate) fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("c").join(name)
}

fn compiler() -> Command {
    Command::new(std::env::var_os("CC").unwrap_or_else(|| "gcc".into()))
}

/// Whether a C file of this text can be compiled here.
pub(crate) fn compiles(text: &str) -> bool {
    let mut gcc = compiler();
    gcc.args(["-fsyntax-only", "-x", "c", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = gcc.spawn().expect("gcc can be started");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(text.as_bytes()).expect("gcc reads");
    drop(stdin);
    child.wait().expect("gcc ends").success()
}

/// Whether rdma-core's headers and a C compiler are installed; says so if not.
pub(crate) fn headers(test: &str) -> bool {
    let there = compiler().arg("--version").output().is_ok()
        && compiles("#include <infiniband/verbs.h>\n#include <rdma/rdma_cma.h>\n");
    if !there {
        skip(
            test,
            "it needs gcc and the headers of libibverbs and librdmacm",
        );
    }
    there
}

/// Compiles a program or library; warnings are errors.
pub(crate) fn compile<S: AsRef<OsStr>>(name: &str, from: &Path, more: &[S]) -> PathBuf {
    let made = scratch(name);
    let output = compiler()
        .args(["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"])
        .arg("-o")
        .args([&made, from])
        .args(more)
        .output()
        .expect("gcc can be started");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}:\n{errors}", from.display());
    made
}

/// Runs a program to its end.
pub(crate) fn run(command: &mut Command) -> Ended {
    let running = Running::start(command).expect("the program can be started");
    running.wait(DEADLINE).expect("the program ends")
}

/// What a program prints that succeeds.
pub(crate) fn printed(command: &mut Command) -> String {
    run(command).success().expect("the program succeeds").stdout
}
