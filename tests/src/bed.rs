//! A router of its own, its endpoints, and programs on them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use freeflow_api::{
    CONTROL_VERSION, ControlAnswer, ControlRequest, MAX_CONTROL_BYTES, NewEndpoint, Operation,
};
use rustix::net::RecvFlags;
use tempfile::TempDir;

use crate::place::private_networks;
use crate::raw::{dial, say};
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

/// Two programs that wait for each other's messages by polling hang if they are not done by then:
/// where more wants to run than there are processors, each message waits for a turn of all others,
/// and there are thousands.
const EXCHANGE: Duration = Duration::from_secs(300);

/// A router with a runtime directory of its own.
pub struct Bed {
    router: Running,
    dir: TempDir,
    next: AtomicU16,
    host: Host,
}

/// Where a bed's router and programs run.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// What executes every command: a program and its arguments before the command line.
    pub(crate) place: Vec<String>,
    /// The router's arguments.
    pub(crate) router: Vec<String>,
    /// The addresses of its endpoints begin with these bytes.
    pub(crate) network: [u8; 2],
}

impl Default for Host {
    fn default() -> Self {
        Host {
            place: Vec::new(),
            router: Vec::new(),
            network: [10, 78],
        }
    }
}

impl Bed {
    /// Starts a router and waits until it serves.
    pub fn new() -> Result<Bed> {
        Self::under(&[])
    }

    /// As [`Self::new`], with another program that executes the router: its arguments come before
    /// the router's command line.
    pub fn under(wrapper: &[&str]) -> Result<Bed> {
        Self::at(Host::default(), wrapper)
    }

    pub(crate) fn at(host: Host, wrapper: &[&str]) -> Result<Bed> {
        // Sockets' paths are short: not below a directory that may be long.
        let dir = tempfile::Builder::new()
            .prefix("ffbed")
            .tempdir_in("/tmp")?;
        Ok(Bed {
            router: serve(dir.path(), &host, wrapper)?,
            dir,
            next: AtomicU16::new(1),
            host,
        })
    }

    /// Kills the router, if it lives, and starts another at the same runtime directory.
    pub fn restart(&mut self) -> Result<()> {
        self.router.signal(rustix::process::Signal::KILL);
        self.router.reap(DEADLINE)?;
        self.router = serve(self.dir.path(), &self.host, &[])?;
        Ok(())
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
        freeflow(self.dir.path(), &self.host.place)
    }

    /// Runs a `freeflow` command to its end.
    pub fn call(&self, args: &[&str]) -> Result<Ended> {
        Running::start(self.freeflow().args(args))?.wait(DEADLINE)
    }

    /// As [`Place::has_private_networks`], of this user.
    ///
    /// [`Place::has_private_networks`]: crate::Place::has_private_networks
    pub fn has_private_networks(&self, test: &str) -> bool {
        private_networks(self.call(&["doctor"]), "this user", test)
    }

    /// What the router says of itself.
    pub fn status(&self) -> Result<serde_json::Value> {
        let said = self.call(&["status", "-o", "json"])?.success()?;
        serde_json::from_str(&said.stdout).context("status is no JSON")
    }

    /// Asks the router over its control socket, as the `freeflow` command does.
    pub fn control(&self, body: Operation) -> Result<ControlAnswer> {
        let socket = dial(&self.dir().join("router.sock"))?;
        let version = CONTROL_VERSION;
        let bytes = serde_json::to_vec(&ControlRequest { version, body })?;
        say(&socket, &bytes, &[])?;
        let mut buffer = vec![0; MAX_CONTROL_BYTES];
        let packet = freeflow_shm::recv_packet(&socket, &mut buffer, RecvFlags::empty())?;
        serde_json::from_slice(&buffer[..packet.len]).context("the router's answer")
    }

    /// Waits until the status is as wanted; the last one is in the error.
    pub fn wait_for_status(
        &self,
        wanted: impl Fn(&serde_json::Value) -> bool,
        deadline: Duration,
    ) -> Result<()> {
        let until = Instant::now() + deadline;
        loop {
            let ControlAnswer::Status(status) = self.control(Operation::Status)? else {
                bail!("the router does not say its status");
            };
            let status = serde_json::to_value(status)?;
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
        let ([a, b], [high, low]) = (self.host.network, n.to_be_bytes());
        Endpoint {
            bed: self,
            ip: IpAddr::from([a, b, high, low]),
            tenant: "default".to_owned(),
        }
    }

    /// Creates an endpoint that stays, for clients that are no programs of `freeflow run`.
    pub fn lasting_endpoint(&self, tenant: &str) -> Result<Lasting> {
        let endpoint = self.endpoint();
        let answer = self.control(Operation::CreateEndpoint(NewEndpoint {
            ip: Some(endpoint.ip),
            tenant: Some(tenant.to_owned()),
            ..NewEndpoint::default()
        }))?;
        match answer {
            ControlAnswer::Created { name, socket, .. } => Ok(Lasting { name, socket }),
            other => bail!("no endpoint: {other:?}"),
        }
    }

    /// Runs a program that bootstraps over TCP on two endpoints: the server with `-p PORT`, then
    /// the client with `-p PORT 127.0.0.1`. Both must end well; returns the server's and the
    /// client's output.
    pub fn pair(&self, program: &str, args: &[&str]) -> Result<(Ended, Ended)> {
        let port = free_port();
        let ends = [&self.endpoint(), &self.endpoint()];
        pair(ends, program, args, port, "127.0.0.1", |serving| {
            wait_for_listener(port, DEADLINE, || serving.is_alive())
        })
    }
}

/// The sum of all numbers of this name in a status.
pub fn count(status: &serde_json::Value, name: &str) -> u64 {
    use serde_json::Value;
    match status {
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| match value.as_u64() {
                Some(n) if key == name => n,
                _ => count(value, name),
            })
            .sum(),
        Value::Array(all) => all.iter().map(|value| count(value, name)).sum(),
        _ => 0,
    }
}

/// Runs a program that bootstraps over TCP on two endpoints: the server's, and the client's.
pub(crate) fn pair(
    [server, client]: [&Endpoint<'_>; 2],
    program: &str,
    args: &[&str],
    port: u16,
    address: &str,
    listens: impl FnOnce(&mut Running) -> bool,
) -> Result<(Ended, Ended)> {
    let port = port.to_string();
    let mut both = args.to_vec();
    both.extend(["-p", &port]);
    let mut serving = server.start(program, &both)?;
    if !listens(&mut serving) {
        serving.signal(rustix::process::Signal::KILL);
        bail!("the server does not listen: {}", serving.wait(DEADLINE)?);
    }
    both.push(address);
    let client = client.start(program, &both)?.wait(EXCHANGE);
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

fn serve(runtime_dir: &Path, host: &Host, wrapper: &[&str]) -> Result<Running> {
    let mut place = host.place.clone();
    place.extend(wrapper.iter().map(|&arg| arg.to_owned()));
    let mut command = freeflow(runtime_dir, &place);
    command.arg("router").args(&host.router);
    let router = Running::start(&mut command)?;
    router.wait_for("router serves", DEADLINE)?;
    Ok(router)
}

/// The command, executed by another one if there is such.
fn freeflow(runtime_dir: &Path, place: &[String]) -> Command {
    let binary = dist().join("bin/freeflow");
    let mut command = match place.split_first() {
        Some((program, args)) => {
            let mut command = Command::new(program);
            command.args(args).arg(binary);
            command
        }
        None => Command::new(binary),
    };
    command
        .arg("--runtime-dir")
        .arg(runtime_dir)
        .env_remove("FREEFLOW_ENDPOINT")
        .env_remove("LD_LIBRARY_PATH");
    command
}

/// An endpoint that stays until it is removed.
#[derive(Clone, Debug)]
pub struct Lasting {
    /// Its name.
    pub name: String,
    /// Its socket.
    pub socket: PathBuf,
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

    /// Starts a server on it, and waits until it listens for connections by the connection manager.
    pub fn serve(&self, program: &str, args: &[&str]) -> Result<Running> {
        let server = self.start(program, args)?;
        self.wait_for_some("cm_listeners")
            .with_context(|| format!("{program} does not listen"))?;
        Ok(server)
    }

    /// Waits until what the router counts under that name is not 0 for this endpoint.
    pub fn wait_for_some(&self, name: &str) -> Result<()> {
        let ip = self.ip.to_string();
        let some = |status: &serde_json::Value| {
            let mut endpoints = status["endpoints"].as_array().into_iter().flatten();
            endpoints.any(|endpoint| {
                endpoint["ip"] == ip.as_str()
                    && endpoint["tenant"] == self.tenant.as_str()
                    && count(endpoint, name) != 0
            })
        };
        self.bed.wait_for_status(some, DEADLINE)
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
