//! userfaultfd: holding other threads while pages are replaced.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::page_size;

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
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_WP_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;

/// What is asked of the kernel, best first: Linux 6.4 protects pages that do not exist, 5.19
/// shared memory, 5.11 private memory for unprivileged users.
const FEATURES: [u64; 3] = [
    FEATURE_WP | FEATURE_MISSING_SHMEM | FEATURE_WP_SHMEM | FEATURE_WP_UNPOPULATED,
    FEATURE_WP | FEATURE_MISSING_SHMEM | FEATURE_WP_SHMEM,
    FEATURE_WP,
];

const IOCTL_NEW: libc::c_ulong = 0xAA00;
const IOCTL_API: libc::c_ulong = 0xC018_AA3F;
const IOCTL_REGISTER: libc::c_ulong = 0xC020_AA00;
const IOCTL_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const IOCTL_WAKE: libc::c_ulong = 0x8010_AA02;
const IOCTL_WRITEPROTECT: libc::c_ulong = 0xC018_AA06;
const REGISTER_MISSING: u64 = 1;
const REGISTER_WP: u64 = 2;
const PROTECT: u64 = 1;

const EVENT_PAGEFAULT: u8 = 0x12;

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
pub(crate) struct Uffd {
    fd: OwnedFd,
    features: u64,
}

/// What this process may have, and whether it is of use here: whether it can write-protect.
pub fn probe() -> (UffdMode, bool) {
    match create() {
        Some((fd, mode)) => (mode, handshake(fd, FEATURE_WP).is_ok()),
        None => (UffdMode::None, false),
    }
}

/// The best kind there is. The device, which an administrator may hand to a container, needs
/// neither a privilege nor a system call that a seccomp profile would refuse.
fn create() -> Option<(OwnedFd, UffdMode)> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the system call makes a descriptor that nobody else owns, or fails.
    let call =
        |extra: libc::c_int| unsafe { owned(libc::syscall(libc::SYS_userfaultfd, flags | extra)) };
    let device = || {
        let device = rustix::fs::open(
            c"/dev/userfaultfd",
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        );
        // SAFETY: the request makes a descriptor that nobody else owns, or fails.
        device
            .ok()
            .and_then(|fd| unsafe { owned(libc::ioctl(fd.as_raw_fd(), IOCTL_NEW, flags).into()) })
    };
    let full = call(0).or_else(device).map(|fd| (fd, UffdMode::Full));
    full.or_else(|| call(USER_MODE_ONLY).map(|fd| (fd, UffdMode::UserModeOnly)))
}

/// SAFETY: `result` is a descriptor that nobody else owns, or negative.
unsafe fn owned(result: libc::c_long) -> Option<OwnedFd> {
    // SAFETY: as the caller promises.
    (result >= 0).then(|| unsafe { OwnedFd::from_raw_fd(result as libc::c_int) })
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn handshake(fd: OwnedFd, features: u64) -> Result<Uffd, Errno> {
    let uffd = Uffd { fd, features };
    let mut api = UffdioApi {
        api: API,
        features,
        ioctls: 0,
    };
    uffd.ioctl(IOCTL_API, &mut api)?;
    Ok(uffd)
}

impl Uffd {
    /// The best kind there is.
    pub(crate) fn open() -> Option<Self> {
        // A descriptor whose handshake failed is of no more use.
        FEATURES
            .iter()
            .find_map(|&features| handshake(create()?.0, features).ok())
    }

    /// One as older kernels have it, which cannot protect pages that do not exist.
    #[cfg(test)]
    pub(crate) fn without_unpopulated() -> Option<Self> {
        handshake(create()?.0, FEATURES[1]).ok()
    }

    /// Whether shared memory can be held.
    pub(crate) fn holds_shared(&self) -> bool {
        self.features & FEATURE_WP_SHMEM != 0
    }

    fn ioctl<T>(&self, request: libc::c_ulong, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: each request is called with its own structure, whose size is in its number.
        let done =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if done < 0 { Err(last_errno()) } else { Ok(()) }
    }

    fn register(&self, start: u64, len: u64, mode: u64) -> Result<(), Errno> {
        let mut register = UffdioRegister {
            range: UffdioRange { start, len },
            mode,
            ioctls: 0,
        };
        self.ioctl(IOCTL_REGISTER, &mut register)
    }

    /// From now on, writers to the range of private memory wait. It takes page tables for the
    /// whole range.
    pub(crate) fn hold_writers(&self, start: u64, len: u64) -> Result<(), Errno> {
        self.register(start, len, REGISTER_WP)?;
        let populated = if self.features & FEATURE_WP_UNPOPULATED == 0 {
            let advice = rustix::mm::Advice::LinuxPopulateRead;
            // SAFETY: the advice maps the page of zeroes where there is none, no more.
            unsafe { rustix::mm::madvise(start as *mut _, len as usize, advice) }
        } else {
            Ok(())
        };
        let held = populated.and_then(|()| self.protect(start, len));
        if held.is_err() {
            self.release(start, len);
        }
        held
    }

    /// As [`Self::hold_writers`], for shared memory (see [`Self::holds_shared`]).
    pub(crate) fn hold_shared_writers(&self, start: u64, len: u64) -> Result<(), Errno> {
        self.register(start, len, REGISTER_WP)?;
        let held = self.protect(start, len);
        if held.is_err() {
            self.release(start, len);
        }
        held
    }

    fn protect(&self, start: u64, len: u64) -> Result<(), Errno> {
        loop {
            let mut protect = UffdioWriteprotect {
                range: UffdioRange { start, len },
                mode: PROTECT,
            };
            match self.ioctl(IOCTL_WRITEPROTECT, &mut protect) {
                // The address space is changing under us.
                Err(Errno::AGAIN) => {}
                other => return other,
            }
        }
    }

    /// From now on, whoever touches a page of the range that does not exist waits. It takes no
    /// page tables. Whoever holds must not touch them either.
    pub(crate) fn hold_first_touch(&self, start: u64, len: u64) -> Result<(), Errno> {
        self.register(start, len, REGISTER_MISSING)
    }

    /// The range was not replaced: all go on where they were.
    pub(crate) fn release(&self, start: u64, len: u64) {
        // It also lifts the protection and wakes. It fails only where nothing is registered.
        let _ = self.ioctl(IOCTL_UNREGISTER, &mut UffdioRange { start, len });
        self.wake(start, len);
    }

    /// Those who wait in the range try again.
    pub(crate) fn wake(&self, start: u64, len: u64) {
        let _ = self.ioctl(IOCTL_WAKE, &mut UffdioRange { start, len });
    }

    /// The page that somebody waits for, if it was not told before. Allocates nothing.
    pub(crate) fn next_waiter(&self) -> Option<u64> {
        loop {
            // `struct uffd_msg`.
            let mut message = [0u8; 32];
            let n = rustix::io::read(&self.fd, &mut message).ok()?;
            let address = message[16..24].try_into().ok().map(u64::from_ne_bytes);
            if n == message.len() && message[0] == EVENT_PAGEFAULT {
                return address.map(|a| a & !(page_size() - 1));
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
