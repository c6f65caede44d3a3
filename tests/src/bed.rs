//! A router of its own, its endpoints, and programs on them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::{DEADLINE, Ended, Running, free_port, wait_for_listener};

/// The directory with `bin` and `lib`, as `cargo xtask dist` makes it: `FREEFLOW_DIST`, or
/// `target/dist`.
pub fn dist() -> PathBuf {
    let dir = std::env::var_os("FREEFLOW_DIST").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dist"),
        PathBuf::from,
    );
    let command = dir.join("bin/freeflow");
    assert!(
        command.is_file(),
        "{} is not there: run `cargo xtask dist` first, or `cargo xtask test`",
        command.display()
    );
    dir.canonicalize().unwrap_or(dir)
}

/// A router with a runtime directory of its own.
pub struct Bed {
    router: Running,
    dir: TempDir,
    next: AtomicU16,
}

impl Bed {
    /// Starts a router and waits until it serves.
    pub fn new() -> Result<Bed> {
        // Sockets' paths are short: not below a directory that may be long.
        let dir = tempfile::Builder::new()
            .prefix("ffbed")
            .tempdir_in("/tmp")?;
        let mut command = freeflow(dir.path());
        let router = Running::start(command.arg("router"))?;
        router.wait_for("router serves", DEADLINE)?;
        Ok(Bed {
            router,
            dir,
            next: AtomicU16::new(1),
        })
    }

    /// The router's runtime directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The router's process.
    pub fn router(&mut self) -> &mut Running {
        &mut self.router
    }

    /// The `freeflow` command on this router.
    pub fn freeflow(&self) -> Command {
        freeflow(self.dir.path())
    }

    /// Runs a `freeflow` command to its end.
    pub fn call(&self, args: &[&str]) -> Result<Ended> {
        Running::start(self.freeflow().args(args))?.wait(DEADLINE)
    }

    /// What the router says of itself.
    pub fn status(&self) -> Result<serde_json::Value> {
        let said = self.call(&["status", "-o", "json"])?.success()?;
        serde_json::from_str(&said.stdout).context("status is no JSON")
    }

    /// Waits until the status is as wanted; the last one is in the error.
    pub fn wait_for_status(
        &self,
        wanted: impl Fn(&serde_json::Value) -> bool,
        deadline: Duration,
    ) -> Result<()> {
        let until = Instant::now() + deadline;
        loop {
            let status = self.status()?;
            if wanted(&status) {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("after {deadline:?} the status is still {status:#}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A new endpoint's command line: an address that no other endpoint of this bed has.
    pub fn endpoint(&self) -> Endpoint<'_> {
        // Relaxed: only that numbers differ matters.
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let [high, low] = n.to_be_bytes();
        Endpoint {
            bed: self,
            ip: IpAddr::from([10, 78, high, low]),
            tenant: "default".to_owned(),
        }
    }

    /// Runs a program that bootstraps over TCP on two endpoints: the server with `-p PORT`, then
    /// the client with `-p PORT 127.0.0.1`. Both must end well; returns the server's and the
    /// client's output.
    pub fn pair(&self, program: &str, args: &[&str]) -> Result<(Ended, Ended)> {
        let (server, client) = (self.endpoint(), self.endpoint());
        let port = free_port();
        let port_text = port.to_string();
        let mut both = args.to_vec();
        both.extend(["-p", &port_text]);
        let mut serving = server.start(program, &both)?;
        if !wait_for_listener(port, DEADLINE, || serving.is_alive()) {
            serving.signal(rustix::process::Signal::KILL);
            bail!("the server does not listen: {}", serving.wait(DEADLINE)?);
        }
        both.push("127.0.0.1");
        let client = client.start(program, &both)?.wait(DEADLINE);
        let client = match client {
            Ok(client) if client.status.success() => client,
            failed => {
                // The server's side tells more.
                let server = if serving.is_alive() {
                    serving.signal(rustix::process::Signal::TERM);
                    serving.wait(DEADLINE)
                } else {
                    serving.wait(DEADLINE)
                };
                let failed = failed.map_or_else(|e| e.to_string(), |e| e.to_string());
                bail!("client: {failed}\nserver: {}", server?);
            }
        };
        Ok((serving.wait(DEADLINE)?.success()?, client))
    }
}

fn freeflow(runtime_dir: &Path) -> Command {
    let mut command = Command::new(dist().join("bin/freeflow"));
    command
        .arg("--runtime-dir")
        .arg(runtime_dir)
        .env_remove("FREEFLOW_ENDPOINT")
        .env_remove("LD_LIBRARY_PATH");
    command
}

/// An endpoint to be: it exists as long as a program runs on it.
pub struct Endpoint<'a> {
    bed: &'a Bed,
    /// Its address.
    pub ip: IpAddr,
    /// Its tenant.
    pub tenant: String,
}

impl Endpoint<'_> {
    /// `freeflow run ... -- PROGRAM ARGS`.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = self.bed.freeflow();
        let ip = self.ip.to_string();
        command
            .args(["run", "--ip", &ip, "--tenant", &self.tenant, "--", program])
            .args(args);
        command
    }

    /// Starts a program on it.
    pub fn start(&self, program: &str, args: &[&str]) -> Result<Running> {
        Running::start(&mut self.command(program, args))
    }

    /// Runs a program on it to its end, which must be a good one.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<Ended> {
        self.start(program, args)?.wait(DEADLINE)?.success()
    }
}
