//! `epoll(7)` over rsockets and other descriptors. The others are in a real epoll instance, whose
//! descriptor is the program's name for it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use freeflow_client::Errno;
use libc::{EPOLLERR, EPOLLET, EPOLLHUP, EPOLLONESHOT, POLLIN, epoll_event, pollfd};
use rustix::event::epoll as real;

use super::poll::{ALWAYS, Entry, Look, Turn, check, take_turns, wait_once};
use super::table::{Descriptor, find};
use super::wait::{self, Waits, Wake, input};

/// An rsocket in the list.
struct Item {
    /// The number may be another's by now.
    socket: Weak<Descriptor>,
    events: u32,
    data: u64,
    /// What was told at the edge, and how much had happened then.
    told: Option<(i16, u64)>,
}

struct State {
    items: BTreeMap<RawFd, Item>,
    /// Where the next look begins: all get their turn.
    next: RawFd,
    watchers: Vec<Arc<Wake>>,
}

/// An instance.
pub(super) struct Epoll {
    others: OwnedFd,
    state: Mutex<State>,
}

impl Epoll {
    pub(super) fn new(flags: i32) -> Result<Self, Errno> {
        let flags = real::CreateFlags::from_bits(flags as u32).ok_or(Errno::INVAL)?;
        Ok(Epoll {
            others: real::create(flags)?,
            state: Mutex::new(State {
                items: BTreeMap::new(),
                next: 0,
                watchers: Vec::new(),
            }),
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.others.as_raw_fd()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `epoll_ctl(2)`.
    pub(super) fn control(
        &self,
        op: i32,
        fd: RawFd,
        event: Option<epoll_event>,
    ) -> Result<(), Errno> {
        if fd == self.fd() {
            return Err(Errno::INVAL);
        }
        let mut state = self.lock();
        state
            .items
            .retain(|_, item| item.socket.strong_count() != 0);
        let socket = match find(fd) {
            Some(found) if matches!(*found, Descriptor::Inherited(_)) => return Err(Errno::BADF),
            Some(found) if !matches!(*found, Descriptor::Epoll(_)) => found,
            _ => return self.control_other(op, fd, event),
        };
        let known = state.items.contains_key(&fd);
        let before = match (op, known) {
            (libc::EPOLL_CTL_ADD, true) => return Err(Errno::EXIST),
            (libc::EPOLL_CTL_MOD | libc::EPOLL_CTL_DEL, false) => return Err(Errno::NOENT),
            (libc::EPOLL_CTL_DEL, true) => state.items.remove(&fd),
            (libc::EPOLL_CTL_ADD | libc::EPOLL_CTL_MOD, _) => {
                let event = event.ok_or(Errno::FAULT)?;
                let item = Item {
                    socket: Arc::downgrade(&socket),
                    events: event.events,
                    data: event.u64,
                    told: None,
                };
                state.items.insert(fd, item)
            }
            _ => return Err(Errno::INVAL),
        };
        if let Some(before) = before.and_then(|item| item.socket.upgrade())
            && (op == libc::EPOLL_CTL_DEL || !Arc::ptr_eq(&before, &socket))
        {
            // `unwatch_all` does not find it any more.
            for wake in &state.watchers {
                before.unwatch(wake, false);
            }
        }
        state.watchers.iter().for_each(|wake| wake.wake());
        Ok(())
    }

    fn control_other(&self, op: i32, fd: RawFd, event: Option<epoll_event>) -> Result<(), Errno> {
        if fd < 0 {
            return Err(Errno::BADF);
        }
        // SAFETY: the number is looked at by the kernel alone, which says if it is none.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let with = || {
            let event = event.ok_or(Errno::FAULT)?;
            let flags = real::EventFlags::from_bits_retain(event.events);
            Ok((real::EventData::new_u64(event.u64), flags))
        };
        match op {
            libc::EPOLL_CTL_ADD => {
                let (data, flags) = with()?;
                real::add(&self.others, fd, data, flags)
            }
            libc::EPOLL_CTL_MOD => {
                let (data, flags) = with()?;
                real::modify(&self.others, fd, data, flags)
            }
            libc::EPOLL_CTL_DEL => real::delete(&self.others, fd),
            _ => Err(Errno::INVAL),
        }
    }

    /// What to look at: the others together, and each rsocket that is not done.
    fn entries(&self) -> Vec<Entry> {
        let state = self.lock();
        let mut entries = vec![Entry {
            fd: self.others.as_raw_fd(),
            descriptor: None,
            events: POLLIN,
            always: ALWAYS,
            revents: 0,
        }];
        let (before, behind) = (
            state.items.range(..state.next),
            state.items.range(state.next..),
        );
        for (&fd, item) in behind.chain(before) {
            let mut entry = Entry {
                fd,
                descriptor: item.socket.upgrade(),
                events: item.events as i16,
                always: ALWAYS,
                revents: 0,
            };
            let armed = item.events & !(EPOLLET | EPOLLONESHOT) as u32 != 0;
            if armed && let Some(descriptor) = &entry.descriptor {
                if let Some((told, activity)) = item.told
                    && descriptor.activity() == activity
                {
                    // Nothing has happened since it was told.
                    entry.events &= !told;
                    entry.always &= !told;
                }
                entries.push(entry);
            }
        }
        entries
    }

    /// Tells what is ready of the entries.
    fn collect(&self, entries: &[Entry], events: &mut [epoll_event]) -> Result<usize, Errno> {
        let mut n = 0;
        let mut state = self.lock();
        for entry in entries.iter().skip(1).filter(|e| e.revents != 0) {
            let Some(item) = state.items.get_mut(&entry.fd) else {
                continue;
            };
            let Some(event) = events.get_mut(n) else {
                state.next = entry.fd;
                return Ok(n);
            };
            let activity = entry.descriptor.as_ref().map_or(0, |d| d.activity());
            let ready = entry.revents as u16 as u32;
            let mut shown = ready & (item.events | (EPOLLERR | EPOLLHUP) as u32);
            if item.events & EPOLLET as u32 != 0 {
                match item.told {
                    Some((told, at)) if at == activity => {
                        shown &= !u32::from(told as u16);
                        item.told = Some((told | entry.revents, at));
                    }
                    _ => item.told = Some((entry.revents, activity)),
                }
            }
            if shown == 0 {
                continue;
            }
            if item.events & EPOLLONESHOT as u32 != 0 {
                item.events &= (EPOLLET | EPOLLONESHOT) as u32;
            }
            *event = epoll_event {
                events: shown,
                u64: item.data,
            };
            n += 1;
        }
        drop(state);
        if entries.first().is_some_and(|e| e.revents != 0) && n < events.len() {
            n += self.collect_others(&mut events[n..])?;
        }
        Ok(n)
    }

    fn collect_others(&self, events: &mut [epoll_event]) -> Result<usize, Errno> {
        let mut others = Vec::with_capacity(events.len());
        let now = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        real::wait(
            &self.others,
            rustix::buffer::spare_capacity(&mut others),
            Some(&now),
        )?;
        for (to, other) in events.iter_mut().zip(&others) {
            *to = epoll_event {
                events: { other.flags }.bits(),
                u64: { other.data }.u64(),
            };
        }
        Ok(others.len())
    }

    /// `epoll_wait(2)`: how many events.
    pub(super) fn wait(
        &self,
        events: &mut [epoll_event],
        timeout: Option<Duration>,
    ) -> Result<usize, Errno> {
        take_turns(timeout, |turn| {
            let (entries, ready) = match turn {
                Turn::Look(look) => {
                    let mut entries = self.entries();
                    let ready = check(&mut entries, look)?;
                    (entries, ready)
                }
                Turn::Wait(wake, left) => {
                    self.lock().watchers.push(wake.clone());
                    // What was changed before that is seen, and what is changed later wakes.
                    let mut entries = self.entries();
                    let ready = wait_once(&mut entries, wake, left);
                    self.unwatch(wake);
                    (entries, ready?)
                }
            };
            match ready {
                0 => Ok(0),
                _ => self.collect(&entries, events),
            }
        })
    }

    /// Whether there are events, for `poll` over it.
    pub(super) fn ready(&self) -> i16 {
        let mut entries = self.entries();
        match check(&mut entries, Look::Yes) {
            Ok(1..) => POLLIN,
            _ => 0,
        }
    }

    /// Has a thread that polls it woken.
    pub(super) fn arm(&self, wake: &Arc<Wake>, fds: &mut Vec<pollfd>) -> i16 {
        fds.push(input(self.others.as_fd().as_raw_fd()));
        self.lock().watchers.push(wake.clone());
        for entry in self.entries().iter().skip(1) {
            if entry.arm(wake, fds) != 0 {
                return POLLIN;
            }
        }
        0
    }

    /// The thread that polled it is awake.
    pub(super) fn unwatch_all(&self, wake: &Arc<Wake>, ready: bool) {
        self.unwatch(wake);
        let items = self
            .lock()
            .items
            .values()
            .map(|i| i.socket.clone())
            .collect::<Vec<_>>();
        for socket in items.iter().filter_map(Weak::upgrade) {
            socket.unwatch(wake, ready);
        }
    }

    fn unwatch(&self, wake: &Arc<Wake>) {
        wait::forget(&mut self.lock().watchers, wake);
    }
}

impl Descriptor {
    /// Grows with whatever happens to it.
    fn activity(&self) -> u64 {
        match self {
            Descriptor::Stream(socket) => socket.lock().activity,
            Descriptor::Datagram(socket) => socket.lock().activity,
            Descriptor::Epoll(_) | Descriptor::Inherited(_) => 0,
        }
    }
}
