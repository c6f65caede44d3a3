//! The tests of crates with unsafe code under AddressSanitizer.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use freeflow_tests::skip;

use crate::cargo::{cargo, run, target};

/// Crates with unsafe code that have tests of their own. The C boundary is run under valgrind
/// (`tests/memcheck.rs`).
const PACKAGES: [&str; 4] = [
    "freeflow-shm",
    "freeflow-convert",
    "freeflow-client",
    "freeflow-fabric-udp",
];

/// Tests that the sanitizer is not run on, and why.
const UNFIT: [(&str, &str); 6] = [
    (
        "locked_memory_stays_locked",
        "the sanitizer makes mlock do nothing",
    ),
    (
        "the_head_of_an_arena_is_foreign",
        "the sanitizer's allocator takes the place of glibc's",
    ),
    (
        "collecting_while_memory_moves",
        "its addresses are in the sanitizer's shadow memory",
    ),
    (
        "moved_memory_stays_shared",
        "the sanitizer's allocator may map memory where some was moved from",
    ),
    (
        "memory_may_be_unmapped_first",
        "the sanitizer's allocator may map memory where some was unmapped",
    ),
    (
        "the_kernel_answers",
        "it takes a virtual machine, and has run without the sanitizer",
    ),
];

/// - No leaks: the checker needs to fork and to trace, which tests forbid their processes, and what
///   a library keeps until its process ends is on purpose.
/// - Stacks stay stacks: else what is on one is on the heap, and tests of registered stacks fail.
const OPTIONS: &str = "detect_leaks=0:detect_stack_use_after_return=0";

/// Runs the tests. Where the toolchain has no runtime of the sanitizer: skipped.
pub(crate) fn run_tests() -> Result<()> {
    let toolchain = Toolchain::find()?;
    if !toolchain.has_sanitizer()? {
        let why = format!(
            "the toolchain has no AddressSanitizer for {}",
            toolchain.host
        );
        skip("sanitizer", &why);
        return Ok(());
    }
    // Named, so that build scripts and macros, which run in the compiler, are built without it.
    let mut command = cargo(&["test", "--quiet", "--no-fail-fast", "--tests", "--target"]);
    command.arg(&toolchain.host);
    command.arg("--target-dir").arg(target().join("sanitizer"));
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    command.arg("--");
    for (test, why) in UNFIT {
        skip(&format!("sanitizer: {test}"), why);
        command.args(["--skip", test]);
    }
    // A flag of the compiler that is not stable, though the runtime comes with stable ones.
    command
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env("ASAN_OPTIONS", OPTIONS);
    run(&mut command)
}

struct Toolchain {
    /// The machine that it runs on, and builds for.
    host: String,
    /// Where its libraries for that are.
    libraries: PathBuf,
}

impl Toolchain {
    fn find() -> Result<Self> {
        let version = ask(&["-vV"])?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: "));
        let host = host.context("rustc does not say its host")?.to_owned();
        let root = ask(&["--print", "sysroot"])?;
        let libraries = Path::new(root.trim())
            .join("lib/rustlib")
            .join(&host)
            .join("lib");
        Ok(Toolchain { host, libraries })
    }

    /// Whether the sanitizer's runtime, `librustc-CHANNEL_rt.asan.a`, is among its libraries.
    fn has_sanitizer(&self) -> Result<bool> {
        let all = std::fs::read_dir(&self.libraries)
            .with_context(|| format!("no libraries in {}", self.libraries.display()))?;
        let mut names = all.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.any(|name| name.starts_with("librustc-") && name.ends_with("_rt.asan.a")))
    }
}

/// What the compiler says that cargo uses in the repository.
fn ask(args: &[&str]) -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(&rustc)
        .args(args)
        .current_dir(crate::cargo::root())
        .output()
        .with_context(|| format!("cannot run {}", rustc.display()))?;
    anyhow::ensure!(
        output.status.success(),
        "{} {args:?}: {}",
        rustc.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
