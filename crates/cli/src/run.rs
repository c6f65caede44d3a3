//! `freeflow run`: a program as an endpoint.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Instant;

use anyhow::{Context, Result};
use freeflow_api::{NewEndpoint, Operation, RuntimeDir};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Origin};

use crate::inject::Injection;
use crate::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, Network, RunArgs, inject, start, sysfs, watch};

/// Signals that are the program's.
const FORWARDED: [i32; 6] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];

/// Runs a program; the exit code is its own.
pub(crate) fn run(dir: &RuntimeDir, args: &RunArgs) -> Result<ExitCode> {
    let injection = Injection::new(args.preload)?;
    let program = match find(&args.command[0]) {
        Ok(program) => program,
        Err((code, reason)) => {
            eprintln!("freeflow: {reason}");
            return Ok(code.into());
        }
    };
    let obstacle = injection.obstacle(&program);
    if let Some(obstacle) = &obstacle {
        eprintln!("freeflow: warning: {obstacle}");
    }
    let new = NewEndpoint {
        name: args.name.clone(),
        ip: args.ip,
        tenant: args.tenant.clone(),
        ephemeral: true,
        quota: args.quota.clone(),
        underlay_gid: args.underlay_gid,
    };
    let endpoint = start::endpoint(dir, &new, args.verbose)?;
    if args.verbose {
        eprintln!(
            "freeflow: endpoint {} has address {}",
            endpoint.name, endpoint.ip
        );
    }
    let private = args.network == Network::Private;
    let interface = private.then_some(freeflow_network::INTERFACE);
    let tree = dir.sysfs(&endpoint.name);
    let ips = [endpoint.ip].into_iter().chain(endpoint.underlay);
    sysfs::write(&tree, ips, interface)
        .with_context(|| format!("cannot write {}", tree.display()))?;
    let own = std::env::current_exe().context("cannot find the freeflow command itself")?;
    let mut command = Command::new(own);
    command.arg("--runtime-dir").arg(dir.path());
    command.arg("__enter").arg("--sysfs").arg(&tree);
    if private {
        command.args(["--private", &endpoint.name]);
        command.args(["--ip", &endpoint.ip.to_string()]);
    }
    if args.verbose {
        command.arg("--verbose");
    }
    command
        .arg("--")
        .args(&args.command)
        .env("FREEFLOW_ENDPOINT", &endpoint.socket)
        .env("FREEFLOW_SYSFS", &tree)
        .envs(injection.environment());
    let signals = forwarded_signals()?;
    let mut child = command.spawn().context("cannot start a process")?;
    let forwarder = forward(signals, child.id());
    // What was told once is not told again.
    let status = wait(&mut child, obstacle.is_none().then_some(&injection))?;
    forwarder.close();
    // The end of the connection would do, but whoever comes next is to find the address free. A
    // router that is gone has removed it.
    let name = endpoint.name;
    let _ = endpoint
        .client
        .tell(Operation::RemoveEndpoint { name }, &[]);
    Ok(exit_code(status).into())
}

/// The file of a command, or the shell's exit code for it and why.
fn find(command: &OsStr) -> Result<std::path::PathBuf, (u8, String)> {
    let name = command.display();
    let Some(program) = inject::resolve(command) else {
        let reason = format!("cannot run {name}: there is no such program");
        return Err((EXIT_NOT_FOUND, reason));
    };
    let refused = match rustix::fs::access(&program, rustix::fs::Access::EXEC_OK) {
        Ok(()) if program.is_dir() => Some("it is a directory".to_owned()),
        Ok(()) => None,
        Err(e) => Some(e.to_string()),
    };
    match refused {
        Some(why) => Err((EXIT_NOT_EXECUTABLE, format!("cannot run {name}: {why}"))),
        None => Ok(program),
    }
}

/// As the shell shows it: 128 and the signal that killed the program.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX)
}

/// Waits for the program; meanwhile looks a few times which library it uses, and tells once.
fn wait(child: &mut Child, injection: Option<&Injection>) -> Result<ExitStatus> {
    let began = Instant::now();
    let pid = child.id();
    let watched = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    if let (Some(watched), Some(injection)) = (watched, injection) {
        for look in watch::LOOKS {
            let ended = loop {
                let left = look.saturating_sub(began.elapsed());
                let left = rustix::time::Timespec::try_from(left)?;
                let mut fds = [PollFd::from_borrowed_fd(watched.as_fd(), PollFlags::IN)];
                match poll(&mut fds, Some(&left)) {
                    Err(rustix::io::Errno::INTR) => {}
                    other => break other.context("cannot watch the program")? != 0,
                }
            };
            if ended {
                break;
            }
            if let Some(stray) = watch::find_stray(pid, injection) {
                eprintln!("freeflow: warning: {stray}; freeflow run --preload may help");
                break;
            }
        }
    }
    child.wait().context("cannot wait for the program")
}

/// Signals to pass on. What is ignored stays ignored, here and in the program, as for nohup(1)
/// and a shell's background jobs.
fn forwarded_signals() -> Result<SignalsInfo<WithOrigin>> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let wanted = FORWARDED.iter().filter(|&s| ignored >> (s - 1) & 1 == 0);
    SignalsInfo::new(wanted).context("cannot handle signals")
}

fn forward(mut signals: SignalsInfo<WithOrigin>, pid: u32) -> signal_hook::iterator::Handle {
    let handle = signals.handle();
    std::thread::spawn(move || {
        for origin in &mut signals {
            pass_on(pid, &origin);
        }
    });
    handle
}

/// A terminal sends its signals to the whole group: only what a process sent is passed on.
fn pass_on(pid: u32, origin: &Origin) {
    use rustix::process::{Signal, kill_process};
    if origin.cause == Cause::Kernel {
        return;
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(origin.signal)) {
        let _ = kill_process(pid, signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_shells() {
        assert_eq!(exit_code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }

    #[test]
    fn what_cannot_run_is_told_apart() {
        assert!(find(OsStr::new("sh")).is_ok());
        let code = |name: &str| find(OsStr::new(name)).unwrap_err().0;
        assert_eq!(code("no-such-command-here"), EXIT_NOT_FOUND);
        assert_eq!(code("/no/such/file"), EXIT_NOT_FOUND);
        assert_eq!(code("/proc/self/status"), EXIT_NOT_EXECUTABLE);
        assert_eq!(code("/"), EXIT_NOT_EXECUTABLE);
    }
}
