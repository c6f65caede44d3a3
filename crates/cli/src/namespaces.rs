//! Namespaces of a program and of a tenant's bridge.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use freeflow_network::Bridge;
use freeflow_shm::{recv_packet, send_packet};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::thread::UnshareFlags;

/// Longest reason that the maker of a bridge gives for failing.
const MAX_REASON: usize = 4096;

/// A maker of a bridge that takes longer hangs.
const MAKER_TIME: Duration = Duration::from_secs(10);

/// Enters new namespaces; if that needs a privilege which this process does not have, by way of a
/// user namespace in which its user and group stay what they are.
pub(crate) fn separate(flags: UnshareFlags) -> Result<()> {
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    // SAFETY: this process has one thread, which shares nothing that the flags separate.
    match unsafe { rustix::thread::unshare_unsafe(flags) } {
        Err(Errno::PERM) => {}
        other => return other.context("the kernel has no such namespaces"),
    }
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(flags | UnshareFlags::NEWUSER) }
        .map_err(|e| anyhow::anyhow!("user namespaces are not allowed here ({e}){}", advice()))?;
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{uid} {uid} 1")),
        ("gid_map", format!("{gid} {gid} 1")),
    ] {
        std::fs::write(format!("/proc/self/{file}"), text)
            .with_context(|| format!("user namespaces are restricted here (/proc/self/{file})"))?;
    }
    Ok(())
}

/// What to do if user namespaces are forbidden.
fn advice() -> String {
    let is = |path: &str, value: &str| {
        std::fs::read_to_string(path).is_ok_and(|text| text.trim() == value)
    };
    let knobs = [
        ("user.max_user_namespaces", "0", "a larger number"),
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ];
    let set = knobs
        .iter()
        .find(|(name, bad, _)| is(&format!("/proc/sys/{}", name.replace('.', "/")), bad));
    match set {
        Some((name, bad, good)) => {
            format!(": sysctl {name} is {bad}; set it to {good}, or run as root")
        }
        None => "; allow them (a container's seccomp profile?), or run as root".to_owned(),
    }
}

/// Makes a bridge in a network namespace of its own, by a process that ends then.
pub(crate) fn make_bridge() -> io::Result<Bridge> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let (ours, theirs) = socketpair(family, kind, SocketFlags::CLOEXEC, None)?;
    // What runs, also if a newer one has taken its name since.
    let mut maker = Command::new("/proc/self/exe")
        .arg("__bridge")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    set_socket_timeout(&ours, Timeout::Recv, Some(MAKER_TIME))?;
    let mut reason = vec![0; MAX_REASON];
    let packet = recv_packet(&ours, &mut reason, RecvFlags::empty());
    if packet.is_err() {
        let _ = maker.kill();
    }
    let status = maker.wait()?;
    let packet = packet?;
    match packet.fds.into_iter().next() {
        Some(socket) => Ok(Bridge::from_fd(socket)),
        None if packet.len == 0 => Err(io::Error::other(format!("its maker ended: {status}"))),
        None => {
            let reason = String::from_utf8_lossy(&reason[..packet.len]).into_owned();
            Err(io::Error::other(reason))
        }
    }
}

/// The process that makes a bridge and sends its socket, or the reason why it cannot, over its
/// standard input.
pub(crate) fn bridge() -> Result<ExitCode> {
    let made = separate(UnshareFlags::NEWNET).and_then(|()| Ok(Bridge::create()?));
    let stdin = std::io::stdin();
    match &made {
        Ok(bridge) => send_packet(&stdin, b"bridge", &[bridge.as_fd()], SendFlags::empty()),
        Err(e) => {
            let reason = format!("{e:#}").into_bytes();
            let reason = &reason[..reason.len().min(MAX_REASON)];
            send_packet(&stdin, reason, &[], SendFlags::empty())
        }
    }
    .context("nobody waits for the bridge")?;
    Ok(ExitCode::SUCCESS)
}

/// The calling process's network namespace.
pub(crate) fn own_network() -> Result<OwnedFd> {
    let path = "/proc/self/ns/net";
    match std::fs::File::open(path) {
        Ok(file) => Ok(file.into()),
        Err(e) => bail!("cannot open {path}: {e}"),
    }
}

/// Tries what a private network needs, in this process alone.
pub(crate) fn probe_network() -> Result<()> {
    separate(UnshareFlags::NEWNET)?;
    Bridge::create()?.attach(own_network()?.as_fd())?;
    Ok(freeflow_network::configure([10, 77, 0, 1].into())?)
}
