//! Waiting for descriptors, and for other threads.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use freeflow_client::Errno;
use libc::{POLLIN, pollfd};
use rustix::event::{EventfdFlags, eventfd};

use super::config::defaults;

/// What a thread waits for.
pub(super) trait Source {
    /// Takes in what has happened; if `look`, also what costs a system call to see, which else is seen
    /// from time to time.
    fn advance(&mut self, look: bool);

    /// Whether a program that does not wait is to be told of that too.
    fn look_is_due(&mut self) -> bool {
        true
    }

    /// Has the next completion raise an event; whether it has to be looked again.
    fn arm(&mut self) -> bool;

    /// Has the thread woken when something happens, and says what to wait for. These events of
    /// `poll(2)` are of interest.
    fn watch(&mut self, events: i16, wake: &Arc<Wake>, fds: &mut Vec<pollfd>);

    /// The thread is awake; whether one of the descriptors was ready.
    fn unwatch(&mut self, wake: &Arc<Wake>, ready: bool);

    /// The earlier of a time to wait and its own next deadline.
    fn earliest(&mut self, left: Option<Duration>) -> Option<Duration> {
        left
    }
}

/// A socket that threads wait for.
pub(super) trait Waits {
    /// What its lock is around.
    type Inner: Source;

    fn lock(&self) -> MutexGuard<'_, Self::Inner>;
}

/// Waits until `test` has an answer, for which it is asked after whatever happens. EAGAIN: not
/// until then; EINTR: a signal handler ran.
pub(super) fn wait_for<S: Waits, T>(
    socket: &S,
    deadline: Option<Instant>,
    mut test: impl FnMut(&mut S::Inner) -> Option<T>,
) -> Result<T, Errno> {
    let start = Instant::now();
    let polling = defaults().polling;
    loop {
        let mut inner = socket.lock();
        inner.advance(false);
        if let Some(answer) = test(&mut inner) {
            return Ok(answer);
        }
        if start.elapsed() >= polling {
            break;
        }
    }
    let wake = Wake::mine()?;
    loop {
        let mut fds = Vec::with_capacity(4);
        let left = {
            let mut inner = socket.lock();
            inner.advance(true);
            if let Some(answer) = test(&mut inner) {
                return Ok(answer);
            }
            if inner.arm() {
                inner.advance(false);
                if let Some(answer) = test(&mut inner) {
                    return Ok(answer);
                }
            }
            let left = inner.earliest(until(deadline)?);
            inner.watch(!0, &wake, &mut fds);
            left
        };
        let own = fds.len();
        fds.push(input(wake.fd()));
        let polled = poll(&mut fds, left);
        socket.lock().unwatch(&wake, is_ready(&fds[..own]));
        wake.clear();
        polled?;
    }
}

/// Whether one of the descriptors is ready.
pub(super) fn is_ready(fds: &[pollfd]) -> bool {
    fds.iter().any(|fd| fd.revents != 0)
}

/// Takes a thread's entry out of those that wait.
pub(super) fn forget(watchers: &mut Vec<Arc<Wake>>, wake: &Arc<Wake>) {
    if let Some(at) = watchers.iter().position(|w| Arc::ptr_eq(w, wake)) {
        watchers.swap_remove(at);
    }
}

/// Counts the forks that made this process.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// This process is a child of `fork`.
pub(super) fn forked() {
    // Relaxed: the child has one thread.
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// What wakes a thread that waits for rsockets: another thread may take the completion that it
/// waits for.
pub(super) struct Wake {
    event: OwnedFd,
    generation: u32,
}

thread_local! {
    static MINE: RefCell<Option<Arc<Wake>>> = const { RefCell::new(None) };
}

impl Wake {
    /// This thread's.
    pub(super) fn mine() -> Result<Arc<Wake>, Errno> {
        // Relaxed: see `forked`.
        let generation = GENERATION.load(Ordering::Relaxed);
        let new = || {
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            Ok(Arc::new(Wake { event, generation }))
        };
        let mine = MINE.try_with(|mine| match &mut *mine.borrow_mut() {
            Some(wake) if wake.generation == generation => Ok(wake.clone()),
            mine => Ok(mine.insert(new()?).clone()),
        });
        // A thread that ends has none any more.
        mine.unwrap_or_else(|_| new())
    }

    /// Wakes it, or has its next wait end at once.
    pub(super) fn wake(&self) {
        // It can only be full of such.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Forgets that it was woken.
    pub(super) fn clear(&self) {
        // EAGAIN: it was not.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    pub(super) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// An entry of `poll(2)`.
pub(super) fn entry(fd: RawFd, events: i16) -> pollfd {
    let revents = 0;
    pollfd {
        fd,
        events,
        revents,
    }
}

/// An entry of `poll(2)` that waits for input.
pub(super) fn input(fd: RawFd) -> pollfd {
    entry(fd, POLLIN)
}

/// `poll(2)`, as a system call: libraries that interpose on libc's come here themselves. How many
/// are ready; `None` waits for ever.
pub(super) fn poll(fds: &mut [pollfd], timeout: Option<Duration>) -> Result<usize, Errno> {
    let time = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the entries and the time live until it returns; no signal mask is given.
    let n = unsafe {
        libc::syscall(
            libc::SYS_ppoll,
            fds.as_mut_ptr(),
            fds.len(),
            time,
            std::ptr::null::<libc::sigset_t>(),
            0_usize,
        )
    };
    usize::try_from(n).map_err(|_| {
        // SAFETY: libc gives the address of this thread's errno.
        Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
    })
}

/// How long until then; `Err`: it has passed.
pub(super) fn until(deadline: Option<Instant>) -> Result<Option<Duration>, Errno> {
    let Some(deadline) = deadline else {
        return Ok(None);
    };
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(Some(left)),
        _ => Err(Errno::AGAIN),
    }
}

/// Nanoseconds of the monotonic clock.
pub(super) fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
