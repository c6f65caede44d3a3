//! `freeflow run`: a program as an endpoint.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use freeflow_api::{ControlAnswer, NewEndpoint, Operation, RuntimeDir};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::client::Client;
use crate::{Network, RunArgs, inject, sysfs};

/// A router that is not there after this time has a problem.
const START_TIME: Duration = Duration::from_secs(10);

/// Runs a program; the exit code is its own.
pub(crate) fn run(dir: &RuntimeDir, args: &RunArgs) -> Result<ExitCode> {
    if args.network == Network::Private {
        bail!(
            "--network private is not offered yet: run the program in a container or network \
             namespace of its own, inside of which `freeflow run` works as here"
        );
    }
    let libraries = inject::library_dir()?;
    if let Some(program) = inject::resolve(&args.command[0])
        && let Some(obstacle) = inject::obstacle(&program, &libraries)
    {
        eprintln!("freeflow: warning: {obstacle}");
    }
    // Before anything is made that a signal would leave behind.
    let mut signals =
        Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM]).context("cannot handle signals")?;
    let client = connect_or_start(dir, args.verbose)?;
    let new = NewEndpoint {
        name: args.name.clone(),
        ip: args.ip,
        tenant: args.tenant.clone(),
        ephemeral: true,
    };
    let ControlAnswer::Created { name, ip, socket } =
        client.call(Operation::CreateEndpoint(new))?
    else {
        bail!("the router did not create the endpoint");
    };
    if args.verbose {
        eprintln!("freeflow: endpoint {name} has address {ip}");
    }
    let tree = dir.sysfs(&name);
    sysfs::write(&tree, ip).with_context(|| format!("cannot write {}", tree.display()))?;
    let own = std::env::current_exe().context("cannot find the freeflow command itself")?;
    let mut command = Command::new(own);
    command.arg("__enter").arg("--sysfs").arg(&tree);
    if args.verbose {
        command.arg("--verbose");
    }
    let mut child = command
        .arg("--")
        .args(&args.command)
        .env("FREEFLOW_ENDPOINT", &socket)
        .env("FREEFLOW_SYSFS", &tree)
        .env("LD_LIBRARY_PATH", inject::library_path(&libraries))
        .spawn()
        .context("cannot start a process")?;
    let pid = child.id();
    let handle = signals.handle();
    let forwarder = std::thread::spawn(move || {
        for signal in signals.forever() {
            forward(pid, signal);
        }
    });
    let status = child.wait().context("cannot wait for the program")?;
    handle.close();
    let _ = forwarder.join();
    // Dropping the connection removes the endpoint.
    drop(client);
    let code = status
        .code()
        .or_else(|| status.signal().map(|s| 128 + s))
        .unwrap_or(255);
    Ok(u8::try_from(code).unwrap_or(255).into())
}

/// A terminal sends its signals to the whole group: only what was sent to us alone is passed on.
fn forward(pid: u32, signal: i32) {
    use rustix::process::{Pid, Signal, kill_process};
    let from_terminal = signal == SIGINT || signal == SIGQUIT;
    let foreground = rustix::termios::tcgetpgrp(std::io::stdin())
        .is_ok_and(|group| group == rustix::process::getpgrp());
    if from_terminal && foreground {
        return;
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(signal)) {
        let _ = kill_process(pid, signal);
    }
}

/// The router of the directory; an embedded one is started if there is none.
fn connect_or_start(dir: &RuntimeDir, verbose: bool) -> Result<Client> {
    if let Some(client) = Client::try_connect(dir)? {
        return Ok(client);
    }
    let deadline = Instant::now() + START_TIME;
    let mut started = start(dir)?;
    if verbose {
        eprintln!(
            "freeflow: started an embedded router (pid {})",
            started.id()
        );
    }
    loop {
        if let Some(client) = Client::try_connect(dir)? {
            return Ok(client);
        }
        // Somebody else may have started one at the same moment: ours then ends at once, and
        // theirs is about to serve.
        let ended = started.try_wait().context("cannot watch the router")?;
        if Instant::now() > deadline || ended.is_some_and(|s| !s.success() && !is_served(dir)) {
            let log = std::fs::read_to_string(dir.log()).unwrap_or_default();
            let reason = log.lines().last().unwrap_or("it says nothing");
            bail!("the router did not start: {reason}");
        }
        if ended.is_some() && !is_served(dir) {
            started = start(dir)?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether some router holds the directory.
fn is_served(dir: &RuntimeDir) -> bool {
    let Ok(lock) = std::fs::File::open(dir.lock()) else {
        return false;
    };
    let free = rustix::fs::FlockOperation::NonBlockingLockShared;
    rustix::fs::flock(&lock, free).is_err()
}

fn start(dir: &RuntimeDir) -> Result<Child> {
    use std::os::unix::fs::DirBuilderExt;
    let path = dir.path();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    let log = log_file(&dir.log())?;
    let own = std::env::current_exe().context("cannot find the freeflow command itself")?;
    Command::new(own)
        .arg("--runtime-dir")
        .arg(path)
        .args(["router", "--embedded"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        // Signals of our terminal are not for it: others may use it.
        .process_group(0)
        .spawn()
        .context("cannot start a router")
}

fn log_file(path: &Path) -> Result<std::fs::File> {
    std::fs::File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))
}
