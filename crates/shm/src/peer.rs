//! Who is at the other end of a Unix socket, as the kernel says, and what may come from there.
//!
//! These options have no safe wrapper that fits: a peer outside of our process id namespace has
//! process id 0, and the newer ones are not wrapped at all.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// `SO_PEERPIDFD` (Linux 6.5).
const PEER_PIDFD: libc::c_int = 77;
/// `SO_PASSRIGHTS` (Linux 6.16).
const PASS_RIGHTS: libc::c_int = 83;

/// The process that connected a socket.
#[derive(Debug)]
pub struct PeerProcess {
    /// Its process id in our namespace; `None` if it is not visible from here.
    pub pid: Option<u32>,
    /// Its user id.
    pub uid: u32,
    /// Readable when it is dead.
    pub pidfd: OwnedFd,
}

fn option<T>(socket: impl AsFd, name: libc::c_int, mut value: T) -> Result<T, Errno> {
    let mut len = size_of::<T>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    let to = (&raw mut value).cast();
    // SAFETY: the kernel writes at most `len` bytes to `value`, a C structure or integer for
    // which any bytes will do.
    let done = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, to, &raw mut len) };
    match done {
        0 if len as usize == size_of::<T>() => Ok(value),
        0 => Err(Errno::INVAL),
        _ => Err(last_error()),
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The process that connected a Unix socket. ESRCH: it is dead already.
pub fn peer_process(socket: impl AsFd) -> Result<PeerProcess, Errno> {
    let none = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let who = option(&socket, libc::SO_PEERCRED, none)?;
    let pid = Pid::from_raw(who.pid);
    let pidfd = match option(&socket, PEER_PIDFD, -1 as libc::c_int) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
        // An older kernel: the id may have been given to another process by now, which is seen
        // when that one dies.
        Err(Errno::NOPROTOOPT) => pidfd_open(pid.ok_or(Errno::SRCH)?, PidfdFlags::empty())?,
        Err(errno) => return Err(errno),
    };
    Ok(PeerProcess {
        pid: pid.map(|pid| pid.as_raw_nonzero().get() as u32),
        uid: who.uid,
        pidfd,
    })
}

/// Whether a process has not died yet.
pub fn is_alive(pidfd: impl AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut look = [PollFd::new(&pidfd, PollFlags::IN)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut look, Some(&at_once)), Ok(0))
}

/// Has the kernel refuse messages with descriptors on a Unix socket, if it can (Linux 6.16). To
/// close a descriptor that a stranger made may take as long as he likes.
pub fn refuse_descriptors(socket: impl AsFd) -> Result<(), Errno> {
    let off: libc::c_int = 0;
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    let from = (&raw const off).cast();
    // SAFETY: the kernel reads an integer of this length.
    let done = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, PASS_RIGHTS, from, len) };
    if done == 0 { Ok(()) } else { Err(last_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event_pair, send_packet};
    use rustix::net::SendFlags;

    #[test]
    fn the_peer_is_known_and_alive() {
        let (a, _b) = event_pair().unwrap();
        let peer = peer_process(&a).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        assert_eq!(peer.uid, rustix::process::getuid().as_raw());
        assert!(is_alive(&peer.pidfd));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        child.wait().unwrap();
        assert!(!is_alive(&pidfd));
    }

    #[test]
    fn descriptors_are_refused_where_the_kernel_can() {
        let (a, b) = event_pair().unwrap();
        match refuse_descriptors(&a) {
            Ok(()) => {
                let sent = send_packet(&b, b"x", &[b.as_fd()], SendFlags::empty());
                assert_eq!(sent, Err(Errno::PERM));
                send_packet(&b, b"x", &[], SendFlags::empty()).unwrap();
            }
            Err(errno) => assert_eq!(errno, Errno::NOPROTOOPT),
        }
    }
}
