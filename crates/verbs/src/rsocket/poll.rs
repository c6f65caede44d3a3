//! `poll(2)` and `select(2)` over rsockets and other descriptors.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_client::Errno;
use freeflow_rsocket::Phase as End;
use libc::{
    POLLERR, POLLHUP, POLLIN, POLLNVAL, POLLOUT, POLLRDHUP, POLLRDNORM, POLLWRNORM, pollfd,
};

use super::config::defaults;
use super::stream::{Inner, Phase};
use super::table::{Descriptor, find};
use super::wait::{self, Source, Waits, Wake, entry, input};

pub(super) const READ: i16 = POLLIN | POLLRDNORM;
const WRITE: i16 = POLLOUT | POLLWRNORM;
/// What is said whether it was asked for or not.
pub(super) const ALWAYS: i16 = POLLERR | POLLHUP | POLLNVAL;

/// What a program waits for.
pub(super) struct Entry {
    pub(super) fd: RawFd,
    /// `None`: no rsocket.
    pub(super) descriptor: Option<Arc<Descriptor>>,
    pub(super) events: i16,
    /// What is said though it was not asked for.
    pub(super) always: i16,
    pub(super) revents: i16,
}

impl Entry {
    pub(super) fn new(fd: RawFd, events: i16) -> Self {
        Entry {
            fd,
            descriptor: find(fd),
            events,
            always: ALWAYS,
            revents: 0,
        }
    }

    /// All that may be said.
    fn shown(&self) -> i16 {
        self.events | self.always
    }

    /// As [`Descriptor::arm`].
    pub(super) fn arm(&self, wake: &Arc<Wake>, fds: &mut Vec<pollfd>) -> i16 {
        match &self.descriptor {
            Some(descriptor) => descriptor.arm(self.shown(), wake, fds),
            None => 0,
        }
    }
}

impl Ready for Inner {
    fn ready(&self) -> i16 {
        match (self.phase, &self.link) {
            (Phase::Open, Some(link)) => {
                let stream = &link.stream;
                let mut ready = 0;
                if stream.unread() != 0 || !stream.is_readable() {
                    ready |= READ;
                }
                if stream.can_send() || !stream.is_writable() {
                    ready |= WRITE;
                }
                if !stream.is_readable() {
                    ready |= POLLRDHUP;
                }
                ready
                    | match stream.phase() {
                        // Programs that see it read no more.
                        End::Closed if stream.unread() == 0 => POLLHUP,
                        End::Broken => POLLERR | POLLHUP,
                        End::Closed | End::Opening | End::Connected => 0,
                    }
            }
            (Phase::Listening, _) if self.has_request() => READ,
            (Phase::Idle, _) => WRITE | POLLHUP,
            (Phase::Failed, _) => READ | WRITE | POLLERR | POLLHUP,
            (Phase::Gone, _) => POLLNVAL,
            _ => 0,
        }
    }
}

/// What `poll` can be asked about.
pub(super) trait Ready: Source {
    /// All that can be said of it now.
    fn ready(&self) -> i16;
}

/// Whether to see what costs a system call to see.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    No,
    /// Unless that was done a moment ago.
    IfDue,
    Yes,
}

fn ready<S: Waits<Inner: Ready>>(socket: &S, look: Look) -> i16 {
    let mut inner = socket.lock();
    let look = look == Look::Yes || (look == Look::IfDue && inner.look_is_due());
    inner.advance(look);
    inner.ready()
}

/// Has the thread woken when something happens, unless some of the events are there.
fn arm<S: Waits<Inner: Ready>>(
    socket: &S,
    events: i16,
    wake: &Arc<Wake>,
    fds: &mut Vec<pollfd>,
) -> i16 {
    let mut inner = socket.lock();
    if inner.arm() {
        inner.advance(false);
    }
    let ready = inner.ready() & events;
    if ready == 0 {
        inner.watch(events, wake, fds);
    }
    ready
}

impl Descriptor {
    /// All that can be said of it now.
    pub(super) fn ready(&self, look: Look) -> i16 {
        match self {
            Descriptor::Stream(socket) => ready(&**socket, look),
            Descriptor::Datagram(socket) => ready(&**socket, look),
            Descriptor::Epoll(epoll) => epoll.ready(),
            Descriptor::Inherited(_) => POLLNVAL,
        }
    }

    /// Has the thread woken when something happens, unless some of the events are there: those.
    fn arm(&self, events: i16, wake: &Arc<Wake>, fds: &mut Vec<pollfd>) -> i16 {
        match self {
            Descriptor::Stream(socket) => arm(&**socket, events, wake, fds),
            Descriptor::Datagram(socket) => arm(&**socket, events, wake, fds),
            Descriptor::Epoll(epoll) => epoll.arm(wake, fds),
            Descriptor::Inherited(_) => POLLNVAL,
        }
    }

    pub(super) fn unwatch(&self, wake: &Arc<Wake>, ready: bool) {
        match self {
            Descriptor::Stream(socket) => socket.lock().unwatch(wake, ready),
            Descriptor::Datagram(socket) => socket.lock().unwatch(wake, ready),
            Descriptor::Epoll(epoll) => epoll.unwatch_all(wake, ready),
            Descriptor::Inherited(_) => {}
        }
    }

    fn earliest(&self, left: Option<Duration>) -> Option<Duration> {
        match self {
            Descriptor::Stream(socket) => socket.lock().earliest(left),
            _ => left,
        }
    }
}

/// Looks at all; how many are ready.
pub(super) fn check(entries: &mut [Entry], look: Look) -> Result<usize, Errno> {
    let mut others = Vec::new();
    for e in &mut *entries {
        match &e.descriptor {
            Some(descriptor) => e.revents = descriptor.ready(look) & e.shown(),
            None => others.push(entry(e.fd, e.events)),
        }
    }
    if !others.is_empty() {
        wait::poll(&mut others, Some(Duration::ZERO))?;
        take(entries, &others);
    }
    Ok(count(entries))
}

fn take(entries: &mut [Entry], others: &[pollfd]) {
    let waiting = entries.iter_mut().filter(|e| e.descriptor.is_none());
    for (e, polled) in waiting.zip(others) {
        e.revents = polled.revents;
    }
}

fn count(entries: &[Entry]) -> usize {
    entries.iter().filter(|e| e.revents != 0).count()
}

/// Waits until something happens to one of them; how many are ready, perhaps none.
pub(super) fn wait_once(
    entries: &mut [Entry],
    wake: &Arc<Wake>,
    mut left: Option<Duration>,
) -> Result<usize, Errno> {
    let mut fds: Vec<pollfd> = entries
        .iter()
        .filter(|e| e.descriptor.is_none())
        .map(|e| entry(e.fd, e.events))
        .collect();
    let others = fds.len();
    // Where the descriptors of each begin.
    let mut starts = Vec::with_capacity(entries.len() + 1);
    let mut ready = false;
    for e in &mut *entries {
        starts.push(fds.len());
        if let Some(descriptor) = &e.descriptor {
            e.revents = e.arm(wake, &mut fds);
            if e.revents != 0 {
                ready = true;
                break;
            }
            left = descriptor.earliest(left);
        }
    }
    let watched = starts.len();
    starts.push(fds.len());
    fds.push(input(wake.fd()));
    let polled = if ready {
        Ok(0)
    } else {
        wait::poll(&mut fds, left)
    };
    let is_ready = |n: usize| wait::is_ready(&fds[starts[n]..starts[n + 1]]);
    for (n, e) in entries[..watched].iter().enumerate() {
        if let Some(descriptor) = &e.descriptor {
            descriptor.unwatch(wake, is_ready(n));
        }
    }
    wake.clear();
    polled?;
    if ready {
        return check(entries, Look::No);
    }
    take(entries, &fds[..others]);
    for (n, e) in entries.iter_mut().enumerate() {
        if let Some(descriptor) = &e.descriptor {
            let look = if is_ready(n) { Look::Yes } else { Look::No };
            e.revents = descriptor.ready(look) & e.shown();
        }
    }
    Ok(count(entries))
}

/// What to do to find something ready.
pub(super) enum Turn<'a> {
    /// To look at once.
    Look(Look),
    /// To wait for at most that long.
    Wait(&'a Arc<Wake>, Option<Duration>),
}

/// Takes turns until one finds some ready, or the time is over; how many.
pub(super) fn take_turns(
    timeout: Option<Duration>,
    mut turn: impl FnMut(Turn<'_>) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let start = Instant::now();
    let deadline = timeout.and_then(|timeout| start.checked_add(timeout));
    if timeout == Some(Duration::ZERO) {
        let ready = turn(Turn::Look(Look::IfDue))?;
        if ready == 0 {
            // A program that tries again and again must let the router, and the peer, run.
            rustix::thread::sched_yield();
        }
        return Ok(ready);
    }
    loop {
        let ready = turn(Turn::Look(Look::No))?;
        if ready != 0 {
            return Ok(ready);
        }
        if start.elapsed() >= defaults().polling {
            break;
        }
    }
    let wake = Wake::mine()?;
    loop {
        let Ok(left) = wait::until(deadline) else {
            return Ok(0);
        };
        let ready = turn(Turn::Wait(&wake, left))?;
        if ready != 0 {
            return Ok(ready);
        }
    }
}

/// Waits until some are ready; how many.
fn wait_for(entries: &mut [Entry], timeout: Option<Duration>) -> Result<usize, Errno> {
    take_turns(timeout, |turn| match turn {
        Turn::Look(look) => check(entries, look),
        Turn::Wait(wake, left) => wait_once(entries, wake, left),
    })
}

/// A time to wait in milliseconds, as `poll(2)` has it.
pub(super) fn timeout(ms: i32) -> Option<Duration> {
    u64::try_from(ms).ok().map(Duration::from_millis)
}

/// `poll(2)`.
pub(super) fn poll(fds: &mut [pollfd], timeout: Option<Duration>) -> Result<usize, Errno> {
    let mut entries: Vec<_> = fds.iter().map(|p| Entry::new(p.fd, p.events)).collect();
    let ready = wait_for(&mut entries, timeout)?;
    for (p, e) in fds.iter_mut().zip(&entries) {
        p.revents = e.revents;
    }
    Ok(ready)
}

/// Sets of descriptors of `select(2)`: to read, to write, exceptions.
pub(super) struct Sets<'a>(pub(super) [Option<&'a mut libc::fd_set>; 3]);

/// What each set asks for, and which events put a descriptor in it.
const SETS: [(i16, i16); 3] = [
    (READ, READ | POLLHUP | POLLERR),
    (WRITE, WRITE | POLLERR),
    (libc::POLLPRI, libc::POLLPRI),
];

/// `select(2)`.
pub(super) fn select(
    nfds: i32,
    sets: &mut Sets<'_>,
    timeout: Option<Duration>,
) -> Result<usize, Errno> {
    if !(0..=libc::FD_SETSIZE as i32).contains(&nfds) {
        return Err(Errno::INVAL);
    }
    let mut entries = Vec::new();
    for fd in 0..nfds {
        let mut events = 0;
        let mut asked = false;
        for (set, (asks, _)) in sets.0.iter().zip(SETS) {
            let Some(set) = set.as_deref() else { continue };
            // SAFETY: the number is inside the set.
            if unsafe { libc::FD_ISSET(fd, set) } {
                events |= asks;
                asked = true;
            }
        }
        if asked {
            entries.push(Entry::new(fd, events));
        }
    }
    wait_for(&mut entries, timeout)?;
    if entries.iter().any(|e| e.revents & POLLNVAL != 0) {
        return Err(Errno::BADF);
    }
    let mut bits = 0;
    for (set, (asks, shows)) in sets.0.iter_mut().zip(SETS) {
        let Some(set) = set else { continue };
        // SAFETY: it is a set of the program's.
        unsafe { libc::FD_ZERO(&mut **set) };
        for e in &entries {
            if e.events & asks != 0 && e.revents & shows != 0 {
                // SAFETY: the number is inside the set, as it came from there.
                unsafe { libc::FD_SET(e.fd, &mut **set) };
                bits += 1;
            }
        }
    }
    Ok(bits)
}
