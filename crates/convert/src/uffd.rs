//! userfaultfd: holding writers while their pages are replaced.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

/// Which kind of userfaultfd the process may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UffdMode {
    /// Faults of the program and of system calls wait.
    Full,
    /// Faults of the program wait, those of system calls fail.
    UserModeOnly,
    /// Refused.
    None,
}

const USER_MODE_ONLY: libc::c_int = 1;
const API: u64 = 0xAA;
const FEATURE_WP: u64 = 1;
const FEATURE_WP_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;

const IOCTL_API: libc::c_ulong = 0xC018_AA3F;
const IOCTL_REGISTER: libc::c_ulong = 0xC020_AA00;
const IOCTL_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const IOCTL_WAKE: libc::c_ulong = 0x8010_AA02;
const IOCTL_WRITEPROTECT: libc::c_ulong = 0xC018_AA06;
const REGISTER_WP: u64 = 2;
const PROTECT: u64 = 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// A userfaultfd that write-protects.
#[derive(Debug)]
pub(crate) struct Uffd(OwnedFd);

/// What this process may have, and whether pages that do not exist yet can be protected (Linux
/// 6.4), without which it is of no use here.
pub fn probe() -> (UffdMode, bool) {
    for (flags, mode) in [
        (0, UffdMode::Full),
        (USER_MODE_ONLY, UffdMode::UserModeOnly),
    ] {
        if let Ok(fd) = create(flags) {
            return (mode, handshake(fd).is_ok());
        }
    }
    (UffdMode::None, false)
}

fn create(flags: libc::c_int) -> Result<OwnedFd, Errno> {
    let flags = flags | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the system call makes a descriptor that nobody else owns, or fails.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, flags);
        if fd < 0 {
            Err(last_errno())
        } else {
            Ok(OwnedFd::from_raw_fd(fd as libc::c_int))
        }
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn handshake(fd: OwnedFd) -> Result<Uffd, Errno> {
    let features = FEATURE_WP | FEATURE_WP_SHMEM | FEATURE_WP_UNPOPULATED;
    let uffd = Uffd(fd);
    uffd.ioctl(
        IOCTL_API,
        &mut UffdioApi {
            api: API,
            features,
            ioctls: 0,
        },
    )?;
    Ok(uffd)
}

impl Uffd {
    /// The best kind there is.
    pub(crate) fn open() -> Result<Self, Errno> {
        create(0)
            .or_else(|_| create(USER_MODE_ONLY))
            .and_then(handshake)
    }

    fn ioctl<T>(&self, request: libc::c_ulong, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: each request is called with its own structure, whose size is in its number.
        let done =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if done < 0 { Err(last_errno()) } else { Ok(()) }
    }

    /// From now on, writers to the range wait.
    pub(crate) fn protect(&self, start: u64, len: u64) -> Result<(), Errno> {
        let range = || UffdioRange { start, len };
        let mut register = UffdioRegister {
            range: range(),
            mode: REGISTER_WP,
            ioctls: 0,
        };
        self.ioctl(IOCTL_REGISTER, &mut register)?;
        loop {
            let mut protect = UffdioWriteprotect {
                range: range(),
                mode: PROTECT,
            };
            match self.ioctl(IOCTL_WRITEPROTECT, &mut protect) {
                // The address space is changing under us.
                Err(Errno::AGAIN) => {}
                Err(errno) => {
                    self.release(start, len);
                    return Err(errno);
                }
                Ok(()) => return Ok(()),
            }
        }
    }

    /// The range was not replaced: writers go on where they were.
    pub(crate) fn release(&self, start: u64, len: u64) {
        // It also lifts the protection and wakes. It fails only where nothing is registered.
        let _ = self.ioctl(IOCTL_UNREGISTER, &mut UffdioRange { start, len });
        self.wake(start, len);
    }

    /// Writers to the range try again.
    pub(crate) fn wake(&self, start: u64, len: u64) {
        let _ = self.ioctl(IOCTL_WAKE, &mut UffdioRange { start, len });
    }
}
