//! Thin owners of the library's objects, so that a test is written without unsafe code.

mod buffer;
mod completion;
mod context;
mod extended;
mod library;
mod memory;
mod queue;
mod request;
mod shared;

pub(crate) use buffer::{Buf, pattern};
pub(crate) use completion::{Channel, Cq, Wc};
pub(crate) use context::{AsyncEvent, Context, Pd};
pub(crate) use extended::{CqEx, Reader, Wr};
pub(crate) use library::{buffers, library, operation, verb};
pub(crate) use memory::{Ah, Mr, Mw, address, address_of};
pub(crate) use queue::{Attr, Posted, Qp, QpSpec, posted};
pub(crate) use request::{Recv, RecvList, Send, SendList, Sge, Target};
pub(crate) use shared::{Srq, Xrcd};

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// What the last failed call left in errno.
pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// An errno value as its name, for messages.
pub(crate) fn name_of(errno: i32) -> String {
    format!("{} ({errno})", std::io::Error::from_raw_os_error(errno))
}

/// Waits until the descriptor is readable; false if the time is over.
pub(crate) fn readable(fd: RawFd, within: Duration) -> bool {
    let end = Instant::now() + within;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd on the stack.
        let n = unsafe { libc::poll(&mut poll, 1, left.as_millis() as i32 + 1) };
        if n > 0 {
            return true;
        }
        if left.is_zero() {
            return false;
        }
    }
}

/// Sets or clears `O_NONBLOCK`.
pub(crate) fn nonblocking(fd: RawFd, on: bool) {
    // SAFETY: fcntl on a descriptor touches no memory.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        let flags = if on {
            flags | libc::O_NONBLOCK
        } else {
            flags & !libc::O_NONBLOCK
        };
        libc::fcntl(fd, libc::F_SETFL, flags);
    }
}
