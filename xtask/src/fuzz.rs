//! `cargo xtask fuzz`: libFuzzer on the bodies of `fuzz/bodies`, for as long as one likes.

use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cargo::{cargo, install, root, run};

/// Version of cargo-fuzz.
const CARGO_FUZZ: &str = "0.13";

/// Longest input: longer ones find nothing that shorter ones do not.
const LONGEST: u32 = 2048;

#[derive(Args)]
pub(crate) struct FuzzArgs {
    /// Fuzz this target alone [default: all, one after the other]
    target: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 600)]
    seconds: u32,
    /// Add the inputs that found something new to the committed corpus, as few as possible
    #[arg(long)]
    keep: bool,
}

/// Fuzzes; a crash is an error, and its input is in `fuzz/artifacts`.
pub(crate) fn fuzz(args: &FuzzArgs) -> Result<()> {
    install("cargo-fuzz", CARGO_FUZZ)?;
    let all = targets()?;
    let wanted: Vec<_> = match &args.target {
        Some(target) if !all.contains(target) => {
            bail!(
                "there is no target \"{target}\"; there are: {}",
                all.join(", ")
            )
        }
        Some(target) => vec![target.clone()],
        None => all,
    };
    let mut failed = Vec::new();
    for target in wanted {
        println!("==> {target}: {} s", args.seconds);
        // What is new goes to a directory of its own, which git ignores.
        let found = format!("fuzz/artifacts/corpus/{target}");
        let corpus = format!("fuzz/corpus/{target}");
        let known = format!("fuzz/regressions/{target}");
        for dir in [&found, &known] {
            let dir = root().join(dir);
            std::fs::create_dir_all(&dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let (time, len) = (
            format!("-max_total_time={}", args.seconds),
            format!("-max_len={LONGEST}"),
        );
        let dirs = [&*target, &found, &corpus, &known];
        let mut command = cargo_fuzz("run");
        command.args(dirs).args(["--", &time, &len]);
        if let Err(e) = run(&mut command) {
            eprintln!("==> {target} failed: {e:#}");
            failed.push(target);
        } else if args.keep {
            run(cargo_fuzz("cmin").arg(&target).arg(&found))?;
            run(cargo_fuzz("run")
                .args([&*target, &corpus, &found])
                .args(["--", "-merge=1"]))?;
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        bail!(
            "failed: {}; put the inputs that crash (fuzz/artifacts) into fuzz/regressions, and \
             mend what is wrong",
            failed.join(", ")
        )
    }
}

/// cargo-fuzz on the compiler that is there: it lets the sanitizer's flags pass.
fn cargo_fuzz(task: &str) -> Command {
    let mut command = cargo(&["fuzz", task, "--fuzz-dir", "fuzz"]);
    command.env("RUSTC_BOOTSTRAP", "1");
    command
}

fn targets() -> Result<Vec<String>> {
    let dir = root().join("fuzz/fuzz_targets");
    let entries =
        std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.ok()?.path();
        Some(path.file_stem()?.to_string_lossy().into_owned())
    };
    let mut all: Vec<_> = entries.filter_map(name).collect();
    all.sort();
    Ok(all)
}
