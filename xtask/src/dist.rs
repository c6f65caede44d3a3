//! `cargo xtask dist`: what is deployed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cargo::{cargo, run, target};

/// Built library, its name in `lib`, and the name that linkers and some programs look for.
const LIBRARIES: [(&str, &str, &str); 2] = [
    ("libibverbs.so", "libibverbs.so.1", "libibverbs.so"),
    ("librdmacm.so", "librdmacm.so.1", "librdmacm.so"),
];

/// The command, and the suite that checks any device.
const PROGRAMS: [&str; 2] = ["freeflow", "ff-conform"];

/// Builds and lays out `target/dist`; returns its path.
pub(crate) fn dist() -> Result<PathBuf> {
    let packages = [
        "-p",
        "freeflow-cli",
        "-p",
        "freeflow-verbs",
        "-p",
        "freeflow-rdmacm",
        "-p",
        "freeflow-conformance",
    ];
    run(cargo(&["build", "--release", "--quiet"]).args(packages))?;
    let (built, dist) = (target().join("release"), target().join("dist"));
    let (bin, lib) = (dist.join("bin"), dist.join("lib"));
    for dir in [&bin, &lib] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    for program in PROGRAMS {
        place(&built.join(program), &bin.join(program))?;
    }
    for (from, name, link) in LIBRARIES {
        place(&built.join(from), &lib.join(name))?;
        let link = lib.join(link);
        let _ = fs::remove_file(&link);
        symlink(name, &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    Ok(dist)
}

/// Copies beside the target, then renames: a program that runs from there is not disturbed.
fn place(from: &Path, to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    fs::copy(from, &new)
        .and_then(|_| fs::rename(&new, to))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}
