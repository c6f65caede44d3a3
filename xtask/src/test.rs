//! `cargo xtask test`: the whole suite.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

use crate::cargo::{self, cargo, run, target};
use crate::{dist, packages, sanitizer};

/// Version of the licence and dependency checker.
const CARGO_DENY: &str = "0.20";

#[derive(Args)]
pub(crate) struct TestArgs {
    /// Run only the steps whose names contain this
    #[arg(value_name = "STEP")]
    only: Option<String>,
}

type Step = (&'static str, fn() -> Result<()>);

const STEPS: [Step; 10] = [
    ("packages", install),
    ("format", || run(&mut cargo(&["fmt", "--all", "--check"]))),
    ("clippy", || {
        run(&mut cargo(&[
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]))
    }),
    ("docs", || {
        let args = [
            "doc",
            "--quiet",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ];
        run(cargo(&args).env("RUSTDOCFLAGS", "-D warnings"))
    }),
    ("licences", deny),
    ("dist", || dist::dist().map(drop)),
    ("unit", || {
        run(&mut cargo(&[
            "test",
            "--quiet",
            "--workspace",
            "--exclude",
            "freeflow-tests",
        ]))
    }),
    ("loom", loom),
    ("sanitizer", sanitizer::run_tests),
    ("end-to-end", || {
        // Routers and programs that poll share few cores: two tests at a time.
        let args = ["test", "--package", "freeflow-tests", "--no-fail-fast"];
        run(cargo(&args).args(["--", "--test-threads=2"]))
    }),
];

/// Runs the steps one after the other; goes on after a failure, and tells of all at the end.
pub(crate) fn test(args: &TestArgs) -> Result<()> {
    let skips = target().join("skipped-tests");
    let _ = std::fs::remove_file(&skips);
    // SAFETY: no other thread of this process exists yet.
    unsafe { std::env::set_var("FREEFLOW_SKIPS", &skips) };
    let wanted = |name: &str| args.only.as_deref().is_none_or(|only| name.contains(only));
    let mut failed = Vec::new();
    let mut passed = 0;
    for (name, step) in STEPS.iter().filter(|(name, _)| wanted(name)) {
        println!("==> {name}");
        let start = Instant::now();
        match step() {
            Ok(()) => passed += 1,
            Err(e) => {
                eprintln!("==> {name} failed: {e:#}");
                failed.push(*name);
            }
        }
        println!("==> {name}: {:.0} s", start.elapsed().as_secs_f64());
    }
    if passed + failed.len() == 0 {
        let names: Vec<_> = STEPS.iter().map(|s| s.0).collect();
        bail!("no such step; there are: {}", names.join(", "));
    }
    let skipped = std::fs::read_to_string(&skips).unwrap_or_default();
    print!("{skipped}");
    println!(
        "steps: {passed} passed, {} failed, {} skipped",
        failed.len(),
        skipped.lines().count()
    );
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("failed: {}", failed.join(", "))
    }
}

fn install() -> Result<()> {
    packages::install(&packages::PROGRAMS)?;
    packages::install(&packages::APPLICATIONS)?;
    packages::unpack(&packages::UNPACKED)?;
    packages::install(&packages::DEVELOPMENT)?;
    packages::install(&freeflow_vm::PACKAGES)?;
    // What needs it is skipped, and says so.
    if let Err(e) = freeflow_vm::Machine::prepare() {
        eprintln!("xtask: {e}");
    }
    Ok(())
}

/// Licences, sources and duplicates of dependencies.
fn deny() -> Result<()> {
    cargo::install("cargo-deny", CARGO_DENY)?;
    // Advisories need a database from the network; they are checked where that is at hand.
    run(&mut cargo(&[
        "deny",
        "--log-level",
        "error",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))
}

/// The shared rings under every interleaving.
fn loom() -> Result<()> {
    let args = [
        "test",
        "--quiet",
        "--release",
        "--package",
        "freeflow-shm",
        "--test",
        "loom",
    ];
    run(cargo(&args)
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", target().join("loom")))
}
