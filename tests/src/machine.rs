//! What the machine has, and two hosts of TCP's to compare with.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::{DEADLINE, Ended, Running};

/// Where skipped tests are collected.
const SKIPS_VARIABLE: &str = "FREEFLOW_SKIPS";

/// Says, loudly, that a test is skipped.
pub fn skip(test: &str, why: &str) {
    let line = format!("skipped: {test}: {why}");
    eprintln!("{line}");
    if let Some(file) = std::env::var_os(SKIPS_VARIABLE)
        && let Ok(mut file) = std::fs::File::options()
            .append(true)
            .create(true)
            .open(file)
    {
        let _ = writeln!(file, "{line}");
    }
}

/// Whether this is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where `cargo xtask test` unpacks packages that it does not install.
pub fn unpacked() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/unpacked")
}

/// Where a program is: by `PATH`, or unpacked.
pub fn program(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .chain([unpacked().join("usr/sbin")])
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// Whether a program is installed; says loudly if not.
pub fn have(name: &str) -> bool {
    let found = program(name).is_some();
    if !found {
        skip(name, "it is not installed");
    }
    found
}

/// A directory with others in it that apt can fetch to: for root, apt has a user of its own, without
/// any privilege.
pub fn dir_for_apt(others: &[&str]) -> Result<TempDir> {
    let dir = tempfile::Builder::new()
        .prefix("ffapt")
        .tempdir_in("/tmp")?;
    for other in others {
        std::fs::create_dir_all(dir.path().join(other))?;
    }
    if is_root() {
        let mut chown = Command::new("chown");
        chown.args(["-R", "_apt"]).arg(dir.path());
        let said = Running::start(&mut chown)?.wait(DEADLINE)?;
        said.success().context("apt has no user")?;
    }
    Ok(dir)
}

/// Two network namespaces with a veth pair between them: TCP's side of a comparison.
pub struct TcpPair {
    holders: [Running; 2],
}

impl TcpPair {
    /// Address of the server's end.
    pub const SERVER: &'static str = "192.0.2.1";

    /// Makes them: as root, or as an ordinary user in a user namespace.
    pub fn new(mtu: u32) -> Result<TcpPair> {
        let flags: &[&str] = if is_root() {
            &["-n"]
        } else {
            &["-U", "-r", "-n"]
        };
        let ready = "echo ready; exec sleep infinity";
        let first = Running::start(
            Command::new("unshare")
                .args(flags)
                .args(["sh", "-c", ready]),
        )?;
        first.wait_for("ready", DEADLINE)?;
        let mut second = enter(&first);
        let second = Running::start(second.args(["unshare", "-n", "sh", "-c", ready]))?;
        second.wait_for("ready", DEADLINE)?;
        let pair = TcpPair {
            holders: [first, second],
        };
        // Of `unshare` in the other's namespaces, the second holder is the same process.
        let target = pair.holders[1].pid();
        pair.shell(
            0,
            &format!(
                "ip link add ff0 mtu {mtu} type veth peer name ff1 mtu {mtu} netns {target} && \
             ip link set lo up && ip addr add {}/24 dev ff0 && ip link set ff0 up",
                Self::SERVER
            ),
        )?;
        pair.shell(
            1,
            "ip link set lo up && ip addr add 192.0.2.2/24 dev ff1 && ip link set ff1 up",
        )?;
        Ok(pair)
    }

    /// A command on the server's (0) or the client's (1) side.
    pub fn command(&self, side: usize, program: &str, args: &[&str]) -> Command {
        let mut command = enter(&self.holders[side]);
        command.arg(program).args(args);
        command
    }

    /// What executes a command on a side: a program and its arguments before the command line.
    pub(crate) fn place(&self, side: usize) -> Vec<String> {
        let enter = enter(&self.holders[side]);
        let args = enter.get_args().map(|arg| arg.to_string_lossy().into());
        std::iter::once("nsenter".to_owned()).chain(args).collect()
    }

    /// Runs a script on a side; it must end well.
    pub(crate) fn shell(&self, side: usize, script: &str) -> Result<Ended> {
        Running::start(&mut self.command(side, "sh", &["-c", script]))?
            .wait(DEADLINE)?
            .success()
    }

    /// Runs a client against a server that is listening on `port` when it is ready.
    pub fn measure(
        &self,
        server: (&str, &[&str]),
        port: u16,
        client: (&str, &[&str]),
    ) -> Result<Ended> {
        let mut serving = Running::start(&mut self.command(0, server.0, server.1))?;
        let listening = format!(
            "for i in $(seq 500); do ss -Hltn 'sport = :{port}' | grep -q . && exit 0; sleep 0.02; \
             done; exit 1"
        );
        if let Err(e) = self.shell(0, &listening) {
            if !serving.is_alive() {
                bail!("{}", serving.wait(DEADLINE)?);
            }
            return Err(e).context("the server does not listen");
        }
        Running::start(&mut self.command(1, client.0, client.1))?
            .wait(DEADLINE)?
            .success()
    }
}

fn enter(holder: &Running) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["-t", &holder.pid().to_string(), "-n"]);
    if !is_root() {
        command.args(["-U", "--preserve-credentials"]);
    }
    command.stdin(Stdio::null());
    command
}
