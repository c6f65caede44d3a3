//! Getting an endpoint: from the router of the directory, or from an embedded one that is started.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use freeflow_api::{ControlAnswer, NewEndpoint, Operation, RuntimeDir};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};

use crate::client::{Client, unexpected, warn};

/// A router that is not there after this time has a problem.
const START_TIME: Duration = Duration::from_secs(30);

/// What an embedded router says when it serves.
pub(crate) const READY: &str = "ready";

/// An endpoint that was created, and the connection whose end is its end.
pub(crate) struct Endpoint {
    pub(crate) name: String,
    pub(crate) ip: std::net::IpAddr,
    /// Its second GID, if it has one.
    pub(crate) underlay: Option<std::net::IpAddr>,
    pub(crate) socket: std::path::PathBuf,
    pub(crate) client: Client,
}

/// Creates an endpoint; an embedded router is started if there is none.
pub(crate) fn endpoint(dir: &RuntimeDir, new: &NewEndpoint, verbose: bool) -> Result<Endpoint> {
    let deadline = Instant::now() + START_TIME;
    loop {
        let client = connect_or_start(dir, deadline, verbose)?;
        match client.call(Operation::CreateEndpoint(new.clone()), &[])? {
            ControlAnswer::Created {
                name,
                ip,
                underlay,
                socket,
                warning,
            } => {
                warn(warning);
                return Ok(Endpoint {
                    name,
                    ip,
                    underlay,
                    socket,
                    client,
                });
            }
            // Its last endpoint has just gone. The next one starts when it has left.
            ControlAnswer::Ending if Instant::now() < deadline => client.wait_for_end(),
            other => return unexpected(other),
        }
    }
}

fn connect_or_start(dir: &RuntimeDir, deadline: Instant, verbose: bool) -> Result<Client> {
    if let Some(client) = Client::try_connect(dir)? {
        return Ok(client);
    }
    make(dir)?;
    // Of several commands one starts a router; the others wait here until it serves.
    let path = dir.start_lock();
    let lock = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    while let Err(e) = flock(&lock, FlockOperation::LockExclusive) {
        if e != rustix::io::Errno::INTR {
            return Err(e).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    loop {
        if let Some(client) = Client::try_connect(dir)? {
            return Ok(client);
        }
        if Instant::now() > deadline {
            bail!(
                "the router in {} starts and ends again; see {}",
                dir.path().display(),
                dir.log().display()
            );
        }
        start(dir, deadline, verbose)?;
    }
}

/// Makes the runtime directory, or sees that it is ours.
fn make(dir: &RuntimeDir) -> Result<()> {
    let path = dir.path();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| {
            format!(
                "cannot make runtime directory {} (choose another with --runtime-dir)",
                path.display()
            )
        })?;
    let owner = std::fs::symlink_metadata(path)
        .with_context(|| format!("cannot read {}", path.display()))?
        .uid();
    if owner != rustix::process::geteuid().as_raw() {
        bail!(
            "runtime directory {} belongs to user {owner}; choose another with --runtime-dir",
            path.display()
        );
    }
    Ok(())
}

/// Starts an embedded router and waits until it serves.
fn start(dir: &RuntimeDir, deadline: Instant, verbose: bool) -> Result<()> {
    let path = dir.log();
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let own = std::env::current_exe().context("cannot find the freeflow command itself")?;
    let mut router = Command::new(own)
        .arg("--runtime-dir")
        .arg(std::path::absolute(dir.path())?)
        .args(["router", "--embedded"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        // Signals of our terminal are not for it: others may use it.
        .process_group(0)
        .spawn()
        .context("cannot start a router")?;
    let said = match router.stdout.take() {
        Some(stdout) => first_line(stdout, deadline)?,
        None => None,
    };
    match said.as_deref() {
        Some(READY) => {
            if verbose {
                eprintln!("freeflow: started an embedded router (pid {})", router.id());
            }
            Ok(())
        }
        Some(reason) => bail!("the router did not start: {reason}"),
        None => {
            let _ = router.kill();
            let status = router.wait().context("cannot wait for the router")?;
            bail!(
                "the router did not start ({status}); see {}",
                path.display()
            )
        }
    }
}

/// What a router says first; `None` if it says nothing before it ends, or until the deadline.
fn first_line(stdout: ChildStdout, deadline: Instant) -> Result<Option<String>> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = rustix::time::Timespec::try_from(left)?;
    let mut fds = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN)];
    while let Err(e) = poll(&mut fds, Some(&left)) {
        if e != rustix::io::Errno::INTR {
            return Err(e).context("cannot wait for the router");
        }
    }
    if fds[0].revents().is_empty() {
        return Ok(None);
    }
    let mut line = String::new();
    BufReader::new(stdout)
        .read_line(&mut line)
        .context("cannot hear the router")?;
    Ok((!line.is_empty()).then(|| line.trim_end().to_owned()))
}
