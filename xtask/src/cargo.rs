//! Running cargo and other commands of the build.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The repository.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Where cargo builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Cargo, in the repository.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Runs a command that must succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = format!("{command:?}");
    let status = command
        .status()
        .with_context(|| format!("cannot run {line}"))?;
    if status.success() {
        Ok(())
    } else {
        bail!("{line}: {status}")
    }
}

/// Installs a tool of cargo's, `cargo-NAME`, if there is none.
pub(crate) fn install(name: &str, version: &str) -> Result<()> {
    let have = Command::new(name)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if have {
        return Ok(());
    }
    println!("installing {name} {version}");
    let version = format!("^{version}");
    run(&mut cargo(&[
        "install",
        "--quiet",
        "--locked",
        name,
        "--version",
        &version,
    ]))
    .with_context(|| format!("cannot install {name}"))
}
