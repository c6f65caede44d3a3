//! What the tasks need of the machine.

use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use freeflow_tests::is_root;

/// Programs that are run over FreeFlow, and their peers.
pub(crate) const PROGRAMS: [&str; 11] = [
    "perftest",
    "ibverbs-utils",
    "rdmacm-utils",
    "ibverbs-providers",
    "qperf",
    "fio",
    "iperf3",
    "iproute2",
    "ucx-utils",
    "libfabric-bin",
    "python3-minimal",
];

/// What people run over verbs: tests alone do.
pub(crate) const APPLICATIONS: [&str; 9] = [
    "openmpi-bin",
    "mpich",
    "dapl2-utils",
    // What UNPACKED needs.
    "libaio1",
    "libiscsi-bin",
    "qemu-block-extra",
    "qemu-utils",
    "qemu-system-x86",
    "python3-pyverbs",
];

/// Packages whose programs tests run, but which would start a daemon if they were installed.
pub(crate) const UNPACKED: [(&str, &str); 1] = [("tgt", "tgtd")];

/// What tests compile against, and what they look at programs and set devices up with.
pub(crate) const DEVELOPMENT: [&str; 13] = [
    "gcc",
    "libc6-dev",
    "libibverbs-dev",
    "librdmacm-dev",
    "libucx-dev",
    "libopenmpi-dev",
    "libmpich-dev",
    "binutils",
    "ethtool",
    "valgrind",
    "psmisc",
    "nftables",
    "tshark",
];

fn is_installed(package: &str) -> bool {
    let said = Command::new("dpkg-query")
        .args(["-W", "-f", "${Status}", package])
        .stderr(Stdio::null())
        .output();
    said.is_ok_and(|out| out.stdout == b"install ok installed")
}

/// Installs Debian packages that are missing. Where that is not possible it says which; what
/// needs them is skipped then.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let missing: Vec<_> = packages.iter().filter(|p| !is_installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.iter().map(|p| **p).collect::<Vec<_>>().join(" ");
    if !is_root() || freeflow_tests::program("apt-get").is_none() {
        eprintln!(
            "xtask: not installed here, and only root on Debian can: apt-get install {names}"
        );
        return Ok(());
    }
    println!("installing {names}");
    let apt = |args: &[&str]| -> Result<bool> {
        let status = Command::new("apt-get")
            .args(["-qq", "-o", "DPkg::Lock::Timeout=120"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .context("cannot run apt-get")?;
        Ok(status.success())
    };
    let mut install = vec!["install", "-y", "--no-install-recommends"];
    install.extend(missing.iter().map(|p| **p));
    // The lists may be old, or not there yet.
    if !(apt(&install)? || apt(&["update"])? && apt(&install)?) {
        eprintln!("xtask: apt-get could not install {names}; what needs it is skipped");
    }
    Ok(())
}

/// Unpacks packages, each named with a program of it, where tests find their programs, and installs
/// nothing. What is installed is left alone; what cannot be had is said.
pub(crate) fn unpack(packages: &[(&str, &str)]) -> Result<()> {
    let to = freeflow_tests::unpacked();
    for (package, program) in packages {
        if freeflow_tests::program(program).is_some() {
            continue;
        }
        std::fs::create_dir_all(&to)?;
        let dir = freeflow_tests::dir_for_apt(&[])?;
        let fetched = Command::new("apt-get")
            .args(["-qq", "download", package])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        let file = std::fs::read_dir(dir.path())?.flatten().next();
        let unpacked = file.filter(|_| fetched).is_some_and(|file| {
            let mut unpack = Command::new("dpkg-deb");
            unpack.arg("-x").arg(file.path()).arg(&to);
            unpack.status().is_ok_and(|status| status.success())
        });
        if !unpacked {
            eprintln!("xtask: apt-get could not download {package}; what needs it is skipped");
        }
    }
    Ok(())
}
