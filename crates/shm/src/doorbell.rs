//! What wakes a sleeper: an eventfd towards the router, socket pairs towards the program.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// A session's doorbell. The router watches it edge-triggered and never reads it, so that a
/// library that changes the descriptor's flags cannot block the router.
#[derive(Debug)]
pub struct Doorbell(OwnedFd);

impl Doorbell {
    /// A new one.
    pub fn new() -> Result<Self, Errno> {
        Ok(Doorbell(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// One that was received.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Doorbell(fd)
    }

    /// Wakes the router.
    pub fn ring(&self) {
        // It fails only if the counter is full, 2^64 rings after the last reader: never.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A stream of events: the router writes into the first descriptor (without blocking), the
/// program polls and reads the second, and sees the end of the stream if the router dies.
pub fn event_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = SocketFlags::CLOEXEC;
    let (router, program) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::io::ioctl_fionbio(&router, true)?;
    Ok((router, program))
}
